"""The zenith library: the free space map reaches the WAL, and what is there suffices."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.lazyfiles_support import (
    FORKS,
    Fork,
    PageServer,
    Postgres,
    fork_path,
    lazy_environment,
    make_lazy_copy,
    server_directory,
    stopped_cluster,
    wait_for,
)
from fixtures.fault_shim import Faults, FaultyPrograms

from pgxn.build import build_module
from postgres_ffi.decoded_record import DecodedBlock
from postgres_ffi.distrib import find_distrib
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from zenith_utils.os_user import give

RM_XLOG = 0
XLOG_FPI = 0xB0
FSM = FORKS["_fsm"]
BLOCK_SIZE = 8192

FILL = "INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g"


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A stopped cluster with full tables."""
    with stopped_cluster(
        *("CREATE TABLE t (i int, v text)", FILL, "VACUUM t"),
        *("CREATE TABLE other AS SELECT * FROM t", "VACUUM other"),
        *("CREATE UNLOGGED TABLE unlogged AS SELECT * FROM t", "VACUUM unlogged"),
    ) as datadir:
        yield datadir


@pytest.fixture
def node(template: Path) -> Iterator[tuple[Postgres, PageServer]]:
    """A running node on lazily opened files, its free space map logged every second."""
    with running_node(template) as (postgres, server, _):
        yield postgres, server


@contextlib.contextmanager
def running_node(template: Path) -> Iterator[tuple[Postgres, PageServer, Faults]]:
    """The same, and its clock."""
    distrib = find_distrib()
    settings = {
        "shared_preload_libraries": str(build_module(distrib, "zenith")),
        "zenith.fsm_log_interval": "1",
        "wal_keep_size": "1GB",
    }
    with server_directory() as root, PageServer(template) as server:
        make_lazy_copy(template, root / "node", root / "map")
        environment = lazy_environment(
            build_module(distrib, "lazyfiles"), root / "map", server.port
        )
        shim = FaultyPrograms(root / "faulty", root)
        faults = shim.faults(root / "node")
        path = shim.directory / "node.faults"
        path.chmod(0o666)
        environment["LD_PRELOAD"] += f" {shim.directory / 'fault_shim.so'}"
        environment["ZENITH_TEST_FAULTS"] = str(path)
        with Postgres(distrib, root / "node", settings, environment) as postgres:
            yield postgres, server, faults


def map_of(postgres: Postgres, table: str, database_name: str = "postgres") -> Fork:
    database, relnode = postgres.sql(
        f"SELECT oid::int8, pg_relation_filenode('{table}')::int8 FROM pg_database"
        " WHERE datname = current_database()",
        database=database_name,
    )[0]
    assert isinstance(database, int) and isinstance(relnode, int)
    return Fork(1663, database, relnode, FSM)


def logged_blocks(datadir: Path, start: int) -> Iterator[DecodedBlock]:
    """Every free space map page logged from a position on."""
    size = 16 << 20
    decoder = WalDecoder(start, check_prev=False)
    position = start
    while (path := datadir / f"pg_wal/00000001{position // size:016X}").exists():
        decoder.feed(path.read_bytes()[position % size :])
        position += size - position % size
    # The end of the WAL shows as a record that is none.
    with contextlib.suppress(WalDecodeError):
        while (record := decoder.next_record()) is not None:
            if (record.rmid, record.rmgr_info) == (RM_XLOG, XLOG_FPI):
                yield from (block for block in record.blocks if block.rel.forknum == FSM)


def logged_pages(datadir: Path, start: int) -> dict[Fork, dict[int, bytes]]:
    """The last image of every free space map page logged from a position on."""
    pages: dict[Fork, dict[int, bytes]] = {}
    for block in logged_blocks(datadir, start):
        pages.setdefault(Fork(*block.rel), {})[block.blkno] = page_image(block)
    return pages


def page_image(block: DecodedBlock) -> bytes:
    assert block.image is not None
    if not block.compressed:
        return block.image
    return pglz_decompress(block.image, BLOCK_SIZE)


def pglz_decompress(source: bytes, size: int) -> bytes:
    """common/pg_lzcompress.c: a control byte, then eight literals or (offset, length) pairs."""
    out = bytearray()
    position = 0
    while position < len(source) and len(out) < size:
        control = source[position]
        position += 1
        for bit in range(8):
            if position >= len(source) or len(out) >= size:
                break
            if not control >> bit & 1:
                out.append(source[position])
                position += 1
                continue
            length = (source[position] & 0x0F) + 3
            offset = (source[position] & 0xF0) << 4 | source[position + 1]
            position += 2
            if length == 18:
                length += source[position]
                position += 1
            for _ in range(length):
                out.append(out[-offset])
    assert len(out) == size
    return bytes(out)


def lsn(postgres: Postgres) -> int:
    value = postgres.value("SELECT (pg_current_wal_insert_lsn() - '0/0')::int8")
    assert isinstance(value, int)
    return value


def has_free_space(pages: dict[int, bytes]) -> bool:
    """Whether a leaf page (block 2 is the first) knows of pages that are half empty."""
    return 2 in pages and sum(pages[2][BLOCK_SIZE - 4069 :]) > 4069


@pytest.mark.parametrize("how", ["clean stop", "crash"])
def test_space_is_reused_after_a_new_start(node: tuple[Postgres, PageServer], how: str) -> None:
    postgres, _ = node
    start = lsn(postgres)
    fork = map_of(postgres, "t")
    size = postgres.value("SELECT pg_relation_size('t')")
    postgres.sql("DELETE FROM t WHERE i % 2 = 0", "VACUUM t")
    if how == "crash":
        wait_for(
            lambda: has_free_space(logged_pages(postgres.datadir, start).get(fork, {})),
            "the map to be logged",
        )
        # The truth is in storage: what a new node gets is the pages in the WAL, not these files.
    postgres.sql("CHECKPOINT")
    postgres.stop()
    pages = logged_pages(postgres.datadir, start)[fork]
    assert has_free_space(pages)

    renewed = postgres.datadir.with_name("renewed")
    shutil.copytree(postgres.datadir, renewed)
    # Whatever the map's files hold is lost; the pages found in the WAL take their place.
    for path in renewed.glob("base/*/*_fsm"):
        path.unlink()
    restored = fork_path(renewed, fork)
    restored.write_bytes(b"".join(pages.get(b, bytes(BLOCK_SIZE)) for b in range(max(pages) + 1)))
    give(renewed, recursive=True)
    with Postgres(postgres.distrib, renewed, environment=postgres.environment) as second:
        second.sql(FILL.replace("20000", "9000"))
        assert second.value("SELECT pg_relation_size('t')") == size


def test_only_changed_pages_are_logged_and_none_is_fetched(
    node: tuple[Postgres, PageServer],
) -> None:
    postgres, server = node
    start = lsn(postgres)
    t, other = map_of(postgres, "t"), map_of(postgres, "other")
    postgres.sql("DELETE FROM t WHERE i % 2 = 0", "VACUUM t")
    postgres.sql("SELECT count(*) FROM other", "DELETE FROM unlogged", "VACUUM unlogged")
    unlogged = map_of(postgres, "unlogged")
    wait_for(lambda: has_free_space(logged_pages(postgres.datadir, start).get(t, {})), "a pass")
    postgres.stop()
    pages = logged_pages(postgres.datadir, start)
    assert other not in pages
    assert unlogged not in pages
    assert not [request for request in server.requests if request[0] == other]

    last: dict[int, bytes] = {}
    for block in logged_blocks(postgres.datadir, start):
        if Fork(*block.rel) == t:
            contents = page_image(block)[28:]  # without LSN, checksum and where to search next
            assert last.get(block.blkno) != contents, "an unchanged page is logged again"
            last[block.blkno] = contents


def test_truncation_logs_the_whole_map_again(node: tuple[Postgres, PageServer]) -> None:
    postgres, _ = node
    start = lsn(postgres)
    fork = map_of(postgres, "t")
    postgres.sql("DELETE FROM t WHERE i % 2 = 0 AND i < 15000", "VACUUM t")
    wait_for(lambda: fork in logged_pages(postgres.datadir, start), "a pass")
    truncation = lsn(postgres)
    postgres.sql("DELETE FROM t WHERE i > 15000", "VACUUM t")
    postgres.stop()
    assert sorted(logged_pages(postgres.datadir, truncation)[fork]) == [0, 1, 2]


def test_relations_of_other_databases(node: tuple[Postgres, PageServer]) -> None:
    postgres, _ = node
    postgres.sql("CREATE DATABASE second")
    start = lsn(postgres)
    postgres.sql(
        "CREATE TABLE t (i int, v text)",
        FILL,
        "DELETE FROM t WHERE i % 2 = 0",
        "VACUUM t",
        "CREATE TABLE gone AS SELECT * FROM t",
        "VACUUM gone",
        "DROP TABLE gone",
        database="second",
    )
    fork = map_of(postgres, "t", "second")
    postgres.stop()
    assert has_free_space(logged_pages(postgres.datadir, start)[fork])
    assert "ERROR" not in postgres.log.read_text()


def test_a_clock_that_is_set_back_does_not_keep_maps_out(template: Path) -> None:
    with running_node(template) as (postgres, _, clock):
        fork = map_of(postgres, "t")

        def wait_until_logged(remainder: int) -> None:
            start = lsn(postgres)
            postgres.sql(f"DELETE FROM t WHERE i % 4 = {remainder}", "VACUUM t")
            wait_for(lambda: fork in logged_pages(postgres.datadir, start), "the map to be logged")

        wait_until_logged(0)
        clock.set(clock_offset=-(10**8))
        wait_until_logged(1)
