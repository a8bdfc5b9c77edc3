"""A store beside a model of it: plain dicts that say what every timeline holds at every LSN."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from batch_unit.store_support import (
    IMAGE,
    IMPORT_LSN,
    MAIN,
    RECORD,
    TENANT,
    append,
    key,
    with_files,
)

from pageserver.layered_repository.errors import LsnNotReadable
from pageserver.layered_repository.files import FILES, Files
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.verify_repository import verify
from zenith_utils.ids import TimelineId

KEYS = [key(i) for i in range(12)]
# Everything is due early, files are small, and waits are short.
SETTINGS = StoreSettings(
    checkpoint_distance=1 << 20,
    flush_retry_interval=0.01,
    wait_lsn_timeout=0.01,
    page_cache_size=0,
    compaction_threshold=2,
    compaction_target_size=1200,
    image_creation_threshold=2,
    image_part_keys=4,
    compress_layers=False,
)


class UnsyncedFiles(Files):
    """Without fsync: the machine itself does not crash here."""

    def fsync(self, fd: int, path: str | Path) -> None:
        """Nothing."""

    def fsync_dir(self, path: str | Path) -> None:
        """Nothing."""


class Batch(NamedTuple):
    """One record: values by key with their flags, and ranges of keys that end."""

    lsn: int
    puts: dict[bytes, tuple[int, bytes]]
    ends: tuple[tuple[bytes, bytes], ...]


@dataclass(eq=False)
class History:
    """What was ever written to a timeline, and the state at each LSN it has of its own."""

    timeline_id: TimelineId
    ancestor: History | None
    start_lsn: int
    states: list[tuple[int, dict[bytes, bytes]]]
    batches: list[Batch] = field(default_factory=list)

    @property
    def last_lsn(self) -> int:
        """That of the last batch."""
        return self.batches[-1].lsn if self.batches else self.start_lsn

    def at(self, lsn: int) -> dict[bytes, bytes]:
        """All keys and values at an LSN."""
        if lsn < self.start_lsn:
            return {} if self.ancestor is None else self.ancestor.at(lsn)
        return self.states[bisect_right(self.states, lsn, key=lambda state: state[0]) - 1][1]

    def add(self, batch: Batch) -> None:
        """The next batch."""
        state = dict(self.at(batch.lsn))
        for start, end in batch.ends:
            state = {k: value for k, value in state.items() if not start <= k < end}
        for k, (flags, data) in batch.puts.items():
            state[k] = data if flags & 1 else state[k] + data
        self.states.append((batch.lsn, state))
        self.batches.append(batch)


class Promise(NamedTuple):
    """What the store has promised about a timeline."""

    exists: bool | None
    """None: it is being made or deleted."""
    durable_lsn: int = 0
    """Everything up to here is safe."""
    cutoff: int = 0
    """Nothing below it is readable any more."""
    highest_cutoff: int = 0
    """Everything from here on is readable."""


Promises = dict[TimelineId, Promise]


class World:
    """A repository in use, and what it must hold."""

    def __init__(
        self,
        path: Path,
        files: Files = FILES,
        *,
        histories: dict[TimelineId, History] | None = None,
        settings: StoreSettings = SETTINGS,
    ) -> None:
        self.files = files
        self.histories = {} if histories is None else histories
        self.repository = Repository(
            path, TENANT, settings, append, resources=with_files(files, page_cache_size=0)
        )
        self._timelines: dict[TimelineId, Timeline] = {}
        self._promises: Promises = {}

    # ---- what the store has promised

    def promises(self) -> Promises:
        """Those of this moment."""
        for timeline_id, promise in self._promises.items():
            timeline = self._timelines.get(timeline_id)
            if timeline is not None and promise.exists is not False:
                self._promises[timeline_id] = promise._replace(
                    durable_lsn=max(promise.durable_lsn, timeline.disk_consistent_lsn),
                    highest_cutoff=max(promise.highest_cutoff, timeline.latest_gc_cutoff_lsn),
                )
        return dict(self._promises)

    def _promise(self, timeline_id: TimelineId, *, exists: bool | None) -> None:
        promise = self._promises.get(timeline_id, Promise(None, 0, 0, IMPORT_LSN))
        self._promises[timeline_id] = promise._replace(exists=exists)

    def resume(self, promises: Promises) -> None:
        """Load all timelines; what was promised before still counts."""
        present = self.repository.timelines()
        known = {timeline_id: Promise(None, 0, 0, IMPORT_LSN) for timeline_id in present}
        self._promises = {
            timeline_id: promise._replace(exists=timeline_id in present)
            for timeline_id, promise in {**known, **promises}.items()
        }
        for timeline_id in present:
            self._timelines[timeline_id] = self.repository.timeline(timeline_id)

    # ---- what happens in it

    def timeline(self, timeline_id: TimelineId = MAIN) -> Timeline:
        """A timeline."""
        if timeline_id not in self._timelines:
            self._timelines[timeline_id] = self.repository.timeline(timeline_id)
        return self._timelines[timeline_id]

    def import_main(self) -> None:
        """A root timeline with some of the keys."""
        items = [(k, b"import %d" % i) for i, k in enumerate(KEYS[:10])]
        self.histories.setdefault(
            MAIN, History(MAIN, None, IMPORT_LSN, [(IMPORT_LSN, dict(items))])
        )
        self._promise(MAIN, exists=None)
        if MAIN in self.repository.timelines():  # the import failed
            timeline = self.repository.timeline(MAIN)
        else:
            timeline = self.repository.create_timeline(MAIN, initdb_lsn=IMPORT_LSN)
        self._timelines[MAIN] = timeline
        timeline.import_image_layer(IMPORT_LSN, items, prev_lsn=8)
        self._promise(MAIN, exists=True)

    def branch(
        self, timeline_id: TimelineId, *, ancestor_id: TimelineId = MAIN, lsn: int | None = None
    ) -> None:
        """A branch, at the last record unless an LSN is given."""
        ancestor = self.histories[ancestor_id]
        start = ancestor.last_lsn if lsn is None else lsn
        self.histories.setdefault(
            timeline_id, History(timeline_id, ancestor, start, [(start, ancestor.at(start))])
        )
        cutoff = self.timeline(ancestor_id).latest_gc_cutoff_lsn
        self._promises[timeline_id] = Promise(None, 0, 0, cutoff)
        self._timelines[timeline_id] = self.repository.branch_timeline(
            timeline_id, ancestor_id=ancestor_id, start_lsn=start
        )
        self._promise(timeline_id, exists=True)

    def detach(self, timeline_id: TimelineId) -> None:
        """A timeline is deleted."""
        self._promise(timeline_id, exists=None)
        self._timelines.pop(timeline_id, None)
        self.repository.detach_timeline(timeline_id)
        self._promise(timeline_id, exists=False)

    def put(self, *numbers: int, on: TimelineId = MAIN, size: int = 0) -> int:
        """A record that changes some keys, by `size` bytes at least; its LSN."""
        history = self.histories[on]
        lsn = history.last_lsn + 8
        state = history.at(lsn)
        data = b"+%d" % lsn + bytes(i * lsn & 255 for i in range(size))
        puts = {
            KEYS[number]: (RECORD if KEYS[number] in state and not size else IMAGE, data)
            for number in numbers
        }
        return self._write(history, Batch(lsn, puts, ()))

    def end(self, first: int, stop: int, *, on: TimelineId = MAIN) -> int:
        """A record that deletes the keys of a range; its LSN."""
        history = self.histories[on]
        ends = ((key(first), key(stop)),)
        return self._write(history, Batch(history.last_lsn + 8, {}, ends))

    def _write(self, history: History, batch: Batch) -> int:
        history.add(batch)
        self._ingest(history.timeline_id, batch)
        return batch.lsn

    def _ingest(self, timeline_id: TimelineId, batch: Batch) -> None:
        with self.timeline(timeline_id).writer() as writer:
            for k, (flags, data) in batch.puts.items():
                writer.put(k, batch.lsn, flags, data)
            for start, end in batch.ends:
                writer.delete_range(start, end, batch.lsn)
            writer.advance(batch.lsn, batch.lsn - 8)

    def checkpoint(self, timeline_id: TimelineId = MAIN) -> None:
        """Everything becomes durable."""
        timeline = self.timeline(timeline_id)
        timeline.checkpoint()
        assert timeline.disk_consistent_lsn == timeline.last_record_lsn

    def layers(self, rounds: int, *numbers: int, on: TimelineId = MAIN, size: int = 0) -> None:
        """L0 deltas, each with a change of the keys."""
        for _ in range(rounds):
            self.put(*numbers, on=on, size=size)
            self.checkpoint(on)

    def keyspace(self, timeline_id: TimelineId) -> Callable[[int], Sequence[tuple[bytes, bytes]]]:
        """The keys that exist and no others."""
        history = self.histories[timeline_id]
        return lambda lsn: [(k, key(int.from_bytes(k, "big") + 1)) for k in sorted(history.at(lsn))]

    def compact(self, timeline_id: TimelineId = MAIN) -> tuple[int, int, int, int]:
        """All there is to do: L0 deltas merged, deltas made, images made, deltas split."""
        timeline = self.timeline(timeline_id)
        done = [0, 0, 0, 0]
        while True:
            result = timeline.compact(self.keyspace(timeline_id), force=True)
            done[0] += result.l0_merged
            done[1] += result.deltas_written
            done[2] += result.images_written
            done[3] += result.deltas_split
            if result.done:
                return done[0], done[1], done[2], done[3]

    def collect(self, cutoff: int, timeline_id: TimelineId = MAIN) -> int:
        """Garbage collection; how many layers went."""
        result = self.repository.gc(timeline_id, choose_cutoff=lambda _: cutoff)
        timeline = self.timeline(timeline_id)
        published = timeline.latest_gc_cutoff_lsn
        assert published >= min(cutoff, timeline.disk_consistent_lsn)
        if timeline_id in self._promises:
            self._promises[timeline_id] = self._promises[timeline_id]._replace(cutoff=published)
        return result.layers_removed

    def catch_up(self, timeline_id: TimelineId) -> None:
        """The WAL from disk_consistent_lsn on comes again."""
        timeline = self.timeline(timeline_id)
        for batch in self.histories[timeline_id].batches:
            if batch.lsn > timeline.last_record_lsn:
                self._ingest(timeline_id, batch)

    def go_on(self, promises: Promises) -> None:
        """Life after a failure: the WAL comes again, and all kinds of work are done.

        What was being made or deleted is made.
        """
        for timeline_id, history in self.histories.items():
            if not self._has(timeline_id):
                if timeline_id not in promises or promises[timeline_id].exists is False:
                    continue
                if history.ancestor is None:
                    self.import_main()
                elif history.start_lsn >= self.timeline(MAIN).latest_gc_cutoff_lsn:
                    self.branch(timeline_id, lsn=history.start_lsn)
                else:
                    continue
            self.catch_up(timeline_id)
            self.check(timeline_id)
            self.checkpoint(timeline_id)
        for timeline_id in self.repository.timelines():
            self.compact(timeline_id)
            self.check(timeline_id)
            for back in (8, 0):
                self.collect(max(self.histories[timeline_id].last_lsn - back, 16), timeline_id)
                self.check(timeline_id)

    def _has(self, timeline_id: TimelineId) -> bool:
        """Whether a timeline is there; one that could not be imported is empty."""
        if timeline_id not in self.repository.timelines():
            return False
        return self.repository.timeline(timeline_id).last_record_lsn > 0

    def configure(self, *, image_creation_threshold: int) -> None:
        """Images for the sake of reads after so many deltas."""
        self.repository.settings = replace(
            self.repository.settings, image_creation_threshold=image_creation_threshold
        )

    def close(self) -> None:
        """Stop without a flush."""
        self.repository.shutdown(flush=False)

    # ---- what must be in it

    def check(self, timeline_id: TimelineId = MAIN) -> None:
        """Every LSN is as in the model, or refused if it is below the cutoff."""
        timeline = self.timeline(timeline_id)
        history = self.histories[timeline_id]
        on_disk = timeline.metadata.current
        assert on_disk.latest_gc_cutoff_lsn <= timeline.latest_gc_cutoff_lsn
        for lsn in range(IMPORT_LSN, timeline.last_record_lsn + 8, 8):
            if not self._readable(history, lsn):
                with pytest.raises(LsnNotReadable), timeline.pin(lsn):
                    pass
                continue
            expected = history.at(lsn)
            with timeline.pin(lsn):
                assert timeline.get_vectored(KEYS, lsn) == [expected.get(k) for k in KEYS], lsn
                assert timeline.scan_keys(MIN_KEY, MAX_KEY, lsn) == sorted(expected), lsn

    def _readable(self, history: History, lsn: int) -> bool:
        cutoff = self.timeline(history.timeline_id).latest_gc_cutoff_lsn
        if lsn < cutoff:
            return False
        return lsn >= history.start_lsn or (
            history.ancestor is not None and self._readable(history.ancestor, lsn)
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for many small stores, in memory if there is such a file system."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(
        prefix="zenith-store-", dir=memory if os.access(memory, os.W_OK) else None
    ) as path:
        yield Path(path)


def check_offline(path: Path) -> None:
    """The verifier has no complaint about the store at `path`."""
    if (path / "tenant" / "timelines").exists():
        assert [str(x) for x in verify(path / "tenant") if x.is_problem] == []
