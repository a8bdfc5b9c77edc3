"""Addresses in the configuration."""

from __future__ import annotations

from control_plane.errors import ControlPlaneError
from zenith_utils import daemonize


def parse_address(text: str, default_port: int | None = None) -> tuple[str, int]:
    """`host:port`, an IPv6 host in brackets; raises ControlPlaneError."""
    try:
        return daemonize.parse_address(text, default_port)
    except daemonize.AddressError as e:
        raise ControlPlaneError(f"{e}: correct the config") from e
