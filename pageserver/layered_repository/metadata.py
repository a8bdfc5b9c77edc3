"""The metadata file of a timeline: the root that leads to all the rest.

512 bytes, big-endian: u32 CRC-32C of everything after it, u16 size of header and body, u16 format
version; body: u64 disk_consistent_lsn, option of u64 prev_record_lsn, option of 16 bytes ancestor
timeline, u64 ancestor_lsn, u64 latest_gc_cutoff_lsn, u64 initdb_lsn, u64 number and u32 CRC-32C of
the list of layers (see layer_list.py); zeros to the end. An option is a byte 0, or a byte 1 and the
value. 512 bytes are one sector: written as a whole or not at all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pageserver.layered_repository.errors import CorruptMetadataError, FormatVersionError
from pageserver.layered_repository.files import FILES, Files
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TimelineId

METADATA_SIZE: Final = 512
METADATA_FILE: Final = "metadata"
FORMAT_VERSION: Final = 3
_HEADER = struct.Struct(">IHH")
_U64 = struct.Struct(">Q")
_TAIL = struct.Struct(">QQQQI")


@dataclass(frozen=True, slots=True)
class TimelineMetadata:
    """What a timeline must remember; LSNs are plain integers, 0 where there is none.

    layer_list, layer_list_crc: number and checksum of the file that names the layers; 0 for a
    timeline that never had one.
    """

    disk_consistent_lsn: int
    prev_record_lsn: int
    ancestor_id: TimelineId | None
    ancestor_lsn: int
    latest_gc_cutoff_lsn: int
    initdb_lsn: int
    layer_list: int = 0
    layer_list_crc: int = 0

    def encode(self) -> bytes:
        """The 512 bytes of the file."""
        body = _U64.pack(self.disk_consistent_lsn)
        body += b"\x01" + _U64.pack(self.prev_record_lsn) if self.prev_record_lsn else b"\x00"
        body += b"\x01" + self.ancestor_id.raw if self.ancestor_id else b"\x00"
        body += _TAIL.pack(
            self.ancestor_lsn,
            self.latest_gc_cutoff_lsn,
            self.initdb_lsn,
            self.layer_list,
            self.layer_list_crc,
        )
        size = _HEADER.size + len(body)
        covered = struct.pack(">HH", size, FORMAT_VERSION) + body
        covered += bytes(METADATA_SIZE - 4 - len(covered))
        return struct.pack(">I", crc32c(covered)) + covered

    @classmethod
    def decode(cls, data: bytes, path: Path) -> TimelineMetadata:
        """Parse the file's content; `path` is for the error.

        Raises CorruptMetadataError, FormatVersionError.
        """
        if len(data) != METADATA_SIZE:
            raise CorruptMetadataError(path, 0, f"{len(data)} bytes, expected {METADATA_SIZE}")
        checksum, size, version = _HEADER.unpack_from(data)
        if crc32c(data[4:]) != checksum:
            raise CorruptMetadataError(path, 0, "checksum mismatch")
        if version != FORMAT_VERSION:
            raise FormatVersionError(path, version, FORMAT_VERSION)
        try:
            (disk_consistent_lsn,) = _U64.unpack_from(data, _HEADER.size)
            at = _HEADER.size + _U64.size
            prev_record_lsn, ancestor_id = 0, None
            if data[at]:
                (prev_record_lsn,) = _U64.unpack_from(data, at + 1)
                at += _U64.size
            at += 1
            if data[at]:
                ancestor_id = TimelineId(data[at + 1 : at + 17])
                at += 16
            at += 1
            tail = _TAIL.unpack_from(data, at)
        except (struct.error, ValueError) as error:
            raise CorruptMetadataError(path, 8, f"malformed body: {error}") from error
        if at + _TAIL.size != size:
            raise CorruptMetadataError(path, 4, f"size {size}, expected {at + _TAIL.size}")
        return cls(disk_consistent_lsn, prev_record_lsn, ancestor_id, *tail)


def read_metadata(path: Path) -> TimelineMetadata:
    """Read a metadata file. Raises OSError, CorruptMetadataError, FormatVersionError."""
    return TimelineMetadata.decode(path.read_bytes(), path)


def write_metadata(path: Path, metadata: TimelineMetadata, files: Files = FILES) -> None:
    """Replace a metadata file durably. Raises OSError."""
    files.write_file_durably(path, metadata.encode())
