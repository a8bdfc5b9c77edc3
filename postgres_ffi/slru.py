"""SLRU files (access/slru.h): where things lie in them and which segments a truncation drops.

Transaction ids, multixact ids and member offsets are unsigned 32-bit numbers that wrap around.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

BLCKSZ = 8192
SLRU_PAGES_PER_SEGMENT = 32

CLOG_XACTS_PER_BYTE = 4
CLOG_XACTS_PER_PAGE = BLCKSZ * CLOG_XACTS_PER_BYTE
CLOG_COMMITTED = 1  # TRANSACTION_STATUS_COMMITTED
CLOG_ABORTED = 2

MULTIXACT_OFFSETS_PER_PAGE = BLCKSZ // 4
MEMBERS_PER_GROUP = 4  # four flag bytes, then four transaction ids
MEMBER_GROUP_SIZE = MEMBERS_PER_GROUP * (1 + 4)
MEMBER_GROUPS_PER_PAGE = BLCKSZ // MEMBER_GROUP_SIZE
MULTIXACT_MEMBERS_PER_PAGE = MEMBER_GROUPS_PER_PAGE * MEMBERS_PER_GROUP

FIRST_NORMAL_XID = 3
FIRST_MULTIXACT_ID = 1
MAX_MULTIXACT_OFFSET = 0xFFFFFFFF

_U32 = 0xFFFFFFFF
_HALF = 1 << 31


class SlruKind(IntEnum):
    """The SLRUs that storage keeps, by their number in storage keys."""

    CLOG = 0
    MULTIXACT_MEMBERS = 1
    MULTIXACT_OFFSETS = 2

    @property
    def directory(self) -> str:
        """Where its segments lie, relative to the data directory."""
        return _DIRECTORIES[self]


_DIRECTORIES = {
    SlruKind.CLOG: "pg_xact",
    SlruKind.MULTIXACT_MEMBERS: "pg_multixact/members",
    SlruKind.MULTIXACT_OFFSETS: "pg_multixact/offsets",
}


class MemberPosition(NamedTuple):
    """Where a multixact member lies: page, and in it the flag byte and the 4-byte xid."""

    page: int
    flags_offset: int
    xid_offset: int


def segment_file_name(segno: int) -> str:
    """Name of a segment file (SlruFileName)."""
    return f"{segno:04X}"


def parse_segment_file_name(name: str) -> int | None:
    """Segment number of a file name, None if it is none."""
    if 4 <= len(name) <= 6 and all(digit in "0123456789ABCDEF" for digit in name):
        return int(name, 16)
    return None


def page_position(page: int) -> tuple[int, int]:
    """(segment number, block in the segment) of a page."""
    return divmod(page, SLRU_PAGES_PER_SEGMENT)


def clog_position(xid: int) -> tuple[int, int, int]:
    """(page, byte in the page, bit shift) of a transaction's two status bits."""
    page, index = divmod(xid, CLOG_XACTS_PER_PAGE)
    byte, slot = divmod(index, CLOG_XACTS_PER_BYTE)
    return page, byte, slot * 2


def multixact_offset_position(mid: int) -> tuple[int, int]:
    """(page, byte in the page) of a multixact's 4-byte member offset."""
    page, index = divmod(mid, MULTIXACT_OFFSETS_PER_PAGE)
    return page, index * 4


def multixact_member_position(offset: int) -> MemberPosition:
    """Position of the member with this member offset."""
    page, index = divmod(offset, MULTIXACT_MEMBERS_PER_PAGE)
    group, member = divmod(index, MEMBERS_PER_GROUP)
    start = group * MEMBER_GROUP_SIZE
    return MemberPosition(page, start + member, start + MEMBERS_PER_GROUP + 4 * member)


def xid_precedes(xid1: int, xid2: int) -> bool:
    """Whether `xid1` is older (TransactionIdPrecedes): modulo 2^32 unless one is special."""
    if xid1 < FIRST_NORMAL_XID or xid2 < FIRST_NORMAL_XID:
        return xid1 < xid2
    return _wraps_below(xid1, xid2)


def multixact_precedes(first: int, second: int) -> bool:
    """Whether a multixact id or member offset is older than another (MultiXactIdPrecedes)."""
    return _wraps_below(first, second)


def next_multixact_id(mid: int) -> int:
    """The id after `mid`; 0 is never one."""
    return (mid + 1) & _U32 or FIRST_MULTIXACT_ID


def previous_multixact_id(mid: int) -> int:
    """The id before `mid` (PreviousMultiXactId)."""
    return (mid - 1) & _U32 or _U32


_PAGE_RULES: Mapping[SlruKind, tuple[int, int, Callable[[int, int], bool]]] = {
    SlruKind.CLOG: (CLOG_XACTS_PER_PAGE, FIRST_NORMAL_XID + 1, xid_precedes),
    SlruKind.MULTIXACT_MEMBERS: (MULTIXACT_MEMBERS_PER_PAGE, 0, multixact_precedes),
    SlruKind.MULTIXACT_OFFSETS: (
        MULTIXACT_OFFSETS_PER_PAGE,
        FIRST_MULTIXACT_ID + 1,
        multixact_precedes,
    ),
}


def page_precedes(kind: SlruKind, page1: int, page2: int) -> bool:
    """Whether everything on `page1` is older than everything on `page2` (SlruCtl.PagePrecedes)."""
    size, first, precedes = _PAGE_RULES[kind]
    start1 = (page1 * size + first) & _U32
    start2 = (page2 * size + first) & _U32
    return precedes(start1, start2) and precedes(start1, (start2 + size - 1) & _U32)


def may_delete_segment(kind: SlruKind, segno: int, cutoff_page: int) -> bool:
    """Whether truncating at `cutoff_page` drops this segment (SlruMayDeleteSegment)."""
    first = segno * SLRU_PAGES_PER_SEGMENT
    last = first + SLRU_PAGES_PER_SEGMENT - 1
    return page_precedes(kind, first, cutoff_page) and page_precedes(kind, last, cutoff_page)


def offsets_cutoff_page(oldest_multi: int) -> int:
    """Cutoff page of the offsets SLRU for MULTIXACT TRUNCATE_ID (PerformOffsetsTruncation)."""
    return previous_multixact_id(oldest_multi) // MULTIXACT_OFFSETS_PER_PAGE


def deleted_member_segments(start_offset: int, end_offset: int) -> Iterator[int]:
    """Segments of the members SLRU that TRUNCATE_ID drops, wrapping (PerformMembersTruncation)."""
    last = _member_segment(MAX_MULTIXACT_OFFSET)
    segno, end = _member_segment(start_offset), _member_segment(end_offset)
    while segno != end:
        yield segno
        segno = 0 if segno == last else segno + 1


def _member_segment(offset: int) -> int:
    return offset // MULTIXACT_MEMBERS_PER_PAGE // SLRU_PAGES_PER_SEGMENT


def _wraps_below(first: int, second: int) -> bool:
    """(int32) (first - second) < 0."""
    return (first - second) & _U32 >= _HALF
