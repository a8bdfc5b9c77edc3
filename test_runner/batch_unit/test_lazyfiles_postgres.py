"""Lazily opened relation files under a stock server."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from batch_unit.lazyfiles_support import (
    BLOCK_SIZE,
    SEGMENT_BLOCKS,
    Fork,
    PageServer,
    Postgres,
    fork_path,
    initdb,
    lazy_environment,
    make_lazy_copy,
    server_directory,
    wait_for,
)

from compute_tools.lazy_map import LazyStatistics, read_statistics
from pgxn.build import build_module
from postgres_ffi.distrib import PgDistrib, find_distrib
from zenith_utils.os_user import give

SCHEMA = (
    "CREATE EXTENSION amcheck",
    "CREATE TABLE kinds (id serial PRIMARY KEY, n int, p point, words int[], t text, r int4range)",
    "INSERT INTO kinds (n, p, words, t, r) SELECT g % 1000, point(g % 97, g % 89),"
    " array[g % 7, g % 11, g], md5(g::text), int4range(g, g + 10) FROM generate_series(1, 5000) g",
    "CREATE INDEX ON kinds USING hash (n)",
    "CREATE INDEX ON kinds USING gin (words)",
    "CREATE INDEX ON kinds USING gist (p)",
    "CREATE INDEX ON kinds USING spgist (t)",
    "CREATE INDEX ON kinds USING brin (id) WITH (pages_per_range = 4)",
    "CREATE TABLE long AS SELECT g, (SELECT string_agg(md5((g * i)::text), '')"
    " FROM generate_series(1, 400) i) t FROM generate_series(1, 30) g",
    "CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 1000) i",
    "CREATE TABLE shrinks AS SELECT g, repeat('x', 100) v FROM generate_series(1, 20000) g",
    "VACUUM ANALYZE",
)
SCAN = "SELECT count(*), sum(abalance) FROM pgbench_accounts"


@dataclass
class Cluster:
    """A stopped cluster, what it held, and the modules."""

    datadir: Path
    distrib: PgDistrib
    module: Path
    dump: str
    segments: Fork


@dataclass
class Node:
    """A running server on lazily opened files."""

    postgres: Postgres
    server: PageServer
    map_path: Path

    @property
    def statistics(self) -> LazyStatistics:
        """Counters of the library."""
        return read_statistics(self.map_path)


def dump(postgres: Postgres, database: str = "postgres") -> str:
    """The contents of a database, without pg_dump's random restrict key."""
    lines = postgres.run("pg_dump", database).splitlines()
    return "\n".join(line for line in lines if "restrict " not in line)


def relation(postgres: Postgres, table: str, database_name: str = "postgres") -> Fork:
    database, relnode = postgres.sql(
        f"SELECT oid::int8, pg_relation_filenode('{table}')::int8 FROM pg_database"
        " WHERE datname = current_database()",
        database=database_name,
    )[0]
    assert isinstance(database, int) and isinstance(relnode, int)
    return Fork(1663, database, relnode, 0)


def add_segment(datadir: Path, fork: Fork) -> None:
    """Make a one-page table larger than 1 GB: a segment of zeros, then its page again."""
    page = fork_path(datadir, fork).read_bytes()[:BLOCK_SIZE].replace(b"first ", b"second")
    with fork_path(datadir, fork).open("r+b") as f:
        f.truncate(SEGMENT_BLOCKS * BLOCK_SIZE)
    second = fork_path(datadir, fork, 1)
    second.write_bytes(bytes(BLOCK_SIZE) + page)
    give(second)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    distrib = find_distrib()
    with server_directory() as root:
        datadir = root / "data"
        initdb(distrib, datadir)
        with Postgres(distrib, datadir) as postgres:
            postgres.run("pgbench", "-i", "-s", "3", "-q", "postgres")
            postgres.sql(*SCHEMA)
            contents = dump(postgres)
            # In a database of its own: checking and dumping 1 GB takes its time.
            postgres.sql("CREATE DATABASE big")
            postgres.sql("CREATE TABLE segments AS SELECT 'first segment' v", database="big")
            segments = relation(postgres, "segments", "big")
            postgres.stop()
        add_segment(datadir, segments)
        yield Cluster(datadir, distrib, build_module(distrib, "lazyfiles"), contents, segments)


@pytest.fixture
def node(cluster: Cluster) -> Iterator[Node]:
    with server_directory() as root, PageServer(cluster.datadir) as server:
        map_path = root / "map"
        make_lazy_copy(cluster.datadir, root / "node", map_path)
        environment = lazy_environment(cluster.module, map_path, server.port)
        settings = {"shared_preload_libraries": str(build_module(cluster.distrib, "zenith"))}
        with Postgres(cluster.distrib, root / "node", settings, environment) as postgres:
            yield Node(postgres, server, map_path)


@contextlib.contextmanager
def running(postgres: Postgres, query: str) -> Iterator[tuple[int, Callable[[], object]]]:
    """A query in a thread of its own: its backend's pid, and what waits for its result."""
    result: list[object] = []
    with contextlib.closing(postgres.connect()) as session:

        def run() -> None:
            try:
                with session.cursor() as cursor:
                    cursor.execute("SET max_parallel_workers_per_gather = 0")
                    cursor.execute(query)
                    result.extend(cursor.fetchone() or ())
            except psycopg2.Error as e:
                result.append(e)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def finish() -> object:
            thread.join(30)
            assert result, "the query does not end"
            return result[0]

        yield session.get_backend_pid(), finish


def check_indexes(postgres: Postgres, database: str = "postgres") -> None:
    postgres.run("pg_amcheck", "--heapallindexed", "--parent-check", "-d", database)


def test_everything_is_there(node: Node) -> None:
    postgres = node.postgres
    postgres.run("pgbench", "-n", "-c", "4", "-t", "50", "postgres")
    balance = "SELECT sum(abalance) FROM pgbench_accounts"
    assert postgres.value(balance) == postgres.value("SELECT sum(delta) FROM pgbench_history")
    postgres.sql("TRUNCATE pgbench_history")
    check_indexes(postgres)

    statistics = node.statistics
    assert 0 < statistics.blocks_present < statistics.blocks
    assert statistics.errors == statistics.reconnects == 0


def test_dump_after_truncation_and_rewriting(node: Node, cluster: Cluster) -> None:
    postgres = node.postgres
    postgres.sql("CREATE DATABASE by_file TEMPLATE postgres STRATEGY file_copy")
    postgres.sql("CREATE DATABASE by_wal TEMPLATE template1 STRATEGY wal_log")
    for database in ("postgres", "by_file"):
        assert dump(postgres, database) == cluster.dump
    check_indexes(postgres, "by_file")
    postgres.sql("SELECT count(*) FROM pg_class", database="by_wal")

    before = postgres.value("SELECT count(*) FROM shrinks WHERE g <= 5000")
    postgres.sql("DELETE FROM shrinks WHERE g > 5000", "VACUUM shrinks")
    postgres.sql("INSERT INTO shrinks SELECT g, 'new' FROM generate_series(30000, 50000) g")
    assert postgres.value("SELECT count(*) FROM shrinks WHERE g <= 5000") == before
    assert postgres.value("SELECT count(*) FROM shrinks WHERE v = 'new'") == 20001
    postgres.sql("DROP TABLE long", "TRUNCATE shrinks", "VACUUM FULL pg_class", "CHECKPOINT")
    postgres.sql("DROP TABLE segments", "CHECKPOINT", database="big")
    postgres.sql("VACUUM FULL kinds", "REINDEX TABLE pgbench_accounts")
    check_indexes(postgres)
    assert postgres.stop() == 0


def test_second_segment(node: Node, cluster: Cluster) -> None:
    rows = node.postgres.sql(
        "SELECT ctid::text, v FROM segments WHERE ctid = '(131073,1)' OR ctid = '(0,1)' ORDER BY v",
        database="big",
    )
    assert rows == [("(0,1)", "first segment"), ("(131073,1)", "secondsegment")]
    asked = {block for fork, block, _ in node.server.requests if fork == cluster.segments}
    assert asked == {0, SEGMENT_BLOCKS + 1}


def test_page_server_is_away_for_a_while(node: Node) -> None:
    node.postgres.value("SELECT count(*) FROM pgbench_branches")
    node.server.faults.hold_from = 1000
    with running(node.postgres, SCAN) as (_, finish):
        wait_for(lambda: any(b >= 1000 for _, b, _ in node.server.requests), "the scan to wait")
        node.server.stop()
        wait_for(lambda: "trying on" in node.postgres.log.read_text(), "a message in the log")
        node.server.start()
        assert finish() == 300000
    assert node.statistics.reconnects > 0
    assert "reading from pageserver" in node.postgres.log.read_text()


def test_parallel_scan(node: Node) -> None:
    accounts = relation(node.postgres, "pgbench_accounts")
    parallel = (
        "SET min_parallel_table_scan_size = 0",
        "SET parallel_setup_cost = 0",
        "SET parallel_tuple_cost = 0",
        "SET max_parallel_workers_per_gather = 3",
        "ALTER TABLE pgbench_accounts SET (parallel_workers = 3)",
    )
    plan = node.postgres.sql(*parallel, f"EXPLAIN {SCAN}")
    assert any("Workers Planned: 3" in str(line) for line in plan)
    assert node.postgres.sql(*parallel, SCAN) == [(300000, 0)]
    size = node.postgres.value("SELECT pg_relation_size('pgbench_accounts')")
    blocks = {
        b
        for fork, block, n in node.server.requests
        if fork == accounts
        for b in range(block, block + n)
    }
    assert isinstance(size, int)
    assert blocks == set(range(size // BLOCK_SIZE))
    assert node.statistics.errors == 0


def test_connection_cut_in_the_middle_of_a_reply(node: Node) -> None:
    node.server.faults.drop_after = 12
    assert node.postgres.value(SCAN) == 300000
    assert node.server.faults.drop_after is None


@pytest.mark.parametrize(
    ("interrupt", "error", "message"),
    [
        ("pg_cancel_backend", psycopg2.errors.QueryCanceled, "waits for the pageserver"),
        ("pg_terminate_backend", psycopg2.OperationalError, "administrator command"),
        ("statement_timeout", psycopg2.errors.QueryCanceled, "waits for the pageserver"),
    ],
)
def test_interrupt_while_the_page_server_is_away(
    node: Node, interrupt: str, error: type[Exception], message: str
) -> None:
    # The other session needs what it reads to be local.
    node.postgres.sql(SCAN + " WHERE aid = 1", "SELECT pg_cancel_backend(0)")
    node.postgres.sql("SELECT pg_terminate_backend(0)")
    node.server.stop()
    if interrupt == "statement_timeout":
        with pytest.raises(error, match=message):
            node.postgres.sql("SET statement_timeout = 2000", SCAN)
    else:
        with running(node.postgres, SCAN) as (pid, finish):
            wait_for(lambda: "trying on" in node.postgres.log.read_text(), "the query to wait")
            node.postgres.sql(f"SELECT {interrupt}({pid})")
            result = finish()
        assert isinstance(result, error)
        assert message in str(result)
    node.server.start()
    assert node.postgres.value(SCAN) == 300000


def test_error_reply_fails_the_query(node: Node) -> None:
    accounts = relation(node.postgres, "pgbench_accounts")
    node.server.faults.refuse = lambda fork, block: (
        "layer file is damaged" if fork == accounts and block == 100 else None
    )
    with pytest.raises(psycopg2.Error, match=r"could not read block 100 .*Input/output error"):
        node.postgres.value(SCAN)
    assert "layer file is damaged" in node.postgres.log.read_text()
    neighbours = "SELECT count(*) FROM pgbench_accounts WHERE ctid IN ('(99,1)', '(101,1)')"
    assert node.postgres.value(neighbours) == 2
    node.server.faults.refuse = lambda fork, block: None
    assert node.postgres.value(SCAN) == 300000


def test_killed_backend_takes_the_server_down(node: Node) -> None:
    node.server.faults.hold_from = 1000
    process = node.postgres.process
    assert process is not None
    with running(node.postgres, SCAN) as (pid, finish):
        wait_for(lambda: any(b >= 1000 for _, b, _ in node.server.requests), "the scan to wait")
        os.kill(pid, signal.SIGKILL)
        assert isinstance(finish(), psycopg2.OperationalError)
    wait_for(lambda: process.poll() is not None, "the server to end")


def test_stdio_and_copying_programs(node: Node, cluster: Cluster) -> None:
    """pg_read_binary_file() reads by stdio; other programs get no blocks, and no zeros either."""
    fork = relation(node.postgres, "kinds")
    path = fork_path(Path(), fork)
    length = node.postgres.value(
        f"SELECT sum(get_byte(d, i)) FROM (SELECT pg_read_binary_file('{path}', 0, 8192) d) f,"
        " generate_series(0, 8191) i"
    )
    assert length == sum(fork_path(cluster.datadir, fork).read_bytes()[:8192])
    with pytest.raises(psycopg2.Error, match="child process exited"):
        node.postgres.sql(
            "CREATE TABLE lines (l text)",
            f"COPY lines FROM PROGRAM 'cat {fork_path(Path(), relation(node.postgres, 'long'))}'",
        )
    assert "only the server can read" in node.postgres.log.read_text()


def test_token_is_sent_when_asked_for(cluster: Cluster) -> None:
    with server_directory() as root, PageServer(cluster.datadir) as server:
        server.faults.password = "secret"
        make_lazy_copy(cluster.datadir, root / "node", root / "map")
        environment = {
            **lazy_environment(cluster.module, root / "map", server.port),
            "ZENITH_AUTH_TOKEN": "secret",
        }
        with Postgres(cluster.distrib, root / "node", environment=environment) as postgres:
            assert postgres.value("SELECT count(*) FROM pgbench_branches") == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "checksum of the fork table does not match"),
        ("cut", "wrong size"),
        ("remove", "cannot open map file"),
        ("variable", "must be set together"),
    ],
)
def test_unusable_map_is_refused(cluster: Cluster, damage: str, message: str) -> None:
    with server_directory() as root:
        map_path = root / "map"
        make_lazy_copy(cluster.datadir, root / "node", map_path)
        environment = lazy_environment(cluster.module, map_path, 1)
        contents = bytearray(map_path.read_bytes())
        if damage == "flip":
            contents[4096 + 33] ^= 1
            map_path.write_bytes(contents)
        elif damage == "cut":
            map_path.write_bytes(contents[:-1])
        elif damage == "remove":
            map_path.unlink()
        else:
            del environment["ZENITH_LAZYFILES_TENANT"]
        with pytest.raises(RuntimeError, match=message):
            Postgres(cluster.distrib, root / "node", environment=environment).start()


def test_hot_standby_reads_lazily(cluster: Cluster) -> None:
    with server_directory() as root, PageServer(cluster.datadir) as server:
        make_lazy_copy(cluster.datadir, root / "node", root / "map")
        (root / "node/standby.signal").touch()
        environment = lazy_environment(cluster.module, root / "map", server.port)
        with Postgres(cluster.distrib, root / "node", environment=environment) as postgres:
            assert postgres.value(SCAN) == 300000
            with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                postgres.sql("DELETE FROM pgbench_accounts")
