"""The page service byte by byte, and through the drivers that people use."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator

import asyncpg
import psycopg2
import pytest
from batch_unit.pageserver_support import Root, running

from postgres_ffi.distrib import find_distrib

pytestmark = pytest.mark.timeout(120)
SSL_REQUEST, GSSENC_REQUEST = 80877103, 80877104
INT8_OID, TEXT_OID = 20, 25
READY = (b"Z", b"I")
COMPLETE = (b"C", b"SELECT 1\0")
GC_COLUMNS = (
    "layers_total",
    "layers_needed_by_cutoff",
    "layers_needed_by_branches",
    "layers_not_updated",
    "layers_removed",
    "elapsed",
)


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with running() as root:
        yield root


class RawClient:
    """Messages as they are on the wire."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 30)

    def startup(self) -> None:
        """With a user and a database that mean nothing."""
        body = struct.pack(">I", 196608) + b"user\0nobody\0database\0nothing\0\0"
        self.sock.sendall(struct.pack(">I", len(body) + 4) + body)

    def send(self, kind: bytes, body: bytes) -> None:
        """One message."""
        self.sock.sendall(kind + struct.pack(">I", len(body) + 4) + body)

    def exactly(self, size: int) -> bytes:
        """So many bytes."""
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            assert more, "the connection was closed"
            data += more
        return data

    def receive(self) -> tuple[bytes, bytes]:
        """Type and body of the next message."""
        kind, length = struct.unpack(">cI", self.exactly(5))
        return kind, self.exactly(length - 4)

    def until_ready(self) -> list[tuple[bytes, bytes]]:
        """All messages up to ReadyForQuery."""
        messages = [self.receive()]
        while messages[-1][0] != b"Z":
            messages.append(self.receive())
        return messages

    def query(self, text: str) -> list[tuple[bytes, bytes]]:
        """The answer to a simple query."""
        self.send(b"Q", text.encode() + b"\0")
        return self.until_ready()


@pytest.fixture
def client(root: Root) -> Iterator[RawClient]:
    client = RawClient(root.server.pg_port)
    client.startup()
    client.until_ready()
    yield client
    client.sock.close()


def description(names: tuple[str, ...], oid: int, length: int) -> tuple[bytes, bytes]:
    """RowDescription of columns of one type in text format."""
    column = struct.pack(">IHIhih", 0, 0, oid, length, -1, 0)
    body = b"".join(name.encode() + b"\0" + column for name in names)
    return b"T", struct.pack(">H", len(names)) + body


def test_start_of_a_connection(root: Root) -> None:
    """Encryption is declined; then comes what drivers wait for."""
    client = RawClient(root.server.pg_port)
    with client.sock:
        for code in (GSSENC_REQUEST, SSL_REQUEST):
            client.sock.sendall(struct.pack(">II", 8, code))
            assert client.exactly(1) == b"N"
        client.startup()
        assert client.until_ready() == [
            (b"R", bytes(4)),
            (b"S", b"client_encoding\0UTF8\0"),
            (b"S", b"server_version\x0014.1\0"),
            READY,
        ]


@pytest.mark.parametrize(
    "statement",
    [
        "SET datestyle TO 'ISO'",
        "set FOO",
        "SeT x = 1;",
        " set \tx",
        "failpoints layers-before-delete=off",
    ],
)
def test_statements_without_a_result(client: RawClient, statement: str) -> None:
    assert client.query(statement) == [COMPLETE, READY]


def test_checkpoint_has_a_column_and_no_row(root: Root, client: RawClient) -> None:
    assert client.query(f"checkpoint {root.tenant} {root.timeline}") == [
        description(("data",), TEXT_OID, -1),
        COMPLETE,
        READY,
    ]


@pytest.mark.parametrize("horizon", ["", " 0", " 67108864"])
def test_do_gc_counts_in_one_row(root: Root, client: RawClient, horizon: str) -> None:
    columns, (kind, row), *rest = client.query(f"do_gc {root.tenant} {root.timeline}{horizon}")
    assert columns == description(GC_COLUMNS, INT8_OID, 8)
    assert rest == [COMPLETE, READY]
    assert kind == b"D" and row[:2] == struct.pack(">H", len(GC_COLUMNS))
    position = 2
    for _ in GC_COLUMNS:
        (length,) = struct.unpack_from(">i", row, position)
        assert int(row[position + 4 : position + 4 + length]) >= 0
        position += 4 + length
    assert position == len(row)


def test_basebackup_is_a_copy_out(root: Root, client: RawClient) -> None:
    first, *data, done, complete, ready = client.query(f"basebackup {root.tenant} {root.timeline}")
    assert first == (b"H", bytes(3))
    assert data and {kind for kind, _ in data} == {b"d"}
    assert (done, complete, ready) == ((b"c", b""), COMPLETE, READY)


def test_pagestream_is_a_copy_both(root: Root, client: RawClient) -> None:
    client.send(b"Q", f"pagestream {root.tenant} {root.timeline}".encode() + b"\0")
    assert client.receive() == (b"W", bytes(3))
    client.send(b"d", struct.pack(">BBQIIIB", 0, 1, 0, 1663, 5, 1259, 0))
    assert client.receive() == (b"d", b"\x64\x01")
    client.send(b"d", struct.pack(">BBQIIIB", 1, 1, 0, 1663, 5, 9999, 1))
    assert client.receive() == (b"d", b"\x65" + bytes(4))
    client.send(b"d", struct.pack(">BBQIIIBI", 2, 0, 0, 1663, 5, 1259, 0, 0))
    assert client.receive() == (b"d", b"\x67invalid LSN(0) in request\0")
    client.send(b"c", b"")
    assert client.until_ready() == [(b"c", b""), COMPLETE, READY]


def fields(body: bytes) -> dict[str, str]:
    """Those of an ErrorResponse."""
    return {part[:1].decode(): part[1:].decode() for part in body.split(b"\0") if part}


def test_errors_leave_the_connection_usable(client: RawClient) -> None:
    for statement, code, message in (
        ("hello world", "42601", "unknown command"),
        ("pagestream x", "42601", "invalid param number for pagestream command"),
        (f"checkpoint {'a' * 32} {'b' * 32}", "XX000", f"Tenant {'a' * 32} not found"),
    ):
        (kind, body), ready = client.query(statement)
        assert (kind, ready) == (b"E", READY)
        assert fields(body) == {"S": "ERROR", "V": "ERROR", "C": code, "M": message}
    assert client.query("") == [(b"I", b""), READY]


def test_extended_protocol(root: Root, client: RawClient) -> None:
    """As drivers use it: the result comes with Execute, and ready only at Sync."""
    query = f"checkpoint {root.tenant} {root.timeline}".encode() + b"\0"
    client.send(b"P", b"name\0" + query + bytes(2))
    client.send(b"D", b"Sname\0")
    client.send(b"B", b"\0name\0" + bytes(6))
    client.send(b"E", b"\0" + bytes(4))
    client.send(b"C", b"Sname\0")
    client.send(b"S", b"")
    assert client.until_ready() == [
        (b"1", b""),
        (b"t", bytes(2)),
        (b"n", b""),
        (b"2", b""),
        description(("data",), TEXT_OID, -1),
        COMPLETE,
        (b"3", b""),
        READY,
    ]


@pytest.mark.parametrize("message", [b"Q\0\0\0\x0ahello\0", b"d\0\0\0\4", bytes(8), b"\xff" * 64])
def test_nothing_else_is_served_before_the_start(root: Root, message: bytes) -> None:
    with contextlib.closing(RawClient(root.server.pg_port).sock) as sock:
        sock.sendall(message)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(4096):
                answer += more
        assert b"SELECT" not in answer and b"Z\0\0\0\5" not in answer


def test_asyncpg(root: Root) -> None:
    async def use() -> None:
        connection = await asyncpg.connect(
            host="127.0.0.1", port=root.server.pg_port, user="x", database="y"
        )
        try:
            assert connection.get_server_version().major == 14
            assert await connection.execute("set FOO") == "SELECT 1"
            await connection.execute(f"checkpoint {root.tenant} {root.timeline}")
            with pytest.raises(asyncpg.PostgresError, match="unknown command"):
                await connection.execute("hello")
        finally:
            await connection.close()

    asyncio.run(use())


def test_psycopg2(root: Root) -> None:
    """With autocommit, as it begins transactions else, which there are none of here."""
    with contextlib.closing(
        psycopg2.connect(f"postgres://u@127.0.0.1:{root.server.pg_port}/d")
    ) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SET datestyle TO 'ISO'")
        cursor.execute(f"do_gc {root.tenant} {root.timeline} 0")
        assert [column.name for column in cursor.description or ()] == list(GC_COLUMNS)
        row = cursor.fetchone()
        assert row is not None and all(isinstance(value, int) for value in row)
        with pytest.raises(psycopg2.DatabaseError, match="unknown command"):
            cursor.execute("hello")
        cursor.execute("set FOO")


def test_psql(root: Root) -> None:
    result = subprocess.run(
        [
            str(find_distrib().bin_dir / "psql"),
            *("--no-psqlrc", "-X", "-At", f"postgres://localhost:{root.server.pg_port}"),
            *("-c", f"do_gc {root.tenant} {root.timeline} 0"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("|") == len(GC_COLUMNS) - 1
