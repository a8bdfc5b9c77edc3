"""The `safekeeper` program: keeps WAL durable, as one of a quorum."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from safekeeper import control_file, identity
from safekeeper.callmemaybe import CallMeMaybe
from safekeeper.http_api import HttpApi
from safekeeper.identity import IdentityError
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.timeline_registry import RegistryError
from safekeeper.timelines import Timelines
from safekeeper.wal_service import WalService
from zenith_utils.daemonize import (
    AddressError,
    BindError,
    DaemonizeError,
    bind_listener,
    daemonize,
    parse_address,
)
from zenith_utils.duration import DurationError, parse_duration
from zenith_utils.errors import render_error
from zenith_utils.http_server import HttpServer, metrics_route
from zenith_utils.log import init_logging
from zenith_utils.pid_file import PidFileError
from zenith_utils.postgres_backend import PostgresServer
from zenith_utils.version import version_text

logger = logging.getLogger(__name__)

DEFAULT_PG_ADDRESS: Final = "127.0.0.1:5454"
DEFAULT_HTTP_ADDRESS: Final = "127.0.0.1:7676"

_LOCK_FILE = "safekeeper.lock"
_LOG_FILE = "safekeeper.log"
_PID_FILE = "safekeeper.pid"
_TERMINATED_EXIT_CODE: Final = 111
# After a crash of safekeepers and compute alike WAL is known to be committed, and delivered without
# a new compute, up to the commit LSN persisted last.
_PROGRESS_PERIOD: Final = 1.0
_SWITCH_INTERVAL: Final = 0.0005
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class StartError(Exception):
    """The safekeeper cannot start; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.dump_control_file is not None:
            state = control_file.load(args.dump_control_file)
            sys.stdout.write(json.dumps(control_file.to_json(state)))
            return 0
        return _run(args)
    except (
        StartError,
        IdentityError,
        RegistryError,
        control_file.ControlFileError,
        AddressError,
        BindError,
        DaemonizeError,
        PidFileError,
        OSError,
    ) as e:
        print(render_error(e), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safekeeper", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--version", action="version", version=version_text("safekeeper"))
    add("-D", "--dir", type=Path, default=Path(), help="data directory (default: current)")
    add("--init", action="store_true", help="store the id and exit")
    add("--id", type=int, help="node id; stored at the first start")
    add("-l", "--listen-pg", "--listen", default=DEFAULT_PG_ADDRESS, help="WAL service ip:port")
    add("--listen-http", default=DEFAULT_HTTP_ADDRESS, help="HTTP API ip:port")
    add("-p", "--pageserver", help=argparse.SUPPRESS)
    add("--ttl", help="offloading of WAL is not available; refused")
    add("--recall", type=_period, default=1.0, help="period of calls to pageservers (1 s)")
    add("-d", "--daemonize", action="store_true", help="run in the background")
    add("-n", "--no-sync", action="store_true", help="do not fsync: unsafe, for tests only")
    add("--dump-control-file", type=Path, metavar="PATH", help="print a control file as JSON")
    return parser


def _period(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except DurationError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    if not seconds:
        raise argparse.ArgumentTypeError(f"a period of {text!r}: it must be longer than nothing")
    return seconds


def _run(args: argparse.Namespace) -> int:
    if args.ttl is not None:
        raise StartError("--ttl: offloading of WAL is not available in this version")
    directory: Path = args.dir.resolve()
    if not directory.is_dir():
        raise StartError(f"data directory {directory} does not exist")
    os.chdir(directory)
    lock_fd = _lock(directory)
    me = identity.load_or_create(directory, args.id)
    if args.init:
        os.close(lock_fd)
        return 0
    # Bound before going into the background: whoever starts us may connect at once.
    pg_socket = bind_listener(args.listen_pg)
    http_socket = bind_listener(args.listen_http)
    pid_file = None
    if args.daemonize:
        pid_file = daemonize(directory / _PID_FILE, directory / _LOG_FILE)
        init_logging(directory / _LOG_FILE)
    else:
        init_logging()
    # Before any thread exists, so that all inherit it and only sigwait() below takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    sys.setswitchinterval(_SWITCH_INTERVAL)

    logger.info("version: %s", version_text("safekeeper"))
    metrics = SafekeeperMetrics()
    timelines = Timelines(directory, metrics, sync=not args.no_sync, instance=me.instance)
    host = parse_address(args.listen_pg)[0]
    callmemaybe = CallMeMaybe((host, pg_socket.getsockname()[1]), args.recall)
    streams = metrics.watch_delivery(callmemaybe)
    service = WalService(timelines, callmemaybe, streams)
    routes = [*HttpApi(me, timelines).routes(), metrics_route(metrics.metrics)]
    # Before a compute can connect, whose word about its pageserver is newer.
    for timeline_id, connstr in timelines.undelivered():
        callmemaybe.subscribe(timeline_id, connstr)
    callmemaybe.start()
    PostgresServer(pg_socket, service.handler_factory(), name="wal-service").start()
    HttpServer(http_socket, routes).start()
    threading.Thread(target=_save_progress, args=(timelines,), name="progress", daemon=True).start()
    logger.info(
        "safekeeper %d (instance %s) listens on %s (http %s) in %s",
        me.id, me.instance.hex(), args.listen_pg, args.listen_http, directory,
    )  # fmt: skip
    received = signal.sigwait(_SIGNALS)
    logger.info("terminated by %s", signal.Signals(received).name)
    # Nothing to clean up: whatever was answered is durable.
    del pid_file
    logging.shutdown()
    os._exit(_TERMINATED_EXIT_CODE)


def _save_progress(timelines: Timelines) -> None:
    """Keep persisted commit LSNs near the live ones."""
    pause = threading.Event()
    while not pause.wait(_PROGRESS_PERIOD):
        timelines.save_progress()


def _lock(directory: Path) -> int:
    """Lock the data directory for the life of this process. Raises StartError."""
    path = directory / _LOCK_FILE
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(f"control file {path} is locked by some other process") from None
    return fd


if __name__ == "__main__":
    sys.exit(main())
