"""pgbench against a server that runs elsewhere: -m remote_cluster, with BENCHMARK_CONNSTR.

TEST_PG_BENCH_SCALES_MATRIX and TEST_PG_BENCH_TRANSACTIONS_MATRIX are comma-separated numbers,
PG_BIN is the pgbench to use. Nothing of Zenith has to be on this machine: set REMOTE_ENV.
"""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from fixtures.benchmark_fixture import PgBenchRunResult, ZenithBenchmarker
from fixtures.log_helper import log

pytestmark = [pytest.mark.remote_cluster, pytest.mark.timeout(24 * 3600)]


def matrix(variable: str, default: str) -> list[int]:
    """The numbers of an environment variable."""
    return [int(number) for number in (os.environ.get(variable) or default).split(",")]


def timed(command: list[str]) -> tuple[str, float, int, int]:
    """Run a command: its output, seconds, and when it began and ended in s since 1970."""
    shown = " ".join(command[:-1])  # the last one, a connection string, may hold a password
    log.info("running %s", shown)
    begin, clock = int(time.time()), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shown} failed: {done.stdout}{done.stderr}"
    return done.stdout, time.perf_counter() - clock, begin, int(time.time())


@pytest.mark.parametrize("scale", matrix("TEST_PG_BENCH_SCALES_MATRIX", "10,20"))
@pytest.mark.parametrize(
    "transactions", matrix("TEST_PG_BENCH_TRANSACTIONS_MATRIX", "10000,100000")
)
def test_pgbench_remote_cluster(
    zenbenchmark: ZenithBenchmarker, scale: int, transactions: int
) -> None:
    """Initialisation, then one client's transactions, prepared."""
    connstr = os.environ.get("BENCHMARK_CONNSTR")
    assert connstr, "set BENCHMARK_CONNSTR to the connection string of the server to measure"
    pgbench = os.environ.get("PG_BIN") or "pgbench"
    _, init_duration, init_begin, init_end = timed([pgbench, "-i", f"-s{scale}", connstr])
    printed, run_duration, run_begin, run_end = timed(
        [pgbench, "-P5", f"-t{transactions}", "-Mprepared", connstr]
    )
    zenbenchmark.record_pg_bench_result(
        PgBenchRunResult.parse_from_output(
            printed, init_duration, init_begin, init_end, run_duration, run_begin, run_end
        )
    )
