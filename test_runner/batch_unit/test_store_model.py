"""The store against a dict: everything that changes a timeline or its layers, in random order.

ZENITH_STORE_MODEL_EXAMPLES=n runs n random sequences instead of the few that are always the same.
"""

import contextlib
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from batch_unit.store_support import IMAGE, INIT_RECORD, RECORD, TENANT, append, with_files
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pageserver.layered_repository import compaction_plan, compactor
from pageserver.layered_repository.errors import InvalidBranchLsn, LsnNotReadable
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_split import split_layer
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.timeline_dir import next_key
from zenith_utils.ids import TimelineId

KEYS = [bytes([0] * 13 + [i // 4] + [0, 0, 0, i]) for i in range(12)]
TABLES = [(KEYS[first], next_key(KEYS[first + 3])) for first in (0, 4, 8)]
IMPORT_LSN = 16
MAX_BRANCHES = 6
EXAMPLES = int(os.environ.get("ZENITH_STORE_MODEL_EXAMPLES", "0"))


class Put(NamedTuple):
    """One value."""

    lsn: int
    key: bytes
    flags: int
    data: bytes


class Delete(NamedTuple):
    """The end of a range of keys."""

    lsn: int
    start: bytes
    end: bytes


Change = Put | Delete


class UnsyncedFiles(Files):
    """Without fsync: the machine does not crash here."""

    def fsync(self, fd: int, path: str | Path) -> None:
        """Nothing."""

    def fsync_dir(self, path: str | Path) -> None:
        """Nothing."""


@dataclass(eq=False)
class Branch:
    """What a timeline must hold: all that was ever written, and where it came from."""

    timeline_id: TimelineId
    ancestor: "Branch | None"
    start_lsn: int
    last_lsn: int
    cutoff: int
    batches: list[tuple[int, list[Change]]] = field(default_factory=list)
    history: dict[bytes, list[tuple[int, bytes | None]]] = field(default_factory=dict)

    def value(self, key: bytes, lsn: int) -> bytes | None:
        """What the store must answer."""
        versions = self.history.get(key, [])
        index = bisect_right(versions, lsn, key=lambda version: version[0])
        if index:
            return versions[index - 1][1]
        return self.ancestor.value(key, min(lsn, self.start_lsn)) if self.ancestor else None

    def live(self, lsn: int) -> list[bytes]:
        """The keys that exist."""
        return [key for key in KEYS if self.value(key, lsn) is not None]

    def readable(self, lsn: int) -> bool:
        """Whether garbage collection, here or where the history comes from, has left it."""
        if lsn < self.cutoff:
            return False
        return self.ancestor is None or lsn >= self.start_lsn or self.ancestor.readable(lsn)

    def apply(self, changes: list[Change]) -> None:
        """A batch that was finished."""
        for change in changes:
            if isinstance(change, Delete):
                for key in KEYS:
                    if change.start <= key < change.end:
                        self._set(key, change.lsn, None)
            else:
                base = b"" if change.flags & 1 else self.value(change.key, change.lsn - 1) or b""
                self._set(change.key, change.lsn, base + change.data)

    def _set(self, key: bytes, lsn: int, value: bytes | None) -> None:
        versions = self.history.setdefault(key, [])
        if versions and versions[-1][0] == lsn:
            versions.pop()
        versions.append((lsn, value))


@dataclass
class Pin:
    """A read in progress."""

    branch: Branch
    lsn: int
    release: contextlib.ExitStack


class StoreMachine(RuleBasedStateMachine):
    """Small settings, so that layers are many and the cache forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.branches: list[Branch] = []
        self.pins: list[Pin] = []
        self.created = 0
        self.repository = self.open()

    def open(self) -> Repository:
        """The repository as a new process finds it."""
        limits = StoreSettings(
            checkpoint_distance=200,
            max_frozen_layers=2,
            page_cache_size=4000,
            compaction_threshold=2,
            compaction_target_size=3000,
            image_creation_threshold=2,
            image_part_keys=5,
        )
        resources = with_files(UnsyncedFiles(), page_cache_size=4000)
        return Repository(self.path, TENANT, limits, append, resources=resources)

    def teardown(self) -> None:
        """The end of a run: everything is looked at, once more after a restart."""
        try:
            if self.branches:
                self.check_everything()
                self.restart(flush=False)
                self.check_everything()
        finally:
            self.repository.shutdown(flush=False)
            shutil.rmtree(self.path)

    @initialize(present=st.sets(st.sampled_from(KEYS), min_size=1))
    def import_main(self, present: set[bytes]) -> None:
        """The root timeline with some of the keys."""
        main = self.new_branch(None, 0, IMPORT_LSN, IMPORT_LSN)
        items = [(key, b"import" + key[-1:]) for key in sorted(present)]
        main.apply([Put(IMPORT_LSN, key, IMAGE, data) for key, data in items])
        timeline = self.repository.create_timeline(main.timeline_id, initdb_lsn=IMPORT_LSN)
        timeline.import_image_layer(IMPORT_LSN, items)

    def new_branch(self, parent: Branch | None, start: int, last: int, cutoff: int) -> Branch:
        """Add a timeline to the model."""
        branch = Branch(TimelineId(self.created.to_bytes(16, "big")), parent, start, last, cutoff)
        self.created += 1
        self.branches.append(branch)
        return branch

    # ---- helpers

    def timeline(self, branch: Branch) -> Timeline:
        """That of the store."""
        return self.repository.timeline(branch.timeline_id)

    def pick(self, data: st.DataObject) -> Branch:
        """Any timeline."""
        return self.branches[data.draw(st.integers(0, len(self.branches) - 1), "timeline")]

    def pick_lsn(self, branch: Branch, data: st.DataObject) -> int:
        """Any LSN at which a record may end; simple is what is new."""
        return branch.last_lsn - 8 * data.draw(
            st.integers(0, (branch.last_lsn - IMPORT_LSN) // 8), "back"
        )

    def draw_changes(self, branch: Branch, data: st.DataObject) -> list[Change]:
        """Changes at a few LSNs above the last one; a record only where it has a base."""
        lsn = branch.last_lsn
        changes: list[Change] = []
        known = set(branch.live(lsn))
        for _ in range(data.draw(st.integers(1, 4), "records")):
            lsn += 8 * data.draw(st.integers(1, 3), "step")
            if data.draw(st.integers(0, 5), "kind") == 0:
                first = data.draw(st.integers(0, len(KEYS) - 1), "first")
                last = data.draw(st.integers(first, len(KEYS) - 1), "last")
                changes.append(Delete(lsn, KEYS[first], next_key(KEYS[last])))
                known.difference_update(KEYS[first : last + 1])
                continue
            put_here: set[bytes] = set()
            for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=4), "keys"):
                kinds = (RECORD, IMAGE, INIT_RECORD) if key in known else (IMAGE, INIT_RECORD)
                flags = data.draw(st.sampled_from(kinds), "flags")
                if key in put_here:
                    flags = IMAGE  # a second put at one LSN replaces, so it stands alone
                put_here.add(key)
                known.add(key)
                content = b"%d." % lsn * data.draw(st.sampled_from([0, 1, 700]), "size")
                changes.append(Put(lsn, key, flags, content))
        return [*changes, Put(lsn + 8, KEYS[-1], IMAGE, b"end")]

    def write(self, branch: Branch, changes: list[Change], *, finish: bool = True) -> None:
        """One batch; left unfinished it must have no effect."""
        with self.timeline(branch).writer() as writer:
            for change in changes:
                if isinstance(change, Delete):
                    writer.delete_range(change.start, change.end, change.lsn)
                else:
                    writer.put(change.key, change.lsn, change.flags, change.data)
            if finish:
                writer.advance(changes[-1].lsn, changes[-1].lsn - 8)

    # ---- rules

    @rule(data=st.data(), count=st.integers(1, 4), then=st.sampled_from(["", "freeze", "flush"]))
    def put(self, data: st.DataObject, count: int, then: str) -> None:
        """Write some batches, each to a layer of its own or not."""
        self.put_batches(self.pick(data), data, count, then)

    def put_batches(self, branch: Branch, data: st.DataObject, count: int, then: str) -> None:
        """Write batches; after each of them freeze, flush, or nothing."""
        for _ in range(count):
            changes = self.draw_changes(branch, data)
            self.write(branch, changes)
            branch.apply(changes)
            branch.last_lsn = changes[-1].lsn
            branch.batches.append((branch.last_lsn, changes))
            if then == "freeze":
                self.timeline(branch).freeze()
            elif then == "flush":
                self.timeline(branch).checkpoint()

    @rule(data=st.data())
    def abandon_a_batch(self, data: st.DataObject) -> None:
        """Write changes and leave without advancing."""
        branch = self.pick(data)
        self.write(branch, self.draw_changes(branch, data), finish=False)

    @precondition(lambda self: len(self.branches) < MAX_BRANCHES)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        """Branch at any LSN of any timeline, unless it has been collected."""
        parent = self.pick(data)
        start = self.pick_lsn(parent, data)
        timeline_id = TimelineId(self.created.to_bytes(16, "big"))

        def make() -> None:
            self.repository.branch_timeline(
                timeline_id, ancestor_id=parent.timeline_id, start_lsn=start
            )

        if start < max(parent.start_lsn, parent.cutoff):
            with pytest.raises(InvalidBranchLsn):
                make()
        else:
            make()
            self.new_branch(parent, start, start, parent.cutoff)

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        """Delete a timeline that has no branches."""
        branch = self.pick(data)
        used = {pin.branch for pin in self.pins} | {other.ancestor for other in self.branches}
        if branch not in used and len(self.branches) > 1:
            self.repository.detach_timeline(branch.timeline_id)
            self.branches.remove(branch)

    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        """Make a timeline durable."""
        branch = self.pick(data)
        timeline = self.timeline(branch)
        timeline.checkpoint()
        assert timeline.disk_consistent_lsn == branch.last_lsn

    @rule(data=st.data(), force=st.booleans(), exact=st.booleans())
    def compact(self, data: st.DataObject, force: bool, exact: bool) -> None:
        """Merge layers and make images."""
        branch = self.pick(data)
        if force:
            self.timeline(branch).checkpoint()

        def tables(lsn: int) -> Sequence[tuple[bytes, bytes]]:
            live = branch.live(lsn)
            return [table for table in TABLES if any(table[0] <= key < table[1] for key in live)]

        keyspace = self.exact_keyspace(branch) if exact else tables
        self.timeline(branch).compact(keyspace, force=force)

    @staticmethod
    def exact_keyspace(branch: Branch) -> Callable[[int], Sequence[tuple[bytes, bytes]]]:
        """The keys that exist and no others."""

        def keyspace(lsn: int) -> Sequence[tuple[bytes, bytes]]:
            assert branch.readable(lsn)
            return [(key, next_key(key)) for key in branch.live(lsn)]

        return keyspace

    @rule(data=st.data(), keep=st.booleans())
    def collect(self, data: st.DataObject, keep: bool) -> None:
        """Garbage collection, sometimes with a point to keep as a lease would be."""
        branch = self.pick(data)
        cutoff = self.pick_lsn(branch, data)
        if cutoff == branch.last_lsn:
            self.timeline(branch).checkpoint()
        point = self.pick_lsn(branch, data)
        keep = keep and branch.readable(point)
        timeline = self.timeline(branch)
        before, durable = branch.cutoff, timeline.disk_consistent_lsn
        if keep:
            timeline.gc(cutoff, [point])
            self.check_reads(branch, point)
        else:
            self.repository.gc(branch.timeline_id, choose_cutoff=lambda _: cutoff)
        # Beyond what is on disk there is no cutoff; the background flush may have been at work.
        branch.cutoff = timeline.latest_gc_cutoff_lsn
        assert max(before, min(cutoff, durable)) <= branch.cutoff
        assert branch.cutoff <= max(before, min(cutoff, timeline.disk_consistent_lsn))

    @rule(data=st.data(), back=st.integers(0, 6), hold=st.booleans())
    def tidy_up(self, data: st.DataObject, back: int, hold: bool) -> None:
        """What a busy timeline goes through: new layers, merges, images, and a collection.

        Then it is quiet. With `hold` a long read began amid the changes that are merged.
        """
        branch = self.pick(data)
        self.put_batches(branch, data, 2, "flush")
        if hold:
            self.begin_read(branch, branch.last_lsn)
            self.put_batches(branch, data, 2, "flush")
        self.compact_all(branch)
        self.move_cutoff(branch, back)
        if hold:
            self.compact_all(branch)

    def compact_all(self, branch: Branch) -> None:
        """Rounds until nothing is left to do."""
        timeline = self.timeline(branch)
        while not timeline.compact(self.exact_keyspace(branch), force=True).done:
            pass

    def move_cutoff(self, branch: Branch, back: int) -> None:
        """Collect garbage with the cutoff so many records back from the end, or further on."""
        cutoff = branch.last_lsn - 8 * back
        branch.cutoff = max(branch.cutoff, cutoff)
        self.repository.gc(branch.timeline_id, choose_cutoff=lambda _: cutoff)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Begin a long read."""
        branch = self.pick(data)
        self.begin_read(branch, self.pick_lsn(branch, data))

    def begin_read(self, branch: Branch, lsn: int) -> None:
        """Hold the state at an LSN, if it can be read."""
        release = contextlib.ExitStack()
        if branch.readable(lsn):
            release.enter_context(self.timeline(branch).pin(lsn))
            self.pins.append(Pin(branch, lsn, release))
        else:
            with pytest.raises(LsnNotReadable):
                release.enter_context(self.timeline(branch).pin(lsn))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        """End it."""
        self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1), "pin")).release.close()

    @rule(flush=st.booleans())
    def restart(self, flush: bool) -> None:
        """Stop, start, and let the WAL come again from disk_consistent_lsn on."""
        self.repository.shutdown(flush=flush)
        for pin in self.pins:
            pin.release.close()
        self.pins.clear()
        self.repository = self.open()
        for branch in self.branches:
            timeline = self.timeline(branch)
            durable = timeline.last_record_lsn
            assert durable == timeline.disk_consistent_lsn <= branch.last_lsn
            assert durable == branch.last_lsn or not flush
            for lsn, changes in branch.batches:
                if lsn > durable:
                    self.write(branch, changes)

    # ---- checks

    def check_reads(self, branch: Branch, lsn: int) -> None:
        """Every key at an LSN, by all ways of reading."""
        timeline = self.timeline(branch)
        expected = [branch.value(key, lsn) for key in KEYS]
        assert timeline.get_vectored(KEYS, lsn) == expected
        present = branch.live(lsn)
        assert timeline.scan_keys(KEYS[0], KEYS[-1], lsn) == [k for k in present if k < KEYS[-1]]
        for key in present[:1]:
            assert timeline.get(key, lsn) == branch.value(key, lsn)

    def check_everything(self) -> None:
        """All timelines at all LSNs."""
        for branch in self.branches:
            for lsn in range(8, branch.last_lsn + 8, 8):
                if branch.readable(lsn):
                    self.check_reads(branch, lsn)
                    if branch.readable(lsn - 3):
                        self.check_reads(branch, lsn - 3)
                else:
                    with pytest.raises(LsnNotReadable):
                        self.timeline(branch).check_lsn_readable(lsn)

    @invariant()
    def reads_equal_the_model(self) -> None:
        """A few LSNs of every timeline, what is pinned, and what is refused."""
        for branch in self.branches:
            timeline = self.timeline(branch)
            assert timeline.last_record_lsn == branch.last_lsn
            middle = (IMPORT_LSN + branch.last_lsn) // 2
            for lsn in {branch.last_lsn, branch.start_lsn or IMPORT_LSN, middle, branch.cutoff}:
                if branch.readable(lsn):
                    self.check_reads(branch, lsn)
                else:
                    with pytest.raises(LsnNotReadable):
                        timeline.check_lsn_readable(lsn)
        for pin in self.pins:
            self.check_reads(pin.branch, pin.lsn)


def test_store_equals_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def split(layer: LayerFile, keep: Sequence[tuple[int, int]], *args: Any, **options: Any) -> Any:
        kept.append(len(keep))
        return split_layer(layer, keep, *args, **options)

    monkeypatch.setattr(compactor, "split_layer", split)
    monkeypatch.setattr(compaction_plan, "MIN_GARBAGE", 200)
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            derandomize=not EXAMPLES,
            deadline=None,
            max_examples=EXAMPLES or 50,
            stateful_step_count=40,
            database=None,
        ),
    )
    # It has been where garbage is cut out of deltas.
    assert EXAMPLES or (len(kept) > 20 and max(kept) > 1)
