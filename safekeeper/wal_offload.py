"""Offload: complete segments of committed WAL go to object storage, the oldest first.

Only committed WAL is stored, and only after every record of it has been decoded and its CRC has
been compared: damage of the disk here is found before it becomes the only copy. A segment ends
below the commit LSN, so it is the same on every safekeeper; if the stored one differs, one of the
two is damaged and nothing is overwritten or removed.

`s3_wal_lsn` in the control file is how far all WAL that was here is stored. It is written after the
fact and only informs: what is removed depends on what this very process has seen to be stored, so
a place that was changed or emptied while the safekeeper was down is filled again with what is here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.remote_wal import RemoteWal, RemoteWalDamagedError, RemoteWalError
from safekeeper.timeline import Timeline
from safekeeper.wal_files import SegmentReader, WalStorageError, list_segments, segment_path
from safekeeper.wal_storage import wal_magic
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantTimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.thread_priority import become_background

logger = logging.getLogger(__name__)

_CHUNK: Final = 1 << 20
# Segments of one timeline before others have their turn.
_TURN: Final = 4
_MAX_PAUSE: Final = 60.0
# Timelines that find the storage away before the others are left for later.
_MAX_UNANSWERED: Final = 3
# How long others have for a segment of which this safekeeper has a part only.
_JOINED_PATIENCE: Final = 300.0


@dataclass(slots=True)
class _Trouble:
    """A timeline that cannot be offloaded now."""

    text: str
    pause: float
    due: float


class WalOffload:
    """Stores what the timelines have. One thread: a bounded amount of memory and of requests."""

    def __init__(
        self,
        remote: RemoteWal,
        timelines: Callable[[], Iterable[Timeline]],
        *,
        interval: float,
        min_age: float = 0.0,
    ) -> None:
        """Look at `timelines` every `interval` s, for segments at least `min_age` s old."""
        self._remote = remote
        self._timelines = timelines
        self._interval = interval
        self._min_age = min_age
        self.stored_bytes = 0
        """Bytes this process has stored."""
        self.failures = 0
        """Attempts that failed."""
        self._troubles: dict[TenantTimelineId, _Trouble] = {}
        self._joined: dict[TenantTimelineId, float] = {}
        self._away = False

    def run(self) -> None:
        """Work for ever."""
        become_background()
        pause = threading.Event()
        more = False
        while True:
            if not more:
                pause.wait(self._interval)
            more = self.work()

    def work(self) -> bool:
        """Store some segments of each timeline; whether there is more. Errors are logged."""
        more = False
        unanswered = 0
        for timeline in self._timelines():
            trouble = self._troubles.get(timeline.id)
            if timeline.failure is not None or timeline.acceptor.state.recovering:
                continue
            if trouble and time.monotonic() < trouble.due:
                continue
            try:
                more |= self._work_on(timeline)
                self._troubles.pop(timeline.id, None)
            except RemoteWalError as e:
                if not self._away:
                    logger.warning("WAL offload: %s; trying again, WAL is kept meanwhile", e)
                self._away = True
                self._postpone(timeline, e)
                unanswered += 1
                if unanswered == _MAX_UNANSWERED:
                    break
            except Exception as e:
                self._report(timeline, e)
        return more

    def _report(self, timeline: Timeline, error: Exception) -> None:
        """Say once that a timeline's WAL cannot be stored, and leave it alone for a while."""
        old = self._troubles.get(timeline.id)
        if old is None or old.text != str(error):
            unexpected = not isinstance(error, WalStorageError | OSError)
            logger.error(
                "timeline %s: cannot offload WAL, it is kept: %s",
                timeline.id, error, exc_info=unexpected,
            )  # fmt: skip
        self._postpone(timeline, error)

    def _postpone(self, timeline: Timeline, error: Exception) -> None:
        self.failures += 1
        old = self._troubles.get(timeline.id)
        pause = self._interval if old is None else min(2 * old.pause, _MAX_PAUSE)
        self._troubles[timeline.id] = _Trouble(str(error), pause, time.monotonic() + pause)

    def _reached(self) -> None:
        if self._away:
            logger.info("WAL offload: %s can be reached again", self._remote)
            self._away = False

    def _work_on(self, timeline: Timeline) -> bool:
        """Store segments of a timeline; whether there may be more."""
        commit = timeline.persisted_commit_lsn
        kept = timeline.kept
        if commit // WAL_SEGMENT_SIZE * WAL_SEGMENT_SIZE <= kept.offload_lsn:
            return False
        done = 0
        expected = kept.offload_lsn // WAL_SEGMENT_SIZE
        try:
            for segno, partial in list_segments(timeline.directory):
                end = (segno + 1) * WAL_SEGMENT_SIZE
                if end <= kept.offload_lsn:
                    continue
                if partial or end > commit or not self._old_enough(timeline.directory, segno):
                    return False
                if expected and segno != expected:
                    raise WalStorageError(
                        f"WAL segment {segment_path(timeline.directory, expected, partial=False)}"
                        " is missing"
                    )
                if done == _TURN:
                    return True
                if not self._store(timeline, segno, commit):
                    return False
                self._reached()
                kept.offload_lsn = end
                expected = segno + 1
                done += 1
            return False
        finally:
            if done:
                timeline.offloaded(kept.offload_lsn)

    def _old_enough(self, directory: Path, segno: int) -> bool:
        if not self._min_age:
            return True
        path = segment_path(directory, segno, partial=False)
        return time.time() - path.stat().st_mtime >= self._min_age

    def _store(self, timeline: Timeline, segno: int, commit_lsn: int) -> bool:
        """Have a segment stored, by whomever; False while that must be waited for."""
        begin = timeline.begin_lsn()
        if begin > segno * WAL_SEGMENT_SIZE:
            return self._is_stored_by_others(timeline, segno, begin)
        if store_segment(self._remote, timeline, segno, commit_lsn):
            self.stored_bytes += WAL_SEGMENT_SIZE
        return True

    def _is_stored_by_others(self, timeline: Timeline, segno: int, begin: int) -> bool:
        """Whether a segment that this safekeeper has from `begin` on only needs no more waiting."""
        if _is_stored(self._remote, timeline.id, segno):
            return True
        since = self._joined.setdefault(timeline.id, time.monotonic())
        if time.monotonic() - since < _JOINED_PATIENCE:
            return False
        logger.warning(
            "timeline %s: WAL before %s is not here, and nobody has stored it in %s; the offload "
            "goes on behind it", timeline.id, lsn_text(begin), self._remote,
        )  # fmt: skip
        return True


def store_segment(remote: RemoteWal, timeline: Timeline, segno: int, commit_lsn: int) -> bool:
    """Have a complete segment below `commit_lsn` stored; False if it was stored already.

    Raises RemoteWalError (worth another attempt), RemoteWalDamagedError (it is stored, but
    different), WalStorageError (it is damaged here), OSError.
    """
    path = segment_path(timeline.directory, segno, partial=False)
    data = path.read_bytes()
    if len(data) != WAL_SEGMENT_SIZE:
        raise WalStorageError(f"{path} has {len(data)} bytes, expected {WAL_SEGMENT_SIZE}")
    crc = crc32c(data)
    stored = remote.checksum(timeline.id, segno)
    if stored is not None and stored != crc:
        raise RemoteWalDamagedError(
            f"{path} differs from {remote}/{remote.key(timeline.id, segno)}: committed WAL is the "
            "same everywhere, so one of them is damaged"
        )
    if stored is not None and remote.size(timeline.id, segno) == WAL_SEGMENT_SIZE:
        return False
    # Damage since an earlier run is brought back from the other safekeepers.
    timeline.check_wal(segno * WAL_SEGMENT_SIZE, (segno + 1) * WAL_SEGMENT_SIZE)
    check_records(timeline, segno, commit_lsn)
    remote.put(timeline.id, segno, data, crc)
    logger.debug("timeline %s: stored WAL segment %s in %s", timeline.id, path.name, remote)
    return True


def check_records(timeline: Timeline, segno: int, commit_lsn: int) -> None:
    """Decode every record that begins in a complete segment, to its end, comparing CRCs.

    Raises WalStorageError if one is damaged, OSError.
    """
    start = segno * WAL_SEGMENT_SIZE
    end = start + WAL_SEGMENT_SIZE
    begin = max(start, timeline.wal_begin_lsn)
    decoder = WalDecoder(
        begin,
        wal_magic(timeline.acceptor.state.server.pg_version),
        join_mid_record=begin == start,
    )
    reader = SegmentReader(timeline.directory)
    lsn = begin
    try:
        while decoder.position < end and lsn < commit_lsn:
            data = reader.read(lsn, min(_CHUNK, commit_lsn - lsn))
            decoder.scan(data)
            lsn += len(data)
    except WalDecodeError as e:
        path = segment_path(timeline.directory, e.lsn // WAL_SEGMENT_SIZE, partial=False)
        raise WalStorageError(f"damaged WAL in {path}: {e}") from e
    finally:
        reader.close()
    if decoder.position < end:
        raise WalStorageError(
            f"WAL of {timeline.directory} below {lsn_text(end)} has no complete record at "
            f"{lsn_text(decoder.position)}, although the commit LSN is {lsn_text(commit_lsn)}"
        )


def _is_stored(remote: RemoteWal, timeline_id: TenantTimelineId, segno: int) -> bool:
    return (
        remote.checksum(timeline_id, segno) is not None
        and remote.size(timeline_id, segno) == WAL_SEGMENT_SIZE
    )
