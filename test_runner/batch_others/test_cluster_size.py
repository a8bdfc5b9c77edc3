"""zenith.max_cluster_size: over the limit relations do not grow, and everything else goes on."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from fixtures.postgres import Postgres
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

PAGE = 8192
MB = 1 << 20
LIMIT = 36
FILL = "INSERT INTO big SELECT g, repeat('x', 1000) FROM generate_series(1, 1000000) g"

MORE = "INSERT INTO big SELECT g, repeat('x', 1000) FROM generate_series(1, 500) g"


def logical_sizes(env: ZenithEnv, pg: Postgres) -> tuple[int, int]:
    """The size of the node's timeline as the pageserver keeps it, and as it counts it anew."""
    timeline = uuid.UUID(pg.safe_psql("SHOW zenith.zenith_timeline")[0][0])
    local = env.pageserver.http_client().timeline_detail(pg.tenant_id, timeline)["local"]
    return local["current_logical_size"], local["current_logical_size_non_incremental"]


def wait_reported(pg: Postgres) -> int:
    """Until the pageserver's report includes everything; the size it reports."""

    def reported() -> int | None:
        query = (
            "SELECT received_lsn >= pg_current_wal_flush_lsn(), pg_cluster_size()"
            " FROM backpressure_lsns()"
        )
        ((complete, size),) = pg.safe_psql(query)
        return int(size) if complete else None

    size = wait_until(reported, what="the pageserver's report")
    assert size is not None
    return size


def set_limit(pg: Postgres, megabytes: int) -> None:
    """Change the limit by a reload, and wait until it is in force."""
    pg.safe_psql(f"ALTER SYSTEM SET zenith.max_cluster_size = '{megabytes}MB'")
    pg.safe_psql("SELECT pg_reload_conf()")
    shown = "-1" if megabytes < 0 else f"{megabytes}MB"
    wait_until(
        lambda: pg.safe_psql("SHOW zenith.max_cluster_size") == [(shown,)], what="the reload"
    )


@contextlib.contextmanager
def refused(pg: Postgres) -> Iterator[Any]:
    """A cursor whose statement fails because of the limit."""
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        with pytest.raises(psycopg2.errors.DiskFull, match="cluster has reached its size") as error:
            yield cursor
        assert error.value.pgcode == "53100"
        assert "zenith.max_cluster_size" in (error.value.diag.message_hint or "")


def files_size(pg: Postgres) -> int:
    """Size of all databases by their files."""
    return int(pg.safe_psql("SELECT sum(pg_database_size(oid))::bigint FROM pg_database")[0][0])


@pytest.mark.parametrize("num_safekeepers", [0, 3])
def test_limit(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """Growth is refused at the limit, and room is made by what makes room.

    The limit is a promise to whoever pays for the disk; but a database that is full must still
    let its user read, and make room.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=[f"zenith.max_cluster_size={LIMIT}MB"])
    pg.safe_psql("CREATE EXTENSION zenith")
    pg.safe_psql("CREATE TABLE big (i int, x text)")
    pg.safe_psql("CREATE TABLE small AS SELECT g AS i, 0 AS n FROM generate_series(1, 1000) g")

    # One statement is stopped on its way, whether the pageserver has reported or not.
    with refused(pg) as cursor:
        cursor.execute(FILL)
    assert LIMIT * MB - 2 * MB < files_size(pg) <= LIMIT * MB
    # A page whose WAL was not written yet when a report was counted in may have been left out.
    assert wait_reported(pg) <= LIMIT * MB + PAGE

    def full() -> bool:
        # What counted twice, in a report and as growth since, is free again after the next.
        with refused(pg) as cursor:
            cursor.execute(FILL)
        return wait_reported(pg) >= LIMIT * MB

    wait_until(full, what="the last page to be taken")
    for statement in (
        FILL,
        "CREATE TABLE other AS SELECT repeat('x', 8000) FROM generate_series(1, 1000)",
        "CREATE INDEX ON small (i, n)",
        "CREATE DATABASE wal_logged STRATEGY wal_log",
        "CREATE DATABASE copied STRATEGY file_copy",
        "SELECT lo_from_bytea(0, decode(string_agg(md5(g::text), ''), 'hex'))"
        " FROM generate_series(1, 200000) g",
        "ALTER TABLE small ALTER COLUMN n TYPE bigint",
        "VACUUM FULL small",
        "DO $$ BEGIN INSERT INTO big SELECT g, repeat('x', 1000) FROM generate_series(1, 5000) g;"
        " EXCEPTION WHEN unique_violation THEN END $$",
    ):
        with refused(pg) as cursor:
            cursor.execute(statement)
    with refused(pg) as cursor:
        cursor.execute("CREATE TEMP TABLE copied AS SELECT repeat('x', 100000) AS x")
        cursor.execute("INSERT INTO big SELECT g, x FROM copied, generate_series(1, 20000) g")

    # Everything else goes on.
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TEMP TABLE own AS SELECT repeat('x', 1000) FROM generate_series(1, 5000)"
        )
        cursor.execute("SET work_mem = '64kB'")
        cursor.execute(
            "SELECT count(*) FROM (SELECT g FROM generate_series(1, 200000) g ORDER BY -g) s"
        )
        cursor.execute("SELECT count(*), sum(n) FROM small")
        assert cursor.fetchone() == (1000, 0)
        cursor.execute("SELECT count(*) FROM big")
        assert cursor.fetchone() == (0,)
        cursor.execute("DELETE FROM small WHERE i <= 500")
        cursor.execute("VACUUM small")
        cursor.execute("UPDATE small SET n = 1 WHERE i > 950")
        cursor.execute("ANALYZE small")
        cursor.execute("CREATE VIEW v AS SELECT * FROM small")
        cursor.execute("SELECT count(*), sum(n) FROM v")
        assert cursor.fetchone() == (500, 50)

    # A higher limit is in force after a reload, and a lower one. What was refused half-way counts
    # until the pageserver has reported that it is gone.
    wait_reported(pg)
    set_limit(pg, LIMIT + 4)
    pg.safe_psql("INSERT INTO small SELECT g, 2 FROM generate_series(1, 20000) g")
    set_limit(pg, 10)
    with refused(pg) as cursor:
        cursor.execute("INSERT INTO small SELECT g, 2 FROM generate_series(1, 50000) g")
    set_limit(pg, LIMIT)

    # What is dropped makes room as soon as the pageserver has reported it.
    before = wait_reported(pg)
    pg.safe_psql("DROP TABLE big")
    after = wait_reported(pg)
    assert after < before - 5 * MB
    assert logical_sizes(env, pg) == (after, after)
    pg.safe_psql("CREATE TABLE big AS SELECT g, repeat('x', 1000) FROM generate_series(1, 4000) g")
    pg.safe_psql("TRUNCATE big")
    pg.safe_psql("INSERT INTO big SELECT g, repeat('x', 1000) FROM generate_series(1, 4000) g")
    set_limit(pg, -1)
    pg.safe_psql("INSERT INTO big SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g")
    size = wait_reported(pg)
    assert size > LIMIT * MB
    assert logical_sizes(env, pg) == (size, size)


def test_limit_without_the_pageserver(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A compute counts its own growth: the limit holds while the pageserver is away.

    Else the size would run away just when nobody reports it.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start(
        "main",
        config_lines=[f"zenith.max_cluster_size={LIMIT}MB", "max_replication_write_lag=-1"],
    )
    pg.safe_psql("CREATE EXTENSION zenith")
    pg.safe_psql("CREATE TABLE big (i int, x text)")
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        # What these statements read is there before the pageserver is away.
        cursor.execute("SET statement_timeout = '30s'")
        cursor.execute(MORE)
        cursor.execute("SELECT count(*), pg_relation_size('big') FROM big")
        wait_reported(pg)
        with env.pageserver.suspended():
            written = 0
            with pytest.raises(psycopg2.errors.DiskFull):
                for _ in range(100):
                    cursor.execute(MORE)
                    written += 1
            assert written > 5
            cursor.execute("SELECT pg_relation_size('big')")
            ((grown,),) = cursor.fetchall()
            assert grown < (LIMIT - 20) * MB
    assert wait_reported(pg) <= LIMIT * MB


def test_sizes_of_branches(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The size is of the branch, with what it has of its ancestor, whatever happens to that.

    A branch is limited by what it shows, not by what it happens to store: else a drop in the
    ancestor would let it in, or keep it out.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE EXTENSION zenith")
    pg.safe_psql(
        "CREATE TABLE a AS SELECT g AS i, repeat('x', 500) FROM generate_series(1, 9000) g"
    )
    pg.safe_psql("CREATE TABLE b (LIKE a); INSERT INTO b SELECT * FROM a; CREATE INDEX ON a (i)")
    pg.safe_psql("CREATE DATABASE d STRATEGY file_copy")
    both = wait_reported(pg)
    assert logical_sizes(env, pg) == (both, both)
    env.zenith_cli.create_branch("branch", "main")

    pg.safe_psql("TRUNCATE a")
    pg.safe_psql("DROP DATABASE d")
    pg.safe_psql("DELETE FROM b WHERE i > 100")
    pg.safe_psql("VACUUM FREEZE b")  # without, a page that is just being written out is left
    less = wait_reported(pg)
    assert less < both - 15 * MB
    assert logical_sizes(env, pg) == (less, less)

    branch = env.postgres.create_start("branch")
    assert branch.safe_psql("SELECT pg_cluster_size()") == [(both,)]
    branch.safe_psql("DROP TABLE a")
    branch.safe_psql("CREATE TABLE c AS SELECT * FROM b LIMIT 3000")
    size = wait_reported(branch)
    assert less < size < both
    assert logical_sizes(env, branch) == (size, size)
    # Counted anew by a pageserver that has lost its memory.
    branch.stop()
    env.pageserver.stop().start()
    branch.start()
    assert branch.safe_psql("SELECT pg_cluster_size()") == [(logical_sizes(env, branch)[1],)]
