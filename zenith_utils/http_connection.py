"""The connections of an HTTP server: how many there may be, how long they may wait, what they log.

aiohttp closes a connection on which no whole request head has come for `IDLE_TIMEOUT` seconds. What
is added here: a bound on connections, beyond which the oldest that nothing is worked on for makes
room, an end to clients that do not take their answers, and an answer in JSON to what is no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any, Final, cast

from aiohttp import web

from zenith_utils.descriptors import HTTP_SHARE, share_of_descriptors

logger = logging.getLogger(__name__)

IDLE_TIMEOUT: Final = 75.0
"""Seconds that a connection may be without a request."""
WRITE_TIMEOUT: Final = 30.0
"""Seconds in which a client has to take something of an answer that waits for it."""
_LOOKS_PER_TIMEOUT: Final = 3
_MAX_CONNECTIONS: Final = 512


def default_max_connections() -> int:
    """How many connections there may be."""
    return share_of_descriptors(HTTP_SHARE, _MAX_CONNECTIONS)


class HttpConnection(web.RequestHandler):
    """One client."""

    __slots__ = ("_at_work", "_link", "_max_connections", "_server", "_stalled_since", "_unsent")

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
        # The connection until it has really ended: `transport` is None when that has only begun.
        self._link: asyncio.Transport | None = None
        self._at_work = False
        self._unsent = 0
        self._stalled_since = 0.0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The client is waiting for us meanwhile, not we for the client."""
        self._at_work = True
        try:
            yield
        finally:
            self._at_work = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a client; where there are too many, the oldest that can goes for it."""
        # One that is being closed is still on the server's list.
        clients = [client for client in self._server.connections if client.transport is not None]
        if len(clients) >= self._max_connections:
            waiting = [c for c in clients if isinstance(c, HttpConnection) and not c._at_work]
            # Before one that is in the middle of sending a request, or of taking its answer.
            waiting.sort(key=lambda client: client._request_in_progress)
            what = "the oldest that waits" if waiting else "a new one"
            logger.warning("%d HTTP connections: closing %s", len(clients), what)
            if not waiting:
                transport.close()
                return
            waiting[0]._cut()
        self._link = cast(asyncio.Transport, transport)
        super().connection_made(transport)

    def _cut(self) -> None:
        """End the connection; what the client has not taken by now is lost."""
        link = self._link
        self.force_close()
        if link is not None and link.get_write_buffer_size():
            link.abort()

    def _cut_if_waiting(self) -> None:
        if not self._at_work:
            self._cut()

    def cut_if_stalled(self, timeout: float) -> None:
        """End it if the client has taken nothing of what waits for it for that many seconds."""
        link = self._link
        if link is None:
            return
        # Nothing is added meanwhile, so that any progress makes it less.
        waits = self.writing_paused or link.is_closing()
        unsent = link.get_write_buffer_size() if waits else 0
        now = self._loop.time()
        if not unsent or unsent != self._unsent:
            self._unsent, self._stalled_since = unsent, now
        elif now - self._stalled_since >= timeout:
            logger.warning("closing an HTTP connection: nobody takes the answer")
            self._cut()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """Let what is worked on finish within about twice `timeout` seconds.

        A client that does not take its answer has half of them.
        """
        assert timeout is not None
        cut = self._loop.call_later(timeout, self._cut_if_waiting)
        try:
            await super().shutdown(timeout)
        finally:
            cut.cancel()

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

    def __init__(
        self,
        runner: web.AppRunner,
        sock: socket.socket,
        *,
        max_connections: int,
        write_timeout: float,
    ) -> None:
        super().__init__(runner)
        self._sock = sock
        self._max_connections = max_connections
        self._write_timeout = write_timeout
        self._watch: asyncio.Task[None] | None = None

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
        self._watch = loop.create_task(self._watch_clients(server))

    async def stop(self) -> None:
        """Accept no more clients."""
        if self._watch is not None:
            self._watch.cancel()
        await super().stop()

    async def _watch_clients(self, server: web.Server) -> None:
        while True:
            await asyncio.sleep(self._write_timeout / _LOOKS_PER_TIMEOUT)
            for client in server.connections:
                if isinstance(client, HttpConnection):
                    client.cut_if_stalled(self._write_timeout)
