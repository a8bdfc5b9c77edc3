"""How a session with a safekeeper is opened; _link.pyx is the open one."""

from __future__ import annotations

import socket
import struct
from typing import Final

from zenith_utils.pq_client import connect

_HEADER = struct.Struct(">BI")
_COPY_DATA: Final = ord("d")
_CONNECT_TIMEOUT: Final = 5.0


def open_session(
    address: tuple[str, int], options: str, pageserver_connstr: str | None
) -> tuple[socket.socket, bytes]:
    """Connect to a safekeeper and start WAL push: its socket and bytes received already.

    Blocks, for a few seconds at most. Raises PqError.
    """
    conn = connect(
        *address,
        user="walproposer",
        options=options,
        application_name="walproposer",
        timeout=_CONNECT_TIMEOUT,
    )
    try:
        command = f"START_WAL_PUSH {pageserver_connstr or ''}".strip()
        conn.start_copy_both(command, timeout=_CONNECT_TIMEOUT)
        return conn.detach()
    except BaseException:
        conn.close()
        raise


def copy_data_header(payload_size: int) -> bytes:
    """The five bytes before the payload of a CopyData message."""
    return _HEADER.pack(_COPY_DATA, payload_size + 4)
