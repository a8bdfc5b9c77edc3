"""Prepared transactions: over restarts and kills, and on branches from before their end."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psycopg2
import pytest
from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder

LINES = ["max_prepared_transactions = 10", "lock_timeout = 500ms"]


def prepare(pg: Postgres, gid: str, *statements: str) -> None:
    """Prepare a transaction of some statements."""
    connection = pg.connect(autocommit=False)
    with contextlib.closing(connection), connection.cursor() as cursor:
        for statement in (*statements, f"PREPARE TRANSACTION '{gid}'"):
            cursor.execute(statement)


def prepared(pg: Postgres) -> list[str]:
    return [gid for (gid,) in pg.safe_psql("SELECT gid FROM pg_prepared_xacts ORDER BY gid")]


def twophase_files(pg: Postgres) -> list[str]:
    return sorted(path.name for path in Path(pg.pg_twophase_dir_path()).iterdir())


def current_lsn(pg: Postgres) -> str:
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")
    return str(lsn)


def test_twophase(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Each side of a branch ends the same prepared transaction its own way.

    One is prepared before a checkpoint, so it has a file, one after it; one has subtransactions,
    makes and drops tables; one ends before the branch.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=LINES)
    pg.safe_psql("CREATE TABLE t (i int PRIMARY KEY); CREATE TABLE victim AS SELECT 1 AS i")
    prepare(pg, "early", "INSERT INTO t VALUES (1)", "SAVEPOINT s", "INSERT INTO t VALUES (2)")
    prepare(pg, "ddl", "CREATE TABLE made AS SELECT 5 AS i", "DROP TABLE victim")
    prepare(pg, "ended", "INSERT INTO t VALUES (7)")
    pg.safe_psql("CHECKPOINT")
    assert len(twophase_files(pg)) == 3
    prepare(pg, "late", "INSERT INTO t VALUES (3)", "SAVEPOINT s", "INSERT INTO t VALUES (4)")
    in_doubt = current_lsn(pg)
    pg.safe_psql("ROLLBACK PREPARED 'ended'")
    assert prepared(pg) == ["ddl", "early", "late"]
    middle = current_lsn(pg)

    pg.safe_psql("COMMIT PREPARED 'early'")
    pg.safe_psql("ROLLBACK PREPARED 'late'")
    pg.safe_psql("COMMIT PREPARED 'ddl'")
    assert pg.safe_psql("SELECT i FROM t ORDER BY i") == [(1,), (2,)]

    env.zenith_cli.create_branch("middle", "main", ancestor_start_lsn=middle)
    with env.postgres.create_start("middle", config_lines=LINES) as branch:
        assert prepared(branch) == ["ddl", "early", "late"]
        assert len(twophase_files(branch)) == 3
        # In doubt: invisible, and their locks hold.
        assert branch.safe_psql("SELECT i FROM t") == []
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            branch.safe_psql("SELECT * FROM victim")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            branch.safe_psql("INSERT INTO t VALUES (3)")
        branch.safe_psql("ROLLBACK PREPARED 'early'")
        branch.safe_psql("COMMIT PREPARED 'late'")
        branch.safe_psql("ROLLBACK PREPARED 'ddl'")
        assert branch.safe_psql("SELECT i FROM t ORDER BY i") == [(3,), (4,)]
        assert branch.safe_psql("SELECT i FROM victim") == [(1,)]
        branch.kill()
        branch.start()
        assert prepared(branch) == []
        assert branch.safe_psql("SELECT i FROM t ORDER BY i") == [(3,), (4,)]
        verify_pages(branch)

    env.zenith_cli.create_branch("in_doubt", "main", ancestor_start_lsn=in_doubt)
    with env.postgres.create_start("in_doubt", config_lines=LINES) as branch:
        assert prepared(branch) == ["ddl", "early", "ended", "late"]
        branch.safe_psql("COMMIT PREPARED 'ended'")
        assert branch.safe_psql("SELECT i FROM t") == [(7,)]

    # What has ended stays so, and leaves no file.
    pg.stop()
    pg.start()
    assert prepared(pg) == twophase_files(pg) == []
    assert pg.safe_psql("SELECT i FROM t ORDER BY i") == [(1,), (2,)]
    assert pg.safe_psql("SELECT i FROM made") == [(5,)]
    with pytest.raises(psycopg2.errors.UndefinedTable):
        pg.safe_psql("SELECT * FROM victim")
    verify_pages(pg)


def test_in_doubt_over_restarts(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A prepared transaction waits for its end through restarts, with a checkpoint or without."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=LINES)
    pg.safe_psql("CREATE TABLE t (i int)")
    for i, end in enumerate((pg.stop, pg.kill, pg.kill)):
        prepare(pg, f"p{i}", f"INSERT INTO t VALUES ({i})")
        if i == 1:
            pg.safe_psql("CHECKPOINT")
        end()
        pg.start()
        assert prepared(pg) == [f"p{n}" for n in range(i + 1)]
        assert pg.safe_psql("SELECT * FROM t") == []
    pg.safe_psql("COMMIT PREPARED 'p0'")
    pg.safe_psql("ROLLBACK PREPARED 'p1'")
    pg.kill()
    pg.start()
    assert prepared(pg) == ["p2"]
    pg.safe_psql("COMMIT PREPARED 'p2'")
    assert pg.safe_psql("SELECT i FROM t ORDER BY i") == [(0,), (2,)]
    verify_pages(pg)
