"""The size of a cluster at the end of a timeline's WAL, kept up to date by ingestion."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock

from pageserver.layered_repository.errors import WaitLsnTimeout
from pageserver.layered_repository.timeline import Timeline, TimelineWriter, without_waiting
from zenith_utils.lsn import Lsn


@dataclass(frozen=True, slots=True)
class EndOfWal:
    """A timeline at its last record. Sizes are bytes of all relation forks, None if not known."""

    last_record_lsn: Lsn
    prev_record_lsn: Lsn
    logical_size: int | None
    recounted: int | None
    """The same counted from scratch, if that was asked for."""


class LogicalSize:
    """Counts once, then adds what ingestion says that the relations have grown.

    Nothing here waits for WAL, and ingestion does not wait for a count. Safe for many threads.
    """

    def __init__(self, timeline: Timeline, count: Callable[[int], int]) -> None:
        """`count(lsn)` adds up the bytes at an LSN."""
        self._timeline = timeline
        self._count = count
        self._lock = Lock()
        """For the moment in which the last record and the growth up to it belong together."""
        self._grown = 0
        """Bytes, since this object was made."""
        self._counting = Lock()
        self._before: int | None = None
        """The size when this object was made; None until it has been counted."""

    def publish(self, writer: TimelineWriter, lsn: int, prev_lsn: int, grown: int) -> None:
        """`writer.publish` of a batch by which the relations have grown by `grown` bytes."""
        with self._lock:
            writer.publish(lsn, prev_lsn)
            self._grown += grown

    def current(self) -> int | None:
        """Bytes at the last record.

        None while it was never counted and that takes WAL of an ancestor that has not arrived.
        Raises what reading raises, on the first count.
        """
        before = self._counted()
        return None if before is None else before + self._grown

    def end_of_wal(self, *, sized: bool = True, recount: bool = False) -> EndOfWal:
        """LSNs and sizes of one moment; with neither of the two nothing is counted."""
        before = self._counted() if sized else None
        with ExitStack() as pinned:
            with self._lock:
                lsn, prev_lsn = self._timeline.last_record
                size = None if before is None else before + self._grown
                if recount:
                    # No cutoff is above the last record, which cannot move now.
                    pinned.enter_context(self._timeline.pin(lsn))
            recounted = self._count_now(lsn) if recount else None
        return EndOfWal(lsn, prev_lsn, size, recounted)

    def _counted(self) -> int | None:
        if self._before is None:
            with self._counting:
                if self._before is None:
                    self._before = self._count_before()
        return self._before

    def _count_before(self) -> int | None:
        with ExitStack() as pinned:
            with self._lock:
                lsn = self._timeline.last_record_lsn
                grown = self._grown
                pinned.enter_context(self._timeline.pin(lsn))
            size = self._count_now(lsn)
        return None if size is None else size - grown

    def _count_now(self, lsn: int) -> int | None:
        """None if it would have to wait."""
        try:
            with without_waiting():
                return self._count(lsn)
        except WaitLsnTimeout:
            return None
