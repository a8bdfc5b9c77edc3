"""Relation map files, pg_filenode.map (utils/cache/relmapper.c): 512 bytes, CRC-checked."""

import struct

from typing_extensions import Buffer

from zenith_utils.crc32c import crc32c

RELMAP_FILE_NAME = "pg_filenode.map"
RELMAP_SIZE = 512
RELMAP_MAGIC = 0x592717  # RELMAPPER_FILEMAGIC
MAX_MAPPINGS = 62
_CRC_OFFSET = 8 + 8 * MAX_MAPPINGS


class RelMapError(ValueError):
    """A damaged relation map file."""


def parse_relmap(data: Buffer) -> dict[int, int]:
    """Relation oid -> relnode of the mapped catalogs; RelMapError if the file is damaged."""
    content = bytes(data)
    if len(content) != RELMAP_SIZE:
        raise RelMapError(f"{RELMAP_FILE_NAME} has {len(content)} bytes instead of {RELMAP_SIZE}")
    magic, count = struct.unpack_from("<Ii", content)
    if magic != RELMAP_MAGIC or not 0 <= count <= MAX_MAPPINGS:
        raise RelMapError(f"{RELMAP_FILE_NAME} has magic {magic:X} and {count} mappings")
    (stored,) = struct.unpack_from("<I", content, _CRC_OFFSET)
    if stored != crc32c(content[:_CRC_OFFSET]):
        raise RelMapError(f"{RELMAP_FILE_NAME} is damaged: its CRC does not match its content")
    return dict(struct.iter_unpack("<II", content[8 : 8 + 8 * count]))
