"""Garbage collection of a timeline: what stays, what is refused, who may do what meanwhile."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.store_support import (
    BRANCH,
    IMAGE,
    MAIN,
    RECORD,
    CrashFiles,
    delete_range,
    every_key,
    files,
    key,
    layers,
    new_timeline,
    open_repository,
    opened,
    put,
    put_layers,
    running,
    with_files,
)

from pageserver.layered_repository.errors import InvalidBranchLsn, LsnNotReadable, TimelineStopped
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.gc_plan import GcResult
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.metadata import read_metadata
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from zenith_utils.ids import TimelineId

COMPACT = {"compaction_threshold": 2, "image_creation_threshold": 1}


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with opened(tmp_path, page_cache_size=0, **COMPACT) as repository:
        yield repository


def compact(timeline: Timeline) -> None:
    while not timeline.compact(every_key(timeline), force=True).done:
        pass


def history(timeline: Timeline) -> None:
    """Up to 56, with images at 32 and 56."""
    for lsns in ((24, 32), (40, 48, 56)):
        put_layers(timeline, lsns, 1, 7)
        compact(timeline)


def collect(repository: Repository, cutoff: int, timeline_id: TimelineId = MAIN) -> GcResult:
    return repository.gc(timeline_id, choose_cutoff=lambda timeline: cutoff)


def image_lsns(timeline: Timeline) -> list[int]:
    return [start for start, _ in layers(timeline)["image"]]


# ---- what stays


def test_what_only_older_reads_need_goes(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    history(timeline)
    put(timeline, 64, (1, RECORD, b"+64"))
    assert layers(timeline) == {
        "l0": [],
        "delta": [(17, 33), (33, 57)],
        "image": [(16, 17), (32, 33), (56, 57)],
    }
    assert collect(repository, 40) == GcResult(
        layers_total=5,
        layers_needed_by_cutoff=2,
        layers_needed_by_branches=0,
        layers_not_updated=1,
        layers_removed=2,
    )
    assert layers(timeline) == {"l0": [], "delta": [(33, 57)], "image": [(32, 33), (56, 57)]}
    assert len(files(timeline)) == 3 + 2
    assert timeline.latest_gc_cutoff_lsn == 40
    with pytest.raises(LsnNotReadable), timeline.pin(39):
        pass
    for lsn, value in ((40, b"i1+24+32+40"), (56, b"i1+24+32+40+48+56")):
        with timeline.pin(lsn):
            assert timeline.get(key(1), lsn) == value
    assert timeline.get(key(1), 64) == b"i1+24+32+40+48+56+64"
    # A cutoff that goes back changes nothing.
    assert collect(repository, 24).layers_removed == 0
    assert timeline.latest_gc_cutoff_lsn == 40
    repository.shutdown(flush=True)
    with opened(tmp_path) as second:
        assert second.timeline(MAIN).latest_gc_cutoff_lsn == 40
        assert second.timeline(MAIN).get(key(1), 40) == b"i1+24+32+40"


def test_the_cutoff_stays_below_what_a_crash_would_leave(
    repository: Repository, tmp_path: Path
) -> None:
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32), 1)
    put(timeline, 40, (1, RECORD, b"+40"))
    collect(repository, 40)
    assert timeline.latest_gc_cutoff_lsn == 32
    repository.shutdown(flush=False)
    with opened(tmp_path) as second:
        timeline = second.timeline(MAIN)
        with timeline.pin(timeline.last_record_lsn):
            assert timeline.get(key(1), 32) == b"i1+24+32"


def test_everything_can_go_but_the_last_image(repository: Repository) -> None:
    timeline = new_timeline(repository)
    history(timeline)
    collect(repository, 56)
    assert layers(timeline) == {"l0": [], "delta": [], "image": [(56, 57)]}
    assert timeline.get(key(7), 56) == b"i7+24+32+40+48+56"


def test_branch_points_stay_also_of_branches_that_are_not_loaded(
    repository: Repository, tmp_path: Path
) -> None:
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32), 1, 7)
    compact(timeline)
    repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=32)
    history_of_32 = timeline.get(key(1), 32)
    put_layers(timeline, (40, 48, 56), 1, 7)
    compact(timeline)
    repository.shutdown(flush=True)
    with opened(tmp_path, **COMPACT) as second:
        timeline = second.timeline(MAIN)
        result = collect(second, 56)
        assert (result.layers_needed_by_branches, result.layers_removed) == (1, 3)
        assert image_lsns(timeline) == [32, 56]
        assert not second.is_loaded(BRANCH)
        branch = second.timeline(BRANCH)
        assert branch.get(key(1), 32) == history_of_32
        with pytest.raises(LsnNotReadable), branch.pin(24):
            pass
        second.detach_timeline(BRANCH)
        assert collect(second, 56).layers_removed == 1
        assert image_lsns(timeline) == [56]


def test_pins_and_points_stay(repository: Repository) -> None:
    timeline = new_timeline(repository)
    history(timeline)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    with timeline.pin(24), branch.pin(40):
        assert timeline.gc(56, points=[16]).layers_removed == 0
        assert timeline.get(key(1), 24) == b"i1+24"
        assert branch.get(key(1), 40) == b"i1+24+32+40"
        with pytest.raises(LsnNotReadable), timeline.pin(24):
            pass
    assert timeline.gc(56, points=[32]).layers_removed == 3
    assert image_lsns(timeline) == [32, 56]
    assert timeline.gc(56).layers_removed == 1


def test_tombstones_go_when_nothing_is_left_below(repository: Repository) -> None:
    repository.settings = StoreSettings(image_creation_threshold=1000)
    timeline = new_timeline(repository)
    delete_range(timeline, 24, 100, 200)
    delete_range(timeline, 32, 2, 5)
    put(timeline, 40, (1, RECORD, b"+"))
    timeline.checkpoint()
    assert collect(repository, 40).layers_removed == 0
    compact(timeline)
    # There is nothing to hide for the first of them.
    assert collect(repository, 40).layers_removed == 1
    assert image_lsns(timeline) == [16, 32]
    repository.settings = StoreSettings(image_creation_threshold=1)
    compact(timeline)
    collect(repository, 40)
    assert image_lsns(timeline) == [40]
    assert timeline.get_vectored([key(i) for i in (1, 3, 5)], 40) == [b"i1+", None, b"i5"]


def test_space_comes_back(repository: Repository) -> None:
    """Rewritten and deleted values are collected without new images being due for reads."""
    timeline = new_timeline(repository)
    noise = [bytes((i * 7919 + j * 104729 >> 3) & 255 for j in range(65536)) for i in range(4)]
    for turn in range(3):
        for lsn in range(timeline.last_record_lsn + 8, timeline.last_record_lsn + 88, 8):
            put(timeline, lsn, *((100 + lsn % 40, IMAGE, noise[(lsn + turn) % 4]),))
        timeline.checkpoint()
    delete_range(timeline, timeline.last_record_lsn + 8, 100, 130)
    repository.settings = StoreSettings(image_creation_threshold=1000, compress_layers=False)
    timeline.checkpoint()
    compact(timeline)
    collect(repository, timeline.last_record_lsn)
    before = sum(layer.size for layer in timeline.view.layers)
    expected = timeline.scan_keys(key(0), key(1000), timeline.last_record_lsn)
    assert before > 30 * 65536
    compact(timeline)
    collect(repository, timeline.last_record_lsn)
    after = sum(layer.size for layer in timeline.view.layers)
    assert after < 12 * 65536
    assert timeline.scan_keys(key(0), key(1000), timeline.last_record_lsn) == expected
    assert timeline.compact(every_key(timeline), force=True).done


# ---- order


def test_the_cutoff_is_durable_before_anything_is_deleted(tmp_path: Path) -> None:
    durable: list[int] = []

    class Watch(Files):
        def unlink(self, path: str | Path) -> None:
            if LayerName.parse(Path(path).name) is not None:
                directory = timeline.directory
                metadata = directory.read_metadata()
                durable.append(metadata.latest_gc_cutoff_lsn)
                listed = {str(layer.name) for layer in directory.read_list(metadata)}
                assert Path(path).name not in listed
            super().unlink(path)

    repository = open_repository(tmp_path, with_files(Watch()), **COMPACT)
    timeline = new_timeline(repository)
    history(timeline)
    durable.clear()
    collect(repository, 56)
    assert durable == [56] * 4
    # Nothing is written when the cutoff has not moved.
    metadata = timeline.directory.path / "metadata"
    inode = metadata.stat().st_ino
    collect(repository, 56)
    assert metadata.stat().st_ino == inode
    repository.shutdown(flush=False)


def test_a_failure_to_write_the_cutoff_deletes_nothing(tmp_path: Path) -> None:
    class NoMetadata(Files):
        on = False

        def rename(self, source: str | Path, target: str | Path) -> None:
            if self.on and Path(target).name == "metadata":
                raise OSError(5, "Input/output error")
            super().rename(source, target)

    disk = NoMetadata()
    repository = open_repository(tmp_path, with_files(disk), **COMPACT)
    timeline = new_timeline(repository)
    history(timeline)
    before = files(timeline)
    disk.on = True
    with pytest.raises(OSError, match="Input/output"):
        collect(repository, 56)
    assert files(timeline) == before
    with pytest.raises(LsnNotReadable):
        timeline.check_lsn_readable(48)
    disk.on = False
    assert collect(repository, 48).layers_removed == 4
    assert read_metadata(timeline.directory.path / "metadata").latest_gc_cutoff_lsn == 56
    repository.shutdown(flush=False)


def test_a_crash_in_any_step(tmp_path: Path) -> None:
    crash = CrashFiles(tmp_path / "store", tmp_path / "crashed")
    repository = open_repository(tmp_path / "store", with_files(crash), **COMPACT)
    timeline = new_timeline(repository)
    delete_range(timeline, 24, 3, 5)
    timeline.checkpoint()
    history_start = timeline.last_record_lsn
    put_layers(timeline, (32, 40), 1, 7)
    compact(timeline)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put_layers(timeline, (48, 56, 64), 1, 7)
    compact(timeline)
    keys = [key(i) for i in range(10)]
    expected = {lsn: timeline.get_vectored(keys, lsn) for lsn in (56, 64)}
    at_branch = branch.get_vectored(keys, 40)
    crash.on = True
    assert collect(repository, 56).layers_removed == 3
    crash.on = False
    repository.shutdown(flush=False)
    assert history_start == 24
    for state in crash.states:
        with opened(state, **COMPACT) as after:
            timeline = after.timeline(MAIN)
            for lsn, values in expected.items():
                assert timeline.get_vectored(keys, lsn) == values
            assert after.timeline(BRANCH).get_vectored(keys, 40) == at_branch
            collect(after, 56)
            assert timeline.get_vectored(keys, 56) == expected[56]
            assert after.timeline(BRANCH).get_vectored(keys, 40) == at_branch
            assert image_lsns(timeline) == [40, 64]


# ---- beside others


def test_branching_while_layers_are_being_deleted(tmp_path: Path) -> None:
    class SlowUnlink(Files):
        def __init__(self) -> None:
            self.inside = threading.Event()
            self.go_on = threading.Event()
            self.go_on.set()

        def unlink(self, path: str | Path) -> None:
            self.inside.set()
            assert self.go_on.wait(10)
            super().unlink(path)

    disk = SlowUnlink()
    repository = open_repository(tmp_path, with_files(disk), **COMPACT)
    timeline = new_timeline(repository)
    history(timeline)
    disk.inside.clear()
    disk.go_on.clear()
    with running(lambda: collect(repository, 56)):
        try:
            assert disk.inside.wait(10)
            with pytest.raises(InvalidBranchLsn):
                repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=48)
            branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=56)
            put(timeline, 64, (1, RECORD, b"+64"))
            assert branch.get(key(1), 56) == b"i1+24+32+40+48+56"
            assert not disk.go_on.is_set()
        finally:
            disk.go_on.set()
    assert branch.get(key(1), 56) == b"i1+24+32+40+48+56"
    assert layers(timeline)["image"] == [(56, 57)]
    repository.shutdown(flush=False)


def test_a_branch_that_is_being_made_keeps_its_state(tmp_path: Path) -> None:
    """The claim comes before the files of the branch, and it is withdrawn if they do not come."""
    during: list[GcResult] = []

    class CollectInBetween(Files):
        on = False

        def mkdir(self, path: str | Path) -> None:
            if self.on:
                self.on = False
                during.append(collect(repository, 56))
                assert image_lsns(timeline) == [32, 56]
                raise OSError(28, "No space left on device")
            super().mkdir(path)

    disk = CollectInBetween()
    repository = open_repository(tmp_path, with_files(disk), **COMPACT)
    timeline = new_timeline(repository)
    history(timeline)
    disk.on = True
    with pytest.raises(OSError, match="No space left"):
        repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=32)
    assert during[0].layers_needed_by_branches == 1
    assert collect(repository, 56).layers_removed == 1
    repository.shutdown(flush=False)


def test_readers_beside_compaction_and_collection(tmp_path: Path) -> None:
    with opened(tmp_path, checkpoint_distance=200, page_cache_size=5000, **COMPACT) as repository:
        timeline = new_timeline(repository)
        branches = [
            repository.branch_timeline(TimelineId(bytes([i]) * 16), ancestor_id=MAIN)
            for i in range(2)
        ]
        done = threading.Event()
        failures: list[str] = []
        reads = [0]

        def expected(i: int, lsn: int) -> bytes:
            return b"i%d" % i + b"".join(
                b"+%d" % at for at in range(24, lsn + 1, 8) if at // 8 % 10 == i
            )

        def read() -> None:
            numbers = list(range(10))
            while not done.is_set() and not failures:
                lsn = max(timeline.last_record_lsn - 80, timeline.latest_gc_cutoff_lsn, 16)
                try:
                    with timeline.pin(lsn):
                        values = timeline.get_vectored([key(i) for i in numbers], lsn)
                except LsnNotReadable:
                    continue
                wanted = [expected(i, lsn) for i in numbers]
                if values != wanted:
                    failures.append(f"at {lsn}: {values!r} instead of {wanted!r}")
                if branches[0].get_vectored([key(1)], 16) != [b"i1"]:
                    failures.append("the branch lost its state")
                reads[0] += 1

        def tidy_up() -> None:
            while not done.is_set():
                timeline.compact(every_key(timeline), force=True)
                collect(repository, timeline.last_record_lsn - 40)

        with running(read, read, tidy_up):
            try:
                for lsn in range(24, 24 + 8 * 600, 8):
                    put(timeline, lsn, (lsn // 8 % 10, RECORD, b"+%d" % lsn))
            finally:
                done.set()
        assert failures == []
        assert reads[0] > 0
        compact(timeline)
        collect(repository, timeline.last_record_lsn)
        assert len(timeline.view.layers) < 10


def test_a_timeline_that_stops(repository: Repository) -> None:
    timeline = new_timeline(repository)
    history(timeline)
    timeline.shutdown(flush=False)
    with pytest.raises(TimelineStopped):
        timeline.gc(56)


def test_deleted_and_stopped_layers_are_closed(repository: Repository) -> None:
    """Whoever still knows them: their space comes back with the last descriptor."""
    timeline = new_timeline(repository)
    history(timeline)
    known = list(timeline.view.layers)
    for layer in known:
        layer.open()
    collect(repository, 56)
    left = list(timeline.view.layers)
    assert {layer for layer in known if layer.is_open} == set(left) < set(known)
    repository.shutdown(flush=False)
    assert not any(layer.is_open for layer in known)
    assert len(repository.resources.descriptors) == 0
