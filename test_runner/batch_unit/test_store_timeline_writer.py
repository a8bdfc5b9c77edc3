"""Writing to a timeline: batches, freezing, the flush, back pressure, settings at run time."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.store_support import (
    BRANCH,
    IMAGE,
    MAIN,
    RECORD,
    FullDisk,
    delete_range,
    files,
    key,
    layers,
    new_timeline,
    open_repository,
    opened,
    put,
    running,
    wait_until,
    with_files,
)

from pageserver.layered_repository.errors import StoreError, TimelineStopped
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.flusher import LayerFlusher
from pageserver.layered_repository.memory_budget import MemoryBudget
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.resources import StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with opened(tmp_path, flush_retry_interval=0.01) as repository:
        yield repository


# ---- batches


def test_batches_are_atomic(repository: Repository) -> None:
    timeline = new_timeline(repository)
    with timeline.writer() as writer:
        writer.put(key(1), 24, IMAGE, b"a")
        assert timeline.get(key(1), timeline.last_record_lsn) == b"i1"
        writer.advance(24, 16)
        assert timeline.get(key(1), 24) == b"a"
        writer.put(key(1), 32, IMAGE, b"b")
        writer.put(key(60), 32, IMAGE, b"b")
        writer.delete_range(key(2), key(5), 32)
        with pytest.raises(StoreError, match="batch"):
            timeline.freeze()
        with pytest.raises(StoreError, match="batch"), timeline.writer():
            pass
    with pytest.raises(ZeroDivisionError), timeline.writer() as writer:
        writer.put(key(1), 32, IMAGE, b"c")
        raise ZeroDivisionError
    with timeline.writer() as writer:
        writer.delete_range(key(1), key(2), 32)
    # None of these batches was finished: no trace of them, at any LSN, in memory or on disk.
    put(timeline, 40, (2, IMAGE, b"d"))
    for _ in range(2):
        assert timeline.get_vectored([key(i) for i in (1, 60, 2, 3)], 40) == [
            b"a",
            None,
            b"d",
            b"i3",
        ]
        assert timeline.scan_keys(key(10), key(100), 1000) == []
        timeline.checkpoint()
    assert timeline.disk_consistent_lsn == 40
    assert len(layers(timeline)["image"]) == 1


def test_advance_checks(repository: Repository) -> None:
    timeline = new_timeline(repository)
    with timeline.writer() as writer:
        with pytest.raises(ValueError, match="multiple of 8"):
            writer.advance(25, 0)
        with pytest.raises(ValueError, match="last_record_lsn is 0/10"):
            writer.advance(8, 0)
        writer.put(key(1), 32, IMAGE, b"")
        with pytest.raises(ValueError, match="newest value is at 0/20"):
            writer.advance(24, 0)
        writer.advance(32, 24)
        with pytest.raises(ValueError, match="not above"):
            writer.put(key(1), 32, IMAGE, b"")
    timeline.shutdown(flush=False)
    with pytest.raises(TimelineStopped), timeline.writer():
        pass


# ---- freezing


def test_checkpoint_distance_and_back_pressure(tmp_path: Path) -> None:
    repository = open_repository(tmp_path, checkpoint_distance=32, max_frozen_layers=2)
    timeline = new_timeline(repository)
    reached = []

    def write() -> None:
        for lsn in range(24, 24 + 8 * 20, 8):
            put(timeline, lsn, (lsn, IMAGE, b"x"))
            reached.append(lsn)

    with contextlib.ExitStack() as no_flush:
        no_flush.enter_context(timeline.flusher._flush_lock)
        with running(write):
            wait_until(lambda: len(timeline.view.frozen) == 3 and timeline.layer_set.waiting == 1)
            assert len(reached) == 11
            assert timeline.disk_consistent_lsn == 16
            no_flush.close()
    assert len(reached) == 20
    wait_until(lambda: timeline.disk_consistent_lsn == timeline.last_record_lsn)
    assert timeline.get(key(24), 176) == b"x"
    # The old list of layers goes after the LSN is told: this waits for whoever flushes.
    timeline.flush()
    assert len(files(timeline)) == 3 + 5
    repository.shutdown(flush=True)


def test_a_shutdown_releases_a_writer_that_waits_for_a_full_disk(tmp_path: Path) -> None:
    disk = FullDisk()
    repository = open_repository(
        tmp_path,
        with_files(disk),
        checkpoint_distance=8,
        max_frozen_layers=1,
        flush_retry_interval=0.01,
    )
    timeline = new_timeline(repository)
    disk.full.set()

    def write() -> None:
        with contextlib.suppress(TimelineStopped):
            for lsn in (24, 32, 40, 48):
                put(timeline, lsn, (1, RECORD, b"+"))

    with running(write):
        wait_until(lambda: timeline.layer_set.waiting == 1)
        with pytest.raises(OSError, match="No space left"):
            repository.shutdown(flush=True)
    assert timeline.disk_consistent_lsn == 16


def test_settings_are_replaced_at_run_time(repository: Repository) -> None:
    timeline = new_timeline(repository)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(timeline, 24, (1, RECORD, b"+"))
    put(timeline, 32, (1, RECORD, b"+"))
    assert timeline.view.frozen == () and layers(timeline)["l0"] == []
    repository.settings = StoreSettings(checkpoint_distance=8)
    put(timeline, 40, (1, RECORD, b"+"))
    put(branch, 24, (1, RECORD, b"+"))
    wait_until(lambda: layers(timeline)["l0"] == [(17, 41)])
    wait_until(lambda: layers(branch)["l0"] == [(17, 25)])


def test_a_requested_freeze_waits_for_nobody(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    timeline.request_freeze()
    wait_until(lambda: layers(timeline)["l0"] == [(17, 25)])
    timeline.request_freeze()  # there is nothing to freeze
    with timeline.writer() as writer:
        writer.put(key(1), 32, RECORD, b"+b")
        with running(timeline.request_freeze):
            pass
        timeline.request_freeze()
        assert timeline.view.open.start_lsn == 25
        writer.advance(32, 24)
        assert timeline.view.open.start_lsn == 33
        with running(timeline.request_freeze):
            pass
        writer.put(key(1), 40, RECORD, b"+c")
        writer.advance(40, 32)
        assert timeline.view.open.start_lsn == 41
        writer.put(key(1), 48, RECORD, b"+d")
        writer.advance(48, 40)
        assert timeline.view.open.start_lsn == 41
        with running(timeline.request_freeze):
            pass
    # Nothing was written after the request: the end of the block serves it.
    assert timeline.view.open.start_lsn == 49
    assert timeline.get(key(1), 48) == b"i1+a+b+c+d"


def test_values_beyond_the_memory_of_an_open_layer(tmp_path: Path) -> None:
    with opened(tmp_path, spill_after=1 << 20) as repository:
        timeline = new_timeline(repository)
        pages = {i: bytes([i % 251]) * 65536 for i in range(200)}
        with timeline.writer() as writer:
            for i, page in pages.items():
                writer.put(key(100 + i), 24 + 8 * i, IMAGE, page)
            writer.advance(24 + 8 * 200, 0)
        assert timeline.view.open.spilled_size > 8 << 20
        assert not list(tmp_path.glob("ephemeral*"))
        for _ in range(2):
            for i in (0, 1, 100, 199):
                assert timeline.get(key(100 + i), 10_000) == pages[i]
            timeline.checkpoint()
        assert len(layers(timeline)["l0"]) == 1


# ---- flushing


def test_the_flush_goes_on_when_the_disk_has_room_again(tmp_path: Path) -> None:
    disk = FullDisk()
    repository = open_repository(tmp_path, with_files(disk), flush_retry_interval=0.01)
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    delete_range(timeline, 32, 2, 4)
    disk.full.set()
    with pytest.raises(OSError, match="No space left"):
        timeline.checkpoint()
    disk.failed.clear()
    assert disk.failed.wait(10)
    put(timeline, 40, (1, RECORD, b"+b"))
    assert timeline.disk_consistent_lsn == 16
    assert timeline.get(key(1), 40) == b"i1+a+b"
    disk.full.clear()
    wait_until(lambda: timeline.disk_consistent_lsn == 32)
    assert timeline.get(key(1), 40) == b"i1+a+b"
    assert timeline.get_vectored([key(1), key(3)], 32) == [b"i1+a", None]
    assert layers(timeline) == {"l0": [(17, 33)], "delta": [], "image": [(16, 17), (32, 33)]}
    assert not any("temp" in name for name in files(timeline))
    repository.shutdown(flush=True)


def test_what_changes_nothing_makes_no_file(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24)
    timeline.checkpoint()
    assert timeline.disk_consistent_lsn == 24
    delete_range(timeline, 32, 1, 3)
    delete_range(timeline, 40, 1, 3)
    timeline.checkpoint()
    assert timeline.disk_consistent_lsn == 40
    assert layers(timeline) == {
        "l0": [],
        "delta": [],
        "image": [(16, 17), (32, 33), (40, 41)],
    }


def test_a_flush_while_wal_keeps_coming_comes_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes what was frozen when it was asked for, not what is frozen meanwhile."""
    monkeypatch.setattr(LayerFlusher, "wake", lambda self: None)
    came: list[int] = []
    timelines: list[Timeline] = []

    class Busy(Files):
        def rename(self, source: str | Path, target: str | Path) -> None:
            super().rename(source, target)
            if Path(target).name == "metadata" and timelines and len(came) < 10:
                came.append(timelines[0].last_record_lsn + 8)
                put(timelines[0], came[-1], (1, RECORD, b"+"))
                timelines[0].freeze()

    repository = open_repository(tmp_path, with_files(Busy()))
    timeline = new_timeline(repository)
    for lsn in (24, 32):
        put(timeline, lsn, (1, RECORD, b"+"))
        timeline.freeze()
    timelines.append(timeline)
    timeline.flush()
    assert came == [40, 48]
    assert timeline.disk_consistent_lsn == 32
    repository.shutdown(flush=False)


def test_the_memory_of_all_timelines_is_bounded(tmp_path: Path) -> None:
    """The largest open layer is frozen, whoever goes over the limit, and writers wait."""
    disk = FullDisk()
    resources = with_files(disk)
    budget = MemoryBudget[Timeline](36 << 20)
    resources = StoreResources(resources.page_cache, resources.descriptors, budget, disk)
    first = open_repository(tmp_path / "a", resources, flush_retry_interval=0.01)
    second = open_repository(tmp_path / "b", resources, flush_retry_interval=0.01)
    large, small = new_timeline(first), new_timeline(second)
    page = bytes(1 << 20)

    def grow(timeline: Timeline, count: int) -> None:
        for lsn in range(timeline.last_record_lsn + 8, timeline.last_record_lsn + 8 + 8 * count, 8):
            put(timeline, lsn, (1, IMAGE, page))

    grow(large, 20)
    disk.full.set()
    grow(small, 14)
    assert (large.view.frozen, small.view.frozen) == ((), ())
    grow(small, 4)
    assert [layer.memory_size >> 20 for layer in large.view.frozen] in ([20], [21], [22])
    assert small.view.frozen == ()
    written: list[int] = []

    def write() -> None:
        for _ in range(40):
            grow(small, 1)
            written.append(1)

    with running(write):
        wait_until(lambda: budget._waiting == 1)
        assert len(written) < 40
        assert budget.total < budget.hard_limit + (8 << 20)
        disk.full.clear()
    assert small.get(key(1), small.last_record_lsn) == page
    first.shutdown(flush=True)
    second.shutdown(flush=True)
    assert budget.total == 0


def test_a_timeline_that_cannot_be_flushed_stalls_only_itself(tmp_path: Path) -> None:
    """Its own writer waits; others go on in the memory that is left, for as long as it takes."""
    broken = threading.Event()

    class OneBadDirectory(Files):
        def fsync_dir(self, path: str | Path) -> None:
            if broken.is_set() and Path(path).name == str(MAIN):
                raise OSError(5, "Input/output error", str(path))
            super().fsync_dir(path)

    own = with_files(OneBadDirectory())
    budget = MemoryBudget[Timeline](24 << 20)
    resources = StoreResources(own.page_cache, own.descriptors, budget, own.files)
    repository = open_repository(tmp_path, resources, flush_retry_interval=0.01)
    bad, good = new_timeline(repository), new_timeline(repository, BRANCH)
    page = bytes(1 << 20)
    written: list[int] = []

    def write_bad() -> None:
        for lsn in range(24, 24 + 8 * 100, 8):
            put(bad, lsn, (1, IMAGE, page))
            written.append(lsn)

    broken.set()
    with running(write_bad):
        try:
            wait_until(lambda: budget._waiting == 1 and bad in budget._failing)
            assert len(written) < 50
            for lsn in range(24, 24 + 8 * 100, 8):
                put(good, lsn, (1, IMAGE, page))
                assert budget.total < budget.hard_limit + (12 << 20)
            assert good.get(key(1), good.last_record_lsn) == page
            assert good.disk_consistent_lsn > 24
            assert bad.disk_consistent_lsn == 16
            assert len(written) < 50
        finally:
            broken.clear()
    assert len(written) == 100
    bad.checkpoint()
    assert bad.disk_consistent_lsn == written[-1]
    assert not budget._failing
    repository.shutdown(flush=True)
