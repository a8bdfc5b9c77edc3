"""A session with one safekeeper on a non-blocking socket, and how it is opened."""

from __future__ import annotations

import socket
import struct
from typing import Final

from zenith_utils.pq_client import connect

_HEADER = struct.Struct(">BI")
_COPY_DATA: Final = ord("d")
_RECEIVE: Final = 16 << 10
_MAX_MESSAGE: Final = 1 << 20
_CONNECT_TIMEOUT: Final = 5.0


class LinkError(Exception):
    """The session is over; the message says why."""


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
        conn.start_copy_both(f"START_WAL_PUSH {pageserver_connstr or ''}".strip())
        return conn.detach()
    except BaseException:
        conn.close()
        raise


def copy_data_header(payload_size: int) -> bytes:
    """The five bytes before the payload of a CopyData message."""
    return _HEADER.pack(_COPY_DATA, payload_size + 4)


class Link:
    """An open session. What the kernel does not take at once waits in `pending`."""

    def __init__(self, sock: socket.socket, received: bytes) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.finished = False
        """The safekeeper has ended its side: everything sent before our CopyDone was processed."""
        self._pending: list[memoryview] = []
        self._buffer = received

    @property
    def pending(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._pending)

    def fileno(self) -> int:
        """Descriptor for epoll."""
        return self.sock.fileno()

    def send(self, message: bytes) -> bool:
        """Send a framed message, or queue what does not fit; whether all of it is gone.

        Raises LinkError.
        """
        if self._pending:
            self._pending.append(memoryview(message))
            return False
        try:
            sent = self.sock.send(message)
        except BlockingIOError:
            sent = 0
        except OSError as e:
            raise LinkError(e.strerror or str(e)) from e
        if sent == len(message):
            return True
        self._pending.append(memoryview(message)[sent:])
        return False

    def send_pending(self) -> bool:
        """Go on sending what waits; whether nothing waits any more. Raises LinkError."""
        while self._pending:
            head = self._pending[0]
            try:
                sent = self.sock.send(head)
            except BlockingIOError:
                return False
            except OSError as e:
                raise LinkError(e.strerror or str(e)) from e
            if sent < len(head):
                self._pending[0] = head[sent:]
                return False
            self._pending.pop(0)
        return True

    def receive(self) -> list[memoryview]:
        """Payloads of the CopyData messages that have arrived. Raises LinkError."""
        try:
            data = self.sock.recv(_RECEIVE)
        except BlockingIOError:
            return []
        except OSError as e:
            raise LinkError(e.strerror or str(e)) from e
        if not data:
            raise LinkError("connection closed")
        return self.parse(data)

    def parse(self, data: bytes = b"") -> list[memoryview]:
        """Payloads of complete messages in what was received before and `data`."""
        if self._buffer:
            data = self._buffer + data
        payloads = []
        position, size = 0, len(data)
        while size - position >= 5:
            kind, length = _HEADER.unpack_from(data, position)
            if not 4 <= length <= _MAX_MESSAGE:
                raise LinkError(f"message length {length}")
            end = position + 1 + length
            if end > size:
                break
            if kind == _COPY_DATA:
                payloads.append(memoryview(data)[position + 5 : end])
            else:
                self._other(kind, data[position + 5 : end])
            position = end
        self._buffer = data[position:]
        return payloads

    def _other(self, kind: int, payload: bytes) -> None:
        if kind == ord("E"):
            fields = {field[:1]: field[1:] for field in payload.split(b"\0") if field}
            raise LinkError(fields.get(b"M", b"unknown error").decode("utf-8", "replace"))
        if kind in b"cCZ":
            self.finished = True
        elif kind not in b"NS":
            raise LinkError(f"unexpected message type {chr(kind)!r}")

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()
