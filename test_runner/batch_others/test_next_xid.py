"""The next transaction id outlives crashes of everything: no id is ever given twice."""

from __future__ import annotations

import contextlib

from fixtures.postgres import Postgres
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder


def xid(pg: Postgres) -> int:
    """A new id."""
    ((value,),) = pg.safe_psql("SELECT txid_current()")
    assert isinstance(value, int)
    return value


def crash(env: ZenithEnv, pg: Postgres, what: str) -> None:
    """Kill the compute, or all there is, and start it again."""
    pg.kill()
    if what == "everything":
        env.pageserver.kill()
        for safekeeper in env.safekeepers:
            safekeeper.stop(immediate=True)
        for safekeeper in env.safekeepers:
            safekeeper.start()
        env.pageserver.start()
    pg.start()


def test_next_xid(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Rows written before a crash keep their ids to themselves, whatever was in memory only.

    An id that is given again makes tuples of an aborted transaction visible.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE EXTENSION zenith_test_utils; CREATE TABLE t (i int)")
    last = xid(pg)
    for i, what in enumerate(("compute", "everything")):
        # Ids without WAL of their own, ids of aborted transactions, ids by the thousand.
        for _ in range(3):
            assert xid(pg) > last
        with contextlib.closing(pg.connect(autocommit=False)) as connection:
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO t VALUES (-1)")
            connection.rollback()
        pg.safe_psql(f"SELECT test_consume_xids({50_000 * (i + 1)})")
        pg.safe_psql(f"INSERT INTO t VALUES ({i})")
        ((used,),) = pg.safe_psql("SELECT max(xmin::text::bigint) FROM t")
        crash(env, pg, what)
        last = xid(pg)
        assert last > used
        assert pg.safe_psql("SELECT i FROM t ORDER BY i") == [(n,) for n in range(i + 1)]
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")
    env.zenith_cli.create_branch("branch", "main", ancestor_start_lsn=lsn)
    with env.postgres.create_start("branch") as branch:
        assert xid(branch) >= last
        branch.safe_psql("INSERT INTO t VALUES (2)")
        assert branch.safe_psql("SELECT count(*) FROM t WHERE i >= 0") == [(3,)]


def test_hot_standby_follows_consumed_xids(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Millions of ids at once are no more than a standby has room for."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE EXTENSION zenith_test_utils; CREATE TABLE t (i int)")
    standby = env.postgres.create_start("main", node_name="replica", hot_standby=True)
    main.safe_psql("SELECT test_consume_xids(2000000)")
    main.safe_psql("INSERT INTO t VALUES (1)")
    wait_until(lambda: standby.safe_psql("SELECT i FROM t") == [(1,)], what="the row to show")
    assert standby.status() == "running"
