"""Subtransactions: more than a backend remembers, their status on the compute and in storage."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

from batch_pg_regress.slru_files import compare_slrus
from fixtures.page_verifier import verify_pages, wait_for_shutdown_checkpoint
from fixtures.zenith_env import ZenithEnvBuilder

# A backend shows 64 in shared memory; from the 65th on others look into pg_subtrans.
SUBXACTS = 150


def test_subxacts(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Nested, released, rolled back; in transactions that commit, abort or are cut off by a kill.

    Commit and abort records list subtransactions: their status is ingested from those alone.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int, kind text)")

    def run(kind: str, end: str) -> None:
        connection = pg.connect(autocommit=False)
        with contextlib.closing(connection), connection.cursor() as cursor:
            for i in range(SUBXACTS):
                cursor.execute(f"SAVEPOINT s; INSERT INTO t VALUES ({i}, '{kind}')")
                if i % 3 == 0:
                    cursor.execute("ROLLBACK TO s")
                elif i % 3 == 1:
                    cursor.execute("RELEASE s")  # else it stays open, and the next lies in it
            if end == "kill":
                cursor.execute("SELECT pg_switch_wal()")
                pg.kill()
            else:
                cursor.execute(end)

    expected = [i for i in range(SUBXACTS) if i % 3]
    run("committed", "COMMIT")
    run("aborted", "ROLLBACK")
    # Seen while it runs, by a session that cannot tell from shared memory alone.
    with contextlib.closing(pg.connect(autocommit=False)) as connection:
        with connection.cursor() as cursor:
            for i in range(SUBXACTS):
                cursor.execute(f"SAVEPOINT s; INSERT INTO t VALUES ({i}, 'open')")
        assert pg.safe_psql("SELECT count(*) FROM t WHERE kind = 'open'") == [(0,)]
        connection.commit()
    run("killed", "kill")
    pg.start()
    query = "SELECT i FROM t WHERE kind = 'committed' ORDER BY i"
    kinds = "SELECT kind, count(*) FROM t GROUP BY kind ORDER BY kind"
    assert pg.safe_psql(query) == [(i,) for i in expected]
    assert pg.safe_psql(kinds) == [("committed", len(expected)), ("open", SUBXACTS)]
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")

    main = uuid.UUID(str(pg.spec()["timeline_id"]))
    verify_pages(pg)
    end = wait_for_shutdown_checkpoint(pg, main)
    assert compare_slrus(env, Path(pg.pg_data_dir_path()), main, end) > 0
    env.zenith_cli.create_branch("branch", "main", ancestor_start_lsn=lsn)
    with env.postgres.create_start("branch") as branch:
        assert branch.safe_psql(query) == [(i,) for i in expected]
        assert branch.safe_psql(kinds) == [("committed", len(expected)), ("open", SUBXACTS)]
