"""The format of layer files against a plain-Python reader, and what damage of any kind leads to."""

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.store_format_support import (
    BLOCK_HEADER,
    HEADER,
    LAST_LSN,
    TENANT,
    TIMELINE,
    Entry,
    decode,
    filter_passes,
    key,
    reopened,
    seal_block,
    seal_header,
    write_layer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.errors import (
    CorruptLayerError,
    CorruptMetadataError,
    FormatVersionError,
)
from pageserver.layered_repository.layer_file import LayerFile, LayerStats
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.metadata import (
    TimelineMetadata,
    read_metadata,
    write_metadata,
)
from pageserver.layered_repository.read_batch import ReadBatch
from zenith_utils import zstd
from zenith_utils.crc32c import crc32c

numbers = st.integers(0, 40) | st.sampled_from([1 << 64, (1 << 144) - 2, 0xFFFFFFFF])
lsns = st.integers(1, 60) | st.sampled_from([1 << 31, 1 << 33, LAST_LSN])
sizes = st.sampled_from([0, 1, 30, 100, 4000, 4096, 4097, 8192, 16_384, 16_385, 40_000])


def value_of(size: int, seed: int, *, random_bytes: bool) -> bytes:
    if random_bytes:
        return random.Random(seed).randbytes(size)
    return (b"record %d " % seed * (size // 8 + 1))[:size]


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    st.dictionaries(
        st.tuples(numbers, lsns), st.tuples(st.integers(0, 255), sizes, st.booleans()), min_size=1
    ),
    st.integers(0, 3),
    st.booleans(),
)
def test_files_are_as_described(
    tmp_path_factory: pytest.TempPathFactory,
    content: dict[tuple[int, int], tuple[int, int, bool]],
    spread: int,
    compress: bool,
) -> None:
    unique: dict[tuple[bytes, int], Entry] = {}
    for (number, lsn), (flags, size, random_bytes) in content.items():
        value = value_of(size, number ^ lsn, random_bytes=random_bytes)
        for copy in range(spread * 30 + 1):
            copied = key(number + copy if number < 41 else number)
            unique[copied, lsn] = (copied, lsn, flags, value)
    entries = [unique[place] for place in sorted(unique)]
    layer = write_layer(tmp_path_factory.mktemp("layer"), entries, compress=compress)
    decoded = decode(Path(layer.path).read_bytes())
    assert decoded.entries == entries
    assert decoded.name == layer.name
    assert decoded.codec == compress
    assert list(layer.entries()) == entries
    for entry in entries:
        assert filter_passes(decoded.filter_lines, entry[0])
    values, leaves = decoded.of_kind("values"), decoded.of_kind("leaf")
    assert layer.verify() == LayerStats(
        size=Path(layer.path).stat().st_size,
        entries=len(entries),
        keys=len({entry[0] for entry in entries}),
        value_bytes=sum(len(entry[3]) for entry in entries),
        value_blocks=len(values),
        packed_blocks=sum(block.packed for block in values),
        leaves=len(leaves),
        filter_lines=len(decoded.filter_lines) // 64,
    )


def test_blocks_are_compressed_where_it_helps(tmp_path: Path) -> None:
    source = random.Random(5)
    text = [(key(i), 8, 1, b"a row of text %d " % i * 20) for i in range(400)]
    noise = [(key(1000 + i), 8, 1, source.randbytes(300)) for i in range(200)]
    big = [(key(2000), 8, 1, bytes(100_000)), (key(2001), 8, 1, source.randbytes(100_000))]
    name = LayerName.image(key(0), key(3000), 8)
    layer = write_layer(tmp_path, [*text, *noise, *big], name, compress=True)
    decoded = decode(Path(layer.path).read_bytes())
    packed = [block.packed for block in decoded.of_kind("values")]
    assert packed[0] and packed[-2]
    assert not packed[-3] and not packed[-1]
    assert max(len(block.payload) for block in decoded.of_kind("values")[:-2]) <= 8192
    assert not any(block.packed for block in decoded.of_kind("leaf"))
    assert not decoded.filter_lines
    assert list(layer.entries()) == [*text, *noise, *big]
    header = layer.describe()
    assert header["stored_bytes"] < header["value_bytes"] - 150_000
    plain = write_layer(tmp_path, [*text, *noise, *big], name)
    assert plain.describe()["size"] > header["size"] + 150_000


def test_filter_of_l0_layers(tmp_path: Path) -> None:
    there = [key(3 * i) for i in range(5000)]
    layer = write_layer(tmp_path, [(wanted, 8, 1, b"x") for wanted in there])
    lines = decode(Path(layer.path).read_bytes()).filter_lines
    assert len(lines) == 64 * -(-5000 * 10 // 512)
    assert all(layer.may_contain(wanted) for wanted in there)
    absent = [key(3 * i + 1) for i in range(10_000)]
    passed = [wanted for wanted in absent if layer.may_contain(wanted)]
    assert passed == [wanted for wanted in absent if filter_passes(lines, wanted)]
    assert len(passed) < 250
    ranged = LayerName.delta(key(0), key(99_999), 1, 100)
    assert write_layer(tmp_path, [(key(3), 8, 1, b"x")], ranged).may_contain(key(4))


@pytest.mark.parametrize("compress", [False, True])
def test_empty_image(tmp_path: Path, compress: bool) -> None:
    name = LayerName.image(key(5), key(9), 64)
    layer = write_layer(tmp_path, [], name, compress=compress)
    decoded = decode(Path(layer.path).read_bytes())
    assert decoded.name == name
    assert decoded.entries == []
    assert list(layer.entries()) == []
    assert layer.keys(key(0), key(99), 100, 0) == []
    batch = ReadBatch([key(6)])
    layer.read(batch, 0, 1, 64, 0)
    assert batch.values(0) == []
    assert layer.verify().entries == 0
    with pytest.raises(ValueError, match="at least one value"):
        write_layer(tmp_path, [], LayerName.l0_delta(8, 16))


# ---- damage


def flips(path: Path) -> Iterator[int]:
    """Flip every bit of a file in turn, give its place, and restore it."""
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(good):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                yield place
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert path.read_bytes() == good


def small_layer(directory: Path, kind: str) -> tuple[LayerFile, list[Entry]]:
    source = random.Random(3)
    entries = [
        (key(i // 3), 8 * (i % 3 + 1), 6 + (i % 3 == 0), b"value %d " % i) for i in range(12)
    ]
    if kind == "l0":
        entries += [(key(900), 16, 1, source.randbytes(80))]
        return write_layer(directory, entries, LayerName.l0_delta(8, 100)), entries
    if kind == "delta":
        entries = [(*entry[:3], entry[3] * 4) for entry in entries]
        entries += [(key(900), 1 << 40, 1, source.randbytes(80))]
        name = LayerName.delta(key(0), key(901), 8, 1 << 41)
        return write_layer(directory, entries, name, compress=True), entries
    return write_layer(directory, [], LayerName.image(key(0), key(4), 8)), []


@pytest.mark.parametrize("kind", ["l0", "delta", "tombstone"])
def test_every_flipped_bit_is_reported(tmp_path: Path, kind: str) -> None:
    layer, entries = small_layer(tmp_path, kind)
    path = Path(layer.path)
    keys = sorted({entry[0] for entry in entries} | {key(77)})
    right = [[entry[1:] for entry in entries if entry[0] == wanted] for wanted in keys]
    warm = reopened(layer)
    warm.open()
    for place in flips(path):
        with pytest.raises(CorruptLayerError) as caught:
            reopened(layer).verify()
        assert caught.value.path == path
        assert str(path) in str(caught.value)
        assert 0 <= caught.value.offset <= place
        for reader in (warm, reopened(layer)):
            for wanted, versions in zip(keys, right, strict=True):
                assert_right_or_refused(reader, wanted, versions)
    assert list(reopened(layer).entries()) == entries


def assert_right_or_refused(
    layer: LayerFile, wanted: bytes, versions: list[tuple[int, int, bytes]]
) -> None:
    batch = ReadBatch([wanted])
    expected: list[tuple[int, int, bytes]] = []
    for version in reversed(versions):
        expected.insert(0, version)
        if version[1] & 1:
            break
    try:
        layer.read(batch, 0, 1, layer.end_lsn - 1, 0)
    except CorruptLayerError:
        return
    assert batch.values(0) == expected


def test_truncated_and_misplaced_content_is_found(tmp_path: Path) -> None:
    entries = [(key(i), 8, 1, bytes([i % 256]) * 8192) for i in range(200)]
    layer = write_layer(tmp_path, entries, LayerName.l0_delta(1, 100))
    path = Path(layer.path)
    good = path.read_bytes()
    for size in (0, 10, 255, 256, 5000, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptLayerError):
            reopened(layer).verify()
    path.write_bytes(good + b"x")
    with pytest.raises(CorruptLayerError, match="bytes instead of"):
        reopened(layer).verify()
    # Two blocks of one size change places: each is whole, neither is where it belongs.
    block = 8192 + BLOCK_HEADER
    first, second = good[HEADER : HEADER + block], good[HEADER + block : HEADER + 2 * block]
    path.write_bytes(good[:HEADER] + second + first + good[HEADER + 2 * block :])
    for read_all in (LayerFile.verify, lambda layer: layer.leaf_entries(0)):
        with pytest.raises(CorruptLayerError, match="offset 256: checksum"):
            read_all(reopened(layer))


def test_files_of_other_layers_are_refused(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, [(key(1), 8, 1, b"x")], LayerName.l0_delta(1, 100))
    path = Path(layer.path)
    with pytest.raises(CorruptLayerError, match="another timeline"):
        LayerFile(path, layer.name, TENANT, b"c" * 16).open()
    other = LayerName.l0_delta(2, 100)
    path.rename(path.with_name(str(other)))
    with pytest.raises(CorruptLayerError, match="another name"):
        LayerFile(path.with_name(str(other)), other, TENANT, TIMELINE).open()


def test_a_bad_block_hurts_only_its_values(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, [(key(i), 8, 1, bytes([i]) * 8192) for i in range(3)])
    path = Path(layer.path)
    damaged = bytearray(path.read_bytes())
    damaged[256 + 8208 + 100] ^= 1
    path.write_bytes(damaged)
    for number in (0, 2, 1):
        batch = ReadBatch([key(number)])
        if number == 1:
            with pytest.raises(CorruptLayerError, match=r"offset 8464: checksum mismatch"):
                layer.read(batch, 0, 1, 99, 0)
        else:
            layer.read(batch, 0, 1, 99, 0)
            assert batch.image(0) == bytes([number]) * 8192


def replace_block(path: Path, offset: int, payload: bytes, plain: int, codec: int) -> None:
    """Put a block with a right checksum in the place of one with as many bytes."""
    data = bytearray(path.read_bytes())
    stored, kind = struct.unpack_from("<I4xB", data, offset + 4)
    assert len(payload) == stored
    block = struct.pack("<IIIBBH", 0, stored, plain, kind, codec, 0) + payload
    data[offset : offset + len(block)] = seal_block(block, offset)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("garbage", "damaged compressed data"),
        ("too long", "damaged compressed data"),
        ("too short", "damaged compressed data"),
        ("huge", "malformed block"),
        ("codec", "method this program does not know"),
    ],
)
def test_wrong_compressed_blocks_with_right_checksums(
    tmp_path: Path, case: str, reason: str
) -> None:
    name = LayerName.image(key(0), key(9), 8)
    layer = write_layer(tmp_path, [(key(1), 8, 1, bytes(3000))], name, compress=True)
    path = Path(layer.path)
    stored = struct.unpack_from("<I", path.read_bytes(), HEADER + 4)[0]
    frame = path.read_bytes()[HEADER + BLOCK_HEADER :][:stored]
    payload, plain, codec = {
        "garbage": (b"\xff" * stored, 3000, 1),
        "too long": (frame, 2999, 1),
        "too short": (frame, 3001, 1),
        "huge": (frame, 0xFFFFFFFF, 1),
        "codec": (frame, 3000, 2),
    }[case]
    replace_block(path, HEADER, payload, plain, codec)
    for read_all in (LayerFile.verify, lambda layer: layer.leaf_entries(0)):
        with pytest.raises(CorruptLayerError, match=f"offset 256: .*{reason}"):
            read_all(reopened(layer))


def leaf_layer(directory: Path, kind: str) -> tuple[LayerFile, list[Entry]]:
    """A layer with one leaf that has narrow, wide, or no numbers."""
    if kind == "narrow":
        entries = [(key(i // 4), 8 * (i % 4 + 1), i & 1, b"value %d" % i) for i in range(100)]
    elif kind == "wide":
        entries = [(key(i << 100), 1 << i, 2 + i % 3, bytes(70_000 * (i % 2))) for i in range(60)]
    else:
        entries = [(key(7), 8, 6, b"")]
    return write_layer(directory, entries, compress=True), entries


@pytest.mark.parametrize("kind", ["narrow", "wide", "single"])
def test_wrong_leaves_with_right_checksums(tmp_path: Path, kind: str) -> None:
    layer, entries = leaf_layer(tmp_path, kind)
    path = Path(layer.path)
    (leaf,) = decode(path.read_bytes()).of_kind("leaf")
    keys = sorted({entry[0] for entry in entries})
    values = b"".join(entry[3] for entry in entries)
    source = random.Random(9)
    size, refused = len(leaf.payload), 0
    changes = [[(place, 1 << bit)] for place in range(min(size, 120)) for bit in range(8)]
    for _ in range(300):
        changes.append([(source.randrange(size), source.randrange(256)) for _ in range(4)])
    for change in changes:
        payload = bytearray(leaf.payload)
        for place, bits in change:
            payload[place] ^= bits
        replace_block(path, leaf.offset, bytes(payload), size, 0)
        # What is found is made of the bytes that are there, whatever the leaf says.
        try:
            assert b"".join(entry[3] for entry in reopened(layer).entries()) == values
        except CorruptLayerError as error:
            refused += 1
            assert error.path == path
        changed = reopened(layer)
        for wanted in keys[:: max(len(keys) // 5, 1)]:
            batch = ReadBatch([wanted])
            try:
                changed.read(batch, 0, 1, LAST_LSN, 0)
            except CorruptLayerError:
                continue
            assert all(value in values for _, _, value in batch.values(0))
    assert refused > len(changes) // 4


def test_malformed_leaves_are_refused(tmp_path: Path) -> None:
    layer, _ = leaf_layer(tmp_path, "narrow")
    path = Path(layer.path)
    (leaf,) = decode(path.read_bytes()).of_kind("leaf")
    n, prefix, lsn_width, end_width, distance_width, flags_width, blocks, _ = leaf.payload[:8]
    assert (n, prefix, lsn_width, end_width, flags_width, blocks) == (100, 17, 1, 2, 1, 1)
    first_end = 26 + prefix + 1 + lsn_width
    row = 1 + lsn_width + end_width + flags_width
    for place, change in (
        (0, b"\x81"),
        (0, bytes([n - 1])),
        (1, b"\x13"),
        (2, b"\x09"),
        (3, b"\0"),
        (3, b"\xff"),
        (4, b"\x01"),
        (5, b"\x02"),
        (6, b"\x00"),
        (6, b"\x65"),
        (len(leaf.payload) - 1 - distance_width, b"\x01"),  # The first block begins later.
        (first_end + row, b"\0\0"),  # The second value ends before it begins.
        (first_end + row, b"\xff\xff"),  # It goes on after the end of its block.
    ):
        payload = leaf.payload[:place] + change + leaf.payload[place + len(change) :]
        assert payload != leaf.payload
        replace_block(path, leaf.offset, payload, len(payload), 0)
        for read_all in (
            LayerFile.verify,
            lambda layer: layer.leaf_entries(0),
            lambda layer: layer.read(ReadBatch([key(0)]), 0, 1, 16, 0),
        ):
            with pytest.raises(CorruptLayerError, match=r"malformed block|not where"):
                read_all(reopened(layer))
    # A leaf is never compressed; the rest of the room is a frame without content.
    frame, size = zstd.compress(leaf.payload), len(leaf.payload)
    room = size - len(frame) - 8
    frame += struct.pack("<II", 0x184D2A50, room) + bytes(room)
    assert zstd.decompress(frame, size) == leaf.payload
    replace_block(path, leaf.offset, frame, size, 1)
    for read_all in (LayerFile.verify, lambda layer: layer.leaf_entries(0)):
        with pytest.raises(CorruptLayerError, match="method this program does not know"):
            read_all(reopened(layer))


def test_values_of_impossible_sizes_are_refused(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, [(key(7), 8, 0, b"first"), (key(7), 1 << 62, 0, b"after")])
    path = Path(layer.path)
    (leaf,) = decode(path.read_bytes()).of_kind("leaf")
    assert list(leaf.payload[:8]) == [2, 18, 8, 1, 0, 0, 1, 0]
    # The LSNs take four bytes less and the positions four more.
    widths = bytes([2, 18, 4, 5, 0, 0, 1, 0])
    for size, good in ((5, True), ((1 << 32) + 5, False)):
        rows = bytes(4) + (5).to_bytes(5, "big") + b"\0\0\0\x08" + (5 + size).to_bytes(5, "big")
        payload = widths + leaf.payload[8:44] + rows + leaf.payload[62:]
        replace_block(path, leaf.offset, payload, len(payload), 0)
        for read_all in (LayerFile.entries, lambda layer: layer.leaf_entries(0)):
            if good:
                assert [entry[3] for entry in read_all(reopened(layer))] == [b"first", b"after"]
                continue
            with pytest.raises(CorruptLayerError, match="malformed block"):
                list(read_all(reopened(layer)))


def test_the_verifier_finds_what_checksums_cannot(tmp_path: Path) -> None:
    entries = [(key(i), 8, 1, b"value") for i in range(1, 300)]
    layer = write_layer(tmp_path, entries, LayerName.l0_delta(8, 2400))
    path = Path(layer.path)
    good = path.read_bytes()
    decoded = decode(good)
    leaf = decoded.of_kind("leaf")[1]

    def damaged(offset: int, change: bytes) -> None:
        path.write_bytes(good)
        payload = bytearray(next(b for b in decoded.blocks if b.offset == offset).payload)
        at, new = change[0], change[1:]
        assert payload[at : at + len(new)] != new
        payload[at : at + len(new)] = new
        replace_block(path, offset, bytes(payload), len(payload), 0)

    def header(place: int, number: int) -> None:
        changed = good[:place] + struct.pack("<Q", number) + good[place + 8 :]
        path.write_bytes(seal_header(changed[:HEADER]) + changed[HEADER:])

    def check(reason: str) -> None:
        with pytest.raises(CorruptLayerError, match=reason):
            reopened(layer).verify()

    prefix = leaf.payload[1]
    assert tuple(leaf.payload[:6]) == (128, 16, 0, 2, 0, 0)
    first = 26 + prefix
    width = 18 - prefix + 2
    second_key = leaf.payload[first + width : first + width + 18 - prefix]
    third = first + 2 * width
    damaged(leaf.offset, bytes([third]) + second_key)
    check("out of order")
    damaged(leaf.offset, bytes([first]) + second_key)
    check("not what the root says")
    damaged(leaf.offset, bytes([8]) + struct.pack("<Q", 9000))
    check("not what the root says")
    damaged(leaf.offset, bytes([24]) + b"\x01\x00")
    check("values are not where")
    for place in (104, 136, 152, 160):
        header(place, struct.unpack_from("<Q", good, place)[0] + 1)
        check("counts|filter")
    damaged(decoded.of_kind("filter")[0].offset, bytes([0]) + bytes(64))
    check("the filter lacks a key")
    path.write_bytes(good)
    reopened(layer).verify()


def test_other_format_versions_are_named(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, [(key(1), 8, 1, b"x")])
    path = Path(layer.path)
    good = path.read_bytes()
    for version in (1, 2, 4):
        header = good[:8] + struct.pack("<H", version) + good[10:HEADER]
        path.write_bytes(seal_header(header) + good[HEADER:])
        with pytest.raises(
            FormatVersionError, match=f"format version {version}, this program reads 3"
        ) as caught:
            reopened(layer).verify()
        error = caught.value
        assert (error.path, error.found, error.supported) == (path, version, 3)

    metadata = tmp_path / "metadata"
    content = TimelineMetadata(8, 0, None, 0, 8, 8)
    write_metadata(metadata, content)
    assert read_metadata(metadata) == content
    data = metadata.read_bytes()
    old = data[4:6] + b"\x00\x01" + data[8:]
    metadata.write_bytes(struct.pack(">I", crc32c(old)) + old)
    with pytest.raises(FormatVersionError, match=r"metadata: format version 1.* reads 3"):
        read_metadata(metadata)
    for _ in flips(metadata):
        with pytest.raises(CorruptMetadataError):
            read_metadata(metadata)


def test_zstd_limits() -> None:
    data = b"some text " * 1000
    frame = zstd.compress(data)
    assert len(frame) < len(data) // 10
    assert zstd.decompress(frame, len(data)) == data
    assert zstd.decompress(zstd.compress(b""), 0) == b""
    for bad, limit in ((frame, len(data) - 1), (frame[:-1], len(data)), (b"x" * 20, 100)):
        with pytest.raises(zstd.ZstdError):
            zstd.decompress(bad, limit)
    noise = random.Random(1).randbytes(100_000)
    assert zstd.decompress(zstd.compress(noise, 3), len(noise)) == noise
