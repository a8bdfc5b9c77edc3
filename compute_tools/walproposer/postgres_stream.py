"""WAL from Postgres: opening the replication stream and taking it apart.

Protocol: "Streaming Replication Protocol" of the PostgreSQL manual. The stream is forwarded without
looking at records; only the frame headers and keepalives are parsed.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

from zenith_utils.lsn import lsn_text
from zenith_utils.pq_client import PqConnection, PqError, connect
from zenith_utils.zenith_feedback import postgres_timestamp

SLOT_NAME: Final = "walproposer"
APPLICATION_NAME: Final = "walproposer"

_U64 = struct.Struct(">Q")
_STATUS = struct.Struct(">cIcQQQqB")
_COPY_DATA: Final = ord("d")
_WAL: Final = ord("w")
_KEEPALIVE: Final = ord("k")
_WAL_HEADER: Final = 30  # 'd', length, 'w', start, end, time
_REPLY_FLAG: Final = 22  # offset in a keepalive frame
_DUPLICATE_OBJECT: Final = "42710"
_CONNECT_TIMEOUT: Final = 10.0


class StreamError(Exception):
    """Postgres sent something that makes the stream unusable."""


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


def status_update(lsn: int) -> bytes:
    """Standby status update: written, flushed and applied up to `lsn`."""
    return _STATUS.pack(b"d", 38, b"r", lsn, lsn, lsn, postgres_timestamp(), 0)


class XLogStream:
    """Takes the WAL out of a stream of XLogData frames, in pieces of any size."""

    def __init__(self, lsn: int) -> None:
        self.lsn = lsn
        """Position of the next WAL byte."""
        self.reply_requested = False
        self.ended = False
        """Postgres has said that all WAL was sent and acknowledged, and is going down."""
        self.error: str | None = None
        """Why Postgres has ended the stream otherwise."""
        self._left = 0
        self._partial = b""

    def feed(self, data: memoryview) -> list[memoryview]:
        """The WAL in `data`, as consecutive views into it. Raises StreamError."""
        if self._partial:
            data = memoryview(self._partial + bytes(data))
            self._partial = b""
        pieces: list[memoryview] = []
        position, size = 0, len(data)
        while position < size:
            if self._left:
                end = min(position + self._left, size)
                pieces.append(data[position:end])
                self._left -= end - position
                self.lsn += end - position
                position = end
                continue
            consumed = self._frame(data, position, size)
            if not consumed:
                self._partial = bytes(data[position:])
                break
            position += consumed
        return pieces

    def _frame(self, data: memoryview, position: int, size: int) -> int:
        """Consume a frame, or an XLogData frame's header; 0 if it is not there as a whole."""
        available = size - position
        if available < 6:
            return 0
        length = int.from_bytes(data[position + 1 : position + 5], "big")
        if data[position] == _COPY_DATA and data[position + 5] == _WAL:
            if available < _WAL_HEADER:
                return 0
            (start,) = _U64.unpack_from(data, position + 6)
            if start != self.lsn or length < _WAL_HEADER - 1:
                raise StreamError(
                    f"Postgres sent WAL at {lsn_text(start)}, expected {lsn_text(self.lsn)}"
                )
            self._left = length + 1 - _WAL_HEADER
            return _WAL_HEADER
        if available < length + 1:
            return 0
        self._other_frame(data[position : position + length + 1])
        return length + 1

    def _other_frame(self, frame: memoryview) -> None:
        kind = frame[0]
        if kind == _COPY_DATA and frame[5] == _KEEPALIVE and len(frame) > _REPLY_FLAG:
            self.reply_requested = self.reply_requested or bool(frame[_REPLY_FLAG])
        elif kind == ord("C"):
            self.ended = True
        elif kind == ord("E"):
            text = bytes(frame[5:]).replace(b"\0", b" ").decode("utf-8", "replace")
            self.error = text.strip()
