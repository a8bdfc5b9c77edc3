"""The ``pageserver`` program: command line, initialisation, start and stop of the daemon."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pageserver import config
from pageserver.config import PageServerConf
from zenith_utils.daemonize import bind_listener, daemonize, open_standard_streams
from zenith_utils.descriptors import raise_descriptor_limit
from zenith_utils.durable import write_file_durably
from zenith_utils.errors import render_error
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.log import init_logging
from zenith_utils.lsn import Lsn
from zenith_utils.pid_file import PidFile
from zenith_utils.quick_start import quick_imports
from zenith_utils.shutdown import IMMEDIATE_EXIT_CODE, Shutdown, ShutdownMode
from zenith_utils.version import VersionAction, version_text

if TYPE_CHECKING:
    import socket

    from postgres_ffi.distrib import PgDistrib
    from zenith_utils.jwt_tokens import TokenVerifier

log = logging.getLogger(__name__)

LOG_FILE_NAME = "pageserver.log"
PID_FILE_NAME = "pageserver.pid"
# Longest time a thread may keep the interpreter from others that wait for it: page requests are
# short and must not queue behind bookkeeping.
SWITCH_INTERVAL = 0.0005
STOP_DEADLINE = 10.0
_EPILOG = """\
examples:
  pageserver -D data --init -c "id=1"
      makes a repository in an existing directory; its pageserver.toml lists all settings
  pageserver -D data -d -c "listen_pg_addr='127.0.0.1:6400'" -c "gc_period='10 s'"
      runs it in the background, with other settings than those of the file

The environment variable RUST_LOG filters the log, e.g. RUST_LOG=info,pageserver.walreceiver=debug.
SIGTERM and SIGINT stop it with everything on disk, SIGQUIT (status 111) as a crash would.
"""


class StartError(Exception):
    """The pageserver cannot start; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the given arguments (default: the process's); the exit status."""
    open_standard_streams()
    args = _parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args)
    except Exception as error:
        print(render_error(error), file=sys.stderr)
        if logging.getLogger().handlers:
            log.error("pageserver failed", exc_info=error)
        return 1


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pageserver",
        description="Keeps the pages of Postgres clusters as of any LSN: takes in their WAL and "
        "serves pages to computes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=VersionAction)
    parser.add_argument(
        "-D",
        "--workdir",
        metavar="DIR",
        default=".zenith",
        help="the repository, which must exist (default: .zenith)",
    )
    parser.add_argument(
        "-d",
        "--daemonize",
        action="store_true",
        help="run in the background: pageserver.log, pageserver.pid",
    )
    parser.add_argument(
        "--init", action="store_true", help="make a repository and its pageserver.toml, and exit"
    )
    parser.add_argument(
        "--create-tenant", metavar="ID", type=TenantId.parse, help="create a tenant during init"
    )
    parser.add_argument(
        "--initial-timeline-id",
        metavar="ID",
        type=TimelineId.parse,
        help="id of the first timeline of the tenant created during init",
    )
    parser.add_argument(
        "-c",
        dest="overrides",
        metavar="TOML",
        action="append",
        default=[],
        help="configuration that wins over pageserver.toml, a TOML document; may be repeated",
    )
    args = parser.parse_args(argv)
    if args.create_tenant is not None and not args.init:
        parser.error("--create-tenant requires --init")
    if args.initial_timeline_id is not None and args.create_tenant is None:
        parser.error("--initial-timeline-id requires --create-tenant")
    return args


def _run(args: argparse.Namespace) -> int:
    if args.init and args.daemonize:
        raise StartError("--daemonize cannot be used with --init")
    workdir = _enter_workdir(Path(args.workdir))
    if args.init:
        _init(workdir, args.overrides, args.create_tenant, args.initial_timeline_id)
        return 0
    document = config.merge_overrides(config.load_document(workdir), args.overrides, init=False)
    return _serve(config.parse_config(document, workdir), daemon=args.daemonize)


def _enter_workdir(path: Path) -> Path:
    """The canonical path, which is the current directory from now on.

    Relative paths in the configuration are relative to it.
    """
    try:
        workdir = path.resolve(strict=True)
        os.chdir(workdir)
    except OSError as error:
        raise StartError(f"Error opening workdir '{path}'") from error
    return workdir


def _warn_of_ineffective_settings(conf: PageServerConf) -> None:
    for warning in config.ineffective_settings(conf):
        print(f"Warning: {warning}", file=sys.stderr)


def _find_distrib(conf: PageServerConf) -> PgDistrib:
    from postgres_ffi.distrib import find_distrib

    return find_distrib(conf.pg_distrib_dir)


def _init(
    workdir: Path,
    overrides: list[str],
    tenant_id: TenantId | None,
    timeline_id: TimelineId | None,
) -> None:
    """Makes a repository. The configuration comes last: it says that the rest is complete."""
    path = workdir / config.CONFIG_FILE_NAME
    if path.exists():
        raise StartError(f"pageserver config '{path}' exists already, cannot init again")
    document = config.merge_overrides({}, overrides, init=True)
    conf = config.parse_config(document, workdir)
    distrib = _find_distrib(conf)
    _warn_of_ineffective_settings(conf)
    init_logging(workdir / LOG_FILE_NAME, os.environ.get("RUST_LOG"))
    log.info("version: %s", version_text("pageserver"))
    conf.tenants_path.mkdir(exist_ok=True)
    if tenant_id is not None:
        _init_tenant(conf, distrib, tenant_id, timeline_id or TimelineId.generate())
    # Nobody else is to read what remote storage takes to get in.
    mode = 0o644 if conf.remote_storage is None else 0o600
    write_file_durably(path, config.dump_document(document).encode(), mode=mode)
    print("pageserver init succeeded")


def _init_tenant(
    conf: PageServerConf, distrib: PgDistrib, tenant_id: TenantId, timeline_id: TimelineId
) -> None:
    from pageserver.tenants import TenantManager

    print(f"initializing tenantid {tenant_id}")
    tenants = TenantManager(conf, distrib)
    try:
        tenants.create_tenant(tenant_id)
        handle = tenants.create_timeline(tenant_id, timeline_id)
        lsn = Lsn(handle.timeline.last_record_lsn)
        print(f"created initial timeline {timeline_id} timeline.lsn {lsn}")
        print(f"initial timeline {timeline_id} created")
    finally:
        clean = tenants.shutdown()
    if not clean:
        raise StartError(f"the initial timeline could not be written, see {LOG_FILE_NAME}")


def _serve(conf: PageServerConf, *, daemon: bool) -> int:
    """Runs the server until it is told to stop; the exit status."""
    from pageserver.auth import load_verifier

    distrib = _find_distrib(conf)
    verifier = load_verifier(conf)
    _warn_of_ineffective_settings(conf)
    # Bound before going into the background: whoever started us may connect when we return, and
    # sees on its terminal why if we cannot listen.
    http_socket = _bind(conf.listen_http_addr)
    pg_socket = _bind(conf.listen_pg_addr)
    pid_path = conf.workdir / PID_FILE_NAME
    if daemon:
        log_path = conf.workdir / LOG_FILE_NAME
        pid_file = daemonize(pid_path, log_path)
        init_logging(log_path, os.environ.get("RUST_LOG"))
    else:
        pid_file = PidFile(pid_path)
        pid_file.write()
        init_logging(None, os.environ.get("RUST_LOG"))
    try:
        return _Server(conf, distrib, verifier, pg_socket, http_socket).run()
    finally:
        pid_file.close()


def _bind(address: str) -> socket.socket:
    return bind_listener(address.replace("localhost:", "127.0.0.1:", 1))


class _Server:
    """The running daemon."""

    def __init__(
        self,
        conf: PageServerConf,
        distrib: PgDistrib,
        verifier: TokenVerifier | None,
        pg_socket: socket.socket,
        http_socket: socket.socket,
    ) -> None:
        """`verifier` checks the tokens of clients, None if they need none."""
        self._conf = conf
        self._distrib = distrib
        self._verifier = verifier
        self._pg_socket = pg_socket
        self._http_socket = http_socket

    def run(self) -> int:
        """Serves until a signal or a failure asks for the end; the exit status."""
        log.info("version: %s", version_text("pageserver"))
        for warning in config.ineffective_settings(self._conf):
            log.warning("%s", warning)
        raise_descriptor_limit()
        sys.setswitchinterval(SWITCH_INTERVAL)
        shutdown = Shutdown()
        shutdown.install()
        shutdown.guard_threads()
        stop = self._start()
        if shutdown.wait() is ShutdownMode.IMMEDIATE:
            # As after a crash: nothing is flushed, the next start recovers.
            logging.shutdown()
            os._exit(IMMEDIATE_EXIT_CODE)
        clean = stop()
        log.info("pageserver stopped")
        return 0 if clean and not shutdown.failed else 1

    def _start(self) -> Callable[[], bool]:
        """Loads the tenants and opens the doors.

        Returns what closes them and tells whether everything is durable.
        """
        with quick_imports():
            from pageserver.auth import page_service_auth
            from pageserver.failpoints import release_failpoints
            from pageserver.http.auth import http_gate
            from pageserver.http.routes import start_http
            from pageserver.page_service import PageServiceHandler
            from pageserver.tenants import TenantManager
            from zenith_utils.postgres_backend import PostgresServer

        tenants = TenantManager(self._conf, self._distrib)
        tenants.load()
        pages = PostgresServer(
            self._pg_socket,
            lambda: PageServiceHandler(tenants),
            name="page service",
            auth=page_service_auth(self._verifier),
        )
        tenants.metrics.count_page_connections = lambda: pages.connections
        http = start_http(self._http_socket, tenants, http_gate(self._verifier))
        pages.start()
        log.info(
            "pageserver %d serves pages on %s, HTTP on %s",
            self._conf.id,
            self._conf.listen_pg_addr,
            self._conf.listen_http_addr,
        )

        def stop() -> bool:
            release_failpoints()
            # HTTP last: its silence is how others see that everything is written.
            pages.stop(STOP_DEADLINE)
            clean = tenants.shutdown()
            http.stop()
            return clean

        return stop


if __name__ == "__main__":
    sys.exit(main())
