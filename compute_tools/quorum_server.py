"""A stock server on a lasting data directory whose WAL goes to safekeepers.

`bin/postgres` of pg_install.py: `python -m compute_tools.quorum_server SERVER LIBRARY ARGUMENT...`,
where LIBRARY is the zenith library.

The process becomes the server, so that whoever started it knows its process id. Before that it
writes postgresql.conf anew in the words of a stock server, and starts what quorum_sidecar.py
describes. A server whose configuration has nothing of Zenith starts as it would without us.

No pageserver takes part: the truth is in the data directory, so unlike a compute's this server
keeps the user's fsync and full_page_writes, and recovers by itself after a crash.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from compute_tools import postgres_conf
from compute_tools.config_files import ConfigFiles
from compute_tools.lazy_map import MARKER
from compute_tools.postgres_process import servers_in
from compute_tools.quorum_settings import QuorumSettings, QuorumSettingsError
from compute_tools.quorum_sidecar import Sidecar, SidecarError, make_spec
from postgres_ffi.distrib import DistribError, find_distrib

GENERATED = "postgresql.zenith.conf"


class QuorumServerError(Exception):
    """The server must not start; the message says why."""


def prepare(server: str, library: str, arguments: Sequence[str]) -> list[str]:
    """The command line of the server; with safekeepers the sidecar runs when this returns.

    Raises QuorumServerError and what the modules it uses raise.
    """
    unchanged = [server, *arguments]
    pgdata, given = _parse(arguments)
    if pgdata is None or "config_file" in given or os.geteuid() == 0:
        return unchanged  # the server knows what to say, as below
    conf = pgdata / "postgresql.conf"
    config = ConfigFiles(pgdata, pgdata / GENERATED)
    try:
        lines, automatic = config.read()
    except FileNotFoundError:
        return unchanged
    settings = postgres_conf.parse([*lines, *automatic]) | given
    if postgres_conf.TWINS.keys().isdisjoint(settings):
        return unchanged
    if (pgdata / MARKER).exists():
        raise QuorumServerError(f'{pgdata} is of a compute node: start it with "zenith pg start"')
    # A second election would fence the server that runs.
    for pid in servers_in(pgdata):
        raise QuorumServerError(f"another server (PID {pid}) is running in data directory {pgdata}")
    config.generate_plain()
    forced = {"config_file": str(pgdata / GENERATED)}
    forced["shared_preload_libraries"] = postgres_conf.preload_libraries(
        settings.get("shared_preload_libraries", ""), library
    )
    if settings.get("wal_acceptors"):
        find_distrib(Path(server).parent.parent).require_commits_wait()
        quorum = QuorumSettings.of(settings, conf)
        spec = make_spec(quorum, pgdata, int(settings.get("port") or 5432))
        forced |= _quorum_settings(settings, spec.feedback_file)
        Sidecar.start(spec, config)
    options = [part for item in forced.items() for part in ("-c", "=".join(item))]
    return [*unchanged, *options]


def _quorum_settings(settings: Mapping[str, str], feedback_file: Path) -> dict[str, str]:
    forced = {
        "synchronous_standby_names": "walproposer",
        # The walproposer ends with the server it began with.
        "restart_after_crash": "off",
        # WAL that the quorum has not got yet must not go.
        "max_slot_wal_keep_size": "-1",
        "zenith.feedback_file": str(feedback_file),
    }
    if settings.get("wal_level", "").lower() != "logical":
        forced["wal_level"] = "replica"
    if "listen_addresses" in settings:
        forced["listen_addresses"] = postgres_conf.with_loopback(settings["listen_addresses"])
    return forced


def _parse(arguments: Sequence[str]) -> tuple[Path | None, dict[str, str]]:
    """Data directory and settings of a server's command line; no directory: nothing for us."""
    pgdata, given = os.environ.get("PGDATA"), {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            given[name.replace("-", "_").lower()] = value
            continue
        option, value = argument[:2], argument[2:]
        if option in ("-C", "-?"):
            return None, {}
        # Those with a value: getopt() in postmaster.c.
        if option[1:] in tuple("BcDdfhkNprStW"):
            value = value or (rest.pop(0) if rest else "")
        if option == "-D":
            pgdata = value
        elif option == "-p":
            given["port"] = value
        elif option == "-c":
            name, _, value = value.partition("=")
            given[name.replace("-", "_").lower()] = value
    return (Path(pgdata).absolute() if pgdata else None), given


def main() -> int:
    """Become the server; returns only if that cannot be."""
    server, library, *arguments = sys.argv[1:]
    try:
        command = prepare(server, library, arguments)
    except (
        DistribError,
        OSError,
        QuorumServerError,
        QuorumSettingsError,
        SidecarError,
        ValueError,
    ) as e:
        print(f"postgres: FATAL:  {e}", file=sys.stderr)
        return 1
    return os.execv(server, command)


if __name__ == "__main__":
    sys.exit(main())
