"""The zenith_test_utils library: its functions on a server without a pageserver."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from batch_unit.lazyfiles_support import Postgres, library_node, stopped_cluster

from pgxn.build import SOURCE_ROOT, build_module
from postgres_ffi.distrib import find_distrib

SCRIPT = SOURCE_ROOT / "zenith_test_utils" / "zenith_test_utils--1.0.sql"
CLOG_XACTS_PER_PAGE = 32768
PAGE = "get_raw_page_at_lsn"


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    with stopped_cluster() as datadir:
        yield datadir


@pytest.fixture
def node(template: Path) -> Iterator[Postgres]:
    """A running server with the functions, which CREATE EXTENSION would make on a compute."""
    with library_node(template) as node:
        library = build_module(find_distrib(), "zenith_test_utils")
        lines = SCRIPT.read_text().splitlines()
        script = "\n".join(line for line in lines if not line.startswith("\\"))
        node.start()
        node.sql(script.replace("MODULE_PATHNAME", str(library)))
        yield node


def next_xid(node: Postgres) -> int:
    value = node.value("SELECT txid_snapshot_xmax(txid_current_snapshot())")
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize("count", [0, 1, 2, 5000, 100_000])
def test_consumes_as_many_as_asked_for(node: Postgres, count: int) -> None:
    before = node.value("SELECT txid_current()")
    assert isinstance(before, int)
    node.sql(f"SELECT test_consume_xids({count})")
    assert node.value("SELECT txid_current()") == before + count + 1


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_consumes_in_a_transaction_that_has_an_xid(node: Postgres, end: str) -> None:
    node.sql("CREATE TABLE t (i int)")
    before = node.value("SELECT txid_current()")
    assert isinstance(before, int)
    with contextlib.closing(node.connect()) as session, session.cursor() as cursor:
        cursor.execute("BEGIN; INSERT INTO t VALUES (1); SELECT test_consume_xids(70000)")
        cursor.execute("INSERT INTO t VALUES (2); SELECT txid_current()")
        assert cursor.fetchone() == (before + 1,)
        cursor.execute(end)
    assert node.value("SELECT txid_current()") == before + 70002
    assert node.value("SELECT count(*) FROM t") == (2 if end == "COMMIT" else 0)


def test_pages_of_consumed_ids_exist(node: Postgres) -> None:
    """Each of them can be used: transactions whose status is on pages that were passed over."""
    first = next_xid(node)
    node.sql(f"SELECT test_consume_xids({3 * CLOG_XACTS_PER_PAGE})")
    assert next_xid(node) > first + 3 * CLOG_XACTS_PER_PAGE - 2
    last = first + 3 * CLOG_XACTS_PER_PAGE - 2
    statuses = node.sql(
        f"SELECT DISTINCT txid_status(i) FROM generate_series({first}, {last}, 97) i"
    )
    assert statuses == [("aborted",)]


def test_a_crash_keeps_the_next_id(node: Postgres) -> None:
    """Recovery learns of consumed ids, also when nothing follows and the transaction aborts."""
    node.settings = {**node.settings, "synchronous_commit": "on"}
    node.sql("CREATE TABLE t (i int)", "CHECKPOINT")
    before = next_xid(node)
    with contextlib.closing(node.connect()) as session, session.cursor() as cursor:
        cursor.execute("BEGIN; SELECT test_consume_xids(100000); ROLLBACK")
        cursor.execute("CREATE TABLE flushed (i int)")
    node.stop(signal.SIGQUIT)
    node.start()
    assert next_xid(node) >= before + 100_000
    node.sql("INSERT INTO t VALUES (1)")
    assert node.value("SELECT count(*) FROM t") == 1

    node.sql("CHECKPOINT", f"SELECT test_consume_xids({40 * CLOG_XACTS_PER_PAGE})")
    node.stop(signal.SIGQUIT)
    node.start()
    assert next_xid(node) >= before + 100_000 + 40 * CLOG_XACTS_PER_PAGE


def test_refused_counts(node: Postgres) -> None:
    before = next_xid(node)
    with pytest.raises(psycopg2.errors.InvalidParameterValue, match="cannot consume -1 "):
        node.sql("SELECT test_consume_xids(-1)")
    # Up to the limit, and no id further.
    limit = "cannot consume 2147483646 transaction IDs from .* protects from wraparound"
    with pytest.raises(psycopg2.errors.ProgramLimitExceeded, match=limit):
        node.sql("SELECT test_consume_xids(2147483647)")
    assert next_xid(node) == before


def test_standby_is_refused(node: Postgres) -> None:
    node.stop()
    (node.datadir / "standby.signal").touch()
    node.start()
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="on a read-only node"):
        node.sql("SELECT test_consume_xids(5)")


def test_buffers_are_written_and_dropped(node: Postgres) -> None:
    """What is in the buffers is in the files then, and only pinned buffers are left."""
    cached = "SELECT count(*) FROM pg_buffercache WHERE relfilenode = pg_relation_filenode('t')"
    node.sql(
        "CREATE EXTENSION pg_buffercache",
        "CREATE TABLE t AS SELECT i, 0 AS n FROM generate_series(1, 1000) i",
    )
    node.sql("UPDATE t SET n = 1")
    assert node.value(f"{cached} AND isdirty") != 0
    node.sql("SELECT clear_buffer_cache()")
    assert node.value(cached) == 0
    assert node.value("SELECT sum(n) FROM t") == 1000

    # Not a page that somebody uses, the caller included; nor anything that is changed meanwhile.
    with contextlib.closing(node.connect()) as session, session.cursor() as cursor:
        cursor.execute("BEGIN; DECLARE c CURSOR FOR SELECT i FROM t; FETCH 5 FROM c")
        assert node.sql(f"SELECT clear_buffer_cache(); {cached}") == [(1,)]
        cursor.execute("SELECT clear_buffer_cache(); FETCH ALL FROM c")
        assert len(cursor.fetchall()) == 995
    assert node.value("SELECT count(clear_buffer_cache()) FROM t WHERE i < 10") == 9
    node.sql("UPDATE t SET n = 2", "SELECT clear_buffer_cache()")
    relation = node.value("SELECT pg_relation_filepath('t')")
    node.stop(signal.SIGQUIT)
    assert (node.datadir / str(relation)).stat().st_size > 0
    node.start()
    assert node.value("SELECT sum(n) FROM t") == 2000


def test_buffers_are_dropped_beside_writers(node: Postgres) -> None:
    """No change is lost when buffers are dropped as fast as they are filled."""
    node.sql("CREATE TABLE t AS SELECT i, 0 AS n FROM generate_series(1, 2000) i")
    node.sql("CREATE INDEX ON t (i)")
    script = node.datadir.with_name("update.sql")
    script.write_text("\\set i random(1, 2000)\nUPDATE t SET n = n + 1 WHERE i = :i;\n")
    clear = node.datadir.with_name("clear.sql")
    clear.write_text("SELECT clear_buffer_cache();\n")
    options = ["-n", "-c", "4", "-t", "300", "-f", f"{script}@3", "-f", f"{clear}@1"]
    out = node.run("pgbench", *options, "postgres")
    updates = out.partition(str(script))[2].partition(" transactions ")[0].rpartition("- ")[2]
    assert node.value("SELECT sum(n) FROM t") == int(updates)


def test_raw_page_arguments(node: Postgres) -> None:
    node.sql("CREATE TABLE t (i int)", "CREATE VIEW v AS SELECT 1")
    invalid = psycopg2.errors.InvalidParameterValue
    for arguments, error, message in (
        ("'t', 'main', -1, NULL", invalid, "invalid block number -1"),
        ("'t', 'main', 4294967295, NULL", invalid, "invalid block number 4294967295"),
        ("'t', 'no', 0, NULL", invalid, "invalid fork name"),
        ("'t', 'main', 0, '0/0'", invalid, "invalid LSN 0/0"),
        ("'t', NULL, 0, '0/1'", psycopg2.errors.NullValueNotAllowed, "only the LSN"),
        ("'v', 'main', 0, NULL", psycopg2.errors.WrongObjectType, '"v" has no pages'),
        ("'none', 'main', 0, NULL", psycopg2.errors.UndefinedTable, '"none" does not exist'),
        ("1663, 5, 1259, 4, 0, NULL", invalid, "invalid fork number 4"),
        ("1663, 5, 1259, 0, -1, NULL", invalid, "invalid block number -1"),
        ("1663, NULL, 1259, 0, 0, NULL", psycopg2.errors.NullValueNotAllowed, "only the LSN"),
        (
            "'t', 'main', 0, NULL",
            psycopg2.errors.ObjectNotInPrerequisiteState,
            "this server has no pageserver",
        ),
    ):
        with pytest.raises(error, match=message):
            node.sql(f"SELECT {PAGE}({arguments})")
    with pytest.raises(psycopg2.errors.FeatureNotSupported, match="temporary"):
        node.sql("CREATE TEMP TABLE p (i int)", f"SELECT {PAGE}('p', 'main', 0, NULL)")


def test_privileges(node: Postgres) -> None:
    """Users have none of it; a right to use pages of the pageserver cannot be given at all."""
    node.sql("CREATE ROLE u LOGIN", "CREATE TABLE t (i int)")
    calls = {
        "test_consume_xids(int)": "test_consume_xids(1)",
        "clear_buffer_cache()": "clear_buffer_cache()",
        f"{PAGE}(text, text, int8, pg_lsn)": f"{PAGE}('t', 'main', 0, NULL)",
        f"{PAGE}(oid, oid, oid, int8, int8, pg_lsn)": f"{PAGE}(1663, 5, 1259, 0, 0, NULL)",
    }
    for function, call in calls.items():
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="permission denied"):
            node.sql("SET ROLE u", f"SELECT {call}")
        node.sql(f"GRANT EXECUTE ON FUNCTION {function} TO u")
        if function.startswith(PAGE):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="must be superuser"):
                node.sql("SET ROLE u", f"SELECT {call}")
        else:
            node.sql("SET ROLE u", f"SELECT {call}")
