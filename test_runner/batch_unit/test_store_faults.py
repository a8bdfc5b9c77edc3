"""Errors of the disk and damaged files: reported, nothing lost, the work goes on afterwards."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
from batch_unit.power_loss import Disk, RecordingFiles, write_tree
from batch_unit.store_scenarios import SCENARIOS
from batch_unit.store_support import BRANCH, IMPORT_LSN, MAIN, wait_until
from batch_unit.store_world import (
    KEYS,
    SETTINGS,
    History,
    UnsyncedFiles,
    World,
    check_offline,
    scratch,
)

from pageserver.background import BackgroundThread
from pageserver.layered_repository import compaction_plan
from pageserver.layered_repository.compactor import CompactionResult
from pageserver.layered_repository.errors import (
    CorruptLayerError,
    CorruptMetadataError,
)
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.verify_repository import verify
from pageserver.leases import LeaseRegistry
from pageserver.maintenance import CompactionTask
from pageserver.tenant_config import TenantConf, effective_conf
from pageserver.timelines import TimelineHandle
from zenith_utils.ids import TimelineId


@pytest.fixture(autouse=True)
def little_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes are worth an image."""
    monkeypatch.setattr(compaction_plan, "MIN_GARBAGE", 200)


# ---- errors of the disk


@dataclass
class Fault:
    """The step of that number fails, and with `lasting` all that come later."""

    at: int
    lasting: bool
    count: int = 0
    failures: int = 0

    @property
    def hit(self) -> bool:
        """Whether there was such a step."""
        return self.count >= self.at

    def __call__(self) -> None:
        """Before every step."""
        self.count += 1
        if self.count == self.at or (self.lasting and self.hit):
            self.failures += 1
            code = (errno.ENOSPC, errno.EIO)[self.at % 2]
            raise OSError(code, os.strerror(code))


class FaultyFiles(RecordingFiles):
    """Counts the deletions that failed."""

    undeleted = 0

    def unlink(self, path: str | Path) -> None:
        """Remove a file."""
        try:
            super().unlink(path)
        except OSError:
            self.undeleted += 1
            raise


def settle(world: World) -> None:
    """The disk is well again: what is frozen is flushed without anybody asking."""
    for timeline_id in world.repository.timelines():
        if world.repository.is_loaded(timeline_id):
            timeline = world.repository.timeline(timeline_id)
            wait_until(lambda timeline=timeline: not timeline.view.frozen)  # type: ignore[misc]


def check_loaded(world: World) -> None:
    """What is in memory is as it was."""
    for timeline_id in world.repository.timelines():
        if world.repository.is_loaded(timeline_id):
            timeline = world.repository.timeline(timeline_id)
            if timeline.last_record_lsn:
                world.check(timeline_id)


def tidy_up(world: World) -> None:
    """Garbage collection comes back to what it could not do."""
    for timeline_id in world.repository.timelines():
        if world.repository.is_loaded(timeline_id):
            for _ in range(3):
                world.collect(world.timeline(timeline_id).disk_consistent_lsn, timeline_id)


def check_restart(path: Path, copy: Path, histories: dict[TimelineId, History]) -> None:
    """What a new process would find now."""
    shutil.copytree(path, copy)
    world = World(copy / "tenant", UnsyncedFiles(), histories=histories)
    try:
        for timeline_id in world.repository.timelines():
            timeline = world.timeline(timeline_id)
            ancestor = timeline.ancestor
            if ancestor is None or ancestor.last_record_lsn >= timeline.ancestor_lsn:
                world.check(timeline_id)
    finally:
        world.close()
        shutil.rmtree(copy)


def run_with_fault(path: Path, name: str, fault: Fault) -> bool:
    """A scenario with a failing disk, and what comes after; False if the fault was not met."""
    path.mkdir()
    prepare, act = SCENARIOS[name]
    files = FaultyFiles(path)
    world = World(path / "tenant", files)
    try:
        prepare(world)
        files.observe = fault
        try:
            act(world)
        except OSError:
            assert fault.hit
        else:
            # A flush is tried again in the background. That something which does not count any
            # more cannot be deleted does no harm.
            assert not fault.lasting or fault.failures == files.undeleted
        files.observe = lambda: None
        settle(world)
        check_loaded(world)
        tidy_up(world)
        check_loaded(world)
        check_restart(path, path.with_name(f"{path.name}-restarted"), world.histories)
        world.go_on(world.promises())
        check_loaded(world)
    finally:
        files.observe = lambda: None
        world.close()
    there = world.repository.timelines()
    check_afterwards(path, world.histories, there)
    # Nor is anything lost if the power fails now.
    disk = Disk()
    for operation in files.operations:
        disk.apply(operation)
    for number, (_, tree) in enumerate(disk.outcomes(fault.at)):
        if number in (0, 4):
            copy = path / f"left-{number}"
            write_tree(tree, copy)
            check_afterwards(copy, world.histories, there)
    shutil.rmtree(path)
    return fault.hit


def check_afterwards(
    path: Path, histories: dict[TimelineId, History], there: Sequence[TimelineId]
) -> None:
    """After a restart everything is there: all of it had been made durable.

    A timeline whose deletion failed may be back; it has its history then.
    """
    check_offline(path)
    world = World(path / "tenant", UnsyncedFiles(), histories=histories)
    try:
        assert set(there) <= set(world.repository.timelines()) <= set(histories)
        for timeline_id in world.repository.timelines():
            world.check(timeline_id)
        for timeline_id in there:
            last_lsn = histories[timeline_id].last_lsn
            assert world.timeline(timeline_id).last_record_lsn == last_lsn
    finally:
        world.close()


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_error_at_any_step(name: str, lasting: bool) -> None:
    with scratch() as path:
        for at in itertools.count(1):
            try:
                if not run_with_fault(path / str(at), name, Fault(at, lasting)):
                    break
            except BaseException as error:
                error.add_note(f"step {at} failed")
                raise
        assert at > 5


def test_writing_goes_on_until_the_disk_has_room_again(tmp_path: Path) -> None:
    """Records are taken while the flush fails; when it works again everything gets to the disk."""
    files = RecordingFiles(tmp_path)
    world = World(tmp_path / "tenant", files)
    try:
        world.import_main()
        fault = Fault(1, lasting=True)
        files.observe = fault
        for _ in range(3):
            world.put(1, 2)
            world.timeline().freeze()
            with pytest.raises(OSError, match=r"No space|Input/output"):
                world.timeline().flush()
            world.check()
        assert world.timeline().disk_consistent_lsn == IMPORT_LSN
        tried = fault.count
        wait_until(lambda: fault.count > tried)
        files.observe = lambda: None
        wait_until(lambda: world.timeline().disk_consistent_lsn == world.histories[MAIN].last_lsn)
        world.check()
    finally:
        files.observe = lambda: None
        world.close()
    check_afterwards(tmp_path, world.histories, [MAIN])


# ---- damage


def make_damaged_branch(path: Path) -> dict[TimelineId, History]:
    """A store in which a branch has files of every kind: deltas merged and not, images."""
    world = World(path / "tenant", UnsyncedFiles())
    try:
        world.import_main()
        world.layers(1, 1, 2)
        world.branch(BRANCH)
        for _ in range(2):
            world.layers(2, 1, 5, 6, on=BRANCH)
            world.compact(BRANCH)
        world.end(2, 4, on=BRANCH)
        for number in (1, 5, 6, 8):
            world.put(number, on=BRANCH, size=3000)
        world.checkpoint(BRANCH)
        world.layers(1, 1, 7, on=BRANCH)
        world.layers(2, 1, 2)
    finally:
        world.close()
    return world.histories


@contextmanager
def flipped(path: Path, offset: int) -> Iterator[None]:
    """One bit of a file is wrong meanwhile."""
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[offset] ^= 1 << offset % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(good)


def branch_files(path: Path) -> list[Path]:
    """The files of the branch."""
    return sorted((path / "tenant" / "timelines" / str(BRANCH)).iterdir())


def test_a_wrong_bit_anywhere(tmp_path: Path) -> None:
    """Reads of the timeline are right or name the file and the place; others see nothing of it."""
    histories = make_damaged_branch(tmp_path)
    history = histories[BRANCH]
    kinds = set()
    for file in branch_files(tmp_path):
        name = LayerName.parse(file.name)
        kinds.add(file.name.partition("-")[0] if name is None else (name.is_image, name.is_l0))
        refused = 0
        for offset in range(0, file.stat().st_size, 13 if file.stat().st_size < 4096 else 61):
            with flipped(file, offset):
                found = [x for x in verify(tmp_path / "tenant") if x.is_problem]
                assert file in {x.path for x in found}, (file.name, offset)
                world = World(tmp_path / "tenant", UnsyncedFiles(), histories=histories)
                try:
                    world.check()
                    refused += read_damaged(world, history, file, offset)
                finally:
                    world.close()
        assert refused, file.name
    assert kinds == {"metadata", "layers", (False, True), (False, False), (True, False)}


def read_damaged(world: World, history: History, file: Path, offset: int) -> bool:
    """Read a timeline one file of which is damaged; whether that was noticed."""
    if file.name == "metadata" or file.name.startswith("layers-"):
        with pytest.raises(CorruptMetadataError, match=str(file)):
            world.timeline(BRANCH)
        return True
    noticed = False
    for lsn in range(history.start_lsn, history.last_lsn + 8, 8):
        expected = history.at(lsn)
        try:
            assert world.timeline(BRANCH).get_vectored(KEYS, lsn) == [expected.get(k) for k in KEYS]
            assert world.timeline(BRANCH).scan_keys(MIN_KEY, MAX_KEY, lsn) == sorted(expected)
        except CorruptLayerError as error:
            assert error.path == file
            assert 0 <= error.offset <= offset
            noticed = True
    return noticed


def test_a_wrong_bit_in_one_value_leaves_the_other_keys(tmp_path: Path) -> None:
    histories = make_damaged_branch(tmp_path)
    history = histories[BRANCH]
    file = max(branch_files(tmp_path), key=lambda path: path.stat().st_size)
    for number in (1, 5, 6, 8):
        data = next(
            batch.puts[KEYS[number]][1]
            for batch in history.batches
            if len(batch.puts.get(KEYS[number], (0, b""))[1]) > 3000
        )
        offset = file.read_bytes().index(data) + 1500
        world = World(tmp_path / "tenant", UnsyncedFiles(), histories=histories)
        try:
            with flipped(file, offset):
                for other, expected in history.at(history.last_lsn).items():
                    if other == KEYS[number]:
                        with pytest.raises(CorruptLayerError, match=file.name) as raised:
                            world.timeline(BRANCH).get(other, history.last_lsn)
                        assert offset - 1600 < raised.value.offset < offset - 1500
                    else:
                        assert world.timeline(BRANCH).get(other, history.last_lsn) == expected
        finally:
            world.close()


@dataclass(eq=False)
class Handle:
    """What background work knows of a timeline."""

    world: World
    timeline: Timeline

    @property
    def leases(self) -> LeaseRegistry:
        """None are held."""
        return LeaseRegistry(self.timeline.check_lsn_readable, {})

    def compact(self) -> CompactionResult:
        """One round of compaction."""
        return self.timeline.compact(self.world.keyspace(self.timeline.timeline_id))


def test_background_work_backs_off_from_a_damaged_timeline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    histories = make_damaged_branch(tmp_path)
    world = World(
        tmp_path / "tenant",
        UnsyncedFiles(),
        histories=histories,
        settings=replace(SETTINGS, compaction_retry_interval=0.0),
    )
    handles = [Handle(world, world.timeline(timeline_id)) for timeline_id in (BRANCH, MAIN)]
    conf = effective_conf({}, {"compaction_period": "1 s"})
    now = [0.0]

    def timelines() -> list[tuple[TimelineHandle, TenantConf]]:
        return [(cast(TimelineHandle, handle), conf) for handle in handles]

    thread = BackgroundThread(CompactionTask(), timelines, clock=lambda: now[0])

    def rounds(seconds: int) -> int:
        """How often the damaged timeline was looked at in so many seconds."""
        caplog.clear()
        for _ in range(seconds):
            thread.round()
            now[0] += 1.0
        return sum("compaction failed" in record.message for record in caplog.records)

    try:
        file = next(x for x in branch_files(tmp_path) if is_l0(x))
        with flipped(file, 300):
            assert 3 <= rounds(30) <= 5
            assert f"{file.name}: corrupt at offset" in caplog.text
            assert rounds(30) <= 2
            assert not any(layer.name.is_l0 for layer in world.timeline().view.layers)
            assert any(layer.name.is_l0 for layer in world.timeline(BRANCH).view.layers)
            world.check()
            world.layers(2, 1, 2)
            rounds(3)
            assert not any(layer.name.is_l0 for layer in world.timeline().view.layers)
            # What is not damaged can be written and collected.
            world.layers(1, 9, on=BRANCH)
            world.collect(world.histories[BRANCH].start_lsn, BRANCH)
            assert not list(tmp_path.rglob("*.___temp"))
        assert rounds(100) == 0
        assert not any(layer.name.is_l0 for layer in world.timeline(BRANCH).view.layers)
        world.check(BRANCH)
    finally:
        world.close()


def is_l0(path: Path) -> bool:
    """Whether a file is a delta over all keys."""
    name = LayerName.parse(path.name)
    return name is not None and name.is_l0


def test_compaction_of_a_damaged_timeline_waits(tmp_path: Path) -> None:
    """By itself too; on demand it says what is wrong each time."""
    histories = make_damaged_branch(tmp_path)
    world = World(tmp_path / "tenant", UnsyncedFiles(), histories=histories)
    try:
        file = next(x for x in branch_files(tmp_path) if is_l0(x))
        timeline = world.timeline(BRANCH)
        before = branch_files(tmp_path)
        with flipped(file, 300):
            for force in (False, True, True):
                with pytest.raises(CorruptLayerError, match=file.name):
                    timeline.compact(world.keyspace(BRANCH), force=force)
                assert not timeline.compact(world.keyspace(BRANCH)).done
            assert branch_files(tmp_path) == before
        world.compact(BRANCH)
        world.check(BRANCH)
    finally:
        world.close()
