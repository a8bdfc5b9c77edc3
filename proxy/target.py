"""The server behind the proxy: connecting to it and logging in as the client's user."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from zenith_utils.pq_framing import ConnectionClosed, ProtocolError

from . import authentication
from .authentication import Authentication
from .endpoint import Endpoint, Traffic
from .messages import SessionError, cancel_packet, error_text, message, startup_packet

# What a server may tell before it is ready: settings and notices.
_MAX_GREETING: Final = 1 << 20
_CONNECTION_FAILURE: Final = "08001"


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A connection to the target that is ready for queries."""

    endpoint: Endpoint
    greeting: bytes
    """The messages ParameterStatus and NoticeResponse that it has sent, for the client."""
    key: bytes
    """Payload of its BackendKeyData; empty if it has sent none."""
    password_used: bool
    """Whether it has asked for the password."""


class Target:
    """Where all sessions of a static router lead."""

    def __init__(
        self, host: str, port: int, traffic: Traffic, executor: Executor, timeout: float
    ) -> None:
        """`executor` computes for SCRAM; `timeout` limits a login, in seconds."""
        self._host = host
        self._port = port
        self._traffic = traffic
        self._executor = executor
        self._timeout = timeout

    def __str__(self) -> str:
        return f"{self._host}:{self._port}"

    async def log_in(self, parameters: Mapping[bytes, bytes], password: bytes) -> LoggedIn:
        """Connect and log in with the parameters of a start-up packet.

        Raises SessionError: with the target's own error if it has sent one.
        """
        endpoint = None
        try:
            async with asyncio.timeout(self._timeout):
                endpoint = await self._connect()
                endpoint.send(startup_packet(parameters))
                auth = Authentication(parameters[b"user"], password)
                await self._authenticate(endpoint, auth)
                greeting, key = await _read_greeting(endpoint)
                return LoggedIn(endpoint, greeting, key, auth.password_used)
        except BaseException as e:
            if endpoint is not None:
                endpoint.abort()
            if isinstance(e, TimeoutError):
                raise self._failure("log in to", f"no answer within {self._timeout:g} s") from e
            if isinstance(e, ConnectionClosed | ProtocolError):
                raise self._failure("log in to", str(e)) from e
            raise

    async def cancel(self, key: bytes) -> None:
        """Ask for the end of what the session with this key is doing. Raises SessionError."""
        try:
            async with asyncio.timeout(self._timeout):
                endpoint = await self._connect()
                try:
                    endpoint.send(cancel_packet(key))
                    # The server closes when it has sent its signal; a client waits for that, too.
                    with contextlib.suppress(ConnectionClosed):
                        await endpoint.read_exactly(1)
                finally:
                    endpoint.close()
        except TimeoutError as e:
            raise self._failure("cancel at", f"no answer within {self._timeout:g} s") from e

    async def _connect(self) -> Endpoint:
        loop = asyncio.get_running_loop()
        try:
            _, endpoint = await loop.create_connection(
                lambda: Endpoint(self._traffic), self._host, self._port
            )
        except TimeoutError:
            raise
        except OSError as e:
            raise self._failure("connect to", e.strerror or str(e)) from e
        return endpoint

    async def _authenticate(self, endpoint: Endpoint, auth: Authentication) -> None:
        """Answer requests until the target is content. Raises what reading raises, SessionError."""
        loop = asyncio.get_running_loop()
        while True:
            kind, payload = await endpoint.read_message()
            if kind == b"E":
                raise _refusal(payload)
            if kind != b"R" or len(payload) < 4:
                raise ProtocolError(f"unexpected message type {kind!r} during authentication")
            answer = await loop.run_in_executor(self._executor, auth.answer, payload)
            if answer:
                endpoint.send(answer)
            if int.from_bytes(payload[:4], "big") == authentication.OK:
                return

    def _failure(self, verb: str, reason: str) -> SessionError:
        return SessionError(f"cannot {verb} the target {self}: {reason}", _CONNECTION_FAILURE)


async def _read_greeting(endpoint: Endpoint) -> tuple[bytes, bytes]:
    """What the target tells until it is ready: messages for the client, and its cancel key."""
    greeting, key = bytearray(), b""
    while True:
        kind, payload = await endpoint.read_message()
        if kind == b"Z":
            return bytes(greeting), key
        if kind == b"E":
            raise _refusal(payload)
        if kind == b"K":
            key = payload
        elif kind in (b"S", b"N"):
            greeting += message(kind, payload)
        else:
            raise ProtocolError(f"unexpected message type {kind!r} after authentication")
        if len(greeting) > _MAX_GREETING:
            raise ProtocolError("too many settings and notices")


def _refusal(payload: bytes) -> SessionError:
    """The target's error, which the client gets as it is."""
    text, sqlstate = error_text(payload)
    return SessionError(text, sqlstate, response=message(b"E", payload))
