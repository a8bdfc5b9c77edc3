"""WAL in whole blocks past the page cache, and the memory for those who read it at once."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_unit.safekeeper_support import WalWriter
from fixtures.utils import wait_until

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.wal_files import SegmentReader, segment_path
from safekeeper.wal_storage import WalStorage, wal_magic

MAGIC = wal_magic(0)
START = 4 * WAL_SEGMENT_SIZE - 3 * 8192 + 24
"""Three pages before the end of a segment."""
MEMORY = 1 << 20


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def storage_at(
    directory: Path, helper: ThreadPoolExecutor, *, sync: bool = True, lsn: int = START
) -> WalStorage:
    storage = WalStorage(directory, sync=sync, helper=helper)
    storage.open(0, MAGIC)
    storage.truncate(lsn, MAGIC)
    return storage


def segment_tail(directory: Path, lsn: int) -> bytes:
    """What the file of a segment holds from `lsn` on."""
    segno, offset = divmod(lsn, WAL_SEGMENT_SIZE)
    path = segment_path(directory, segno, partial=True)
    data = path.read_bytes()
    assert len(data) == WAL_SEGMENT_SIZE
    return data[offset:]


@pytest.mark.parametrize("sync", [True, False])
def test_any_sizes(tmp_path: Path, helper: ThreadPoolExecutor, sync: bool) -> None:
    """Files hold exactly what was flushed, then zeros, whatever pieces it came in."""
    rng = random.Random(7)
    wal = WalWriter(START, 3)
    wal.until(START + (9 << 20), 4000)
    storage = storage_at(tmp_path, helper, sync=sync)
    reader = SegmentReader(tmp_path)
    at = START
    try:
        while at < wal.lsn:
            # A batch: from less than a block to more than any buffer's first size.
            for _ in range(rng.choice((1, 1, 1, 5, 30))):
                size = rng.choice((8, 500, 4096, 8192, 131072)) - rng.randrange(8)
                data = wal.data[at - START : at - START + size]
                storage.write(at, memoryview(data))
                at += len(data)
            before = storage.flush_lsn
            assert before <= storage.flush() <= at
            # The page cache must not show what was there before.
            lsn = max(before - before % 8192, START)
            while lsn < at:
                got = reader.read(lsn, at - lsn)
                assert got == wal.data[lsn - START : lsn - START + len(got)]
                lsn += len(got)
        # What lies behind is empty.
        tail = segment_tail(tmp_path, at)
        assert tail.count(0) == len(tail)
    finally:
        reader.close()
        storage.close()


def test_restart_in_a_block(tmp_path: Path, helper: ThreadPoolExecutor) -> None:
    """The block in whose middle WAL ended is written again with what was in it."""
    wal = WalWriter(START, 5)
    wal.until(START + 8_000)
    at = START
    storage = storage_at(tmp_path, helper)
    for end in wal.ends:
        storage.write(at, memoryview(wal.data[at - START : end - START]))
        storage.flush()
        at = end
        storage.close()
        storage = WalStorage(tmp_path, sync=True, helper=helper)
        storage.open(START, MAGIC)
        assert storage.flush_lsn == at
    storage.close()
    with_reader = SegmentReader(tmp_path)
    stored = b"".join(data for _, data in with_reader.chunks(START))
    with_reader.close()
    assert stored[: at - START] == bytes(wal.data)
    assert stored[at - START :].count(0) == len(stored) - (at - START)


def test_what_was_not_flushed_is_given_up(tmp_path: Path, helper: ThreadPoolExecutor) -> None:
    wal = WalWriter(START, 6)
    first = wal.record(500)
    wal.record(9000)
    storage = storage_at(tmp_path, helper)
    storage.write(START, memoryview(wal.data[: first - START]))
    storage.flush()
    storage.write(first, memoryview(wal.data[first - START :]))
    storage.close()
    tail = segment_tail(tmp_path, first)
    assert tail.count(0) == len(tail)


def test_without_direct_io(
    tmp_path: Path, helper: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that refuses O_DIRECT serves as well."""
    real, refused = os.open, []

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    wal = WalWriter(START, 6)
    wal.until(START + 100_000)
    storage = storage_at(tmp_path, helper)
    storage.write(START, memoryview(wal.data))
    storage.flush()
    storage.close()
    assert refused
    assert storage.flush_lsn == wal.lsn


def test_reading_from_memory(tmp_path: Path, helper: ThreadPoolExecutor) -> None:
    wal = WalWriter(START, 8)
    wal.until(START + 3 * MEMORY, 4000)
    storage = storage_at(tmp_path, helper, sync=False)
    recent = storage.end.recent
    third = (wal.lsn - START) // 24 * 8
    storage.write(START, memoryview(wal.data[:third]))
    # Nobody has asked: nothing is kept. From then on it is.
    assert recent.read(START, 100) is None
    at = START + third
    for _ in range(40):
        storage.write(at, memoryview(wal.data[at - START : at - START + 10_000]))
        at += 10_000
    assert recent.read(START + third - 8, 100) is None
    kept = recent.read(START + third, 1 << 20)
    assert kept == bytes(wal.data[third : at - START])
    assert recent.read(at - 5, 100) == bytes(wal.data[at - START - 5 : at - START])
    assert recent.read(at, 100) is None
    # More than there is room for: the oldest goes.
    storage.write(at, memoryview(wal.data[at - START :]))
    at = wal.lsn
    assert recent.read(at - MEMORY - 1, 10) is None
    assert recent.read(at - MEMORY, 2 * MEMORY) == bytes(wal.data[-MEMORY:])
    # Of what was cut off nothing is left, nor of what lies before.
    storage.flush()
    cut = max(end for end in wal.ends if end < at - 1000)
    storage.truncate(cut, MAGIC)
    other = WalWriter(cut, 9)
    other.record(100)
    storage.write(cut, memoryview(other.data))
    assert recent.read(cut, 4096) == bytes(other.data)
    assert recent.read(cut - 8, 4096) is None
    storage.close()


def test_reader_beside_the_writer(tmp_path: Path, helper: ThreadPoolExecutor) -> None:
    """Whatever a reader gets is right, also when it is just being overwritten."""
    wal = WalWriter(START, 10)
    wal.until(START + 24 * MEMORY, 8000)
    storage = storage_at(tmp_path, helper, sync=False)
    recent = storage.end.recent
    assert recent.read(START, 1) is None
    written = [START]
    wrong: list[int] = []
    got = [0, 0]

    def read(number: int) -> None:
        rng = random.Random(number)
        while written[0] < wal.lsn:
            # What goes next, mostly.
            back = rng.choice((rng.randrange(1, 2000), MEMORY - rng.randrange(100_000)))
            lsn = max(START, written[0] - back)
            data = recent.read(lsn, 400_000)
            if data:
                got[number] += 1
                if data != wal.data[lsn - START : lsn - START + len(data)]:
                    wrong.append(lsn)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    at = START
    while at < wal.lsn:
        if at + 100_000 >= wal.lsn:  # with the last piece the readers end
            wait_until(lambda: all(got), what="both readers to have read")
        data = wal.data[at - START : at - START + 100_000]
        storage.write(at, memoryview(data))
        at += len(data)
        written[0] = at
    for reader in readers:
        reader.join()
    storage.close()
    assert not wrong
    assert all(got)
