"""Benchmark of the layer store: values into the open layer, then into a durable L0 delta.

Run as a script; prints MiB/s of values for each step and for both together, by elapsed time and by
CPU time, and the time of lookups in what was written. The file goes to --dir, which should be on
the disk to be measured. Rounds share their memory as the layers of a server do: the first one, in
fresh memory, is given as well.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.resources import StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from zenith_utils.ids import TenantId, TimelineId

MIB = 1 << 20
FLAGS_IMAGE = 1
START_LSN = 0x1000000
SETTINGS = StoreSettings(checkpoint_distance=1 << 40, max_open_layer_size=1 << 40)


def no_redo(needed: Sequence[ReconstructInput]) -> list[bytes]:
    raise AssertionError(f"the benchmark stores images only, got {needed[0].records}")


def block_key(number: int) -> bytes:
    """A key as those of relation blocks: the number in its last four bytes."""
    return bytes.fromhex("00000006750000340500004000" + "00") + number.to_bytes(4, "big")


def make_timeline(path: Path, resources: StoreResources) -> Timeline:
    repository = Repository(path, TenantId.generate(), SETTINGS, no_redo, resources=resources)
    timeline = repository.create_timeline(TimelineId.generate(), initdb_lsn=START_LSN)
    timeline.import_image_layer(START_LSN, [(block_key(0), b"x")])
    return timeline


def percentiles_us(call: Callable[[int], object], arguments: list[int]) -> tuple[float, float]:
    """p50 and p99 of the time of a call, in microseconds."""
    times = []
    for argument in arguments:
        begin = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def lookups(timeline: Timeline, numbers: list[int]) -> str:
    """Single and batched lookups of values that exist."""
    lsn = timeline.last_record_lsn
    p50, p99 = percentiles_us(lambda n: timeline.get(block_key(n), lsn), numbers)
    batch50, _batch99 = percentiles_us(
        lambda n: timeline.get_vectored([block_key(n + i) for i in range(64)], lsn), numbers[::10]
    )
    return f"get p50 {p50:.1f} us p99 {p99:.1f} us, 64 keys p50 {batch50:.0f} us"


def measure(
    directory: Path, title: str, size: int, total: int, order: Callable[[int], int], rounds: int
) -> None:
    """Store `total` bytes in values of `size` whose keys come in the given order."""
    count = total // size
    keys = b"".join(block_key(order(i)) for i in range(count))
    lsns = array("Q", (START_LSN + 8 + 8 * i for i in range(count)))
    values = memoryview(os.urandom(MIB) * (total // MIB + 1))[: count * size]
    resources = StoreResources.own(SETTINGS)
    first = 0.0
    best = (float("inf"), float("inf"))
    best_cpu = float("inf")
    wanted = [order(random.randrange(count)) for _ in range(2000)]
    found = ""
    for _ in range(rounds):
        path = Path(tempfile.mkdtemp(dir=directory))
        timeline = make_timeline(path, resources)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        with timeline.writer() as writer:
            writer.open_layer.put_many(keys, lsns, FLAGS_IMAGE, values)
            writer.advance(lsns[-1], 0)
        put = time.perf_counter() - begin
        timeline.checkpoint()
        took = time.perf_counter() - begin
        first = first or took
        best = min(best, (took, put))
        best_cpu = min(best_cpu, time.process_time() - begin_cpu)
        found = lookups(timeline, wanted)
        timeline.shutdown(flush=False)
        shutil.rmtree(path)
    whole, put = best
    mib = count * size / MIB
    print(
        f"{title:24} {mib:6.0f} MiB: put {mib / put:6.0f} MiB/s, "
        f"freeze + flush {mib / (whole - put):6.0f} MiB/s, together {mib / whole:6.0f} MiB/s, "
        f"{mib / first:6.0f} the first time, {mib / best_cpu:6.0f} MiB per CPU second; "
        f"{found}"
    )


def measure_raw_disk(directory: Path, total: int) -> None:
    """What a plain file of the same size takes, for comparison."""
    data = os.urandom(MIB)
    path = directory / "raw"
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(total // MIB):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        best = min(best, time.perf_counter() - begin)
        path.unlink()
    print(f"{'plain file with fsync':24} {total // MIB:6} MiB: {total / MIB / best:6.0f} MiB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=128, help="MiB of values")
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    options = parser.parse_args()
    total = options.mib * MIB
    directory = Path(tempfile.mkdtemp(prefix="bench-layer-store-", dir=options.dir))
    count = total // 100
    shuffled = list(range(count))
    random.Random(1).shuffle(shuffled)
    try:
        measure_raw_disk(directory, total)
        rounds = options.rounds
        measure(directory, "100 bytes, sequential", 100, total, lambda i: i, rounds)
        measure(directory, "100 bytes, random", 100, total, lambda i: shuffled[i], rounds)
        measure(directory, "100 bytes, 1000 keys", 100, total, lambda i: i % 1000, rounds)
        measure(directory, "8192 bytes, sequential", 8192, total, lambda i: i, rounds)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
