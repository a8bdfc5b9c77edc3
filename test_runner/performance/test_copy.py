"""Bulk COPY into a compute and a stock server in turn, and until the pageserver has ingested it."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any, cast

import pytest
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from fixtures.log_helper import log
from fixtures.pg_protocol import PgProtocol, VanillaPostgres
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

pytestmark = pytest.mark.slow

ROUNDS = 3
MIB = 1024
SETTINGS = [
    "shared_buffers = 256MB",
    "max_wal_size = 8GB",
    "checkpoint_timeout = 1h",
    "autovacuum = off",
]
BLOCK = "".join(f"{number}\t{number % 97}\t{'filler ' * 34}\n" for number in range(4096)).encode()


class Lines:
    """About so many MiB of COPY data, made while they are read."""

    def __init__(self, mib: int) -> None:
        self._left = (mib << 20) // len(BLOCK)

    def read(self, size: int) -> bytes:
        """The next block; `size` is its size."""
        assert size == len(BLOCK)
        self._left -= 1
        return BLOCK if self._left >= 0 else b""


def copy(pg: PgProtocol) -> tuple[float, float]:
    """Fill a new table: its size in MiB, and the seconds until the commit has returned."""
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("DROP TABLE IF EXISTS t")
        cur.execute("CREATE TABLE t (a int, b int, c text)")
        cur.execute("CHECKPOINT")
        begin = time.perf_counter()
        cur.copy_expert("COPY t FROM STDIN", cast(Any, Lines(MIB)), size=len(BLOCK))
        seconds = time.perf_counter() - begin
        cur.execute("SELECT pg_table_size('t') / 1048576.0")
        return float(cur.fetchall()[0][0]), seconds


def wait_ingested(env: ZenithEnv, pg: PgProtocol) -> None:
    """Wait until the pageserver has all WAL."""
    target = lsn_from_hex(pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0])
    client = env.pageserver.http_client()

    def last_record_lsn() -> int:
        detail = client.timeline_list(env.initial_tenant)[0]
        return lsn_from_hex(detail["local"]["last_record_lsn"])

    wait_until(lambda: last_record_lsn() >= target, timeout=600, what="the pageserver to catch up")


def test_copy(
    zenith_env_builder: ZenithEnvBuilder,
    vanilla_pg: VanillaPostgres,
    zenbenchmark: ZenithBenchmarker,
) -> None:
    """MB of table per second, both running, in turn."""
    vanilla_pg.configure("\n".join(SETTINGS))
    vanilla_pg.start()
    zenith_env_builder.num_safekeepers = 3
    zenith_env_builder.safekeepers_sync = True
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=SETTINGS)
    speeds: dict[str, list[float]] = {"stock": [], "Zenith": [], "Zenith until ingested": []}
    for _ in range(ROUNDS):
        size, seconds = copy(vanilla_pg)
        speeds["stock"].append(size / seconds)
        begin = time.perf_counter()
        size, seconds = copy(pg)
        speeds["Zenith"].append(size / seconds)
        overhead = time.perf_counter() - begin - seconds
        wait_ingested(env, pg)
        seconds = time.perf_counter() - begin - overhead
        speeds["Zenith until ingested"].append(size / seconds)
        log.info("MB/s: %s", {name: round(values[-1]) for name, values in speeds.items()})
    for name, values in speeds.items():
        zenbenchmark.record(name, statistics.median(values), "MB/s", MetricReport.HIGHER_IS_BETTER)
        if name != "stock":
            ratios = [ours / stock for ours, stock in zip(values, speeds["stock"], strict=True)]
            zenbenchmark.record(
                f"{name} / stock", statistics.median(ratios), "", MetricReport.HIGHER_IS_BETTER
            )
