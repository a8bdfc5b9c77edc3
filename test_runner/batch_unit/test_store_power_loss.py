"""The power fails after any step of anything the store does; nothing that was promised is lost.

Each scenario is recorded once. Then, for every step, what a power failure there may leave on the
disk is laid out in a new directory and opened.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from batch_unit.power_loss import Disk, Operation, RecordingFiles, Remove, Rename, Tree, write_tree
from batch_unit.store_scenarios import SCENARIOS
from batch_unit.store_world import History, Promises, UnsyncedFiles, World, check_offline, scratch

from pageserver.layered_repository import compaction_plan
from zenith_utils.ids import TimelineId

SIMPLE_OUTCOMES = ("nothing unsynced", "removals only", "no removals", "the last change")


class Recording:
    """A world whose steps are written down, with the promises in force before each of them."""

    def __init__(
        self,
        path: Path,
        disk: Disk,
        histories: dict[TimelineId, History] | None = None,
        promises: Promises | None = None,
    ) -> None:
        self.files = RecordingFiles(path)
        self.disk = disk
        """As it was when the recording began."""
        self.promises: list[Promises] = []
        self._world: World | None = None
        self._earlier = promises or {}
        self.files.observe = self.observe
        self.world = World(path / "tenant", self.files, histories=histories)
        self._world = self.world
        self.world.resume(self._earlier)

    def observe(self) -> None:
        """Note what is promised now."""
        world = self._world
        self.promises.append(self._earlier if world is None else world.promises())

    @property
    def steps(self) -> list[Operation]:
        """What was done so far."""
        return self.files.operations

    def begin(self) -> None:
        """What was done so far is not to be looked at: it is done again without a power failure."""
        for operation in self.steps:
            self.disk.apply(operation)
        self.steps.clear()
        self.promises.clear()

    def end(self) -> None:
        """The recording is complete."""
        self.observe()
        self.files.observe = lambda: None
        self.world.close()


class Sweep:
    """Opens what power failures leave; each different case once."""

    def __init__(self, path: Path, histories: dict[TimelineId, History]) -> None:
        self._path = path
        self._histories = histories
        self._seen: set[bytes] = set()
        self._count = 0

    def failures(self, recording: Recording, *, restarts: int = 0, thorough: bool = True) -> None:
        """The power fails after every step.

        With `restarts` it also fails while the store is opened after that, so many times in a row.
        Without `thorough` less is done with what is left: it is read.
        """
        disk = recording.disk.copy()
        for number, promises in enumerate(recording.promises):
            if number:
                disk.apply(recording.steps[number - 1])
            for name, tree in disk.outcomes(number):
                if not thorough and name not in SIMPLE_OUTCOMES:
                    continue
                if self._is_new(tree, promises):
                    step = recording.steps[number - 1] if number else "nothing"
                    try:
                        self._open(tree, promises, restarts, thorough)
                    except BaseException as error:
                        error.add_note(f"power failure {number}, after {step}, left: {name}")
                        raise

    def kills(self, recording: Recording, go_on: Callable[[World], None]) -> None:
        """The process is killed where directories are not synced, and started again.

        It finds all that the first one did, although that is not durable. Then the power fails.
        """
        disk = recording.disk.copy()
        for number, promises in enumerate(recording.promises):
            if number:
                disk.apply(recording.steps[number - 1])
            is_change = number and isinstance(recording.steps[number - 1], Rename | Remove)
            if not (is_change and disk.uncertain and self._is_new(disk.seen(), promises)):
                continue
            path = self._lay_out(disk.seen())
            second = Recording(path, disk.copy(), self._histories, promises)
            go_on(second.world)
            second.end()
            shutil.rmtree(path)
            try:
                self.failures(second, thorough=False)
            except BaseException as error:
                error.add_note(f"process killed at {number}, after {recording.steps[number - 1]}")
                raise

    def _is_new(self, tree: Tree, promises: Promises) -> bool:
        case = repr((_sorted(tree), sorted(promises.items())))
        digest = hashlib.sha256(case.encode()).digest()
        known = digest in self._seen
        self._seen.add(digest)
        return not known

    def _lay_out(self, tree: Tree) -> Path:
        self._count += 1
        path = self._path / f"{self._count:05}"
        write_tree(tree, path)
        return path

    def _open(self, tree: Tree, promises: Promises, restarts: int, thorough: bool) -> None:
        path = self._lay_out(tree)
        if restarts:
            disk = Disk.of(tree)
            recovery = Recording(path, disk, self._histories, promises)
            recovery.end()
            if recovery.steps:
                self.failures(recovery, restarts=restarts - 1)
        check_offline(path)
        world = World(path / "tenant", UnsyncedFiles(), histories=self._histories)
        try:
            check_promises(world, promises)
            if thorough:
                world.go_on(promises)
                assert not list(path.rglob("*.___temp"))
        finally:
            world.close()
        if thorough:
            self._open_again(path)
        shutil.rmtree(path)

    def _open_again(self, path: Path) -> None:
        check_offline(path)
        again = World(path / "tenant", UnsyncedFiles(), histories=self._histories)
        try:
            for timeline_id in again.repository.timelines():
                last_lsn = self._histories[timeline_id].last_lsn
                assert again.timeline(timeline_id).last_record_lsn == last_lsn
                again.check(timeline_id)
        finally:
            again.close()


def _sorted(tree: Tree) -> list[object]:
    return [
        (name, _sorted(node) if isinstance(node, dict) else node)
        for name, node in sorted(tree.items())
    ]


def check_promises(world: World, promises: Promises) -> None:
    """Nothing is missing, nothing is there that was deleted, what is readable is right."""
    present = world.repository.timelines()
    assert set(present) <= set(promises)
    for timeline_id, promise in promises.items():
        if promise.exists is not None:
            assert (timeline_id in present) == promise.exists, timeline_id
        if timeline_id not in present:
            continue
        timeline = world.timeline(timeline_id)
        history = world.histories[timeline_id]
        lsns = [history.start_lsn, *(batch.lsn for batch in history.batches)]
        lsn_on_disk = timeline.disk_consistent_lsn
        assert lsn_on_disk == timeline.last_record_lsn
        assert promise.durable_lsn <= lsn_on_disk in lsns
        assert timeline.prev_record_lsn in (0, timeline.last_record_lsn - 8)
        assert all(layer.end_lsn <= lsn_on_disk + 1 for layer in timeline.view.layers)
        cutoff = timeline.latest_gc_cutoff_lsn
        assert promise.cutoff <= cutoff <= min(promise.highest_cutoff, lsn_on_disk)
        ancestor = timeline.ancestor
        if ancestor is None or ancestor.last_record_lsn >= timeline.ancestor_lsn:
            world.check(timeline_id)


def record(path: Path, name: str) -> Recording:
    """Run a scenario."""
    path.mkdir()
    prepare, act = SCENARIOS[name]
    recording = Recording(path, Disk())
    prepare(recording.world)
    recording.begin()
    act(recording.world)
    recording.end()
    return recording


@pytest.fixture(autouse=True)
def little_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes are worth an image."""
    monkeypatch.setattr(compaction_plan, "MIN_GARBAGE", 200)


@pytest.fixture
def directory() -> Iterator[Path]:
    """For the stores."""
    with scratch() as path:
        yield path


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_failure_after_any_step(directory: Path, name: str) -> None:
    recording = record(directory / "recorded", name)
    sweep = Sweep(directory, recording.world.histories)
    sweep.failures(recording, restarts=1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_process_killed_before_the_power_failure(directory: Path, name: str) -> None:
    """What a process finds after a start is not durable yet if the last one had not synced it."""

    def work(world: World) -> None:
        for timeline_id in world.repository.timelines():
            world.compact(timeline_id)
            cutoff = world.timeline(timeline_id).latest_gc_cutoff_lsn
            world.collect(cutoff, timeline_id)

    recording = record(directory / "recorded", name)
    Sweep(directory, recording.world.histories).kills(recording, work)
