"""The wire-protocol server, driven by stock clients, by pq_client and by raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import asyncpg
import psycopg2
import pytest

from zenith_utils import pq_client
from zenith_utils.postgres_backend import (
    Auth,
    CleartextPasswordAuth,
    Column,
    Connection,
    ConnectionClosed,
    FatalQueryError,
    Handler,
    PostgresServer,
    QueryError,
    is_set_statement,
)
from zenith_utils.pq_client import CopyFinished, PqConnectionLost, PqError
from zenith_utils.pq_framing import MessageWriter

TAR_CHUNKS = [b"first chunk\n", b"x" * 100_000 + b"\n", b"last\n"]


class EchoHandler:
    """A command for every kind of answer."""

    def startup(self, conn: Connection) -> None:
        """Refuse one database."""
        if conn.params.get("database") == "forbidden":
            raise QueryError("go away", "28000")

    def query(self, conn: Connection, query: str) -> None:
        """Dispatch on the first word."""
        command, _, rest = query.partition(" ")
        if is_set_statement(query):
            conn.send_command_complete()
        elif command == "row":
            conn.send_result([Column("a"), Column("b")], [(rest, None), ("é", 42)])
        elif command == "two":
            conn.send_result([Column("a")], [("first",)])
            conn.send_result([Column("a")], [("second",)])
        elif command == "params":
            rows = [(k, v) for k, v in conn.parse_options().items()]
            conn.send_result([Column("k"), Column("v")], rows)
        elif command == "fail":
            raise QueryError(rest, "22023")
        elif command == "bug":
            raise ZeroDivisionError("division by zero")
        elif command == "fatal":
            raise FatalQueryError(rest)
        elif command == "copyout":
            self._copy_out(conn)
        elif command == "identity":
            conn.send_result([Column("id")], [(str(conn.identity),)])
        elif command == "echo":
            self._echo(conn)
        elif command == "poll":
            self._poll(conn)
        elif command == "hang":
            while not conn.wait_readable(0.05) and not conn.stopping:
                pass
        elif command == "drip":
            conn.send_copy_both_response()
            while not conn.wait_readable(0.001):
                conn.send_copy_data(b"drip")
                conn.flush()
        elif command == "flood":
            conn.send_copy_both_response()
            while True:
                conn.send_copy_data(bytes(1 << 20))
        else:
            raise QueryError("unknown command", "42601")

    def _copy_out(self, conn: Connection) -> None:
        conn.send_copy_out_response()
        for chunk in TAR_CHUNKS:
            conn.send_copy_data(chunk[:3], chunk[3:])
        conn.send_copy_done()
        conn.send_command_complete()

    def _echo(self, conn: Connection) -> None:
        conn.send_copy_both_response()
        while (payload := conn.recv_copy_data()) is not None:
            conn.send_copy_data(b"<", payload, b">")
            if not conn.has_buffered_input():
                conn.flush()

    def _poll(self, conn: Connection) -> None:
        """Counts up until told to stop, as a stream sender that also takes feedback would."""
        conn.send_copy_both_response()
        number = 0
        while True:
            payload = conn.recv_copy_data_available()
            if payload is not None and bytes(payload) == b"stop":
                return
            conn.send_copy_data(b"%d" % number)
            conn.flush()
            number += 1


class Running:
    """A started server and its address."""

    def __init__(self, auth: Auth | None = None, **settings: float) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        self.server = PostgresServer(sock, EchoHandler, name="echo", auth=auth, **settings)  # type: ignore[arg-type]
        self.server.start()

    def client(self, **kwargs: str) -> pq_client.PqConnection:
        """A logged-in client."""
        return pq_client.connect("127.0.0.1", self.port, user="u", **kwargs)  # type: ignore[arg-type]

    def raw(self) -> socket.socket:
        """A bare connection."""
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        sock.settimeout(10)
        return sock


@pytest.fixture
def echo() -> Iterator[Running]:
    running = Running()
    yield running
    running.server.stop(5)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.005)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            data += chunk
    return data


def startup_packet(**params: str) -> bytes:
    body = b"".join(k.encode() + b"\0" + v.encode() + b"\0" for k, v in params.items()) + b"\0"
    return struct.pack(">ii", len(body) + 8, 196608) + body


def message(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + struct.pack(">i", len(payload) + 4) + payload


def message_types(data: bytes) -> str:
    """Type letters of a byte stream of messages."""
    letters = ""
    while data:
        letters += chr(data[0])
        data = data[1 + struct.unpack_from(">i", data, 1)[0] :]
    return letters


# ---- stock clients -----------------------------------------------------------------------------


def test_psycopg2(echo: Running) -> None:
    conn = psycopg2.connect(host="127.0.0.1", port=echo.port, user="u", dbname="d")
    conn.autocommit = True
    try:
        with conn.cursor() as cur:
            cur.execute("row hello world")
            assert cur.fetchall() == [("hello world", None), ("é", "42")]
            assert [column.name for column in cur.description or ()] == ["a", "b"]
            cur.execute("set FOO")
            with pytest.raises(psycopg2.Error) as caught:
                cur.execute("fail wrong value")
            assert caught.value.pgcode == "22023"
            assert "wrong value" in str(caught.value)
            with pytest.raises(psycopg2.errors.InternalError_, match="division by zero"):
                cur.execute("bug")
            cur.execute("row still usable")
            assert cur.fetchall()[0] == ("still usable", None)
    finally:
        conn.close()


def test_psycopg2_options_become_parameters(echo: Running) -> None:
    options = "-c ztimelineid=ab ztenantid=cd pageserver_connstr=postgresql://h:1/?a=b"
    conn = psycopg2.connect(
        host="127.0.0.1", port=echo.port, user="u", options=options, replication=0
    )
    conn.autocommit = True
    try:
        with conn.cursor() as cur:
            cur.execute("params")
            params = dict(cur.fetchall())
    finally:
        conn.close()
    assert params["ztimelineid"] == "ab"
    assert params["ztenantid"] == "cd"
    assert params["pageserver_connstr"] == "postgresql://h:1/?a=b"
    assert params["user"] == "u"


def test_asyncpg_simple_and_extended(echo: Running) -> None:
    async def run() -> None:
        conn = await asyncpg.connect(
            host="127.0.0.1", port=echo.port, user="u", database="d", ssl=False
        )
        try:
            assert await conn.execute("set FOO") == "SELECT 1"
            assert await conn.fetch("set extended") == []
            with pytest.raises(asyncpg.InvalidParameterValueError, match="bad"):
                await conn.fetch("fail bad")
            assert await conn.fetch("set again") == []
        finally:
            await conn.close()

    asyncio.run(run())


def test_psql_copy_out_and_error_status(echo: Running) -> None:
    url = f"postgres://u@127.0.0.1:{echo.port}/d"

    def psql(command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["psql", "--no-psqlrc", url, "-c", command], capture_output=True, timeout=10
        )

    done = psql("copyout")
    assert (done.returncode, done.stdout) == (0, b"".join(TAR_CHUNKS))
    failed = psql("nonsense")
    assert failed.returncode == 1
    assert b"ERROR:  unknown command" in failed.stderr


# ---- extended protocol, byte for byte ----------------------------------------------------------


def test_extended_protocol_skips_to_sync_after_an_error(echo: Running) -> None:
    parse_bad = message(b"P", b"\0fail first\0\0\0")
    parse_good = message(b"P", b"name\0row x\0\0\0")
    bind = message(b"B", b"\0name\0\0\0\0\0\0\0")
    describe = message(b"D", b"S\0") + message(b"D", b"P\0")
    execute = message(b"E", b"\0\0\0\0\0")
    sync = message(b"S")
    with echo.raw() as sock:
        sock.sendall(startup_packet(user="u"))
        sock.sendall(parse_bad + bind + execute + parse_good + message(b"Q", b"row y\0") + sync)
        sock.sendall(parse_good + describe + bind + execute + message(b"C", b"S\0") + sync)
        sock.sendall(message(b"Q", b" ; \0") + message(b"X"))
        answer = message_types(read_all(sock))
    assert answer == "RSSZ12EZ1tnn2TDDC3ZIZ"


def test_parameters_are_refused(echo: Running) -> None:
    bind = message(b"B", b"\0\0\0\0\0\1\0\0\0\1x\0\0")
    with echo.raw() as sock:
        sock.sendall(startup_packet(user="u") + message(b"P", b"\0row\0\0\0") + bind)
        sock.sendall(message(b"S") + message(b"X"))
        answer = read_all(sock)
    assert message_types(answer) == "RSSZ1EZ"
    assert b"0A000" in answer


# ---- start-up ----------------------------------------------------------------------------------


def test_encryption_is_declined_and_cancel_closes(echo: Running) -> None:
    with echo.raw() as sock:
        sock.sendall(struct.pack(">ii", 8, 80877104))
        assert sock.recv(1) == b"N"
        sock.sendall(struct.pack(">ii", 8, 80877103))
        assert sock.recv(1) == b"N"
        sock.sendall(startup_packet(user="u") + message(b"X"))
        assert message_types(read_all(sock)) == "RSSZ"
    with echo.raw() as sock:
        sock.sendall(struct.pack(">iiii", 16, 80877102, 1, 2))
        assert read_all(sock) == b""


def test_protocol_version_is_negotiated(echo: Running) -> None:
    with echo.raw() as sock:
        packet = bytearray(startup_packet(user="u", **{"_pq_.x": "1"}))
        packet[7] = 2
        sock.sendall(packet + message(b"X"))
        answer = read_all(sock)
        assert message_types(answer) == "vRSSZ"
        # 3.0 and one option, as a stock Postgres 15 answers.
        assert answer.startswith(message(b"v", b"\0\3\0\0\0\0\0\1_pq_.x\0"))
    with echo.raw() as sock:
        sock.sendall(struct.pack(">ii", 8, 2 << 16))
        answer = read_all(sock)
        assert message_types(answer) == "E"
        assert b"unsupported frontend protocol 2.0" in answer


def test_cleartext_password() -> None:
    def check(password: str) -> object:
        if password != "token":
            raise QueryError("bad token", "28P01")
        return "tenant-7"

    running = Running(CleartextPasswordAuth(check))
    try:
        with running.client(password="token") as conn:
            assert conn.simple_query("identity") == [[b"tenant-7"]]
        with pytest.raises(PqError, match="bad token") as caught:
            running.client(password="other")
        assert caught.value.sqlstate == "28P01"
        with pytest.raises(PqError, match="asks for a password"):
            running.client()
        with running.raw() as sock:
            sock.sendall(startup_packet(user="u") + message(b"Q", b"row x\0"))
            answer = read_all(sock)
            assert message_types(answer) == "RE"
            assert b"08P01" in answer
        with running.raw() as sock:
            # Refused by its length alone: that many bytes are never kept for a stranger.
            sock.sendall(startup_packet(user="u") + b"p" + struct.pack(">i", 70_000))
            assert b"invalid message length 70000" in read_all(sock)
        with running.client(password="token") as conn:
            assert conn.simple_query("row " + "x" * 70_000)[0][0] == b"x" * 70_000
    finally:
        running.server.stop(5)


def test_handler_refuses_at_startup(echo: Running) -> None:
    with pytest.raises(PqError, match="go away") as caught:
        echo.client(database="forbidden")
    assert caught.value.severity == "FATAL"


def test_slow_startup_is_cut_off() -> None:
    running = Running(startup_timeout=2.0)
    try:
        with running.client() as conn, running.raw() as slow:
            slow.sendall(b"\0")
            assert slow.recv(1) == b""
            # The other client's limit has passed too by now, but it was in time.
            assert conn.simple_query("row x")[0][0] == b"x"
    finally:
        running.server.stop(5)


def test_connection_limit() -> None:
    running = Running(max_connections=1)
    try:
        with running.client(), pytest.raises(PqError, match="too many clients") as caught:
            running.client()
        assert caught.value.sqlstate == "53300"
    finally:
        running.server.stop(5)


# ---- hostile input -----------------------------------------------------------------------------


def test_garbage_gives_one_log_line(echo: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zenith_utils"), echo.raw() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(sock) == b""
    wait_until(lambda: echo.server.connections == 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "invalid length of startup packet" in caplog.text


@pytest.mark.parametrize(
    "garbage",
    [
        message(b"Q", b"no terminator"),
        message(b"Q", b"row\0behind\0"),
        message(b"?", b""),
        b"Q\0\0\0\3",
        b"Q\x7f\xff\xff\xff",
        message(b"B", b"\0\0\xff\xff"),
        message(b"P", b""),
    ],
)
def test_protocol_violations_end_the_connection(echo: Running, garbage: bytes) -> None:
    with echo.raw() as sock:
        sock.sendall(startup_packet(user="u") + garbage)
        answer = read_all(sock)
    assert message_types(answer) == "RSSZE"
    assert b"C08P01\0" in answer


def test_invalid_utf8_is_an_ordinary_error(echo: Running) -> None:
    with echo.raw() as sock:
        sock.sendall(startup_packet(user="u") + message(b"Q", b"row \xff\0") + message(b"X"))
        assert message_types(read_all(sock)) == "RSSZEZ"


def test_random_bytes_do_not_harm_the_server(echo: Running) -> None:
    generator = random.Random(20)
    for round_number in range(60):
        with echo.raw() as sock, contextlib.suppress(OSError):
            if round_number % 2:
                sock.sendall(startup_packet(user="u"))
            for _ in range(generator.randrange(1, 6)):
                kind = bytes([generator.choice(b"QPBDECSHFdcfXp\0")])
                sock.sendall(message(kind, generator.randbytes(generator.randrange(40))))
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
    wait_until(lambda: echo.server.connections == 0)
    with echo.client() as conn:
        assert conn.simple_query("row fine")[0][0] == b"fine"


def test_claimed_length_alone_takes_no_memory() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            conn = Connection(server, "test", max_message=1 << 30)
            client.sendall(b"d" + struct.pack(">i", 1 << 30) + bytes(100_000))
            client.close()
            assert conn.recv_copy_data() is None
            assert len(conn.reader._buffer) <= 1 << 20


class TricklingSocket:
    """Takes at most 1000 bytes at a time."""

    def __init__(self) -> None:
        self.taken = b""

    def sendmsg(self, buffers: list[memoryview]) -> int:
        """As socket.sendmsg."""
        now = b"".join(buffers)[:1000]
        self.taken += now
        return len(now)


def test_partial_sends_are_continued() -> None:
    sock = TricklingSocket()
    writer = MessageWriter(cast(socket.socket, sock))
    parts = tuple(bytes([i]) * size for i, size in enumerate([30_000, 0, 1000, 1, 999, 7000]))
    writer.put(b"N", b"before")
    writer.put_copy_data(parts)
    assert sock.taken == message(b"N", b"before") + message(b"d", b"".join(parts))


# ---- pq_client and copy both -------------------------------------------------------------------


def test_simple_queries_and_errors(echo: Running) -> None:
    with echo.client() as conn:
        assert conn.parameters == {"client_encoding": "UTF8", "server_version": "14.1"}
        assert conn.simple_query("row a") == [[b"a", None], ["é".encode(), b"42"]]
        with pytest.raises(PqError, match="ERROR: no such thing") as caught:
            conn.simple_query("fail no such thing")
        assert caught.value.sqlstate == "22023"
        assert conn.simple_query("two") == [[b"second"]]
        assert list(conn.copy_out("copyout")) == TAR_CHUNKS
        with pytest.raises(PqError, match="unknown command"):
            list(conn.copy_out("nonsense"))
        with pytest.raises(PqError, match="unknown command"):
            conn.start_copy_both("nonsense")
        with pytest.raises(PqError, match="no CopyBoth"):
            conn.start_copy_both("row x")
        assert conn.simple_query("row b")[0] == [b"b", None]
        with pytest.raises(PqError, match="FATAL: the end"):
            conn.simple_query("fatal the end")
    wait_until(lambda: echo.server.connections == 0)


@pytest.mark.parametrize("method", ["simple_query", "start_copy_both"])
def test_an_answer_that_does_not_come_costs_the_connection(echo: Running, method: str) -> None:
    with echo.client() as conn:
        with pytest.raises(PqConnectionLost, match=r"no answer within 0\.1 s"):
            getattr(conn, method)("hang", timeout=0.1)
        wait_until(lambda: echo.server.connections == 0)


@pytest.mark.parametrize("text", ["failed to run ReplicationConn", "x failed to run y"])
def test_failed_to_run_closes_the_connection(echo: Running, text: str) -> None:
    with echo.client() as conn:
        with pytest.raises(PqError, match=text):
            conn.simple_query(f"fail {text}")
        wait_until(lambda: echo.server.connections == 0)


def test_copy_both_echo_of_all_sizes(echo: Running) -> None:
    generator = random.Random(4)
    sizes = [0, 1, 4, 5, 8192, 32763, 32768, 65531, 65536, 131072, 3_000_000, 17, 0]
    with echo.client() as conn:
        conn.start_copy_both("echo")
        for size in sizes:
            data = generator.randbytes(size)
            conn.send_copy_data(data[: size // 3], memoryview(data)[size // 3 :])
            answer = conn.recv_copy_data()
            assert answer is not None
            assert bytes(answer) == b"<" + data + b">"
        pipelined = [generator.randbytes(generator.randrange(3000)) for _ in range(200)]
        for data in pipelined:
            conn.put_copy_data(data)
        conn.flush()
        for data in pipelined:
            answer = conn.recv_copy_data()
            assert answer is not None
            assert bytes(answer) == b"<" + data + b">"
        conn.send_copy_done()
        assert conn.recv_copy_data() is None
        conn.end_copy()
        assert conn.simple_query("row after")[0][0] == b"after"


def test_stream_with_polling_on_both_sides(echo: Running) -> None:
    with echo.client() as conn:
        conn.start_copy_both("poll")
        for number in range(50):
            payload = conn.recv_copy_data()
            assert payload is not None
            assert int(bytes(payload)) == number
        conn.send_copy_data(b"stop")
        number = 50
        while (payload := conn.recv_copy_data()) is not None:
            assert int(bytes(payload)) == number
            number += 1
        conn.end_copy()
        # The other way to end it: CopyDone reaches the handler as an exception it lets pass.
        conn.start_copy_both("poll")
        conn.send_copy_done()
        with pytest.raises(CopyFinished):
            while True:
                conn.recv_copy_data_available()
        conn.end_copy()
        assert conn.simple_query("row after")[0][0] == b"after"


def test_handler_sends_until_there_is_input(echo: Running) -> None:
    with echo.client() as conn:
        conn.start_copy_both("drip")
        for _ in range(3):
            assert bytes(conn.recv_copy_data() or b"") == b"drip"
        conn.end_copy()
        assert conn.simple_query("row after")[0][0] == b"after"


def test_nothing_available_and_timeout(echo: Running) -> None:
    with echo.client() as conn:
        conn.start_copy_both("echo")
        assert conn.recv_copy_data_available() is None
        with pytest.raises(TimeoutError):
            conn.recv_copy_data(timeout=0.02)
        conn.send_copy_data(b"x")
        payload = conn.recv_copy_data(timeout=10)
        assert payload is not None
        assert bytes(payload) == b"<x>"


def test_copy_fail_and_stray_messages(echo: Running) -> None:
    with echo.raw() as sock:
        sock.sendall(startup_packet(user="u") + message(b"Q", b"echo\0"))
        sock.sendall(message(b"H") + message(b"S") + message(b"d", b"x"))
        sock.sendall(message(b"f", b"client gave up\0") + message(b"d", b"late") + message(b"X"))
        answer = read_all(sock)
    assert message_types(answer) in ("RSSZWdEZ", "RSSZWEZ")
    assert b"57014" in answer


def test_detach_gives_socket_and_unread_bytes(echo: Running) -> None:
    conn = echo.client()
    conn.start_copy_both("echo")
    for data in (b"one", b"two"):
        conn.put_copy_data(data)
    conn.flush()
    assert bytes(conn.recv_copy_data() or b"") == b"<one>"
    sock, rest = conn.detach()
    with sock:
        sock.settimeout(10)
        expected = message(b"d", b"<two>")
        while len(rest) < len(expected):
            rest += sock.recv(100)
        assert rest == expected


def test_unix_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("s")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(directory / ".s.PGSQL.5432"))
    sock.listen()
    server = PostgresServer(sock, EchoHandler, name="unix")
    server.start()
    try:
        with pq_client.connect_conninfo(f"host={directory} user=u") as conn:
            assert conn.simple_query("row x")[0][0] == b"x"
    finally:
        server.stop(5)


def test_unreachable_server_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PqConnectionLost, match=f"cannot connect to 127.0.0.1:{port}"):
        pq_client.connect("127.0.0.1", port, user="u")


def test_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PqConnectionLost, match="timed out"):
            pq_client.connect("127.0.0.1", port, user="u", timeout=0.1)


# ---- stopping ----------------------------------------------------------------------------------


def test_busy_client_does_not_hold_up_the_stop() -> None:
    client, server = socket.socketpair()
    with client, server:
        conn = Connection(server, "test")
        client.sendall(message(b"d", b"one") * 3)
        assert bytes(conn.recv_copy_data() or b"") == b"one"
        conn.stopping = True
        assert conn.has_buffered_input()
        assert conn.recv_copy_data() is None
        with pytest.raises(ConnectionClosed, match="the server stops"):
            conn.recv_copy_data_available()


def test_handler_factory_that_fails_harms_one_client_only() -> None:
    running = Running()

    def broken() -> Handler:
        raise RuntimeError("no handler today")

    running.server.handler_factory = broken
    try:
        with pytest.raises(PqError, match="internal error"):
            running.client()
        running.server.handler_factory = EchoHandler
        with running.client() as conn:
            assert conn.simple_query("row x")[0][0] == b"x"
    finally:
        running.server.stop(5)


def test_stop_wakes_everybody() -> None:
    running = Running()
    idle, copying, flooded = running.client(), running.client(), running.client()
    unfinished = running.raw()
    copying.start_copy_both("echo")
    flooded.start_copy_both("flood")
    before = {thread.name for thread in threading.enumerate()}
    assert {"echo", "echo-0", "echo-1", "echo-2"} <= before
    running.server.stop(2)  # the flooded client never reads: cut off after the deadline
    assert not [t for t in threading.enumerate() if t.name.startswith("echo")]
    with pytest.raises(PqError, match="administrator command"):
        idle.simple_query("row x")
    assert copying.recv_copy_data() is None  # its handler saw the end of input and finished
    copying.end_copy()
    with pytest.raises(PqError, match="administrator command"):
        copying.simple_query("row x")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port))
    for conn in (idle, copying, flooded, unfinished):
        conn.close()
