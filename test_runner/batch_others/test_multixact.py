"""Multixacts: ids, members and who locks what, over restarts and on branches."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from batch_pg_regress.slru_files import compare_slrus
from fixtures.page_verifier import wait_for_shutdown_checkpoint
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder

LOCKERS = 3
ROWS = 2000


@contextlib.contextmanager
def lockers(pg: Postgres, count: int = LOCKERS) -> Iterator[list[Any]]:
    """Transactions that lock all rows together, which takes multixacts from the second on."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(contextlib.closing(pg.connect(autocommit=False)))
            for _ in range(count)
        ]
        for connection in connections:
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM (SELECT 1 FROM t FOR KEY SHARE) x")
        yield connections


def next_multi(pg: Postgres) -> tuple[int, int]:
    """The next multixact id, and the next offset of members, by the last checkpoint."""
    pg.safe_psql("CHECKPOINT")
    ((multi, offset),) = pg.safe_psql(
        "SELECT next_multixact_id::text::bigint, next_multi_offset::text::bigint"
        " FROM pg_control_checkpoint()"
    )
    return multi, offset


def members(pg: Postgres) -> list[tuple[Any, ...]]:
    """What is known of the multixact in the first row's xmax."""
    return pg.safe_psql(
        "SELECT xid::text, mode FROM pg_get_multixact_members((SELECT xmax FROM t WHERE i = 1))"
        " ORDER BY 1"
    )


def test_multixact(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Ids go on where they were, and members are readable, after a restart and on a branch."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql(f"CREATE TABLE t AS SELECT i, 0 AS n FROM generate_series(1, {ROWS}) i")
    before = next_multi(pg)
    with lockers(pg) as connections:
        # One of them updates what all have locked: its multixact has members of two kinds.
        with connections[0].cursor() as cursor:
            cursor.execute("UPDATE t SET n = 1 WHERE i = 1")
        for connection in connections:
            connection.commit()
    multi, offset = next_multi(pg)
    # Every row of a page that was locked last gets one of its own, as members differ by locker.
    assert multi > before[0] and offset >= before[1] + LOCKERS
    locked = "SELECT count(*), sum(n) FROM t"
    rows = pg.safe_psql(locked)
    with lockers(pg, 2) as connections:
        for connection in connections:
            connection.commit()
    seen = members(pg)
    assert [mode for _, mode in seen] == ["keysh", "keysh"]
    after = next_multi(pg)
    assert after > (multi, offset)
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")

    timeline = env.zenith_cli.create_branch("branch", "main", ancestor_start_lsn=lsn)
    with env.postgres.create_start("branch") as branch:
        assert next_multi(branch) == after
        assert members(branch) == seen
        assert branch.safe_psql(locked) == rows
        with lockers(branch) as connections:
            connections[0].rollback()
            connections[1].commit()
        branch.safe_psql("UPDATE t SET n = n + 1")
        assert next_multi(branch) > after
        branch.stop()
        end = wait_for_shutdown_checkpoint(branch, timeline)
        assert compare_slrus(env, Path(branch.pg_data_dir_path()), timeline, end) > 0

    pg.kill()
    pg.start()
    assert next_multi(pg) >= after
    assert members(pg) == seen
    assert pg.safe_psql(locked) == rows
    main = uuid.UUID(str(pg.spec()["timeline_id"]))
    pg.stop()
    end = wait_for_shutdown_checkpoint(pg, main)
    assert compare_slrus(env, Path(pg.pg_data_dir_path()), main, end) > 0


def test_prepared_lockers(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A multixact with members that are prepared transactions holds its lock after a restart."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    lines = ["max_prepared_transactions = 5", "lock_timeout = 500ms"]
    pg = env.postgres.create_start("main", config_lines=lines)
    pg.safe_psql("CREATE TABLE t AS SELECT 1 AS i, 0 AS n")
    with lockers(pg, 2) as connections:
        for name, connection in zip("ab", connections, strict=True):
            with connection.cursor() as cursor:
                cursor.execute(f"PREPARE TRANSACTION '{name}'")
    pg.stop()
    pg.start()
    for name in "ab":
        # Both are members: either one alone keeps the row.
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            pg.safe_psql("DELETE FROM t")
        pg.safe_psql(f"COMMIT PREPARED '{name}'")
    pg.safe_psql("DELETE FROM t")
    assert pg.safe_psql("SELECT count(*) FROM t") == [(0,)]
