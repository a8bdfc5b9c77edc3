"""CREATE, ALTER and DROP ROLE: shared catalogs come back, and branches have their own."""

from __future__ import annotations

import psycopg2
import pytest
from fixtures.zenith_env import ZenithEnvBuilder


def test_createuser(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A user made on the compute logs in on a branch, with the rights and settings of that LSN."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT 1 AS i")
    pg.safe_psql("CREATE ROLE readers; GRANT SELECT ON t TO readers")
    pg.safe_psql("CREATE USER u PASSWORD 'one' IN ROLE readers")
    pg.safe_psql("ALTER USER u SET work_mem = '7MB'")
    ((password,),) = pg.safe_psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'u'")
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")
    pg.safe_psql("REVOKE readers FROM u; ALTER USER u RESET work_mem; ALTER USER u PASSWORD 'two'")
    pg.safe_psql("CREATE USER later")

    env.zenith_cli.create_branch("branch", "main", ancestor_start_lsn=lsn)
    with env.postgres.create_start("branch") as branch:
        assert branch.safe_psql("SELECT i FROM t", username="u") == [(1,)]
        assert branch.safe_psql("SHOW work_mem", username="u") == [("7MB",)]
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            branch.safe_psql("INSERT INTO t VALUES (2)", username="u")
        with pytest.raises(psycopg2.OperationalError, match='role "later" does not exist'):
            branch.connect(username="later")
        kept = "SELECT rolpassword FROM pg_authid WHERE rolname = 'u'"
        assert branch.safe_psql(kept) == [(password,)]
        branch.safe_psql("DROP USER u; CREATE USER other")

    pg.kill()
    pg.start()
    assert pg.safe_psql("SHOW work_mem", username="u") == [("4MB",)]
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        pg.safe_psql("SELECT i FROM t", username="u")
    assert pg.safe_psql("SELECT current_user", username="later") == [("later",)]
    with pytest.raises(psycopg2.OperationalError, match='role "other" does not exist'):
        pg.connect(username="other")
