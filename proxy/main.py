"""The `proxy` program: a router for Postgres clients that asks for a password."""

from __future__ import annotations

import argparse
import logging
import os
import ssl
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from zenith_utils.daemonize import (
    AddressError,
    BindError,
    bind_listener,
    open_standard_streams,
    parse_address,
)
from zenith_utils.descriptors import raise_descriptor_limit
from zenith_utils.errors import render_error
from zenith_utils.log import init_logging
from zenith_utils.shutdown import IMMEDIATE_EXIT_CODE, Shutdown, ShutdownMode
from zenith_utils.version import version_text

logger = logging.getLogger(__name__)

DEFAULT_PROXY_ADDRESS: Final = "127.0.0.1:4432"
DEFAULT_HTTP_ADDRESS: Final = "127.0.0.1:7001"

_DEFAULT_TARGET_PORT: Final = 5432
_METHODS: Final = ("password", "link", "mixed")
# Options of a console, which this proxy does not have: argument name -> option.
_CONSOLE_OPTIONS: Final = {"mgmt": "--mgmt", "uri": "--uri", "auth_endpoint": "--auth-endpoint"}
_EPILOG: Final = """\
example:
  proxy --auth-method password --static-router db.internal:5432 \\
        --proxy 0.0.0.0:4432 --ssl-key proxy.key --ssl-cert proxy.crt
  psql "host=proxy.example.com port=4432 sslmode=require user=alice dbname=app"

A client tells its user, its database and, in clear text, its password; with them the proxy logs in
to the server behind it, which may ask for scram-sha-256, md5 or password. Give --ssl-key and
--ssl-cert wherever clients come over a network. The server sees the address of the proxy, not of
the client: have its pg_hba.conf ask for a password from there, as with "trust" whoever reaches the
proxy gets in.

Logs go to stdout, filtered by RUST_LOG (info, debug, warn,zenith_proxy=debug, ...).
SIGTERM and SIGINT end all sessions and exit with 0, SIGQUIT exits with 111 at once.
"""


class StartError(Exception):
    """The proxy cannot start; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    open_standard_streams()
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (StartError, AddressError, BindError, OSError) as e:
        print(render_error(e), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    # -h is --http.
    parser = argparse.ArgumentParser(
        prog="proxy",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--help", action="help", help="show this help and exit")
    add("--version", action="version", version=version_text("proxy"))
    add(
        "-p", "--proxy", default=DEFAULT_PROXY_ADDRESS, metavar="HOST:PORT",
        help=f"where clients connect (default: {DEFAULT_PROXY_ADDRESS})",
    )  # fmt: skip
    add(
        "-h", "--http", default=DEFAULT_HTTP_ADDRESS, metavar="HOST:PORT",
        help=f"GET /v1/status and /metrics (default: {DEFAULT_HTTP_ADDRESS})",
    )  # fmt: skip
    add(
        "--auth-method", choices=_METHODS, default="mixed",
        help="how clients show who they are: password; link and mixed (the default) need a "
        "console and are not supported",
    )  # fmt: skip
    add(
        "-s", "--static-router", metavar="HOST:PORT",
        help="the server that all clients are led to; requires --auth-method password",
    )  # fmt: skip
    add("-k", "--ssl-key", type=Path, metavar="FILE", help="private key for TLS 1.3 (PEM)")
    add(
        "-c", "--ssl-cert", type=Path, metavar="FILE",
        help="its certificate and those in between (PEM); with it clients must encrypt",
    )  # fmt: skip
    group = parser.add_argument_group("options of a console (no effect with --static-router)")
    group.add_argument("-m", "--mgmt", metavar="HOST:PORT", help="management listener")
    group.add_argument("-u", "--uri", metavar="URL", help="link that is shown to new users")
    group.add_argument("-a", "--auth-endpoint", metavar="URL", help="where users are looked up")
    return parser


def _run(args: argparse.Namespace) -> int:
    target = _target(args)
    tls = _tls_context(args.ssl_key, args.ssl_cert)
    # They take time to load, which --help and mistakes in the options should not cost.
    from zenith_utils.http_server import HttpServer, Route, metrics_route

    from .metrics import proxy_metrics
    from .server import ProxyServer

    proxy_socket = bind_listener(args.proxy)
    http_socket = bind_listener(args.http)
    init_logging(rust_log=os.environ.get("RUST_LOG"))
    logger.info("version: %s", version_text("proxy"))
    for name, option in _CONSOLE_OPTIONS.items():
        if getattr(args, name) is not None:
            logger.warning("%s has no effect with --static-router", option)
    if tls is None and not is_loopback(parse_address(args.proxy)[0]):
        logger.warning(
            "passwords of clients cross the network in clear text: give --ssl-key and --ssl-cert"
        )
    # A session takes two.
    raise_descriptor_limit()
    shutdown = Shutdown()
    shutdown.install()
    shutdown.guard_threads()
    server = ProxyServer(proxy_socket, target, tls=tls)
    routes = [
        Route("GET", "/v1/status", lambda _: ""),
        metrics_route(proxy_metrics(server.traffic)),
    ]
    http = HttpServer(http_socket, routes)
    server.start()
    http.start()
    logger.info("proxy listens on %s (http %s) for %s", args.proxy, args.http, args.static_router)
    mode = shutdown.wait()
    if mode is ShutdownMode.IMMEDIATE:
        logging.shutdown()
        os._exit(IMMEDIATE_EXIT_CODE)
    server.stop()
    http.stop()
    logger.info("stopped")
    return 1 if shutdown.failed else 0


def _target(args: argparse.Namespace) -> tuple[str, int]:
    """Host and port that clients are led to. Raises StartError."""
    if args.static_router is not None and args.auth_method != "password":
        raise StartError("--static-router requires --auth-method password")
    if args.static_router is None:
        raise StartError(
            f"--auth-method {args.auth_method} needs a console, which is not supported: give "
            "--auth-method password and --static-router HOST:PORT"
        )
    target = parse_address(args.static_router, _DEFAULT_TARGET_PORT)
    if target == parse_address(args.proxy):
        raise StartError(f"--static-router {args.static_router} is the proxy itself (--proxy)")
    return target


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls_context(key: Path | None, certificate: Path | None) -> ssl.SSLContext | None:
    """TLS for clients; None without key and certificate. Raises StartError."""
    if key is None and certificate is None:
        return None
    if key is None or certificate is None:
        raise StartError("--ssl-key and --ssl-cert belong together: give both or neither")
    for path in (key, certificate):
        if not path.is_file():
            raise StartError(f"no file {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except (OSError, ValueError) as e:
        raise StartError(f"cannot use the key {key} with the certificate {certificate}") from e
    return context


def _no_passphrase() -> str:
    """Asked for by OpenSSL, which would ask on a terminal otherwise."""
    raise StartError("the private key is encrypted: give one without a passphrase")


if __name__ == "__main__":
    sys.exit(main())
