"""Timelines: reading through all layers and ancestors, branching, positions, many of them."""

import shutil
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
    append,
    delete_range,
    key,
    new_timeline,
    open_repository,
    opened,
    put,
    running,
    wait_until,
    with_files,
)

from pageserver.layered_repository.errors import (
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
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import Lsn


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with opened(tmp_path, flush_retry_interval=0.01) as repository:
        yield repository


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


def test_a_deleted_range(repository: Repository) -> None:
    """Gone in every layer it lies in, back with later puts, still there before, in branches too."""
    timeline = new_timeline(repository)
    before = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    delete_range(timeline, 24, 2, 5)
    put(timeline, 32, (3, IMAGE, b"again"))
    after = repository.branch_timeline(TimelineId.generate(), ancestor_id=MAIN)
    delete_range(after, 40, 0, 4)
    timelines = (timeline, after, before)
    for step in ("open", "frozen", "flushed"):
        if step == "frozen":
            for owner in timelines:
                owner.freeze()
        if step == "flushed":
            for owner in timelines:
                owner.flush()
        expected = [b"i1", None, b"again", None, b"i5"]
        assert timeline.get_vectored([key(i) for i in (1, 2, 3, 4, 5)], 32) == expected
        assert timeline.get_vectored([key(2), key(3)], 24) == [None, None]
        assert timeline.get_vectored([key(2), key(3)], 23) == [b"i2", b"i3"]
        assert timeline.scan_keys(key(0), key(9), 32) == [key(i) for i in (0, 1, 3, 5, 6, 7, 8)]
        assert after.scan_keys(key(0), key(9), 40) == [key(i) for i in (5, 6, 7, 8)]
        assert after.get(key(3), 39) == b"again"
        assert before.scan_keys(key(0), key(9), 40) == [key(i) for i in range(9)]
        with pytest.raises(KeyNotFound):
            after.get(key(3), 40)


# ---- branches


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
    timeline.checkpoint()
    timeline.publish_gc_cutoff(32)
    with pytest.raises(InvalidBranchLsn, match=r"^invalid branch start lsn$") as caught:
        repository.branch_timeline(TimelineId.generate(), ancestor_id=MAIN, start_lsn=24)
    assert "LSN 0/18 is earlier than latest GC horizon 0/20" in str(caught.value.__cause__)
    assert set(repository.timelines()) == {MAIN, BRANCH, newest.timeline_id}


def test_detach(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(branch, 24, (1, RECORD, b"+a"))
    branch.checkpoint()
    with pytest.raises(StoreError, match=f"ancestor of {BRANCH}"):
        repository.detach_timeline(MAIN)
    assert branch.get(key(1), 24) == b"i1+a"
    reading = [layer.entries() for layer in branch.view.layers]
    repository.detach_timeline(BRANCH)
    # Its files are gone; one that somebody is in still serves him.
    assert [entry[0] for entries in reading for entry in entries] == [key(1)]
    repository.detach_timeline(MAIN)
    with pytest.raises(TimelineStopped):
        timeline.get(key(1), 16)
    assert repository.timelines() == []
    assert list((tmp_path / "timelines").iterdir()) == []
    with pytest.raises(TimelineNotFound):
        repository.detach_timeline(MAIN)
    with pytest.raises(TimelineNotFound):
        repository.timeline(MAIN)
    new_timeline(repository)


def test_a_timeline_that_is_being_deleted_gets_no_branch(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = new_timeline(repository)
    real_detach = type(timeline).detach
    refused: list[str] = []

    def detach(self: object) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: repository.branch_timeline(BRANCH, ancestor_id=MAIN),
            lambda: repository.create_timeline(MAIN, initdb_lsn=16),
            lambda: repository.timeline(MAIN),
        ]
        for attempt in attempts:
            with pytest.raises((TimelineNotFound, TimelineExists)) as caught:
                attempt()
            refused.append(type(caught.value).__name__)
        real_detach(timeline)

    monkeypatch.setattr(type(timeline), "detach", detach)
    repository.detach_timeline(MAIN)
    assert refused == ["TimelineNotFound", "TimelineExists", "TimelineNotFound"]
    assert repository.timelines() == []


def test_a_branch_that_may_come_back_keeps_its_state(tmp_path: Path) -> None:
    """As long as its deletion is not durable."""

    class NoSync(Files):
        on = False

        def fsync_dir(self, path: str | Path) -> None:
            if self.on:
                raise OSError(5, "Input/output error")
            super().fsync_dir(path)

    disk = NoSync()
    repository = open_repository(tmp_path, with_files(disk))
    timeline = new_timeline(repository)
    repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    disk.on = True
    with pytest.raises(OSError, match="Input/output"):
        repository.detach_timeline(BRANCH)
    assert timeline.retain_points() == [16]
    repository.shutdown(flush=False)


def test_a_detach_that_failed_is_tried_again(tmp_path: Path) -> None:
    """At any step, by the process in which it failed."""

    class FailingStep(Files):
        left = -1

        def step(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise OSError(5, "Input/output error")

        def rename(self, source: str | Path, target: str | Path) -> None:
            self.step()
            super().rename(source, target)

        def fsync_dir(self, path: str | Path) -> None:
            self.step()
            super().fsync_dir(path)

        def rmtree(self, path: str | Path) -> None:
            for child in Path(path).iterdir():
                self.step()
                child.unlink()
            super().rmtree(path)

    disk = FailingStep()
    repository = open_repository(tmp_path, with_files(disk))
    main = new_timeline(repository)
    steps = 0
    while disk.left <= 0:
        steps += 1
        put(repository.branch_timeline(BRANCH, ancestor_id=MAIN), 24, (1, RECORD, b"+"))
        repository.timeline(BRANCH).checkpoint()
        for left in (steps, steps // 2):
            disk.left = left
            try:
                repository.detach_timeline(BRANCH)
            except OSError:
                assert main.retain_points() == [16]
                disk.left = 0
                continue
            break
        else:
            repository.detach_timeline(BRANCH)
        assert main.retain_points() == []
        assert [path.name for path in (tmp_path / "timelines").iterdir()] == [str(MAIN)]
        with pytest.raises(TimelineNotFound):
            repository.detach_timeline(BRANCH)
    assert steps > 5
    repository.shutdown(flush=False)


def test_a_start_syncs_what_the_last_process_may_not_have(tmp_path: Path) -> None:
    synced: list[Path] = []

    class Watch(Files):
        def fsync_dir(self, path: str | Path) -> None:
            synced.append(Path(path))
            super().fsync_dir(path)

    open_repository(tmp_path / "a").shutdown(flush=False)
    for durable in (False, True):
        synced.clear()
        Repository(
            tmp_path / "a",
            TENANT,
            StoreSettings(),
            append,
            resources=with_files(Watch()),
            durable=durable,
        ).shutdown(flush=False)
        above = [] if durable else [tmp_path, tmp_path / "a"]
        assert synced == [*above, tmp_path / "a" / "timelines"]
    # What is made now is synced whoever made the rest.
    shutil.rmtree(tmp_path / "a" / "timelines")
    synced.clear()
    Repository(
        tmp_path / "a", TENANT, StoreSettings(), append, resources=with_files(Watch()), durable=True
    ).shutdown(flush=False)
    assert tmp_path / "a" in synced


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


def test_a_thousand_branches_cost_no_more_each_than_one(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither creating nor loading one looks at the others."""
    monkeypatch.setattr("os.fsync", lambda fd: None)
    new_timeline(repository)
    read: list[TimelineId] = []
    real_read = Repository.read_metadata

    def read_metadata(self: Repository, timeline_id: TimelineId) -> object:
        read.append(timeline_id)
        return real_read(self, timeline_id)

    monkeypatch.setattr(Repository, "read_metadata", read_metadata)
    ids = [TimelineId(number.to_bytes(16, "big")) for number in range(1000)]
    for timeline_id in ids:
        repository.branch_timeline(timeline_id, ancestor_id=MAIN)
    assert read == []
    repository.shutdown(flush=True)

    second = open_repository(tmp_path)
    assert second.timeline(ids[500]).get(key(4), 16) == b"i4"
    assert read == []
    assert not second.is_loaded(ids[501])
    # Garbage collection knows where the others begin, but does not load them.
    second.gc(MAIN, choose_cutoff=lambda timeline: timeline.last_record_lsn)
    assert len(read) == 999
    second.detach_timeline(ids[501])
    assert len(read) == 999
    assert not second.is_loaded(ids[502])
    second.shutdown(flush=True)


def test_many_layers_are_loaded_without_opening_one(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = new_timeline(repository)
    for lsn in range(24, 24 + 8 * 100, 8):
        put(timeline, lsn, (lsn % 10, RECORD, b"+"))
        timeline.checkpoint()
    sizes = {layer.name: layer.size for layer in timeline.view.layers}
    repository.shutdown(flush=True)

    def no_open(self: LayerFile) -> None:
        raise AssertionError(f"{self.path} was opened")

    second = open_repository(tmp_path)
    loaded = second.timeline(MAIN)
    assert {layer.name: layer.size for layer in loaded.view.layers} == sizes
    assert all(size > 256 for size in sizes.values())
    assert not any(layer.is_open for layer in loaded.view.layers)
    second.shutdown(flush=True)


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
    wait_until(lambda: timeline.position.waiting == 3)
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
    with pytest.raises(LsnNotReadable), timeline.pin(8):
        raise AssertionError("entered")
    assert timeline.pins == {}


def test_below_the_branch_point_the_ancestors_cutoff_counts(repository: Repository) -> None:
    timeline = new_timeline(repository)
    for lsn in (24, 32, 40):
        put(timeline, lsn)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=32)
    leaf = repository.branch_timeline(TimelineId.generate(), ancestor_id=BRANCH)
    with leaf.pin(24):
        # The history it reads is that of the root; a collection there must know.
        assert timeline.retain_points() == [32, 24]
        assert leaf.retain_points() == []
    timeline.checkpoint()
    timeline.publish_gc_cutoff(40)
    for owner in (branch, leaf):
        owner.check_lsn_readable(32)
        with pytest.raises(LsnNotReadable, match="requested at 0/18 gc cutoff 0/28"):
            owner.check_lsn_readable(24)
    assert timeline.latest_gc_cutoff_lsn == Lsn(40)
    timeline.publish_gc_cutoff(24)
    assert timeline.latest_gc_cutoff_lsn == 40


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

    with running(read, read, read):
        for lsn in range(24, 24 + 8 * 400, 8):
            put(timeline, lsn, (lsn % 10, RECORD, b"+%d" % lsn))
        timeline.checkpoint()
        done.set()
    assert failures == []
    assert len(timeline.view.layers) > 5
    repository.shutdown(flush=True)
