"""The replication stream from Postgres, kept up as long as Postgres lives."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from compute_tools.walproposer.loop import EventLoop
from compute_tools.walproposer.postgres_stream import (
    PostgresAddress,
    XLogStream,
    connect_postgres,
    identify_system,
    server_version,
    start_stream,
    status_update,
)
from zenith_utils.pq_client import PqConnectionLost, PqError

logger = logging.getLogger(__name__)

_BUFFER_SIZE: Final = 64 << 10  # a bigger one costs an mmap, and fewer packets fit the caches
_START_TIMEOUT: Final = 60.0
_RETRY: Final = 0.02
# cannot_connect_now (starting up, shutting down), object_in_use (the slot's last user is going)
_TRANSIENT: Final = ("57P03", "57P01", "55006")


class StreamListener(Protocol):
    """Who wants to know what becomes of the stream. All calls come in the loop's thread."""

    def on_identified(self, system_id: int, pg_version: int) -> None:
        """Postgres has been reached."""

    def on_streaming(self) -> None:
        """The stream has begun."""

    def on_wal(self, begin_lsn: int, end_lsn: int, pieces: Sequence[memoryview]) -> None:
        """WAL [begin_lsn, end_lsn) has arrived; the pieces are valid during the call only."""

    def on_postgres_gone(self, clean: bool) -> None:
        """Postgres has ended; clean if it had everything acknowledged before."""

    def on_postgres_failed(self, reason: str) -> None:
        """Postgres refuses to stream, or never came up."""


class PostgresStream:
    """Connects, receives WAL, reports what is committed, reconnects."""

    def __init__(
        self, loop: EventLoop, address: PostgresAddress, lsn: int, listener: StreamListener
    ) -> None:
        """Stream from `lsn`; connecting starts at once and is tried until Postgres is up."""
        self.received_lsn = lsn
        self._loop = loop
        self._address = address
        self._listener = listener
        self._sock: socket.socket | None = None
        self._stream = XLogStream(lsn)
        self._buffer = memoryview(bytearray(_BUFFER_SIZE))
        self._was_up = False
        self._stopped = threading.Event()
        self._connect()

    # ---- connecting

    def _connect(self) -> None:
        self._loop.in_thread("connect-postgres", self._connect_blocking)

    def _connect_blocking(self) -> Callable[[], None]:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                conn = connect_postgres(self._address)
                identity = identify_system(conn), server_version(conn)
                sock, received = start_stream(conn, self.received_lsn)
                return lambda: self._connected(sock, received, *identity)
            except PqError as e:
                reason = str(e)
                if self._was_up and isinstance(e, PqConnectionLost):
                    return lambda: self._listener.on_postgres_gone(False)
                transient = isinstance(e, PqConnectionLost) or e.sqlstate in _TRANSIENT
                if not transient or time.monotonic() > deadline:
                    return lambda: self._listener.on_postgres_failed(reason)
            if self._stopped.wait(_RETRY):
                return lambda: None

    def _connected(
        self, sock: socket.socket, received: bytes, system_id: int, pg_version: int
    ) -> None:
        if self._stopped.is_set():
            sock.close()
            return
        sock.setblocking(False)
        self._sock = sock
        self._stream = XLogStream(self.received_lsn)
        self._loop.add(sock.fileno(), self._on_readable)
        if not self._was_up:
            self._was_up = True
            self._listener.on_identified(system_id, pg_version)
        self._listener.on_streaming()
        if received:
            self._take(memoryview(received))

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._loop.remove(self._sock.fileno())
            self._sock.close()
            self._sock = None

    # ---- receiving

    def _on_readable(self, mask: int) -> None:
        del mask
        sock = self._sock
        if sock is None:
            return
        try:
            size = sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError as e:
            self._lost(e.strerror or str(e))
            return
        if size == 0:
            self._lost("connection closed")
            return
        self._take(self._buffer[:size])

    def _take(self, data: memoryview) -> None:
        stream = self._stream
        pieces = stream.feed(data)
        if pieces:
            begin, self.received_lsn = self.received_lsn, stream.lsn
            self._listener.on_wal(begin, stream.lsn, pieces)
        if stream.ended:
            self.stop()
            self._listener.on_postgres_gone(True)
        elif stream.error is not None:
            self._lost(stream.error)

    def _lost(self, reason: str) -> None:
        """The stream broke: Postgres is gone, or only this walsender is."""
        logger.warning("replication stream from Postgres ends: %s", reason)
        self._disconnect()
        self._connect()

    # ---- reporting

    @property
    def reply_requested(self) -> bool:
        """Whether Postgres waits for a report."""
        return self._stream.reply_requested

    def report(self, lsn: int) -> bool:
        """Report WAL below `lsn` as written, flushed and applied; whether it could be sent."""
        if self._sock is None:
            return False
        try:
            sent = self._sock.send(status_update(lsn))
        except BlockingIOError:
            return False
        except OSError as e:
            self._lost(e.strerror or str(e))
            return False
        if sent != 39:
            # Half a message cannot be finished later without a buffer: start over instead.
            self._lost("socket buffer is full")
            return False
        self._stream.reply_requested = False
        return True

    def stop(self) -> None:
        """Disconnect for good."""
        self._stopped.set()
        self._disconnect()
