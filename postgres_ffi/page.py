"""Data pages (storage/bufpage.h): header, LSN, and rebuilding a page from its image in WAL."""

import struct
from dataclasses import dataclass

from typing_extensions import Buffer

from .decoded_record import DecodedBlock

BLCKSZ = 8192
SIZE_OF_PAGE_HEADER = 24
ZERO_PAGE = bytes(BLCKSZ)

_HEADER = struct.Struct("<IIHHHHHHI")
_LSN = struct.Struct("<II")
_UPPER_OFFSET = 14


@dataclass(frozen=True, slots=True)
class PageHeader:
    """PageHeaderData; `size` and `layout_version` are the two halves of pd_pagesize_version."""

    lsn: int
    checksum: int
    flags: int
    lower: int
    upper: int
    special: int
    size: int
    layout_version: int
    prune_xid: int


def parse_page_header(page: Buffer) -> PageHeader:
    """The header of a page, unchecked; struct.error if `page` is shorter than 24 bytes."""
    high, low, checksum, flags, lower, upper, special, size_version, prune_xid = (
        _HEADER.unpack_from(page)
    )
    return PageHeader(
        lsn=high << 32 | low,
        checksum=checksum,
        flags=flags,
        lower=lower,
        upper=upper,
        special=special,
        size=size_version & 0xFF00,
        layout_version=size_version & 0x00FF,
        prune_xid=prune_xid,
    )


def page_lsn(page: Buffer) -> int:
    """pd_lsn: the end of the last WAL record that changed the page."""
    high, low = _LSN.unpack_from(page)
    return int(high) << 32 | int(low)


def set_page_lsn(page: bytearray, lsn: int, offset: int = 0) -> None:
    """Store pd_lsn, high half first, in the page that starts at `offset`."""
    _LSN.pack_into(page, offset, lsn >> 32, lsn & 0xFFFFFFFF)


def is_new(page: Buffer) -> bool:
    """Whether the page was never initialised (PageIsNew): it has no LSN and no checksum."""
    view = memoryview(page)
    return not view[_UPPER_OFFSET] and not view[_UPPER_OFFSET + 1]


def restore_image(block: DecodedBlock) -> bytes | None:
    """The page a full-page image was taken of, hole zeroed, with the LSN it had then.

    None if there is no image or it is compressed: then only redo can restore the page, and the
    record itself must be kept.
    """
    image = block.image
    if image is None or block.compressed:
        return None
    return image[: block.hole_offset] + bytes(block.hole_length) + image[block.hole_offset :]
