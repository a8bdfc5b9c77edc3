"""Benchmark of commits: pgbench over a quorum of safekeepers and over stock replication.

Run as a script. In the same run, on the same disk: Postgres with three safekeepers that fsync,
stock Postgres (fsync on) with ANY 2 of three `pg_receivewal --synchronous`, and stock Postgres
without replication. Prints transactions per second and ratios; `--profile` adds CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_unit.walproposer_support import SUPERUSER, Postgres, wait_until, wal_cluster

from zenith_utils.os_user import give, popen_kwargs

SAFEKEEPERS = 3
QUORUM = 2
STOCK = ("fsync=on", "full_page_writes=on")
COMMON = ("shared_buffers=256MB", "max_wal_size=4GB", "autovacuum=off")
Running = contextlib.AbstractContextManager[tuple[Postgres, dict[str, int]]]


def pgbench(postgres: Postgres, clients: int, seconds: int, script: str) -> float:
    """Transactions per second."""
    output = subprocess.run(
        [
            *(postgres.distrib.bin_dir / "pgbench", "-h", postgres.directory, "-n"),
            *("-p", str(postgres.port), "-U", SUPERUSER, "-M", "prepared", "-b", script),
            *("-c", str(clients), "-j", "1", "-T", str(seconds), "postgres"),
        ],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    match = re.search(r"tps = ([0-9.]+)", output)
    assert match is not None, output
    return float(match[1])


def initialize(postgres: Postgres, scale: int) -> None:
    """Create pgbench's tables."""
    subprocess.run(
        [
            *(postgres.distrib.bin_dir / "pgbench", "-h", postgres.directory, "-i", "-q"),
            *("-p", str(postgres.port), "-U", SUPERUSER, "-s", str(scale), "postgres"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip


@contextlib.contextmanager
def zenith(directory: Path) -> Iterator[tuple[Postgres, dict[str, int]]]:
    """Three safekeepers with fsync; Postgres as on a compute."""
    with wal_cluster(directory, SAFEKEEPERS, sync=True) as cluster:
        postgres, proposer = cluster.start(*COMMON)
        processes = {"walproposer": proposer, **{f"sk{s.id}": s for s in cluster.safekeepers}}
        yield (
            postgres,
            {name: p.process.pid for name, p in processes.items() if p.process is not None},
        )


@contextlib.contextmanager
def stock(directory: Path, receivers: int) -> Iterator[tuple[Postgres, dict[str, int]]]:
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
        pids = {name: child.pid for name, child in zip(names, children, strict=True)}
        yield postgres, pids
    finally:
        postgres.kill(3)
        for child in children:
            child.kill()
            child.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children so far, user and system."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stats[int(path.parent.name)] = path.read_text().rsplit(")", 1)[1].split()
    # Field 2 is the parent; 12 to 15 are the process' own times and those of ended children.
    ticks = sum(int(field) for field in stats[pid][11:15])
    for fields in stats.values():
        if int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    postgres: Postgres, pids: dict[str, int], arguments: argparse.Namespace
) -> dict[str, float]:
    """TPS per number of clients; CPU in microseconds per transaction with --profile."""
    initialize(postgres, arguments.scale)
    assert postgres.process is not None
    pids = {**pids, "postgres": postgres.process.pid}
    result = {}
    for clients in arguments.clients:
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        tps = pgbench(postgres, clients, arguments.seconds, arguments.script)
        result[f"c={clients}"] = tps
        if arguments.profile:
            used = {
                name: 1e6 * (cpu_seconds(pid) - before[name]) / (tps * arguments.seconds)
                for name, pid in pids.items()
            }
            used["in all"] = sum(used.values())
            parts = ", ".join(f"{name} {micros:.0f}" for name, micros in used.items())
            print(f"    c={clients}: us CPU per transaction: {parts}")
    return result


def main() -> None:
    """Run the variants in turn, several rounds, and compare medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=int, default=10)
    parser.add_argument("--script", default="tpcb-like", choices=["tpcb-like", "simple-update"])
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    variants: dict[str, Callable[[Path], Running]] = {
        "zenith": zenith,
        "stock_quorum": lambda d: stock(d, SAFEKEEPERS),
        "stock_alone": lambda d: stock(d, 0),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            directory = Path(tempfile.mkdtemp(prefix="bench-commit-", dir=arguments.dir))
            try:
                with variant(directory) as (postgres, pids):
                    results[name].append(measure(postgres, pids, arguments))
                print(name, {key: round(tps) for key, tps in results[name][-1].items()})
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    for key in medians["zenith"]:
        summary = {
            "clients": key,
            **{name: round(medians[name][key]) for name in variants},
            "zenith/stock_quorum": round(medians["zenith"][key] / medians["stock_quorum"][key], 2),
            "zenith/stock_alone": round(medians["zenith"][key] / medians["stock_alone"][key], 2),
        }
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
