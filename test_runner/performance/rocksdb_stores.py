"""The data and the two stores that bench_rocksdb.py compares. Not a benchmark itself."""

from __future__ import annotations

import importlib
import random
import shutil
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from performance.store_workload import (
    FIRST_RELATION,
    FLAGS_IMAGE,
    MIB,
    START_LSN,
    KeyRange,
    Maintainer,
    block_key,
    size_on_disk,
)

from pageserver.layered_repository.timeline import Timeline

try:
    rocksdict: Any = importlib.import_module("rocksdict")
except ImportError:
    raise SystemExit(
        "this benchmark needs rocksdict: install it with .venv/bin/pip install -e '.[bench]'"
    ) from None

RELATIONS = 16
VERSIONS = 4
VALUES_IN_BATCH = 64
KEY_SIZE = 18
LAST_LSN = (1 << 64) - 1

# ---- the data


@dataclass(frozen=True, slots=True)
class Batch:
    """Values of one size."""

    keys: list[bytes]
    lsns: array[int]
    values: bytes


@dataclass(frozen=True, slots=True)
class DataSet:
    """Every key in every version; a version of all keys, in random order, comes after the other."""

    name: str
    keys: list[list[bytes]]
    """By relation."""
    batches: list[Batch]
    size: int
    """Bytes of all values."""

    @property
    def last_lsn(self) -> int:
        """The LSN of the newest value."""
        return self.batches[-1].lsns[-1]

    @property
    def middle_lsn(self) -> int:
        """The LSN after which half of the versions come."""
        return self.batches[len(self.batches) // 2].lsns[0] - 8

    def keyspace(self, _lsn: int) -> list[KeyRange]:
        """The ranges of all keys."""
        last = len(self.keys[0])
        return [
            (block_key(0, FIRST_RELATION + i), block_key(last, FIRST_RELATION + i))
            for i in range(RELATIONS)
        ]

    def sample(self, count: int, first_lsn: int, last_lsn: int) -> list[tuple[bytes, int]]:
        """Random keys, each with a random LSN between the two."""
        rng = random.Random(2)
        return [
            (rng.choice(rng.choice(self.keys)), rng.randrange(first_lsn, last_lsn + 1, 8))
            for _ in range(count)
        ]


def make_data(
    name: str, total: int, size_of: Callable[[int], int], value: Callable[[int, int, int], bytes]
) -> DataSet:
    """About `total` bytes; `size_of(batch number)`, `value(key number, version, size)`."""
    mean = statistics.mean(size_of(i) for i in range(100))
    count = max(int(total / mean) // (RELATIONS * VERSIONS), 1)  # in a relation
    keys = [[block_key(i, FIRST_RELATION + r) for i in range(count)] for r in range(RELATIONS)]
    numbers = list(range(RELATIONS * count))
    rng = random.Random(1)
    batches: list[Batch] = []
    lsn = START_LSN
    for version in range(VERSIONS):
        rng.shuffle(numbers)
        for start in range(0, len(numbers), VALUES_IN_BATCH):
            chosen = numbers[start : start + VALUES_IN_BATCH]
            size = size_of(len(batches))
            batches.append(
                Batch(
                    [keys[n // count][n % count] for n in chosen],
                    array("Q", range(lsn + 8, lsn + 8 + 8 * len(chosen), 8)),
                    b"".join(value(n, version, size) for n in chosen),
                )
            )
            lsn = batches[-1].lsns[-1]
    return DataSet(name, keys, batches, sum(len(batch.values) for batch in batches))


# ---- the two stores


class Store(Protocol):
    """What is compared."""

    def load(self, data: DataSet) -> tuple[float, float]:
        """Make everything durable; seconds elapsed, and of CPU."""

    def compact(self) -> None:
        """Bring all history into its best form."""

    def get(self, key: bytes, lsn: int) -> bytes:
        """The newest value at or below an LSN."""

    def scans(self) -> list[Callable[[list[bytes], int], list[bytes]]]:
        """Ways to get the values of adjacent keys at an LSN."""

    def size(self) -> int:
        """Bytes on disk."""


@contextmanager
def timed(result: list[float]) -> Iterator[None]:
    """Appends the seconds elapsed and those of CPU."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    yield
    result += [time.perf_counter() - begin, time.process_time() - begin_cpu]


class ZenithStore:
    """A timeline."""

    def __init__(self, timeline: Timeline, data: DataSet) -> None:
        self._timeline = timeline
        self._data = data
        self.get = timeline.get

    def load(self, data: DataSet) -> tuple[float, float]:
        """Make everything durable."""
        joined = [(b"".join(batch.keys), batch.lsns, batch.values) for batch in data.batches]
        times: list[float] = []
        with timed(times):
            with self._timeline.writer() as writer:
                for keys, lsns, values in joined:
                    writer.open_layer.put_many(keys, lsns, FLAGS_IMAGE, values)
                    writer.advance(lsns[-1], 0)
            self._timeline.checkpoint()
        return times[0], times[1]

    def forget(self, data: DataSet) -> None:
        """Give up the older half of history."""
        horizon = data.last_lsn - data.middle_lsn
        Maintainer(self._timeline, data.keyspace, horizon=horizon).until_at_rest()

    def load_and_collect(self, data: DataSet) -> None:
        """The same with compaction all the time, in the end without the older half of history."""
        maintainer = Maintainer(self._timeline, data.keyspace, horizon=None)
        flush_after = max(len(data.batches) // 40, 1)
        for number, batch in enumerate(data.batches):
            with self._timeline.writer() as writer:
                writer.open_layer.put_many(
                    b"".join(batch.keys), batch.lsns, FLAGS_IMAGE, batch.values
                )
                writer.advance(batch.lsns[-1], 0)
            if number % flush_after == 0:
                self._timeline.checkpoint()
                maintainer.round()
        self.forget(data)

    def compact(self) -> None:
        """Bring all history into its best form."""
        self._timeline.compact(self._data.keyspace, force=True)

    def scans(self) -> list[Callable[[list[bytes], int], list[bytes]]]:
        """One way."""

        def batches(keys: list[bytes], lsn: int) -> list[bytes]:
            found: list[bytes] = []
            for start in range(0, len(keys), 256):
                found += filter(None, self._timeline.get_vectored(keys[start : start + 256], lsn))
            return found

        return [batches]

    def size(self) -> int:
        """Bytes on disk."""
        return size_on_disk(self._timeline.directory.path)


def composite(key: bytes, lsn: int) -> bytes:
    """RocksDB's key of a version: newer ones come first."""
    return key + (LAST_LSN - lsn).to_bytes(8, "big")


class RocksStore:
    """A RocksDB database. `compression`: "default" or a name of RocksDB's."""

    def __init__(
        self, path: Path, compression: str, cache: int, buffer: int, *, vector: bool = False
    ) -> None:
        self._path = path
        self._db = rocksdict.Rdict(str(path), self._options(compression, cache, buffer, vector))
        self._writing = rocksdict.WriteOptions()
        self._writing.disable_wal = True
        self._iterator: Any = None

    @staticmethod
    def _options(compression: str, cache: int, buffer: int, vector: bool) -> Any:
        table = rocksdict.BlockBasedOptions()
        table.set_block_cache(rocksdict.Cache(cache))
        table.set_block_size(8192)
        table.set_format_version(5)
        table.set_bloom_filter(10, False)
        options = rocksdict.Options(raw_mode=True)
        options.set_block_based_table_factory(table)
        options.set_prefix_extractor(rocksdict.SliceTransform.create_fixed_prefix(KEY_SIZE))
        options.set_write_buffer_size(buffer)
        options.set_max_write_buffer_number(4)
        options.set_max_background_jobs(2)
        options.set_max_subcompactions(2)
        # As long as data comes in; compaction then takes everything at once.
        options.set_disable_auto_compactions(True)
        options.set_level_zero_slowdown_writes_trigger(1 << 30)
        options.set_level_zero_stop_writes_trigger(1 << 30)
        if vector:
            options.set_allow_concurrent_memtable_write(False)
            options.set_memtable_factory(rocksdict.MemtableFactory.vector())
        if compression != "default":
            options.set_compression_type(getattr(rocksdict.DBCompressionType, compression)())
        return options

    def load(self, data: DataSet) -> tuple[float, float]:
        """Make everything durable."""
        batches = []
        count = max(MIB // len(data.batches[0].values), 1)
        for start in range(0, len(data.batches), count):
            prepared = rocksdict.WriteBatch(raw_mode=True)
            for batch in data.batches[start : start + count]:
                size = len(batch.values) // len(batch.keys)
                for i, (key, lsn) in enumerate(zip(batch.keys, batch.lsns, strict=True)):
                    prepared.put(composite(key, lsn), batch.values[i * size : (i + 1) * size])
            batches.append(prepared)
        times: list[float] = []
        with timed(times):
            for prepared in batches:
                self._db.write(prepared, self._writing)
            self._db.flush(True)
        return times[0], times[1]

    def compact(self) -> None:
        """Bring all history into its best form."""
        choice = rocksdict.CompactOptions()
        choice.set_bottommost_level_compaction(rocksdict.BottommostLevelCompaction.force())
        self._db.compact_range(None, None, choice)
        self._iterator = None

    def forget(self, data: DataSet) -> None:
        """Delete the versions that nobody sees who reads in the newer half of history."""
        dead = rocksdict.WriteBatch(raw_mode=True)
        kept: dict[bytes, int] = {}
        for batch in data.batches:
            for key, lsn in zip(batch.keys, batch.lsns, strict=True):
                if lsn <= data.middle_lsn:
                    if key in kept:
                        dead.delete(composite(key, kept[key]))
                    kept[key] = lsn
        self._db.write(dead, self._writing)
        self._db.flush(True)

    def get(self, key: bytes, lsn: int) -> bytes:
        """The newest value at or below an LSN."""
        iterator = self._iterator
        if iterator is None:
            reading = rocksdict.ReadOptions()
            reading.set_prefix_same_as_start(True)
            iterator = self._iterator = self._db.iter(reading)
        iterator.seek(composite(key, lsn))
        if not iterator.valid():
            raise KeyError(key)
        value: bytes = iterator.value()
        return value

    def scans(self) -> list[Callable[[list[bytes], int], list[bytes]]]:
        """A seek for each key, a scan over all."""

        def seeks(keys: list[bytes], lsn: int) -> list[bytes]:
            return [self.get(key, lsn) for key in keys]

        def scan(keys: list[bytes], lsn: int) -> list[bytes]:
            reading = rocksdict.ReadOptions()
            reading.set_total_order_seek(True)
            reading.set_iterate_upper_bound(keys[-1] + b"\xff" * 9)
            oldest = (LAST_LSN - lsn).to_bytes(8, "big")
            last, found = b"", []
            for full_key, value in self._db.items(from_key=keys[0], read_opt=reading):
                key = full_key[:KEY_SIZE]
                if key != last and full_key[KEY_SIZE:] >= oldest:
                    last = key
                    found.append(value)
            return found

        return [seeks, scan]

    def size(self) -> int:
        """Bytes on disk, in sorted files."""
        return sum(path.stat().st_size for path in self._path.glob("*.sst"))

    def close(self) -> None:
        """Close the database and delete it."""
        self._iterator = None
        self._db.close()
        shutil.rmtree(self._path)
