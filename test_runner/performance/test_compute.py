"""A compute beside a stock server: start to the first query, cold sequential scan, bulk load."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import uuid
from pathlib import Path

import pytest
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from fixtures.pg_protocol import PgProtocol, VanillaPostgres
from fixtures.postgres import Postgres
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

pytestmark = pytest.mark.slow

LOAD = (
    "CREATE TABLE big AS SELECT i, repeat(md5(i::text), 7) AS filler "
    "FROM generate_series(1, {rows}) i"
)
ROWS_PER_MB = 3800
SCAN = "SELECT count(*), sum(i) FROM big"


def timed(pg: PgProtocol, sql: str) -> float:
    """Seconds that a statement takes on a connection made before."""
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("SET max_parallel_workers_per_gather = 0")
        begin = time.perf_counter()
        cur.execute(sql)
        return time.perf_counter() - begin


def drop_from_os_cache(directory: Path) -> None:
    """Make the next read of every file below a directory come from the disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def wait_caught_up(env: ZenithEnv, pg: PgProtocol) -> None:
    """Wait until the pageserver has everything that was written."""
    target = lsn_from_hex(pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0])
    client = env.pageserver.http_client()

    def last_record_lsn() -> int:
        detail = client.timeline_list(env.initial_tenant)[0]
        return lsn_from_hex(detail["local"]["last_record_lsn"])

    wait_until(lambda: last_record_lsn() >= target, timeout=300, what="the pageserver to catch up")


def cold_scan(env: ZenithEnv, pg: Postgres) -> float:
    """Seconds of the scan by a compute and a pageserver that have just started."""
    pg.stop()
    env.pageserver.stop()
    drop_from_os_cache(env.repo_dir / "tenants")
    env.pageserver.start()
    pg.start()
    return timed(pg, SCAN)


def make_images(env: ZenithEnv, pg: Postgres) -> None:
    """Have all pages as images in the pageserver."""
    tenant, timeline = env.initial_tenant.hex, pg.spec()["timeline_id"]
    env.zenith_cli.raw_cli(["tenant", "config", tenant, "-c", "image_creation_threshold:1"])
    env.pageserver.safe_psql(f"checkpoint {tenant} {timeline}")
    env.pageserver.safe_psql(f"compact {tenant} {timeline}")


def test_start_to_first_query(
    zenith_env_builder: ZenithEnvBuilder, zenbenchmark: ZenithBenchmarker
) -> None:
    """`zenith pg start` to the first answer, and the whole environment from nothing to it."""
    zenith_env_builder.num_safekeepers = 3
    zenith_env_builder.safekeepers_sync = True
    begin = time.perf_counter()
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("SELECT count(*) FROM pg_class")
    zenbenchmark.record(
        "environment from nothing",
        time.perf_counter() - begin,
        "s",
        MetricReport.LOWER_IS_BETTER,
    )
    pg.safe_psql(LOAD.format(rows=100 * ROWS_PER_MB))
    times = []
    for _ in range(5):
        pg.stop()
        begin = time.perf_counter()
        pg.start()
        pg.safe_psql("SELECT count(*) FROM pg_class")
        times.append(time.perf_counter() - begin)
    zenbenchmark.record(
        "pg start to first query", statistics.median(times), "s", MetricReport.LOWER_IS_BETTER
    )
    begin = time.perf_counter()
    env.pageserver.http_client().timeline_create(
        env.initial_tenant,
        ancestor_timeline_id=uuid.UUID(str(pg.spec()["timeline_id"])),
    )
    zenbenchmark.record(
        "branch", (time.perf_counter() - begin) * 1000, "ms", MetricReport.LOWER_IS_BETTER
    )


@pytest.mark.parametrize("megabytes", [1000])
def test_load_and_cold_scan(
    zenith_env_builder: ZenithEnvBuilder,
    vanilla_pg: VanillaPostgres,
    zenbenchmark: ZenithBenchmarker,
    megabytes: int,
) -> None:
    """Load and scan a table cold, Zenith and stock Postgres side by side.

    Zenith scans it twice: as it was loaded, in layers of records, and when it is in image layers.
    """
    vanilla_pg.configure("shared_buffers = 128MB\nmax_wal_size = 4GB\n")
    vanilla_pg.start()
    load = LOAD.format(rows=megabytes * ROWS_PER_MB)
    stock_load = timed(vanilla_pg, load)
    vanilla_pg.safe_psql("VACUUM big")
    vanilla_pg.stop()
    drop_from_os_cache(vanilla_pg.pgdatadir / "base")
    vanilla_pg.start()
    stock_scan = timed(vanilla_pg, SCAN)
    vanilla_pg.stop()

    zenith_env_builder.num_safekeepers = 3
    zenith_env_builder.safekeepers_sync = True
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["shared_buffers=128MB"])
    zenith_load = timed(pg, load)
    begin = time.perf_counter()
    wait_caught_up(env, pg)
    catch_up = time.perf_counter() - begin
    pg.safe_psql("VACUUM big")
    zenith_scan = cold_scan(env, pg)
    make_images(env, pg)
    image_scan = cold_scan(env, pg)
    for name, value in (
        ("load: stock / Zenith", stock_load / (zenith_load + catch_up)),
        ("cold scan: stock / Zenith", stock_scan / zenith_scan),
        ("cold scan of image layers: stock / Zenith", stock_scan / image_scan),
    ):
        zenbenchmark.record(name, value, "", MetricReport.HIGHER_IS_BETTER)
    for name, value in (
        ("stock load", stock_load),
        ("Zenith load", zenith_load),
        ("pageserver behind the load", catch_up),
        ("stock cold scan", stock_scan),
        ("Zenith cold scan", zenith_scan),
        ("Zenith cold scan of image layers", image_scan),
    ):
        zenbenchmark.record(name, value, "s", MetricReport.LOWER_IS_BETTER)
