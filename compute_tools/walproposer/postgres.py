"""The replication stream from Postgres, kept up as long as Postgres lives."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from compute_tools.walproposer._relay import Relay
from compute_tools.walproposer.loop import EventLoop
from compute_tools.walproposer.postgres_stream import (
    PostgresAddress,
    connect_postgres,
    identify_system,
    server_version,
    start_stream,
)
from zenith_utils.pq_client import PqConnectionLost, PqError

logger = logging.getLogger(__name__)

_START_TIMEOUT: Final = 60.0
_RETRY: Final = 0.02
# cannot_connect_now (starting up, shutting down), object_in_use and too_many_connections (the last
# user of the slot, or of the walsender, is going)
_TRANSIENT: Final = ("57P03", "57P01", "55006", "53300")


class StreamListener(Protocol):
    """Who wants to know what becomes of the stream. All calls come in the loop's thread."""

    def on_identified(self, system_id: int, pg_version: int) -> None:
        """Postgres has been reached."""

    def on_streaming(self) -> None:
        """The stream has begun."""

    def on_postgres_gone(self, clean: bool) -> None:
        """Postgres has ended; clean if it had everything acknowledged before."""

    def on_postgres_failed(self, reason: str) -> None:
        """Postgres refuses to stream, or never came up."""


class PostgresStream:
    """Connects, receives WAL, reports what is committed, reconnects."""

    def __init__(
        self,
        loop: EventLoop,
        relay: Relay,
        address: PostgresAddress,
        lsn: int,
        listener: StreamListener,
    ) -> None:
        """Stream from `lsn` on to `relay`; connecting starts at once, until it works."""
        self._start_lsn = lsn
        self._loop = loop
        self._relay = relay
        self._address = address
        self._listener = listener
        self._was_up = False
        self._stopped = threading.Event()
        self._connect()

    @property
    def received_lsn(self) -> int:
        """End of the WAL that has been received."""
        stream = self._relay.stream
        return self._start_lsn if stream is None else stream.lsn

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
        self._relay.attach(sock, self.received_lsn, self)
        if not self._was_up:
            self._was_up = True
            self._listener.on_identified(system_id, pg_version)
        self._listener.on_streaming()
        self._relay.feed(received)

    # ---- the end

    def on_stream_end(self) -> None:
        """Postgres has sent everything and is going down."""
        self.stop()
        self._listener.on_postgres_gone(True)

    def on_stream_lost(self, reason: str) -> None:
        """The stream broke: Postgres is gone, or only this walsender is."""
        logger.warning("replication stream from Postgres ends: %s", reason)
        self._relay.detach()
        self._connect()

    def stop(self) -> None:
        """Disconnect for good."""
        self._stopped.set()
        self._relay.detach()
