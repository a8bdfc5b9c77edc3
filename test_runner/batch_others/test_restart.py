"""Everything stops and starts again, in any order, and the data is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnvBuilder


@pytest.mark.parametrize("num_safekeepers", [0, 1, 3])
def test_restart_everything(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """The compute, then the whole environment, stops cleanly and comes back with the data."""
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT i, 'payload ' || i AS p FROM generate_series(1, 5000) i")
    for generation in range(1, 4):
        pg.stop()
        assert pg.status() == "stopped"
        if generation == 2:
            env.stop()
            env.start()
        if generation == 3:
            env.pageserver.stop(immediate=True)
            env.pageserver.start()
        pg.start()
        assert pg.status() == "running"
        assert pg.safe_psql("SELECT count(*), sum(i) FROM t WHERE i <= 5000") == [(5000, 12502500)]
        assert pg.safe_psql("SELECT count(*) FROM t WHERE i > 5000") == [(generation - 1,)]
        pg.safe_psql(f"INSERT INTO t VALUES ({5000 + generation}, 'later')")


@pytest.mark.parametrize("num_safekeepers", [0, 1, 3])
def test_killed_compute(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """A compute killed at any time has lost nothing that it acknowledged."""
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int)")
    for generation in range(4):
        with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
            for i in range(50):
                cur.execute("INSERT INTO t VALUES (%s)", (generation * 50 + i,))
            conn.autocommit = False
            cur.execute("INSERT INTO t SELECT generate_series(1000000, 1010000)")
            if generation % 2:
                pg.kill()
            else:
                pg.kill_supervisor()
        pg.start()
        rows = pg.safe_psql("SELECT i FROM t ORDER BY i")
        assert [i for (i,) in rows] == list(range((generation + 1) * 50))


@pytest.mark.parametrize(
    ("stop_order", "start_order"),
    [("cps", "psc"), ("spc", "spc"), ("pcs", "psc"), ("scp", "spc")],
    ids=lambda order: order,
)
def test_any_order(zenith_env_builder: ZenithEnvBuilder, stop_order: str, start_order: str) -> None:
    """Compute (c), pageserver (p) and safekeepers (s) stop and start in every sensible order."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["zenith.stop_timeout=2s"])
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    stop: dict[str, Callable[[], object]] = {
        "c": pg.stop,
        "p": env.pageserver.stop,
        "s": lambda: [s.stop() for s in env.safekeepers],
    }
    start: dict[str, Callable[[], object]] = {
        "c": pg.start,
        "p": env.pageserver.start,
        "s": lambda: [s.start() for s in env.safekeepers],
    }
    for part in stop_order:
        stop[part]()
    for part in start_order:
        start[part]()
    assert pg.safe_psql("SELECT count(*), sum(i) FROM t") == [(1000, 500500)]
    pg.safe_psql("INSERT INTO t VALUES (0)")


def test_killed_pageserver(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Commits go on without the pageserver, which catches up; cold reads wait for it."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 10000) AS i")
    env.pageserver.kill()
    pg.safe_psql("INSERT INTO t SELECT generate_series(10001, 20000)")
    env.pageserver.start()
    lsn = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    client = env.pageserver.http_client()
    timeline = client.timeline_list(env.initial_tenant)[0]
    wait_until(
        lambda: (
            lsn_from_hex(client.timeline_list(env.initial_tenant)[0]["local"]["last_record_lsn"])
            >= lsn_from_hex(lsn)
        ),
        what=f"the pageserver to catch up with {lsn} from {timeline}",
    )
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*), sum(i) FROM t") == [(20000, 200010000)]
