"""CREATE and DROP DATABASE by both strategies: what branches from before and after them see."""

from __future__ import annotations

from pathlib import Path

import psycopg2
import pytest
from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder


def current_lsn(pg: Postgres) -> str:
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")
    return str(lsn)


def database_dir(pg: Postgres, oid: int) -> Path:
    return Path(pg.pg_data_dir_path()) / "base" / str(oid)


@pytest.mark.parametrize("strategy", ["wal_log", "file_copy"])
def test_createdb(zenith_env_builder: ZenithEnvBuilder, strategy: str) -> None:
    """A branch from before has no such database, one from after has it whole and as large."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE DATABASE template")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 3000) AS i", dbname="template")
    pg.safe_psql("CREATE UNLOGGED TABLE u AS SELECT 1 AS i", dbname="template")
    before = current_lsn(pg)
    pg.safe_psql(f"CREATE DATABASE copy TEMPLATE template STRATEGY {strategy}")
    after = current_lsn(pg)
    pg.safe_psql("UPDATE t SET i = i + 1", dbname="copy")
    pg.safe_psql("VACUUM", dbname="copy")
    ((size,),) = pg.safe_psql("SELECT pg_database_size('template')")
    rows = "SELECT count(*), sum(i) FROM t"

    env.zenith_cli.create_branch("before", "main", ancestor_start_lsn=before)
    with env.postgres.create_start("before") as branch:
        with pytest.raises(psycopg2.OperationalError, match='"copy" does not exist'):
            branch.connect(dbname="copy")
        assert branch.safe_psql(rows, dbname="template") == [(3000, 4501500)]
        branch.safe_psql("CREATE DATABASE copy")

    env.zenith_cli.create_branch("after", "main", ancestor_start_lsn=after)
    with env.postgres.create_start("after") as branch:
        assert branch.safe_psql(rows, dbname="copy") == [(3000, 4501500)]
        assert branch.safe_psql("SELECT count(*) FROM u", dbname="copy") == [(0,)]
        # Files of the compute have their sizes before any page is read. The unlogged table's
        # pages are gone.
        ((copied,),) = branch.safe_psql("SELECT pg_database_size('copy')")
        assert abs(copied - size) < 128 * 1024

    verify_pages(pg)
    pg.start()
    assert pg.safe_psql(rows, dbname="copy") == [(3000, 4504500)]


def test_dropdb(zenith_env_builder: ZenithEnvBuilder) -> None:
    """After DROP DATABASE its files are gone, for good; a branch from before has it."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE DATABASE doomed")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i", dbname="doomed")
    ((oid,),) = pg.safe_psql("SELECT oid::int FROM pg_database WHERE datname = 'doomed'")
    before = current_lsn(pg)
    pg.safe_psql("DROP DATABASE doomed")
    assert not database_dir(pg, oid).exists()

    env.zenith_cli.create_branch("before", "main", ancestor_start_lsn=before)
    with env.postgres.create_start("before") as branch:
        assert database_dir(branch, oid).is_dir()
        assert branch.safe_psql("SELECT count(*) FROM t", dbname="doomed") == [(1000,)]
        branch.safe_psql("DROP DATABASE doomed")
        branch.kill()
        branch.start()
        assert not database_dir(branch, oid).exists()
    # An object id may come again: nothing old shows through.
    pg.stop()
    pg.start()
    assert not database_dir(pg, oid).exists()
    with pytest.raises(psycopg2.OperationalError, match='"doomed" does not exist'):
        pg.connect(dbname="doomed")
    pg.safe_psql(f"CREATE DATABASE reborn OID {oid}")
    assert pg.safe_psql("SELECT count(*) FROM pg_class WHERE relname = 't'", dbname="reborn") == [
        (0,)
    ]
    verify_pages(pg)
