"""Layer files: the documented format, lookups, and every flipped bit found."""

import io
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository import dump_layer
from pageserver.layered_repository.errors import CorruptLayerError
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.read_batch import ReadBatch
from zenith_utils.crc32c import crc32c

Entry = tuple[bytes, int, int, bytes]
TENANT, TIMELINE = b"a" * 16, b"b" * 16
LAST_LSN = (1 << 64) - 2


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def write(directory: Path, entries: list[Entry], end_lsn: int = LAST_LSN + 1) -> LayerFile:
    name = LayerName.l0_delta(1, end_lsn)
    path = directory / str(name)
    writer = LayerWriter(path, TENANT, TIMELINE)
    for entry in entries:
        writer.add(*entry)
    writer.finish(name)
    return LayerFile(path, name, TENANT, TIMELINE)


def decode(data: bytes) -> list[Entry]:
    """The format by its description, in plain Python."""
    assert data[:8] == b"ZNTHLAYR"
    assert struct.unpack_from("<I", data, 252)[0] == crc32c(data[:252])
    assert data[16:48] == TENANT + TIMELINE
    count, leaves, root, size, value_bytes = struct.unpack_from("<5Q", data, 104)
    assert size == len(data)

    blocks = {}
    at = 256
    while at < size:
        crc, stored, raw, kind, codec, zero = struct.unpack_from("<IIIBBH", data, at)
        assert crc == crc32c(struct.pack("<Q", at) + data[at + 4 : at + 16 + stored])
        assert (raw, codec, zero) == (stored, 0, 0)
        assert kind == (1 if at < leaves else 2 if at < root else 3)
        blocks[at] = data[at + 16 : at + 16 + stored]
        at += 16 + stored
    assert at == size

    entries = []
    (n_leaves,) = struct.unpack_from("<I", blocks[root])
    for i in range(n_leaves):
        first_key, first_lsn, offset, leaf_size = struct.unpack_from(
            ">18sQ", blocks[root], 8 + 38 * i
        ) + struct.unpack_from("<QI", blocks[root], 8 + 38 * i + 26)
        leaf = blocks[offset]
        assert leaf_size == len(leaf) + 16
        n, prefix, widths, low_lsn, low_block = struct.unpack_from("<HBB4xQQ", leaf)
        lsn_width, block_width = 8 if widths & 1 else 4, 8 if widths & 2 else 4
        width = 18 - prefix + lsn_width + 7 + block_width
        assert len(leaf) == 48 + n * width
        for j in range(n):
            entry = leaf[48 + j * width : 48 + (j + 1) * width]
            suffix, rest = entry[: 18 - prefix], entry[18 - prefix :]
            lsn = low_lsn + int.from_bytes(rest[:lsn_width], "big")
            flags, at_value, value_size = struct.unpack_from("<BHI", rest, lsn_width)
            block = low_block + int.from_bytes(rest[lsn_width + 7 :], "little")
            value = blocks[block][at_value : at_value + value_size]
            assert len(value) == value_size
            entries.append((leaf[24 : 24 + prefix] + suffix, lsn, flags, value))
            if j == 0:
                assert entries[-1][:2] == (first_key, first_lsn)
    assert len(entries) == count
    assert sum(len(entry[3]) for entry in entries) == value_bytes
    return entries


numbers = st.integers(0, 40) | st.sampled_from([1 << 64, (1 << 144) - 2, 0xFFFFFFFF])
lsns = st.integers(1, 60) | st.sampled_from([1 << 31, 1 << 33, LAST_LSN])
sizes = st.sampled_from([0, 1, 30, 100, 4000, 8191, 8192, 8193, 40_000])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.dictionaries(st.tuples(numbers, lsns), st.tuples(st.booleans(), sizes), min_size=1),
    st.integers(0, 3),
    st.data(),
)
def test_round_trip_and_lookup(
    tmp_path_factory: pytest.TempPathFactory,
    content: dict[tuple[int, int], tuple[bool, int]],
    spread: int,
    data: st.DataObject,
) -> None:
    entries = []
    for (number, lsn), (will_init, size) in sorted(content.items()):
        value = random.Random(number ^ lsn).randbytes(size)
        for copy in range(spread * 30 + 1):
            copied = number + copy if number < 41 else number
            entries.append((key(copied), lsn, 6 | will_init, value))
    unique = {(entry[0], entry[1]): entry for entry in entries}
    entries = [unique[place] for place in sorted(unique)]
    layer = write(tmp_path_factory.mktemp("layer"), entries)
    assert decode(Path(layer.path).read_bytes()) == entries
    assert list(layer.entries()) == entries

    all_keys = sorted({entry[0] for entry in entries} | {key(7), key(1 << 80)})
    upper = data.draw(lsns, "upper")
    floor = data.draw(st.integers(0, 60), "floor")
    batch = ReadBatch(all_keys)
    layer.read(batch, 0, len(all_keys), upper, floor)
    for i, wanted in enumerate(all_keys):
        expected: list[tuple[int, int, bytes]] = []
        for found, lsn, flags, value in reversed(entries):
            if found == wanted and floor <= lsn <= upper:
                expected.insert(0, (lsn, flags, value))
                if flags & 1:
                    break
        assert batch.values(i) == expected
    start, end = data.draw(st.tuples(numbers, numbers), "range")
    assert layer.keys(key(start), key(end), upper, floor) == sorted(
        {e[0] for e in entries if key(start) <= e[0] < key(end) and floor <= e[1] <= upper}
    )


def test_one_key_over_many_leaves(tmp_path: Path) -> None:
    entries = [(key(1), 8, 1, b"other")]
    entries += [(key(2), 8 * i, 1 if i in (1, 400) else 2, b"%d" % i) for i in range(1, 1000)]
    entries += [(key(3), 8, 1, b"other")]
    layer = write(tmp_path, entries)
    for upper in (8, 1016, 1024, 3192, 3200, 3208, 5000, 9000, (1 << 32) + 7176):
        batch = ReadBatch([key(2)])
        layer.read(batch, 0, 1, upper, 0)
        first = 400 if upper >= 3200 else 1
        newest = min(upper // 8, 999)
        assert [lsn // 8 for lsn, _, _ in batch.values(0)] == list(range(first, newest + 1))


def test_entries_must_ascend(tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "x", TENANT, TIMELINE)
    writer.add(key(2), 16, 1, b"")
    for wrong in ((key(1), 24), (key(2), 16), (key(2), 8)):
        with pytest.raises(ValueError, match="ascend"):
            writer.add(*wrong, 1, b"")
    writer.add(key(2), 24, 1, b"")
    with pytest.raises(ValueError, match="outside"):
        writer.finish(LayerName.image(key(3), key(4), 24))
    writer.abort()
    assert not (tmp_path / "x").exists()


def read_everything(path: Path, name: LayerName) -> list[Entry]:
    return list(LayerFile(path, name, TENANT, TIMELINE).entries())


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    source = random.Random(3)
    entries = [(key(i // 3), 8 * (i % 3 + 1), 1, source.randbytes(60)) for i in range(700)]
    entries.append((key(1000), 8, 1, source.randbytes(20_000)))
    layer = write(tmp_path, entries, 100)
    path, name = Path(layer.path), layer.name
    good = path.read_bytes()
    places = list(range(300)) + source.sample(range(len(good)), 700) + [len(good) - 1]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptLayerError) as caught:
            read_everything(path, name)
        assert str(path) in str(caught.value)
        assert 0 <= caught.value.offset <= place
        assert str(caught.value.offset) in str(caught.value)
    path.write_bytes(good)
    assert read_everything(path, name) == entries


def test_truncated_and_misplaced_content_is_found(tmp_path: Path) -> None:
    entries = [(key(i), 8, 1, bytes([i % 256]) * 8192) for i in range(200)]
    layer = write(tmp_path, entries, 100)
    path, name = Path(layer.path), layer.name
    good = path.read_bytes()
    for size in (0, 10, 255, 256, 5000, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptLayerError):
            read_everything(path, name)
    path.write_bytes(good + b"x")
    with pytest.raises(CorruptLayerError, match="bytes instead of"):
        read_everything(path, name)
    # Two blocks of one size change places: each is whole, neither is where it belongs.
    block = 8192 + 16
    first, second = good[256 : 256 + block], good[256 + block : 256 + 2 * block]
    path.write_bytes(good[:256] + second + first + good[256 + 2 * block :])
    with pytest.raises(CorruptLayerError, match="offset 256: checksum"):
        read_everything(path, name)
    path.write_bytes(good)
    with pytest.raises(CorruptLayerError, match="another timeline"):
        list(LayerFile(path, name, TENANT, b"c" * 16).entries())
    other = path.with_name(str(LayerName.l0_delta(2, 100)))
    path.rename(other)
    with pytest.raises(CorruptLayerError, match="another name"):
        list(LayerFile(other, LayerName.l0_delta(2, 100), TENANT, TIMELINE).entries())
    with pytest.raises(FileNotFoundError):
        list(layer.entries())


def test_a_bad_block_hurts_only_its_values(tmp_path: Path) -> None:
    layer = write(tmp_path, [(key(i), 8, 1, bytes([i]) * 8192) for i in range(3)], 100)
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


def test_dump(tmp_path: Path) -> None:
    layer = write(tmp_path, [(key(1), 8, 1, b"abc"), (key(1), 0x1_0000_0010, 4, b"d")])
    out = io.StringIO()
    dump_layer.dump(Path(layer.path), out, values=True)
    lines = out.getvalue().splitlines()
    assert lines[0] == f"delta layer of tenant {TENANT.hex()} timeline {TIMELINE.hex()}"
    assert lines[-2].endswith("1 0/8 kind 0 will_init 3 bytes 616263")
    assert lines[-1].endswith("1 1/10 kind 2 1 bytes 64")
