"""Zenith's value store and RocksDB side by side: the same (key, LSN) -> value data in both.

RocksDB's key is the 18 bytes of Zenith's and the inverted LSN, big-endian: a seek to (key, LSN)
finds the newest version at or below it. Compared are, for pages of 8 kB and for records of 100 to
300 bytes, both in several versions of each key:

- ingest: from values in memory to durable sorted files, without a write-ahead log of the store's
  own (Zenith's WAL lies elsewhere). Both with prepared batches, so that no time goes into making
  them in Python, with small and with large write buffers, RocksDB also with its vector memtable
  for bulk loading; the best one of each counts, by elapsed time.
- reads, of everything compacted to one level with all history: single keys, where RocksDB has a
  bloom filter over the 18 bytes and one iterator for all reads, and the blocks of one relation,
  where RocksDB may choose between a seek for each key and a scan over all versions. Both have a
  cache of --cache-mib for the blocks of their files, RocksDB in one column hardly any; the files
  are in the cache of the operating system. Before that a sample of the values of both is compared.
- space: of all history after a full compaction, and then of the newer half of it. For that Zenith
  collects garbage; in RocksDB the versions that nobody can read any more are deleted one by one,
  then everything is compacted. "In small steps": Zenith got the data in 40 layers and compacted
  after each of them, so it has images for reads in the middle of that history too; the figures of
  RocksDB are the same.

Run from the repository: ``PYTHONPATH=.:test_runner .venv/bin/python
test_runner/performance/bench_rocksdb.py``. Needs rocksdict: ``.venv/bin/pip install -e '.[bench]'``
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from performance.rocksdb_stores import (
    RELATIONS,
    VERSIONS,
    DataSet,
    RocksStore,
    Store,
    ZenithStore,
    make_data,
)
from performance.store_workload import (
    MIB,
    PAGE_SIZE,
    load_average,
    new_timeline,
    opened,
    page_of,
    percentiles,
    record_of,
    times_us,
)

from pageserver.layered_repository.settings import StoreSettings

Figures = dict[str, float]

HALF = "half the history / its values"
HALF_IN_STEPS = "the same in small steps"


def reads(store: Store, data: DataSet, calls: int) -> Figures:
    """Microseconds of single reads and of keys in a relation."""
    figures = {}
    for when, first, last in (
        ("latest", data.last_lsn, data.last_lsn),
        ("a past LSN", data.batches[len(data.batches) // VERSIONS].lsns[0], data.last_lsn),
    ):
        wanted = data.sample(calls, first, last)
        for key, lsn in wanted[: calls // 4]:
            store.get(key, lsn)
        p50, p99 = percentiles(times_us(lambda at: store.get(*at), wanted))
        figures[f"get at {when}, p50, us"] = p50
        figures[f"get at {when}, p99, us"] = p99
        at = data.middle_lsn if first != last else last
        best = float("inf")
        for scan in store.scans():
            for keys in (data.keys[0], *data.keys[:4]):
                begin = time.perf_counter()
                found = scan(keys, at)
                took = (time.perf_counter() - begin) / len(keys) * 1e6
                assert len(found) == len(keys), (len(found), len(keys))
                best = min(best, took)
        figures[f"relation at {when}, us a key"] = best
    return figures


def check(first: Store, second: Store, data: DataSet, first_lsn: int) -> None:
    """Both give the same."""
    for key, lsn in data.sample(500, first_lsn, data.last_lsn):
        assert first.get(key, lsn) == second.get(key, lsn), (key.hex(), lsn)
    keys = data.keys[RELATIONS // 2]
    results = [scan(keys, data.middle_lsn) for store in (first, second) for scan in store.scans()]
    assert all(result == results[0] for result in results)


@contextmanager
def zenith(directory: Path, data: DataSet, buffer: int, cache: int) -> Iterator[ZenithStore]:
    """An empty store."""
    settings = StoreSettings(max_open_layer_size=buffer, page_cache_size=cache)
    with opened(directory, settings) as repository:
        yield ZenithStore(new_timeline(repository), data)


@contextmanager
def rocksdb(
    directory: Path, compression: str, cache: int, buffer: int, *, vector: bool = False
) -> Iterator[RocksStore]:
    """An empty database."""
    path = Path(tempfile.mkdtemp(prefix="rocksdb-", dir=directory))
    store = RocksStore(path, compression, cache, buffer, vector=vector)
    try:
        yield store
    finally:
        store.close()


def ingest(stores: Callable[[], Iterator[Store]], data: DataSet, rounds: int) -> Figures:
    """MiB/s of values, the best of all set-ups and rounds."""
    loads = [store.load(data) for _ in range(rounds) for store in stores()]
    mib = data.size / MIB
    elapsed, cpu = min(loads)
    return {"ingest, MiB/s": mib / elapsed, "ingest, MiB per CPU second": mib / cpu}


def measure_zenith(
    directory: Path, data: DataSet, options: argparse.Namespace, figures: Figures
) -> None:
    """All but the reads of everything compacted."""

    def stores() -> Iterator[Store]:
        for buffer in (16 * MIB, 64 * MIB, 1024 * MIB):
            with zenith(directory, data, buffer, options.cache_mib * MIB) as store:
                yield store

    figures.update(ingest(stores, data, options.rounds))
    with zenith(directory, data, 64 * MIB, options.cache_mib * MIB) as store:
        store.load_and_collect(data)
        figures[HALF_IN_STEPS] = store.size() / data.size


def measure_rocksdb(
    directory: Path, data: DataSet, options: argparse.Namespace, compression: str, figures: Figures
) -> None:
    """All but the reads of everything compacted."""
    cache = options.cache_mib * MIB

    def stores() -> Iterator[Store]:
        for buffer in (16 * MIB, 64 * MIB, 1024 * MIB):
            for vector in (False, True):
                with rocksdb(directory, compression, cache, buffer, vector=vector) as store:
                    yield store

    figures.update(ingest(stores, data, options.rounds))


def measure(directory: Path, data: DataSet, options: argparse.Namespace) -> None:
    """One data set in both stores."""
    ours: Figures = {}
    measure_zenith(directory, data, options, ours)
    table: dict[str, Figures] = {}
    with zenith(directory, data, 64 * MIB, options.cache_mib * MIB) as store:
        store.load(data)
        store.compact()
        ours["all history / its values"] = store.size() / data.size
        for name, compression, cache in (
            ("default", "default", options.cache_mib * MIB),
            ("zstd", "zstd", options.cache_mib * MIB),
            ("zstd, cold", "zstd", MIB),
        ):
            figures: Figures = {}
            measure_rocksdb(directory, data, options, compression, figures)
            with rocksdb(directory, compression, cache, 64 * MIB) as other:
                other.load(data)
                other.compact()
                check(store, other, data, data.batches[len(data.batches) // VERSIONS].lsns[0])
                if not table:
                    # After the first check, as RocksDB in every column.
                    ours.update(reads(store, data, options.calls))
                figures.update(reads(other, data, options.calls))
                figures["all history / its values"] = other.size() / data.size
                other.forget(data)
                other.compact()
                figures[HALF] = figures[HALF_IN_STEPS] = other.size() / data.size
            table[name] = figures
        store.forget(data)
        ours[HALF] = store.size() / data.size
    show(data, ours, table)


def show(data: DataSet, ours: Figures, table: dict[str, Figures]) -> None:
    """A line for each figure; the ratio says how many times better Zenith is."""
    count = sum(len(keys) for keys in data.keys)
    print(
        f"\n{data.name}: {count} keys in {VERSIONS} versions, {data.size / MIB:.0f} MiB; "
        f"{load_average()}"
    )
    print(f"{'':34}{'Zenith':>10}" + "".join(f"{'RocksDB ' + name:>20}  ratio" for name in table))
    for name in table["default"]:
        line = f"{name:34}{ours[name]:10.2f}"
        for figures in table.values():
            ratio = figures[name] / ours[name]
            if name.startswith("ingest"):
                ratio = 1 / ratio
            line += f"{figures[name]:20.2f} {ratio:6.2f}"
        print(line)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=128, help="MiB of values of each kind")
    parser.add_argument("--cache-mib", type=int, default=64, help="the block cache of each")
    parser.add_argument("--calls", type=int, default=20000, help="single reads of each kind")
    parser.add_argument("--rounds", type=int, default=2, help="of ingestion; the best one counts")
    parser.add_argument("--quick", action="store_true", help="16 MiB, one round: does it work?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.mib, options.calls, options.rounds = 16, 1000, 1
    directory = Path(tempfile.mkdtemp(prefix="bench-rocksdb-", dir=options.dir))
    try:
        total = options.mib * MIB
        pages = make_data("pages", total, lambda _: PAGE_SIZE, lambda n, v, _: page_of(n, v))
        measure(directory, pages, options)
        del pages
        records = make_data("records", total, lambda i: 100 + i * 37 % 201, record_of)
        measure(directory, records, options)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
