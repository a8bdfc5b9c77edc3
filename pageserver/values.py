"""Values of the store: kinds in the flags byte, and the encodings of records applied in-process.

flags = kind << 1 | will_init. The store knows bit 0 only: reconstruction may stop at such a value.
An initialising record starts from a page of zeros. An empty image of a block means a page of zeros
(what a fork's extension over a gap leaves behind); all numbers below are little-endian.

CLEAR_VM            u8 bits (1 all-visible, 2 all-frozen), then 1 or 2 u32 heap block numbers
SET_VM              u8 bits, then the u32 heap block number that gets them
TRUNCATE_VM         u32 heap block: bits of this and later blocks of the same map page are cleared
CLOG_COMMITTED      u32 xids, all on one page
CLOG_ABORTED        the same
MULTIXACT_OFFSET    1 or 2 pairs u32 multixact id, u32 offset, all on one page
MULTIXACT_MEMBERS   u32 first member offset, then pairs u32 xid, u32 status, all on one page
"""

from collections.abc import Sequence
from enum import IntEnum
from struct import pack

WILL_INIT = 1


class ValueKind(IntEnum):
    """What a value's bytes are."""

    IMAGE = 0
    PG_RECORD = 1
    CLEAR_VM = 2
    CLOG_COMMITTED = 3
    CLOG_ABORTED = 4
    MULTIXACT_OFFSET = 5
    MULTIXACT_MEMBERS = 6
    TRUNCATE_VM = 7
    SET_VM = 8


IMAGE_FLAGS = ValueKind.IMAGE << 1 | WILL_INIT


def value_flags(kind: ValueKind, will_init: bool = False) -> int:
    """The flags byte of a value."""
    return kind << 1 | will_init


def value_kind(flags: int) -> ValueKind:
    """The kind in a flags byte; ValueError if there is no such kind."""
    return ValueKind(flags >> 1)


def encode_truncate_vm(heap_block: int) -> bytes:
    """TRUNCATE_VM of everything from `heap_block` on."""
    return pack("<I", heap_block)


def encode_xids(xids: Sequence[int]) -> bytes:
    """CLOG_COMMITTED or CLOG_ABORTED of xids that share a page."""
    return pack(f"<{len(xids)}I", *xids)


def encode_multixact_offsets(pairs: Sequence[tuple[int, int]]) -> bytes:
    """MULTIXACT_OFFSET of (multixact id, offset) pairs that share a page."""
    return b"".join(pack("<II", multi, offset) for multi, offset in pairs)


def encode_multixact_members(first_offset: int, members: Sequence[tuple[int, int]]) -> bytes:
    """MULTIXACT_MEMBERS of (xid, status) pairs at consecutive offsets that share a page."""
    body = b"".join(pack("<II", xid, status) for xid, status in members)
    return pack("<I", first_offset) + body
