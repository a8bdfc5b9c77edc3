"""What happens to lazily opened files between a request for their blocks and its reply.

Replies are looked at when a process has to wait for a block, so what it asked for ahead stays under
way until its next miss.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.lazyfiles_process import BLOCKS, FORK, Files, build_symbols, finish, lazy_files
from batch_unit.lazyfiles_support import wait_for


@pytest.fixture(scope="session")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_symbols(tmp_path_factory.mktemp("symbols"))


@pytest.fixture
def files(tmp_path: Path, symbols: Path) -> Iterator[Files]:
    with lazy_files(tmp_path, symbols) as files:
        yield files


def test_written_blocks_are_kept(files: Files) -> None:
    files.run(
        """
fd = os.open(PATH, os.O_RDWR)
os.pread(fd, BLOCK, 0)
want(fd, 10, 100)
os.pwrite(fd, b"a" * BLOCK, 20 * BLOCK)
os.pwrite(fd, b"b" * 2 * BLOCK, 73 * BLOCK)
in_child(lambda: os.pwrite(fd, b"c" * BLOCK, 30 * BLOCK))
same(fd, PATH, 299)
written = {20: b"a", 73: b"b", 74: b"b", 30: b"c"}
for block in range(10, 110):
    if block in written:
        assert os.pread(fd, BLOCK, block * BLOCK) == written[block] * BLOCK, block
    else:
        same(fd, PATH, block)
"""
    )
    assert files.statistics.blocks_overwritten == files.statistics.blocks_discarded == 4


@pytest.mark.parametrize("who", ["cut()", "in_child(cut)"])
def test_cut_and_extended_again(files: Files, who: str) -> None:
    files.run(
        """
fd = os.open(PATH, os.O_RDWR)
os.pread(fd, BLOCK, 0)
want(fd, 100, 200)
def cut():
    os.ftruncate(fd, 150 * BLOCK)
    os.ftruncate(fd, 200 * BLOCK)
"""
        + who
        + """
same(fd, PATH, 5)
assert os.fstat(fd).st_size == 200 * BLOCK
for block in range(100, 150):
    same(fd, PATH, block)
assert os.pread(fd, 100 * BLOCK, 150 * BLOCK) == bytes(50 * BLOCK)
"""
    )
    assert files.statistics.blocks_discarded == 150


def test_removed_and_made_anew(files: Files) -> None:
    files.run(
        """
fd = os.open(PATH, os.O_RDWR)
os.pread(fd, BLOCK, 0)
want(fd, 0, 300)
def replace():
    os.unlink(PATH)
    os.write(os.open(PATH, os.O_RDWR | os.O_CREAT), b"n" * 3 * BLOCK)
in_child(replace)
same(os.open("base/5/99", os.O_RDONLY), "base/5/99", 7)
with open(PATH, "rb") as f:
    assert f.read() == b"n" * 3 * BLOCK
"""
    )
    assert files.statistics.blocks_discarded == BLOCKS - 1


def test_others_do_not_wait_for_ever(files: Files) -> None:
    files.run(
        """
fd = os.open(PATH, os.O_RDONLY)
os.pread(fd, BLOCK, 0)
want(fd, 100, 64)
def read():
    for block in range(90, 170):
        same(fd, PATH, block)
in_child(read)
read()
same(fd, PATH, 299)
"""
    )
    assert files.statistics.blocks_discarded == 64  # of those who came late


def test_interrupt_keeps_what_was_asked_for(files: Files) -> None:
    files.server.faults.hold_from = 10
    process = files.start(
        """
cancel = ctypes.c_int.in_dll(symbols, "QueryCancelPending")
fd = os.open(PATH, os.O_RDONLY)
os.pread(fd, BLOCK, 0)
want(fd, 10, 100)
cancel.value = 1
expect(125, os.pread, fd, BLOCK, 299 * BLOCK)
cancel.value = 0
print("cancelled", flush=True)
same(fd, PATH, 299)
for block in range(10, 110):
    same(fd, PATH, block)
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "cancelled\n"
    files.server.faults.released.set()
    finish(process)
    asked = [(block, n) for _, block, n in files.server.requests]
    assert asked == [(0, 1), (10, 64), (74, 36), (299, 1)]


def test_server_restarts(files: Files) -> None:
    files.server.faults.hold_from = 10
    process = files.start(
        """
fd = os.open(PATH, os.O_RDWR)
os.pread(fd, BLOCK, 0)
want(fd, 10, 100)
os.pwrite(fd, b"a" * BLOCK, 20 * BLOCK)
for block in (299, *range(10, 20), *range(21, 110)):
    same(fd, PATH, block)
assert os.pread(fd, BLOCK, 20 * BLOCK) == b"a" * BLOCK
"""
    )
    wait_for(lambda: (FORK, 10, 64) in files.server.requests, "the request")
    files.server.stop()
    files.server.faults.hold_from = None
    files.server.start()
    finish(process)
    assert files.statistics.reconnects == 1
    assert files.statistics.blocks_discarded == 1


def test_scan_goes_on_over_the_chunks_of_others(files: Files) -> None:
    files.run(
        """
fd = os.open("base/5/99", os.O_RDONLY)
for chunk in range(0, 6000, 192):
    for block in range(chunk, chunk + 64):
        os.pread(fd, BLOCK, block * BLOCK)
"""
    )
    asked = [(block, n) for _, block, n in files.server.requests]
    assert len([n for _, n in asked if n < 64]) == 3  # 1, 4, 16
    covered = [b for block, n in asked for b in range(block, block + n)]
    assert len(covered) == len(set(covered))
