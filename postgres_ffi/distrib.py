"""Finding an installed PostgreSQL distribution."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .versions import VERSIONS, PgVersion

DISTRIB_DIR_VARIABLE = "POSTGRES_DISTRIB_DIR"
DEBIAN_ROOT = Path("/usr/lib/postgresql")
DEBIAN_INCLUDE_ROOT = Path("/usr/include/postgresql")
WRAPPED_SERVER = "postgres.distrib"
"""In bin/ of an installation that wraps a distribution: a link to the latter's server."""

_VERSION_OUTPUT = re.compile(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?")


class DistribError(Exception):
    """No usable PostgreSQL distribution; the message names the place and the remedy."""


@dataclass(frozen=True, slots=True)
class PgDistrib:
    """An installed PostgreSQL of a supported major version.

    `include_server_dir` is None when the server headers are not installed; `version_num` is as in
    SQL `SHOW server_version_num`, e.g. 150020.
    """

    bin_dir: Path
    pkglib_dir: Path
    include_server_dir: Path | None
    version_num: int
    major: int

    @property
    def version(self) -> PgVersion:
        """The table of formats of this major version."""
        return VERSIONS[self.major]

    @property
    def release(self) -> str:
        """Its version as users know it, e.g. `15.13`."""
        return f"{self.major}.{self.version_num % 10000}"

    def require_commits_wait(self) -> None:
        """DistribError if it acknowledges commits before they are durable on the standby.

        For whoever starts a server whose commits wait for others (synchronous_standby_names).
        """
        minor = self.version.sync_rep_minor
        if self.version_num % 10000 < minor:
            raise DistribError(
                f"PostgreSQL {self.release} in {self.bin_dir.parent} lets commits return before"
                " they are durable in the storage, in the first moments after its start: install"
                f" PostgreSQL {self.major}.{minor} or a later {self.major}"
            )

    def binary(self, name: str) -> Path:
        """Path of one of its programs; DistribError if the distribution lacks it."""
        path = self.bin_dir / name
        if not os.access(path, os.X_OK):
            raise DistribError(
                f"Can't find {name} in {self.bin_dir}: install the complete PostgreSQL"
                f" {self.major} server and client packages"
            )
        return path


def find_distrib(explicit: Path | None = None) -> PgDistrib:
    """The distribution in `explicit`, else in $POSTGRES_DISTRIB_DIR, else the newest supported one
    that Debian's packages installed. DistribError if there is none or it is unsupported.

    A directory is given as its root, the one that holds `bin/postgres`. One that wraps a
    distribution stands for that.
    """
    if explicit is not None:
        return _open_distrib(explicit)
    from_environment = os.environ.get(DISTRIB_DIR_VARIABLE)
    if from_environment:
        return _open_distrib(Path(from_environment))
    for major in sorted(VERSIONS, reverse=True):
        root = DEBIAN_ROOT / str(major)
        if _has_postgres(root):
            return _open_distrib(root)
    newest = max(VERSIONS)
    raise DistribError(
        f"Can't find postgres binary at {DEBIAN_ROOT / str(newest)}: install the package"
        f" postgresql-{newest} or set {DISTRIB_DIR_VARIABLE}"
    )


def _has_postgres(root: Path) -> bool:
    return os.access(root / "bin" / "postgres", os.X_OK)


def _open_distrib(root: Path) -> PgDistrib:
    root = root.expanduser().absolute()
    if not _has_postgres(root):
        raise DistribError(
            f"Can't find postgres binary at {root}: it must hold bin/postgres;"
            f" correct the path or {DISTRIB_DIR_VARIABLE}"
        )
    wrapped = root / "bin" / WRAPPED_SERVER
    if wrapped.is_symlink():
        return _open_distrib(wrapped.resolve().parent.parent)
    bin_dir = root / "bin"
    major, version_num = _version(bin_dir / "postgres")
    if major not in VERSIONS:
        supported = ", ".join(str(known) for known in sorted(VERSIONS))
        raise DistribError(
            f"PostgreSQL {major} at {root} is not supported: install one of {supported}"
        )
    pkglib_dir, include_server_dir = _directories(root, major)
    return PgDistrib(bin_dir, pkglib_dir, include_server_dir, version_num, major)


def directory_of(distrib: PgDistrib, name: str) -> Path | None:
    """The directory `lib`, `share` or `include` of a distribution, None if it has none.

    Raises DistribError.
    """
    option = {"lib": "--pkglibdir", "share": "--sharedir", "include": "--includedir"}[name]
    pg_config = distrib.bin_dir / "pg_config"
    if os.access(pg_config, os.X_OK):
        directory = Path(_run(pg_config, option).rstrip("\n"))
    else:
        directory = distrib.bin_dir.parent / name
    return directory if directory.is_dir() else None


def _version(postgres: Path) -> tuple[int, int]:
    """(major, version_num) that `postgres -V` reports."""
    output = _run(postgres, "-V")
    match = _VERSION_OUTPUT.search(output)
    if match is None:
        raise DistribError(f"{postgres} -V reports no release version: {output.strip()!r}")
    major = int(match[1])
    return major, major * 10000 + int(match[2] or 0)


def _directories(root: Path, major: int) -> tuple[Path, Path | None]:
    """(library directory, directory of the server headers or None).

    pg_config knows both; without it the layouts of Debian and of `make install` are tried.
    """
    pg_config = root / "bin" / "pg_config"
    if os.access(pg_config, os.X_OK):
        pkglib, include = _run(pg_config, "--pkglibdir", "--includedir-server").splitlines()[:2]
        pkglib_dir, candidates = Path(pkglib), [Path(include)]
    else:
        pkglib_dir = next(
            (path for path in (root / "lib" / "postgresql", root / "lib") if path.is_dir()),
            root / "lib",
        )
        candidates = [
            root / "include" / "postgresql" / "server",
            root / "include" / "server",
        ]
        if root.parent == DEBIAN_ROOT:
            candidates.append(DEBIAN_INCLUDE_ROOT / str(major) / "server")
    headers = (path for path in candidates if (path / "postgres.h").is_file())
    return pkglib_dir, next(headers, None)


def _run(program: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except subprocess.CalledProcessError as error:
        detail = error.stderr.strip() or f"exit code {error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        detail = str(error)
    command = " ".join([str(program), *arguments])
    raise DistribError(f"{command} failed: {detail}; reinstall PostgreSQL there")
