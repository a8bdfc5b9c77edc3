"""pg_control (catalog/pg_control.h): reading it with its CRC checked, and writing it anew."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from typing_extensions import Buffer

from zenith_utils.crc32c import crc32c

from .checkpoint import CheckPoint, encode_checkpoint, parse_checkpoint
from .versions import PgVersion, version_of_catalog

CONTROL_FILE_SIZE = 8192  # PG_CONTROL_FILE_SIZE: zero-padded on disk
_VERSIONS_OFFSET = 8  # pg_control_version, catalog_version_no: in place in every version


class ControlFileError(ValueError):
    """pg_control that cannot be used: too short or damaged."""


class DBState(IntEnum):
    """ControlFileData.state."""

    STARTUP = 0
    SHUTDOWNED = 1
    SHUTDOWNED_IN_RECOVERY = 2
    SHUTDOWNING = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A control file with a good CRC. `data` holds all its bytes, `version` says how to read them.

    The `with_...` methods return another control file, its CRC recomputed.
    """

    version: PgVersion
    data: bytes

    def field(self, name: str) -> int:
        """A field of ControlFileData by its name in `PgVersion.control_file`; KeyError."""
        offset, code = self.version.control_file.fields[name]
        return int(struct.unpack_from("<" + code, self.data, offset)[0])

    @property
    def system_identifier(self) -> int:
        """Unique identifier of the cluster."""
        return self.field("system_identifier")

    @property
    def state(self) -> DBState:
        """What the cluster was doing; ControlFileError if the number is unknown."""
        number = self.field("state")
        try:
            return DBState(number)
        except ValueError:
            raise ControlFileError(f"pg_control has unknown state {number}") from None

    @property
    def checkpoint_lsn(self) -> int:
        """Start of the last checkpoint's record."""
        return self.field("checkpoint")

    @property
    def checkpoint(self) -> CheckPoint:
        """Copy of the last checkpoint."""
        return parse_checkpoint(self.checkpoint_bytes, self.version)

    @property
    def checkpoint_bytes(self) -> bytes:
        """The same in its native layout."""
        start = self.version.control_checkpoint_offset
        return self.data[start : start + self.version.checkpoint.size]

    @property
    def wal_segment_size(self) -> int:
        """Bytes of a WAL segment."""
        return self.field("wal_segment_size")

    @property
    def data_checksums(self) -> bool:
        """Whether data pages carry checksums."""
        return self.field("data_checksum_version") != 0

    def with_fields(self, values: Mapping[str, int | bool]) -> "ControlFile":
        """Replace fields, by their names in `PgVersion.control_file`; KeyError on another name."""
        data = bytearray(self.data)
        for name in values:
            self.version.control_file.offset(name)
        self.version.control_file.pack_into(data, values)
        return self._sealed(data)

    def with_checkpoint(self, lsn: int, checkpoint: CheckPoint) -> "ControlFile":
        """Replace the last checkpoint: where its record starts and what it says."""
        data = bytearray(self.data)
        self.version.control_file.pack_into(data, {"checkpoint": lsn})
        start = self.version.control_checkpoint_offset
        encoded = encode_checkpoint(checkpoint, self.version)
        data[start : start + len(encoded)] = encoded
        return self._sealed(data)

    def file_bytes(self) -> bytes:
        """The file as Postgres writes it: 8192 bytes, zero behind the CRC."""
        return self.data.ljust(CONTROL_FILE_SIZE, b"\0")

    def _sealed(self, data: bytearray) -> "ControlFile":
        crc_offset = self.version.control_crc_offset
        struct.pack_into("<I", data, crc_offset, crc32c(data[:crc_offset]))
        return ControlFile(self.version, bytes(data))


def parse_control_file(data: Buffer) -> ControlFile:
    """Read pg_control (at least ControlFileData, at most the 8192 bytes of the file).

    UnsupportedVersionError if it is of another major version, ControlFileError if it is damaged.
    """
    content = bytes(data)
    if len(content) < _VERSIONS_OFFSET + 8:
        raise ControlFileError(f"pg_control has only {len(content)} bytes")
    version = version_of_catalog(*struct.unpack_from("<II", content, _VERSIONS_OFFSET))
    crc_offset = version.control_crc_offset
    if len(content) < crc_offset + 4:
        raise ControlFileError(f"pg_control has only {len(content)} bytes")
    (stored,) = struct.unpack_from("<I", content, crc_offset)
    if stored != crc32c(content[:crc_offset]):
        raise ControlFileError("pg_control is damaged: its CRC does not match its content")
    return ControlFile(version, content[: version.control_file.size])
