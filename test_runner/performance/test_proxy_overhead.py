"""What the proxy costs: pgbench's read-only queries and bulk data through it and without it."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from fixtures.pg_protocol import PgBin, PgProtocol, VanillaPostgres
from fixtures.proxy import ZenithProxy

pytestmark = pytest.mark.slow

ROUNDS = 5
SECONDS = 4
COPY_MIB = 256


def queries_per_second(pg_bin: PgBin, server: PgProtocol, clients: int) -> float:
    """What pgbench -S gets."""
    base = pg_bin.run_capture(
        ["pgbench", "-S", "-n", "-M", "prepared", "-c", str(clients), "-j", "2",
         "-T", str(SECONDS), server.connstr(username="pytest", password="pytest")]
    )  # fmt: skip
    match = re.search(r"^tps = ([0-9.]+)", Path(f"{base}.stdout").read_text(), re.MULTILINE)
    assert match is not None
    return float(match[1])


def mib_per_second(pg_bin: PgBin, server: PgProtocol) -> float:
    """How fast COPY TO STDOUT arrives."""
    query = f"COPY (SELECT repeat('x', 1023) FROM generate_series(1, {COPY_MIB << 10})) TO STDOUT"
    begin = time.perf_counter()
    subprocess.run(
        [f"{pg_bin.pg_bin_path}/psql", server.connstr(username="pytest", password="pytest"),
         "-c", query],
        stdout=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip
    return COPY_MIB / (time.perf_counter() - begin)


def test_proxy_overhead(
    static_proxy: ZenithProxy,
    vanilla_pg: VanillaPostgres,
    pg_bin: PgBin,
    zenbenchmark: ZenithBenchmarker,
) -> None:
    """Rounds of each by turns; the median of the ratios of a round is what counts."""
    pg_bin.run_capture(["pgbench", "-i", "-s", "5", vanilla_pg.connstr()])
    for clients in (1, 16):
        rates = [
            (
                queries_per_second(pg_bin, static_proxy, clients),
                queries_per_second(pg_bin, vanilla_pg, clients),
            )
            for _ in range(ROUNDS)
        ]
        record(zenbenchmark, f"queries of {clients} clients", rates, "1/s")
    record(
        zenbenchmark,
        "copy",
        [(mib_per_second(pg_bin, static_proxy), mib_per_second(pg_bin, vanilla_pg))
         for _ in range(ROUNDS)],
        "MiB/s",
    )  # fmt: skip


def record(
    zenbenchmark: ZenithBenchmarker, name: str, rates: list[tuple[float, float]], unit: str
) -> None:
    """Record rates through the proxy and without it, and their ratio."""
    through, direct = (statistics.median(side) for side in zip(*rates, strict=True))
    ratio = statistics.median(one / other for one, other in rates)
    higher = MetricReport.HIGHER_IS_BETTER
    zenbenchmark.record(f"{name}, proxy", through, unit, higher)
    zenbenchmark.record(f"{name}, direct", direct, unit, higher)
    zenbenchmark.record(f"{name}, proxy / direct", ratio, "", higher)
