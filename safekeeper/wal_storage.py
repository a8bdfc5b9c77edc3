"""Durable WAL of one timeline: append, flush, truncate.

Appended bytes run through the record decoder first: a record with a wrong CRC is refused before
it reaches the disk, and the flush LSN only ever is the end of a complete record. All methods are
called under the timeline's lock; reading goes through SegmentReader without it.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor, Future
from pathlib import Path

from postgres_ffi.versions import VERSIONS
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.find_end_of_wal import find_end_of_wal
from safekeeper.wal_end import WalEnd
from safekeeper.wal_files import (
    WalStorageError,
    create_segment,
    list_segments,
    open_direct,
    open_segment,
    pwrite_all,
    remove_leftovers,
    segment_path,
)
from zenith_utils.durable import fsync_dir
from zenith_utils.lsn import lsn_text

_ZEROS = bytes(1 << 20)


class FlushError(WalStorageError):
    """fsync failed: what the page cache holds is no longer known to reach the disk."""


class InvalidWalError(WalStorageError):
    """The proposer sent bytes that are no valid WAL at their position."""


def wal_magic(pg_version: int) -> int:
    """WAL page magic of a server version number (150018); of the oldest known one for 0."""
    major = pg_version // 10000
    version = VERSIONS.get(major) if major else VERSIONS[min(VERSIONS)]
    if version is None:
        known = ", ".join(str(m) for m in sorted(VERSIONS))
        raise WalStorageError(f"WAL of PostgreSQL {major} is not supported (known: {known})")
    return version.xlog_page_magic


class WalStorage:
    """WAL files of a timeline's directory."""

    def __init__(self, directory: Path, *, sync: bool, helper: Executor) -> None:
        """`helper` creates segments ahead of their use; without `sync` nothing is fsynced."""
        self.directory = directory
        self.end = WalEnd(sync=sync)
        """Where to write and flush. Both may be done there directly, within a segment."""
        self._sync = sync
        self._helper = helper
        self._magic = wal_magic(0)
        self._next: tuple[int, Future[Path]] | None = None

    @property
    def flush_lsn(self) -> int:
        """End of the last complete durable record, or where WAL begins; 0 if there is none."""
        return self.end.flush_lsn

    def open(self, commit_lsn: int, magic: int) -> None:
        """Find the end of WAL left by an earlier run and clean up behind it.

        `commit_lsn` is the persisted one, 0 for a timeline without acknowledged WAL. Raises
        WalStorageError if WAL is damaged.
        """
        self._magic = magic
        remove_leftovers(self.directory)
        if not commit_lsn:
            self._remove_segments(0)
            return
        end = find_end_of_wal(self.directory, commit_lsn, magic)
        self._sync_range(commit_lsn, end)
        self.end.flush_lsn = end
        # What was received behind the last record's end was never answered for.
        self._cut(end, (end // WAL_SEGMENT_SIZE + 1) * WAL_SEGMENT_SIZE)

    def truncate(self, lsn: int, magic: int, *, may_skip: bool = False) -> None:
        """Durably drop everything at and behind `lsn`, a record boundary; writing goes on there.

        With `may_skip` it may lie behind the end: everything is dropped then, and WAL begins anew.
        """
        self._magic = magic
        end = self.end
        if self.flush_lsn and lsn > end.write_lsn:
            if not may_skip:
                raise WalStorageError(
                    f"cannot truncate WAL to {lsn_text(lsn)}: it ends at {lsn_text(end.write_lsn)}"
                )
            end.flush_lsn = 0
            self._cut(lsn, end.write_lsn)
            return
        self.flush()
        end.flush_lsn = min(end.flush_lsn, lsn)
        if end.write_lsn != lsn:
            self._cut(lsn, end.write_lsn)
        else:
            end.restart(lsn, self._new_decoder(lsn))

    def write(self, lsn: int, data: memoryview) -> None:
        """Append `data` at `lsn`, which must be the written end (truncate() chose the first).

        Nothing is durable before flush(). Raises InvalidWalError (nothing written), OSError.
        """
        end = self.end
        if not end.started or lsn != end.write_lsn:
            raise WalStorageError(
                f"write at {lsn_text(lsn)}, WAL ends at {lsn_text(end.write_lsn)}"
            )
        try:
            if not end.write(data):
                self.write_across(data)
        except WalDecodeError as e:
            raise InvalidWalError(f"invalid WAL from the proposer: {e}") from e

    def write_across(self, data: memoryview) -> None:
        """Write what `end` has checked but could not write, with changes of segments."""
        end = self.end
        while data:
            segno, offset = divmod(end.write_lsn, WAL_SEGMENT_SIZE)
            if segno != end.segno:
                self._switch_to(segno)
            piece = data[: WAL_SEGMENT_SIZE - offset]
            end.write_piece(piece)
            data = data[len(piece) :]

    def flush(self) -> int:
        """Make everything written durable; the flush LSN. Raises FlushError."""
        try:
            self.end.flush()
        except OSError as e:
            raise self.flush_failed(e) from e
        return self.flush_lsn

    def flush_failed(self, error: OSError) -> FlushError:
        """What to raise when `end` could not be flushed."""
        path = segment_path(self.directory, self.end.segno, partial=True)
        return FlushError(f"cannot make WAL in {path} durable: {error.strerror}")

    def close(self) -> None:
        """Release the files; unflushed bytes are given up."""
        self._wait_for_next()
        self._close_segment()

    # ---- segments

    def _switch_to(self, segno: int) -> None:
        """Complete the current segment, make `segno` current and have the one behind it made."""
        old = self.end.segno
        if old >= 0:
            self.flush()
            self._close_segment()
            if segno == old + 1:
                # Not fsynced: after a crash either name will do.
                segment_path(self.directory, old, partial=True).rename(
                    segment_path(self.directory, old, partial=False)
                )
        created = self._wait_for_next()
        fd = self._open_to_write(segno)
        if fd is None:
            create_segment(self.directory, segno, sync=self._sync)
            fd = self._open_to_write(segno)
            created = segno
        assert fd is not None
        self.end.use_segment(fd, segno)
        if created <= segno:
            future = self._helper.submit(create_segment, self.directory, segno + 1, sync=self._sync)
            self._next = (segno + 1, future)

    def _open_to_write(self, segno: int) -> int | None:
        def opening(direct: int) -> int | None:
            return open_segment(self.directory, segno, os.O_RDWR | direct)

        return open_direct(opening) if self._sync else opening(0)

    def _wait_for_next(self) -> int:
        """Wait until no segment is being created; number of the one that was, -1 if none."""
        if self._next is None:
            return -1
        segno, future = self._next
        self._next = None
        # A failure (disk full) is met again, and reported, when the segment is needed.
        return segno if future.exception() is None else -1

    def _close_segment(self) -> None:
        fd = self.end.fd
        if fd >= 0:
            self.end.use_segment(-1, -1)
            os.close(fd)

    # ---- truncation

    def _cut(self, lsn: int, dirty_end: int) -> None:
        """Drop WAL from `lsn` on. Bytes at and behind `dirty_end` are known to be zeros.

        Later segments go first, highest first: a crash leaves a shorter log, never a hole.
        """
        self._wait_for_next()
        segno, offset = divmod(lsn, WAL_SEGMENT_SIZE)
        self._close_segment()
        self.end.dirty = False
        if not self.flush_lsn:
            self._remove_segments(0)
        else:
            self._remove_segments(segno + 1 if offset else segno)
            if offset:
                segment_end = min(dirty_end - segno * WAL_SEGMENT_SIZE, WAL_SEGMENT_SIZE)
                self._clear_tail(segno, offset, segment_end)
        self.end.restart(lsn, self._new_decoder(lsn))

    def _new_decoder(self, lsn: int) -> WalDecoder:
        try:
            return WalDecoder(lsn, self._magic)
        except ValueError as e:
            raise InvalidWalError(f"WAL cannot be streamed from {lsn_text(lsn)}: {e}") from e

    def _sync_range(self, begin: int, end: int) -> None:
        """Make WAL found after a restart durable: only the page cache may hold it so far."""
        if not self._sync:
            return
        for segno in range(begin // WAL_SEGMENT_SIZE, end // WAL_SEGMENT_SIZE + 1):
            fd = open_segment(self.directory, segno)
            if fd is None:
                continue
            try:
                os.fdatasync(fd)
            except OSError as e:
                path = segment_path(self.directory, segno, partial=True)
                raise FlushError(f"cannot make WAL in {path} durable: {e.strerror}") from e
            finally:
                os.close(fd)
        fsync_dir(self.directory)

    def _remove_segments(self, first: int) -> None:
        """Remove the segments from number `first` on, durably."""
        removed = False
        for segno, partial in reversed(list_segments(self.directory)):
            if segno < first:
                break
            segment_path(self.directory, segno, partial=partial).unlink()
            removed = True
        if removed and self._sync:
            fsync_dir(self.directory)

    def _clear_tail(self, segno: int, offset: int, end: int) -> None:
        """Make a segment partial and its bytes [offset, end) zeros, durably."""
        complete = segment_path(self.directory, segno, partial=False)
        if complete.exists():
            complete.rename(segment_path(self.directory, segno, partial=True))
            if self._sync:
                fsync_dir(self.directory)
        fd = open_segment(self.directory, segno, os.O_RDWR)
        if fd is None:
            return
        try:
            if _zero_range(fd, offset, end) and self._sync:
                os.fdatasync(fd)
        except OSError as e:
            raise FlushError(f"cannot clear WAL in {complete}.partial: {e.strerror}") from e
        finally:
            os.close(fd)


def _zero_range(fd: int, offset: int, end: int) -> bool:
    """Make [offset, end) of a file zeros; whether anything had to be written."""
    wrote = False
    while offset < end:
        piece = os.pread(fd, min(len(_ZEROS), end - offset), offset)
        if not piece:
            raise WalStorageError(f"WAL segment ends at offset {offset}, before {end}")
        if piece.count(0) != len(piece):
            pwrite_all(fd, _ZEROS[: len(piece)], offset)
            wrote = True
        offset += len(piece)
    return wrote
