"""The dialogue with a client until its target is known: encryption, start-up packet, password."""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from zenith_utils.pq_framing import (
    CANCEL_REQUEST,
    MAX_STARTUP_PACKET,
    SSL_REQUEST,
    ConnectionClosed,
    ProtocolError,
)

from .endpoint import Endpoint
from .messages import (
    CLEARTEXT_PASSWORD_REQUEST,
    SessionError,
    Startup,
    is_encryption_request,
    parse_password,
    parse_startup,
    request_code,
)

_TLS_RECORD: Final = 0x16
_KEY: Final = slice(4, None)


class Client:
    """A client that has just connected."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None) -> None:
        """With `tls` nothing but cancel requests is taken unencrypted."""
        self.endpoint = endpoint
        self.expects_errors = False
        """Whether it has shown that it speaks the protocol, and is not logged in yet."""
        self._tls = tls
        self._encrypted = False

    async def start_up(self) -> Startup | bytes:
        """What it wants: a session, or the end of what the one with this cancel key is doing.

        Raises ConnectionClosed, ProtocolError, SessionError.
        """
        declined: set[int] = set()
        while True:
            packet = await self._startup_packet()
            code = request_code(packet)
            if code == CANCEL_REQUEST:
                return packet[_KEY]
            if not is_encryption_request(code):
                break
            if code in declined or self._encrypted or len(packet) != 4:
                raise ProtocolError("malformed or repeated encryption request")
            if code == SSL_REQUEST and self._tls is not None:
                await self._encrypt(self._tls)
            else:
                declined.add(code)
                self.endpoint.send(b"N")
        self.expects_errors = True
        if self._tls is not None and not self._encrypted:
            raise SessionError(
                "the proxy takes encrypted connections only: connect with sslmode=require", "28000"
            )
        return parse_startup(packet)

    async def ask_password(self, startup: Startup) -> bytes:
        """Its password. Raises ConnectionClosed, ProtocolError, SessionError."""
        self.endpoint.send(startup.negotiation + CLEARTEXT_PASSWORD_REQUEST)
        kind, payload = await self.endpoint.read_message()
        if kind != b"p":
            raise ProtocolError(f"expected password response, got message type {kind!r}")
        return parse_password(payload)

    async def _startup_packet(self) -> bytes:
        """A packet without a type, less its length."""
        head = await self.endpoint.read_exactly(4)
        if head[0] == _TLS_RECORD and not self._encrypted:
            raise ProtocolError("TLS without asking for it first (sslnegotiation=direct)")
        length = int.from_bytes(head, "big")
        if not 8 <= length <= MAX_STARTUP_PACKET:
            raise ProtocolError("invalid length of startup packet")
        return await self.endpoint.read_exactly(length - 4)

    async def _encrypt(self, context: ssl.SSLContext) -> None:
        endpoint = self.endpoint
        endpoint.transport.pause_reading()
        # Whoever is between could have slipped it in, and it would be taken for encrypted.
        if endpoint.has_unread:
            raise ProtocolError("received unencrypted data after SSL request")
        if endpoint.ended.done():
            raise ConnectionClosed("the client left after its SSL request")
        endpoint.send(b"S")
        try:
            transport = await asyncio.get_running_loop().start_tls(
                endpoint.transport, endpoint, context, server_side=True
            )
        except OSError as e:
            raise ProtocolError(f"TLS handshake failed: {e.strerror or e}") from e
        if transport is None:
            raise ConnectionClosed("TLS handshake failed: the client has left")
        endpoint.set_transport(transport)
        self._encrypted = True
