"""The listener of the proxy and its sessions: one task per client until it is logged in.

From then on nothing runs for a session but the handing on of bytes in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import uvloop

from zenith_utils.pq_framing import ConnectionClosed, ProtocolError

from .cancellation import CancelKeys
from .client import Client
from .endpoint import Endpoint, Traffic, join
from .messages import (
    AUTHENTICATION_OK,
    SessionError,
    Startup,
    error_response,
    message,
)
from .target import Target

logger = logging.getLogger(__name__)

_READY_FOR_QUERY: Final = b"Z\0\0\0\5I"
_PROTOCOL_VIOLATION: Final = "08P01"
_SCRAM_THREADS: Final = 2
_BACKLOG: Final = 1024
# Descriptors that are not a session's: listeners, HTTP, log, name lookups.
_OTHER_DESCRIPTORS: Final = 64
# How long a client may take, in seconds, to close after its server did.
_LINGER: Final = 10.0
# How long sessions are waited for, in seconds, when everything ends.
_STOP_DEADLINE: Final = 2.0


class ProxyServer:
    """Takes clients on a listening socket to one target. Runs in a thread of its own."""

    def __init__(
        self,
        sock: socket.socket,
        target: tuple[str, int],
        *,
        tls: ssl.SSLContext | None = None,
        startup_timeout: float = 30.0,
        login_timeout: float = 30.0,
        max_sessions: int | None = None,
    ) -> None:
        """Take over a bound and listening socket; `target` is a host and a port.

        A client has `startup_timeout` seconds to tell who it is, the target `login_timeout` to
        let it in. By default there may be as many sessions as there are descriptors for.
        """
        self.traffic = Traffic()
        self._sock = sock
        self._tls = tls
        self._startup_timeout = startup_timeout
        self._max_sessions = max_sessions or _sessions_for_descriptors()
        self._keys = CancelKeys()
        self._executor = ThreadPoolExecutor(_SCRAM_THREADS, thread_name_prefix="scram")
        self._target = Target(*target, self.traffic, self._executor, login_timeout)
        self._sessions: set[asyncio.Task[None]] = set()
        self._warned_of_trust = False
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._started: Future[asyncio.Server] = Future()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def start(self) -> None:
        """Begin to take clients; raises what prevents it."""
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Take no more clients, end all sessions, and end the thread."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            listening = self._loop.run_until_complete(self._listen())
        except BaseException as error:
            self._started.set_exception(error)
        else:
            self._started.set_result(listening)
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _listen(self) -> asyncio.Server:
        self._sock.setblocking(False)
        return await self._loop.create_server(
            lambda: Endpoint(self.traffic, self._accepted), sock=self._sock, backlog=_BACKLOG
        )

    async def _end(self) -> None:
        self._started.result().close()
        for task in self._sessions:
            task.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=_STOP_DEADLINE)

    def _accepted(self, endpoint: Endpoint) -> None:
        self.traffic.accepted += 1
        if len(self._sessions) >= self._max_sessions:
            logger.warning("too many clients: refused %s", endpoint.name)
            endpoint.send(error_response("sorry, too many clients already", "53300"))
            endpoint.close()
            self.traffic.closed += 1
            return
        task = self._loop.create_task(self._serve(Client(endpoint, self._tls)))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _serve(self, client: Client) -> None:
        """A connection from its first byte to its last."""
        name = client.endpoint.name
        try:
            await self._session(client, name)
        except ConnectionClosed as e:
            logger.debug("client %s: %s", name, e)
        except ProtocolError as e:
            logger.warning("client %s: protocol violation: %s", name, e)
            self._farewell(client, error_response(str(e), _PROTOCOL_VIOLATION))
        except SessionError as e:
            # Names that a client makes up may be in it.
            logger.warning("client %s: refused: %s", name, " ".join(str(e).splitlines()))
            self._farewell(client, e.response)
        except asyncio.CancelledError:
            text = "terminating connection due to administrator command"
            self._farewell(client, error_response(text, "57P01"))
        except Exception:
            logger.exception("client %s: session failed", name)
            self._farewell(client, error_response("internal error of the proxy", "XX000"))
        finally:
            client.endpoint.close()
            self.traffic.closed += 1

    def _farewell(self, client: Client, response: bytes) -> None:
        """A last message for a client, where one is understood: not in the middle of a session."""
        if client.expects_errors:
            client.endpoint.send(response)

    async def _session(self, client: Client, name: str) -> None:
        try:
            async with asyncio.timeout(self._startup_timeout):
                request = await client.start_up()
                if isinstance(request, bytes):
                    await self._cancel(request)
                    return
                user = request.required(b"user", "PostgreSQL user name")
                database = request.required(b"database", "database name")
                password = await client.ask_password(request)
        except TimeoutError as e:
            text = f"canceling authentication: nothing complete within {self._startup_timeout:g} s"
            raise SessionError(text, "57014") from e
        logger.debug("client %s: user %r, database %r", name, user, database)
        await self._relay(client, request, password)

    async def _relay(self, client: Client, startup: Startup, password: bytes) -> None:
        """Log in to the target, and hand on bytes until both connections are over."""
        # What a client expects that does not say otherwise.
        parameters = {b"client_encoding": b"UTF8", **startup.parameters}
        target = await self._target.log_in(parameters, password)
        if not target.password_used and not self._warned_of_trust:
            self._warned_of_trust = True
            logger.warning(
                "the target %s asks for no password: whoever reaches the proxy gets in; have its "
                "pg_hba.conf ask for scram-sha-256 from the address of the proxy", self._target,
            )  # fmt: skip
        key = self._keys.issue(target.key)
        try:
            client.endpoint.send(
                AUTHENTICATION_OK + target.greeting + message(b"K", key) + _READY_FOR_QUERY
            )
            client.expects_errors = False
            join(client.endpoint, target.endpoint)
            # A server that works for a client that is gone notices by its closed connection.
            client.endpoint.lost.add_done_callback(lambda _: target.endpoint.close())
            await target.endpoint.ended
            # A server that ends a session has said why. To close while the client is sending could
            # take that away from it; a client that does not notice may not keep the session.
            await asyncio.wait([client.endpoint.lost], timeout=_LINGER)
            client.endpoint.close()
            # As long as it reads what waits to be sent: until then its descriptor is in use.
            await client.endpoint.lost
        finally:
            target.endpoint.close()
            self._keys.revoke(key)

    async def _cancel(self, key: bytes) -> None:
        target_key = self._keys.find(key)
        if target_key is None:
            logger.warning("a cancel request with a key that no session has")
            return
        await self._target.cancel(target_key)


def _sessions_for_descriptors() -> int:
    """How many sessions there can be: two connections each."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (limit - _OTHER_DESCRIPTORS) // 2)
