"""Benchmark of commits: pgbench over a quorum of safekeepers and over stock replication.

Run as a script, --quick for a first look. Three servers run side by side on the same disk and are
loaded in turn, round by round: Postgres with three safekeepers that fsync; stock Postgres, fsync
on, with ANY 2 of three `pg_receivewal --synchronous`; and stock Postgres without replication. What
is printed are medians over the rounds: transactions per second, latencies of single transactions
(out of pgbench's log), and microseconds of CPU per transaction of every process. A ratio is taken
within each round, its range tells how far to trust it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_unit.walproposer_support import SUPERUSER, Postgres, wait_until, wal_cluster
from fixtures.utils import stat_fields

from zenith_utils.os_user import give, popen_kwargs

SAFEKEEPERS = 3
QUORUM = 2
STOCK = ("fsync=on", "full_page_writes=on")
# No checkpoint of one server may fall into the turn of another.
COMMON = (
    "shared_buffers=256MB",
    "max_wal_size=8GB",
    "checkpoint_timeout=1h",
    "autovacuum=off",
)
VARIANTS = ("zenith", "stock_quorum", "stock_alone")


@dataclass
class Server:
    """A server that runs, and its processes whose CPU time counts."""

    postgres: Postgres
    pids: dict[str, int]


@dataclass
class Figures:
    """What one turn of pgbench gives: latencies in milliseconds, CPU in us per transaction."""

    tps: float
    p50: float
    p99: float
    cpu: dict[str, float] = field(default_factory=dict)


def initialize(postgres: Postgres, scale: int) -> None:
    """Create pgbench's tables."""
    subprocess.run(
        [
            *(postgres.distrib.bin_dir / "pgbench", "-h", postgres.directory, "-i", "-q"),
            *("-p", str(postgres.port), "-U", SUPERUSER, "-s", str(scale), "postgres"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    postgres.sql("checkpoint")


def turn(server: Server, script: str, clients: int, seconds: float) -> Figures:
    """Run pgbench once."""
    postgres = server.postgres
    before = {name: cpu_seconds(pid) for name, pid in server.pids.items()}
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [
                *(postgres.distrib.bin_dir / "pgbench", "-h", postgres.directory, "-n"),
                *("-p", str(postgres.port), "-U", SUPERUSER, "-M", "prepared", "-b", script),
                *("-c", str(clients), "-j", "1", "-T", str(seconds)),
                *("-l", "--log-prefix", f"{directory}/log", "postgres"),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        # A line per transaction; the third field is its latency in microseconds.
        latencies = sorted(
            int(line.split(None, 3)[2])
            for path in Path(directory).iterdir()
            for line in path.read_bytes().splitlines()
        )
    count = len(latencies)
    cpu = {
        name: 1e6 * (cpu_seconds(pid) - before[name]) / count for name, pid in server.pids.items()
    }
    cpu["in all"] = sum(cpu.values())
    return Figures(
        count / seconds, latencies[count // 2] / 1000, latencies[count * 99 // 100] / 1000, cpu
    )


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children so far, user and system."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stats[int(path.parent.name)] = stat_fields(path)
    # Field 2 is the parent; 12 to 15 are the process' own times and those of ended children.
    ticks = sum(int(field) for field in stats[pid][11:15])
    for fields in stats.values():
        if int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def zenith(directory: Path) -> Iterator[Server]:
    """Three safekeepers with fsync; Postgres as on a compute."""
    with wal_cluster(directory, SAFEKEEPERS, sync=True) as cluster:
        postgres, proposer = cluster.start(*COMMON)
        assert postgres.process is not None
        processes = {"walproposer": proposer, **{f"sk{s.id}": s for s in cluster.safekeepers}}
        pids = {name: p.process.pid for name, p in processes.items() if p.process is not None}
        yield Server(postgres, {"postgres": postgres.process.pid, **pids})


@contextlib.contextmanager
def stock(directory: Path, receivers: int) -> Iterator[Server]:
    """Stock Postgres with fsync, and receivers whose quorum it waits for."""
    directory.chmod(0o755)
    postgres = Postgres(directory / "pg")
    names = [f"r{number}" for number in range(receivers)]
    quorum = f"ANY {QUORUM} ({','.join(names)})" if receivers else ""
    children: list[subprocess.Popen[bytes]] = []
    try:
        postgres.start(*STOCK, *COMMON, synchronous=quorum)
        for name in names:
            target = directory / name
            target.mkdir()
            give(target)
            children.append(
                subprocess.Popen(
                    [
                        *(postgres.distrib.bin_dir / "pg_receivewal", "-D", target),
                        *("--synchronous", "-d"),
                        f"host={postgres.directory} port={postgres.port} "
                        f"user={SUPERUSER} application_name={name}",
                    ],
                    stderr=subprocess.DEVNULL,
                    **popen_kwargs(),
                )
            )
        states = "select count(*) from pg_stat_replication where state = 'streaming'"
        wait_until(lambda: postgres.sql(states)[0][0] == receivers, "the receivers")
        assert postgres.process is not None
        pids = {name: child.pid for name, child in zip(names, children, strict=True)}
        yield Server(postgres, {"postgres": postgres.process.pid, **pids})
    finally:
        postgres.kill(3)
        for child in children:
            child.kill()
            child.wait()


@contextlib.contextmanager
def servers(parent: Path, scale: int) -> Iterator[dict[str, Server]]:
    """All variants, running, with pgbench's tables."""
    directories = [
        Path(tempfile.mkdtemp(prefix=f"bench-commit-{name}-", dir=parent)) for name in VARIANTS
    ]
    try:
        with contextlib.ExitStack() as stack:
            running = [
                stack.enter_context(zenith(directories[0])),
                stack.enter_context(stock(directories[1], SAFEKEEPERS)),
                stack.enter_context(stock(directories[2], 0)),
            ]
            for server in running:
                initialize(server.postgres, scale)
            yield dict(zip(VARIANTS, running, strict=True))
    finally:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def show(script: str, clients: int, rounds: Sequence[dict[str, Figures]]) -> None:
    """Print the medians of one workload, and Zenith's ratios."""
    print(f"\n{script}, {clients} clients:")
    medians: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        figures = [turns[name] for turns in rounds]
        median = {
            "tps": statistics.median(f.tps for f in figures),
            "p50": statistics.median(f.p50 for f in figures),
            "p99": statistics.median(f.p99 for f in figures),
        }
        medians[name] = median
        cpu = {
            process: statistics.median(f.cpu[process] for f in figures)
            for process in figures[0].cpu
        }
        parts = ", ".join(f"{process} {micros:.0f}" for process, micros in cpu.items())
        print(
            f"  {name:12} {median['tps']:7.0f} tps   p50 {median['p50']:6.2f} ms   "
            f"p99 {median['p99']:6.2f} ms   us CPU: {parts}"
        )
    summary: dict[str, object] = {"script": script, "clients": clients}
    for other in VARIANTS[1:]:
        ratios = sorted(turns["zenith"].tps / turns[other].tps for turns in rounds)
        middle = statistics.median(ratios)
        print(
            f"  tps: zenith / {other} = {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
            f"p99: {medians['zenith']['p99'] / medians[other]['p99']:.2f}"
        )
        summary[f"zenith/{other}"] = round(middle, 3)
    print(json.dumps(summary), flush=True)


def main() -> None:
    """Run the variants in turn, several rounds, and compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the data goes")
    add("--clients", type=int, nargs="+", default=[1, 8, 32])
    add("--script", nargs="+", default=["tpcb-like", "simple-update"], help="pgbench's, built in")
    add("--seconds", type=int, default=10, help="length of a turn")
    add("--rounds", type=int, default=5)
    add("--scale", type=int, default=32, help="pgbench's; as many as clients, or they collide")
    add("--quick", action="store_true", help="TPC-B of 1 and 8 clients, 3 rounds of 3 seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clients, arguments.script = [1, 8], ["tpcb-like"]
        arguments.seconds, arguments.rounds = 3, 3
    workloads = [(s, c) for s in arguments.script for c in arguments.clients]
    results: dict[tuple[str, int], list[dict[str, Figures]]] = {w: [] for w in workloads}
    with servers(arguments.dir, arguments.scale) as running:
        for number in range(arguments.rounds):
            for workload in workloads:
                # Whoever comes first has the disk's cache, or its backlog: take turns.
                order = [VARIANTS[(number + i) % len(VARIANTS)] for i in range(len(VARIANTS))]
                results[workload].append(
                    {n: turn(running[n], *workload, arguments.seconds) for n in order}
                )
    for workload, rounds in results.items():
        show(*workload, rounds)


if __name__ == "__main__":
    main()
