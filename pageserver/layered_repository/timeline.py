"""A timeline: the history of all keys on one branch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from typing_extensions import Buffer

from pageserver.layered_repository import reader
from pageserver.layered_repository.errors import (
    LsnNotReadable,
    StoreError,
    TimelineStopped,
    WaitLsnTimeout,
)
from pageserver.layered_repository.flusher import LayerFlusher
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.page_cache import PageCache
from pageserver.layered_repository.reader import ReadView, Reconstruct
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline_dir import TimelineDir
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import Lsn, lsn_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreContext:
    """What the timelines of a repository share."""

    settings: StoreSettings
    reconstruct: Reconstruct
    page_cache: PageCache


class Timeline:
    """Values by key and LSN.

    Reading takes no lock and may be done by any number of threads; writing is done through
    `writer()`, one thread at a time. LSNs are those of the ends of WAL records, multiples of 8.
    """

    def __init__(
        self,
        directory: TimelineDir,
        metadata: TimelineMetadata,
        context: StoreContext,
        *,
        ancestor: Timeline | None,
        layers: Iterable[LayerFile] = (),
    ) -> None:
        self.timeline_id: TimelineId = directory.timeline_id
        self.directory = directory
        self.settings = context.settings
        self.reconstruct: Reconstruct = context.reconstruct
        self.ancestor = ancestor
        self.ancestor_id: TimelineId | None = metadata.ancestor_id
        self.ancestor_lsn = Lsn(metadata.ancestor_lsn)
        self.initdb_lsn = Lsn(metadata.initdb_lsn)
        self.latest_gc_cutoff_lsn = Lsn(metadata.latest_gc_cutoff_lsn)
        self._page_cache = context.page_cache
        self._metadata = metadata
        self._record_lsns = (Lsn(metadata.disk_consistent_lsn), Lsn(metadata.prev_record_lsn))
        self.view = ReadView(InMemoryLayer(metadata.disk_consistent_lsn + 1), (), LayerMap(layers))
        self._changed = threading.Condition()  # LSNs, the view, stopping
        self._waiting = 0
        self._stopped = False
        self._writer_lock = threading.RLock()
        self._writer_active = False
        self._create_lock = threading.Lock()
        self._flusher = LayerFlusher(self)

    # ---- positions

    @property
    def last_record(self) -> tuple[Lsn, Lsn]:
        """(last_record_lsn, prev_record_lsn) of one moment."""
        return self._record_lsns

    @property
    def last_record_lsn(self) -> Lsn:
        """End of the last record ingested; 0 before the import."""
        return self._record_lsns[0]

    @property
    def prev_record_lsn(self) -> Lsn:
        """Start of the last record, 0 if not known."""
        return self._record_lsns[1]

    @property
    def disk_consistent_lsn(self) -> Lsn:
        """Everything up to here is in durable layer files."""
        return Lsn(self._metadata.disk_consistent_lsn)

    @property
    def wal_since_freeze(self) -> int:
        """Bytes of WAL in the open layer."""
        return self.last_record_lsn - (self.view.open.start_lsn - 1)

    def wait_lsn(self, lsn: int, timeout: float) -> None:
        """Wait until everything up to `lsn` can be read. The writing thread must not call this.

        Raises WaitLsnTimeout after `timeout` seconds, TimelineStopped.
        """
        if self._record_lsns[0] >= lsn:
            return
        deadline = time.monotonic() + timeout
        with self._changed:
            self._waiting += 1
            try:
                while self._record_lsns[0] < lsn:
                    self._check_running()
                    if not self._changed.wait(deadline - time.monotonic()):
                        break
            finally:
                self._waiting -= 1
        if self._record_lsns[0] < lsn:
            raise WaitLsnTimeout(
                f"Timed out while waiting for WAL record at LSN {lsn_text(lsn)} to arrive, "
                f"last_record_lsn {self.last_record_lsn} "
                f"disk consistent LSN={self.disk_consistent_lsn}"
            )

    def check_lsn_readable(self, lsn: int) -> None:
        """Raise LsnNotReadable if history at `lsn` may have been garbage collected."""
        cutoff = self.latest_gc_cutoff_lsn
        if lsn < cutoff:
            raise LsnNotReadable(
                "tried to request a page version that was garbage collected. "
                f"requested at {lsn_text(lsn)} gc cutoff {cutoff}"
            )

    # ---- reading

    def get(self, key: bytes, lsn: int) -> bytes:
        """The value of an 18-byte key at an LSN: its newest version at or below.

        The caller has waited for the LSN and checked that it is readable. Raises KeyNotFound,
        MissingBaseError, CorruptLayerError, WaitLsnTimeout (of the ancestor after a restart), and
        what the reconstruct callback raises.
        """
        return reader.get(self, key, lsn)

    def get_vectored(self, keys: Sequence[bytes], lsn: int) -> list[bytes | None]:
        """The values of many keys, in their order, None for one that does not exist.

        One walk through the layers and one call of the reconstruct callback; raises what `get`
        does except KeyNotFound.
        """
        return reader.get_vectored(self, keys, lsn)

    def scan_keys(self, start: bytes, end: bytes, lsn: int) -> list[bytes]:
        """The keys in [start, end) that have a value at `lsn`, ascending."""
        return reader.scan_keys(self, start, end, lsn)

    def cached(self, key: bytes, lsn: int) -> tuple[int, bytes] | None:
        """The newest reconstructed version (lsn, value) at or below `lsn` in the cache."""
        return self._page_cache.get(self.timeline_id.raw + key, lsn)

    def cache(self, key: bytes, lsn: int, value: bytes) -> None:
        """Keep a reconstructed version whose newest record ends at `lsn`."""
        # What an unfinished batch wrote may still be replaced.
        if lsn <= self._record_lsns[0]:
            self._page_cache.put(self.timeline_id.raw + key, lsn, value)

    # ---- writing

    def writer(self) -> TimelineWriter:
        """The right to write, taken at `with`: hold it for a batch, not while waiting for input."""
        return TimelineWriter(self)

    def import_image_layer(
        self, lsn: int, items: Iterable[tuple[bytes, bytes]], *, prev_lsn: int = 0
    ) -> None:
        """Fill a new timeline: (key, data) pairs in key order, the state of the world at `lsn`.

        With this the timeline appears on disk, whole and durable; if it fails nothing is there and
        it may be tried again. `lsn` becomes last_record_lsn and disk_consistent_lsn, `prev_lsn` the
        start of the last record. Raises ValueError if the timeline is not empty or the keys do not
        ascend, OSError, and what `items` raises.
        """
        with self._writer_lock, self._create_lock:
            if self._writer_active or self.last_record_lsn or self.directory.exists():
                raise ValueError(f"timeline {self.timeline_id} is not empty")
            self._check_running()
            _check_aligned(lsn)
            metadata = replace(self._metadata, disk_consistent_lsn=lsn, prev_record_lsn=prev_lsn)
            layer = self.directory.create_with_image(metadata, lsn, items)
            with self._changed:
                self._metadata = metadata
                self.view = ReadView(InMemoryLayer(lsn + 1), (), LayerMap([layer]))
                self._record_lsns = (Lsn(lsn), Lsn(prev_lsn))
                self._changed.notify_all()

    def freeze(self) -> None:
        """Close the open layer and begin a new one; the old one is flushed in the background."""
        with self._writer_lock:
            self._check_no_batch()
            self._freeze()
        self._flusher.wake()

    def flush(self) -> None:
        """Write what is frozen; it is durable on return. Raises OSError, nothing is lost then."""
        self._flusher.flush()

    def checkpoint(self) -> None:
        """Make everything up to last_record_lsn durable. Raises OSError."""
        self.freeze()
        self.flush()

    def persist(self) -> None:
        """Make the timeline itself durable, however empty (it is from its first layer on)."""
        with self._create_lock:
            if not self.directory.exists():
                self.directory.create(self._metadata)

    def shutdown(self, *, flush: bool) -> None:
        """Stop: waiters and later writes get TimelineStopped.

        With `flush` everything ingested is made durable first (raises OSError), without it what is
        not on disk is dropped.
        """
        try:
            if flush and not self._stopped:
                self.checkpoint()
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            self._flusher.join()

    # ---- for the writer and the flusher

    def _check_running(self) -> None:
        if self._stopped:
            raise TimelineStopped(f"timeline {self.timeline_id} was shut down")

    def _check_no_batch(self) -> None:
        if self._writer_active:
            raise StoreError("not while this thread writes a batch")

    def _freeze(self) -> None:
        """With the writer's lock, between batches. No I/O."""
        last_lsn, prev_lsn = self._record_lsns
        with self._changed:
            view = self.view
            if last_lsn >= view.open.start_lsn:
                view.open.freeze(last_lsn + 1, prev_lsn)
                frozen = (view.open, *view.frozen)
            elif view.open.max_lsn:
                frozen = view.frozen  # nothing but an aborted batch: forget it
            else:
                return
            self.view = ReadView(InMemoryLayer(last_lsn + 1), frozen, view.layers)

    def _advance(self, lsn: int, prev_lsn: int) -> None:
        _check_aligned(lsn)
        open_layer = self.view.open
        if lsn < self.last_record_lsn or lsn < open_layer.max_lsn:
            raise ValueError(
                f"cannot advance to {lsn_text(lsn)}: last_record_lsn is {self.last_record_lsn}, "
                f"the newest value is at {lsn_text(open_layer.max_lsn)}"
            )
        with self._changed:
            self._check_running()
            open_layer.publish(lsn)
            self._record_lsns = (Lsn(lsn), Lsn(prev_lsn))
            if self._waiting:
                self._changed.notify_all()
        if (
            self.wal_since_freeze >= self.settings.checkpoint_distance
            or open_layer.memory_size >= self.settings.max_open_layer_size
        ):
            self._freeze()
            self._flusher.wake()
            self._wait_for_flush()

    def _wait_for_flush(self) -> None:
        """Hold the writer back while too many frozen layers wait for the disk."""
        with self._changed:
            self._waiting += 1
            try:
                while len(self.view.frozen) > self.settings.max_frozen_layers:
                    self._check_running()
                    self._changed.wait()
            finally:
                self._waiting -= 1

    def oldest_frozen(self) -> InMemoryLayer | None:
        """The layer to be flushed next."""
        frozen = self.view.frozen
        return frozen[-1] if frozen else None

    def flush_layer(self, layer: InMemoryLayer) -> None:
        """Write the oldest frozen layer: file, metadata, then the readers' view.

        A crash or an error in between leaves a file beyond disk_consistent_lsn, which the next
        start sets aside and the next attempt overwrites.
        """
        self.persist()
        file = self.directory.write_delta(layer)
        metadata = replace(
            self._metadata,
            disk_consistent_lsn=layer.end_lsn - 1,
            prev_record_lsn=layer.prev_record_lsn,
            latest_gc_cutoff_lsn=self.latest_gc_cutoff_lsn,
        )
        self.directory.write_metadata(metadata)
        with self._changed:
            view = self.view
            layers = view.layers if file is None else view.layers.with_changes(add=[file])
            self.view = ReadView(view.open, view.frozen[:-1], layers)
            self._metadata = metadata
            self._changed.notify_all()


class TimelineWriter:
    """The right to write to a timeline, as a context manager for one thread at a time.

    What was put since the last `advance` is dropped when the block is left, by an exception or not.
    """

    __slots__ = ("_timeline", "open_layer")

    open_layer: InMemoryLayer
    """Where native code puts values; read it again after every `advance`."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def __enter__(self) -> Self:
        timeline = self._timeline
        timeline._writer_lock.acquire()
        try:
            timeline._check_no_batch()
            timeline._check_running()
        except BaseException:
            timeline._writer_lock.release()
            raise
        timeline._writer_active = True
        self.open_layer = timeline.view.open
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        timeline = self._timeline
        try:
            if timeline.view.open.max_lsn > timeline.last_record_lsn:
                timeline._freeze()
                timeline._flusher.wake()
        finally:
            del self.open_layer
            timeline._writer_active = False
            timeline._writer_lock.release()

    def put(self, key: bytes, lsn: int, flags: int, data: Buffer) -> None:
        """Add a value at an LSN above last_record_lsn; the last one of a key at an LSN counts.

        flags: bit 0 the value needs nothing older, bits 1-7 the kind (0: image).
        """
        self.open_layer.put(key, lsn, flags, data)

    def advance(self, lsn: int, prev_lsn: int) -> None:
        """End an atomic batch: all of it becomes visible, waiters for an LSN wake up.

        `lsn` is the end of the last record of the batch, `prev_lsn` its start (0: not known). May
        freeze the open layer, and waits while the flush is too far behind. Raises ValueError for
        an LSN that goes back or is not a multiple of 8, TimelineStopped.
        """
        self._timeline._advance(lsn, prev_lsn)
        self.open_layer = self._timeline.view.open


def _check_aligned(lsn: int) -> None:
    if lsn & 7:
        raise ValueError(f"LSN {lsn_text(lsn)} is not a multiple of 8")
