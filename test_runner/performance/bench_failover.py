"""Benchmark of failures: how long commits stop when a compute, or a safekeeper, dies.

Run as a script. A compute over three safekeepers that fsync. First the compute is killed again and
again, and the time from SIGKILL to the next commit on its successor taken. Then commits go on while
one safekeeper is killed and comes back: the longest time without any commit, and the latency of
commits, beside those of as long a time without faults.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psycopg2
from fixtures.ports import BASE_PORT, WORKER_PORT_NUM, PortDistributor
from fixtures.postgres import Postgres
from fixtures.safekeeper_wal import Timeline
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex
from fixtures.zenith_env import ZenithEnvBuilder

RETRY = 0.002
INSERT = "INSERT INTO bench (filler) VALUES (repeat('x', 100))"


@contextlib.contextmanager
def compute(directory: Path) -> Iterator[Postgres]:
    """A running compute with the table."""
    ports = PortDistributor(BASE_PORT, WORKER_PORT_NUM)
    with ZenithEnvBuilder(directory / "repo", ports) as builder:
        builder.num_safekeepers = 3
        builder.safekeepers_sync = True
        pg = builder.init_start().postgres.create_start("main", config_lines=["autovacuum=off"])
        pg.safe_psql("CREATE TABLE bench (i bigserial, filler text)")
        yield pg


def reachable(directory: Path) -> Path:
    """The directory, which Postgres' own user can get through."""
    directory.chmod(0o755)
    return directory


def commit_somehow(pg: Postgres) -> None:
    """One commit, tried until it works."""
    while True:
        try:
            pg.safe_psql(INSERT)
            return
        except psycopg2.Error:
            time.sleep(RETRY)


def measure_failover(pg: Postgres, victim: str) -> tuple[float, float]:
    """Seconds from SIGKILL to the end of `zenith pg start`, and to the next commit."""
    pid = pg.supervisor_pid() if victim == "supervisor" else pg.postmaster_pid()
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    pg.start()
    started = time.monotonic()
    commit_somehow(pg)
    return started - begun, time.monotonic() - begun


class Load:
    """Clients that commit one row after another, with the times of every commit."""

    def __init__(self, pg: Postgres, clients: int) -> None:
        self._stopping = threading.Event()
        self._times: list[list[tuple[float, float]]] = [[] for _ in range(clients)]
        self._threads = [
            threading.Thread(target=self._run, args=(pg, times)) for times in self._times
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def during(self, begin: float, end: float) -> dict[str, float]:
        """Milliseconds in this time: the longest without a commit; commits' latencies."""
        commits = sorted(c for times in self._times for c in list(times) if begin <= c[1] <= end)
        ends = [begin, *sorted(commit_end for _, commit_end in commits), end]
        latencies = sorted(e - b for b, e in commits)
        return {
            "gap": 1000 * max(b - a for a, b in itertools.pairwise(ends)),
            "median": 1000 * statistics.median(latencies),
            "p99": 1000 * latencies[int(0.99 * (len(latencies) - 1))],
            "max": 1000 * latencies[-1],
            "commits": len(commits) / (end - begin),
        }

    def _run(self, pg: Postgres, times: list[tuple[float, float]]) -> None:
        with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
            while not self._stopping.is_set():
                begun = time.monotonic()
                cursor.execute(INSERT)
                times.append((begun, time.monotonic()))


def measure_stalls(
    pg: Postgres, clients: int, rounds: int, seconds: float
) -> list[dict[str, dict[str, float]]]:
    """What a client sees while nothing happens, a safekeeper dies, is away, and comes back."""
    branch = Branch.of(pg)
    results = []
    load = Load(pg, clients)
    try:
        time.sleep(seconds)
        for number in range(rounds):
            safekeeper = pg.env.safekeepers[number % 3]
            moments = [time.monotonic()]
            time.sleep(seconds)
            moments.append(time.monotonic())
            safekeeper.kill()
            time.sleep(seconds)
            moments.append(time.monotonic())
            safekeeper.start()
            lsn = lsn_from_hex(pg.safe_psql(FLUSH_LSN)[0][0])
            Timeline(safekeeper, branch.tenant, branch.timeline).wait_flushed(lsn)
            time.sleep(max(0.0, moments[-1] + seconds - time.monotonic()))
            moments.append(time.monotonic())
            names = ("no fault", "one dies", "it comes back")
            results.append(
                {
                    name: load.during(begin, end)
                    for name, begin, end in zip(names, moments, moments[1:], strict=False)
                }
            )
    finally:
        load.stop()
    return results


def summary(values: Sequence[float], digits: int = 2) -> str:
    """Median and maximum."""
    return f"median {statistics.median(values):.{digits}f}, max {max(values):.{digits}f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=10, help="kills of each kind")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each state")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bench-failover-", dir=arguments.dir) as name,
        compute(reachable(Path(name))) as pg,
    ):
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        for victim in ("postmaster", "supervisor"):
            times = [measure_failover(pg, victim) for _ in range(arguments.rounds)]
            print(
                f"{victim} killed: seconds to `zenith pg start` done: "
                f"{summary([t[0] for t in times])}; to the next commit: "
                f"{summary([t[1] for t in times])}"
            )
        stalls = measure_stalls(pg, arguments.clients, arguments.rounds, arguments.seconds)
        for state in stalls[0]:
            runs = [stall[state] for stall in stalls]
            figures = {
                key: [
                    round(statistics.median(run[key] for run in runs), 1),
                    round(max(run[key] for run in runs), 1),
                ]
                for key in runs[0]
            }
            print(f"{state}, [median, max] of the rounds, ms: {json.dumps(figures)}")


if __name__ == "__main__":
    main()
