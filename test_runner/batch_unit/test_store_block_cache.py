"""The cache of blocks of layer files: what is in it, its bound, and who gets which block."""

import gc
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from batch_unit.store_format_support import TENANT, TIMELINE, key, write_layer
from batch_unit.store_support import append, opened
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.block_cache import BlockCache
from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.errors import CorruptLayerError
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.page_cache import PageCache
from pageserver.layered_repository.read_batch import ReadBatch
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.resources import StoreResources, new_caches
from pageserver.layered_repository.settings import StoreSettings
from pageserver.metrics import PageserverMetrics
from zenith_utils.ids import TenantId, TimelineId

KEYS = 400
HEADER = 256
Place = tuple[int, int]


class PlainCache:
    """What a BlockCache of one shard is, in plain Python."""

    def __init__(self, capacity: int) -> None:
        probe = BlockCache(1 << 20)
        probe.put(1, 1, b"")
        self.overhead = probe.size
        self.capacity = capacity
        self.buckets = 16
        while self.buckets * 4096 < capacity:
            self.buckets *= 2
        self.first: dict[Place, bytes] = {}
        self.main: dict[Place, bytes] = {}
        self.hits: dict[Place, int] = {}
        self.evicted: dict[int, int] = {}

    def size(self, queue: dict[Place, bytes]) -> int:
        """Bytes that a queue takes."""
        return sum(self.overhead + len(payload) for payload in queue.values())

    def bucket_and_print(self, place: Place) -> tuple[int, int]:
        """The hash of a block in two parts."""
        mask = (1 << 64) - 1
        x = (place[0] * 0x9E3779B97F4A7C15 & mask) ^ place[1]
        for _ in range(2):
            x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & mask
        x ^= x >> 32
        return x % self.buckets, x >> 32 | 1

    def get(self, place: Place) -> bytes | None:
        """The payload of a block."""
        for queue in (self.first, self.main):
            if place in queue:
                self.hits[place] = min(self.hits[place] + 1, 3)
                return queue[place]
        return None

    def put(self, place: Place, payload: bytes) -> None:
        """Add a block."""
        if self.overhead + len(payload) > self.capacity // 4:
            return
        if place in self.first or place in self.main:
            return
        bucket, mark = self.bucket_and_print(place)
        queue = self.main if self.evicted.get(bucket) == mark else self.first
        queue[place] = payload
        self.hits[place] = 0
        while self.size(self.first) + self.size(self.main) > self.capacity:
            self.turn()

    def turn(self) -> None:
        """One step of eviction."""
        if not self.main or self.size(self.first) > self.capacity // 4:
            place, payload = next(iter(self.first.items()))
            del self.first[place]
            if self.hits[place]:
                self.main[place] = payload
            else:
                bucket, mark = self.bucket_and_print(place)
                self.evicted[bucket] = mark
            return
        place, payload = next(iter(self.main.items()))
        del self.main[place]
        if self.hits[place]:
            self.hits[place] -= 1
            self.main[place] = payload


@pytest.mark.parametrize("capacity", [0, 2000, 9000, 40_000, 150_000])
def test_it_equals_a_plain_one(capacity: int) -> None:
    cache, plain = BlockCache(capacity), PlainCache(capacity)
    source = random.Random(capacity)
    found = 0
    for turn in range(4000):
        # Some blocks are wanted much more than others, and not the same ones all the time.
        number = int(source.paretovariate(0.5)) + turn // 1000 * 3
        file, offset = 1 + number % 3, 256 + number % 400
        payload = b"%d %d;" % (file, offset) * (1 + number % 70)
        expected = plain.get((file, offset))
        assert cache.get(file, offset) == expected
        found += expected is not None
        if expected is None or source.random() < 0.01:
            cache.put(file, offset, payload)
            plain.put((file, offset), payload)
        assert cache.size == plain.size(plain.first) + plain.size(plain.main) <= capacity
        assert len(cache) == len(plain.first) + len(plain.main)
    assert cache.hits == found
    assert (found > 0) == (capacity > 0)


def value(file: int, number: int, size: int = 1200) -> bytes:
    return (b"file %d key %d;" % (file, number)).ljust(size, b"%d" % (number % 10))


def layer_of(
    directory: Path, file: int, descriptors: DescriptorCache, *, compress: bool = True
) -> LayerFile:
    """A delta layer with an image of every key."""
    name = LayerName.delta(key(0), key(KEYS), 8, 16 + file)
    entries = [(key(n), 8, 1, value(file, n)) for n in range(KEYS)]
    return write_layer(directory, entries, name, compress=compress, descriptors=descriptors)


def read(layer: LayerFile, numbers: Sequence[int]) -> list[bytes | None]:
    batch = ReadBatch([key(number) for number in numbers])
    layer.read(batch, 0, batch.count, 100, 0)
    return [batch.image(i) for i in range(batch.count)]


def break_file(layer: LayerFile) -> None:
    """Overwrite its values and leaves, in place, so that whoever has it open sees that."""
    with Path(layer.path).open("r+b") as file:
        file.seek(HEADER)
        file.write(bytes(layer.describe()["stored_bytes"] + 1000))


@pytest.mark.parametrize("compress", [False, True])
def test_a_block_is_read_once(tmp_path: Path, compress: bool) -> None:
    blocks = BlockCache(1 << 20)
    layer = layer_of(tmp_path, 1, DescriptorCache(5, blocks=blocks), compress=compress)
    numbers = list(range(0, KEYS, 7))
    expected: list[bytes | None] = [value(1, number) for number in numbers]
    assert read(layer, numbers) == expected
    misses = blocks.misses
    assert misses == len(blocks) > 4
    break_file(layer)
    assert read(layer, numbers) == expected
    assert [read(layer, [number]) for number in numbers] == [[data] for data in expected]
    assert blocks.misses == misses
    assert blocks.hits > len(numbers)
    blocks.clear()
    assert (len(blocks), blocks.size) == (0, 0)
    with pytest.raises(CorruptLayerError):
        read(layer, numbers)


def test_what_is_damaged_never_gets_in(tmp_path: Path) -> None:
    blocks = BlockCache(1 << 20)
    layer = layer_of(tmp_path, 1, DescriptorCache(5, blocks=blocks))
    path = Path(layer.path)
    good = path.read_bytes()
    leaves = HEADER + layer.describe()["stored_bytes"]
    for offset, kept in ((leaves + 100, 0), (HEADER + 50, 1)):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([good[offset] ^ 1]))
        for _ in range(2):
            with pytest.raises(CorruptLayerError):
                read(layer, [0])
            assert len(blocks) == kept
        with path.open("r+b") as file:
            file.write(good)
    assert read(layer, [0]) == [value(1, 0)]
    assert len(blocks) == 2


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from([0, 5000, 20_000, 50_000, 150_000]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, KEYS - 1)), max_size=80),
)
def test_it_never_exceeds_its_capacity(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, reads: list[tuple[int, int]]
) -> None:
    blocks = BlockCache(capacity)
    descriptors = DescriptorCache(5, blocks=blocks)
    directory = tmp_path_factory.mktemp("layers")
    layers = [layer_of(directory, file, descriptors) for file in range(3)]
    for file, number in reads:
        assert read(layers[file], [number]) == [value(file, number)]
        assert blocks.size <= capacity
        assert (len(blocks) == 0) == (blocks.size == 0)
    if capacity == 0:
        assert len(blocks) == 0


def test_what_is_used_again_outlives_a_scan(tmp_path: Path) -> None:
    blocks = BlockCache(100_000)
    layer = layer_of(tmp_path, 1, DescriptorCache(5, blocks=blocks))
    for _ in range(2):
        read(layer, [0])
    for number in range(20, KEYS, 7):  # a block each
        misses = blocks.misses
        assert read(layer, [0]) == [value(1, 0)]
        assert blocks.misses == misses
        read(layer, [number])


def test_blocks_go_with_their_layer(tmp_path: Path) -> None:
    blocks = BlockCache(1 << 20)
    descriptors = DescriptorCache(1, blocks=blocks)
    kept, dropped = (layer_of(tmp_path, file, descriptors) for file in (1, 2))
    read(kept, range(KEYS))
    size = blocks.size
    read(dropped, range(KEYS))
    assert blocks.size > size
    del dropped
    gc.collect()
    assert blocks.size == size
    assert read(kept, [5]) == [value(1, 5)]


def test_a_file_that_is_opened_again_finds_its_blocks(tmp_path: Path) -> None:
    blocks = BlockCache(1 << 20)
    layer = layer_of(tmp_path, 1, DescriptorCache(5, blocks=blocks))
    read(layer, range(KEYS))
    misses = blocks.misses
    layer.evict()
    assert read(layer, range(KEYS)) == [value(1, number) for number in range(KEYS)]
    assert blocks.misses == misses


def test_another_file_in_its_place_does_not(tmp_path: Path) -> None:
    blocks = BlockCache(1 << 20)
    descriptors = DescriptorCache(5, blocks=blocks)
    layer = layer_of(tmp_path, 1, descriptors)
    read(layer, range(KEYS))
    entries = [(key(n), 8, 1, value(9, n)) for n in range(KEYS)]
    other = write_layer(tmp_path / "..", entries, layer.name, compress=True)
    Path(other.path).replace(layer.path)
    layer.evict()
    assert read(layer, range(KEYS)) == [value(9, number) for number in range(KEYS)]
    # Nor does another object of that file share them.
    same = LayerFile(layer.path, layer.name, TENANT, TIMELINE, descriptors=descriptors)
    misses = blocks.misses
    assert read(same, [0]) == [value(9, 0)]
    assert blocks.misses == misses + 2


def test_many_threads_under_eviction(tmp_path: Path) -> None:
    """Every value is the right one, alone or with others, while blocks and files come and go."""
    blocks = BlockCache(60_000)
    descriptors = DescriptorCache(2, blocks=blocks)
    layers = [layer_of(tmp_path, file, descriptors, compress=file % 2 == 0) for file in range(4)]
    wrong: list[object] = []
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        source = random.Random(seed)
        start.wait()
        try:
            for turn in range(400):
                file = source.randrange(len(layers))
                count = source.choice((1, 1, 3, 40))
                first = source.randrange(KEYS - count)
                numbers = range(first, first + count)
                found = read(layers[file], numbers)
                if found != [value(file, n) for n in numbers] or blocks.size > 60_000:
                    wrong.append((file, first, count, found, blocks.size))
                if turn % 50 == seed:
                    blocks.clear()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert blocks.hits > 0
    assert 0 < blocks.size <= 60_000
    layers.clear()
    gc.collect()
    assert (len(blocks), blocks.size) == (0, 0)


def test_rebuilt_values_and_blocks_share_the_memory(tmp_path: Path) -> None:
    page_cache, blocks = new_caches(400_000)
    layer = layer_of(tmp_path, 1, DescriptorCache(5, blocks=blocks))
    read(layer, range(KEYS))
    assert blocks.size > 300_000
    for number in range(200):
        page_cache.put(key(number), 8, bytes(8192))
        assert page_cache.size + blocks.size <= 400_000
    assert page_cache.size > 280_000
    for number in range(KEYS):
        read(layer, [number])
        assert page_cache.size + blocks.size <= 400_000
    assert blocks.size > 80_000
    assert PageCache(1000).capacity == 1000


def repository_with(path: Path, blocks: BlockCache) -> Repository:
    own = StoreResources.own(StoreSettings(page_cache_size=0))
    resources = StoreResources(own.page_cache, DescriptorCache(9, blocks=blocks), own.memory)
    return Repository(path, TenantId(b"t" * 16), StoreSettings(), append, resources=resources)


def test_reads_of_a_timeline_fill_it_unless_told_otherwise(tmp_path: Path) -> None:
    blocks = BlockCache(1 << 20)
    repository = repository_with(tmp_path / "tenant", blocks)
    numbers = range(100)
    keys = [key(number) for number in numbers]
    try:
        timeline = repository.create_timeline(TimelineId(b"m" * 16), initdb_lsn=8)
        timeline.import_image_layer(8, [(key(n), value(0, n)) for n in numbers])
        expected = [value(0, number) for number in numbers]
        assert timeline.get_vectored(keys, 8, cache=False) == expected
        assert timeline.get_vectored(keys[:3], 8, cache=False) == expected[:3]
        assert timeline.scan_keys(keys[0], keys[50], 8) == keys[:50]
        (layer,) = timeline.view.layers
        layer.verify()
        assert len(list(layer.entries())) == 100
        assert len(blocks) == 0
        assert timeline.get(keys[7], 8) == expected[7]
        assert len(blocks) == 2
        # What is there is used.
        misses = blocks.misses
        assert timeline.get_vectored(keys[7:8], 8, cache=False) == expected[7:8]
        assert blocks.misses == misses
        assert timeline.get_vectored(keys, 8) == expected
        assert len(blocks) > 10
    finally:
        repository.shutdown(flush=False)
    del layer, timeline, repository
    gc.collect()
    assert len(blocks) == 0


def test_metrics_of_the_caches() -> None:
    metrics = PageserverMetrics()
    resources = StoreResources.own(StoreSettings(page_cache_size=1 << 20))
    metrics.watch_store(resources, list)
    blocks = resources.descriptors.blocks
    assert blocks is not None
    blocks.put(1, 256, bytes(1000))
    for offset in (256, 256, 512):
        blocks.get(1, offset)
    lines = metrics.render().decode().splitlines()
    assert f"pageserver_block_cache_bytes {blocks.size}" in lines
    assert "pageserver_block_cache_hits 2" in lines
    assert "pageserver_block_cache_misses 1" in lines


def test_a_repository_without_a_cache(tmp_path: Path) -> None:
    with opened(tmp_path, page_cache_size=0) as repository:
        timeline = repository.create_timeline(TimelineId(b"m" * 16), initdb_lsn=8)
        timeline.import_image_layer(8, [(key(n), value(0, n)) for n in range(50)])
        assert [timeline.get(key(n), 8) for n in range(50)] == [value(0, n) for n in range(50)]
        blocks = repository.resources.descriptors.blocks
        assert blocks is not None
        assert (len(blocks), blocks.size) == (0, 0)
