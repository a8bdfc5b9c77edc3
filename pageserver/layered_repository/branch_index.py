"""Which timelines of a repository are branches of which, and where they begin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pageserver.layered_repository.errors import StoreError, TimelineNotFound
from pageserver.layered_repository.metadata import TimelineMetadata
from zenith_utils.ids import TimelineId


class BranchPoint(NamedTuple):
    """Where a timeline begins; no ancestor: in itself."""

    ancestor_id: TimelineId | None
    lsn: int


class BranchIndex:
    """Knows it of all timelines, loaded or not, from their metadata. Safe for many threads.

    The metadata of the timelines found on disk is read when it is first needed.
    """

    def __init__(
        self,
        timelines: Iterable[TimelineId],
        read_metadata: Callable[[TimelineId], TimelineMetadata],
    ) -> None:
        self._read_metadata = read_metadata
        self._lock = threading.Lock()
        self._unknown: set[TimelineId] = set(timelines)
        self._points: dict[TimelineId, BranchPoint] = {}
        self._branches: dict[TimelineId, dict[TimelineId, int]] = {}
        self._leaving: set[TimelineId] = set()

    def add(self, timeline_id: TimelineId, point: BranchPoint) -> None:
        """A timeline that is being created, or was loaded.

        Raises TimelineNotFound if the ancestor is being removed.
        """
        with self._lock:
            if point.ancestor_id in self._leaving:
                raise TimelineNotFound(f"timeline {point.ancestor_id} is being detached")
            self._add(timeline_id, point)

    def discard(self, timeline_id: TimelineId) -> TimelineId | None:
        """A timeline that does not exist any more; its ancestor, if that was known."""
        with self._lock:
            self._unknown.discard(timeline_id)
            ancestor_id, _ = self._points.pop(timeline_id, BranchPoint(None, 0))
            if ancestor_id is not None:
                del self._branches[ancestor_id][timeline_id]
            return ancestor_id

    def begin_removal(self, timeline_id: TimelineId) -> None:
        """No branch can begin on the timeline until `end_removal`.

        Raises StoreError if it has a branch, or one whose metadata is unreadable may be one; a
        timeline that is unreadable itself has none that could be read.
        """
        failed = self._read_unknown()
        with self._lock:
            branch = next(iter(self._branches.get(timeline_id, {})), None)
            if branch is not None:
                raise StoreError(
                    f"timeline {timeline_id} is the ancestor of {branch}: detach that one first"
                )
            if failed is not None and timeline_id not in self._unknown:
                other, error = failed
                raise StoreError(
                    f"timeline {timeline_id} may be the ancestor of {other}, whose metadata cannot "
                    f"be read: restore or detach that one first: {error}"
                ) from error
            self._leaving.add(timeline_id)

    def end_removal(self, timeline_id: TimelineId, *, removed: bool) -> TimelineId | None:
        """The timeline is gone, or stays after all; its ancestor, if that was known."""
        ancestor_id = self.discard(timeline_id) if removed else None
        with self._lock:
            self._leaving.discard(timeline_id)
        return ancestor_id

    def branch_points(self, timeline_id: TimelineId) -> list[int]:
        """The LSNs at which branches of a timeline begin.

        Raises StoreError while the metadata of some timeline cannot be read: it might be a branch
        of this one, and what it needs must not be deleted.
        """
        failed = self._read_unknown()
        if failed is not None:
            other, error = failed
            raise StoreError(
                f"the branches of timeline {timeline_id} are not known because the metadata of "
                f"timeline {other} cannot be read, restore or detach it: {error}"
            ) from error
        with self._lock:
            return list(self._branches.get(timeline_id, {}).values())

    def _read_unknown(self) -> tuple[TimelineId, Exception] | None:
        """Read what is missing; one that cannot be read, with the reason.

        Without the lock: there may be thousands, and branches are made meanwhile.
        """
        failed = None
        for timeline_id in sorted(self._unknown.copy()):
            point = None
            try:
                metadata = self._read_metadata(timeline_id)
                point = BranchPoint(metadata.ancestor_id, metadata.ancestor_lsn)
            except TimelineNotFound:
                pass
            except (StoreError, OSError) as error:
                failed = timeline_id, error
                continue
            with self._lock:
                if point is not None and timeline_id in self._unknown:
                    self._add(timeline_id, point)
                self._unknown.discard(timeline_id)
        return failed

    def _add(self, timeline_id: TimelineId, point: BranchPoint) -> None:
        self._unknown.discard(timeline_id)
        self._points[timeline_id] = point
        if point.ancestor_id is not None:
            self._branches.setdefault(point.ancestor_id, {})[timeline_id] = point.lsn
