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
from functools import partial
from pathlib import Path
from typing import Final

from safekeeper import control_file, identity
from safekeeper.callmemaybe import CallMeMaybe, call_pageserver
from safekeeper.identity import IdentityError
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.remote_wal import RemoteWal, RemoteWalUrlError
from safekeeper.timeline_registry import RegistryError
from safekeeper.timelines import Timelines
from safekeeper.wal_offload import WalOffload
from safekeeper.wal_retention import (
    DEFAULT_INTERVAL,
    DEFAULT_KEEP_SIZE,
    RetentionSettings,
    WalRemoval,
    WalRetention,
    retention_metrics,
)
from safekeeper.wal_service import WalService
from zenith_utils.daemonize import (
    AddressError,
    BindError,
    DaemonizeError,
    bind_listener,
    daemonize,
    open_standard_streams,
    parse_address,
)
from zenith_utils.descriptors import raise_descriptor_limit
from zenith_utils.duration import DurationError, parse_duration
from zenith_utils.errors import render_error
from zenith_utils.log import init_logging
from zenith_utils.pid_file import PidFileError
from zenith_utils.postgres_backend import PostgresServer
from zenith_utils.quick_start import quick_imports
from zenith_utils.size import SizeError, format_size, parse_size
from zenith_utils.version import VersionAction, version_text

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
# How often somebody looks for WAL to be offloaded.
_OFFLOAD_INTERVAL: Final = 1.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class StartError(Exception):
    """The safekeeper cannot start; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    open_standard_streams()
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


_EPILOG: Final = """\
example:
  safekeeper -D /var/lib/zenith/sk1 --id 1 -l 127.0.0.1:5454 --listen-http 127.0.0.1:7676 -d
      keeps WAL in an existing directory, in the background; the log is safekeeper.log there

http://<listen-http>/v1/doc describes the HTTP API. The environment variable RUST_LOG filters the
log, e.g. RUST_LOG=info,safekeeper.callmemaybe=debug. SIGTERM, SIGINT and SIGQUIT all end the
process at once, with status 111: what was acknowledged is on disk.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safekeeper",
        description="Keeps WAL durable, as one of a quorum.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--version", action=VersionAction)
    _add_directory_options(parser)
    _add_service_options(parser)
    _add_retention_options(parser)
    return parser


def _add_directory_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data directory").add_argument
    add("-D", "--dir", type=Path, default=Path(), help="data directory (default: current)")
    add("--id", type=int, help="node id; needed at the first start, which stores it")
    add("--init", action="store_true", help="store the id and exit")
    add("-n", "--no-sync", action="store_true", help="do not fsync: unsafe, for tests only")
    add(
        "--dump-control-file",
        type=Path,
        metavar="PATH",
        help="print a timeline's control file as JSON, and exit",
    )


def _add_service_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("service").add_argument
    add(
        "-l",
        "--listen-pg",
        "--listen",
        default=DEFAULT_PG_ADDRESS,
        metavar="HOST:PORT",
        help=f"of the WAL service (default: {DEFAULT_PG_ADDRESS}); pageservers are told to connect "
        "there",
    )
    add(
        "--listen-http",
        default=DEFAULT_HTTP_ADDRESS,
        metavar="HOST:PORT",
        help=f"of the HTTP API (default: {DEFAULT_HTTP_ADDRESS})",
    )
    add("-d", "--daemonize", action="store_true", help="run in the background")
    add(
        "--recall",
        type=_period,
        default=1.0,
        metavar="DURATION",
        help="time between two calls to a pageserver that has not connected (default: 1 s)",
    )
    # Safekeepers learn from computes who their pageserver is.
    add("-p", "--pageserver", help=argparse.SUPPRESS)


def _add_retention_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "retention",
        "Complete WAL segments are removed when all safekeepers have them, the pageserver has\n"
        "made them durable, nobody streams them, and they are offloaded if they are to be.",
    )
    group.add_argument(
        "--wal-removal",
        choices=[choice.value for choice in WalRemoval],
        default=WalRemoval.DISK_CONSISTENT.value,
        help="where the pageserver must have WAL before it is removed here: on its disk (the "
        "default) or in its remote storage; off: nothing is removed",
    )
    group.add_argument(
        "--wal-keep-size",
        type=_size,
        default=DEFAULT_KEEP_SIZE,
        metavar="SIZE",
        help="keep this much WAL in any case, for standbys and pageservers that come back "
        f"(default: {format_size(DEFAULT_KEEP_SIZE)})",
    )
    group.add_argument(
        "--wal-removal-interval",
        type=_period,
        default=DEFAULT_INTERVAL,
        metavar="DURATION",
        help=f"how often WAL that can go is looked for (default: {DEFAULT_INTERVAL:.0f} s)",
    )
    group.add_argument(
        "--wal-offload",
        metavar="URL",
        help="store complete segments in this place before they are removed, and read them from "
        "there when they are asked for: file:///directory, s3://bucket/prefix, gs://bucket/prefix "
        "or az://account/container/prefix, with the credentials of the environment",
    )
    group.add_argument(
        "--ttl",
        type=_duration,
        metavar="DURATION",
        help="the same to the S3 bucket zenith-testbucket below walarchive/, for segments of that "
        "age, with the credentials S3_REGION, S3_ENDPOINT, S3_ACCESSKEY and S3_SECRET of the "
        "environment",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except SizeError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except DurationError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _period(text: str) -> float:
    seconds = _duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"a period of {text!r}: it must be longer than nothing")
    return seconds


def _run(args: argparse.Namespace) -> int:
    remote = _remote_wal(args)
    for address in (args.listen_pg, args.listen_http):
        parse_address(address)
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
    rust_log = os.environ.get("RUST_LOG")
    if args.daemonize:
        pid_file = daemonize(directory / _PID_FILE, directory / _LOG_FILE)
        init_logging(directory / _LOG_FILE, rust_log)
    else:
        init_logging(None, rust_log)
    with quick_imports():
        from safekeeper.http_api import HttpApi
        from zenith_utils.http_server import HttpServer
    # Before any thread exists, so that all inherit it and only sigwait() below takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    sys.setswitchinterval(_SWITCH_INTERVAL)

    logger.info("version: %s", version_text("safekeeper"))
    raise_descriptor_limit()
    metrics = SafekeeperMetrics()
    timelines = Timelines(
        directory, metrics, sync=not args.no_sync, instance=me.instance, remote=remote
    )
    host = parse_address(args.listen_pg)[0]
    callmemaybe = CallMeMaybe(
        (host, pg_socket.getsockname()[1]),
        args.recall,
        partial(call_pageserver, report=timelines.delivered),
    )
    streams = metrics.watch_delivery(callmemaybe)
    service = WalService(timelines, callmemaybe, streams)
    routes = HttpApi(me, timelines).routes(metrics.metrics)
    # Before a compute can connect, whose word about its pageserver is newer.
    for timeline_id, connstr in timelines.undelivered():
        callmemaybe.subscribe(timeline_id, connstr)
    callmemaybe.start()
    PostgresServer(pg_socket, service.handler_factory(), name="wal-service").start()
    HttpServer(http_socket, routes, metrics=metrics.metrics).start()
    threading.Thread(target=_save_progress, args=(timelines,), name="progress", daemon=True).start()
    _start_retention(args, timelines, remote, metrics)
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


def _remote_wal(args: argparse.Namespace) -> RemoteWal | None:
    """Where WAL is offloaded to. Raises StartError."""
    if args.wal_offload is not None and args.ttl is not None:
        raise StartError("--ttl and --wal-offload name two places for WAL: give one of them")
    try:
        if args.ttl is not None:
            return RemoteWal.open_for_ttl(dict(os.environ))
        return None if args.wal_offload is None else RemoteWal.open(args.wal_offload)
    except RemoteWalUrlError as e:
        raise StartError(str(e)) from e


def _start_retention(
    args: argparse.Namespace,
    timelines: Timelines,
    remote: RemoteWal | None,
    metrics: SafekeeperMetrics,
) -> None:
    """Start what removes WAL, and what offloads it."""
    settings = RetentionSettings(
        WalRemoval(args.wal_removal), args.wal_keep_size, args.wal_removal_interval
    )
    retention = WalRetention(
        timelines, settings, sync=not args.no_sync, offloading=remote is not None
    )
    threading.Thread(target=retention.run, name="wal-retention", daemon=True).start()
    offload = None
    if remote is not None:
        logger.info("offloading WAL to %s", remote)
        offload = WalOffload(
            remote, timelines.loaded, interval=_OFFLOAD_INTERVAL, min_age=args.ttl or 0.0
        )
        threading.Thread(target=offload.run, name="wal-offload", daemon=True).start()
    metrics.metrics.add_source(lambda: retention_metrics(timelines, offload))


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
