"""Garbage collection: what can be read no more, what stays, and the space that comes back."""

from __future__ import annotations

import contextlib
import uuid

import psycopg2
import pytest
from fixtures.postgres import Postgres
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

# History of a megabyte, collected all the time; what is kept by time would be everything.
EAGER = "gc_horizon=1048576;gc_period='100 ms';pitr_interval='0 s';checkpoint_distance=1048576"
# Nothing happens by itself.
MANUAL = "gc_horizon=0;compaction_period='0 s';pitr_interval='0 s'"


def test_old_lsns_are_refused(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Below the cutoff there are no branches, base backups and nodes; at it and above there are.

    Past the cutoff some pages are gone and some are not: whatever were made there would be a
    mixture of two times.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = MANUAL
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    old = main.safe_psql(FLUSH_LSN)[0][0]
    main.safe_psql("INSERT INTO t SELECT generate_series(1001, 2000)")
    branch = Branch.of(main)
    branch.wait_for(main)
    branch.basebackup(old)
    env.zenith_cli.create_branch("in_time", "main", ancestor_start_lsn=old)

    result = branch.do_gc(0)
    assert result["layers_total"] > 0
    with pytest.raises(Exception, match="invalid branch start lsn"):
        env.zenith_cli.create_branch("too_late", "main", ancestor_start_lsn=old)
    with pytest.raises(psycopg2.Error, match="invalid basebackup lsn"):
        branch.basebackup(old)
    with pytest.raises(Exception, match="invalid basebackup lsn"):
        env.postgres.create_start("main", node_name="late_node", lsn=old)

    in_time = env.postgres.create_start("in_time")
    assert in_time.safe_psql("SELECT count(*), sum(i) FROM t") == [(1000, 500500)]
    env.zenith_cli.create_branch("newest", "main")
    newest = env.postgres.create_start("newest")
    assert newest.safe_psql("SELECT count(*), sum(i) FROM t") == [(2000, 2001000)]
    assert main.safe_psql("SELECT count(*) FROM t") == [(2000,)]
    # As little as the default horizon of the configuration: none.
    assert branch.do_gc(None)["layers_removed"] == 0
    with pytest.raises(psycopg2.Error, match="invalid number of bytes 'x'"):
        env.pageserver.safe_psql(f"do_gc {branch.tenant.hex} {branch.timeline.hex} x")


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
def test_running_computes_keep_their_state(
    zenith_env_builder: ZenithEnvBuilder, restart: bool
) -> None:
    """Nodes read blocks they never had at the LSN they started at, whatever was collected since.

    Their leases keep just that state: history before and after it goes.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = MANUAL
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int, filler text) WITH (fillfactor = 60)")
    main.safe_psql("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 40000) i")
    main.safe_psql("CREATE TABLE dropped AS SELECT generate_series(1, 200000) AS i")
    main.stop()
    main.start()  # has none of the blocks now
    past = main.safe_psql(FLUSH_LSN)[0][0]
    reader = env.postgres.create_start("main", node_name="reader", lsn=past)
    main.safe_psql("INSERT INTO t VALUES (0, '')")
    between = main.safe_psql(FLUSH_LSN)[0][0]
    # Through the whole table but for its first pages on the reader, and in the index of nobody.
    for step in range(3):
        main.safe_psql(f"UPDATE t SET filler = 'step {step}' WHERE i % 2 = 0")
        Branch.of(main).checkpoint()
    main.safe_psql("DROP TABLE dropped")
    branch = Branch.of(main)
    branch.wait_for(main)
    if restart:
        env.pageserver.stop()
        env.pageserver.start()
    for _ in range(2):
        branch.do_gc(0)
    with pytest.raises(psycopg2.Error, match="invalid basebackup lsn"):
        branch.basebackup(between)
    assert reader.safe_psql("SELECT count(*), sum(i) FROM dropped") == [(200000, 20000100000)]
    assert reader.safe_psql("SELECT count(*), min(filler), max(filler) FROM t") == [
        (40000, "x" * 100, "x" * 100)
    ]
    counts = "SELECT count(*), count(*) FILTER (WHERE filler = 'step 2') FROM t"
    assert main.safe_psql(counts) == [(40001, 20001)]
    reader.stop()
    main.stop()
    main.start()
    assert main.safe_psql(counts) == [(40001, 20001)]


def test_collected_by_itself_by_tenant(zenith_env_builder: ZenithEnvBuilder) -> None:
    """History goes as each tenant's settings say, from one moment to the next.

    How far back a tenant can look is what its owner has chosen and pays for: neither less, nor
    more for ever.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = EAGER
    env = zenith_env_builder.init_start()
    patient = uuid.uuid4()
    env.zenith_cli.raw_cli(
        ["tenant", "create", "--tenant-id", patient.hex, "-c", "pitr_interval:1 h"]
    )
    env.zenith_cli.create_timeline("main", patient)
    nodes = [env.postgres.create_start("main", tenant_id=t) for t in (env.initial_tenant, patient)]
    marks = []
    for node in nodes:
        node.safe_psql("CREATE TABLE t (i int)")
        marks.append(node.safe_psql(FLUSH_LSN)[0][0])
        node.safe_psql("INSERT INTO t SELECT generate_series(1, 50000)")

    def is_gone(number: int) -> bool:
        try:
            Branch.of(nodes[number]).basebackup(marks[number])
        except psycopg2.Error as e:
            assert "invalid basebackup lsn" in str(e)
            return True
        return False

    wait_until(lambda: is_gone(0), what="the history of the impatient tenant to go")
    assert not is_gone(1)
    # An idle timeline's history grows old all the same; the setting counts at once.
    config = ["tenant", "config", patient.hex, "-c", "pitr_interval:1 ms"]
    assert "pitr_interval: 1ms (of this tenant)" in env.zenith_cli.raw_cli(config).stdout
    wait_until(lambda: is_gone(1), what="the history of the patient tenant to go")
    for node in nodes:
        assert node.safe_psql("SELECT count(*) FROM t") == [(50000,)]


LIVE = "CREATE TABLE live AS SELECT i, md5(i::text) AS t FROM generate_series(1, 100000) i"
GARBAGE = (
    "CREATE TABLE garbage AS SELECT i, md5(i::text) || md5((i * 7)::text) AS t, random() AS r"
    " FROM generate_series(1, 500000) i"
)


def fresh_size(env: ZenithEnv, *statements: str) -> int:
    """Bytes on disk of the live data, loaded into a cluster of its own and compacted."""
    tenant = uuid.uuid4()
    env.zenith_cli.create_tenant(tenant)
    env.zenith_cli.create_timeline("main", tenant)
    pg = env.postgres.create_start("main", tenant_id=tenant)
    for statement in statements:
        pg.safe_psql(statement)
    settled_size(pg)
    return stopped_size(pg)


def settled_size(pg: Postgres) -> int:
    """Bytes on disk without history, but for the state at which the node started."""
    pg.safe_psql("CHECKPOINT")
    branch = Branch.of(pg)
    branch.wait_for(pg)
    branch.do_gc(0)
    return branch.size()


def stopped_size(pg: Postgres) -> int:
    """Bytes on disk after the end of the node."""
    pg.stop()
    branch = Branch.of(pg)
    branch.do_gc(0)
    return branch.size()


@pytest.mark.parametrize("dropped", ["table", "database", "truncated"])
def test_space_comes_back(zenith_env_builder: ZenithEnvBuilder, dropped: str) -> None:
    """After 50 MB were dropped the files are as small as if they had never been.

    Who drops data to free a disk must see it freed: at once, and without stopping the node. What
    it keeps is the state that it started at. Deltas are so small that the garbage fills some and
    shares others with live data.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = MANUAL + ";checkpoint_distance=8388608"
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    branch = Branch.of(pg)
    at_start = branch.size()
    pg.safe_psql(LIVE)
    database = "postgres"
    if dropped == "database":
        pg.safe_psql("CREATE DATABASE doomed")
        database = "doomed"
    pg.safe_psql(GARBAGE, dbname=database)
    size = pg.safe_psql("SELECT pg_table_size('garbage')", dbname=database)[0][0]
    assert size > 50 << 20
    branch.wait_for(pg)
    branch.checkpoint()
    full = branch.size()
    pg.safe_psql(
        {
            "table": "DROP TABLE garbage",
            "database": "DROP DATABASE doomed",
            "truncated": "TRUNCATE garbage",
        }[dropped]
    )
    running = settled_size(pg)
    left = stopped_size(pg)
    pg.start()
    assert pg.safe_psql("SELECT count(*), max(t) FROM live") == [(100000, max_md5(pg))]
    live = [LIVE]
    if dropped == "truncated":
        live.append(GARBAGE.replace("500000", "0"))
    expected = fresh_size(env, *live)
    assert full > 2 * expected
    sizes = f"start {at_start}, full {full}, running {running}, left {left}, fresh {expected}"
    assert left < 1.2 * expected + (1 << 20), sizes
    assert running < at_start + 1.2 * expected + (1 << 20), sizes


def max_md5(pg: Postgres) -> str:
    """What the live table's greatest value must be."""
    found: str = pg.safe_psql("SELECT max(md5(i::text)) FROM generate_series(1, 100000) i")[0][0]
    return found


def test_dropped_relation_can_come_back(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What is cut off and written anew is what was written last, on disk as in memory.

    Blocks of a table that shrank and grew again have two lives: garbage of the first must not
    come back as rows of the second.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = MANUAL
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum=off"])
    branch = Branch.of(pg)
    fill = "INSERT INTO t SELECT i, repeat('%s', 200) FROM generate_series(%d, %d) i"
    pg.safe_psql("CREATE TABLE t (i int, filler text)")
    pg.safe_psql(fill % ("a", 1, 20000))
    branch.wait_for(pg)
    branch.checkpoint()
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("DELETE FROM t WHERE i > 2000")
        # Cuts the end off; without FREEZE, not where a page is just being written out.
        cur.execute("VACUUM FREEZE t")
        cur.execute("SELECT pg_relation_size('t') / 8192")
        blocks = cur.fetchone()[0]
    assert blocks < 100
    cut = pg.safe_psql(FLUSH_LSN)[0][0]
    pg.safe_psql(fill % ("b", 30001, 31000))
    grown = pg.safe_psql(FLUSH_LSN)[0][0]
    branch.wait_for(pg)
    expected = {cut: (2000, 0), grown: (2000, 1000)}
    count = "SELECT count(*) FILTER (WHERE filler LIKE 'a%'), "
    count += "count(*) FILTER (WHERE filler LIKE 'b%') FROM t"
    for step in ("in memory", "flushed", "compacted"):
        if step == "flushed":
            branch.checkpoint()
        elif step == "compacted":
            branch.compact()
        for number, (lsn, rows) in enumerate(expected.items()):
            node = f"{step.replace(' ', '_')}{number}"
            reader = env.postgres.create_start("main", node_name=node, lsn=lsn)
            assert reader.safe_psql(count) == [rows]
            reader.stop()
    branch.do_gc(0)
    pg.stop()
    pg.start()
    assert pg.safe_psql(count) == [expected[grown]]
