"""A timeline: the history of all keys on one branch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from pageserver.layered_repository import collector, reader
from pageserver.layered_repository.compactor import CompactionResult, Compactor, Keyspace
from pageserver.layered_repository.errors import (
    LayerGoneError,
    LsnNotReadable,
    TimelineStopped,
    WaitLsnTimeout,
)
from pageserver.layered_repository.flusher import LayerFlusher
from pageserver.layered_repository.gc_plan import GcResult
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_set import LayerSet
from pageserver.layered_repository.maintenance import Maintenance
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.metadata_keeper import MetadataKeeper
from pageserver.layered_repository.page_cache import TimelineCache
from pageserver.layered_repository.read_pins import ReadPin
from pageserver.layered_repository.reader import ReadView, Reconstruct
from pageserver.layered_repository.record_position import RecordPosition
from pageserver.layered_repository.resources import StoreContext
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline_dir import TimelineDir
from pageserver.layered_repository.timeline_writer import (
    TimelineWriter,
    WriteAccess,
    check_aligned,
)
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import Lsn, lsn_text

__all__ = ["Timeline", "TimelineWriter", "without_waiting"]

_may_wait: ContextVar[bool] = ContextVar("_may_wait", default=True)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Reads of this thread raise WaitLsnTimeout where they would wait for WAL of an ancestor."""
    token = _may_wait.set(False)
    try:
        yield
    finally:
        _may_wait.reset(token)


class Timeline:
    """Values by key and LSN.

    Reading takes no lock and may be done by any number of threads; writing is done through
    `writer()`, one thread at a time. LSNs are those of the ends of WAL records, multiples of 8.
    A reader holds a `pin` on the LSN it reads at, unless garbage collection cannot get there.
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
        self.context = context
        self.reconstruct: Reconstruct = context.reconstruct
        self.ancestor = ancestor
        self.ancestor_id: TimelineId | None = metadata.ancestor_id
        self.ancestor_lsn = Lsn(metadata.ancestor_lsn)
        self.initdb_lsn = Lsn(metadata.initdb_lsn)
        self.latest_gc_cutoff_lsn = Lsn(metadata.latest_gc_cutoff_lsn)
        self.pins: dict[ReadPin, int] = {}
        """Reads in progress in this timeline's own history, also those that began in a branch."""
        self.position = RecordPosition(metadata.disk_consistent_lsn, metadata.prev_record_lsn)
        self.layer_set = LayerSet(self.new_open_layer(metadata.disk_consistent_lsn + 1), layers)
        self.metadata = MetadataKeeper(directory, metadata, self.layer_set)
        self.maintenance = Maintenance(self)
        self.flusher = LayerFlusher(self)
        self.rebuilt = TimelineCache(context.resources.page_cache)
        """Reconstructed values."""
        self._write_access = WriteAccess(self)
        self._compactor = Compactor(self)
        self._cutoff_lock = threading.Lock()
        self._stopped = False

    # ---- positions

    @property
    def settings(self) -> StoreSettings:
        """The settings in force now."""
        return self.context.settings

    @property
    def view(self) -> ReadView:
        """All layers of this moment."""
        return self.layer_set.view

    @property
    def last_record(self) -> tuple[Lsn, Lsn]:
        """(last_record_lsn, prev_record_lsn) of one moment."""
        return self.position.current

    @property
    def last_record_lsn(self) -> Lsn:
        """End of the last record ingested; 0 before the import."""
        return self.position.current[0]

    @property
    def prev_record_lsn(self) -> Lsn:
        """Start of the last record, 0 if not known."""
        return self.position.current[1]

    @property
    def disk_consistent_lsn(self) -> Lsn:
        """Everything up to here is in durable layer files."""
        return Lsn(self.metadata.current.disk_consistent_lsn)

    @property
    def wal_since_freeze(self) -> int:
        """Bytes of WAL in the open layer."""
        return self.last_record_lsn - (self.view.open.start_lsn - 1)

    def wait_lsn(self, lsn: int, timeout: float) -> None:
        """Wait until everything up to `lsn` can be read. The writing thread must not call this.

        Raises WaitLsnTimeout after `timeout` seconds (at once `without_waiting`), TimelineStopped.
        """
        if self.position.wait(lsn, timeout if _may_wait.get() else 0.0):
            return
        self.check_running()
        raise WaitLsnTimeout(
            f"Timed out while waiting for WAL record at LSN {lsn_text(lsn)} to arrive, "
            f"last_record_lsn {self.last_record_lsn} "
            f"disk consistent LSN={self.disk_consistent_lsn}"
        )

    def check_lsn_readable(self, lsn: int) -> None:
        """Raise LsnNotReadable if history at `lsn` may have been garbage collected.

        Below the branch point that is up to the ancestor too.
        """
        timeline: Timeline | None = self
        while timeline is not None:
            cutoff = timeline.latest_gc_cutoff_lsn
            if lsn < cutoff:
                raise LsnNotReadable(
                    "tried to request a page version that was garbage collected. "
                    f"requested at {lsn_text(lsn)} gc cutoff {cutoff}"
                )
            timeline = timeline.ancestor if lsn < timeline.ancestor_lsn else None

    # ---- reading

    def pin(self, lsn: int) -> ReadPin:
        """`with timeline.pin(lsn):` keeps what is needed to read at `lsn`, whatever the cutoff.

        Raises LsnNotReadable if it is too late.
        """
        return ReadPin(self, lsn)

    def get(self, key: bytes, lsn: int) -> bytes:
        """The value of an 18-byte key at an LSN: its newest version at or below.

        The caller has waited for the LSN and pinned it. Raises KeyNotFound, MissingBaseError,
        CorruptLayerError, WaitLsnTimeout (of the ancestor after a restart), and what the
        reconstruct callback raises.
        """
        try:
            return reader.get(self, key, lsn)
        except LayerGoneError:
            self.check_running()
            raise

    def get_vectored(
        self, keys: Sequence[bytes], lsn: int, *, cache: bool = True
    ) -> list[bytes | None]:
        """The values of many keys, in their order, None for one that does not exist.

        One walk through the layers and one call of the reconstruct callback; raises what `get`
        does except KeyNotFound. With `cache` the values made of records go to the page cache, and
        what is read from layer files to the block cache.
        """
        try:
            return reader.get_vectored(self, keys, lsn, cache=cache)
        except LayerGoneError:
            self.check_running()
            raise

    def scan_keys(self, start: bytes, end: bytes, lsn: int) -> list[bytes]:
        """The keys in [start, end) that have a value at `lsn`, ascending."""
        try:
            return reader.scan_keys(self, start, end, lsn)
        except LayerGoneError:
            self.check_running()
            raise

    # ---- writing

    def writer(self) -> TimelineWriter:
        """The right to write, taken at `with`: hold it for a batch, not while waiting for input."""
        return TimelineWriter(self._write_access)

    def import_image_layer(
        self, lsn: int, items: Iterable[tuple[bytes, bytes]], *, prev_lsn: int = 0
    ) -> None:
        """Fill a new timeline: (key, data) pairs in key order, the state of the world at `lsn`.

        With this the timeline appears on disk, whole and durable; if it fails nothing is there and
        it may be tried again. `lsn` becomes last_record_lsn and disk_consistent_lsn, `prev_lsn` the
        start of the last record. Raises ValueError if the timeline is not empty or the keys do not
        ascend, OSError, ZstdUnavailable, and what `items` raises.
        """
        with self._write_access:
            if self.last_record_lsn:
                raise ValueError(f"timeline {self.timeline_id} is not empty")
            self.check_running()
            check_aligned(lsn)
            layers: list[LayerFile] = []

            def create() -> TimelineMetadata:
                metadata = replace(
                    self.metadata.current, disk_consistent_lsn=lsn, prev_record_lsn=prev_lsn
                )
                # Its size is also what compaction takes for that of the images that follow.
                metadata, layer = self.directory.create_with_image(
                    metadata, lsn, items, compress=self.settings.compress_layers
                )
                layers.append(layer)
                return metadata

            self.metadata.create_with(create)
            self.layer_set.begin(self.new_open_layer(lsn + 1), layers)
            self.position.advance(lsn, prev_lsn)

    def freeze(self) -> None:
        """Close the open layer and begin a new one; the old one is flushed in the background."""
        self._write_access.freeze()

    def request_freeze(self) -> None:
        """The same as soon as no batch is in the way; does not wait, from any thread."""
        self._write_access.request_freeze()

    def flush(self) -> None:
        """Write what is frozen; it is durable on return. Raises OSError, nothing is lost then."""
        self.flusher.flush()

    def checkpoint(self) -> None:
        """Make everything up to last_record_lsn durable. Raises OSError."""
        self.freeze()
        self.flush()

    def persist(self) -> None:
        """Make the timeline itself durable, however empty (it is from its first layer on)."""
        self.metadata.create()

    def new_open_layer(self, start_lsn: int) -> InMemoryLayer:
        """An empty layer for what comes from `start_lsn` on."""
        return InMemoryLayer(
            start_lsn,
            spill_dir=self.context.spill_dir,
            spill_after=self.settings.spill_after,
            pool=self.context.resources.memory.pool,
        )

    # ---- maintenance

    def compact(self, keyspace: Keyspace, *, force: bool = False) -> CompactionResult:
        """Merge L0 deltas and make image layers, where that is due.

        `keyspace(lsn)` gives the ranges of keys that may exist at an LSN; it is asked only when
        images are due. A background round (without `force`) does nothing while another one runs,
        if nothing has changed since one that found nothing to do, or for a while after a failure.
        With `force` whatever L0 deltas there are get merged, and running work is waited for.
        Raises CorruptLayerError, OSError, TimelineStopped, and what `keyspace` and the reconstruct
        callback raise; what was done until then counts.
        """
        return self._compactor.run(keyspace, force=force)

    def gc(self, cutoff: int, points: Sequence[int] = ()) -> GcResult:
        """Forget history below `cutoff` except for the state at branch points, pins and `points`.

        No LSN below the cutoff is readable any more from the moment of the call, whatever is
        deleted; a cutoff lower than an earlier one changes nothing, and one that is not on disk yet
        is lowered to what is. Waits for a compaction that runs. Raises StoreError when branch
        points cannot be told, OSError, TimelineStopped.
        """
        self.publish_gc_cutoff(cutoff)
        return collector.collect(self, points)

    def publish_gc_cutoff(self, cutoff: int) -> None:
        """Refuse reads and branches below `cutoff` from now on. No I/O.

        It stays at disk_consistent_lsn at most: after a crash that is the newest LSN there is.
        """
        with self._cutoff_lock:
            cutoff = min(cutoff, self.disk_consistent_lsn)
            self.latest_gc_cutoff_lsn = Lsn(max(cutoff, self.latest_gc_cutoff_lsn))

    @contextmanager
    def cutoff_held(self) -> Iterator[Lsn]:
        """The GC cutoff, which is not moved meanwhile: hold it for moments."""
        with self._cutoff_lock:
            yield self.latest_gc_cutoff_lsn

    def branches_changed(self) -> None:
        """A branch of this timeline was deleted: what was kept for it may be garbage now."""
        self._compactor.look_again()

    def retain_points(self) -> list[int]:
        """LSNs below the cutoff whose state is kept: where branches begin, and reads in progress.

        Take them after the cutoff was published. Raises StoreError.
        """
        # The copies are made in one step each, so threads may add and remove entries meanwhile.
        return [*self.context.branch_points(self.timeline_id), *list(self.pins.values())]

    # ---- the end

    @property
    def stopping(self) -> bool:
        """Whether long work is to end soon."""
        return self.maintenance.stopping

    def check_running(self) -> None:
        """Raise TimelineStopped after a shutdown."""
        if self._stopped:
            raise TimelineStopped(f"timeline {self.timeline_id} was shut down")

    def shutdown(self, *, flush: bool) -> None:
        """Stop: waiters and later writes get TimelineStopped.

        With `flush` everything ingested is made durable first (raises OSError), without it what is
        not on disk is dropped. Compaction ends at its next step.
        """
        self.maintenance.stop()
        # A writer that waits for the flush has the lock that a checkpoint needs.
        self.layer_set.stop()
        try:
            if flush and not self._stopped:
                self.checkpoint()
        finally:
            self._stopped = True
            self.position.stop()
            self.flusher.join()
            self.maintenance.join()
            self.context.resources.memory.forget(self)
            self.context.resources.descriptors.close(self.view.layers)

    def detach(self) -> None:
        """Stop because the files are about to be deleted; who reads then gets TimelineStopped."""
        self.shutdown(flush=False)
        for layer in self.view.layers:
            layer.gone = True
