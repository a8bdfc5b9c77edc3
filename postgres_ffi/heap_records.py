"""Heap records' effect on the visibility map, which they name only by flags in their main data.

access/heapam_xlog.h; the effects are those of heap_redo and heap2_redo in access/heap/heapam.c.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .decoded_record import DecodedBlock, DecodedRecord
from .record_reader import RecordFormatError
from .relfile import RelTag
from .versions import Rmgr

XLOG_HEAP_OPMASK = 0x70
XLOG_HEAP_INSERT = 0x00
XLOG_HEAP_DELETE = 0x10
XLOG_HEAP_UPDATE = 0x20
XLOG_HEAP_HOT_UPDATE = 0x40
XLOG_HEAP_LOCK = 0x60
XLOG_HEAP2_MULTI_INSERT = 0x50
XLOG_HEAP2_LOCK_UPDATED = 0x60

XLH_INSERT_ALL_VISIBLE_CLEARED = 1
XLH_DELETE_ALL_VISIBLE_CLEARED = 1
XLH_UPDATE_OLD_ALL_VISIBLE_CLEARED = 1
XLH_UPDATE_NEW_ALL_VISIBLE_CLEARED = 2
XLH_LOCK_ALL_FROZEN_CLEARED = 1

VISIBILITYMAP_ALL_VISIBLE = 1
VISIBILITYMAP_ALL_FROZEN = 2
VISIBILITYMAP_VALID_BITS = 3
HEAPBLOCKS_PER_BYTE = 4
HEAPBLOCKS_PER_PAGE = (8192 - 24) * HEAPBLOCKS_PER_BYTE


@dataclass(frozen=True, slots=True)
class VmClear:
    """Bits (VISIBILITYMAP_*) to clear for one heap block of `rel`, a main fork.

    Nothing happens where the visibility map has no page for the block.
    """

    rel: RelTag
    heap_blkno: int
    flags: int


def vm_position(heap_blkno: int) -> tuple[int, int, int]:
    """(block of the vm fork, byte in the page, bit shift) of a heap block's two bits."""
    map_block, index = divmod(heap_blkno, HEAPBLOCKS_PER_PAGE)
    byte, slot = divmod(index, HEAPBLOCKS_PER_BYTE)
    return map_block, 24 + byte, slot * 2


# operation -> (offset of the flags byte in the main data, the flag, the bits of block 0 to clear)
_CLEARS_OF_BLOCK_0: Mapping[tuple[int, int], tuple[int, int, int]] = {
    (Rmgr.HEAP, XLOG_HEAP_INSERT): (2, XLH_INSERT_ALL_VISIBLE_CLEARED, VISIBILITYMAP_VALID_BITS),
    (Rmgr.HEAP, XLOG_HEAP_DELETE): (7, XLH_DELETE_ALL_VISIBLE_CLEARED, VISIBILITYMAP_VALID_BITS),
    (Rmgr.HEAP, XLOG_HEAP_LOCK): (7, XLH_LOCK_ALL_FROZEN_CLEARED, VISIBILITYMAP_ALL_FROZEN),
    (Rmgr.HEAP2, XLOG_HEAP2_MULTI_INSERT): (
        0,
        XLH_INSERT_ALL_VISIBLE_CLEARED,
        VISIBILITYMAP_VALID_BITS,
    ),
    (Rmgr.HEAP2, XLOG_HEAP2_LOCK_UPDATED): (
        7,
        XLH_LOCK_ALL_FROZEN_CLEARED,
        VISIBILITYMAP_ALL_FROZEN,
    ),
}
_UPDATE_FLAGS_OFFSET = 7


def vm_clears(record: DecodedRecord) -> tuple[VmClear, ...]:
    """The visibility map bits that a record clears; () for most.

    RecordFormatError if a heap record is too short to tell.
    """
    op = record.info & XLOG_HEAP_OPMASK
    if record.rmid == Rmgr.HEAP and op in (XLOG_HEAP_UPDATE, XLOG_HEAP_HOT_UPDATE):
        return _update_clears(record)
    rule = _CLEARS_OF_BLOCK_0.get((record.rmid, op))
    if rule is None:
        return ()
    offset, flag, bits = rule
    if not _flags(record, offset) & flag:
        return ()
    return (_clear(record.blocks[0], bits),)


def _update_clears(record: DecodedRecord) -> tuple[VmClear, ...]:
    """Block 0 is the new tuple's page, block 1 the old one's if that is another page."""
    flags = _flags(record, _UPDATE_FLAGS_OFFSET)
    clears = []
    if flags & XLH_UPDATE_OLD_ALL_VISIBLE_CLEARED:
        clears.append(_clear(record.blocks[-1], VISIBILITYMAP_VALID_BITS))
    if flags & XLH_UPDATE_NEW_ALL_VISIBLE_CLEARED:
        clears.append(_clear(record.blocks[0], VISIBILITYMAP_VALID_BITS))
    return tuple(clears)


def _flags(record: DecodedRecord, offset: int) -> int:
    if offset >= len(record.main_data) or not record.blocks:
        raise RecordFormatError(
            f"heap WAL record with info {record.info:02X} has {len(record.main_data)} bytes of"
            f" main data and {len(record.blocks)} blocks"
        )
    return record.main_data[offset]


def _clear(block: DecodedBlock, bits: int) -> VmClear:
    return VmClear(block.rel, block.blkno, bits)
