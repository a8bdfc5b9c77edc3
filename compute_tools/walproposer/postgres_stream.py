"""Opening the replication stream from Postgres; _xlog_stream.pyx takes it apart."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

from zenith_utils.lsn import lsn_text
from zenith_utils.pq_client import PqConnection, PqError, connect

SLOT_NAME: Final = "walproposer"
APPLICATION_NAME: Final = "walproposer"

_DUPLICATE_OBJECT: Final = "42710"
_CONNECT_TIMEOUT: Final = 10.0


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """Where Postgres listens; a host that starts with '/' is the directory of its socket."""

    host: str
    port: int
    user: str


def connect_postgres(address: PostgresAddress) -> PqConnection:
    """Open a replication connection and make sure that the slot exists.

    The slot holds WAL back from the very beginning: what a checkpoint removed before it was read
    could never be committed. Raises PqError.
    """
    conn = connect(
        address.host,
        address.port,
        user=address.user,
        replication=True,
        application_name=APPLICATION_NAME,
        timeout=_CONNECT_TIMEOUT,
    )
    try:
        conn.simple_query(f"CREATE_REPLICATION_SLOT {SLOT_NAME} PHYSICAL RESERVE_WAL")
    except PqError as e:
        if e.sqlstate != _DUPLICATE_OBJECT:
            conn.close()
            raise
    return conn


def identify_system(conn: PqConnection) -> int:
    """The system identifier. Raises PqError."""
    row = conn.simple_query("IDENTIFY_SYSTEM")[0]
    return int(row[0] or 0)


def server_version(conn: PqConnection) -> int:
    """Version number as in server_version_num (150018), 0 if the server did not tell."""
    text = conn.parameters.get("server_version", "").split(" ")[0]
    major, _, minor = text.partition(".")
    if not major.isdigit():
        return 0
    return int(major) * 10000 + (int(minor) if minor.isdigit() else 0)


def start_stream(conn: PqConnection, lsn: int) -> tuple[socket.socket, bytes]:
    """Start physical replication at `lsn`; the socket, and what was received already."""
    conn.start_copy_both(f"START_REPLICATION SLOT {SLOT_NAME} PHYSICAL {lsn_text(lsn)} TIMELINE 1")
    return conn.detach()
