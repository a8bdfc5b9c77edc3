"""What overwriting costs: a data set of --mib is written --passes times, each time in random order.

A small checkpoint distance and GC horizon, and a thread that compacts and collects garbage while
values come in at --rate. Values do not compress. For each pass, and at the end when there is
nothing left to do:

- write amplification: bytes that the process wrote to files / bytes put until then;
- space amplification: bytes on disk / bytes of the live data set; besides the newest version of
  all keys the store has to keep the versions of the horizon;
- layers, memory (the peak is the largest of all time), and the time of a random read.

Run from the repository: ``PYTHONPATH=.:test_runner .venv/bin/python
test_runner/performance/bench_amplification.py --mib 1024``
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from performance.store_workload import (
    MIB,
    PAGE_SIZE,
    KeyRange,
    Maintainer,
    RandomValues,
    block_key,
    load_average,
    memory_of,
    new_timeline,
    opened,
    percentiles,
    put_values,
    size_on_disk,
    times_us,
)

from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline

BATCH = 64


def bytes_written() -> int:
    """By system calls of this process, all its life."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


class Bench:
    """One data set in one timeline."""

    def __init__(self, timeline: Timeline, options: argparse.Namespace) -> None:
        self._timeline = timeline
        self._options = options
        self.count = options.mib * MIB // options.value_size
        self._rng = random.Random(1)
        self.value = RandomValues(options.value_size)
        self._begin = time.perf_counter()
        self._written_before = bytes_written()
        self._put = 0
        self._print(f"{'':8}", "elapsed", "put", "write x", "space x", "l0", "delta", "image")
        print(f"{'RSS':>9} {'peak':>9} {'get p50':>9} {'p99':>9}")

    def keyspace(self, _lsn: int) -> list[KeyRange]:
        """The range of all keys."""
        return [(block_key(0), block_key(self.count))]

    def batches(self, version: int) -> Iterator[tuple[list[bytes], bytes]]:
        """All keys in random order with their values."""
        numbers = list(range(self.count))
        self._rng.shuffle(numbers)
        for start in range(0, self.count, BATCH):
            chosen = numbers[start : start + BATCH]
            values = b"".join(self.value(number, version) for number in chosen)
            yield [block_key(number) for number in chosen], values

    def overwrite(self, version: int) -> None:
        """One pass, not faster than the rate wanted."""
        wal = (self._options.value_size + 63) & ~7
        for keys, values in self.batches(version):
            put_values(self._timeline, keys, values, wal=wal)
            self._put += len(values)
            if self._options.rate:
                ahead = self._put / (self._options.rate * MIB)
                time.sleep(max(self._begin + ahead - time.perf_counter(), 0))

    def check(self, version: int) -> None:
        """Every key has its newest value."""
        lsn = int(self._timeline.last_record_lsn)
        for start in range(0, self.count, 256):
            numbers = range(start, min(start + 256, self.count))
            found = self._timeline.get_vectored([block_key(n) for n in numbers], lsn)
            assert found == [self.value(n, version) for n in numbers]

    def report(self, what: str) -> None:
        """A line of figures."""
        live = self.count * self._options.value_size
        kinds = {"l0": 0, "delta": 0, "image": 0}
        for layer in self._timeline.view.layers:
            kinds["image" if layer.is_image else "l0" if layer.name.is_l0 else "delta"] += 1
        lsn = int(self._timeline.last_record_lsn)
        wanted = [self._rng.randrange(self.count) for _ in range(1000)]
        p50, p99 = percentiles(times_us(lambda n: self._timeline.get(block_key(n), lsn), wanted))
        self._print(
            f"{what:8}",
            f"{time.perf_counter() - self._begin:.1f} s",
            f"{self._put / MIB:.0f} MiB",
            f"{(bytes_written() - self._written_before) / self._put:.2f}",
            f"{size_on_disk(self._timeline.directory.path) / live:.2f}",
            *map(str, kinds.values()),
        )
        memory = (memory_of(field=field) // MIB for field in ("VmRSS", "VmHWM"))
        print(*(f"{n:5} MiB" for n in memory), f"{p50:6.0f} us {p99:6.0f} us", flush=True)

    @staticmethod
    def _print(what: str, *columns: str) -> None:
        print(what, *(f"{column:>9}" for column in columns), end=" ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=256, help="MiB of live data")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--value-size", type=int, default=PAGE_SIZE)
    parser.add_argument("--rate", type=int, default=100, help="MiB/s of values; 0: no limit")
    parser.add_argument("--distance-mib", type=int, default=16, help="checkpoint distance")
    parser.add_argument("--horizon-mib", type=int, default=32, help="GC horizon")
    options = parser.parse_args()
    settings = StoreSettings(checkpoint_distance=options.distance_mib * MIB)
    print(load_average())
    with opened(options.dir, settings) as repository:
        timeline = new_timeline(repository)
        bench = Bench(timeline, options)
        maintainer = Maintainer(
            timeline, bench.keyspace, horizon=options.horizon_mib * MIB, period=0.25
        )
        with maintainer:
            for version in range(options.passes):
                bench.overwrite(version)
                bench.report(f"pass {version + 1}")
        maintainer.until_at_rest()
        bench.report("at rest")
        bench.check(options.passes - 1)


if __name__ == "__main__":
    main()
