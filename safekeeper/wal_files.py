"""WAL segment files of one timeline: names, creation, reading.

A segment is written under the name ``<24 hex>.partial`` and loses the suffix when it is full.
Segments are created whole, zero-filled and fsynced, so that writing into them later changes no
metadata and fdatasync is one disk write. Everything behind the written end is zeros: a torn
write therefore shows as zeros, and an end-of-WAL search cannot meet records of an older term.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, parse_wal_file_name, wal_file_name
from safekeeper.recent_wal import RecentWal
from safekeeper.wal_end import DIRECT_BLOCK
from zenith_utils.durable import fsync_dir
from zenith_utils.lsn import lsn_text

PARTIAL_SUFFIX: Final = ".partial"
TEMP_SUFFIX: Final = ".tmp"
FETCH_PREFIX: Final = "fetch-"
"""Of segments out of object storage: files that are unlinked as soon as they are open."""
_ZEROS_SIZE: Final = 1 << 20
# What is read at once past the page cache.
_DIRECT_SIZE: Final = (1 << 20) + 2 * DIRECT_BLOCK
_TLI: Final = 1

T = TypeVar("T")


class WalStorageError(Exception):
    """WAL that is damaged, missing or cannot be written; names the file or position."""


class WalMissingError(WalStorageError):
    """WAL at a requested position is not here."""


def segment_path(directory: Path, segno: int, *, partial: bool) -> Path:
    """Path of a segment file, complete or partial."""
    name = wal_file_name(_TLI, segno)
    return directory / (name + PARTIAL_SUFFIX if partial else name)


def list_segments(directory: Path) -> list[tuple[int, bool]]:
    """(segment number, partial) of all segment files, ascending; WalStorageError on doubles."""
    found: dict[int, bool] = {}
    for entry in os.scandir(directory):
        name = entry.name
        partial = name.endswith(PARTIAL_SUFFIX)
        parsed = parse_wal_file_name(name.removesuffix(PARTIAL_SUFFIX))
        if parsed is None:
            continue
        if parsed[1] in found:
            raise WalStorageError(f"both {entry.path} and its partial or complete twin exist")
        found[parsed[1]] = partial
    return sorted(found.items())


def list_segment_files(directory: Path) -> list[tuple[int, Path]]:
    """(segment number, path) of all segment files, ascending; of doubles both."""
    found = []
    for path in directory.iterdir():
        parsed = parse_wal_file_name(path.name.removesuffix(PARTIAL_SUFFIX))
        if parsed is not None:
            found.append((parsed[1], path))
    return sorted(found)


def remove_leftovers(directory: Path) -> None:
    """Remove segments whose creation, or fetching, a crash interrupted."""
    for pattern in (f"*{PARTIAL_SUFFIX}{TEMP_SUFFIX}", f"{FETCH_PREFIX}*"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def create_segment(directory: Path, segno: int, *, sync: bool) -> Path:
    """Create a zero-filled partial segment: visible under its name only when it is whole.

    Raises OSError, for example when the disk is full; nothing is left behind then.
    """
    path = segment_path(directory, segno, partial=True)
    temp = path.with_name(path.name + TEMP_SUFFIX)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if sync:
        # Zeros in the page cache would be in the way of the direct writes that follow.
        fd = open_direct(lambda direct: os.open(temp, flags | direct, 0o600))
    else:
        fd = os.open(temp, flags, 0o600)
    try:
        try:
            with memoryview(_zeros()) as zeros:
                for offset in range(0, WAL_SEGMENT_SIZE, _ZEROS_SIZE):
                    pwrite_all(fd, zeros, offset)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        temp.rename(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if sync:
        fsync_dir(directory)
    return path


def open_direct(opening: Callable[[int], T]) -> T:
    """`opening(O_DIRECT)`, or `opening(0)` if the file system knows no direct I/O."""
    try:
        return opening(os.O_DIRECT)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return opening(0)


@functools.cache
def _zeros() -> mmap.mmap:
    """Zeros in whole pages, as direct I/O wants them."""
    return mmap.mmap(-1, _ZEROS_SIZE, prot=mmap.PROT_READ)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite(2) until everything is written."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


def open_segment(directory: Path, segno: int, flags: int = os.O_RDONLY) -> int | None:
    """Descriptor of a segment under either name, None if there is none."""
    # A partial segment may become complete, or a complete one partial, between two attempts.
    for partial in (True, False, True, False):
        try:
            path = segment_path(directory, segno, partial=partial)
            return os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
    return None


def no_segment_text(directory: Path, lsn: int) -> str:
    """That a timeline's directory has no segment for an LSN."""
    name = wal_file_name(_TLI, lsn // WAL_SEGMENT_SIZE)
    return f"WAL at {lsn_text(lsn)} is not on this safekeeper: no segment {name} in {directory}"


class WalUnreadableError(WalStorageError):
    """A segment that is there cannot be read, or not to its end."""


class WalDamagedError(WalStorageError):
    """WAL that was durable here is no longer what it was."""

    def __init__(self, message: str, good_end: int) -> None:
        """`good_end`: end of the last record before the damage, a record boundary; 0 if none."""
        super().__init__(message)
        self.good_end = good_end


class SegmentReader:
    """Reads WAL by position; keeps the segment read last open. Not for use by two threads."""

    def __init__(self, directory: Path, recent: RecentWal | None = None) -> None:
        """`recent` has the WAL that was written last, if anybody keeps that in memory."""
        self._directory = directory
        self._recent = recent
        self._segno = -1
        self._fd = -1
        self._is_direct = False
        self._blocks: mmap.mmap | None = None

    def read(self, lsn: int, size: int) -> bytes:
        """Up to `size` bytes from `lsn`, cut at the end of its segment file.

        Raises WalMissingError if there is no such segment, WalUnreadableError.
        """
        segno, offset = divmod(lsn, WAL_SEGMENT_SIZE)
        if self._recent is not None:
            recent = self._recent.read(lsn, min(size, WAL_SEGMENT_SIZE - offset))
            if recent is not None:
                return recent
        if segno != self._segno:
            self._close_segment()
            self._fd = self._open(lsn)
            self._segno = segno
        try:
            data = self._pread(min(size, WAL_SEGMENT_SIZE - offset), offset)
        except OSError as e:
            raise WalUnreadableError(
                f"cannot read segment {wal_file_name(_TLI, segno)} in {self._directory} at "
                f"offset {offset}: {e.strerror}"
            ) from e
        if not data:
            raise WalUnreadableError(
                f"segment {wal_file_name(_TLI, segno)} in {self._directory} is cut short at "
                f"offset {offset}, its size should be {WAL_SEGMENT_SIZE}"
            )
        return data

    def chunks(self, lsn: int, size: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
        """(position, bytes) from `lsn` to the end of the last contiguous segment."""
        while True:
            try:
                data = self.read(lsn, size)
            except WalMissingError:
                return
            yield lsn, data
            lsn += len(data)

    def close(self) -> None:
        """Close the open segment; reading on reopens it."""
        self._close_segment()

    def _open(self, lsn: int) -> int:
        """A descriptor of the segment with `lsn`."""
        fd = self._open_here(lsn // WAL_SEGMENT_SIZE)
        if fd is None:
            raise WalMissingError(no_segment_text(self._directory, lsn))
        return fd

    def _open_here(self, segno: int) -> int | None:
        """A descriptor of a segment in the directory, None if there is none.

        One that is being written, past the page cache, is read so, too: what the cache got while
        a block was written may be older than the block, and stay.
        """
        try:
            path = segment_path(self._directory, segno, partial=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except FileNotFoundError:
            return open_segment(self._directory, segno)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            return open_segment(self._directory, segno)  # no direct I/O, so nobody writes with it
        if self._blocks is None:
            self._blocks = mmap.mmap(-1, _DIRECT_SIZE)
        self._is_direct = True
        return fd

    def _pread(self, size: int, offset: int) -> bytes:
        if not self._is_direct:
            return os.pread(self._fd, size, offset)
        assert self._blocks is not None
        skipped = offset % DIRECT_BLOCK
        size = min(size, _DIRECT_SIZE - DIRECT_BLOCK)
        end = -(-(skipped + size) // DIRECT_BLOCK) * DIRECT_BLOCK
        with memoryview(self._blocks) as blocks:
            got = os.preadv(self._fd, [blocks[:end]], offset - skipped)
            return bytes(blocks[skipped : min(got, skipped + size)])

    def _close_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._segno = self._fd = -1
        self._is_direct = False
