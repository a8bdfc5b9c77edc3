"""Compaction of a timeline: merges, images, what runs beside it, crashes in every step, damage."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from batch_unit.store_support import (
    BRANCH,
    IMAGE,
    INIT_RECORD,
    MAIN,
    RECORD,
    TENANT,
    CrashFiles,
    append,
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
    wait_until,
    with_files,
)

from pageserver.layered_repository.compactor import CompactionResult
from pageserver.layered_repository.errors import CorruptLayerError, TimelineStopped
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from zenith_utils.ids import TimelineId

NOTHING = CompactionResult()
POSTPONED = CompactionResult(done=False)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with opened(tmp_path, compaction_threshold=3, page_cache_size=0) as repository:
        yield repository


def never(lsn: int) -> Sequence[tuple[bytes, bytes]]:
    raise AssertionError("the keyspace was asked for")


def all_reads(timeline: Timeline) -> list[tuple[int, list[bytes | None], list[bytes]]]:
    """Everything that can be read: values and keys at every LSN."""
    keys = [key(i) for i in range(40)]
    return [
        (lsn, timeline.get_vectored(keys, lsn), timeline.scan_keys(key(0), key(1000), lsn))
        for lsn in range(16, timeline.last_record_lsn + 1, 8)
    ]


# ---- merges


def test_l0_deltas_are_merged_when_there_are_enough(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32), 1, 7)
    assert timeline.compact(never) == POSTPONED  # more is done for a timeline at rest
    assert timeline.compact(never) == NOTHING
    put_layers(timeline, (40,), 1, 3)
    put(timeline, 48, (1, RECORD, b"+48"))
    before = all_reads(timeline)
    assert timeline.compact(every_key(timeline)) == CompactionResult(3, 1, 0, done=False)
    assert timeline.compact(never) == POSTPONED
    assert layers(timeline) == {"l0": [], "delta": [(17, 41)], "image": [(16, 17)]}
    assert all_reads(timeline) == before
    assert len(files(timeline)) == 2 + 2
    timeline.checkpoint()
    with opened(tmp_path) as second:
        assert all_reads(second.timeline(MAIN)) == before


def test_a_merge_on_demand(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put_layers(timeline, (24,), *range(10))
    assert timeline.compact(never, force=True) == CompactionResult(1, 1, 0, done=False)
    assert timeline.compact(never, force=True) == NOTHING
    assert layers(timeline)["l0"] == []


def test_merged_files_have_the_target_size(repository: Repository) -> None:
    timeline = new_timeline(repository)
    repository.settings = StoreSettings(compaction_target_size=30_000, compress_layers=False)
    for lsn in (24, 32, 40):
        put(timeline, lsn, *((i, INIT_RECORD, bytes([i]) * 5000) for i in range(20)))
        timeline.checkpoint()
    before = all_reads(timeline)
    result = timeline.compact(every_key(timeline), force=True)
    assert (result.l0_merged, result.deltas_written) == (3, 10)
    merged = [layer for layer in timeline.view.layers if not layer.is_image]
    assert all(25_000 < layer.size < 50_000 for layer in merged)
    assert all_reads(timeline) == before


def test_the_flush_goes_on_beside_it(tmp_path: Path) -> None:
    timelines: list[Timeline] = []

    class FlushInBetween(Files):
        def rename(self, source: str | Path, target: str | Path) -> None:
            name = LayerName.parse(Path(target).name)
            if timelines and name is not None and not name.is_l0:
                timeline = timelines.pop()
                put_layers(timeline, (48,), 1, 2)
                assert layers(timeline)["l0"][-1] == (41, 49)
            super().rename(source, target)

    repository = open_repository(tmp_path, with_files(FlushInBetween()), compaction_threshold=3)
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32, 40), 1, 7)
    timelines.append(timeline)
    assert timeline.compact(every_key(timeline)).l0_merged == 3
    assert layers(timeline) == {"l0": [(41, 49)], "delta": [(17, 41)], "image": [(16, 17)]}
    assert timeline.get(key(1), 48) == b"i1+24+32+40+48"
    repository.shutdown(flush=False)


def test_reads_that_began_with_layers_that_are_gone(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start again with the layers of now."""
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32, 40), 1, 7)
    old = timeline.view
    timeline.compact(never)
    for layer in old.layers:
        layer.evict()
    views = [old]
    monkeypatch.setattr(
        Timeline, "view", property(lambda self: views.pop() if views else self.layer_set.view)
    )
    assert timeline.get(key(1), 40) == b"i1+24+32+40"
    views.append(old)
    assert timeline.get_vectored([key(7)], 32) == [b"i7+24+32"]
    views.append(old)
    assert timeline.scan_keys(key(0), key(3), 40) == [key(0), key(1), key(2)]
    assert views == []
    (merged,) = (layer for layer in timeline.view.layers if not layer.is_image)
    merged.evict()
    Path(merged.path).unlink()
    with pytest.raises(FileNotFoundError):
        timeline.get(key(1), 40)


# ---- images


def test_images_where_deltas_lie_deep(tmp_path: Path) -> None:
    repository = open_repository(
        tmp_path, compaction_threshold=1, image_creation_threshold=3, image_part_keys=4
    )
    timeline = new_timeline(repository)
    asked: list[int] = []

    def keyspace(lsn: int) -> Sequence[tuple[bytes, bytes]]:
        asked.append(lsn)
        return every_key(timeline)(lsn)

    for lsn in (24, 32):
        put_layers(timeline, (lsn,), 1, 2)
        timeline.compact(keyspace)
    assert asked == []
    put_layers(timeline, (40,), 1, 2, 9)
    put(timeline, 48, (1, RECORD, b"+48"))
    cached = repository.resources.page_cache.size
    result = timeline.compact(keyspace)
    # Keys 0 to 3 have three deltas over them, keys 4 to 9 only one.
    assert (result.l0_merged, result.images_written) == (1, 1)
    assert asked == [40]
    assert layers(timeline)["image"] == [(16, 17), (40, 41)]
    assert repository.resources.page_cache.size == cached
    assert timeline.get_vectored([key(i) for i in (0, 1, 9)], 48) == [
        b"i0",
        b"i1+24+32+40+48",
        b"i9+40",
    ]
    assert timeline.get(key(1), 39) == b"i1+24+32"
    timeline.compact(keyspace)
    assert asked == [40]
    repository.shutdown(flush=False)


def test_images_of_a_branch_leave_out_what_was_deleted(repository: Repository) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+24"))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    delete_range(branch, 32, 4, 8)
    for lsn in (40, 48, 56):
        put_layers(branch, (lsn,), 1, 9)
        branch.compact(every_key(branch), force=True)
    before = all_reads(branch)
    assert layers(branch)["image"] == [(32, 33), (56, 57)]
    (image,) = (layer for layer in branch.view.layers if layer.start_lsn == 56)
    assert (image.key_start, image.key_end) == (bytes(18), b"\xff" * 18)
    assert [entry[0] for entry in image.entries()] == [key(i) for i in (0, 1, 2, 3, 8, 9)]
    assert all_reads(branch) == before
    assert branch.get(key(1), 56) == b"i1+24+40+48+56"


def test_no_image_while_the_ancestor_has_not_got_its_wal_back(
    repository: Repository, tmp_path: Path
) -> None:
    """Neither a wait in the middle of compaction nor a wrong image."""
    timeline = new_timeline(repository)
    put(timeline, 24, (2, RECORD, b"+24"))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put_layers(branch, (32, 40, 48), 2)
    repository.shutdown(flush=False)
    with opened(
        tmp_path, compaction_threshold=1, image_creation_threshold=1, wait_lsn_timeout=60.0
    ) as second:
        branch = second.timeline(BRANCH)
        timeline = second.timeline(MAIN)
        while not branch.compact(never).done:
            pass
        assert layers(branch) == {"l0": [], "delta": [(25, 49)], "image": []}
        put(timeline, 24, (2, RECORD, b"+24"))
        assert branch.compact(every_key(branch)).images_written == 1
        assert branch.get(key(2), 48) == b"i2+24+32+40+48"


# ---- one at a time, and the end


def test_one_at_a_time(repository: Repository) -> None:
    repository.settings = StoreSettings(compaction_threshold=1, image_creation_threshold=1)
    timeline = new_timeline(repository)
    put_layers(timeline, (24,), 1)
    inside = threading.Event()
    go_on = threading.Event()
    forced: list[CompactionResult] = []

    def slow(lsn: int) -> Sequence[tuple[bytes, bytes]]:
        inside.set()
        assert go_on.wait(10)
        return every_key(timeline)(lsn)

    def first() -> None:
        assert timeline.compact(slow).images_written == 1

    def second() -> None:
        forced.append(timeline.compact(every_key(timeline), force=True))

    with running(first):
        assert inside.wait(10)
        try:
            assert timeline.compact(never) == POSTPONED
            with running(second):
                put_layers(timeline, (32,), 1)
                assert forced == []
                go_on.set()
        finally:
            go_on.set()
    assert forced[0].l0_merged == 1


def test_a_shutdown_ends_it_soon(tmp_path: Path) -> None:
    reading = threading.Event()
    stopping = threading.Event()

    def slow(needed: Sequence[ReconstructInput]) -> list[bytes]:
        reading.set()
        assert stopping.wait(10)
        return append(needed)

    settings = StoreSettings(
        compaction_threshold=1, image_creation_threshold=1, page_cache_size=0, image_part_keys=100
    )
    repository = Repository(tmp_path, TENANT, settings, slow)
    timeline = new_timeline(repository)
    put(timeline, 24, *((i, INIT_RECORD, b"x") for i in range(3000)))
    timeline.checkpoint()
    stopped: list[bool] = []

    def compact() -> None:
        with pytest.raises(TimelineStopped):
            timeline.compact(lambda lsn: [(key(0), key(3000))])
        stopped.append(True)

    def wait() -> None:
        wait_until(lambda: timeline.stopping)
        stopping.set()

    with running(compact, wait):
        assert reading.wait(10)
        repository.shutdown(flush=True)
    assert stopped == [True]
    assert not any("temp" in name for name in files(timeline))
    with pytest.raises(TimelineStopped):
        timeline.compact(never)


# ---- crashes and damage


def test_a_crash_in_any_step(tmp_path: Path) -> None:
    """Everything is readable, and the next rounds come to the same end."""
    crash = CrashFiles(tmp_path / "store", tmp_path / "crashed")
    settings = {"compaction_threshold": 3, "compaction_target_size": 300, "image_part_keys": 5}
    repository = open_repository(
        tmp_path / "store", with_files(crash), compress_layers=False, **settings
    )
    timeline = new_timeline(repository)
    for lsn in (24, 32, 40, 48, 56):
        put(timeline, lsn, *((i, RECORD, b"+%d" % lsn * 20) for i in range(0, 10, 2)))
        timeline.checkpoint()
    delete_range(timeline, 64, 4, 6)
    timeline.checkpoint()
    expected = all_reads(timeline)
    crash.on = True
    repository.settings = StoreSettings(
        compaction_threshold=3,
        compaction_target_size=300,
        image_creation_threshold=1,
        image_part_keys=5,
        compress_layers=False,
    )
    result = timeline.compact(every_key(timeline))
    crash.on = False
    assert result.l0_merged == 5 and result.deltas_written > 1 and result.images_written > 1
    assert all_reads(timeline) == expected
    final = layers(timeline)
    assert {step.split()[0] for step in crash.steps} == {"create", "write", "rename", "unlink"}
    repository.shutdown(flush=False)
    for state in crash.states:
        with opened(state, image_creation_threshold=1, compress_layers=False, **settings) as after:
            timeline = after.timeline(MAIN)
            assert all_reads(timeline) == expected
            assert not any("temp" in name for name in files(timeline))
            while not timeline.compact(every_key(timeline), force=True).done:
                pass
            assert all_reads(timeline) == expected
            assert layers(timeline)["l0"] == []
            assert set(layers(timeline)["image"]) == set(final["image"])


def test_a_merge_counts_from_its_list_on(tmp_path: Path) -> None:
    """Its files and its inputs are there at the same time; it is one or the other that counts."""
    crash = CrashFiles(tmp_path / "store", tmp_path / "crashed")
    repository = open_repository(tmp_path / "store", with_files(crash), compaction_threshold=2)
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32), 1, 2)
    crash.on = True
    timeline.compact(every_key(timeline))
    repository.shutdown(flush=False)
    first_unlink = next(i for i, step in enumerate(crash.steps) if step.startswith("unlink"))
    counts = [i for i, step in enumerate(crash.steps) if step == "rename metadata"]
    assert counts == [first_unlink - 1]
    merged = {"l0": [], "delta": [(17, 33)], "image": [(16, 17)]}
    for state in (counts[0] - 1, counts[0]):
        assert len(list((crash.states[state] / "timelines" / str(MAIN)).glob("0*__*"))) == 4
        with opened(crash.states[state], compaction_threshold=2) as second:
            timeline = second.timeline(MAIN)
            before = {"l0": [(17, 25), (25, 33)], "delta": [], "image": [(16, 17)]}
            done = state == counts[0]
            assert layers(timeline) == (merged if done else before)
            assert len(files(timeline)) == (2 if done else 3) + 2
            assert timeline.get(key(1), 32) == b"i1+24+32"
            assert timeline.compact(every_key(timeline)).l0_merged == (0 if done else 2)
            assert layers(timeline) == merged
            assert timeline.get(key(1), 32) == b"i1+24+32"
            assert len(files(timeline)) == 2 + 2


def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path) -> None:
    class FullFor(Files):
        on = False
        fails = ""

        def rename(self, source: str | Path, target: str | Path) -> None:
            super().rename(source, target)
            self._fail("rename")

        def write(self, fd: int, path: str | Path, data: object, offset: int) -> None:
            self._fail("write")
            super().write(fd, path, data, offset)  # type: ignore[arg-type]

        def fsync_dir(self, path: str | Path) -> None:
            self._fail("fsync_dir")
            super().fsync_dir(path)

        def _fail(self, step: str) -> None:
            if self.on and step == self.fails:
                raise OSError(28, "No space left on device")

    disk = FullFor()
    repository = open_repository(tmp_path, with_files(disk), compaction_threshold=2)
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32), 1, 2)
    before, names = all_reads(timeline), files(timeline)
    for step in ("write", "rename", "fsync_dir"):
        disk.on, disk.fails = True, step
        with pytest.raises(OSError, match="No space left"):
            timeline.compact(every_key(timeline), force=True)
        assert all_reads(timeline) == before
        assert files(timeline) == names
    disk.on = False
    assert timeline.compact(every_key(timeline), force=True).l0_merged == 2
    assert all_reads(timeline) == before
    repository.shutdown(flush=False)


def damage(timeline: Timeline, choose: Callable[[LayerName], bool]) -> str:
    """Flip a bit in the first block of a layer; the layer's name."""
    (layer,) = (layer for layer in timeline.view.layers if choose(layer.name))
    path = Path(layer.path)
    content = bytearray(path.read_bytes())
    content[270] ^= 4
    path.write_bytes(content)
    return path.name


def test_a_damaged_layer_stops_it_for_this_timeline_only(repository: Repository) -> None:
    timeline = new_timeline(repository)
    other = new_timeline(repository, BRANCH)
    for owner in (timeline, other):
        put_layers(owner, (24,), 1)
        put_layers(owner, (32, 40), 2)
    name = damage(timeline, lambda name: name.start_lsn == 17)
    before = files(timeline)
    with pytest.raises(CorruptLayerError, match=rf"{name}: corrupt at offset 256"):
        timeline.compact(never)
    # No hot loop: a background round does not look again soon, one on demand does.
    for _ in range(3):
        assert timeline.compact(never) == POSTPONED
    with pytest.raises(CorruptLayerError):
        timeline.compact(never, force=True)
    assert files(timeline) == before
    assert timeline.get(key(2), 40) == b"i2+32+40"
    with pytest.raises(CorruptLayerError):
        timeline.get(key(1), 40)
    assert other.compact(every_key(other)).l0_merged == 3
    put_layers(timeline, (48,), 3)
    assert timeline.get(key(3), 48) == b"i3+48"


def test_it_tries_again_after_a_while(repository: Repository) -> None:
    repository.settings = StoreSettings(compaction_threshold=2, compaction_retry_interval=0.01)
    timeline = new_timeline(repository)
    put_layers(timeline, (24, 32), 1)
    name = damage(timeline, lambda name: name.start_lsn == 17)
    failures: list[str] = []

    def failed_twice() -> bool:
        try:
            timeline.compact(never)
        except CorruptLayerError as error:
            failures.append(str(error))
        return len(failures) == 2

    wait_until(failed_twice)
    assert all(name in text for text in failures)
    damage(timeline, lambda name: name.start_lsn == 17)  # the bit is back
    wait_until(lambda: timeline.compact(every_key(timeline)).l0_merged == 2)


def test_an_error_of_the_keyspace_is_raised(repository: Repository) -> None:
    repository.settings = StoreSettings(compaction_threshold=1, image_creation_threshold=1)
    timeline = new_timeline(repository)
    put_layers(timeline, (24,), 1)

    def fails(lsn: int) -> Sequence[tuple[bytes, bytes]]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timeline.compact(fails)
    assert layers(timeline)["l0"] == []
    assert timeline.compact(fails) == POSTPONED
    assert timeline.compact(every_key(timeline), force=True).images_written == 1


def test_an_idle_timeline_costs_nothing(repository: Repository) -> None:
    """Once nothing is left to do the layers are not even looked at."""
    timeline = new_timeline(repository)
    branch = repository.branch_timeline(TimelineId(bytes(16)), ancestor_id=MAIN)
    put_layers(timeline, (24, 32), 1)
    for owner in (timeline, branch):
        while not owner.compact(never).done:
            pass
    assert timeline.compact(never) == NOTHING
    put(timeline, 40, (1, IMAGE, b"x"))
    assert not timeline.compact(never).done
