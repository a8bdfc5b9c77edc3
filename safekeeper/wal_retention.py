"""Retention: removes WAL of all timelines as soon as nobody needs it, and says why it is kept."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper import control_file
from safekeeper.timeline import Timeline
from safekeeper.timelines import Timelines
from safekeeper.wal_files import WalStorageError, list_segments
from safekeeper.wal_removal import (
    HOLDER_COMMIT,
    HOLDER_KEEP_SIZE,
    HOLDER_OFFLOAD,
    HOLDER_PAGESERVER,
    HOLDER_READER,
    HOLDER_SAFEKEEPERS,
    WalNeeds,
    missing_segment,
    removable_below,
    removable_segments,
    remove_segments,
)
from zenith_utils.ids import TenantTimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.metrics import IntegerFamily
from zenith_utils.size import format_size
from zenith_utils.thread_priority import become_background

if TYPE_CHECKING:
    from safekeeper.wal_offload import WalOffload

logger = logging.getLogger(__name__)

DEFAULT_KEEP_SIZE: Final = 64 << 20
DEFAULT_INTERVAL: Final = 5.0
_LABELS: Final = ("tenant_id", "timeline_id")
# From here on, and whenever it has doubled, kept WAL is worth a warning.
_WARN_SIZE: Final = 1 << 30
_WHY: Final = {
    HOLDER_SAFEKEEPERS: "a safekeeper of the timeline does not have it: it is down or behind",
    HOLDER_PAGESERVER: "the pageserver has not made it durable: it is down, behind, or not known",
    HOLDER_OFFLOAD: "it is not in the object storage yet",
    HOLDER_READER: "a reader streams it",
    HOLDER_COMMIT: "the end of WAL is searched from there",
    HOLDER_KEEP_SIZE: "of --wal-keep-size",
}


class WalRemoval(Enum):
    """What a pageserver must have done with WAL before it may be removed."""

    DISK_CONSISTENT = "disk-consistent"
    REMOTE_CONSISTENT = "remote-consistent"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """Which WAL is kept in any case (bytes), and how often (s) somebody looks for what is not."""

    removal: WalRemoval = WalRemoval.DISK_CONSISTENT
    keep_size: int = DEFAULT_KEEP_SIZE
    interval: float = DEFAULT_INTERVAL


class WalRetention:
    """Looks at the timelines again and again."""

    def __init__(
        self,
        timelines: Timelines,
        settings: RetentionSettings,
        *,
        sync: bool = True,
        offloading: bool = False,
    ) -> None:
        """Without `sync` removals are not made durable."""
        self._timelines = timelines
        self._settings = settings
        self._sync = sync
        self._offloading = offloading
        self._warn_at: dict[TenantTimelineId, int] = {}
        self._troubles: dict[TenantTimelineId, str] = {}

    def run(self) -> None:
        """Work for ever."""
        become_background()
        self.load_forgotten()
        pause = threading.Event()
        while not pause.wait(self._settings.interval):
            self.work()

    def work(self) -> None:
        """Remove what can go now. Errors are logged, once each."""
        for timeline in self._timelines.loaded():
            if timeline.failure is not None:
                continue
            try:
                self.work_on(timeline)
                self._troubles.pop(timeline.id, None)
            except (OSError, WalStorageError) as e:
                self._report(timeline.id, str(e))
            except Exception:
                logger.exception("timeline %s: cannot remove WAL", timeline.id)

    def work_on(self, timeline: Timeline) -> int:
        """Remove what a timeline does not need; the number of segments.

        Raises WalStorageError, OSError.
        """
        if timeline.acceptor.state.recovering:
            # What it has may not continue what a leader will give it; its positions count for none.
            return 0
        settings = self._settings
        needs = timeline.wal_needs(
            remote_consistent=settings.removal is WalRemoval.REMOTE_CONSISTENT,
            keep_size=settings.keep_size,
        )
        below, timeline.kept.holder = removable_below(needs)
        first = timeline.kept.first_lsn(needs.commit_lsn)
        if not first:
            return 0
        self._warn_of_size(timeline, needs, first, below)
        if settings.removal is WalRemoval.OFF or below < first + WAL_SEGMENT_SIZE - (
            first % WAL_SEGMENT_SIZE
        ):
            return 0
        segments = list_segments(timeline.directory)
        removable = removable_segments(segments, below)
        if not removable:
            return 0
        # What the pageserver has must be known after a restart as well as now.
        timeline.save_delivery()
        timeline.kept.removed(removable[-1])
        remove_segments(timeline.directory, removable, sync=self._sync)
        logger.debug(
            "timeline %s: removed %d WAL segments below %s",
            timeline.id, len(removable), lsn_text(below),
        )  # fmt: skip
        hole = missing_segment(segments[len(removable) :])
        if hole is not None:
            raise WalStorageError(f"WAL segment {hole} of {timeline.directory} is missing")
        return len(removable)

    def load_forgotten(self) -> None:
        """Load the timelines with WAL that is to be offloaded, or perhaps to be removed.

        Nobody may have used them since the start of the process.
        """
        for timeline_id, directory in self._timelines.on_disk():
            try:
                complete = [segno for segno, partial in list_segments(directory) if not partial]
                if len(complete) * WAL_SEGMENT_SIZE > self._settings.keep_size or (
                    self._offloading
                    and complete
                    and _stored_lsn(directory) < (complete[-1] + 1) * WAL_SEGMENT_SIZE
                ):
                    self._timelines.get(timeline_id)
            except Exception as e:
                self._report(timeline_id, str(e))

    def _report(self, timeline_id: TenantTimelineId, text: str) -> None:
        if self._troubles.get(timeline_id) != text:
            self._troubles[timeline_id] = text
            logger.error("timeline %s: cannot remove WAL: %s", timeline_id, text)

    def _warn_of_size(self, timeline: Timeline, needs: WalNeeds, first: int, below: int) -> None:
        """Say so when much WAL is kept for somebody who may be gone."""
        size = needs.commit_lsn - max(first, below)
        limit = self._warn_at.get(timeline.id, _WARN_SIZE)
        if size < limit // 4:
            self._warn_at.pop(timeline.id, None)
        elif size >= limit and timeline.kept.holder != HOLDER_KEEP_SIZE:
            self._warn_at[timeline.id] = 2 * size
            logger.warning(
                "timeline %s: %s of WAL is kept from %s on: %s",
                timeline.id, format_size(size), lsn_text(max(first, below)),
                _WHY[timeline.kept.holder],
            )  # fmt: skip


def _stored_lsn(directory: Path) -> int:
    """Where the WAL in object storage ended when the control file was written."""
    return control_file.load(directory / control_file.CONTROL_FILE_NAME).s3_wal_lsn


def retention_metrics(timelines: Timelines, offload: WalOffload | None) -> list[IntegerFamily]:
    """What WAL is here, what is stored elsewhere, and for whom WAL is kept."""
    segments = IntegerFamily("safekeeper_wal_segments", "WAL segments here", _LABELS)
    oldest = IntegerFamily("safekeeper_oldest_lsn", "Where WAL begins here", _LABELS)
    stored = IntegerFamily("safekeeper_s3_wal_lsn", "WAL below is in object storage", _LABELS)
    held = IntegerFamily(
        "safekeeper_wal_held_by",
        "1 for whom WAL is kept: " + ", ".join(sorted(_WHY)),
        (*_LABELS, "holder"),
    )
    fetched = IntegerFamily(
        "safekeeper_fetched_segments", "WAL segments read from object storage", kind="counter"
    )
    total = 0
    for timeline in timelines.loaded():
        labels = (str(timeline.id.tenant_id), str(timeline.id.timeline_id))
        try:
            oldest.add(timeline.oldest_lsn(), *labels)
            segments.add(len(list_segments(timeline.directory)), *labels)
        except (OSError, WalStorageError):
            continue  # the log tells
        stored.add(timeline.acceptor.state.s3_wal_lsn, *labels)
        held.add(1, *labels, timeline.kept.holder)
        total += timeline.kept.fetched
    fetched.add(total)
    families = [segments, oldest, stored, held, fetched]
    if offload is not None:
        for name, text, value in (
            ("offloaded_bytes", "Bytes of WAL written to object storage", offload.stored_bytes),
            ("offload_failures", "Failed attempts to store WAL", offload.failures),
        ):
            family = IntegerFamily(f"safekeeper_{name}", text, kind="counter")
            family.add(value)
            families.append(family)
    return families
