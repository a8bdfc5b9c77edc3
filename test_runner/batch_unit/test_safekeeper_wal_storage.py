"""WAL storage: what survives restarts, torn writes, truncation and damage."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_unit.safekeeper_support import WalWriter

from postgres_ffi.wal_format import WAL_BLCKSZ, WAL_SEGMENT_SIZE, normalize_lsn
from safekeeper.wal_files import SegmentReader, WalDamagedError, WalStorageError, segment_path
from safekeeper.wal_storage import InvalidWalError, WalStorage, wal_magic

SEGMENT = 3
START = SEGMENT * WAL_SEGMENT_SIZE + 8192 + 24
MAGIC = wal_magic(0)


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Storage:
    """A storage that can be restarted."""

    def __init__(self, directory: Path, helper: ThreadPoolExecutor) -> None:
        self.directory = directory
        self._helper = helper
        self.storage = WalStorage(directory, sync=False, helper=helper)
        self.storage.open(0, MAGIC)

    def restart(self, commit_lsn: int) -> int:
        """Open the files again; the flush LSN found."""
        self.storage.close()
        self.storage = WalStorage(self.directory, sync=False, helper=self._helper)
        self.storage.open(commit_lsn, MAGIC)
        return self.storage.flush_lsn

    def write(self, wal: WalWriter, begin: int, end: int, piece: int = 1 << 17) -> int:
        """Write [begin, end) in pieces and flush."""
        for lsn in range(begin, end, piece):
            offset = lsn - wal.start_lsn
            data = wal.data[offset : min(offset + piece, end - wal.start_lsn)]
            self.storage.write(lsn, memoryview(data))
        return self.storage.flush()

    def read(self, begin: int, end: int) -> bytes:
        """WAL of a range, out of the files."""
        reader = SegmentReader(self.directory)
        data = b""
        while begin + len(data) < end:
            data += reader.read(begin + len(data), end - begin - len(data))
        reader.close()
        return data


@pytest.fixture
def store(tmp_path: Path, helper: ThreadPoolExecutor) -> Iterator[Storage]:
    storage = Storage(tmp_path, helper)
    yield storage
    storage.storage.close()


def last_end(wal: WalWriter, lsn: int) -> int:
    return max(end for end in wal.ends if end <= lsn)


def test_flush_lsn_is_a_record_end_whatever_the_pieces(store: Storage) -> None:
    rng = random.Random(1)
    wal = WalWriter(START)
    wal.until(START + 200_000)
    store.storage.truncate(START, MAGIC)
    lsn = START
    while lsn < wal.lsn:
        size = min(rng.randint(1, 5000), wal.lsn - lsn)
        flushed = store.write(wal, lsn, lsn + size)
        lsn += size
        expected = max([START, *(end for end in wal.ends if end <= lsn)])
        assert normalize_lsn(flushed) == normalize_lsn(expected)
        assert flushed <= lsn
    assert store.read(START, lsn) == wal.data
    assert store.restart(START) == wal.lsn
    assert store.read(START, lsn) == wal.data


def test_segment_switch(store: Storage) -> None:
    boundary = (SEGMENT + 1) * WAL_SEGMENT_SIZE
    wal = WalWriter(boundary - 100_000)
    wal.until(boundary + 100_000)
    store.storage.truncate(wal.start_lsn, MAGIC)
    assert store.write(wal, wal.start_lsn, wal.lsn, 7777) == wal.lsn
    assert segment_path(store.directory, SEGMENT, partial=False).exists()
    assert segment_path(store.directory, SEGMENT + 1, partial=True).exists()
    assert store.restart(wal.start_lsn) == wal.lsn
    assert store.read(wal.start_lsn, wal.lsn) == wal.data
    # A cut in the complete segment makes it partial again and removes the later ones.
    cut = last_end(wal, boundary - 50_000)
    store.storage.truncate(cut, MAGIC)
    names = sorted(path.name for path in store.directory.iterdir())
    assert names == [segment_path(store.directory, SEGMENT, partial=True).name]
    assert store.read(cut, boundary) == bytes(boundary - cut)
    assert store.write(wal, cut, wal.lsn) == wal.lsn
    assert store.restart(cut) == wal.lsn


def test_wal_may_begin_anew_behind_its_end(store: Storage) -> None:
    """Of a log that is recovering, when nobody has any more what it lacks."""
    old, new = WalWriter(START, seed=1), WalWriter(START + WAL_SEGMENT_SIZE + 8192, seed=2)
    old.until(START + 50_000)
    new.until(new.lsn + 50_000)
    store.storage.truncate(START, MAGIC)
    store.write(old, START, old.lsn)
    with pytest.raises(WalStorageError, match="it ends at"):
        store.storage.truncate(new.start_lsn, MAGIC)
    store.storage.truncate(new.start_lsn, MAGIC, may_skip=True)
    assert not list(store.directory.iterdir())
    assert store.write(new, new.start_lsn, new.lsn) == new.lsn
    assert store.restart(new.start_lsn) == new.lsn


def test_torn_tail_is_cut_off(store: Storage) -> None:
    wal = WalWriter(START)
    wal.until(START + 100_000)
    store.storage.truncate(START, MAGIC)
    store.write(wal, START, wal.lsn)
    store.storage.close()
    # Two sectors in the middle of the last write never reached the disk; later ones did.
    hole = (START + 60_000) // 512 * 512
    with segment_path(store.directory, SEGMENT, partial=True).open("r+b") as file:
        file.seek(hole % WAL_SEGMENT_SIZE)
        file.write(bytes(1024))
    end = store.restart(START)
    assert end == last_end(wal, hole)
    segment_end = (SEGMENT + 1) * WAL_SEGMENT_SIZE
    assert store.read(end, segment_end) == bytes(segment_end - end)


@pytest.mark.parametrize("offset", [40_000, 40_001, 40_503])
def test_flipped_bit_is_an_error(store: Storage, offset: int) -> None:
    wal = WalWriter(START)
    wal.until(START + 100_000, 2000)
    store.storage.truncate(START, MAGIC)
    store.write(wal, START, wal.lsn)
    store.storage.close()
    path = segment_path(store.directory, SEGMENT, partial=True)
    with path.open("r+b") as file:
        file.seek((START + offset) % WAL_SEGMENT_SIZE)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(WalStorageError, match=rf"damaged WAL in {path} at offset \d+"):
        store.restart(START)


@pytest.fixture
def page_start(store: Storage) -> tuple[WalWriter, int, Path]:
    """WAL in which a record ends where a page does, where that is, and the file."""
    wal = WalWriter(START)
    wal.until(START + 40_000)
    if wal.lsn % WAL_BLCKSZ > WAL_BLCKSZ - 100:
        wal.record(200)
    wal.record(WAL_BLCKSZ - wal.lsn % WAL_BLCKSZ - 29)
    page = wal.lsn
    assert page % WAL_BLCKSZ == 0
    wal.until(page + 20_000)
    store.storage.truncate(START, MAGIC)
    store.write(wal, START, wal.lsn)
    return wal, page, segment_path(store.directory, SEGMENT, partial=True)


def test_damaged_page_header_is_an_error(
    store: Storage, page_start: tuple[WalWriter, int, Path]
) -> None:
    """Whichever bit it is, no record behind it is dropped without a word."""
    wal, page, path = page_start
    offset = page % WAL_SEGMENT_SIZE
    good = path.read_bytes()
    harmless = []
    for bit in range(24 * 8):
        bad = bytearray(good)
        bad[offset + bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            assert store.restart(START) == wal.lsn
            harmless.append(bit)
        except WalDamagedError:
            pass
    # Two flags that say nothing on such a page; the length of what is not there, and the padding.
    assert harmless == [18, 19, *range(16 * 8, 24 * 8)]


def test_page_header_that_was_begun_is_cut_off(
    store: Storage, page_start: tuple[WalWriter, int, Path]
) -> None:
    """A piece of WAL may end anywhere, and be the last one before the crash."""
    _, page, path = page_start
    offset = page % WAL_SEGMENT_SIZE
    good = path.read_bytes()
    for written in range(25):
        path.write_bytes(good[: offset + written] + bytes(len(good) - offset - written))
        assert store.restart(START) == page
        assert path.read_bytes()[offset:] == bytes(len(good) - offset)


def test_damage_in_a_complete_segment_is_an_error(store: Storage) -> None:
    boundary = (SEGMENT + 1) * WAL_SEGMENT_SIZE
    wal = WalWriter(boundary - 100_000)
    wal.until(boundary + 1000)
    store.storage.truncate(wal.start_lsn, MAGIC)
    store.write(wal, wal.start_lsn, wal.lsn)
    store.storage.close()
    with segment_path(store.directory, SEGMENT, partial=False).open("r+b") as file:
        file.seek(WAL_SEGMENT_SIZE - 65536)
        file.write(bytes(16384))
    with pytest.raises(WalStorageError, match="damaged WAL"):
        store.restart(wal.start_lsn)


def test_truncation_leaves_nothing_of_the_old_term(store: Storage) -> None:
    """The new term's records end exactly where a valid old record starts."""
    old, new = WalWriter(START, seed=1), WalWriter(START, seed=2)
    for writer in (old, new):
        for _ in range(20):
            writer.record(500)
    old.until(START + 50_000)
    store.storage.truncate(START, MAGIC)
    store.write(old, START, old.lsn)
    store.storage.truncate(START, MAGIC)
    assert store.write(new, START, new.lsn) == new.lsn
    assert new.lsn in old.ends
    assert store.restart(START) == new.lsn


def test_unacknowledged_wal_is_gone_after_restart(store: Storage) -> None:
    wal = WalWriter(START)
    wal.until(START + 5000)
    store.storage.truncate(START, MAGIC)
    store.write(wal, START, wal.lsn)
    assert store.restart(0) == 0
    assert not list(store.directory.iterdir())


def test_invalid_wal_is_refused_before_it_is_written(store: Storage) -> None:
    wal = WalWriter(START)
    wal.until(START + 5000)
    store.storage.truncate(START, MAGIC)
    wal.data[1000] ^= 1
    with pytest.raises(InvalidWalError, match="crc"):
        store.write(wal, START, wal.lsn)
    assert not list(store.directory.iterdir())


def test_interrupted_segment_creation(store: Storage) -> None:
    wal = WalWriter(START)
    wal.until(START + 5000)
    store.storage.truncate(START, MAGIC)
    store.write(wal, START, wal.lsn)
    store.storage.close()
    leftover = segment_path(store.directory, SEGMENT + 1, partial=True)
    leftover.unlink(missing_ok=True)
    leftover.with_name(leftover.name + ".tmp").write_bytes(bytes(1000))
    assert store.restart(START) == wal.lsn
    assert [path.name for path in store.directory.iterdir()] == [
        segment_path(store.directory, SEGMENT, partial=True).name
    ]
