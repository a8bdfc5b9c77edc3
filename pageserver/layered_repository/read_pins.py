"""Reads in progress, so that garbage collection leaves them what they need."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline


class ReadPin:
    """The promise that a timeline stays readable at an LSN while the `with` block runs.

    Entering raises LsnNotReadable. May be entered once at a time.
    """

    __slots__ = ("_lsn", "_pins", "_timeline")

    def __init__(self, timeline: Timeline, lsn: int) -> None:
        self._timeline = timeline
        self._lsn = lsn
        # The owner's layers are read at `lsn`; those of its ancestors only at branch points, which
        # are kept anyway.
        while lsn < timeline.ancestor_lsn and timeline.ancestor is not None:
            timeline = timeline.ancestor
        self._pins = timeline.pins

    def __enter__(self) -> None:
        # Registered first, checked then; a collection publishes its cutoff first and looks for pins
        # then. So either it sees this pin or the check sees its cutoff.
        lsn = self._pins[self] = self._lsn
        timeline = self._timeline
        if lsn < timeline.latest_gc_cutoff_lsn or lsn < timeline.ancestor_lsn:
            try:
                timeline.check_lsn_readable(lsn)
            except BaseException:
                del self._pins[self]
                raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._pins[self]
