"""One end of a session, a client's or the target's: read by messages, then joined to the other.

Joined ends hand on bytes as they come. An end that cannot be written to as fast as the other is
read has the other's reading paused, so what is in memory is bounded; the end of one direction is
handed on while the other direction goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from zenith_utils.pq_framing import ConnectionClosed, ProtocolError, tune_socket

# The longest message of a login; Postgres allows passwords and the like up to 65535 bytes.
MAX_LOGIN_MESSAGE: Final = 1 << 16
# Bytes that may wait to be read before nothing more is taken off the socket.
_READ_AHEAD: Final = 2 * MAX_LOGIN_MESSAGE
# Bytes that may wait to be sent before the other end is not read any more.
_WRITE_BEHIND: Final = 1 << 18


@dataclass(slots=True)
class Traffic:
    """What went through the proxy. Written by the thread of its event loop only."""

    accepted: int = 0
    """Connections of clients that were accepted."""
    closed: int = 0
    """Those of them that are over."""
    proxied: int = 0
    """Bytes handed on, in both directions."""


class Endpoint(asyncio.Protocol):
    """A connection. Made, used and ended in one event loop."""

    def __init__(
        self, traffic: Traffic, connected: Callable[[Endpoint], None] = lambda _: None
    ) -> None:
        """`connected` is called when there is a connection."""
        self.transport: asyncio.Transport
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when nothing more will come."""
        self.lost: asyncio.Future[None] = loop.create_future()
        """Done when the connection is over in both directions."""
        self._traffic = traffic
        self._connected = connected
        self._buffer = bytearray()
        self._arrival: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._writing_paused = False
        self._peer: Endpoint | None = None

    # ---- what the event loop calls -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """There is a connection."""
        self.set_transport(transport)
        tune_socket(transport.get_extra_info("socket"))
        self._connected(self)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: for the peer, or to be read."""
        peer = self._peer
        if peer is not None:
            if not peer.lost.done():
                self._traffic.proxied += len(data)
                peer.send(data)
            return
        self._buffer += data
        if len(self._buffer) >= _READ_AHEAD and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Nothing more will come; whether the other direction stays open (not with TLS)."""
        self._no_more()
        if self._peer is not None:
            self._end_peer(self._peer)
        return self.transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        if exc is not None and self._peer is not None:
            self._take_rest()
        self._no_more()
        if not self.lost.done():
            self.lost.set_result(None)
        if self._peer is not None:
            self._end_peer(self._peer)
        if self._writing_paused:
            # What the peer sends is for nobody now, but it may have to be read, see _end_peer().
            self.resume_writing()

    def pause_writing(self) -> None:
        """Too many bytes wait to be sent here."""
        self._writing_paused = True
        if self._peer is not None:
            self._peer._pause_reading()

    def resume_writing(self) -> None:
        """They have been sent."""
        self._writing_paused = False
        if self._peer is not None and not self._peer.ended.done():
            self._peer._resume_reading()

    # ---- the login -----------------------------------------------------------------------------

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        """Go on over another transport: the encrypted one."""
        # uvloop's transports are none of asyncio's classes.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_WRITE_BEHIND)

    @property
    def name(self) -> str:
        """Address and port of who is there, for the log."""
        address = self.transport.get_extra_info("peername")
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unknown"

    @property
    def has_unread(self) -> bool:
        """Whether bytes have come that nobody has read."""
        return bool(self._buffer)

    async def read_exactly(self, count: int) -> bytes:
        """Wait for `count` bytes, at most MAX_LOGIN_MESSAGE. Raises ConnectionClosed."""
        while len(self._buffer) < count:
            if self.ended.done():
                cut = " in the middle of a message" if self._buffer else ""
                raise ConnectionClosed(f"connection closed by the peer{cut}")
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        if self._reading_paused and len(self._buffer) < _READ_AHEAD:
            self._reading_paused = False
            self.transport.resume_reading()
        return taken

    async def read_message(self) -> tuple[bytes, bytes]:
        """Wait for a message: type and payload. Raises ConnectionClosed, ProtocolError."""
        header = await self.read_exactly(5)
        length = int.from_bytes(header[1:], "big")
        if not 4 <= length <= MAX_LOGIN_MESSAGE:
            raise ProtocolError(f"invalid message length {length} of message type {header[:1]!r}")
        return header[:1], await self.read_exactly(length - 4)

    def send(self, data: bytes) -> None:
        """Send bytes, now or when they can be; for nobody if the connection is lost."""
        if not self.lost.done():
            self.transport.write(data)

    def close(self) -> None:
        """Send what waits to be sent, and end the connection."""
        self.transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def _no_more(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _pause_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    # ---- after it ------------------------------------------------------------------------------

    def _take_rest(self) -> None:
        """Read what had come when the connection broke.

        A server that ends a session while much is sent to it says why and closes, which resets the
        connection. The transport finds out when it writes, and stops without reading.
        """
        if self.transport.get_extra_info("sslcontext") is not None:
            return
        descriptor = self.transport.get_extra_info("socket").fileno()
        # What ends it says that nothing is left, or how the connection broke.
        with contextlib.suppress(OSError):
            while data := os.read(descriptor, 1 << 16):
                self.data_received(data)

    def _hand_on(self, peer: Endpoint) -> None:
        """From here on everything goes to `peer`, beginning with what nobody has read."""
        self._peer = peer
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            self.data_received(data)
        if self._reading_paused and not peer._writing_paused and not self.ended.done():
            self.transport.resume_reading()
        self._reading_paused = False
        if self.ended.done():
            self._end_peer(peer)

    def _end_peer(self, peer: Endpoint) -> None:
        """Nothing more will come from here: so nothing more goes there.

        The peer is not closed as long as it may be sending: that would reset its connection, which
        can take away from it what it has not read yet.
        """
        if peer.ended.done() or not peer.transport.can_write_eof():
            # Both directions are over; or TLS, where one direction cannot end alone.
            peer.transport.close()
            self.transport.close()
        elif not peer.transport.is_closing():
            peer.transport.write_eof()


def join(one: Endpoint, other: Endpoint) -> None:
    """From here on each gets what comes from the other, until both have ended."""
    one._hand_on(other)
    other._hand_on(one)
