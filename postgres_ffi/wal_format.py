"""WAL addresses, segment names and page headers (access/xlog_internal.h).

Every LSN is a byte position in the WAL as a plain int; timelines are unsigned 32-bit numbers.
"""

import re
import struct
from dataclasses import dataclass

from typing_extensions import Buffer

WAL_BLCKSZ = 8192
WAL_SEGMENT_SIZE = 16 << 20  # initdb's default; the real value is in pg_control
MAXALIGN = 8

SIZE_OF_SHORT_PAGE_HEADER = 24  # SizeOfXLogShortPHD
SIZE_OF_LONG_PAGE_HEADER = 40  # SizeOfXLogLongPHD
SIZE_OF_RECORD_HEADER = 24  # SizeOfXLogRecord
MAX_RECORD_LENGTH = 0x3FFFFFFF  # MaxAllocSize: Postgres itself cannot read a longer record

XLP_FIRST_IS_CONTRECORD = 0x0001
XLP_LONG_HEADER = 0x0002
XLP_BKP_REMOVABLE = 0x0004
XLP_FIRST_IS_OVERWRITE_CONTRECORD = 0x0008
XLP_ALL_FLAGS = 0x000F

XLR_INFO_MASK = 0x0F
XLR_RMGR_INFO_MASK = 0xF0

_SHORT_HEADER = struct.Struct("<HHIQI4x")
_LONG_TAIL = struct.Struct("<QII")
_WAL_FILE_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")


def maxalign(lsn: int) -> int:
    """The next multiple of 8, where a WAL record may start."""
    return (lsn + MAXALIGN - 1) & ~(MAXALIGN - 1)


def page_header_size(page_lsn: int, seg_size: int = WAL_SEGMENT_SIZE) -> int:
    """Size of the header of the page that starts at `page_lsn`: 40 at a segment start, else 24."""
    return SIZE_OF_SHORT_PAGE_HEADER if page_lsn % seg_size else SIZE_OF_LONG_PAGE_HEADER


def normalize_lsn(lsn: int, seg_size: int = WAL_SEGMENT_SIZE) -> int:
    """The first position >= `lsn` where a record may start: 8-aligned, behind a page header."""
    lsn = maxalign(lsn)
    page_lsn = lsn - lsn % WAL_BLCKSZ
    return max(lsn, page_lsn + page_header_size(page_lsn, seg_size))


def end_of_bytes(start_lsn: int, length: int, seg_size: int = WAL_SEGMENT_SIZE) -> int:
    """Where `length` > 0 record bytes written from `start_lsn` end, page headers stepped over.

    The result is the position behind the last byte, not aligned; at a page end it is the page
    boundary, not the first byte behind the next header.
    """
    position = normalize_lsn(start_lsn, seg_size)
    while True:
        room = WAL_BLCKSZ - position % WAL_BLCKSZ
        if length <= room:
            return position + length
        length -= room
        position += room
        position += page_header_size(position, seg_size)


def segment_number(lsn: int, seg_size: int = WAL_SEGMENT_SIZE) -> int:
    """Number of the segment that holds the byte at `lsn` (XLByteToSeg)."""
    return lsn // seg_size


def segment_start(lsn: int, seg_size: int = WAL_SEGMENT_SIZE) -> int:
    """LSN of the first byte of the segment that holds the byte at `lsn`."""
    return lsn - lsn % seg_size


def wal_file_name(timeline: int, segno: int, seg_size: int = WAL_SEGMENT_SIZE) -> str:
    """24 hex digits: timeline, then the segment number as Postgres splits it (XLogFileName)."""
    per_log = (1 << 32) // seg_size
    return f"{timeline:08X}{segno // per_log:08X}{segno % per_log:08X}"


def parse_wal_file_name(name: str, seg_size: int = WAL_SEGMENT_SIZE) -> tuple[int, int] | None:
    """(timeline, segment number) of a WAL file name, None if it is none."""
    match = _WAL_FILE_NAME.fullmatch(name)
    if match is None:
        return None
    timeline, log, seg = (int(part, 16) for part in match.groups())
    per_log = (1 << 32) // seg_size
    return (timeline, log * per_log + seg) if seg < per_log else None


@dataclass(frozen=True, slots=True)
class WalPageHeader:
    """XLogPageHeaderData; the last three fields exist in a long header only (else 0)."""

    magic: int
    info: int
    timeline: int
    page_lsn: int
    rem_len: int
    system_identifier: int = 0
    seg_size: int = 0
    wal_block_size: int = 0

    @property
    def size(self) -> int:
        """Bytes of the header on the page."""
        long = self.info & XLP_LONG_HEADER
        return SIZE_OF_LONG_PAGE_HEADER if long else SIZE_OF_SHORT_PAGE_HEADER

    def pack(self) -> bytes:
        """The header as it lies on the page."""
        short = _SHORT_HEADER.pack(
            self.magic, self.info, self.timeline, self.page_lsn, self.rem_len
        )
        if not self.info & XLP_LONG_HEADER:
            return short
        return short + _LONG_TAIL.pack(self.system_identifier, self.seg_size, self.wal_block_size)


def parse_page_header(page: Buffer) -> WalPageHeader:
    """Header at the start of `page`, unchecked; struct.error if `page` is too short."""
    short: tuple[int, int, int, int, int] = _SHORT_HEADER.unpack_from(page)
    if not short[1] & XLP_LONG_HEADER:
        return WalPageHeader(*short)
    return WalPageHeader(*short, *_LONG_TAIL.unpack_from(page, SIZE_OF_SHORT_PAGE_HEADER))
