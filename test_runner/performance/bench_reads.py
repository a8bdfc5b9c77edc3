"""Benchmark of reads: through many layers and ancestors, in batches, by many threads.

Run as a script; files are in the cache of the operating system, and what is read once more comes
from the block cache. Values are images of 8 kB, in the page cache cases made of records.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from zenith_utils.ids import TenantId, TimelineId

T = TypeVar("T")
FLAGS_IMAGE, FLAGS_RECORD = 1, 2
START_LSN = 0x1000000
BLOCKS = 4096
PAGE = bytes(range(256)) * 32


def last_record(needed: Sequence[ReconstructInput]) -> list[bytes]:
    """Redo that costs nothing."""
    return [PAGE for _ in needed]


def block_key(number: int, relation: int = 0x4000) -> bytes:
    """A key as those of relation blocks: the number in its last four bytes."""
    return b"\0\0\0\x06\x75\0\0\x34\x05%b\0%b" % (
        relation.to_bytes(4, "big"),
        number.to_bytes(4, "big"),
    )


def report(title: str, call: Callable[[T], object], arguments: Iterable[T]) -> None:
    """p50 and p99 of the time of a call, in microseconds."""
    times = []
    for argument in arguments:
        begin = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - begin) * 1e6)
    p99 = statistics.quantiles(times, n=100)[98]
    print(f"{title:52} p50 {statistics.median(times):7.1f} us   p99 {p99:7.1f} us")


def write(timeline: Timeline, keys: Sequence[bytes], flags: int = FLAGS_IMAGE) -> None:
    """One value for each of the keys, a durable layer of them."""
    lsn = int(timeline.last_record_lsn)
    lsns = array("Q", (lsn + 8 + 8 * i for i in range(len(keys))))
    with timeline.writer() as writer:
        writer.open_layer.put_many(b"".join(keys), lsns, flags, PAGE * len(keys))
        writer.advance(lsns[-1], 0)
    timeline.checkpoint()


def write_around(timeline: Timeline) -> None:
    """A layer with keys before and after those that are read, as one of a busy timeline has."""
    write(timeline, [block_key(i, relation) for relation in (0x3FFF, 0x4001) for i in range(50)])


def gets(title: str, timeline: Timeline, numbers: Sequence[int]) -> None:
    """Single and batched reads."""
    lsn = int(timeline.last_record_lsn)
    report(f"get, {title}", lambda n: timeline.get(block_key(n), lsn), numbers)
    report(
        f"64 keys, {title}",
        lambda n: timeline.get_vectored([block_key(n + i) for i in range(64)], lsn),
        numbers[::8],
    )


def many_threads(timeline: Timeline, numbers: Sequence[int], threads: int) -> float:
    """Reads per second of all threads together."""
    lsn = int(timeline.last_record_lsn)
    start = threading.Barrier(threads + 1)

    def read() -> None:
        start.wait()
        for number in numbers:
            timeline.get(block_key(number), lsn)

    running = [threading.Thread(target=read) for _ in range(threads)]
    for thread in running:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in running:
        thread.join()
    return threads * len(numbers) / (time.perf_counter() - begin)


def measure(repository: Repository, calls: int) -> None:
    """All cases, each on top of the one before."""
    rng = random.Random(1)
    numbers = [rng.randrange(BLOCKS - 64) for _ in range(calls)]
    timeline = repository.create_timeline(TimelineId.generate(), initdb_lsn=START_LSN)
    blocks = [(block_key(number), PAGE) for number in range(BLOCKS)]
    timeline.import_image_layer(START_LSN, blocks)
    gets("image layer", timeline, numbers)
    for threads in (1, 2, 8):
        print(f"{threads} threads: {many_threads(timeline, numbers, threads):.0f} reads/s")
    for _ in range(50):
        write_around(timeline)
    gets("below 50 L0 deltas without the key", timeline, numbers)

    branch = timeline
    for _ in range(10):
        branch = repository.branch_timeline(
            TimelineId.generate(),
            ancestor_id=branch.timeline_id,
            start_lsn=int(branch.last_record_lsn),
        )
        write_around(branch)
    child = timeline
    for _ in range(10):
        child = repository.branch_timeline(
            TimelineId.generate(), ancestor_id=child.timeline_id, start_lsn=START_LSN
        )
    gets("10 ancestors without layers", child, numbers)
    gets("10 ancestors with a layer each, then 50 L0", branch, numbers)

    write(timeline, [block_key(number) for number in range(BLOCKS)], FLAGS_RECORD)
    gets("reconstructed, then from the page cache", timeline, numbers)
    gets("from the page cache", timeline, numbers)
    for threads in (1, 2, 8):
        print(f"{threads} threads: {many_threads(timeline, numbers, threads):.0f} reads/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--calls", type=int, default=4000)
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)  # as the pageserver does
    directory = Path(tempfile.mkdtemp(prefix="bench-reads-", dir=options.dir))
    settings = StoreSettings(checkpoint_distance=1 << 40, page_cache_size=256 << 20)
    repository = Repository(directory, TenantId.generate(), settings, last_record)
    try:
        measure(repository, options.calls)
    finally:
        repository.shutdown(flush=False)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
