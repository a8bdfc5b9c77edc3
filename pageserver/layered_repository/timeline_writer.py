"""The writing side of a timeline: one writer at a time, its batches, freezing."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from typing_extensions import Buffer

from pageserver.layered_repository.errors import StoreError
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from zenith_utils.lsn import lsn_text

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline

# Seconds after which a writer that waits for memory looks whether its timeline stops.
_LOOK_INTERVAL: Final = 0.2


class WriteAccess:
    """The lock of the writer, and the open layer's way from the first value to the flush."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._lock = threading.RLock()
        self._in_batch = False
        self._freeze_requested = False

    @property
    def open_layer(self) -> InMemoryLayer:
        """Where the next value goes."""
        return self._timeline.view.open

    def __enter__(self) -> None:
        """Keep writers away. Raises StoreError if this thread is one."""
        self._lock.acquire()
        if self._in_batch:
            self._lock.release()
            raise StoreError("not while this thread writes a batch")

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        if self._freeze_requested:
            self.request_freeze()

    def begin(self) -> InMemoryLayer:
        """A writer begins; the open layer. Raises TimelineStopped, StoreError."""
        self.__enter__()
        try:
            self._timeline.check_running()
        except BaseException:
            self._lock.release()
            raise
        self._in_batch = True
        return self.open_layer

    def end(self) -> None:
        """The writer ends; what it did not publish is dropped."""
        try:
            if self._timeline.view.open.max_lsn > self._timeline.last_record_lsn:
                self._freeze()
        finally:
            self._in_batch = False
            self.__exit__()

    def freeze(self) -> None:
        """Freeze the open layer when no batch is in the way and have it flushed."""
        with self:
            self._freeze()

    def request_freeze(self) -> None:
        """Have the open layer frozen as soon as no batch is in the way; never waits.

        For other threads, whatever they hold.
        """
        self._freeze_requested = True
        # A writer that has the lock sees the request when it next ends a batch or gives up the
        # lock, in that order; only if it has not got it any more is this thread to do it.
        if self._lock.acquire(blocking=False):
            try:
                if not self._in_batch and self._freeze_requested:
                    self._freeze()
            finally:
                self._lock.release()

    def publish(self, lsn: int, prev_lsn: int) -> None:
        """End a batch; see TimelineWriter.publish."""
        timeline = self._timeline
        open_layer = timeline.view.open
        check_aligned(lsn)
        if lsn < timeline.last_record_lsn or lsn < open_layer.max_lsn:
            raise ValueError(
                f"cannot advance to {lsn_text(lsn)}: last_record_lsn is "
                f"{timeline.last_record_lsn}, the newest value is at "
                f"{lsn_text(open_layer.max_lsn)}"
            )
        timeline.check_running()
        open_layer.publish(lsn)
        timeline.position.advance(lsn, prev_lsn)

    def make_room(self) -> None:
        """After a batch; see TimelineWriter.make_room."""
        timeline = self._timeline
        if self._is_full(timeline.view.open):
            self._freeze()
            timeline.layer_set.wait_for_flush(lambda: timeline.settings.max_frozen_layers)
        self._keep_to_budget()

    def _is_full(self, layer: InMemoryLayer) -> bool:
        timeline = self._timeline
        settings = timeline.settings
        return (
            self._freeze_requested
            or timeline.wal_since_freeze >= settings.checkpoint_distance
            or layer.memory_size + layer.spilled_size >= settings.max_open_layer_size
        )

    def _keep_to_budget(self) -> None:
        """After a batch: have the largest open layer frozen if all of them take too much memory."""
        timeline = self._timeline
        budget = timeline.context.resources.memory
        largest = budget.grown(timeline, self.open_layer.memory_size)
        if timeline.stopping:
            # It has been forgotten, or will be.
            budget.forget(timeline)
            return
        if largest is timeline:
            self._freeze()
        elif largest is not None:
            largest.request_freeze()
        while not budget.wait_for_room(timeline, _LOOK_INTERVAL) and not timeline.stopping:
            pass

    def _freeze(self) -> None:
        """With the lock, between batches."""
        timeline = self._timeline
        self._freeze_requested = False
        last_lsn, prev_lsn = timeline.position.current
        old = timeline.view.open
        timeline.layer_set.freeze(last_lsn, prev_lsn, timeline.new_open_layer)
        budget = timeline.context.resources.memory
        if old.sealed:
            budget.frozen(timeline, old.memory_size)
        elif old is not timeline.view.open:
            budget.grown(timeline, 0)
        timeline.flusher.wake()


class TimelineWriter:
    """The right to write to a timeline, as a context manager for one thread at a time.

    What was put since the last `advance` is dropped when the block is left, by an exception or not.
    """

    __slots__ = ("_access", "open_layer")

    open_layer: InMemoryLayer
    """Where native code puts values; read it again after every `make_room`."""

    def __init__(self, access: WriteAccess) -> None:
        self._access = access

    def __enter__(self) -> Self:
        self.open_layer = self._access.begin()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self.open_layer
        self._access.end()

    def put(self, key: bytes, lsn: int, flags: int, data: Buffer) -> None:
        """Add a value at an LSN above last_record_lsn; the last one of a key at an LSN counts.

        flags: bit 0 the value needs nothing older, bits 1-7 the kind (0: image).
        """
        self.open_layer.put(key, lsn, flags, data)

    def delete_range(self, start: bytes, end: bytes, lsn: int) -> None:
        """No key in [start, end) exists at `lsn`, above last_record_lsn; later puts bring it back.

        Each call costs a small file: fit for a dropped relation, not for a row.
        """
        self.open_layer.delete_range(start, end, lsn)

    def advance(self, lsn: int, prev_lsn: int) -> None:
        """`publish`, then `make_room`."""
        self.publish(lsn, prev_lsn)
        self.make_room()

    def publish(self, lsn: int, prev_lsn: int) -> None:
        """End an atomic batch: all of it becomes visible, waiters for an LSN wake up.

        `lsn` is the end of the last record of the batch, `prev_lsn` its start (0: not known). Does
        not wait; `make_room` has to follow. Raises ValueError for an LSN that goes back or is not
        a multiple of 8, TimelineStopped.
        """
        self._access.publish(lsn, prev_lsn)

    def make_room(self) -> None:
        """Between two batches: freeze the open layer if it is full.

        Waits while the flush is too far behind.
        """
        self._access.make_room()
        self.open_layer = self._access.open_layer


def check_aligned(lsn: int) -> None:
    """Raise ValueError for an LSN at which no record can end."""
    if lsn & 7:
        raise ValueError(f"LSN {lsn_text(lsn)} is not a multiple of 8")
