"""Minimal blocking client of the Postgres wire protocol, for replication and CopyBoth work.

For ordinary SQL use psycopg2; this one gives what that hides: CopyBoth streams without copies of
the data, buffered sending, polling, and the raw socket of an established stream.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Self

from zenith_utils.conninfo import ConninfoError, parse_conninfo
from zenith_utils.pq_framing import (
    COPY_DATA,
    COPY_DONE,
    DEFAULT_MAX_MESSAGE,
    PROTOCOL_3_0,
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

__all__ = [
    "ConninfoError",
    "CopyFinished",
    "PqConnection",
    "PqConnectionLost",
    "PqError",
    "connect",
    "connect_conninfo",
    "parse_conninfo",
]

logger = logging.getLogger(__name__)

_AUTH_OK: Final = 0
_AUTH_CLEARTEXT: Final = 3
_AUTH_NAMES: Final = {2: "Kerberos", 5: "md5", 7: "GSSAPI", 9: "SSPI", 10: "SCRAM"}
_DEFAULT_PORT: Final = 5432


class PqError(Exception):
    """An ErrorResponse of the server, or a failure of the connection itself."""

    def __init__(self, severity: str, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.severity = severity
        self.sqlstate = sqlstate
        self.message = message

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


class PqConnectionLost(PqError):
    """No connection, or it broke: nothing more can be done with it."""

    def __init__(self, message: str, sqlstate: str = "08006") -> None:
        super().__init__("FATAL", sqlstate, message)


def connect(
    host: str,
    port: int,
    *,
    user: str,
    database: str | None = None,
    options: str | None = None,
    replication: bool | str = False,
    application_name: str | None = None,
    password: str | None = None,
    timeout: float | None = 10.0,
    max_message: int = DEFAULT_MAX_MESSAGE,
) -> PqConnection:
    """Connect and log in, within `timeout` seconds altogether.

    A host that starts with '/' is the directory of a Unix socket. `replication` True asks for
    physical replication ("database" for logical). Raises PqConnectionLost if the server cannot be
    reached or leaves, PqError if it refuses.
    """
    params = {"user": user}
    if database is not None:
        params["database"] = database
    if replication:
        params["replication"] = "true" if replication is True else replication
    if options is not None:
        params["options"] = options
    if application_name is not None:
        params["application_name"] = application_name
    deadline = None if timeout is None else time.monotonic() + timeout
    sock = _open_socket(host, port, timeout)
    try:
        conn = PqConnection(sock, max_message=max_message)
        conn._log_in(params, password, deadline)
    except BaseException:
        sock.close()
        raise
    return conn


def connect_conninfo(
    conninfo: str | Mapping[str, str],
    *,
    replication: bool | str | None = None,
    application_name: str | None = None,
    password: str | None = None,
    timeout: float | None = None,
) -> PqConnection:
    """Connect by a connection string (or its parsed form); the arguments win over what it says.

    Without a user it says `zenith_admin`, without a host 127.0.0.1; the time limit is `timeout`,
    else connect_timeout, else 10 s. Raises ConninfoError and what connect() raises.
    """
    params = parse_conninfo(conninfo) if isinstance(conninfo, str) else dict(conninfo)
    try:
        port = int(params.get("port") or _DEFAULT_PORT)
        limit = timeout if timeout is not None else float(params.get("connect_timeout") or 10)
    except ValueError as error:
        raise ConninfoError(f"invalid connection string: {error}") from error
    if replication is None:
        word = params.get("replication", "false").lower()
        replication = "database" if word == "database" else word in ("true", "on", "yes", "1")
    return connect(
        params.get("hostaddr") or params.get("host") or "127.0.0.1",
        port,
        user=params.get("user") or "zenith_admin",
        database=params.get("dbname"),
        options=params.get("options"),
        replication=replication,
        application_name=application_name or params.get("application_name"),
        password=password if password is not None else params.get("password"),
        timeout=limit if limit > 0 else None,
    )


def _open_socket(host: str, port: int, timeout: float | None) -> socket.socket:
    try:
        if host.startswith("/"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout)
                sock.connect(str(Path(host) / f".s.PGSQL.{port}"))
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection((host, port), timeout)
        sock.settimeout(None)
        tune_socket(sock)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PqConnectionLost(f"cannot connect to {host}:{port}: {reason}", "08001") from error
    return sock


class PqConnection:
    """An established connection. Not for several threads at once, save that one may send copy
    data while another receives it.
    """

    def __init__(self, sock: socket.socket, *, max_message: int = DEFAULT_MAX_MESSAGE) -> None:
        self.sock = sock
        self.parameters: dict[str, str] = {}
        """Settings that the server has reported (ParameterStatus)."""
        self._reader = MessageReader(sock, max_message=max_message)
        self._writer = MessageWriter(sock)
        self._copy_done_sent = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Descriptor for poll(); look at has_buffered_input() before waiting on it."""
        return self.sock.fileno()

    def has_buffered_input(self) -> bool:
        """Whether a whole message was received already and waits in the buffer."""
        return self._reader.has_message()

    def close(self) -> None:
        """Say goodbye if that needs no waiting, and close."""
        if self.sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                self.sock.send(b"X\0\0\0\4", socket.MSG_DONTWAIT)
        self.sock.close()

    def detach(self) -> tuple[socket.socket, bytes]:
        """Give the socket away with the bytes received but not consumed; closes nothing.

        For event loops that take over an established stream. The object is unusable afterwards.
        """
        self.flush()
        sock = socket.socket(fileno=self.sock.detach())
        return sock, self._reader.take_buffered()

    # ---- queries -------------------------------------------------------------------------------

    def simple_query(self, sql: str, *, timeout: float | None = None) -> list[list[bytes | None]]:
        """Run a query; the rows of its last result, values in text format.

        Raises PqError; after an ErrorResponse the connection goes on. After `timeout` seconds
        the connection is closed and PqConnectionLost raised.
        """
        self._send_query(sql)
        rows: list[list[bytes | None]] = []
        with self._deadline(timeout):
            while True:
                kind, payload = self._read()
                if kind == ord("D"):
                    rows.append(_data_row(payload))
                elif kind == ord("T"):
                    rows = []
                elif kind == ord("Z"):
                    return rows
                elif kind == ord("E"):
                    raise self._finish_error(payload)
                elif kind in b"GW":
                    self.close()
                    raise PqConnectionLost("the query started a copy", "08P01")

    def copy_out(self, sql: str) -> Iterator[bytes]:
        """Run a query that answers with COPY out; yields the payload of each CopyData.

        Raises PqError, also in the middle. An iterator left before its end closes the connection.
        """
        self._send_query(sql)
        complete = False
        try:
            while True:
                kind, payload = self._read()
                if kind == COPY_DATA:
                    yield bytes(payload)
                elif kind == ord("Z"):
                    complete = True
                    return
                elif kind == ord("E"):
                    error = self._finish_error(payload)
                    complete = True
                    raise error
                elif kind in b"GW":
                    raise PqConnectionLost("expected COPY out", "08P01")
        finally:
            if not complete:
                self.close()

    def start_copy_both(self, sql: str, *, timeout: float | None = None) -> None:
        """Run a query that answers with CopyBothResponse.

        Raises PqError; after `timeout` seconds the connection is closed and PqConnectionLost
        raised.
        """
        self._send_query(sql)
        with self._deadline(timeout):
            while True:
                kind, payload = self._read()
                if kind == ord("W"):
                    self._copy_done_sent = False
                    return
                if kind == ord("E"):
                    raise self._finish_error(payload)
                if kind == ord("Z"):
                    raise PqError("ERROR", "08P01", f"no CopyBoth stream in answer to {sql!r}")

    # ---- copy both -----------------------------------------------------------------------------

    def send_copy_data(self, *parts: Bytes) -> None:
        """Send one CopyData message made of the parts, now."""
        self.put_copy_data(*parts)
        self.flush()

    def put_copy_data(self, *parts: Bytes) -> None:
        """Collect one CopyData message until flush(); a big one is sent at once."""
        try:
            self._writer.put_copy_data(parts)
        except ConnectionClosed as error:
            raise PqConnectionLost(str(error)) from error

    def flush(self) -> None:
        """Send everything collected."""
        try:
            self._writer.flush()
        except ConnectionClosed as error:
            raise PqConnectionLost(str(error)) from error

    def recv_copy_data(self, *, timeout: float | None = None) -> memoryview | None:
        """Wait for the payload of the next CopyData, valid until the next call that receives.

        None at CopyDone: then call end_copy(). Raises PqError when the server ends the stream
        with an error, PqConnectionLost when it vanishes, TimeoutError after `timeout` seconds
        (nothing is lost then, one may go on).
        """
        reader = self._reader
        reader.deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                kind, payload = reader.read_message()
                if kind == COPY_DATA:
                    return payload
                if kind == COPY_DONE:
                    return None
                self._other_in_copy(kind, payload)
        except (ConnectionClosed, ProtocolError) as error:
            raise PqConnectionLost(str(error)) from error
        finally:
            reader.deadline = None

    def recv_copy_data_available(self) -> memoryview | None:
        """Like recv_copy_data(), but None when no whole message can be had without waiting.

        CopyDone raises CopyFinished.
        """
        try:
            while True:
                message = self._reader.read_available()
                if message is None:
                    return None
                kind, payload = message
                if kind == COPY_DATA:
                    return payload
                if kind == COPY_DONE:
                    raise CopyFinished
                self._other_in_copy(kind, payload)
        except (ConnectionClosed, ProtocolError) as error:
            raise PqConnectionLost(str(error)) from error

    def send_copy_done(self) -> None:
        """End our direction of the stream; what the server still sends can be received."""
        if not self._copy_done_sent:
            self._writer.put(b"c")
            self._copy_done_sent = True
            self.flush()

    def end_copy(self) -> None:
        """End both directions and wait until the server is ready for another query.

        Copy data that still arrives is dropped. Raises PqError if the server reports one.
        """
        self.send_copy_done()
        while True:
            kind, payload = self._read()
            if kind == ord("E"):
                raise self._finish_error(payload)
            if kind == ord("Z"):
                return

    def _other_in_copy(self, kind: int, payload: memoryview) -> None:
        if kind == ord("E"):
            self._copy_done_sent = True
            raise self._finish_error(payload)
        if not self._asynchronous(kind, payload):
            raise ProtocolError(f"unexpected message type {chr(kind)!r} in a copy stream")

    # ---- the dialogue --------------------------------------------------------------------------

    def _log_in(
        self, params: Mapping[str, str], password: str | None, deadline: float | None
    ) -> None:
        """Start-up and authentication up to the first ReadyForQuery."""
        body = b"".join(cstring(name) + cstring(value) for name, value in params.items())
        size = 4 + 4 + len(body) + 1
        self._writer.put_raw(size.to_bytes(4, "big") + PROTOCOL_3_0.to_bytes(4, "big"))
        self._writer.put_raw(body + b"\0")
        self.flush()
        self._reader.deadline = deadline
        while True:
            try:
                kind, payload = self._read()
            except TimeoutError as error:
                raise PqConnectionLost("timed out logging in to the server", "08001") from error
            if kind == ord("R"):
                self._authenticate(payload, password)
            elif kind == ord("E"):
                raise _error_response(payload)
            elif kind == ord("Z"):
                self._reader.deadline = None
                return

    def _authenticate(self, payload: memoryview, password: str | None) -> None:
        method = int.from_bytes(payload[:4], "big")
        if method == _AUTH_OK:
            return
        if method != _AUTH_CLEARTEXT:
            name = _AUTH_NAMES.get(method, str(method))
            raise PqError("FATAL", "28000", f"authentication method {name} is not supported")
        if password is None:
            raise PqError("FATAL", "28P01", "the server asks for a password and none was given")
        self._writer.put(b"p", cstring(password))
        self.flush()

    def _send_query(self, sql: str) -> None:
        try:
            self._writer.put(b"Q", cstring(sql))
            self._writer.flush()
        except ConnectionClosed as error:
            raise self._last_words(error) from error

    def _last_words(self, lost: ConnectionClosed) -> PqError:
        """The error that a server sent before it closed the connection; the loss if none."""
        with contextlib.suppress(ConnectionClosed, ProtocolError):
            while (message := self._reader.read_available()) is not None:
                if message[0] == ord("E"):
                    return _error_response(message[1])
        return PqConnectionLost(str(lost))

    def _read(self) -> tuple[int, memoryview]:
        """The next message that is not an asynchronous one."""
        try:
            while True:
                kind, payload = self._reader.read_message()
                if not self._asynchronous(kind, payload):
                    return kind, payload
        except (ConnectionClosed, ProtocolError) as error:
            raise PqConnectionLost(str(error)) from error

    def _asynchronous(self, kind: int, payload: memoryview) -> bool:
        """Take note of a message that may come at any time; False for all others."""
        if kind == ord("N"):
            logger.debug("notice from the server: %s", _error_response(payload))
        elif kind == ord("S"):
            name, position = split_cstring(payload)
            value, _ = split_cstring(payload, position)
            self.parameters[name.decode()] = value.decode("utf-8", "replace")
        elif kind not in b"AKv":
            return False
        return True

    def _finish_error(self, payload: memoryview) -> PqError:
        """The error of an ErrorResponse, after waiting for the ReadyForQuery behind it."""
        error = _error_response(payload)
        if error.severity in ("FATAL", "PANIC"):
            self.close()
            return error
        # A server that leaves instead has told why: its error says more than the loss.
        with contextlib.suppress(PqConnectionLost, TimeoutError):
            while self._read()[0] != ord("Z"):
                pass
        return error

    @contextlib.contextmanager
    def _deadline(self, timeout: float | None) -> Iterator[None]:
        """Limit the reads inside to `timeout` seconds; the connection is lost if it strikes."""
        self._reader.deadline = None if timeout is None else time.monotonic() + timeout
        try:
            yield
        except TimeoutError as error:
            self.close()
            raise PqConnectionLost(f"no answer within {timeout} s") from error
        finally:
            self._reader.deadline = None


def _data_row(payload: memoryview) -> list[bytes | None]:
    count = int.from_bytes(payload[:2], "big")
    values: list[bytes | None] = []
    position = 2
    for _ in range(count):
        length = int.from_bytes(payload[position : position + 4], "big", signed=True)
        position += 4
        if length < 0:
            values.append(None)
            continue
        values.append(bytes(payload[position : position + length]))
        position += length
    if position != len(payload):
        raise PqConnectionLost("malformed row from the server", "08P01")
    return values


def _error_response(payload: memoryview) -> PqError:
    """Fields of an ErrorResponse or NoticeResponse: a letter and a NUL-terminated text each."""
    fields = {}
    for field in bytes(payload).split(b"\0"):
        if field:
            fields[field[:1]] = field[1:].decode("utf-8", "replace")
    severity = fields.get(b"V") or fields.get(b"S", "ERROR")
    message = fields.get(b"M", "unknown error")
    if b"D" in fields:
        message += f"\nDETAIL: {fields[b'D']}"
    return PqError(severity, fields.get(b"C", "XX000"), message)
