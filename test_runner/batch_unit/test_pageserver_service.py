"""The page service: pages, commands, bad input, base backups."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from batch_unit.pageserver_support import (
    Root,
    parse_manifest,
    running,
    scratch_directory,
    tar_files,
    template_files,
)

from postgres_ffi.control_file import parse_control_file
from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.relfile import RelTag
from postgres_ffi.wal_format import normalize_lsn
from zenith_utils.crc32c import crc32c
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqError

pytestmark = pytest.mark.timeout(120)
NOBODY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def distrib() -> PgDistrib:
    return find_distrib()


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with running() as root:
        yield root


def test_pages_of_a_fresh_timeline_are_those_of_initdb(root: Root, distrib: PgDistrib) -> None:
    files = template_files(distrib)
    assert len(files) > 800
    with root.pages() as client:
        for (rel, segno), content in files.items():
            assert segno == 0
            nblocks = len(content) // 8192
            assert client.nblocks(rel, root.lsn) == nblocks
            got = b"".join(
                client.pages(rel, start, min(256, nblocks - start), root.lsn)
                for start in range(0, nblocks, 256)
            )
            assert got == content, rel


def test_page_requests(root: Root) -> None:
    pg_class = RelTag(1663, 5, 1259, 0)
    missing = RelTag(1663, 5, 9999, 0)
    with root.pages() as client:
        nblocks = client.nblocks(pg_class, root.lsn)
        first = client.page(pg_class, 0, root.lsn)
        assert any(first)
        assert client.page(pg_class, 0, 0, latest=True) == first
        assert client.page(pg_class, nblocks, root.lsn) == bytes(8192)
        assert client.pages(pg_class, nblocks - 1, 2, root.lsn)[8192:] == bytes(8192)
        assert client.exists(pg_class, root.lsn)
        assert not client.exists(missing, root.lsn)
        assert client.nblocks(missing._replace(forknum=1), root.lsn) == 0


@pytest.mark.parametrize(
    ("request_bytes", "text"),
    [
        (struct.pack(">BBQIIIBI", 2, 0, 0, 1663, 5, 1259, 0, 0), b"invalid LSN(0) in request"),
        (struct.pack(">BBQIIIBI", 2, 1, 0, 1663, 5, 0, 0, 0), b"invalid relnode"),
        (struct.pack(">BBQIIIBI", 2, 1, 0, 1663, 5, 1259, 9, 0), b"invalid fork number 9"),
        (struct.pack(">BBQIIIB", 1, 1, 0, 1663, 5, 9999, 0), b"does not exist"),
        (struct.pack(">BBQIIIBII", 10, 1, 0, 1663, 5, 1259, 0, 0, 257), b"257 blocks"),
        (struct.pack(">BBQIIIBII", 10, 1, 0, 1663, 5, 1259, 0, 0, 0), b"0 blocks"),
        (
            struct.pack(">BBQIIIBI", 2, 0, 1 << 40, 1663, 5, 1259, 0, 0),
            b"Timed out while waiting for WAL record at LSN 100/0",
        ),
        (
            struct.pack(">BBQIIIBI", 2, 0, 8, 1663, 5, 1259, 0, 0),
            b"tried to request a page version that was garbage collected",
        ),
    ],
)
def test_request_errors_leave_the_stream_usable(
    root: Root, request_bytes: bytes, text: bytes
) -> None:
    with root.pages() as client:
        reply = client.ask(request_bytes)
        assert reply[0] == 103 and reply[-1] == 0
        assert text in reply
        assert client.exists(RelTag(1663, 5, 1259, 0), root.lsn)


def test_pipelined_requests_are_answered_in_order(root: Root) -> None:
    rel = RelTag(1663, 5, 1249, 0)
    with root.pages() as client:
        expected = [client.page(rel, blkno, root.lsn) for blkno in range(20)]
        order = [random.Random(7).randrange(20) for _ in range(200)]
        for blkno in order:
            client.conn.put_copy_data(struct.pack(">BBQIIIBI", 2, 0, root.lsn, *rel, blkno))
        client.conn.flush()
        for blkno in order:
            reply = client.conn.recv_copy_data(timeout=30)
            assert reply is not None and reply[1:] == expected[blkno]


# ---- commands and bad input


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("hello", "unknown command"),
        ("pagestream", "invalid param number for pagestream command"),
        (f"pagestream {NOBODY} {NOBODY}", f"Tenant {NOBODY} not found"),
        (f"basebackup {NOBODY}", "invalid param number for basebackup command"),
        ("basebackup x y", "invalid tenant id 'x'"),
        (f"do_gc {NOBODY} {NOBODY} 0", f"Tenant {NOBODY} not found"),
        (f"do_gc {NOBODY}", "invalid param number for do_gc command"),
        (f"compact {NOBODY}", "invalid param number for compact command"),
        ("failpoints", "Invalid failpoints format"),
        ("failpoints walreceiver-after-ingest", "Invalid failpoints format"),
        ("failpoints walreceiver-after-ingest=nap(20)", "Invalid failpoints format"),
        ("failpoints walreceiver-after=off", "there is no failpoint 'walreceiver-after'"),
    ],
)
def test_command_errors(root: Root, command: str, text: str) -> None:
    with contextlib.closing(root.server.connect()) as conn:
        with pytest.raises(PqError, match=text):
            conn.simple_query(command)
        assert conn.simple_query("set FOO") == []


def test_driver_can_connect_and_checkpoint(root: Root) -> None:
    with contextlib.closing(
        psycopg2.connect(host="127.0.0.1", port=root.server.pg_port, user="x", dbname="y")
    ) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(f"checkpoint {root.tenant} {root.timeline}")
        assert [column.name for column in cursor.description or ()] == ["data"]
        assert cursor.fetchall() == []


@pytest.mark.parametrize("message", [b"\xff" * 23, b"\x02short", b"", b"\x03" + bytes(22)])
def test_wrong_pagestream_message_ends_the_connection(root: Root, message: bytes) -> None:
    with root.pages() as client:
        client.conn.send_copy_data(message)
        with pytest.raises(PqError, match="smgr message"):
            client.conn.recv_copy_data(timeout=30)
    with root.pages() as client:
        assert client.exists(RelTag(1663, 5, 1259, 0), root.lsn)


def test_garbage_on_the_sockets_is_survived(root: Root) -> None:
    rng = random.Random(11)
    for port in (root.server.pg_port, root.server.http_port):
        for size in (1, 7, 100, 5000):
            with socket.create_connection(("127.0.0.1", port), 10) as sock:
                sock.sendall(rng.randbytes(size))
    with root.pages() as client:
        assert client.exists(RelTag(1663, 5, 1259, 0), root.lsn)
    assert root.server.http("GET", "status") == {"id": 42}


# ---- base backups


def test_basebackup_contents(root: Root) -> None:
    files = tar_files(root.server.basebackup(root.tenant, root.timeline))
    assert files["PG_VERSION"] == b"15\n"
    assert files["pg_xact"] is None
    assert len(files["pg_xact/0000"] or b"") % 8192 == 0
    assert len(files["base/5/pg_filenode.map"] or b"") == 512
    assert not any(name.startswith("base/5/") and name[7:].isdigit() for name in files)

    manifest = parse_manifest(files["zenith.manifest"] or b"")
    assert manifest.base_lsn == normalize_lsn(root.lsn)
    assert not manifest.checksums
    assert len(manifest.sizes) > 800

    control = parse_control_file(files["global/pg_control"] or b"")
    assert control.checkpoint_lsn == control.checkpoint.redo == manifest.base_lsn
    assert not control.checkpoint.full_page_writes
    segments = [name for name in files if name.startswith("pg_wal/0")]
    assert segments and all(len(files[name] or b"") == 16 << 20 for name in segments)
    prev = root.server.local(root.tenant, root.timeline)["prev_record_lsn"]
    assert files["zenith.signal"] == f"PREV LSN: {prev}".encode()


def test_startup_blocks_are_the_pages(root: Root) -> None:
    data = tar_files(root.server.basebackup(root.tenant, root.timeline))["zenith.startup_blocks"]
    assert data is not None
    assert crc32c(data[:-4]) == struct.unpack("<I", data[-4:])[0]
    size = 20 + 8192
    assert (len(data) - 4) % size == 0
    assert 50 <= len(data) // size <= 200
    with root.pages() as client:
        for start in range(0, len(data) - 4, size):
            *rel, blkno = struct.unpack_from("<5I", data, start)
            page = data[start + 20 : start + size]
            assert client.page(RelTag(*rel), blkno, root.lsn) == page


def test_psql_and_tar_can_take_a_basebackup(root: Root, distrib: PgDistrib, scratch: Path) -> None:
    archive = scratch / "backup.tar"
    with archive.open("wb") as output:
        subprocess.run(
            [
                str(distrib.bin_dir / "psql"),
                "--no-psqlrc",
                f"postgres://127.0.0.1:{root.server.pg_port}",
                *("-c", f"basebackup {root.tenant} {root.timeline}"),
            ],
            stdout=output,
            check=True,
            timeout=60,
        )
    target = scratch / "extracted"
    target.mkdir()
    subprocess.run(["tar", "-x", "-C", str(target), "-f", str(archive)], check=True, timeout=60)
    assert (target / "global/pg_control").stat().st_size == 8192


def test_basebackup_lsn_out_of_range(root: Root) -> None:
    with pytest.raises(PqError, match="invalid basebackup lsn"):
        root.server.basebackup(root.tenant, root.timeline, Lsn(8))
    with pytest.raises(PqError, match="Timed out while waiting for WAL record at LSN 5/0"):
        root.server.basebackup(root.tenant, root.timeline, Lsn.parse("5/0"))
