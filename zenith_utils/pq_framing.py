"""Framing of the Postgres wire protocol, version 3: one type byte, an i32 length, the payload.

Shared by the server side (postgres_backend) and the client side (pq_client). Sockets stay in
blocking mode; reading and writing use separate state, so that one thread may read a connection
while another one writes it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Final

Bytes = bytes | bytearray | memoryview
"""What may be sent. A memoryview must have items of one byte."""

PROTOCOL_3_0: Final = 3 << 16
SSL_REQUEST: Final = 1234 << 16 | 5679
GSSENC_REQUEST: Final = 1234 << 16 | 5680
CANCEL_REQUEST: Final = 1234 << 16 | 5678
MAX_STARTUP_PACKET: Final = 10_000
DEFAULT_MAX_MESSAGE: Final = 64 << 20

# Message types that flow in both directions or in copy mode (protocol.h).
COPY_DATA: Final = ord("d")
COPY_DONE: Final = ord("c")
COPY_FAIL: Final = ord("f")

# Idle connections are many and cost little; one that fills its buffer gets a bigger one.
_INITIAL_BUFFER: Final = 16 << 10
_STREAM_BUFFER: Final = 256 << 10
# A buffer grown beyond this by a big message is given back once it is empty.
_KEPT_BUFFER: Final = 1 << 20
# With less room than this behind unread bytes they are moved to the front before reading on.
_MIN_ROOM: Final = 4 << 10
_GROWTH_SLACK: Final = 128 << 10
# Payloads from this size on are handed to the kernel where they lie instead of being copied.
_SCATTER_FROM: Final = 32 << 10
_FLUSH_FROM: Final = 256 << 10
_IOV_MAX: Final = 1024

_HEADER: Final = struct.Struct(">Bi")
_COPY_DATA_HEADER: Final = struct.Struct(">ci")
_INT32: Final = struct.Struct(">i")
_NO_BYTES: Final = memoryview(b"")


class ConnectionClosed(Exception):
    """The peer closed the connection, or it broke."""


class CopyFinished(Exception):
    """The peer ended its direction of a copy."""


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow here; the connection is lost."""


class MessageReader:
    """Takes messages off a socket through one reused buffer.

    A returned payload is a view into the buffer: it is valid until the next read of any kind.
    """

    __slots__ = (
        "_buffer", "_end", "_filled", "_sock", "_start", "_view", "deadline", "max_message",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, *, max_message: int = DEFAULT_MAX_MESSAGE) -> None:
        self._sock = sock
        self._buffer = bytearray(_INITIAL_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._filled = False
        self.deadline: float | None = None
        """Monotonic time after which blocking reads raise TimeoutError; None waits forever."""
        self.max_message = max_message
        """Longest message in bytes, counted as its length field counts; may be changed."""

    def read_message(self) -> tuple[int, memoryview]:
        """Wait for a message; its type and payload.

        Raises ConnectionClosed, ProtocolError (impossible length), TimeoutError (deadline).
        """
        while True:
            start = self._start
            have = self._end - start
            need = 5
            if have >= 5:
                kind, length = _HEADER.unpack_from(self._buffer, start)
                if length < 4 or length > self.max_message:
                    raise self._bad_length(kind, length)
                need = length + 1
                if have >= need:
                    self._start = end = start + need
                    return kind, self._view[start + 5 : end]
            self._fill(need, 0)

    def read_available(self) -> tuple[int, memoryview] | None:
        """The next message if it can be had without waiting, else None; errors as read_message."""
        while not self.has_message():
            try:
                self._fill(self._missing(), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
        return self.read_message()

    def has_message(self) -> bool:
        """Whether read_message() would answer from the buffer alone."""
        return self._end - self._start >= self._missing()

    def read_exactly(self, count: int) -> memoryview:
        """Wait for `count` bytes that have no message header (start-up packets)."""
        while self._end - self._start < count:
            self._fill(count, 0)
        self._start += count
        return self._view[self._start - count : self._start]

    def take_buffered(self) -> bytes:
        """Remove and return the bytes received so far that belong to no message read yet."""
        rest = bytes(self._view[self._start : self._end])
        self._start = self._end = 0
        return rest

    def _missing(self) -> int:
        """Bytes that must be buffered, from the read position on, to go a step further."""
        if self._end - self._start < 5:
            return 5
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        if length < 4 or length > self.max_message:
            raise self._bad_length(kind, length)
        return int(length) + 1

    def _bad_length(self, kind: int, length: int) -> ProtocolError:
        return ProtocolError(f"invalid message length {length} of message type {chr(kind)!r}")

    def _fill(self, need: int, flags: int) -> None:
        """One recv() behind the buffered bytes, after making room for it."""
        if self._start == self._end:
            self._start = self._end = 0
            capacity = len(self._buffer)
            if self._filled and capacity < _STREAM_BUFFER:
                self._replace_buffer(2 * capacity)
            elif capacity > _KEPT_BUFFER:
                self._replace_buffer(_INITIAL_BUFFER)
        elif len(self._buffer) - self._end < _MIN_ROOM:
            self._make_room(need)
        if self.deadline is not None and not flags:
            self._wait_readable(self.deadline)
        try:
            count = self._sock.recv_into(self._view[self._end :], 0, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionClosed(f"connection lost: {error.strerror or error}") from error
        if count == 0:
            cut = " in the middle of a message" if self._end > self._start else ""
            raise ConnectionClosed(f"connection closed by the peer{cut}")
        self._end += count
        self._filled = self._end == len(self._buffer)

    def _make_room(self, need: int) -> None:
        have = self._end - self._start
        capacity = len(self._buffer)
        if have >= capacity // 2:
            # Twice what has really arrived at most: a length field alone costs no memory.
            capacity = max(capacity, min(2 * capacity, need + _GROWTH_SLACK))
        if capacity > len(self._buffer):
            self._replace_buffer(capacity)
        elif self._start:
            self._view[:have] = self._view[self._start : self._end]
            self._start, self._end = 0, have

    def _replace_buffer(self, capacity: int) -> None:
        # A new object: payload views handed out earlier pin the old one and may not be resized.
        rest = self._view[self._start : self._end]
        self._buffer = bytearray(capacity)
        self._view = memoryview(self._buffer)
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def _wait_readable(self, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError("timed out waiting for the peer")


class MessageWriter:
    """Collects messages and sends them with one system call per flush."""

    __slots__ = ("_out", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._out = bytearray()

    def put_raw(self, data: Bytes) -> None:
        """Append bytes that are already framed."""
        self._out += data

    def put(self, kind: bytes, payload: Bytes = b"") -> None:
        """Append a message."""
        out = self._out
        out += kind
        out += _INT32.pack(len(payload) + 4)
        out += payload
        if len(out) >= _FLUSH_FROM:
            self.flush()

    def put_copy_data(self, parts: tuple[Bytes, ...]) -> None:
        """Append one CopyData message whose payload is the parts in order.

        Big payloads are sent at once together with everything before them, without being copied;
        either way the parts may be changed or reused when this returns.
        """
        size = 4
        for part in parts:
            size += len(part)
        out = self._out
        out += _COPY_DATA_HEADER.pack(b"d", size)
        if size >= _SCATTER_FROM:
            self._out = bytearray()
            self._send_scattered([out, *parts])
            return
        for part in parts:
            out += part
        if len(out) >= _FLUSH_FROM:
            self.flush()

    def flush(self) -> None:
        """Send everything collected. Raises ConnectionClosed."""
        out = self._out
        if not out:
            return
        self._out = bytearray()
        try:
            self._sock.sendall(out)
        except OSError as error:
            raise _send_failed(error) from error

    def _send_scattered(self, buffers: list[Bytes]) -> None:
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        first = 0
        try:
            while first < len(views):
                sent = self._sock.sendmsg(views[first : first + _IOV_MAX])
                while first < len(views) and sent >= len(views[first]):
                    sent -= len(views[first])
                    first += 1
                if sent:
                    views[first] = views[first][sent:]
        except OSError as error:
            raise _send_failed(error) from error


def _send_failed(error: OSError) -> ConnectionClosed:
    return ConnectionClosed(f"cannot send to the peer: {error.strerror or error}")


def cstring(text: str) -> bytes:
    """NUL-terminated UTF-8. ValueError if the text holds a NUL itself."""
    raw = text.encode()
    if b"\0" in raw:
        raise ValueError("text with a NUL character cannot be sent")
    return raw + b"\0"


def split_cstring(data: memoryview, position: int = 0) -> tuple[bytes, int]:
    """The NUL-terminated string at `position` and the position behind it; ProtocolError."""
    raw = bytes(data[position:])
    end = raw.find(b"\0")
    if end < 0:
        raise ProtocolError("unterminated string in message")
    return raw[:end], position + end + 1


def tune_socket(sock: socket.socket) -> None:
    """Low latency and detection of dead peers on TCP; nothing on Unix sockets."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
