"""How long after its commit a row shows on a hot standby, while pgbench writes."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time

import pytest
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from fixtures.pg_protocol import PgBin
from fixtures.zenith_env import ZenithEnvBuilder

pytestmark = pytest.mark.slow

SECONDS = 20
CLIENTS = 4


def test_hot_standby_lag(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, zenbenchmark: ZenithBenchmarker
) -> None:
    """From the return of COMMIT on the primary to the first query on the standby that sees it."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    pg_bin.run_capture(["pgbench", "-i", "-s", "5", main.connstr()])
    main.safe_psql("CREATE TABLE probe (n int)")
    main.safe_psql("INSERT INTO probe VALUES (0)")
    begin = time.perf_counter()
    standby = env.postgres.create_start("main", "replica", hot_standby=True)
    zenbenchmark.record("start", time.perf_counter() - begin, "s", MetricReport.LOWER_IS_BETTER)
    load = subprocess.Popen(
        [f"{pg_bin.pg_bin_path}/pgbench", "-N", "-c", str(CLIENTS), "-T", str(SECONDS),
         main.connstr()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lags = []
    with (
        contextlib.closing(main.connect()) as writer,
        contextlib.closing(standby.connect()) as conn,
    ):
        write, read = writer.cursor(), conn.cursor()
        n = 0
        while load.poll() is None:
            n += 1
            write.execute("UPDATE probe SET n = %s", (n,))
            committed = time.perf_counter()
            while True:
                read.execute("SELECT n FROM probe")
                row = read.fetchone()
                if row is not None and row[0] == n:
                    break
            lags.append(1000 * (time.perf_counter() - committed))
            time.sleep(0.005)
    assert load.returncode == 0
    percentiles = statistics.quantiles(lags, n=100)
    for name, value in (("p50", percentiles[49]), ("p99", percentiles[98]), ("max", max(lags))):
        zenbenchmark.record(f"lag {name}", value, "ms", MetricReport.LOWER_IS_BETTER)
