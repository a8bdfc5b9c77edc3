"""The in-memory layer: order of puts, replacement, freezing, readers beside the writer."""

import random
import threading
from array import array
from pathlib import Path

import pytest

from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.read_batch import ReadBatch

IMAGE, RECORD = 1, 2
TENANT, TIMELINE = bytes(16), b"t" * 16


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def read(layer: InMemoryLayer, number: int, upper: int, floor: int = 0) -> list[tuple[int, bytes]]:
    batch = ReadBatch([key(number)])
    layer.read(batch, 0, 1, upper, floor)
    return [(lsn, data) for lsn, _flags, data in batch.values(0)]


def test_reads_stop_at_an_initialising_value_and_at_the_bounds() -> None:
    layer = InMemoryLayer(1)
    for lsn, flags in ((8, RECORD), (16, IMAGE), (24, RECORD), (32, RECORD)):
        layer.put(key(1), lsn, flags, b"%d" % lsn)
    assert read(layer, 1, 100) == [(16, b"16"), (24, b"24"), (32, b"32")]
    assert read(layer, 1, 24) == [(16, b"16"), (24, b"24")]
    assert read(layer, 1, 100, 24) == [(24, b"24"), (32, b"32")]
    assert read(layer, 1, 15) == [(8, b"8")]
    assert read(layer, 1, 7) == read(layer, 2, 100) == []
    assert layer.keys(MIN_KEY, MAX_KEY, 7) == []
    assert layer.keys(key(1), key(2), 8) == [key(1)]


def test_the_last_put_at_an_lsn_replaces(tmp_path: Path) -> None:
    layer = InMemoryLayer(1)
    for lsn, data in ((8, b"a"), (16, b"b"), (16, b"c"), (16, b"d")):
        layer.put(key(1), lsn, RECORD, data)
    assert read(layer, 1, 100) == [(8, b"a"), (16, b"d")]
    assert layer.entry_count == 2
    layer.freeze(17, 8)
    name = LayerName.l0_delta(1, 17)
    writer = LayerWriter(tmp_path / str(name), TENANT, TIMELINE)
    assert writer.add_layer(layer) == 2
    writer.finish(name)
    entries = list(LayerFile(tmp_path / str(name), name, TENANT, TIMELINE).entries())
    assert entries == [(key(1), 8, RECORD, b"a"), (key(1), 16, RECORD, b"d")]


def test_puts_that_would_change_the_past_are_refused() -> None:
    layer = InMemoryLayer(9)
    with pytest.raises(ValueError, match=r"at LSN 0/8.*not above"):
        layer.put(key(1), 8, IMAGE, b"")
    layer.put(key(1), 24, IMAGE, b"")
    with pytest.raises(ValueError, match="not above"):
        layer.put(key(1), 16, IMAGE, b"")
    layer.publish(24)
    with pytest.raises(ValueError, match="not above"):
        layer.put(key(2), 24, IMAGE, b"")
    layer.freeze(25, 0)
    with pytest.raises(RuntimeError, match="frozen"):
        layer.put(key(2), 32, IMAGE, b"")
    with pytest.raises(ValueError, match="18 bytes"):
        layer.put(b"short", 32, IMAGE, b"")


def test_freezing_drops_an_unpublished_batch(tmp_path: Path) -> None:
    layer = InMemoryLayer(1)
    layer.put(key(1), 8, IMAGE, b"a")
    layer.publish(8)
    layer.put(key(1), 16, IMAGE, b"b")
    layer.put(key(2), 16, IMAGE, b"b")
    layer.freeze(9, 0)
    assert read(layer, 1, 100) == [(8, b"a")]
    assert layer.keys(MIN_KEY, MAX_KEY, 100) == [key(1)]
    name = LayerName.l0_delta(1, 9)
    writer = LayerWriter(tmp_path / str(name), TENANT, TIMELINE)
    assert writer.add_layer(layer) == 1
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_values_of_all_sizes() -> None:
    layer = InMemoryLayer(1)
    sizes = [0, 1, 8192, 100_000, 262_143, 262_144, 3_000_000, 0, 70_000, 1_000_000, 5]
    sizes += [130_000] * 30
    for i, size in enumerate(sizes):
        layer.put(key(i), 8, IMAGE, bytes([i]) * size)
    for i, size in enumerate(sizes):
        assert read(layer, i, 8) == [(8, bytes([i]) * size)]
    assert layer.memory_size >= sum(sizes)


def test_many_entries_against_a_dict(tmp_path: Path) -> None:
    random_source = random.Random(5)
    numbers = [random_source.choice((7, 1 << 40, 1 << 100)) * random_source.randrange(20_000)
               for _ in range(120_000)]  # fmt: skip
    lsns = array("Q", (8 * (i + 1) for i in range(len(numbers))))
    layer = InMemoryLayer(1)
    data = b"".join(b"%07d" % i for i in range(len(numbers)))
    layer.put_many(b"".join(map(key, numbers)), lsns, RECORD, data)
    expected: dict[int, list[tuple[int, bytes]]] = {}
    for i, number in enumerate(numbers):
        expected.setdefault(number, []).append((lsns[i], b"%07d" % i))
    for number in random_source.sample(sorted(expected), 3000):
        assert read(layer, number, lsns[-1]) == expected[number]
    assert set(layer.keys(MIN_KEY, MAX_KEY, lsns[-1])) == set(map(key, expected))
    layer.freeze(lsns[-1] + 1, 0)
    name = LayerName.l0_delta(1, layer.end_lsn)
    writer = LayerWriter(tmp_path / str(name), TENANT, TIMELINE)
    assert writer.add_layer(layer) == len(numbers)
    writer.finish(name)
    entries = LayerFile(tmp_path / str(name), name, TENANT, TIMELINE).entries()
    assert [(k, lsn, value) for k, lsn, _flags, value in entries] == [
        (key(number), *version) for number in sorted(expected) for version in expected[number]
    ]


def test_readers_beside_a_writer_see_whole_batches() -> None:
    keys = [key(i) for i in range(0, 64_000, 8)]
    layer = InMemoryLayer(1)
    published = 0
    done = threading.Event()
    failures: list[str] = []

    def reader(seed: int) -> None:
        random_source = random.Random(seed)
        while not done.is_set() and not failures:
            upper = published
            sample = sorted(random_source.sample(keys, 16))
            batch = ReadBatch(sample)
            layer.read(batch, 0, len(sample), upper, 0)
            expected = [(lsn, RECORD, b"%d" % lsn) for lsn in range(8, upper + 1, 8)]
            failures.extend(
                f"{wanted.hex()} at {upper}: {batch.values(i)}"
                for i, wanted in enumerate(sample)
                if batch.values(i) != expected
            )

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    joined = b"".join(keys)
    for lsn in range(8, 8 * 40, 8):
        lsns = array("Q", [lsn]) * len(keys)
        layer.put_many(joined, lsns, RECORD, b"%d" % lsn * len(keys))
        layer.publish(lsn)
        published = lsn
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
