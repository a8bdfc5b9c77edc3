"""What an environment costs a test: from nothing to the first query, and a share of a common one.

Besides the time on the clock the processor's seconds are recorded, which a busy machine does not
change much. Daemons that still run are not among them.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from fixtures.log_helper import log
from fixtures.ports import WORKER_PORT_NUM, PortDistributor
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

pytestmark = pytest.mark.slow

ROUNDS = 10


def processor_seconds() -> float:
    """Of this process and those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Steps:
    """Times of steps that are taken again and again."""

    def __init__(self) -> None:
        self._clock: dict[str, list[float]] = {}
        self._processor: dict[str, list[float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step; its name may come again."""
        clock, processor = time.perf_counter(), processor_seconds()
        yield
        self._clock.setdefault(name, []).append(time.perf_counter() - clock)
        self._processor.setdefault(name, []).append(processor_seconds() - processor)

    def record(self, zenbenchmark: ZenithBenchmarker) -> None:
        """The medians."""
        for kind, measured in (("", self._clock), (", processor", self._processor)):
            for name, seconds in measured.items():
                log.info("%s%s: %s", name, kind, [round(s, 3) for s in seconds])
                zenbenchmark.record(
                    name + kind, statistics.median(seconds), "s", MetricReport.LOWER_IS_BETTER
                )


def test_environment_from_nothing(
    zenbenchmark: ZenithBenchmarker, test_output_dir: str, worker_base_port: int
) -> None:
    """A pageserver, three safekeepers and a compute: made, started, asked, ended."""
    steps = Steps()
    for number in range(ROUNDS):
        builder = ZenithEnvBuilder(
            Path(test_output_dir) / f"repo{number}",
            PortDistributor(worker_base_port, WORKER_PORT_NUM),
            num_safekeepers=3,
        )
        with ExitStack() as stack:
            with steps.step("all of it"):
                with steps.step("init"):
                    env = builder.init()
                stack.push(builder)
                with steps.step("start of the daemons"):
                    builder.start()
                with steps.step("start of the compute"):
                    pg = env.postgres.create_start("main")
                    pg.safe_psql("SELECT 1")
            with steps.step("end"):
                stack.close()
    steps.record(zenbenchmark)


def test_share_of_an_environment(
    zenbenchmark: ZenithBenchmarker, zenith_simple_env: ZenithEnv
) -> None:
    """What a test pays for a branch and a compute of its own in an environment that runs."""
    env = zenith_simple_env
    steps = Steps()
    for number in range(ROUNDS):
        with steps.step("all of it"):
            with steps.step("branch"):
                env.zenith_cli.create_branch(f"branch{number}", "empty")
            with steps.step("start of the compute"):
                pg = env.postgres.create_start(f"branch{number}")
                pg.safe_psql("SELECT 1")
            with steps.step("stop of the compute"):
                pg.stop()
    steps.record(zenbenchmark)
