"""One client of a server that speaks the Postgres wire protocol, as its handler sees it."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from zenith_utils.conninfo import options_from_startup
from zenith_utils.pq_framing import (
    COPY_DATA,
    COPY_DONE,
    COPY_FAIL,
    DEFAULT_MAX_MESSAGE,
    Bytes,
    ConnectionClosed,
    CopyFinished,
    MessageReader,
    MessageWriter,
    ProtocolError,
    cstring,
    split_cstring,
    tune_socket,
)

# Type oids (pg_type.dat).
INT8_OID: Final = 20
INT4_OID: Final = 23
TEXT_OID: Final = 25

_TYPE_LENGTHS = {INT8_OID: 8, INT4_OID: 4, TEXT_OID: -1}
# Message types a client may send inside a copy although they mean nothing there.
_IGNORED_IN_COPY = frozenset(b"HS")
_TERMINATE = ord("X")
_PASSWORD = ord("p")
_MAX_PASSWORD = 65_535


class QueryError(Exception):
    """Answered as ErrorResponse; the connection goes on.

    Any other exception that leaves a handler is answered the same way, with its outermost
    message and SQLSTATE XX000, and logged with its traceback.
    """

    def __init__(self, message: str, sqlstate: str = "XX000") -> None:
        super().__init__(message)
        self.message = message
        self.sqlstate = sqlstate


class FatalQueryError(QueryError):
    """Answered as ErrorResponse with severity FATAL; the connection is then closed."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result, in text format."""

    name: str
    type_oid: int = TEXT_OID


class CopyState(Enum):
    """Which copy sub-protocol our direction of a connection is in."""

    NONE = 0
    OUT = 1
    BOTH = 2


class Connection:
    """One client. Sending methods collect messages; flush() hands them to the kernel.

    One thread may receive while another sends. ConnectionClosed from any method means that the
    client is gone: let it pass, the server ends the thread quietly.
    """

    def __init__(
        self, sock: socket.socket, peer: str, *, max_message: int = DEFAULT_MAX_MESSAGE
    ) -> None:
        tune_socket(sock)
        self.sock = sock
        self.peer = peer
        self.params: dict[str, str] = {}
        """Start-up parameters as sent by the client."""
        self.identity: object = None
        """What authentication established about the client; None under trust."""
        self.stopping = False
        """Set when the server stops: a handler that streams or waits should end soon."""
        self.copy_state = CopyState.NONE
        self.reader = MessageReader(sock, max_message=max_message)
        self.writer = MessageWriter(sock)

    def parse_options(self) -> dict[str, str]:
        """Start-up parameters with those inside ``options`` ('-c k=v k2=v2') as peers."""
        return options_from_startup(self.params)

    def fileno(self) -> int:
        """Descriptor for poll(); look at has_buffered_input() before waiting on it."""
        return self.sock.fileno()

    def has_buffered_input(self) -> bool:
        """Whether a whole message was received already and waits in the buffer."""
        return self.reader.has_message()

    def wait_readable(self, timeout: float | None = None) -> bool:
        """Wait until a receiving call may have something; False after `timeout` seconds.

        True does not promise a whole message. To wait for other things too poll fileno().
        """
        if self.reader.has_message():
            return True
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(None if timeout is None else timeout * 1000))

    # ---- results -------------------------------------------------------------------------------

    def send_row_description(self, columns: Sequence[Column]) -> None:
        """Announce a result with these columns, all in text format."""
        out = bytearray(len(columns).to_bytes(2, "big"))
        for column in columns:
            length = _TYPE_LENGTHS.get(column.type_oid, -1)
            out += cstring(column.name)
            out += bytes(6)  # not a table's column: table oid 0, attribute number 0
            out += column.type_oid.to_bytes(4, "big")
            out += length.to_bytes(2, "big", signed=True)
            out += b"\xff\xff\xff\xff\0\0"  # type modifier -1, format text
        self.writer.put(b"T", out)

    def send_data_row(self, values: Sequence[Bytes | None]) -> None:
        """One row; None is NULL, everything else the text form of the value."""
        out = bytearray(len(values).to_bytes(2, "big"))
        for value in values:
            if value is None:
                out += b"\xff\xff\xff\xff"
            else:
                out += len(value).to_bytes(4, "big")
                out += value
        self.writer.put(b"D", out)

    def send_command_complete(self, tag: str = "SELECT 1") -> None:
        """End the answer to a query, and its copy if one is open.

        ReadyForQuery is the server's business.
        """
        self.send_copy_done()
        self.writer.put(b"C", cstring(tag))

    def send_result(
        self,
        columns: Sequence[Column],
        rows: Iterable[Sequence[str | int | Bytes | None]],
        tag: str = "SELECT 1",
    ) -> None:
        """A whole result: description, rows and CommandComplete. Strings and ints are encoded."""
        self.send_row_description(columns)
        for row in rows:
            self.send_data_row([_text_value(value) for value in row])
        self.send_command_complete(tag)

    def send_notice(self, message: str) -> None:
        """A NoticeResponse of severity NOTICE."""
        self.writer.put(b"N", _error_fields("NOTICE", "00000", message))

    def flush(self) -> None:
        """Send everything collected so far. Raises ConnectionClosed."""
        self.writer.flush()

    # ---- copy ----------------------------------------------------------------------------------

    def send_copy_out_response(self) -> None:
        """Start COPY out: CopyData messages follow, then send_copy_done()."""
        self.writer.put(b"H", b"\0\0\0")
        self.copy_state = CopyState.OUT

    def send_copy_both_response(self) -> None:
        """Start COPY both, and flush, as the client must not wait for the first CopyData."""
        self.writer.put(b"W", b"\0\0\0")
        self.writer.flush()
        self.copy_state = CopyState.BOTH

    def send_copy_data(self, *parts: Bytes) -> None:
        """One CopyData message made of the parts.

        Small ones are collected until flush(), big ones sent at once; the parts may be reused
        either way.
        """
        self.writer.put_copy_data(parts)

    def send_copy_done(self) -> None:
        """End our direction of the copy; nothing if it has ended already."""
        if self.copy_state is not CopyState.NONE:
            self.writer.put(b"c")
            self.copy_state = CopyState.NONE

    def recv_copy_data(self) -> memoryview | None:
        """Wait for the payload of the next CopyData, valid until the next call that receives.

        None at the end: CopyDone, Terminate, a closed connection, or the server stops. Nothing is
        flushed here: flush() before waiting for an answer. Raises QueryError (57014) at CopyFail
        and ProtocolError for a message that has no place in a copy.
        """
        try:
            # A client that goes on sending must not keep a stopping server busy.
            while not self.stopping:
                kind, payload = self.reader.read_message()
                if kind == COPY_DATA:
                    return payload
                if self.copy_ended(kind, payload):
                    return None
        except ConnectionClosed:
            pass
        return None

    def recv_copy_data_available(self) -> memoryview | None:
        """Like recv_copy_data(), but None when no whole message can be had without waiting.

        The end is told apart by exceptions: CopyFinished at CopyDone (a handler may let it pass,
        the server then finishes the query), ConnectionClosed at Terminate, a closed connection and
        when the server stops.
        """
        while not self.stopping:
            message = self.reader.read_available()
            if message is None:
                return None
            kind, payload = message
            if kind == COPY_DATA:
                return payload
            if self.copy_ended(kind, payload):
                if kind == _TERMINATE:
                    raise ConnectionClosed("terminated by the client")
                raise CopyFinished
        raise ConnectionClosed("the server stops")

    def copy_ended(self, kind: int, payload: memoryview) -> bool:
        """Whether a message other than CopyData ends the copy."""
        if kind in (COPY_DONE, _TERMINATE):
            return True
        if kind == COPY_FAIL:
            reason = bytes(payload).rstrip(b"\0").decode("utf-8", "backslashreplace")
            raise QueryError(f"COPY failed on the client: {reason}", "57014")
        if kind not in _IGNORED_IN_COPY:
            raise ProtocolError(f"unexpected message type {chr(kind)!r} during COPY")
        return False

    # ---- errors and authentication -------------------------------------------------------------

    def send_error(self, message: str, sqlstate: str = "XX000", *, fatal: bool = False) -> None:
        """An ErrorResponse. Handlers raise QueryError instead of calling this."""
        self.copy_state = CopyState.NONE
        self.writer.put(b"E", _error_fields("FATAL" if fatal else "ERROR", sqlstate, message))

    def request_password(self) -> str:
        """Ask the client for a cleartext password. ProtocolError if it sends anything else."""
        self.writer.put(b"R", (3).to_bytes(4, "big"))
        self.writer.flush()
        # Whoever may be a stranger cannot have us keep more than this.
        max_message, self.reader.max_message = self.reader.max_message, _MAX_PASSWORD + 4
        kind, payload = self.reader.read_message()
        self.reader.max_message = max_message
        if kind != _PASSWORD:
            raise ProtocolError(f"expected a password, got message type {chr(kind)!r}")
        raw, _ = split_cstring(payload)
        return raw.decode("utf-8", "backslashreplace")

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def _text_value(value: str | int | Bytes | None) -> Bytes | None:
    if isinstance(value, int):
        return b"%d" % value
    return value.encode() if isinstance(value, str) else value


def _error_fields(severity: str, sqlstate: str, message: str) -> bytes:
    # S may be translated, V never is; both are the same here.
    text = message.replace("\0", "").encode("utf-8", "backslashreplace")
    code = sqlstate.encode()
    kind = severity.encode()
    return b"S" + kind + b"\0V" + kind + b"\0C" + code + b"\0M" + text + b"\0\0"


def is_set_statement(query: str) -> bool:
    """Whether a query is a SET statement, which drivers send on connecting and daemons ignore."""
    return query.lstrip()[:4].lower() == "set "


class Handler(Protocol):
    """Answers the queries of one client; a new one is made for every connection.

    Both methods run in the connection's own thread. A handler that returns from query() with a
    copy still open leaves CopyDone and CommandComplete to the server.
    """

    def startup(self, conn: Connection) -> None:
        """Look at the start-up parameters; a QueryError refuses the connection."""

    def query(self, conn: Connection, query: str) -> None:
        """Answer one query up to and including CommandComplete, or raise QueryError."""


class Auth(Protocol):
    """Decides whether a client may connect."""

    def authenticate(self, conn: Connection) -> object:
        """What is known of the client (Connection.identity), or QueryError to refuse it."""


class TrustAuth:
    """Lets everybody in."""

    def authenticate(self, conn: Connection) -> object:
        """Accept; nothing is known of the client."""
        del conn
        return None


class CleartextPasswordAuth:
    """Asks for a password and has it checked; used with tokens, over networks that are trusted."""

    def __init__(self, check: Callable[[str], object]) -> None:
        """`check` gets the password and returns the identity, or raises QueryError."""
        self._check = check

    def authenticate(self, conn: Connection) -> object:
        """Ask for the password and check it."""
        return self._check(conn.request_password())
