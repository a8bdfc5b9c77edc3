"""Large numbers and sizes: branches, tenants, long chains of records, a timeline of 10 GB.

Each check runs in a reduced form always and, marked slow, in full: --runslow, with --scale for a
share of the full sizes. What Postgres adds nothing to is done with the value store alone.
"""

from __future__ import annotations

import random
import signal
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from batch_unit.pageserver_support import PageClient, Pageserver, scratch_directory
from fixtures.benchmark_fixture import MetricReport, ZenithBenchmarker
from performance.store_workload import (
    FLAGS_RECORD,
    MIB,
    PAGE_SIZE,
    KeyRange,
    Maintainer,
    RandomValues,
    block_key,
    memory_of,
    new_timeline,
    opened,
    percentiles,
    put_values,
    size_on_disk,
    times_us,
)

from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from postgres_ffi.relfile import RelTag
from zenith_utils.ids import TenantId, TimelineId

PG_CLASS = RelTag(1663, 5, 1259, 0)
BATCH = 256
EMPTY_PAGES = 23 * MIB // PAGE_SIZE
"""What initdb makes: three databases."""
READS = 2000
ROUNDS = 4
"""What is compared takes turns, for machines whose speed changes."""
GIB = 1024 * MIB

Size = Callable[[int, int], int]
"""(in full, reduced) -> what to do now."""
Record = Callable[[str, float, str], None]


@pytest.fixture(params=["reduced", pytest.param("full", marks=pytest.mark.slow)])
def size(request: pytest.FixtureRequest) -> Size:
    """How large this run of a test is."""
    if request.param == "reduced":
        return lambda _full, reduced: reduced
    scale = request.config.getoption("scale", 1.0)
    return lambda full, reduced: max(int(full * scale), reduced)


@pytest.fixture
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether figures are worth a check."""
    return "full" in request.node.name


@pytest.fixture
def record(zenbenchmark: ZenithBenchmarker) -> Record:
    """Record a figure of which less is better."""

    def one(name: str, value: float, unit: str) -> None:
        zenbenchmark.record(name, value, unit, MetricReport.LOWER_IS_BETTER)

    return one


# ---- many timelines in a pageserver


@pytest.fixture
def server() -> Iterator[Pageserver]:
    with scratch_directory() as path:
        server = Pageserver(path / "ps")
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGKILL)


def first_page(server: Pageserver, tenant: TenantId, timeline: TimelineId) -> bytes:
    """One page of the newest state."""
    client = PageClient(server, tenant, timeline)
    try:
        return client.page(PG_CLASS, 0, 1, latest=True)
    finally:
        client.close()


def check_many(
    server: Pageserver,
    record: Record,
    what: str,
    count: int,
    create: Callable[[], tuple[TenantId, TimelineId]],
) -> list[tuple[TenantId, TimelineId]]:
    """Make so many, restart the pageserver, read from all; with the time and memory of each."""
    page = first_page(server, *create())
    memory = memory_of(server.pid)
    begin = time.perf_counter()
    made = [create() for _ in range(count)]
    record(f"creation of a {what}", (time.perf_counter() - begin) / count * 1e3, "ms")
    record(f"RSS per {what}", (memory_of(server.pid) - memory) / count / 1024, "kB")
    begin = time.perf_counter()
    assert server.stop() == 0
    record(f"stop with {count}", time.perf_counter() - begin, "s")
    begin = time.perf_counter()
    server.start()
    assert first_page(server, *made[-1]) == page
    record(f"start with {count}, to the first page", time.perf_counter() - begin, "s")
    memory = memory_of(server.pid)
    begin = time.perf_counter()
    for ids in made:
        assert first_page(server, *ids) == page
    record(f"first page of a {what}", (time.perf_counter() - begin) / count * 1e3, "ms")
    record(f"RSS per loaded {what}", (memory_of(server.pid) - memory) / count / 1024, "kB")
    return made


def test_many_branches(server: Pageserver, size: Size, record: Record) -> None:
    """1,000 branches of one timeline."""
    tenant = server.create_tenant()
    root = server.create_timeline(tenant)
    count = size(1000, 20)
    made = check_many(
        server,
        record,
        "branch",
        count,
        lambda: (tenant, server.create_timeline(tenant, ancestor=root)),
    )
    listed = {info["timeline_id"] for info in server.http("GET", f"tenant/{tenant}/timeline")}
    assert {str(timeline) for _, timeline in made} < listed
    assert len(listed) == count + 2


def test_many_tenants(server: Pageserver, size: Size, record: Record) -> None:
    """100 tenants with a timeline each."""

    def create() -> tuple[TenantId, TimelineId]:
        tenant = server.create_tenant()
        return tenant, server.create_timeline(tenant)

    check_many(server, record, "tenant", size(100, 3), create)


# ---- much history of few keys


def keyspace_of(count: int) -> Callable[[int], list[KeyRange]]:
    return lambda _lsn: [(block_key(0), block_key(count))]


def count_records(needed: Sequence[ReconstructInput]) -> list[bytes]:
    """Redo whose page says how many records it had, which must be all of them and in order."""
    for item in needed:
        lsns = [lsn for lsn, _, _ in item.records]
        assert lsns == sorted(lsns)
        assert [data for _, _, data in item.records] == [b"%032d" % i for i in range(len(lsns))]
    return [b"%d" % len(item.records) for item in needed]


def test_long_chain(tmp_path: Path, size: Size, record: Record) -> None:
    """A page with 10,000 records since its image: in memory, in L0, merged, as an image again."""
    count = size(10_000, 1000)
    with opened(tmp_path, StoreSettings(page_cache_size=0), count_records) as repository:
        timeline = new_timeline(repository)
        data = b"".join(b"%032d" % i for i in range(count))
        put_values(timeline, [block_key(0)] * count, data, FLAGS_RECORD)
        lsn = int(timeline.last_record_lsn)
        half = lsn - 8 * (count // 2)

        def read(where: str) -> None:
            best = min(times_us(lambda at: timeline.get(block_key(0), at), [lsn] * 5))
            record(f"page with {count} records, {where}", best / 1000, "ms")
            assert timeline.get(block_key(0), lsn) == b"%d" % count
            assert timeline.get(block_key(0), half) == b"%d" % (count - count // 2)

        read("in memory")
        timeline.checkpoint()
        read("in an L0 delta")
        timeline.compact(keyspace_of(1), force=True)
        read("merged")


def test_hot_keys(tmp_path: Path, size: Size, record: Record) -> None:
    """Ten keys updated a million times, all of it with compaction and garbage collection."""
    keys, updates, wal = 10, size(1_000_000, 20_000), 64
    count = keys * updates
    settings = StoreSettings(checkpoint_distance=max(count * wal // 40, MIB))
    horizon = count * wal // 8 & ~7
    with opened(tmp_path, settings) as repository:
        timeline = new_timeline(repository)
        start = int(timeline.last_record_lsn)
        maintainer = Maintainer(timeline, keyspace_of(keys), horizon=horizon)
        with maintainer:
            for first in range(0, count, 1000):
                numbers = range(first, first + 1000)
                put_values(
                    timeline,
                    [block_key(n % keys) for n in numbers],
                    b"".join(b"%016d" % n for n in numbers),
                    wal=wal,
                )
        maintainer.until_at_rest()
        rng = random.Random(1)
        lsns = [start + wal * rng.randrange(count - count // 8, count + 1) for _ in range(READS)]

        def read(lsn: int) -> None:
            newest = (lsn - start) // wal - 1
            for number in range(max(newest - keys + 1, 0), newest + 1):
                assert timeline.get(block_key(number % keys), lsn) == b"%016d" % number

        p50, _ = percentiles(times_us(read, lsns))
        record("get of a hot key", p50 / keys, "us")
        on_disk = size_on_disk(timeline.directory.path)
        record("space / values in the horizon", on_disk / (count // 8 * 16), "")
        record("peak RSS", memory_of(field="VmHWM") / MIB, "MiB")


# ---- large timelines


def fill(timeline: Timeline, count: int, value: RandomValues) -> None:
    """Version 1 of so many pages, in order."""
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        values = b"".join(value(number, 1) for number in numbers)
        put_values(timeline, [block_key(n) for n in numbers], values, wal=PAGE_SIZE + 56)


def read_times(timeline: Timeline, count: int, value: RandomValues, seed: int) -> list[float]:
    """Of random pages at the last record; each is read and checked before."""
    lsn = int(timeline.last_record_lsn)
    rng = random.Random(seed)
    numbers = [rng.randrange(count) for _ in range(READS // ROUNDS)]
    for number in numbers:
        assert timeline.get(block_key(number), lsn) == value(number, 1)
    return times_us(lambda number: timeline.get(block_key(number), lsn), numbers)


def test_large_timeline(tmp_path: Path, size: Size, record: Record, is_full: bool) -> None:
    """10 GB of pages: reads take at most twice as long as in a timeline that initdb just made.

    Without a page cache, which would hold all of that one.
    """
    count = size(10 * GIB, 64 * MIB) // PAGE_SIZE // BATCH * BATCH
    value = RandomValues()
    settings = StoreSettings(
        checkpoint_distance=min(256 * MIB, count * PAGE_SIZE // 16), page_cache_size=0
    )
    with opened(tmp_path, settings) as repository:
        empty = new_timeline(repository, ((block_key(i), value(i, 1)) for i in range(EMPTY_PAGES)))
        large = new_timeline(repository)
        maintainer = Maintainer(large, keyspace_of(count), horizon=settings.checkpoint_distance)
        begin = time.perf_counter()
        with maintainer:
            fill(large, count, value)
        took = time.perf_counter() - begin
        record("load", took / (count * PAGE_SIZE / MIB) * 1024, "s/GiB")
        ratios = []
        for when in ("just loaded", "at rest"):
            if when == "at rest":
                maintainer.until_at_rest()
            times, times_of_empty = [], []
            for seed in range(ROUNDS):
                times += read_times(large, count, value, seed)
                times_of_empty += read_times(empty, EMPTY_PAGES, value, seed)
            p50, p99 = percentiles(times)
            of_empty, _ = percentiles(times_of_empty)
            record(f"get {when}, p50", p50, "us")
            record(f"get {when}, p99", p99, "us")
            record(f"get {when} / of an empty timeline", p50 / of_empty, "")
            ratios.append(p50 / of_empty)
        record("layers", len(large.view.layers), "")
        record("space / values", size_on_disk(large.directory.path) / (count * PAGE_SIZE), "")
        record("peak RSS", memory_of(field="VmHWM") / MIB, "MiB")
        if is_full:
            assert max(ratios) <= 2


def test_large_relation(tmp_path: Path, size: Size, record: Record) -> None:
    """A relation of 4 GB: imported, one block in a hundred changed, compacted, read in order."""
    count = size(4 * GIB, 64 * MIB) // PAGE_SIZE // BATCH * BATCH
    value = RandomValues()
    settings = StoreSettings(image_creation_threshold=1, compaction_threshold=1)
    with opened(tmp_path, settings) as repository:
        begin = time.perf_counter()
        timeline = new_timeline(repository, ((block_key(n), value(n, 0)) for n in range(count)))
        mib = count * PAGE_SIZE / MIB
        record("import", (time.perf_counter() - begin) / mib * 1024, "s/GiB")
        changed = array("L", random.Random(1).sample(range(count), count // 100))
        for first in range(0, len(changed), BATCH):
            numbers = changed[first : first + BATCH]
            values = b"".join(value(number, 1) for number in numbers)
            put_values(timeline, [block_key(n) for n in numbers], values, wal=PAGE_SIZE + 56)
        timeline.checkpoint()
        begin = time.perf_counter()
        result = timeline.compact(keyspace_of(count))
        assert result.l0_merged == 1 and result.images_written > 0
        record("compaction", (time.perf_counter() - begin) / mib * 1024, "s/GiB")
        lsn = int(timeline.last_record_lsn)
        begin = time.perf_counter()
        versions = dict.fromkeys(changed, 1)
        for first in range(0, count, BATCH):
            numbers_read = range(first, first + BATCH)
            found = timeline.get_vectored([block_key(n) for n in numbers_read], lsn)
            assert found == [value(n, versions.get(n, 0)) for n in numbers_read]
        record("sequential read with check", (time.perf_counter() - begin) / mib * 1024, "s/GiB")
        assert len(timeline.scan_keys(block_key(0), block_key(count), lsn)) == count
        record("peak RSS", memory_of(field="VmHWM") / MIB, "MiB")
