"""Becoming a daemon, and the listening sockets that are bound before."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Final

from zenith_utils.pid_file import PidFile

_BACKLOG: Final = 1024


class DaemonizeError(Exception):
    """The process could not be put into the background."""


class BindError(Exception):
    """A listening socket could not be made."""


class AddressError(ValueError):
    """Not an address of the form host:port."""


def parse_address(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Split ``host:port`` (``[::1]:5432`` for IPv6). Raises AddressError."""
    host, colon, port_text = text.rpartition(":")
    if not colon or (host.startswith("[") != host.endswith("]")):
        host, colon, port_text = text, "", ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise AddressError(f"invalid address {text!r}: write an IPv6 host in brackets")
    if not colon and default_port is not None and host:
        return host, default_port
    if not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise AddressError(f"invalid address {text!r}: expected host:port")
    return host, int(port_text)


def bind_listener(address: str | tuple[str, int]) -> socket.socket:
    """A listening TCP socket on ``host:port``; port 0 takes any.

    Where a name such as localhost has addresses of both kinds it is IPv4 that is listened on.
    A port whose last connections are only waiting out their time can be taken again at once; one
    that somebody listens on cannot. Raises BindError (or AddressError for a malformed address).
    """
    host, port = parse_address(address) if isinstance(address, str) else address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BindError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    family, kind, proto, _, sockaddr = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return sock


def open_standard_streams() -> None:
    """Open /dev/null in the place of standard streams that this process was started without.

    The first thing a daemon does: what it opens otherwise, its lock for one, would be given their
    numbers, and is lost when these are redirected.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: those below are open by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), True)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def daemonize(pid_file: Path, log_file: Path) -> PidFile:
    """Go on in a background process; the calling process exits with 0.

    Call it in a single-threaded process that has all its standard streams, after binding sockets
    and checking the configuration, so that the usual errors still reach the caller's terminal. The
    child leads a session of its own, reads /dev/null and writes stdout and stderr to the end of
    `log_file`; what it reports from then on is found there. The parent leaves only when the pid
    file is written. Keep the returned object: its lock says that this daemon lives.

    Raises PidFileError (also when another daemon runs already), DaemonizeError, OSError.
    """
    if threading.active_count() > 1:
        raise DaemonizeError("a process with several threads cannot become a daemon")
    lock = PidFile(pid_file)
    log_fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(ready_write)
        _leave(child, ready_read, log_file)
    os.close(ready_read)
    os.setsid()
    _redirect(log_fd)
    lock.write()
    os.write(ready_write, b"1")
    os.close(ready_write)
    return lock


def _leave(child: int, ready_read: int, log_file: Path) -> None:
    """Parent: exit with 0 once the child has written its pid, with 1 if it dies before."""
    ready = os.read(ready_read, 1)
    if not ready:
        os.waitpid(child, 0)
        message = f"the background process failed to start, see {log_file}\n"
        os.write(2, message.encode("utf-8", "surrogateescape"))
    # Neither exit handlers nor buffers belong to this process any more.
    os._exit(0 if ready else 1)


def _redirect(log_fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(null)
    os.close(log_fd)
