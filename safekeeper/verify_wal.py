"""Checking WAL that lies on the disk since an earlier run, before anybody is served it.

What this process has written was checked as it came, and what lies behind the persisted commit LSN
is decoded when the timeline is loaded. The rest may be long: it is checked segment by segment, in
the background, or when a reader wants it first.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Final

from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import (
    MAX_RECORD_LENGTH,
    MAXALIGN,
    SIZE_OF_LONG_PAGE_HEADER,
    WAL_SEGMENT_SIZE,
    end_of_bytes,
    normalize_lsn,
    parse_page_header,
)
from safekeeper.wal_files import (
    SegmentReader,
    WalDamagedError,
    WalMissingError,
    WalStorageError,
    list_segments,
    segment_path,
)

_CHUNK: Final = 1 << 20


class WalVerifier:
    """Which of the segments found at the start have been checked. Any thread may use it."""

    def __init__(self, directory: Path, limit_lsn: int, magic: int) -> None:
        """WAL below `limit_lsn`, a record boundary, is not known to be good yet."""
        self._directory = directory
        self._limit_lsn = limit_lsn
        self._magic = magic
        self._lock = threading.Lock()
        self._verified: set[int] = set()

    def ensure(self, begin_lsn: int, end_lsn: int) -> None:
        """Return when WAL of a range is known to be good as far as it is here.

        Raises WalDamagedError, OSError.
        """
        if begin_lsn >= self._limit_lsn:
            return
        end_lsn = min(end_lsn, self._limit_lsn)
        for segno in range(begin_lsn // WAL_SEGMENT_SIZE, (end_lsn - 1) // WAL_SEGMENT_SIZE + 1):
            if segno not in self._verified:
                with self._lock:
                    if segno not in self._verified:
                        self._verify(segno)
                        self._verified.add(segno)

    def missing(self) -> list[int]:
        """Numbers of the segments that are still to be checked, ascending. Raises OSError."""
        segments = (segno for segno, _ in list_segments(self._directory))
        return [
            segno
            for segno in segments
            if segno not in self._verified and segno * WAL_SEGMENT_SIZE < self._limit_lsn
        ]

    def _verify(self, segno: int) -> None:
        """Decode what begins in a segment, and what reaches into it from before."""
        end_lsn = min((segno + 1) * WAL_SEGMENT_SIZE, self._limit_lsn)
        error = _scan(self._directory, segno * WAL_SEGMENT_SIZE, end_lsn, self._magic)
        if error is not None and not self._removed(error.lsn):
            good_end = last_record_end(self._directory, error.lsn, self._magic)
            raise wal_damaged(self._directory, error, good_end)

    def _removed(self, lsn: int) -> bool:
        """Whether the segment at `lsn` was removed, as nobody needs it, while it was read."""
        segments = list_segments(self._directory)
        return bool(segments) and lsn // WAL_SEGMENT_SIZE < segments[0][0]


def last_record_end(directory: Path, lsn: int, magic: int) -> int:
    """End of the last complete record that ends at or before `lsn`; 0 if there is none.

    Only whole, contiguous and undamaged WAL counts. Raises OSError.
    """
    segno = max(lsn - 1, 0) // WAL_SEGMENT_SIZE
    lowest = min((number for number, _ in list_segments(directory)), default=segno + 1)
    while segno >= lowest:
        decoder, _ = _decode(directory, segno, lsn, magic)
        if decoder is not None and decoder.last_record_start and decoder.position <= lsn:
            return decoder.position
        segno -= 1
    return 0


def wal_damaged(directory: Path, error: WalDecodeError, good_end: int) -> WalDamagedError:
    """The error for damage that a decoder met, naming file and offset."""
    segno, offset = divmod(error.lsn, WAL_SEGMENT_SIZE)
    path = segment_path(directory, segno, partial=False)
    if not path.exists():
        path = segment_path(directory, segno, partial=True)
    return WalDamagedError(f"damaged WAL in {path} at offset {offset}: {error}", good_end)


def _scan(directory: Path, begin_lsn: int, end_lsn: int, magic: int) -> WalDecodeError | None:
    """Check the records that have bytes in a range which begins with a segment; the first error."""
    first = begin_lsn // WAL_SEGMENT_SIZE
    while True:
        segno = first
        reader = SegmentReader(directory)
        try:
            # A record of which a part lies before is decoded from its start, if that is here.
            while segno > 0 and _reaches(reader, segno, begin_lsn):
                segno -= 1
        finally:
            reader.close()
        decoder, error = _decode(directory, segno, end_lsn, magic)
        if decoder is not None or error is not None or segno == first:
            return error
        # The segment that the record begins in was removed just now.


def _reaches(reader: SegmentReader, segno: int, lsn: int) -> bool:
    """Whether a segment begins inside a record that ends behind `lsn`, and there is one before."""
    begin = segno * WAL_SEGMENT_SIZE
    try:
        header = parse_page_header(reader.read(begin, SIZE_OF_LONG_PAGE_HEADER))
        reader.read(begin - 1, 1)
    except (struct.error, WalMissingError):
        return False
    return header.rem_len > 0 and end_of_bytes(begin, min(header.rem_len, MAX_RECORD_LENGTH)) > lsn


def _decode(
    directory: Path, segno: int, end_lsn: int, magic: int
) -> tuple[WalDecoder | None, WalDecodeError | None]:
    """A decoder that has read from where WAL begins in a segment until its records reach `end_lsn`.

    Also the error if it met one. (None, None) if there is no such segment.
    """
    reader = SegmentReader(directory)
    decoder = None
    position = segno * WAL_SEGMENT_SIZE
    try:
        position = _first_position(reader, segno)
        decoder = WalDecoder(position, magic, join_mid_record=True, assume_switch=False)
        for _, data in reader.chunks(position, _CHUNK):
            decoder.scan(data)
            if normalize_lsn(decoder.position) >= end_lsn:
                return decoder, None
        return decoder, WalDecodeError(decoder.received_lsn, "WAL is missing")
    except WalMissingError:
        return None, None
    except WalDecodeError as e:
        # What is behind the end is none of our business: it may be being written now.
        reached = decoder is not None and normalize_lsn(decoder.position) >= end_lsn
        return decoder, None if reached else e
    except (WalStorageError, ValueError) as e:
        at = position if decoder is None else decoder.received_lsn
        return decoder, WalDecodeError(at, str(e))
    finally:
        reader.close()


def _first_position(reader: SegmentReader, segno: int) -> int:
    """Where WAL begins in a segment: with its first page, or behind zeros with a record.

    Raises WalMissingError if there is no such segment, WalDecodeError if it holds zeros only.
    """
    begin = segno * WAL_SEGMENT_SIZE
    for offset in range(0, WAL_SEGMENT_SIZE, _CHUNK):
        data = reader.read(begin + offset, _CHUNK)
        rest = data.lstrip(b"\0")
        if rest:
            # A record begins with its length, so with other bytes than zeros among the first four.
            first = begin + offset + len(data) - len(rest)
            return first - first % MAXALIGN
    raise WalDecodeError(begin, "no WAL, but zeros")
