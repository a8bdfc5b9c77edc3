"""`python -m compute_tools.pg_install DIR`: an installation of Postgres that knows Zenith's modes.

Its programs and directories are links to a distribution's. Two are scripts of ours:

- `bin/postgres` answers `--sync-safekeepers` (sync_safekeepers.py), starts a server whose
  configuration names safekeepers with a walproposer beside it (quorum_server.py), and is the
  distribution's server else.
- `bin/pg_ctl` is the distribution's, told that it lies in DIR, so that it starts ours. (A link is
  resolved by the programs themselves, and would lead to the distribution's server.)

`bin/postgres.distrib` is the distribution's server: by this link find_distrib() sees through DIR.
Made again at any time; what is right is left as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pgxn.build import ModuleBuildError, build_module
from postgres_ffi.distrib import WRAPPED_SERVER, DistribError, PgDistrib, directory_of, find_distrib

DEFAULT_DIRECTORY = Path(sys.prefix) / "pg_install"

_SERVER = """\
#!/bin/sh
# The server of PostgreSQL with the modes of Zenith: python -m compute_tools.pg_install
case "${{1-}}" in
--sync-safekeepers)
    shift
    exec {python} -P -m compute_tools.sync_safekeepers "$@" ;;
--wal-redo)
    echo 'postgres: there is no mode --wal-redo: the pageserver runs a stock server by itself' >&2
    exit 1 ;;
-V | --version | -\\? | --help | --boot | --check | --single | --describe-config)
    exec {server} "$@" ;;
esac
exec {python} -P -m compute_tools.quorum_server {server} {library} "$@"
"""

_PG_CTL = """\
#!/bin/bash
# pg_ctl of PostgreSQL, which takes the server that lies beside this file.
exec -a {itself} {pg_ctl} "$@"
"""


def install(directory: Path, distrib: PgDistrib) -> None:
    """Make or complete the installation. Raises OSError, DistribError and ModuleBuildError."""
    directory = directory.absolute()
    bin_dir = directory / "bin"
    if os.path.lexists(bin_dir / "postgres") and not (bin_dir / WRAPPED_SERVER).is_symlink():
        raise DistribError(f"{directory} is another installation of Postgres: name a new directory")
    bin_dir.mkdir(parents=True, exist_ok=True)
    server, pg_ctl = distrib.binary("postgres"), distrib.binary("pg_ctl")
    for program in distrib.bin_dir.iterdir():
        if program.name not in ("postgres", "postmaster", "pg_ctl"):
            _link(bin_dir / program.name, program)
    _link(bin_dir / WRAPPED_SERVER, server)
    quoted = {"python": sys.executable, "server": str(server), "pg_ctl": str(pg_ctl)}
    quoted["library"] = str(build_module(distrib, "zenith"))
    quoted["itself"] = str(bin_dir / "pg_ctl")
    quoted = {name: shlex.quote(text) for name, text in quoted.items()}
    _write_program(bin_dir / "postgres", _SERVER.format(**quoted))
    _write_program(bin_dir / "pg_ctl", _PG_CTL.format(**quoted))
    for name in ("lib", "share", "include"):
        target = directory_of(distrib, name)
        if target is not None:
            _link(directory / name, target)


def _link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, at once if it was another one."""
    if path.is_symlink() and path.readlink() == target:
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        temp = Path(scratch) / path.name
        temp.symlink_to(target)
        temp.replace(path)


def _write_program(path: Path, text: str) -> None:
    if not path.is_symlink() and path.is_file() and path.read_text() == text:
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        temp = Path(scratch) / path.name
        temp.write_text(text)
        temp.chmod(0o755)
        temp.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the installation and print its path; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m compute_tools.pg_install",
        description="Make an installation of Postgres whose bin/postgres knows "
        "--sync-safekeepers, and starts servers that are replicated to safekeepers.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help="where to make it (default: %(default)s)",
    )
    parser.add_argument(
        "--pg-distrib-dir",
        type=Path,
        metavar="DIR",
        help="the distribution (default: $POSTGRES_DISTRIB_DIR, else PostgreSQL 15)",
    )
    options = parser.parse_args(arguments)
    try:
        install(options.directory, find_distrib(options.pg_distrib_dir))
    except (DistribError, ModuleBuildError, OSError) as e:
        print(f"pg_install: {e}", file=sys.stderr)
        return 1
    print(options.directory.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
