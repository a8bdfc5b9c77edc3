"""The connections of an HTTP server: how many there may be, how long they may wait, what they log.

aiohttp closes a connection on which no whole request head has come for `IDLE_TIMEOUT` seconds. What
is added here: a bound on connections, beyond which the oldest idle one makes room, and an answer
in JSON to what is no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
from typing import Any, Final

from aiohttp import web

logger = logging.getLogger(__name__)

IDLE_TIMEOUT: Final = 75.0
"""Seconds that a connection may be without a request."""
_MAX_CONNECTIONS: Final = 512


def default_max_connections() -> int:
    """How many connections there may be: not more than a quarter of all open files."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MAX_CONNECTIONS, open_files // 4) if open_files > 0 else _MAX_CONNECTIONS


class HttpConnection(web.RequestHandler):
    """One client."""

    __slots__ = ("_max_connections", "_server")

    def __init__(
        self, server: web.Server, *, loop: asyncio.AbstractEventLoop, max_connections: int
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=IDLE_TIMEOUT,
            access_log=None,  # type: ignore[arg-type]
            logger=logger,
        )
        self._server = server
        self._max_connections = max_connections

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._request_in_progress

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a client; where there are too many, the oldest that has no request goes for it."""
        # One that is being closed is still on the server's list.
        clients = [client for client in self._server.connections if client.transport is not None]
        if len(clients) >= self._max_connections:
            idle = (c for c in clients if isinstance(c, HttpConnection) and not c.busy)
            oldest = next(idle, None)
            what = "a new one" if oldest is None else "the oldest idle one"
            logger.warning("%d HTTP connections: closing %s", len(clients), what)
            if oldest is None:
                transport.close()
            else:
                oldest.force_close()
        super().connection_made(transport)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Tell of a failure, but not again of a body that was refused as malformed."""
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP; whoever scans ports must not fill the log."""
        logger.debug("no HTTP from %s: %s", request.remote, exc or message)
        detail = (message or "malformed HTTP").partition("\n")[0].strip().rstrip(":")
        text = f"Bad request: {detail}" if status == 400 else detail
        response = web.Response(
            status=status, body=json.dumps({"msg": text}), content_type="application/json"
        )
        response.force_close()
        return response


class BoundedSite(web.BaseSite):
    """Serves a runner's application on a listening socket, with HttpConnection for every client."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket, *, max_connections: int) -> None:
        super().__init__(runner)
        self._sock = sock
        self._max_connections = max_connections

    @property
    def name(self) -> str:
        """URL of the site."""
        host, port = self._sock.getsockname()[:2]
        return f"http://{host}:{port}"

    async def start(self) -> None:
        """Begin to accept clients."""
        await super().start()
        loop = asyncio.get_running_loop()
        server: Any = self._runner.server

        def connect() -> HttpConnection:
            return HttpConnection(server, loop=loop, max_connections=self._max_connections)

        self._server = await loop.create_server(connect, sock=self._sock)
