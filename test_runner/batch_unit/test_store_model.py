"""The store against a dict: random puts, branches, freezes, flushes and restarts."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from zenith_utils.ids import TenantId, TimelineId

IMAGE, RECORD, INIT_RECORD = 1, 2, 3
KEYS = [bytes([0] * 13 + [i % 3] + [0, 0, 0, i]) for i in range(9)]
IMPORT_LSN = 16
TENANT = TenantId(bytes(16))

Put = tuple[bytes, int, int, bytes]


def append(needed: Sequence[ReconstructInput]) -> list[bytes]:
    return [(item.base or b"") + b"".join(data for _, _, data in item.records) for item in needed]


@dataclass
class Branch:
    """What a timeline must hold: all that was ever put, and where it came from."""

    timeline_id: TimelineId
    ancestor: "Branch | None"
    start_lsn: int
    last_lsn: int
    batches: list[tuple[int, list[Put]]] = field(default_factory=list)

    def value(self, key: bytes, lsn: int) -> bytes | None:
        """What the store must answer."""
        result = self.ancestor.value(key, min(lsn, self.start_lsn)) if self.ancestor else None
        for batch_lsn, puts in self.batches:
            if batch_lsn > self.last_lsn:
                break
            latest = {(k, at): (flags, data) for k, at, flags, data in puts}
            for (k, at), (flags, data) in latest.items():
                if k == key and at <= lsn:
                    result = data if flags & 1 else (result or b"") + data
        return result


class StoreMachine(RuleBasedStateMachine):
    """Small settings, so that layers are many and the cache forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.repository = self.open()
        self.branches: list[Branch] = []

    def open(self) -> Repository:
        """The repository as a new process finds it."""
        limits = StoreSettings(checkpoint_distance=200, max_frozen_layers=2, page_cache_size=1500)
        return Repository(self.path, TENANT, limits, append)

    def teardown(self) -> None:
        """End of a run."""
        self.repository.shutdown(flush=False)
        shutil.rmtree(self.path)

    @initialize(present=st.sets(st.sampled_from(KEYS), min_size=1))
    def import_main(self, present: set[bytes]) -> None:
        """The root timeline with some of the keys."""
        main = Branch(TimelineId(bytes(16)), None, 0, IMPORT_LSN)
        items = [(key, b"import" + key[-1:]) for key in sorted(present)]
        main.batches.append((IMPORT_LSN, [(key, IMPORT_LSN, IMAGE, data) for key, data in items]))
        timeline = self.repository.create_timeline(main.timeline_id, initdb_lsn=IMPORT_LSN)
        timeline.import_image_layer(IMPORT_LSN, items)
        self.branches.append(main)

    def pick(self, data: st.DataObject) -> Branch:
        """Any timeline."""
        return self.branches[data.draw(st.integers(0, len(self.branches) - 1), "timeline")]

    def draw_puts(self, branch: Branch, data: st.DataObject) -> list[Put]:
        """Puts at a few LSNs above the last one; a record only where it has a base."""
        lsn = branch.last_lsn
        puts: list[Put] = []
        known = {key for key in KEYS if branch.value(key, lsn) is not None}
        for _ in range(data.draw(st.integers(1, 4), "records")):
            lsn += 8 * data.draw(st.integers(1, 3), "step")
            for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=4), "keys"):
                kinds = (RECORD, IMAGE, INIT_RECORD) if key in known else (IMAGE, INIT_RECORD)
                flags = data.draw(st.sampled_from(kinds), "flags")
                known.add(key)
                content = b"%d." % lsn * data.draw(st.sampled_from([0, 1, 3000]), "size")
                if any(put[:2] == (key, lsn) for put in puts):
                    flags = IMAGE  # a second put at one LSN replaces, so it stands alone
                puts.append((key, lsn, flags, content))
        return [*puts, (KEYS[0], lsn, IMAGE, b"end")]

    def write(self, branch: Branch, puts: list[Put], *, finish: bool = True) -> None:
        """One batch; left unfinished it must have no effect."""
        timeline = self.repository.timeline(branch.timeline_id)
        with timeline.writer() as writer:
            for put in puts:
                writer.put(*put)
            if finish:
                writer.advance(puts[-1][1], puts[-1][1] - 8)

    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        """Write a batch."""
        branch = self.pick(data)
        puts = self.draw_puts(branch, data)
        self.write(branch, puts)
        branch.last_lsn = puts[-1][1]
        branch.batches.append((branch.last_lsn, puts))

    @rule(data=st.data())
    def abandon_a_batch(self, data: st.DataObject) -> None:
        """Put values and leave without advancing."""
        branch = self.pick(data)
        self.write(branch, self.draw_puts(branch, data), finish=False)

    @precondition(lambda self: len(self.branches) < 5)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        """Branch at any LSN of any timeline."""
        parent = self.pick(data)
        low = max(parent.start_lsn, IMPORT_LSN) // 8
        start = 8 * data.draw(st.integers(low, parent.last_lsn // 8), "start")
        child = Branch(TimelineId(bytes([len(self.branches)]) * 16), parent, start, start)
        self.repository.branch_timeline(
            child.timeline_id, ancestor_id=parent.timeline_id, start_lsn=start
        )
        self.branches.append(child)

    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """Leave the flush to the background."""
        self.repository.timeline(self.pick(data).timeline_id).freeze()

    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        """Make a timeline durable."""
        branch = self.pick(data)
        timeline = self.repository.timeline(branch.timeline_id)
        timeline.checkpoint()
        assert timeline.disk_consistent_lsn == branch.last_lsn

    @rule(flush=st.booleans())
    def restart(self, flush: bool) -> None:
        """Stop, start, and let the WAL come again from disk_consistent_lsn on."""
        self.repository.shutdown(flush=flush)
        self.repository = self.open()
        for branch in self.branches:
            timeline = self.repository.timeline(branch.timeline_id)
            durable = timeline.last_record_lsn
            assert durable == timeline.disk_consistent_lsn <= branch.last_lsn
            assert durable == branch.last_lsn or not flush
            for lsn, puts in branch.batches:
                if lsn > durable:
                    self.write(branch, puts)

    @invariant()
    def everything_reads_back(self) -> None:
        """Every key at several LSNs, by all ways of reading."""
        for branch in self.branches:
            timeline = self.repository.timeline(branch.timeline_id)
            assert timeline.last_record_lsn == branch.last_lsn
            span = branch.last_lsn - IMPORT_LSN
            for lsn in {branch.last_lsn, branch.start_lsn or IMPORT_LSN, IMPORT_LSN + span // 2}:
                expected = [branch.value(key, lsn) for key in KEYS]
                assert timeline.get_vectored(KEYS, lsn) == expected
                present = [k for k, v in zip(KEYS, expected, strict=True) if v is not None]
                assert timeline.scan_keys(KEYS[0], KEYS[-1], lsn) == sorted(
                    key for key in present if KEYS[0] <= key < KEYS[-1]
                )
                assert timeline.get(present[0], lsn) == branch.value(present[0], lsn)


def test_store_equals_its_model() -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            derandomize=True, deadline=None, max_examples=40, stateful_step_count=30, database=None
        ),
    )
