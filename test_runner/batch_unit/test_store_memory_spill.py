"""The ephemeral file of a big open layer: bounded memory, every value back, damage found."""

import errno
import os
import random
import threading
from array import array
from pathlib import Path

import pytest

from pageserver.layered_repository.errors import CorruptLayerError
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.read_batch import ReadBatch

IMAGE, RECORD = 1, 2
TENANT, TIMELINE = bytes(16), b"t" * 16
MIB = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def read(layer: InMemoryLayer, number: int) -> list[tuple[int, int, bytes]]:
    batch = ReadBatch([key(number)])
    layer.read(batch, 0, 1, 1 << 60, 0)
    return batch.values(0)


def filled(
    directory: Path, sizes: list[int], *, spill_after: int = MIB
) -> tuple[InMemoryLayer, dict[int, list[tuple[int, int, bytes]]]]:
    """A layer with a value of each size, for keys in random order, and what it holds."""
    random_source = random.Random(3)
    layer = InMemoryLayer(1, spill_dir=directory, spill_after=spill_after)
    model: dict[int, list[tuple[int, int, bytes]]] = {}
    lsn = 0
    for size in sizes:
        lsn += random_source.choice((0, 8)) if lsn else 8
        number = random_source.randrange(len(sizes) // 3)
        data = random_source.randbytes(size)
        layer.put(key(number), lsn, RECORD, data)
        versions = model.setdefault(number, [])
        if versions and versions[-1][0] == lsn:
            versions.pop()
        versions.append((lsn, RECORD, data))
    layer.publish(lsn)
    return layer, model


def write(layer: InMemoryLayer, directory: Path) -> list[tuple[bytes, int, int, bytes]]:
    """What a flush of the layer writes."""
    name = LayerName.l0_delta(layer.start_lsn, layer.end_lsn)
    writer = LayerWriter(directory / str(name), TENANT, TIMELINE)
    try:
        writer.add_layer(layer)
        writer.finish(name)
    except BaseException:
        writer.abort()
        raise
    return list(LayerFile(directory / str(name), name, TENANT, TIMELINE).entries())


@pytest.mark.parametrize("spill_after", [0, 3 * MIB])
def test_spilled_values_come_back_and_memory_is_bounded(tmp_path: Path, spill_after: int) -> None:
    spill_dir = tmp_path / "spill"
    spill_dir.mkdir()
    source = random.Random(1)
    sizes = source.choices((0, 1, 100, 1000, 8192, 70_000), k=2000)
    for size in (300_000, 3_000_000, 1_100_000, 262_144, 262_143):
        sizes.insert(source.randrange(len(sizes)), size)
    layer, model = filled(spill_dir, sizes, spill_after=spill_after)
    assert layer.spilled_size > sum(sizes) - spill_after - 3 * MIB
    assert layer.memory_size < spill_after + 3 * MIB
    assert list(spill_dir.iterdir()) == []
    for number in model:
        assert read(layer, number) == model[number]
    layer.freeze(layer.max_lsn + 1, 0)
    expected = [(key(number), *version) for number in sorted(model) for version in model[number]]
    assert write(layer, tmp_path) == expected


def test_a_flush_fetches_spilled_values_in_stages(tmp_path: Path) -> None:
    # Several stages of many values; then too many bytes for one stage among neighbouring keys.
    sizes = [15_000] * 5000 + [50_000] * 1500
    layer, model = filled(tmp_path, sizes)
    end_lsn = layer.max_lsn + 1
    for number in range(100):
        layer.put(key(number), end_lsn + 7, RECORD, bytes(15_000))
    layer.freeze(end_lsn, 0)
    expected = [(key(number), *version) for number in sorted(model) for version in model[number]]
    assert write(layer, tmp_path) == expected


def test_values_are_read_while_their_chunk_moves_to_the_file(tmp_path: Path) -> None:
    # Large values, the newest ones read: their chunk is full and moves with the next batch.
    size, group, batches = 200_000, 10, 120
    layer = InMemoryLayer(1, spill_dir=tmp_path)
    published = 0
    done = threading.Event()
    failures: list[str] = []

    def value(lsn: int) -> bytes:
        return bytes([lsn // 8 % 255 + 1]) * size

    def reader() -> None:
        while not done.is_set() and not failures:
            lsn = published
            batch = ReadBatch([key(number) for number in range(group)])
            layer.read(batch, 0, group, lsn, lsn)
            expected = [(lsn, RECORD, value(lsn))] if lsn else []
            if any(batch.values(i) != expected for i in range(group)):
                failures.append(f"at {lsn}")

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    keys = b"".join(key(number) for number in range(group))
    for lsn in range(8, 8 * batches, 8):
        layer.put_many(keys, array("Q", [lsn]) * group, RECORD, value(lsn) * group)
        layer.publish(lsn)
        published = lsn
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert layer.spilled_size > (batches - 3) * group * size
    assert layer.memory_size < 4 * MIB


def test_the_descriptor_goes_with_the_layer(tmp_path: Path) -> None:
    layer, _model = filled(tmp_path, [8192] * 1000)
    assert layer.file is not None
    link = Path(f"/proc/self/fd/{layer.file.fd}")
    inode = link.stat().st_ino
    assert Path(layer.file.path).name.startswith("ephemeral-")
    assert str(link.readlink()).startswith(layer.file.path)
    del layer
    assert not link.exists() or link.stat().st_ino != inode


def test_a_layer_that_stays_small_makes_no_file(tmp_path: Path) -> None:
    layer, model = filled(tmp_path, [8192] * 100, spill_after=MIB)
    assert layer.file is not None
    assert layer.file.fd == -1
    assert layer.spilled_size == 0
    for number in model:
        assert read(layer, number) == model[number]


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    layer, model = filled(tmp_path, [8192] * 1000, spill_after=0)
    assert layer.file is not None
    place = layer.spilled_size // 2
    wanted = os.pread(layer.file.fd, 1, place)
    os.pwrite(layer.file.fd, bytes([wanted[0] ^ 0x10]), place)
    damaged = []
    for number in model:
        try:
            assert read(layer, number) == model[number]
        except CorruptLayerError as error:
            damaged.append(number)
            assert str(error.path) == layer.file.path
            assert error.offset <= place < error.offset + 8192
    assert len(damaged) == 1
    layer.freeze(layer.max_lsn + 1, 0)
    with pytest.raises(CorruptLayerError, match="CRC"):
        write(layer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    layer, model = filled(tmp_path, [8192] * 1000, spill_after=0)
    assert layer.file is not None
    os.ftruncate(layer.file.fd, layer.spilled_size - 4096)
    failed = 0
    for number in model:
        try:
            assert read(layer, number) == model[number]
        except OSError as error:
            assert error.errno == errno.EIO
            assert error.filename == layer.file.path
            failed += 1
    assert failed > 0


def test_values_stay_in_memory_while_the_file_cannot_be_written(tmp_path: Path) -> None:
    spill_dir = tmp_path / "not yet"
    layer = InMemoryLayer(1, spill_dir=spill_dir)
    assert layer.file is not None
    data = os.urandom(8192)
    for number in range(1000):
        layer.put(key(number), 8, IMAGE, data)
    assert layer.file.append_error == errno.ENOENT
    assert layer.spilled_size == 0
    assert layer.memory_size > 1000 * 8192
    spill_dir.mkdir()
    for number in range(1000, 2000):
        layer.put(key(number), 8, IMAGE, data)
    assert layer.file.append_error == 0
    assert layer.spilled_size > 5 * MIB
    assert layer.memory_size < 1000 * 8192 + 6 * MIB
    assert all(read(layer, number) == [(8, IMAGE, data)] for number in range(2000))


def test_an_idle_layer_takes_little(tmp_path: Path) -> None:
    layer = InMemoryLayer(1, spill_dir=tmp_path, spill_after=MIB)
    assert layer.memory_size == 0
    for number in range(20):
        layer.put(key(number), 8, IMAGE, bytes(1000))
    assert 20_000 < layer.memory_size < 64 << 10
