"""Speed of WAL redo: one page at a time, in batches, and for several callers at once.

Run as a script. Records come from a small workload on a server of its own, so chains are real:
heap updates, btree insertions, page images as CREATE INDEX logs them, 32 in one record, and one
row that is updated over and over. What is measured is `WalRedoPool.redo()`: from the pageserver to
a redo process and back.

The bound of a case is what its CPU time per page would allow if all CPUs did nothing else; waiting
that keeps a CPU busy counts as work there.
"""

import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pageserver.walredo import RedoRequest, WalRedoPool
from pgxn.build import build_module
from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.relfile import MAIN_FORKNUM, RelTag
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecoder
from zenith_utils.os_user import give, popen_kwargs

BATCH = 64
LENGTHS = (1, 5, 20, 100)
LONG = (100, 1000, 10_000)
CALLERS = (1, 2, 8)
CPUS = len(os.sched_getaffinity(0))
BULK = 512
BULK_CALLERS = (0, 1, 2, 8)
SINGLES = 1000
SINGLES_PAUSE = 0.0005  # seconds between pages: somebody who uses them
ROUNDS = 5
ROUND_SECONDS = 0.5
SWITCH_INTERVAL = 0.0005  # that of the pageserver
SETTINGS = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "wal_keep_size": "4GB"}
WORKLOAD = (
    "CREATE TABLE t (id int, n int, filler char(80)) WITH (fillfactor = 50);\n\n"
    "INSERT INTO t SELECT g, 0, '' FROM generate_series(1, 4000) g;\n\n"
    + "UPDATE t SET n = n + 1;\n\n"
    * 3
    + "CREATE TABLE keys (id int PRIMARY KEY);\n\n"
    "INSERT INTO keys SELECT g * 7919 % 200003 FROM generate_series(1, 60000) g;\n\n"
    "CREATE INDEX images ON keys USING spgist ((md5(id::text)));\n\n"
    "CREATE TABLE one (n int);\n\n"
    "INSERT INTO one VALUES (0);\n\n" + "UPDATE one SET n = n + 1;\n\n" * max(LONG)
)

Chain = list[tuple[int, bytes]]


def record_wal(distrib: PgDistrib, root: Path) -> tuple[bytes, dict[tuple[RelTag, int], Chain]]:
    """Run the workload; the control file and the records of each page since it was made."""
    data = root / "data"

    def run(program: str, *arguments: str, text: str = "") -> None:
        command = [str(distrib.bin_dir / program), *arguments]
        subprocess.run(
            command,
            input=text,
            text=True,
            check=True,
            capture_output=True,
            cwd="/",
            **popen_kwargs(),
        )

    run("initdb", "-N", "-D", str(data))
    control_file = (data / "global/pg_control").read_bytes()
    (start,) = struct.unpack_from("<Q", control_file, 32)
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    run("postgres", "--single", "-j", *options, "-D", str(data), "postgres", text=WORKLOAD)
    (end,) = struct.unpack_from("<Q", (data / "global/pg_control").read_bytes(), 32)

    chains: dict[tuple[RelTag, int], Chain] = {}
    decoder = WalDecoder(start)
    for segno in range(start >> 24, (end >> 24) + 1):
        segment = (data / "pg_wal" / f"00000001{segno >> 8:08X}{segno & 0xFF:08X}").read_bytes()
        decoder.feed(segment[max(start - (segno << 24), 0) :])
        while (record := decoder.next_record()) is not None and record.start_lsn < end:
            for block in record.blocks:
                if block.will_init or block.apply_image:
                    chains[block.rel, block.blkno] = []
                if (block.rel, block.blkno) in chains:
                    chains[block.rel, block.blkno].append((record.end_lsn, record.raw))
            if record.end_lsn >= end:
                break
    return control_file, chains


def requests_of(
    pool: WalRedoPool, chains: dict[tuple[RelTag, int], Chain], rmid: Rmgr, length: int
) -> list[RedoRequest]:
    """Requests of so many records each, on base images made by redo of the records before."""
    found = []
    for (rel, blkno), chain in chains.items():
        split = len(chain) - length
        usable = rel.forknum == MAIN_FORKNUM and split > 0
        if not usable or any(raw[17] != rmid for _, raw in chain[split:]):
            continue
        (base,) = pool.redo([RedoRequest(*rel, blkno, None, chain[:split])])
        found.append(RedoRequest(*rel, blkno, base, chain[split:]))
        if len(found) == BATCH:
            break
    return found


def image_requests(chains: dict[tuple[RelTag, int], Chain]) -> list[RedoRequest]:
    """Pages whose only record is one with the images of many pages."""
    return [
        RedoRequest(*rel, blkno, None, chain)
        for (rel, blkno), chain in chains.items()
        if len(chain) == 1 and chain[0][1][17] == Rmgr.XLOG and len(chain[0][1]) > 50_000
    ][:BATCH]


def measure(pool: WalRedoPool, requests: list[RedoRequest]) -> tuple[float, float, float]:
    """(p50, p99) of one page in microseconds, and pages per second in batches."""
    singles = []
    for i in range(max(2000, len(requests))):
        request = [requests[i % len(requests)]]
        started = time.perf_counter()
        pool.redo(request)
        singles.append((time.perf_counter() - started) * 1e6)
    batch = (requests * (BATCH // len(requests) + 1))[:BATCH]
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(5):
            pool.redo(batch)
        best = min(best, (time.perf_counter() - started) / 5)
    quantiles = statistics.quantiles(singles, n=100)
    return quantiles[49], quantiles[98], BATCH / best


@dataclass(frozen=True, slots=True)
class Load:
    """What several callers got in one round; CPU times are microseconds per page."""

    rate: float
    cpu: float
    redo_cpu: float
    switches: float


def redo_cpu(pool: WalRedoPool) -> float:
    """CPU time of the pool's processes in seconds."""
    return sum(
        int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9
        for process in pool._live
    )


def measure_callers(
    pool: WalRedoPool, requests: list[RedoRequest], callers: int, batch: int
) -> Load:
    """One round of so many threads, each of which asks for batches in a loop."""
    counts = [0] * callers
    start = threading.Barrier(callers + 1)
    stop = threading.Event()

    def call(caller: int) -> None:
        shift = caller * len(requests) // callers
        own = (requests[shift:] + requests[:shift]) * (batch // len(requests) + 1)
        batches = [own[i : i + batch] for i in range(0, len(own) - batch + 1, batch)]
        start.wait()
        while not stop.is_set():
            for group in batches:
                pool.redo(group)
                counts[caller] += batch

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    start.wait()
    before, redo_before = resource.getrusage(resource.RUSAGE_SELF), redo_cpu(pool)
    started = time.perf_counter()
    time.sleep(ROUND_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    after, pages = resource.getrusage(resource.RUSAGE_SELF), sum(counts)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    return Load(
        pages / seconds,
        cpu / pages * 1e6,
        (redo_cpu(pool) - redo_before) / pages * 1e6,
        switches / pages,
    )


def report_callers(pool: WalRedoPool, name: str, requests: list[RedoRequest]) -> None:
    """One line per number of callers and size of batches; rounds alternate between them."""
    cases = [(callers, batch) for batch in (1, BATCH) for callers in CALLERS]
    rounds = [
        {case: measure_callers(pool, requests, *case) for case in cases} for _ in range(ROUNDS)
    ]
    for callers, batch in cases:
        loads = [loads[callers, batch] for loads in rounds]
        best = max(loads, key=lambda load: load.rate)
        ratio = best.rate / max(loads[1, batch].rate for loads in rounds)
        print(
            f"{name:<18}{callers:>8}{batch:>6}{best.rate:>10,.0f}"
            f"{statistics.median(load.rate for load in loads):>10,.0f}{ratio:>7.2f}"
            f"{best.cpu:>12.1f}{best.redo_cpu:>8.1f}{best.switches:>10.2f}"
            f"{1e6 / (best.cpu + best.redo_cpu):>12,.0f}"
            f"{1e6 * CPUS / (best.cpu + best.redo_cpu):>10,.0f}"
        )


def report_beside_bulk(
    pool: WalRedoPool, single: list[RedoRequest], bulk: list[RedoRequest]
) -> None:
    """Latency of one page while others rebuild hundreds at a time, as for image layers."""
    for callers in BULK_CALLERS:
        stop = threading.Event()

        def rebuild(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                pool.redo(bulk)

        threads = [threading.Thread(target=rebuild) for _ in range(callers)]
        for thread in threads:
            thread.start()
        times = []
        try:
            for i in range(SINGLES):
                started = time.perf_counter()
                pool.redo([single[i % len(single)]])
                times.append((time.perf_counter() - started) * 1e6)
                time.sleep(SINGLES_PAUSE)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        quantiles = statistics.quantiles(times, n=100)
        print(f"{callers:>12}{quantiles[49]:>10,.0f}{quantiles[98]:>10,.0f}")


def report_long_chain(pool: WalRedoPool, rel: RelTag, chain: Chain) -> None:
    """The time of one page, for growing parts of its chain."""
    for length in LONG:
        request = RedoRequest(*rel, 0, None, chain[:length])
        times = []
        for _ in range(7):
            started = time.perf_counter()
            pool.redo([request])
            times.append((time.perf_counter() - started) * 1e6)
        print(
            f"{f'one row x {length}':<18}{min(times):>10,.0f}{statistics.median(times):>10,.0f}"
            f"{min(times) / length:>12.2f}"
        )


def main() -> None:
    """Print one line per measurement."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    distrib = find_distrib()
    root = Path(tempfile.mkdtemp(prefix="bench-walredo-"))
    root.chmod(0o755)
    give(root)
    try:
        control_file, chains = record_wal(distrib, root)
        pool = WalRedoPool(
            distrib, build_module(distrib, "walredo"), root / "redo", control_file=control_file
        )
        started = time.perf_counter()
        pool.redo([RedoRequest(1663, 1, 1, 0, 0, None, [])])
        print(f"start to first answer: {(time.perf_counter() - started) * 1e3:.0f} ms")
        print(f"{'chain':<18}{'p50 us':>8}{'p99 us':>8}{'pages/s in batches of ' + str(BATCH):>30}")
        cases = {
            f"{r.name.lower()} x {n}": requests_of(pool, chains, r, n)
            for r in (Rmgr.HEAP, Rmgr.BTREE)
            for n in LENGTHS
        }
        cases["one image of 32"] = image_requests(chains)
        for name, requests in cases.items():
            p50, p99, rate = measure(pool, requests)
            print(f"{name:<18}{p50:>8.1f}{p99:>8.1f}{rate:>30,.0f}")

        print(
            f"\n{'chain':<18}{'callers':>8}{'batch':>6}{'pages/s':>10}{'median':>10}{'ratio':>7}"
            f"{'us CPU/page':>12}{'redo':>8}{'switches':>10}{'pages/CPU s':>12}{'bound':>10}"
        )
        for name in ("heap x 1", "heap x 20", "btree x 20"):
            report_callers(pool, name, cases[name])

        bulk = (cases["heap x 20"] * (BULK // len(cases["heap x 20"]) + 1))[:BULK]
        print(f"\n{'bulk callers':>12}{'p50 us':>10}{'p99 us':>10}   (one page of heap x 5)")
        report_beside_bulk(pool, cases["heap x 5"], bulk)

        print(f"\n{'chain':<18}{'best us':>10}{'median':>10}{'us/record':>12}")
        (rel, _), chain = max(chains.items(), key=lambda item: len(item[1]))
        report_long_chain(pool, rel, chain)
        pool.close()
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
