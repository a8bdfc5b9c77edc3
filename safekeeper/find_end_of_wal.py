"""Where the local WAL ends after a restart, and whether that end is a torn write or damage.

Behind the written end a segment holds zeros, and a disk writes a 512-byte sector wholly or not at
all. So a write that the crash cut short leaves records some sector of which still ends in zeros.
An invalid record without such a sector was whole once and has been damaged since: it may have
been acknowledged, and dropping it silently would break the promise, so that is an error. So is an
invalid page header, which lies in one sector, unless the write ended within it.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Final

from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import (
    MAX_RECORD_LENGTH,
    SIZE_OF_RECORD_HEADER,
    WAL_BLCKSZ,
    WAL_SEGMENT_SIZE,
    end_of_bytes,
    normalize_lsn,
    parse_page_header,
)
from safekeeper.verify_wal import last_record_end, wal_damaged
from safekeeper.wal_files import (
    SegmentReader,
    WalDamagedError,
    WalStorageError,
    WalUnreadableError,
    list_segments,
    segment_path,
)
from zenith_utils.lsn import lsn_text

_SECTOR: Final = 512
_LENGTH = struct.Struct("<I")


def find_end_of_wal(directory: Path, start_lsn: int, magic: int) -> int:
    """End of the last complete valid record at or behind `start_lsn`, a record boundary.

    Every record from there on is decoded and its CRC checked. Raises WalDamagedError if WAL that
    was complete is damaged or missing, naming the file and the offset.
    """
    segments = dict(list_segments(directory))
    first = start_lsn // WAL_SEGMENT_SIZE
    # Old segments are removed from the lowest on: what is left has no holes.
    for segno in range(min(segments, default=first), first):
        if segno not in segments:
            raise WalDamagedError(
                f"WAL segment {segment_path(directory, segno, partial=False)} is missing, "
                "others below and above are there",
                last_record_end(directory, segno * WAL_SEGMENT_SIZE, magic),
            )
    if first not in segments:
        if start_lsn % WAL_SEGMENT_SIZE == 0 and not any(segno > first for segno in segments):
            return start_lsn
        raise WalDamagedError(
            f"WAL segment {segment_path(directory, first, partial=True)} is missing, "
            f"it should hold WAL at commit LSN {lsn_text(start_lsn)}",
            last_record_end(directory, start_lsn, magic),
        )
    complete_end = _complete_end(segments, first)
    # Zeros from the very start on are the rest of a switched segment if that is complete.
    try:
        decoder = WalDecoder(start_lsn, magic, assume_switch=not segments[first])
    except ValueError as e:
        raise WalStorageError(f"the persisted commit LSN cannot be right: {e}") from e
    reader = SegmentReader(directory)
    try:
        for _, data in reader.chunks(start_lsn):
            decoder.scan(data)
    except WalDecodeError as e:
        if not _is_torn(reader, e, magic, complete_end):
            raise wal_damaged(directory, e, decoder.position) from e
    except WalUnreadableError as e:
        raise WalDamagedError(str(e), decoder.position) from e
    finally:
        reader.close()
    return decoder.position


def _complete_end(segments: dict[int, bool], first: int) -> int:
    """End of the highest complete segment that follows `first` without a hole; 0 if none."""
    end = 0
    segno = first
    while segno in segments:
        if not segments[segno]:
            end = (segno + 1) * WAL_SEGMENT_SIZE
        segno += 1
    return end


def _is_torn(reader: SegmentReader, error: WalDecodeError, magic: int, complete_end: int) -> bool:
    """Whether invalid WAL is what an interrupted write leaves."""
    if error.lsn % WAL_BLCKSZ == 0:  # where no record begins
        sector = _read_span(reader, error.lsn, _SECTOR)
        return error.lsn >= complete_end and _is_begun_header(error.lsn, sector, magic)
    data = _read_span(reader, error.lsn, SIZE_OF_RECORD_HEADER)
    size = SIZE_OF_RECORD_HEADER
    if "crc" in error.reason:
        size = _raw_size(error.lsn, data)
        data = _read_span(reader, error.lsn, size)
    return error.lsn + size > complete_end and _has_unwritten_sector(error.lsn, data)


def _is_begun_header(page_lsn: int, sector: bytes, magic: int) -> bool:
    """Whether a page's first sector has the beginning of its header, or nothing, and no more."""
    header = replace(parse_page_header(sector), magic=magic, page_lsn=page_lsn)
    return header.pack().startswith(sector.rstrip(b"\0"))


def _raw_size(lsn: int, header: bytes) -> int:
    """Bytes of the file from a record's start to its end, page headers included."""
    (length,) = _LENGTH.unpack_from(header)
    return end_of_bytes(normalize_lsn(lsn), min(length, MAX_RECORD_LENGTH)) - lsn


def _read_span(reader: SegmentReader, lsn: int, size: int) -> bytes:
    parts = []
    for position, data in reader.chunks(lsn):
        parts.append(data[: size - (position - lsn)])
        if position + len(data) >= lsn + size:
            break
    return b"".join(parts)


def _has_unwritten_sector(lsn: int, data: bytes) -> bool:
    """Whether the part of `data` (which lies at `lsn`) in some sector ends in zeros."""
    start = 0
    while start < len(data):
        end = min(start + _SECTOR - (lsn + start) % _SECTOR, len(data))
        tail = data[max(start, end - 8) : end]
        if not any(tail):
            return True
        start = end
    return False
