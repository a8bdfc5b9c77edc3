"""The cache of reconstructed values."""

import threading
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.page_cache import PageCache

KEYS = [b"%d" % number * 34 for number in range(6)]


class PlainCache:
    """What a PageCache is, in plain Python."""

    def __init__(self, capacity: int) -> None:
        probe = PageCache(1 << 20)
        probe.put(b"", 1, b"")
        first = probe.size
        probe.put(b"", 2, b"")
        self.version_size = probe.size - first
        self.key_size = first - self.version_size
        self.capacity = capacity
        self.keys: OrderedDict[bytes, dict[int, bytes]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes taken."""
        return sum(
            self.key_size + sum(self.version_size + len(value) for value in versions.values())
            for versions in self.keys.values()
        )

    def get(self, key: bytes, lsn: int) -> tuple[int, bytes] | None:
        """The newest version at or below an LSN."""
        if key not in self.keys:
            return None
        self.keys.move_to_end(key)
        found = max((at for at in self.keys[key] if at <= lsn), default=None)
        return None if found is None else (found, self.keys[key][found])

    def put(self, key: bytes, lsn: int, value: bytes) -> None:
        """Store a version."""
        if self.key_size + self.version_size + len(value) > self.capacity:
            return
        versions = self.keys.setdefault(key, {})
        self.keys.move_to_end(key)
        versions.setdefault(lsn, value)
        if len(versions) > 4:
            del versions[min(versions)]
        while self.size > self.capacity:
            self.keys.popitem(last=False)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.sampled_from([0, 300, 1500, 4000]),
    st.lists(st.tuples(st.booleans(), st.sampled_from(KEYS), st.integers(1, 9)), max_size=60),
    st.integers(0, 700),
)
def test_it_equals_a_plain_one(
    capacity: int, calls: list[tuple[bool, bytes, int]], size: int
) -> None:
    cache, plain = PageCache(capacity), PlainCache(capacity)
    for number, (is_put, key, lsn) in enumerate(calls):
        if is_put:
            value = b"%d" % number + bytes(size * lsn // 9)
            cache.put(key, lsn, value)
            plain.put(key, lsn, value)
        else:
            assert cache.get(key, lsn) == plain.get(key, lsn)
        assert cache.size == plain.size <= capacity
        assert len(cache) == len(plain.keys)
    for key in KEYS:
        for lsn in range(10):
            assert cache.get(key, lsn) == plain.get(key, lsn)


def test_one_key_has_few_versions() -> None:
    cache = PageCache(1 << 20)
    cache.put(KEYS[0], 1, b"x" * 8192)
    once = cache.size
    for lsn in range(1000, 0, -1):
        cache.put(KEYS[0], lsn, b"x" * 8192)
    assert cache.size <= 4 * once
    assert cache.get(KEYS[0], 996) is None
    assert cache.get(KEYS[0], 2000) == (1000, b"x" * 8192)


def test_hits_and_misses_are_counted() -> None:
    cache = PageCache(1 << 20)
    cache.put(KEYS[0], 8, b"value")
    for key, lsn in ((KEYS[0], 9), (KEYS[0], 7), (KEYS[1], 9)):
        cache.get(key, lsn)
    assert (cache.hits, cache.misses) == (1, 2)


def test_only_bytes_are_kept() -> None:
    cache = PageCache(1 << 20)
    with pytest.raises(TypeError):
        cache.put(KEYS[0], 1, bytearray(b"may change"))  # type: ignore[arg-type]


def test_many_threads_share_it() -> None:
    """Values stay with their keys and LSNs, and the bound holds, while all evict each other's."""
    cache = PageCache(20_000)
    keys = [b"%034d" % number for number in range(100)]
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        for i in range(4000):
            number, lsn = (i * seed) % 100, (i * seed) % 7 + 1
            cache.put(keys[number], lsn, b"%d-%d" % (number, lsn) + bytes(i % 300))
            found = cache.get(keys[number], lsn)
            if cache.size > 20_000 or (
                found is not None and found[1].rstrip(b"\0") != b"%d-%d" % (number, found[0])
            ):
                wrong.append((cache.size, number, lsn, found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7, 9, 11, 13, 17, 19)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < len(cache) < 100
