"""The in-memory layer: order of puts, deleted ranges, freezing, readers beside the writer."""

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


def test_a_deleted_range_hides_what_is_older() -> None:
    layer = InMemoryLayer(1)
    for number in range(5):
        layer.put(key(number), 8, RECORD, b"old")
    layer.put(key(1), 16, RECORD, b"of the same record, put before")
    layer.delete_range(key(1), key(3), 16)
    layer.publish(16)
    layer.put(key(2), 24, RECORD, b"new")
    assert [read(layer, i, 16) for i in range(5)] == [[(8, b"old")], [], [], *[[(8, b"old")]] * 2]
    assert read(layer, 2, 15) == [(8, b"old")]
    assert read(layer, 2, 24) == [(24, b"new")]
    assert sorted(layer.keys(MIN_KEY, MAX_KEY, 15)) == [key(i) for i in range(5)]
    assert sorted(layer.keys(MIN_KEY, MAX_KEY, 16)) == [key(0), key(3), key(4)]
    assert sorted(layer.keys(MIN_KEY, MAX_KEY, 24)) == [key(0), key(2), key(3), key(4)]
    assert layer.tombstones() == layer.tombstones(16) == [(key(1), key(3), 16)]
    assert layer.tombstones(15) == []
    # A deleted key needs nothing from older layers, others do.
    batch = ReadBatch([key(1), key(2), key(3)])
    layer.read(batch, 0, 3, 24, 0)
    assert [batch.is_pending(i) for i in range(3)] == [False, False, True]
    assert batch.pending == 1
    # The range counts for a layer without any value too.
    layer = InMemoryLayer(1)
    layer.delete_range(key(1), key(3), 16)
    batch = ReadBatch([key(1)])
    layer.read(batch, 0, 1, 15, 0)
    assert batch.is_pending(0)
    layer.read(batch, 0, 1, 16, 0)
    assert not batch.is_pending(0)


def test_deletions_that_would_change_the_past_are_refused() -> None:
    layer = InMemoryLayer(1)
    layer.put(key(9), 16, IMAGE, b"")
    with pytest.raises(ValueError, match="not above"):
        layer.delete_range(key(1), key(3), 8)
    with pytest.raises(ValueError, match="end of the range"):
        layer.delete_range(key(3), key(3), 16)
    layer.delete_range(key(1), key(3), 24)
    for lsn in (16, 24):
        with pytest.raises(ValueError, match="deleted at this LSN or a later one"):
            layer.put(key(2), lsn, IMAGE, b"")
    layer.put(key(3), 16, IMAGE, b"")
    layer.put(key(2), 32, IMAGE, b"")
    layer.publish(40)
    with pytest.raises(ValueError, match="not above"):
        layer.delete_range(key(1), key(3), 40)
    assert layer.max_lsn == 32
    layer.delete_range(key(1), key(3), 48)
    assert layer.max_lsn == 48
    layer.freeze(41, 0)
    with pytest.raises(RuntimeError, match="frozen"):
        layer.delete_range(key(1), key(3), 56)
    # The unfinished batch is dropped with its deletion.
    assert layer.tombstones() == [(key(1), key(3), 24)]
    assert read(layer, 2, 100) == [(32, b"")]


def test_many_deleted_ranges_against_a_list() -> None:
    random_source = random.Random(11)
    layer = InMemoryLayer(1)
    deleted: list[tuple[int, int, int]] = []
    values: dict[int, list[int]] = {}
    for lsn in range(8, 8 * 3000, 8):
        start = random_source.randrange(400)
        if random_source.random() < 0.5:
            layer.put(key(start), lsn, RECORD, b"")
            values.setdefault(start, []).append(lsn)
        else:
            end = start + random_source.choice((1, 3, 3, 200))
            layer.delete_range(key(start), key(end), lsn)
            deleted.append((start, end, lsn))
    size_before = layer.memory_size
    start, end, lsn = deleted[-1]
    layer.delete_range(key(start), key(end), max(lsn, layer.max_lsn))
    assert layer.memory_size >= size_before
    assert layer.tombstones() == [(key(a), key(b), lsn) for a, b, lsn in deleted]
    for upper in random_source.sample(range(8, 8 * 3000), 25):
        live = set()
        for number in range(400):
            gone = max(
                (lsn for a, b, lsn in deleted if a <= number < b and lsn <= upper), default=0
            )
            expected = [(lsn, b"") for lsn in values.get(number, ()) if gone < lsn <= upper]
            assert read(layer, number, upper) == expected
            if expected:
                live.add(key(number))
        assert set(layer.keys(MIN_KEY, MAX_KEY, upper)) == live


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


@pytest.mark.parametrize("spill", [False, True])
def test_readers_beside_a_writer_see_whole_batches(tmp_path: Path, spill: bool) -> None:
    # Every batch deletes one eighth of the keys and puts all the others.
    count, batches = 8000, 40
    keys = [key(i) for i in range(0, 8 * count, 8)]
    layer = InMemoryLayer(1, spill_dir=tmp_path if spill else None, spill_after=1 << 20)
    published = 0
    done = threading.Event()
    failures: list[str] = []

    def value(lsn: int) -> bytes:
        return b"%d" % lsn * 30

    def part(lsn: int) -> tuple[int, int]:
        first = lsn // 8 % 8 * (count // 8)
        return first, first + count // 8

    def expected(number: int, upper: int) -> list[tuple[int, int, bytes]]:
        found: list[tuple[int, int, bytes]] = []
        for lsn in range(8, upper + 1, 8):
            first, last = part(lsn)
            if first <= number < last:
                found.clear()
            else:
                found.append((lsn, RECORD, value(lsn)))
        return found

    def reader(seed: int) -> None:
        random_source = random.Random(seed)
        while not done.is_set() and not failures:
            upper = published
            sample = sorted(random_source.sample(range(count), 16))
            batch = ReadBatch([keys[i] for i in sample])
            layer.read(batch, 0, len(sample), upper, 0)
            failures.extend(
                f"{keys[number].hex()} at {upper}: {batch.values(i)}"
                for i, number in enumerate(sample)
                if batch.values(i) != expected(number, upper)
            )
            wanted = [number for number in sample if expected(number, upper)]
            found = layer.keys(keys[sample[0]], keys[sample[-1]], upper)
            if not set(found).issuperset(keys[number] for number in wanted[:-1]):
                failures.append(f"keys at {upper}")
            if any(not expected(int.from_bytes(k, "big") // 8, upper) for k in found[:50]):
                failures.append(f"deleted keys at {upper}")

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for lsn in range(8, 8 * batches, 8):
        first, last = part(lsn)
        layer.delete_range(keys[first], key(8 * (last - 1) + 1), lsn)
        for group in (keys[:first], keys[last:]):
            lsns = array("Q", [lsn]) * len(group)
            layer.put_many(b"".join(group), lsns, RECORD, value(lsn) * len(group))
        layer.publish(lsn)
        published = lsn
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (layer.spilled_size > 0) == spill
