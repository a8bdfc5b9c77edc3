"""Server side of the Postgres wire protocol: one thread and one blocking socket per client.

The subset that storage daemons need: trust or cleartext-password authentication, simple queries,
extended queries of unnamed statements without parameters, COPY out and COPY both. A server is
a PostgresServer with a factory of handlers; a handler answers the queries of one client.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from zenith_utils.conninfo import redact_start
from zenith_utils.descriptors import LIBPQ_SHARE, share_of_descriptors
from zenith_utils.postgres_connection import (
    INT4_OID,
    INT8_OID,
    TEXT_OID,
    Auth,
    CleartextPasswordAuth,
    Column,
    Connection,
    CopyState,
    FatalQueryError,
    Handler,
    QueryError,
    TrustAuth,
    is_set_statement,
)
from zenith_utils.pq_framing import (
    CANCEL_REQUEST,
    COPY_DATA,
    COPY_DONE,
    COPY_FAIL,
    DEFAULT_MAX_MESSAGE,
    GSSENC_REQUEST,
    MAX_STARTUP_PACKET,
    PROTOCOL_3_0,
    SSL_REQUEST,
    ConnectionClosed,
    CopyFinished,
    ProtocolError,
    cstring,
    split_cstring,
)

__all__ = [
    "INT4_OID",
    "INT8_OID",
    "TEXT_OID",
    "Auth",
    "CleartextPasswordAuth",
    "Column",
    "Connection",
    "ConnectionClosed",
    "CopyFinished",
    "FatalQueryError",
    "Handler",
    "PostgresServer",
    "ProtocolError",
    "QueryError",
    "TrustAuth",
    "is_set_statement",
]

logger = logging.getLogger(__name__)

# Told to clients; psql and asyncpg choose their catalog queries by it.
SERVER_VERSION: Final = "14.1"
_READY_FOR_QUERY: Final = b"Z\0\0\0\5I"
_PROTOCOL_VIOLATION: Final = "08P01"
# An error with this text ends the connection: the client's stream is over.
_CLOSING_TEXT: Final = "failed to run"
_ACCEPT_RETRY_SECONDS: Final = 0.1
_MAX_CONNECTIONS: Final = 4096


class PostgresServer:
    """Accepts clients on a listening socket and serves each in a thread of its own."""

    def __init__(
        self,
        sock: socket.socket,
        handler_factory: Callable[[], Handler],
        *,
        name: str,
        auth: Auth | None = None,
        max_message: int = DEFAULT_MAX_MESSAGE,
        max_connections: int | None = None,
        startup_timeout: float = 30.0,
    ) -> None:
        """Take over a bound and listening socket.

        `auth` defaults to trust. `max_message` limits a message in bytes, `startup_timeout` the
        seconds from accepting a client until it is authenticated. `max_connections` defaults to
        what the process may open, within reason.
        """
        self.name = name
        self.handler_factory = handler_factory
        self.auth: Auth = auth if auth is not None else TrustAuth()
        self.startup_timeout = startup_timeout
        self._sock = sock
        self._max_message = max_message
        self._max_connections = max_connections or share_of_descriptors(
            LIBPQ_SHARE, _MAX_CONNECTIONS
        )
        self._sessions: set[_Session] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._accept_loop, name=name, daemon=True)
        self._started = 0

    @property
    def connections(self) -> int:
        """Number of clients connected now."""
        with self._lock:
            return len(self._sessions)

    def start(self) -> None:
        """Begin to accept clients."""
        self._sock.setblocking(False)
        self._thread.start()

    def stop(self, deadline: float = 10.0) -> None:
        """Stop accepting, end all connections and wait for their threads.

        Reads of the handlers see the end of input; an idle client is told that the server shuts
        down. What has not ended after `deadline` seconds loses its socket.
        """
        self._stop_accepting()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.conn.stopping = True
            session.shutdown(socket.SHUT_RD)
        end = time.monotonic() + deadline
        for session in sessions:
            session.thread.join(max(0.0, end - time.monotonic()))
        stuck = [session for session in sessions if session.thread.is_alive()]
        for session in stuck:
            session.shutdown(socket.SHUT_RDWR)
        for session in stuck:
            session.thread.join(1.0)
            if session.thread.is_alive():
                logger.warning("%s: connection of %s did not end", self.name, session.conn.peer)

    def _stop_accepting(self) -> None:
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        os.write(self._wake_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        self._sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _accept_loop(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while not self._stopping:
            poller.poll()
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if self._stopping:
                    return
                # Typically no descriptors left: others may free some.
                logger.error("%s: cannot accept a connection: %s", self.name, error)
                time.sleep(_ACCEPT_RETRY_SECONDS)
                continue
            try:
                self._start_session(sock, _peer_name(address))
            except Exception:
                logger.exception("%s: cannot serve a connection", self.name)
                sock.close()

    def _start_session(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(True)
        conn = Connection(sock, peer, max_message=self._max_message)
        session = _Session(self, conn, self._started)
        self._started += 1
        with self._lock:
            full = len(self._sessions) >= self._max_connections
            if not full:
                self._sessions.add(session)
        if full:
            logger.warning("%s: too many connections, refused %s", self.name, peer)
            with contextlib.suppress(ConnectionClosed):
                conn.send_error("sorry, too many clients already", "53300", fatal=True)
                conn.flush()
            conn.close()
            return
        try:
            session.thread.start()
        except BaseException:
            self.forget(session)
            raise

    def forget(self, session: _Session) -> None:
        """Called by a session that has ended."""
        with self._lock:
            self._sessions.discard(session)


def _peer_name(address: object) -> str:
    if isinstance(address, tuple):
        return f"{address[0]}:{address[1]}"
    return "local socket"


class _Session:
    """The protocol dialogue with one client."""

    def __init__(self, server: PostgresServer, conn: Connection, number: int) -> None:
        self.conn = conn
        self.thread = threading.Thread(
            target=self._run, name=f"{server.name}-{number}", daemon=True
        )
        self._server = server
        self._handler: Handler | None = None
        self._greeted = False
        self._statement = ""
        self._skip_until_sync = False

    def shutdown(self, how: int) -> None:
        """End a direction of the socket, which wakes a thread blocked in it."""
        with contextlib.suppress(OSError):
            self.conn.sock.shutdown(how)

    def _run(self) -> None:
        try:
            if self._start_up():
                self._serve()
        except ConnectionClosed as error:
            self._log(logging.DEBUG, str(error))
            if self.conn.stopping:
                self._farewell("terminating connection due to administrator command", "57P01")
        except ProtocolError as error:
            self._log(logging.WARNING, f"protocol violation: {error}")
            self._farewell(str(error), _PROTOCOL_VIOLATION)
        except TimeoutError:
            self._log(logging.WARNING, "did not complete its start-up in time")
        except QueryError as error:
            self._farewell(error.message, error.sqlstate)
        except Exception:
            logger.exception("%s: session of %s failed", self._server.name, self.conn.peer)
            self._farewell("internal error", "XX000")
        finally:
            self._server.forget(self)
            self.conn.close()

    def _log(self, level: int, text: str) -> None:
        logger.log(level, "%s: client %s: %s", self._server.name, self.conn.peer, text)

    def _farewell(self, message: str, sqlstate: str) -> None:
        """A last error for the client, if it has shown that it speaks the protocol."""
        if not self._greeted:
            return
        with contextlib.suppress(ConnectionClosed):
            self.conn.send_error(message, sqlstate, fatal=True)
            self.conn.flush()

    # ---- start-up ------------------------------------------------------------------------------

    def _start_up(self) -> bool:
        """Negotiate and authenticate; False if the client wants no session."""
        conn = self.conn
        conn.reader.deadline = time.monotonic() + self._server.startup_timeout
        packet = self._startup_packet()
        if packet is None:
            return False
        version = int.from_bytes(packet[:4], "big")
        self._greeted = True
        if version >> 16 != PROTOCOL_3_0 >> 16:
            raise FatalQueryError(
                f"unsupported frontend protocol {version >> 16}.{version & 0xFFFF}: "
                "server supports 3.0",
                "0A000",
            )
        params = _startup_params(packet[4:])
        unknown = [name for name in params if name.startswith("_pq_.")]
        if version & 0xFFFF or unknown:
            conn.writer.put(b"v", _negotiation(unknown))
        conn.params = {name: value for name, value in params.items() if name not in unknown}
        try:
            conn.identity = self._server.auth.authenticate(conn)
            self._handler = self._server.handler_factory()
            self._handler.startup(conn)
        except QueryError as error:
            self._log(logging.WARNING, f"refused: {error.message}")
            raise
        conn.writer.put(b"R", bytes(4))
        for name, value in (("client_encoding", "UTF8"), ("server_version", SERVER_VERSION)):
            conn.writer.put(b"S", cstring(name) + cstring(value))
        conn.writer.put_raw(_READY_FOR_QUERY)
        conn.flush()
        conn.reader.deadline = None
        return True

    def _startup_packet(self) -> bytes | None:
        """The start-up packet after declined encryption requests; None for a cancel request."""
        reader = self.conn.reader
        declined: set[int] = set()
        while True:
            length = int.from_bytes(reader.read_exactly(4), "big")
            if not 8 <= length <= MAX_STARTUP_PACKET:
                raise ProtocolError("invalid length of startup packet")
            packet = bytes(reader.read_exactly(length - 4))
            code = int.from_bytes(packet[:4], "big")
            if code == CANCEL_REQUEST:
                return None
            if code not in (SSL_REQUEST, GSSENC_REQUEST):
                return packet
            if code in declined or length != 8:
                raise ProtocolError("malformed or repeated encryption request")
            declined.add(code)
            self.conn.writer.put_raw(b"N")
            self.conn.flush()

    # ---- queries -------------------------------------------------------------------------------

    def _serve(self) -> None:
        conn = self.conn
        while True:
            kind, payload = conn.reader.read_message()
            if kind == ord("X"):
                return
            if kind == ord("Q"):
                if not self._skip_until_sync:
                    self._simple_query(payload)
            elif kind == ord("S"):
                self._skip_until_sync = False
                self._ready()
            elif kind == ord("H"):
                conn.flush()
            elif kind in (COPY_DATA, COPY_DONE, COPY_FAIL):
                # Sent before the client learnt that its copy has ended.
                continue
            elif not self._skip_until_sync:
                self._extended(kind, payload)
            if conn.stopping:
                raise ConnectionClosed("the server stops")

    def _ready(self) -> None:
        self.conn.writer.put_raw(_READY_FOR_QUERY)
        self.conn.flush()

    def _simple_query(self, payload: memoryview) -> None:
        try:
            self._execute(_query_text(payload))
        except QueryError as error:
            self._report(error)
        self._ready()

    def _extended(self, kind: int, payload: memoryview) -> None:
        """A message of the extended protocol; after an error the rest is skipped until Sync."""
        try:
            if kind == ord("P"):
                self._parse(payload)
            elif kind == ord("B"):
                self._bind(payload)
            elif kind == ord("D"):
                self._describe(payload)
            elif kind == ord("E"):
                self._execute(self._statement)
            elif kind == ord("C"):
                self.conn.writer.put(b"3")
            elif kind == ord("F"):
                raise QueryError("function calls are not supported", "0A000")
            else:
                raise ProtocolError(f"invalid frontend message type {kind}")
        except QueryError as error:
            self._report(error)
            if kind == ord("F"):
                self._ready()
            else:
                self._skip_until_sync = True
                self.conn.flush()

    def _parse(self, payload: memoryview) -> None:
        _, position = split_cstring(payload)
        query, position = split_cstring(payload, position)
        self._statement = _decode_query(query)
        self.conn.writer.put(b"1")

    def _bind(self, payload: memoryview) -> None:
        _, position = split_cstring(payload)
        _, position = split_cstring(payload, position)
        formats = _int16(payload, position)
        position += 2 + 2 * formats
        if _int16(payload, position):
            raise QueryError("query parameters are not supported", "0A000")
        self.conn.writer.put(b"2")

    def _describe(self, payload: memoryview) -> None:
        # What a command returns shows only when it runs, so the answer is always "no rows"
        # here and Execute sends the row description.
        if payload and payload[0] == ord("S"):
            self.conn.writer.put(b"t", bytes(2))
        self.conn.writer.put(b"n")

    def _execute(self, query: str) -> None:
        """Have the handler answer a query. Raises QueryError for whatever went wrong in it."""
        conn = self.conn
        assert self._handler is not None
        if not query.strip(" \t\r\n;"):
            conn.writer.put(b"I")
            return
        try:
            with contextlib.suppress(CopyFinished):
                self._handler.query(conn, query)
            if conn.copy_state is not CopyState.NONE:
                conn.send_command_complete()
        except (ConnectionClosed, ProtocolError):
            raise
        except QueryError as error:
            self._log(logging.ERROR, f"query {_for_log(query)} failed: {error.message}")
            raise
        except Exception as error:
            name, peer = self._server.name, self.conn.peer
            logger.exception("%s: client %s: query %s failed", name, peer, _for_log(query))
            raise QueryError(str(error) or type(error).__name__) from error

    def _report(self, error: QueryError) -> None:
        """Answer an error; fatal ones go on up, to end the connection."""
        if isinstance(error, FatalQueryError) or _CLOSING_TEXT in error.message:
            raise error
        self.conn.send_error(error.message, error.sqlstate)


def _startup_params(data: bytes) -> dict[str, str]:
    """Name and value strings, each NUL-terminated, with another NUL behind the last."""
    fields = data.split(b"\0")
    # "a\0b\0\0" splits into a, b and two empty strings.
    if len(fields) % 2 or len(fields) < 2 or fields[-1] or fields[-2]:
        raise ProtocolError("invalid startup packet layout")
    texts = [field.decode("utf-8", "backslashreplace") for field in fields[:-2]]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _negotiation(unknown: list[str]) -> bytes:
    """NegotiateProtocolVersion: the newest version there is here, and the options not understood.

    All of the version, 3.0, as SendNegotiateProtocolVersion (postmaster.c) sends it.
    """
    names = b"".join(map(cstring, unknown))
    return PROTOCOL_3_0.to_bytes(4, "big") + len(unknown).to_bytes(4, "big") + names


def _query_text(payload: memoryview) -> str:
    raw, end = split_cstring(payload)
    if end != len(payload):
        raise ProtocolError("query message with bytes behind its end")
    return _decode_query(raw)


def _decode_query(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise QueryError('invalid byte sequence for encoding "UTF8"', "22021") from error


def _int16(payload: memoryview, position: int) -> int:
    if position + 2 > len(payload):
        raise ProtocolError("message cut short")
    return int.from_bytes(payload[position : position + 2], "big")


def _for_log(query: str) -> str:
    return repr(redact_start(query))
