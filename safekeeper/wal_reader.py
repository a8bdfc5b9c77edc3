"""The WAL of a timeline for those who read it: where it begins here, and who is where.

WAL that has been removed here comes out of the object storage if there is one: a segment at a time
into a file without a name, which is gone when the reader goes on to the next one.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, normalize_lsn, wal_file_name
from safekeeper.recent_wal import RecentWal
from safekeeper.remote_wal import RemoteWal
from safekeeper.wal_files import FETCH_PREFIX, SegmentReader, WalMissingError, no_segment_text
from safekeeper.wal_removal import HOLDER_SAFEKEEPERS, first_wal_lsn
from zenith_utils.ids import TenantTimelineId
from zenith_utils.lsn import lsn_text


class KeptWal:
    """What is known of the WAL in a timeline's directory, beside what the acceptor knows."""

    def __init__(
        self, timeline_id: TenantTimelineId, directory: Path, remote: RemoteWal | None
    ) -> None:
        self.timeline_id = timeline_id
        self.directory = directory
        self.remote = remote
        """Where segments go, and come from when they are not here; None without an offload."""
        self.offload_lsn = 0
        """What this process has seen to be stored: all WAL that is here and below this LSN."""
        self.holder = HOLDER_SAFEKEEPERS
        """Because of whom WAL is kept (see wal_removal)."""
        self.fetched = 0
        """Segments that came out of the object storage."""
        self._first_lsn = 0
        self._lock = threading.Lock()
        self._readers: set[WalReader] = set()

    def first_lsn(self, commit_lsn: int) -> int:
        """Where local WAL begins, 0 if there is none. Raises WalStorageError, OSError.

        `commit_lsn` is the persisted one.
        """
        if self._first_lsn:
            return self._first_lsn
        first = first_wal_lsn(self.directory)
        if commit_lsn:
            # Before that a leader may make the log begin elsewhere.
            with self._lock:
                self._first_lsn = max(self._first_lsn, first)
        return first

    def removed(self, segno: int) -> None:
        """Segments up to number `segno` are removed now, or about to be."""
        with self._lock:
            self._first_lsn = max(self._first_lsn, (segno + 1) * WAL_SEGMENT_SIZE)

    def restarted(self) -> None:
        """The log was cut, and may begin elsewhere now: look again what is here, and stored."""
        with self._lock:
            self._first_lsn = 0
            self.offload_lsn = 0

    def lowest_reader(self) -> int | None:
        """The lowest LSN at which somebody reads, None if nobody does."""
        with self._lock:
            return min((reader.position for reader in self._readers), default=None)

    def add(self, reader: WalReader) -> None:
        """Keep WAL from a reader's position on."""
        with self._lock:
            self._readers.add(reader)

    def discard(self, reader: WalReader) -> None:
        """A reader is done."""
        with self._lock:
            self._readers.discard(reader)


class WalReader(SegmentReader):
    """Reads WAL by position, also what has been removed here. Not for use by two threads.

    WAL from its position on is kept until it is closed.
    """

    def __init__(
        self, kept: KeptWal, start_lsn: int, begin_lsn: int, recent: RecentWal | None = None
    ) -> None:
        """Read from `start_lsn`; what this safekeeper has of the timeline begins at `begin_lsn`.

        `recent` has the WAL that was written last.
        """
        super().__init__(kept.directory, recent)
        self.position = start_lsn
        """All below is done with."""
        self.progress: Callable[[], None] = lambda: None
        """Called again and again while a segment is being fetched."""
        self._kept = kept
        self._begin_lsn = begin_lsn
        kept.add(self)

    def read(self, lsn: int, size: int) -> bytes:
        """Up to `size` bytes from `lsn`, cut at the end of its segment.

        Raises WalMissingError (nobody has it), RemoteWalError (worth another attempt),
        RemoteWalDamagedError, WalStorageError, OSError.
        """
        self.position = lsn
        data = super().read(lsn, size)
        self.position = lsn + len(data)
        return data

    def close(self) -> None:
        """The reader is done; WAL is not kept for it any more."""
        super().close()
        self._kept.discard(self)

    def _open(self, lsn: int) -> int:
        # Where WAL began to be written inside a segment, what is before it are zeros.
        if normalize_lsn(lsn) >= normalize_lsn(self._begin_lsn):
            fd = self._open_here(lsn // WAL_SEGMENT_SIZE)
            if fd is not None:
                return fd
        return self._fetch(lsn)

    def _fetch(self, lsn: int) -> int:
        """A descriptor of the segment with `lsn`, out of the object storage."""
        kept, segno = self._kept, lsn // WAL_SEGMENT_SIZE
        if kept.remote is None:
            raise WalMissingError(_missing_text(kept.directory, lsn))
        with tempfile.TemporaryFile(dir=kept.directory, prefix=FETCH_PREFIX) as file:
            try:
                kept.remote.fetch(kept.timeline_id, segno, file, self.progress)
            except WalMissingError as e:
                raise WalMissingError(f"{_missing_text(kept.directory, lsn)}, and {e}") from e
            kept.fetched += 1
            return os.dup(file.fileno())


def _missing_text(directory: Path, lsn: int) -> str:
    """Why WAL at `lsn` is not in a timeline's directory."""
    first = first_wal_lsn(directory)
    if lsn < first:
        name = wal_file_name(1, lsn // WAL_SEGMENT_SIZE)
        return (
            f"requested WAL segment {name} has already been removed from this safekeeper: "
            f"{lsn_text(lsn)} is asked for, WAL begins at {lsn_text(first)} here"
        )
    return no_segment_text(directory, lsn)
