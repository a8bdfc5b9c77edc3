"""The list of a timeline's layers: which files it has, and how large they are.

File `layers-<number>`, big-endian: 8 bytes magic "ZNTHLIST", u32 CRC-32C of everything after it,
u16 format version, u16 zero, 16 bytes tenant, 16 bytes timeline, u64 number, u64 count; then of
each layer 18 bytes first key, 18 bytes end of the keys, u64 first LSN, u64 end of the LSNs (0: an
image), u64 size of the file in bytes; ascending.

A list is never changed: each change of the layers writes a new one, of a higher number. The
metadata names the one that counts, by number and checksum, so that one rename, that of the
metadata, changes the list and the LSNs that belong to it in one step.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from pageserver.layered_repository.errors import CorruptMetadataError, FormatVersionError
from pageserver.layered_repository.layer_name import LayerName
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantId, TimelineId

FORMAT_VERSION: Final = 1
MAGIC: Final = b"ZNTHLIST"
_NAME = re.compile(r"layers-([0-9A-F]{16})", re.ASCII)
_CHECKSUM = struct.Struct(">I")
_HEADER = struct.Struct(">HH16s16sQQ")
_ENTRY = struct.Struct(">18s18sQQQ")
_COVERED: Final = len(MAGIC) + _CHECKSUM.size
_ENTRIES: Final = _COVERED + _HEADER.size


class ListedLayer(NamedTuple):
    """A layer and the size of its file in bytes."""

    name: LayerName
    size: int


class SizedLayer(Protocol):
    """A layer file."""

    @property
    def name(self) -> LayerName:
        """Its name, which says what it covers."""

    @property
    def size(self) -> int:
        """Bytes of the file."""


class LayerList(NamedTuple):
    """What a file says."""

    tenant_id: TenantId
    timeline_id: TimelineId
    number: int
    layers: list[ListedLayer]


def list_name(number: int) -> str:
    """The file name of a list."""
    return f"layers-{number:016X}"


def list_number(name: str) -> int | None:
    """The number of the list that a file name stands for, None if it is no list's name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1], 16)


def encode_list(
    tenant_id: TenantId, timeline_id: TimelineId, number: int, layers: Iterable[SizedLayer]
) -> tuple[bytes, int]:
    """The content of a file, and its checksum."""
    entries = sorted(_encode_layer(layer.name, layer.size) for layer in layers)
    header = _HEADER.pack(FORMAT_VERSION, 0, tenant_id.raw, timeline_id.raw, number, len(entries))
    covered = header + b"".join(entries)
    checksum = crc32c(covered)
    return MAGIC + _CHECKSUM.pack(checksum) + covered, checksum


def _encode_layer(name: LayerName, size: int) -> bytes:
    end_lsn = 0 if name.is_image else name.end_lsn
    return _ENTRY.pack(name.key_start, name.key_end, name.start_lsn, end_lsn, size)


def decode_list(data: bytes, path: Path) -> tuple[LayerList, int]:
    """Parse a file's content, and its checksum; `path` is for the error.

    Raises CorruptMetadataError, FormatVersionError.
    """
    if len(data) < _ENTRIES or data[: len(MAGIC)] != MAGIC:
        raise CorruptMetadataError(path, 0, "not a list of layers")
    (checksum,) = _CHECKSUM.unpack_from(data, len(MAGIC))
    if crc32c(data[_COVERED:]) != checksum:
        raise CorruptMetadataError(path, len(MAGIC), "checksum mismatch")
    version, _, tenant, timeline, number, count = _HEADER.unpack_from(data, _COVERED)
    if version != FORMAT_VERSION:
        raise FormatVersionError(path, version, FORMAT_VERSION)
    if len(data) != _ENTRIES + count * _ENTRY.size:
        raise CorruptMetadataError(path, _ENTRIES, f"{len(data)} bytes for {count} layers")
    try:
        layers = [_decode_layer(*entry) for entry in _ENTRY.iter_unpack(data[_ENTRIES:])]
    except ValueError as error:
        raise CorruptMetadataError(path, _ENTRIES, f"malformed entry: {error}") from error
    return LayerList(TenantId(tenant), TimelineId(timeline), number, layers), checksum


def _decode_layer(
    key_start: bytes, key_end: bytes, start_lsn: int, end_lsn: int, size: int
) -> ListedLayer:
    if end_lsn:
        return ListedLayer(LayerName.delta(key_start, key_end, start_lsn, end_lsn), size)
    return ListedLayer(LayerName.image(key_start, key_end, start_lsn), size)
