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
    assert (version, target) == (3, 8192 if codec else 4096)
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
            assert kind == 1
            assert stored < plain
            payload = decompress(payload, plain)
        assert len(payload) == plain
        found.append(Block(at, BLOCK_KINDS[kind], block_codec == 1, payload))
        at += BLOCK_HEADER + stored
    assert at == len(data)
    return found


def decode_leaf(leaf: bytes) -> list[tuple[bytes, int, int, int, int, int]]:
    """Its entries as (key, lsn, flags, size, offset of the block, offset in the block)."""
    n, prefix, *widths, block_count, all_flags = leaf[:8]
    low_lsn, low_block, at = struct.unpack_from("<QQH", leaf, 8)
    assert 0 < block_count <= n <= 128
    lsn_width, end_width, distance_width, flags_width = widths
    bounds = [0]
    for width in (18 - prefix, lsn_width, end_width, flags_width):
        bounds.append(bounds[-1] + width)
    rows = 26 + prefix
    columns = rows + n * bounds[-1]
    firsts = leaf[columns : columns + block_count]
    assert firsts[0] == 0 and list(firsts) == sorted(set(firsts))
    distances = leaf[columns + block_count :]
    assert len(distances) == block_count * distance_width
    found = []
    block, block_start, start = low_block, 0, at
    for i in range(n):
        entry = leaf[rows + i * bounds[-1] :]
        suffix, *numbers = (entry[bounds[f] : bounds[f + 1]] for f in range(4))
        distance, end, flags = (int.from_bytes(number, "big") for number in numbers)
        if i in firsts:
            column = distances[firsts.index(i) * distance_width :][:distance_width]
            block = low_block + int.from_bytes(column, "big")
            block_start = start if i else 0
        flags = flags if flags_width else all_flags
        found_key, lsn = leaf[26 : 26 + prefix] + suffix, low_lsn + distance
        found.append((found_key, lsn, flags, end - start, block, start - block_start))
        start = end
    # No wider than it has to be.
    lsns, all_of_flags = [entry[1] for entry in found], {entry[2] for entry in found}
    assert min(lsns) == low_lsn and lsn_width == width_of(max(lsns) - low_lsn)
    assert end_width == max(width_of(start), 1)
    assert distance_width == width_of(found[-1][4] - low_block)
    assert flags_width == (len(all_of_flags) > 1) and not (flags_width and all_flags)
    assert len({entry[0][:prefix] for entry in found}) == 1
    assert prefix == 18 or len({entry[0][prefix] for entry in found}) > 1
    return found


def width_of(number: int) -> int:
    """The bytes that a number needs."""
    return (number.bit_length() + 7) // 8


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
