"""How long the daemons take to start: until the caller goes on, and until they answer."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import pytest
import requests
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from fixtures.zenith_env import ZenithEnvBuilder

pytestmark = pytest.mark.slow

STARTS = 20
BRANCHES = 20


def test_start_of_daemons(
    zenith_env_builder: ZenithEnvBuilder, zenbenchmark: ZenithBenchmarker
) -> None:
    """From exec to the parent's exit, and to the first answer over HTTP: medians of warm starts.

    The pageserver has a tenant with 20 timelines, which a start finds and does not load.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    for number in range(BRANCHES - 1):
        env.zenith_cli.create_branch(f"branch{number}")
    (safekeeper,) = env.safekeepers
    env.stop()
    programs = env.paths.zenith_bin
    measure(
        "pageserver",
        [str(programs / "pageserver"), "-D", str(env.repo_dir), "--daemonize"],
        env.pageserver.service_port.http,
        env.pageserver.kill,
        zenbenchmark,
    )
    measure(
        "safekeeper",
        [
            *(str(programs / "safekeeper"), "-D", str(safekeeper.data_dir), "--daemonize"),
            *("-l", f"127.0.0.1:{safekeeper.port.pg}"),
            *("--listen-http", f"127.0.0.1:{safekeeper.port.http}"),
        ],
        safekeeper.port.http,
        safekeeper.kill,
        zenbenchmark,
    )


def measure(
    name: str,
    command: Sequence[str],
    http_port: int,
    kill: Callable[[], None],
    zenbenchmark: ZenithBenchmarker,
) -> None:
    """Start a daemon again and again; it is killed in between, which leaves it nothing to do."""
    returned, answered = [], []
    for _ in range(STARTS + 1):
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        returned.append(time.perf_counter() - begin)
        # The listening socket is there already: the request waits in its queue.
        assert requests.get(f"http://127.0.0.1:{http_port}/v1/status", timeout=60).ok
        answered.append(time.perf_counter() - begin)
        kill()
    # The first one fills the caches of the system.
    for what, times in (("returned", returned), ("answered", answered)):
        median = statistics.median(times[1:])
        zenbenchmark.record(f"{name}.{what}", median, "s", MetricReport.LOWER_IS_BETTER)
