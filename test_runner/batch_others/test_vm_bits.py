"""Visibility map bits: what clears them on the compute clears them in the pageserver."""

from __future__ import annotations

import contextlib

from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnvBuilder

ALL_VISIBLE, ALL_FROZEN = 1, 2
HEADER = 24  # of a page; two bits for each heap page follow


def bits_on_compute(pg: Postgres, table: str) -> int:
    ((visible, frozen),) = pg.safe_psql(f"SELECT * FROM pg_visibility_map('{table}', 0)")
    return (ALL_VISIBLE if visible else 0) | (ALL_FROZEN if frozen else 0)


def bits_in_pageserver(pg: Postgres, table: str, lsn: str) -> int:
    ((page,),) = pg.safe_psql(f"SELECT get_raw_page_at_lsn('{table}', 'vm', 0, {lsn})")
    return bytes(page)[HEADER] & 3


def check_bits(pg: Postgres, table: str, expected: int) -> str:
    """The bits of a table's first page are these in all places; the LSN they were compared at."""
    assert bits_on_compute(pg, table) == expected, table
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_insert_lsn()::text")
    # Without a commit it is the walwriter that brings WAL to the safekeepers.
    pg.safe_psql("SELECT txid_current()")
    assert bits_in_pageserver(pg, table, f"'{lsn}'") == expected, table
    assert bits_in_pageserver(pg, table, "NULL") == expected, table
    return str(lsn)


CHANGES = {
    "delete": "DELETE FROM t_{} WHERE id = 1",
    "update": "UPDATE t_{} SET n = 1 WHERE id = 1",
    "hot_update": "UPDATE t_{} SET filler = 'y' WHERE id = 1",
    "insert": "INSERT INTO t_{} VALUES (100)",
    "copy": "INSERT INTO t_{} SELECT generate_series(100, 110)",
    "multi_page": "UPDATE t_{} SET n = n + 1",
}


def test_vm_bits(zenith_env_builder: ZenithEnvBuilder) -> None:
    """VACUUM sets the bits; every kind of change clears them in both places, and on a branch.

    A bit that is cleared on the compute alone makes index-only scans and VACUUM on a later compute
    take dead tuples for visible ones.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum = off"])
    pg.safe_psql("CREATE EXTENSION zenith_test_utils; CREATE EXTENSION pg_visibility")
    lsn = ""
    for name, change in CHANGES.items():
        table = f"t_{name}"
        pg.safe_psql(
            f"CREATE TABLE {table} (id int PRIMARY KEY, n int DEFAULT 0, filler text DEFAULT 'x')"
        )
        pg.safe_psql(f"INSERT INTO {table} SELECT generate_series(1, 10)")
        pg.safe_psql(f"VACUUM FREEZE {table}")
        frozen_at = check_bits(pg, table, ALL_VISIBLE | ALL_FROZEN)
        pg.safe_psql(change.format(name))
        lsn = check_bits(pg, table, 0)
        # The state before is still there.
        assert bits_in_pageserver(pg, table, f"'{frozen_at}'") == ALL_VISIBLE | ALL_FROZEN

    # From buffers that were dropped, so out of files.
    pg.safe_psql("SELECT clear_buffer_cache()")
    for name in CHANGES:
        assert bits_on_compute(pg, f"t_{name}") == 0
    env.zenith_cli.create_branch("cleared", "main", ancestor_start_lsn=lsn)
    with env.postgres.create_start("cleared", config_lines=["autovacuum = off"]) as branch:
        for name in CHANGES:
            assert bits_on_compute(branch, f"t_{name}") == 0, name
        branch.safe_psql("SET enable_seqscan = off; SELECT count(id) FROM t_delete")
        count = "SET enable_seqscan = off; SET enable_bitmapscan = off; SELECT count(id) FROM t_{}"
        assert branch.safe_psql(count.format("delete")) == [(9,)]
        assert branch.safe_psql(count.format("insert")) == [(11,)]
        assert branch.safe_psql("SELECT count(*) FROM pg_check_visible('t_update')") == [(0,)]
    verify_pages(pg)


def test_vm_bits_of_locked_rows(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A row lock clears "all frozen" and leaves "all visible", here and there."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum = off"])
    pg.safe_psql("CREATE EXTENSION zenith_test_utils; CREATE EXTENSION pg_visibility")
    for table, lock in (("t_update", "FOR UPDATE"), ("t_share", "FOR KEY SHARE")):
        pg.safe_psql(f"CREATE TABLE {table} AS SELECT 1 AS id")
        pg.safe_psql(f"VACUUM FREEZE {table}")
        check_bits(pg, table, ALL_VISIBLE | ALL_FROZEN)
        with contextlib.closing(pg.connect(autocommit=False)) as connection:
            with connection.cursor() as cursor:
                cursor.execute(f"SELECT id FROM {table} {lock}")
            connection.commit()
        check_bits(pg, table, ALL_VISIBLE)
        pg.safe_psql(f"VACUUM FREEZE {table}")
        check_bits(pg, table, ALL_VISIBLE | ALL_FROZEN)
    # A map that nobody needs: it is forgotten as a whole.
    pg.safe_psql("TRUNCATE t_share")
    wait_until(
        lambda: pg.safe_psql("SELECT pg_relation_size('t_share', 'vm')") == [(0,)], what="TRUNCATE"
    )
    verify_pages(pg)
