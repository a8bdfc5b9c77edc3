"""The format of layer files by its description, in plain Python, and helpers to make such files."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from zenith_utils.crc32c import crc32c
from zenith_utils.zstd import decompress

Entry = tuple[bytes, int, int, bytes]
TENANT: Final = b"a" * 16
TIMELINE: Final = b"b" * 16
LAST_LSN: Final = (1 << 64) - 2
HEADER: Final = 256
BLOCK_HEADER: Final = 16
U64: Final = (1 << 64) - 1
BLOCK_KINDS: Final = ("", "values", "leaf", "root", "filter")


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def write_layer(
    directory: Path,
    entries: list[Entry],
    name: LayerName | None = None,
    *,
    compress: bool = False,
    descriptors: DescriptorCache | None = None,
) -> LayerFile:
    """A layer file of these entries; by default an L0 delta over all LSNs."""
    if name is None:
        name = LayerName.l0_delta(1, LAST_LSN + 1)
    path = directory / str(name)
    writer = LayerWriter(path, TENANT, TIMELINE, compress=compress)
    for entry in entries:
        writer.add(*entry)
    writer.finish(name)
    return LayerFile(path, name, TENANT, TIMELINE, descriptors=descriptors)


def reopened(layer: LayerFile) -> LayerFile:
    return LayerFile(layer.path, layer.name, TENANT, TIMELINE)


@dataclass(frozen=True)
class Block:
    """One block of a file, with its payload uncompressed."""

    offset: int
    kind: str
    packed: bool
    payload: bytes


@dataclass(frozen=True)
class Decoded:
    """All of a layer file."""

    name: LayerName
    codec: int
    blocks: list[Block]
    filter_lines: bytes
    entries: list[Entry]

    def of_kind(self, kind: str) -> list[Block]:
        """The blocks of one of BLOCK_KINDS, in the order of the file."""
        return [block for block in self.blocks if block.kind == kind]


def seal_header(header: bytes) -> bytes:
    """The 256 bytes with the checksum that belongs to them."""
    return header[:252] + struct.pack("<I", crc32c(header[:252]))


def seal_block(block: bytes, offset: int) -> bytes:
    """A block at an offset with the checksum that belongs to it."""
    return struct.pack("<I", crc32c(struct.pack("<Q", offset) + block[4:])) + block[4:]


def decode(data: bytes) -> Decoded:
    """Everything in a layer file; asserts whatever its description promises."""
    assert data[:8] == b"ZNTHLAYR"
    version, kind, codec, target = struct.unpack_from("<HBBI", data, 8)
    assert (version, target) == (2, 8192 if codec else 4096)
    assert kind in (1, 2) and codec in (0, 1)
    assert data[:HEADER] == seal_header(data[:HEADER])
    assert data[16:48] == TENANT + TIMELINE
    start_lsn, end_lsn, count, leaf_offset, root_offset, size, value_bytes = struct.unpack_from(
        "<7Q", data, 88
    )
    filter_offset, key_count, index_bytes = struct.unpack_from("<3Q", data, 144)
    assert data[84:88] == bytes(4)
    assert data[168:252] == bytes(84)
    assert size == len(data)
    name = LayerName(data[48:66], data[66:84], start_lsn, end_lsn, kind == 2)

    blocks = {block.offset: block for block in decode_blocks(data, codec, target)}
    for block in blocks.values():
        expected = "values"
        if block.offset >= leaf_offset:
            expected = "leaf"
        if block.offset in (filter_offset, root_offset):
            expected = "filter" if block.offset == filter_offset else "root"
        assert block.kind == expected
    leaves = [blocks[offset] for offset in sorted(blocks) if blocks[offset].kind == "leaf"]
    assert sum(len(leaf.payload) for leaf in leaves) == index_bytes

    entries: list[Entry] = []
    root = blocks[root_offset].payload
    assert struct.unpack_from("<II", root) == (len(leaves), 0)
    assert len(root) == 8 + 42 * len(leaves)
    for i, leaf in enumerate(leaves):
        first_key, first_lsn = struct.unpack_from(">18sQ", root, 8 + 42 * i)
        offset, first_block = struct.unpack_from("<QQ", root, 8 + 42 * i + 26)
        found = decode_leaf(leaf.payload)
        assert (leaf.offset, first_key, first_lsn, first_block) == (
            offset,
            *found[0][:2],
            found[0][4],
        )
        for entry_key, lsn, flags, value_size, block_offset, at in found:
            value = blocks[block_offset].payload[at : at + value_size]
            assert len(value) == value_size
            entries.append((entry_key, lsn, flags, value))
    assert len(entries) == count
    assert len({entry[0] for entry in entries}) == key_count
    assert sum(len(entry[3]) for entry in entries) == value_bytes
    assert sum(len(b.payload) for b in blocks.values() if b.kind == "values") == value_bytes
    lines = blocks[filter_offset].payload if filter_offset else b""
    return Decoded(name, codec, [blocks[at] for at in sorted(blocks)], lines, entries)


def decode_blocks(data: bytes, codec: int, target: int) -> list[Block]:
    """The blocks of a file from end to end."""
    found = []
    at = HEADER
    while at < len(data):
        _, stored, plain, kind, block_codec, zero = struct.unpack_from("<IIIBBH", data, at)
        block = data[at : at + BLOCK_HEADER + stored]
        assert block == seal_block(block, at)
        assert zero == 0
        payload = block[BLOCK_HEADER:]
        if block_codec:
            assert (block_codec, codec) == (1, 1)
            assert kind in (1, 2)
            assert stored < plain
            payload = decompress(payload, plain)
        assert len(payload) == plain
        found.append(Block(at, BLOCK_KINDS[kind], block_codec == 1, payload))
        at += BLOCK_HEADER + stored
    assert at == len(data)
    return found


def decode_leaf(leaf: bytes) -> list[tuple[bytes, int, int, int, int, int]]:
    """Its entries as (key, lsn, flags, size, offset of the block, offset in the block)."""
    n, prefix, widths, low_lsn, low_block = struct.unpack_from("<HBB4xQQ", leaf)
    lsn_width, block_width = 8 if widths & 1 else 4, 8 if widths & 2 else 4
    width = 18 - prefix + lsn_width + 7 + block_width
    assert 0 < n <= 128
    assert len(leaf) == 48 + n * width
    found = []
    for i in range(n):
        entry = leaf[48 + i * width : 48 + (i + 1) * width]
        suffix, rest = entry[: 18 - prefix], entry[18 - prefix :]
        lsn = low_lsn + int.from_bytes(rest[:lsn_width], "big")
        flags, at, size = struct.unpack_from("<BHI", rest, lsn_width)
        block = low_block + int.from_bytes(rest[lsn_width + 7 :], "little")
        found.append((leaf[24 : 24 + prefix] + suffix, lsn, flags, size, block, at))
    return found


def _mix(x: int) -> int:
    for _ in range(2):
        x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & U64
    return x ^ x >> 32


def filter_passes(lines: bytes, wanted: bytes) -> bool:
    """Whether the key filter says that the key may be there."""
    hi, mid, lo = struct.unpack(">QQH", wanted)
    h = _mix(_mix(hi ^ lo * 0x9E3779B97F4A7C15 & U64) ^ mid)
    number = (h >> 32) * (len(lines) // 64) >> 32
    line = lines[64 * number : 64 * number + 64]
    bits = _mix(h)
    places = [bits >> 9 * i & 511 for i in range(6)]
    return all(line[place // 8] >> place % 8 & 1 for place in places)
