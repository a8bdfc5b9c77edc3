"""Truncated transaction status: branches from before have it, the newest state has not."""

from __future__ import annotations

import uuid
from pathlib import Path

from batch_pg_regress.slru_files import compare_slrus
from fixtures.page_verifier import verify_pages, wait_for_shutdown_checkpoint
from fixtures.postgres import Postgres
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnvBuilder

XIDS = 3_000_000  # 2.9 segments of clog, of 2^20 transactions each
SETTINGS = [
    "autovacuum = off",
    "vacuum_freeze_min_age = 0",
    "vacuum_freeze_table_age = 0",
    "vacuum_multixact_freeze_min_age = 0",
]


def segments(pg: Postgres) -> set[str]:
    return {path.name for path in Path(pg.pg_xact_dir_path()).iterdir()}


def freeze_all(pg: Postgres) -> None:
    """VACUUM FREEZE in every database: the oldest of them decides what is truncated."""
    pg.safe_psql("UPDATE pg_database SET datallowconn = true")
    for (name,) in pg.safe_psql("SELECT datname FROM pg_database"):
        pg.safe_psql("VACUUM FREEZE", dbname=name)


def test_clog_truncate(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Millions of ids make segments of clog, VACUUM FREEZE truncates them.

    A branch from before it must have the segments that its tuples' status is in, and the pageserver
    exactly those that the compute has.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=SETTINGS)
    pg.safe_psql("CREATE EXTENSION zenith_test_utils")
    pg.safe_psql("CREATE TABLE t (i int)")
    pg.safe_psql("INSERT INTO t VALUES (1)")
    # Not frozen, and not hinted: its status is in segment 0000.
    pg.safe_psql(f"SELECT test_consume_xids({XIDS})")
    pg.safe_psql("INSERT INTO t VALUES (2)")
    pg.safe_psql("CHECKPOINT")
    before = segments(pg)
    assert before == {"0000", "0001", "0002"}
    ((lsn, age),) = pg.safe_psql(
        "SELECT pg_current_wal_flush_lsn()::text, age(datfrozenxid) FROM pg_database"
        " WHERE datname = 'postgres'"
    )
    assert age > XIDS

    freeze_all(pg)
    pg.safe_psql("CHECKPOINT")
    wait_until(lambda: "0000" not in segments(pg), what="clog to be truncated")
    assert segments(pg) == {"0002"}
    pg.safe_psql("INSERT INTO t VALUES (3)")

    main = uuid.UUID(str(pg.spec()["timeline_id"]))
    timeline = env.zenith_cli.create_branch("before", "main", ancestor_start_lsn=lsn)
    with env.postgres.create_start("before", config_lines=SETTINGS) as branch:
        assert segments(branch) == before
        assert branch.safe_psql("SELECT i FROM t ORDER BY i") == [(1,), (2,)]
        ((top,),) = branch.safe_psql("SELECT txid_snapshot_xmax(txid_current_snapshot())")
        assert top > XIDS
        branch.safe_psql("INSERT INTO t VALUES (4)")
        verify_pages(branch)
        end = wait_for_shutdown_checkpoint(branch, timeline)
        assert compare_slrus(env, Path(branch.pg_data_dir_path()), timeline, end) > 0

    verify_pages(pg)
    end = wait_for_shutdown_checkpoint(pg, main)
    assert compare_slrus(env, Path(pg.pg_data_dir_path()), main, end) > 0
    pg.start()
    assert segments(pg) == {"0002"}
    assert pg.safe_psql("SELECT i FROM t ORDER BY i") == [(1,), (2,), (3,)]
