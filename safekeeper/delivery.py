"""The delivery file: which pageserver ingests a timeline's WAL, and how far it has it durably.

It lies beside the control file and lets a restarted safekeeper call the pageserver although no
compute runs, and remove what that has. The connection string is durable before WAL that a compute
pushes is accepted; the LSNs are written lazily and may lag, which costs a call too many and never
one too few, and keeps WAL longer. The string may hold a token, so only its owner may read the file.

Layout, little-endian: u32 magic, u32 version, u64 flush LSN, u64 remote LSN (version 1 has none),
u32 length and UTF-8 bytes of the connection string, u32 CRC-32C of everything before it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zenith_utils.conninfo import without_password
from zenith_utils.crc32c import crc32c
from zenith_utils.durable import write_file_durably

DELIVERY_FILE_NAME: Final = "safekeeper.delivery"
MAGIC: Final = 0xCAFEDE11
VERSION: Final = 2

_VERSION = struct.Struct("<II")
_HEADER = struct.Struct("<IIQQI")
_HEADER_1 = struct.Struct("<IIQI")
_CRC = struct.Struct("<I")


class DeliveryFileError(Exception):
    """The delivery file is damaged or of an unknown version."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A pageserver's connection string, and up to where it reported to have WAL.

    flush_lsn: on its disk; remote_lsn: in its remote storage.
    """

    connstr: str
    flush_lsn: int = 0
    remote_lsn: int = 0

    @property
    def pageserver(self) -> str:
        """The pageserver, by its connection string without a password."""
        return without_password(self.connstr)


def encode(delivery: Delivery) -> bytes:
    """The whole file."""
    connstr = delivery.connstr.encode()
    header = _HEADER.pack(MAGIC, VERSION, delivery.flush_lsn, delivery.remote_lsn, len(connstr))
    content = header + connstr
    return content + _CRC.pack(crc32c(content))


def decode(data: bytes) -> Delivery:
    """Decode and verify a whole file. Raises DeliveryFileError."""
    if len(data) < _HEADER_1.size + _CRC.size:
        raise DeliveryFileError(f"safekeeper delivery file has only {len(data)} bytes")
    content = data[: -_CRC.size]
    (stored,) = _CRC.unpack_from(data, len(content))
    computed = crc32c(content)
    if stored != computed:
        raise DeliveryFileError(
            f"safekeeper delivery file checksum mismatch: expected {computed} got {stored}"
        )
    magic, version = _VERSION.unpack_from(content)
    if magic != MAGIC:
        raise DeliveryFileError(f"bad delivery file magic: {magic:#X}, expected {MAGIC:#X}")
    try:
        if version == 1:
            _, _, flush_lsn, length = _HEADER_1.unpack_from(content)
            remote_lsn, connstr = 0, content[_HEADER_1.size :]
        elif version == VERSION:
            _, _, flush_lsn, remote_lsn, length = _HEADER.unpack_from(content)
            connstr = content[_HEADER.size :]
        else:
            raise DeliveryFileError(
                f"unsupported safekeeper delivery file version {version}, "
                f"this program reads the versions up to {VERSION}"
            )
    except struct.error as e:
        raise DeliveryFileError(f"malformed delivery file: {e}") from e
    if length != len(connstr):
        raise DeliveryFileError(f"malformed delivery file: {len(connstr)} bytes, not {length}")
    try:
        return Delivery(connstr.decode(), flush_lsn, remote_lsn)
    except UnicodeDecodeError as e:
        raise DeliveryFileError(f"malformed delivery file: {e}") from e


def load(directory: Path) -> Delivery | None:
    """The file in a timeline's directory, None if there is none.

    Raises DeliveryFileError, which names the file and what helps, and OSError.
    """
    path = directory / DELIVERY_FILE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return decode(data)
    except DeliveryFileError as e:
        raise DeliveryFileError(
            f"{e} ({path}): the timeline's pageserver is not known until a compute is started on it"
        ) from e


def store(directory: Path, delivery: Delivery, *, sync: bool) -> None:
    """Replace the file in a timeline's directory, atomically and durably. Raises OSError."""
    write_file_durably(directory / DELIVERY_FILE_NAME, encode(delivery), sync=sync, mode=0o600)
