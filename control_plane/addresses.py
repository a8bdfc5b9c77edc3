"""Addresses in the configuration."""

from __future__ import annotations

import errno
import socket

from control_plane.errors import ControlPlaneError
from zenith_utils import daemonize


def parse_address(text: str, default_port: int | None = None) -> tuple[str, int]:
    """`host:port`, an IPv6 host in brackets; raises ControlPlaneError."""
    try:
        return daemonize.parse_address(text, default_port)
    except daemonize.AddressError as e:
        raise ControlPlaneError(f"{e}: correct the config") from e


def listen_error(host: str, port: int) -> OSError | None:
    """Why a server could not listen at an address of this machine; None if it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        # As servers do: connections of before that are on their way out do not count.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as e:
            return e
    return None


def is_taken(error: OSError) -> bool:
    """Whether somebody listens there, and not that the address is not ours to listen at."""
    return error.errno == errno.EADDRINUSE
