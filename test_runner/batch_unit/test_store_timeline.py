"""Timelines: reading through all layers and ancestors, waiting, freezing, crashes in every step."""

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pageserver.layered_repository import metadata as metadata_file
from pageserver.layered_repository.errors import (
    CorruptLayerError,
    CorruptMetadataError,
    InvalidBranchLsn,
    KeyNotFound,
    LsnNotReadable,
    MissingBaseError,
    StoreError,
    TimelineExists,
    TimelineNotFound,
    TimelineStopped,
    WaitLsnTimeout,
)
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from zenith_utils import durable
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

IMAGE, RECORD, INIT_RECORD = 1, 2, 3
TIMELINE_DIR = "pageserver.layered_repository.timeline_dir"
TENANT = TenantId(b"t" * 16)
MAIN = TimelineId(b"m" * 16)
BRANCH = TimelineId(b"b" * 16)


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def append(needed: Sequence[ReconstructInput]) -> list[bytes]:
    """Redo of the tests: a record is appended to the value."""
    return [(item.base or b"") + b"".join(data for _, _, data in item.records) for item in needed]


def open_repository(path: Path, **settings: float) -> Repository:
    return Repository(path, TENANT, StoreSettings(**settings), append)  # type: ignore[arg-type]


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    repository = open_repository(tmp_path, flush_retry_interval=0.01)
    yield repository
    repository.shutdown(flush=False)


def new_timeline(repository: Repository, timeline_id: TimelineId = MAIN) -> Timeline:
    timeline = repository.create_timeline(timeline_id, initdb_lsn=16)
    timeline.import_image_layer(16, [(key(i), b"i%d" % i) for i in range(10)], prev_lsn=8)
    return timeline


def put(timeline: Timeline, lsn: int, *values: tuple[int, int, bytes]) -> None:
    with timeline.writer() as writer:
        for number, flags, data in values:
            writer.put(key(number), lsn, flags, data)
        writer.advance(lsn, lsn - 8)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def files(timeline: Timeline) -> list[str]:
    return sorted(path.name for path in timeline.directory.path.iterdir())


# ---- reading


def test_values_come_from_every_layer(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    timeline.checkpoint()
    put(timeline, 32, (1, RECORD, b"+b"), (2, INIT_RECORD, b"new"))
    timeline.freeze()
    put(timeline, 40, (1, RECORD, b"+c"), (2, RECORD, b"+d"))
    assert [timeline.get(key(1), lsn) for lsn in (16, 24, 31, 32, 40, 1000)] == [
        b"i1",
        b"i1+a",
        b"i1+a",
        b"i1+a+b",
        b"i1+a+b+c",
        b"i1+a+b+c",
    ]
    wanted = [key(n) for n in (2, 77, 1, 2, 0)]
    assert timeline.get_vectored(wanted, 40) == [b"new+d", None, b"i1+a+b+c", b"new+d", b"i0"]
    assert timeline.get_vectored([], 40) == []
    with pytest.raises(KeyNotFound, match=rf"{key(77).hex().upper()}.*LSN 0/28"):
        timeline.get(key(77), 40)
    with pytest.raises(KeyNotFound):
        timeline.get(key(1), 15)
    assert timeline.scan_keys(key(8), key(100), 40) == [key(8), key(9)]


def test_records_without_a_base_are_an_error(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (50, RECORD, b"x"))
    with pytest.raises(MissingBaseError, match="not found, but got 1 WAL records"):
        timeline.get(key(50), 24)
    with pytest.raises(MissingBaseError):
        timeline.get_vectored([key(1), key(50)], 24)


def test_redo_starts_from_the_cached_version(tmp_path: Path) -> None:
    seen: list[ReconstructInput] = []

    def watched(needed: Sequence[ReconstructInput]) -> list[bytes]:
        seen.extend(needed)
        return append(needed)

    repository = Repository(tmp_path, TENANT, StoreSettings(), watched)
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    put(timeline, 32, (1, RECORD, b"+b"))
    assert timeline.get(key(1), 32) == timeline.get(key(1), 39) == b"i1+a+b"
    assert len(seen) == 1
    timeline.checkpoint()
    put(timeline, 40, (1, RECORD, b"+c"))
    assert timeline.get_vectored([key(1), key(2)], 40) == [b"i1+a+b+c", b"i2"]
    assert seen[-1].base == b"i1+a+b"
    assert seen[-1].records == [(40, RECORD, b"+c")]
    assert timeline.get(key(1), 24) == b"i1+a"
    put(timeline, 48, (1, IMAGE, b"whole"))
    assert timeline.get(key(1), 48) == b"whole"
    assert len(seen) == 3
    with timeline.writer() as writer:
        # What is read inside of a batch may still be replaced and must not stay in the cache.
        writer.put(key(1), 56, RECORD, b"+first")
        assert timeline.get(key(1), 56) == b"whole+first"
        writer.put(key(1), 56, RECORD, b"+second")
        writer.advance(56, 48)
    assert timeline.get(key(1), 56) == b"whole+second"
    repository.shutdown(flush=False)


def test_branches_of_branches(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+main24"))
    parent = MAIN
    for depth in range(20):
        child = repository.branch_timeline(TimelineId(bytes([depth]) * 16), ancestor_id=parent)
        lsn = child.last_record_lsn + 8
        put(child, lsn, (1, RECORD, b"+%d" % depth), (100 + depth, IMAGE, b"own"))
        if depth % 3 == 0:
            child.checkpoint()
        parent = child.timeline_id
    put(timeline, 32, (1, IMAGE, b"main32"))
    expected = b"i1+main24" + b"".join(b"+%d" % depth for depth in range(20))
    assert child.get(key(1), child.last_record_lsn) == expected
    assert child.get(key(1), 24) == b"i1+main24"
    assert child.get(key(1), 32) == b"i1+main24+0"
    assert child.get(key(2), 10_000) == b"i2"
    assert timeline.get(key(1), 32) == b"main32"
    assert child.scan_keys(key(9), key(200), 10_000) == [key(9)] + [key(100 + i) for i in range(20)]
    assert child.scan_keys(key(9), key(200), 24 + 8 * 3) == [key(9), key(100), key(101), key(102)]


def test_branch_rules(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24)
    put(timeline, 32)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=17)
    assert (branch.ancestor_id, branch.ancestor_lsn, branch.ancestor) == (MAIN, 24, timeline)
    assert branch.last_record == (24, 0)
    assert (branch.disk_consistent_lsn, branch.latest_gc_cutoff_lsn, branch.initdb_lsn) == (
        24,
        16,
        16,
    )
    newest = repository.branch_timeline(TimelineId.generate(), ancestor_id=MAIN)
    assert newest.last_record == (32, 24)
    with pytest.raises(TimelineExists):
        repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    with pytest.raises(TimelineExists):
        repository.create_timeline(MAIN, initdb_lsn=16)
    with pytest.raises(TimelineNotFound, match="Cannot branch off the timeline"):
        repository.branch_timeline(TimelineId.generate(), ancestor_id=TimelineId.generate())
    with pytest.raises(TimelineNotFound):
        repository.timeline(TimelineId.generate())
    with pytest.raises(
        InvalidBranchLsn,
        match=rf"^invalid start lsn 0/10 for ancestor timeline {BRANCH}: "
        "less than timeline ancestor lsn 0/18$",
    ):
        repository.branch_timeline(TimelineId.generate(), ancestor_id=BRANCH, start_lsn=16)
    timeline.latest_gc_cutoff_lsn = Lsn(32)
    with pytest.raises(InvalidBranchLsn, match=r"^invalid branch start lsn$") as caught:
        repository.branch_timeline(TimelineId.generate(), ancestor_id=MAIN, start_lsn=24)
    assert "LSN 0/18 is earlier than latest GC horizon 0/20" in str(caught.value.__cause__)
    assert set(repository.timelines()) == {MAIN, BRANCH, newest.timeline_id}


# ---- positions


def test_wait_lsn(repository: Repository) -> None:
    timeline = new_timeline(repository)
    timeline.wait_lsn(16, 0)
    with pytest.raises(
        WaitLsnTimeout,
        match=r"^Timed out while waiting for WAL record at LSN 0/18 to arrive, "
        "last_record_lsn 0/10 disk consistent LSN=0/10$",
    ):
        timeline.wait_lsn(24, 0.01)
    results: list[str] = []

    def wait(lsn: int) -> None:
        try:
            timeline.wait_lsn(lsn, 10)
            results.append(f"{lsn} {timeline.last_record_lsn}")
        except TimelineStopped:
            results.append(f"{lsn} stopped")

    threads = [threading.Thread(target=wait, args=(lsn,)) for lsn in (24, 20, 40)]
    for thread in threads:
        thread.start()
    wait_until(lambda: timeline._waiting == 3)
    put(timeline, 24)
    wait_until(lambda: len(results) == 2)
    assert sorted(results) == ["20 0/18", "24 0/18"]
    timeline.shutdown(flush=False)
    for thread in threads:
        thread.join(10)
    assert results[-1] == "40 stopped"


def test_lsn_readable(repository: Repository) -> None:
    timeline = new_timeline(repository)
    timeline.check_lsn_readable(16)
    with pytest.raises(
        LsnNotReadable,
        match=r"^tried to request a page version that was garbage collected. "
        "requested at 0/8 gc cutoff 0/10$",
    ):
        timeline.check_lsn_readable(8)


# ---- writing


def test_batches_are_atomic(repository: Repository) -> None:
    timeline = new_timeline(repository)
    with timeline.writer() as writer:
        writer.put(key(1), 24, IMAGE, b"a")
        assert timeline.get(key(1), timeline.last_record_lsn) == b"i1"
        writer.advance(24, 16)
        assert timeline.get(key(1), 24) == b"a"
        writer.put(key(1), 32, IMAGE, b"b")
        writer.put(key(60), 32, IMAGE, b"b")
        with pytest.raises(StoreError, match="batch"):
            timeline.freeze()
        with pytest.raises(StoreError, match="batch"), timeline.writer():
            pass
    with pytest.raises(ZeroDivisionError), timeline.writer() as writer:
        writer.put(key(1), 32, IMAGE, b"c")
        raise ZeroDivisionError
    # Neither batch was finished: no trace of them, at any LSN, in memory or on disk.
    put(timeline, 40, (2, IMAGE, b"d"))
    for _ in range(2):
        assert timeline.get_vectored([key(1), key(60), key(2)], 40) == [b"a", None, b"d"]
        assert timeline.scan_keys(key(10), key(100), 1000) == []
        timeline.checkpoint()
    assert timeline.disk_consistent_lsn == 40


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


def test_checkpoint_distance_and_back_pressure(tmp_path: Path) -> None:
    repository = open_repository(tmp_path, checkpoint_distance=32, max_frozen_layers=2)
    timeline = new_timeline(repository)
    reached = []
    with timeline._flusher._flush_lock:  # no flush gets through

        def write() -> None:
            for lsn in range(24, 24 + 8 * 20, 8):
                put(timeline, lsn, (lsn, IMAGE, b"x"))
                reached.append(lsn)

        thread = threading.Thread(target=write)
        thread.start()
        wait_until(lambda: len(timeline.view.frozen) == 3 and timeline._waiting == 1)
        assert len(reached) == 11
        assert timeline.disk_consistent_lsn == 16
    thread.join(10)
    assert len(reached) == 20
    wait_until(lambda: timeline.disk_consistent_lsn == timeline.last_record_lsn)
    assert timeline.get(key(24), 176) == b"x"
    assert len(files(timeline)) == 2 + 5
    repository.shutdown(flush=True)


def test_the_flush_goes_on_when_the_disk_has_room_again(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    full = threading.Event()
    full.set()
    failed = threading.Event()

    def fsync_dir(path: Path) -> None:
        if full.is_set():
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        durable.fsync_dir(path)

    monkeypatch.setattr(f"{TIMELINE_DIR}.fsync_dir", fsync_dir)
    with pytest.raises(OSError, match="No space left"):
        timeline.checkpoint()
    assert failed.wait(10)
    assert timeline.disk_consistent_lsn == 16
    assert timeline.get(key(1), 24) == b"i1+a"
    full.clear()
    wait_until(lambda: timeline.disk_consistent_lsn == 24)
    assert timeline.get(key(1), 24) == b"i1+a"


def test_readers_beside_writer_and_flush(tmp_path: Path) -> None:
    repository = open_repository(tmp_path, checkpoint_distance=256, page_cache_size=20_000)
    timeline = new_timeline(repository)
    done = threading.Event()
    failures: list[str] = []

    def read() -> None:
        while not done.is_set() and not failures:
            lsn = timeline.last_record_lsn
            values = timeline.get_vectored([key(i) for i in range(10)], lsn)
            for i, value in enumerate(values):
                if value != b"i%d" % i + b"".join(
                    b"+%d" % at for at in range(24, lsn + 1, 8) if at % 10 == i
                ):
                    failures.append(f"{i} at {lsn}: {value!r}")

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for lsn in range(24, 24 + 8 * 400, 8):
        put(timeline, lsn, (lsn % 10, RECORD, b"+%d" % lsn))
    timeline.checkpoint()
    done.set()
    for thread in threads:
        thread.join(10)
    assert failures == []
    assert len(timeline.view.layers) > 5
    repository.shutdown(flush=True)


# ---- restart and damage


def test_restart_goes_on_at_disk_consistent_lsn(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    timeline.checkpoint()
    put(timeline, 32, (1, RECORD, b"+b"))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(branch, 40, (1, RECORD, b"+c"))
    repository.shutdown(flush=False)

    second = open_repository(tmp_path, wait_lsn_timeout=0.01)
    assert not second.is_loaded(MAIN)
    assert second.read_metadata(BRANCH).ancestor_lsn == 32
    branch = second.timeline(BRANCH)
    timeline = second.timeline(MAIN)
    assert branch.ancestor is timeline
    assert (timeline.last_record, branch.last_record) == ((24, 16), (32, 24))
    assert timeline.get(key(1), 24) == b"i1+a"
    # The branch point's WAL is not back yet: no answer is better than a wrong one.
    with pytest.raises(WaitLsnTimeout):
        branch.get(key(1), 32)
    put(timeline, 32, (1, RECORD, b"+b"))
    assert branch.get(key(1), 32) == b"i1+a+b"
    put(branch, 40, (1, RECORD, b"+d"))
    second.shutdown(flush=True)

    third = open_repository(tmp_path)
    assert third.timeline(BRANCH).get(key(1), 40) == b"i1+a+b+d"
    assert third.timeline(MAIN).last_record == (32, 24)
    assert third.timelines() == sorted([MAIN, BRANCH])
    third.shutdown(flush=True)


def test_a_crash_in_the_import_leaves_nothing(tmp_path: Path) -> None:
    def items() -> Iterator[tuple[bytes, bytes]]:
        yield key(1), b"x"
        during = sorted(path.name for path in (tmp_path / "timelines").iterdir())
        shutil.copytree(tmp_path, tmp_path.with_name("crashed"))
        assert str(MAIN) not in during
        raise ZeroDivisionError

    repository = open_repository(tmp_path)
    timeline = repository.create_timeline(MAIN, initdb_lsn=16)
    with pytest.raises(ZeroDivisionError):
        timeline.import_image_layer(16, items())
    assert list((tmp_path / "timelines").iterdir()) == []
    assert timeline.last_record_lsn == 0
    timeline.import_image_layer(16, [(key(1), b"y")])
    assert timeline.get(key(1), 16) == b"y"
    with pytest.raises(ValueError, match="not empty"):
        timeline.import_image_layer(16, [(key(1), b"y")])
    crashed = open_repository(tmp_path.with_name("crashed"))
    assert crashed.timelines() == []
    assert list((tmp_path.with_name("crashed") / "timelines").iterdir()) == []
    shutil.rmtree(tmp_path.with_name("crashed"))


def test_a_crash_between_the_steps_of_a_flush(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    timeline.checkpoint()
    put(timeline, 32, (1, RECORD, b"+b"))
    real_rename = Path.rename
    states: list[Path] = []

    def snapshot() -> None:
        states.append(tmp_path / f"crash{len(states)}")
        shutil.copytree(tmp_path / "timelines", states[-1] / "timelines")

    class Writer(LayerWriter):
        def finish(self, name: LayerName) -> None:
            snapshot()  # values partly written, under the temporary name
            super().finish(name)
            snapshot()

    def rename(path: Path, target: Path) -> Path:
        result = real_rename(path, target)
        snapshot()
        return result

    def write_metadata(path: Path, metadata: TimelineMetadata) -> None:
        snapshot()
        metadata_file.write_metadata(path, metadata)
        snapshot()

    with monkeypatch.context() as patch:
        patch.setattr(f"{TIMELINE_DIR}.LayerWriter", Writer)
        patch.setattr(Path, "rename", rename)
        patch.setattr(f"{TIMELINE_DIR}.write_metadata", write_metadata)
        timeline.checkpoint()
    assert len(states) == 5
    for number, state in enumerate(states):
        restarted = open_repository(state)
        main = restarted.timeline(MAIN)
        last = 32 if number == 4 else 24
        assert (main.last_record_lsn, main.disk_consistent_lsn) == (last, last)
        assert main.get(key(1), last) == (b"i1+a+b" if number == 4 else b"i1+a")
        assert not any("temp" in name for name in files(main))
        assert sum(name.endswith(".old") for name in files(main)) == (number in (2, 3))
        put(main, last + 8, (1, RECORD, b"+c"))
        main.checkpoint()
        restarted.shutdown(flush=True)
        again = open_repository(state)
        assert again.timeline(MAIN).get(key(1), 1000) == (b"i1+a+b+c" if number == 4 else b"i1+a+c")
        again.shutdown(flush=True)


def test_damage_of_one_timeline_leaves_the_others(repository: Repository, tmp_path: Path) -> None:
    new_timeline(repository)
    other = new_timeline(repository, BRANCH)
    put(other, 24, (1, RECORD, b"+a"))
    repository.shutdown(flush=True)
    layer = next(p for p in other.directory.path.iterdir() if p.name.endswith("-0000000000000019"))
    damaged = bytearray(layer.read_bytes())
    damaged[260] ^= 4
    layer.write_bytes(damaged)
    second = open_repository(tmp_path)
    with pytest.raises(CorruptLayerError, match=rf"{layer.name}: corrupt at offset 256"):
        second.timeline(BRANCH).get(key(1), 24)
    assert second.timeline(BRANCH).get(key(1), 23) == b"i1"
    assert second.timeline(MAIN).get(key(1), 16) == b"i1"
    second.shutdown(flush=True)

    metadata = other.directory.path / "metadata"
    good = metadata.read_bytes()
    assert len(good) == 512
    for place in range(512):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        metadata.write_bytes(damaged)
        with pytest.raises(CorruptMetadataError, match=str(metadata)):
            open_repository(tmp_path).timeline(BRANCH)
    metadata.unlink()
    with pytest.raises(FileNotFoundError):
        open_repository(tmp_path).timeline(BRANCH)
    assert open_repository(tmp_path).timeline(MAIN).get(key(1), 16) == b"i1"


def test_detach(repository: Repository, tmp_path: Path) -> None:
    new_timeline(repository)
    repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    with pytest.raises(StoreError, match=f"ancestor of {BRANCH}"):
        repository.detach_timeline(MAIN)
    repository.detach_timeline(BRANCH)
    repository.detach_timeline(MAIN)
    assert repository.timelines() == []
    assert list((tmp_path / "timelines").iterdir()) == []
    with pytest.raises(TimelineNotFound):
        repository.detach_timeline(MAIN)
    new_timeline(repository)


def test_compacted_layers_are_read(repository: Repository, tmp_path: Path) -> None:
    """Image layers and deltas of key ranges, as compaction leaves them, beside the L0 deltas."""
    timeline = new_timeline(repository)
    for lsn in range(24, 72, 8):
        put(timeline, lsn, (1, RECORD, b"+%d" % lsn), (7, RECORD, b"+%d" % lsn))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(branch, 72, (1, RECORD, b"+72"), (3, RECORD, b"+72"))
    repository.shutdown(flush=True)

    def add_layer(owner: Timeline, name: LayerName, *entries: tuple[int, int, int, bytes]) -> None:
        path = owner.directory.path / str(name)
        writer = LayerWriter(path, TENANT.raw, owner.timeline_id.raw)
        for number, lsn, flags, data in entries:
            writer.add(key(number), lsn, flags, data)
        writer.finish(name)

    # An image within the LSN range of the L0 delta, without key 4: it was deleted.
    image = LayerName.image(key(0), key(5), 48)
    add_layer(timeline, image, (1, 48, IMAGE, b"at48"), (2, 48, IMAGE, b"at48"))
    # A delta with the same changes of one key as the L0 delta.
    delta = LayerName.delta(key(7), key(8), 17, 65)
    add_layer(timeline, delta, *((7, lsn, RECORD, b"+%d" % lsn) for lsn in range(24, 72, 8)))
    # In the branch too: what the image leaves out is not looked for in the ancestor.
    add_layer(branch, LayerName.image(key(2), key(4), 72), (3, 72, IMAGE, b"at72"))

    second = open_repository(tmp_path, page_cache_size=0)
    timeline = second.timeline(MAIN)
    assert timeline.get(key(1), 40) == b"i1+24+32+40"
    assert timeline.get(key(1), 48) == b"at48"
    assert timeline.get(key(1), 56) == b"at48+56"
    assert timeline.get(key(7), 64) == b"i7+24+32+40+48+56+64"
    assert timeline.get_vectored([key(4), key(2), key(6)], 64) == [None, b"at48", b"i6"]
    assert timeline.get(key(4), 47) == b"i4"
    assert timeline.scan_keys(key(0), key(100), 64) == [key(i) for i in (1, 2, 5, 6, 7, 8, 9)]
    assert timeline.scan_keys(key(0), key(100), 47) == [key(i) for i in range(10)]
    branch = second.timeline(BRANCH)
    assert branch.get_vectored([key(i) for i in (1, 2, 3, 4)], 72) == [
        b"at48+56+64+72",
        None,
        b"at72",
        None,
    ]
    assert branch.scan_keys(key(0), key(100), 72) == [key(i) for i in (1, 3, 5, 6, 7, 8, 9)]
    second.shutdown(flush=True)


def test_a_chain_of_branches_of_any_depth(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: None)  # thousands of them; no crash is tested
    timeline = new_timeline(repository)
    ancestor = MAIN
    for number in range(1200):
        child = repository.branch_timeline(
            TimelineId(number.to_bytes(16, "big")), ancestor_id=ancestor
        )
        ancestor = child.timeline_id
    repository.shutdown(flush=True)
    second = open_repository(tmp_path)
    assert second.timeline(ancestor).get(key(4), 16) == b"i4"
    assert second.timeline(MAIN).get(key(4), 16) == timeline.get(key(4), 16)
    second.shutdown(flush=True)
