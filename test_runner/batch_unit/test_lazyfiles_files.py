"""Lazily opened files call by call, in processes that look like a server to the library."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.lazyfiles_process import (
    BLOCKS,
    FORK,
    FSM,
    PATH,
    Files,
    build_symbols,
    finish,
    lazy_files,
    make_source,
)
from batch_unit.lazyfiles_support import (
    BLOCK_SIZE,
    SEGMENT_BLOCKS,
    Fork,
    make_manifest,
    make_startup_blocks,
)

from compute_tools.lazy_map import LazyMapError, create_lazy_files, read_statistics


@pytest.fixture(scope="session")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_symbols(tmp_path_factory.mktemp("symbols"))


@pytest.fixture
def files(tmp_path: Path, symbols: Path) -> Iterator[Files]:
    with lazy_files(tmp_path, symbols) as files:
        yield files


RANDOM_WALK = """
generator = random.Random(int(sys.argv[1]))
lazy = os.open(PATH, os.O_RDWR)
full = os.open(plain + PATH, os.O_RDWR)

def same(name, *args):
    results = []
    for fd in (lazy, full):
        try:
            results.append(getattr(os, name)(fd, *args))
        except OSError as e:
            results.append(e.errno)
    assert results[0] == results[1], (step, name, args[-1])

def read():
    offset = generator.randrange(310 * BLOCK)
    same("pread", generator.choice([1, 100, BLOCK, 5 * BLOCK]), offset)

def read_vector():
    offset = generator.randrange(305) * BLOCK
    results = []
    for fd in (lazy, full):
        buffers = [bytearray(BLOCK), bytearray(100), bytearray(BLOCK)]
        results.append((os.preadv(fd, buffers, offset), buffers))
    assert results[0] == results[1]

def read_on():
    same("lseek", generator.randrange(300) * BLOCK, os.SEEK_SET)
    same("read", generator.choice([10, BLOCK, 20 * BLOCK]))

def write_blocks():
    n = generator.randrange(1, 9)
    same("pwrite", generator.randbytes(n * BLOCK), generator.randrange(310) * BLOCK)

def write_part():
    same("pwrite", generator.randbytes(generator.randrange(1, 3 * BLOCK)),
         generator.randrange(300 * BLOCK))

def write_on():
    same("lseek", generator.randrange(300 * BLOCK), os.SEEK_SET)
    same("write", generator.randbytes(generator.randrange(1, 2 * BLOCK)))

def cut():
    same("ftruncate", generator.choice([1, BLOCK // 3, BLOCK]) * generator.randrange(300))

def cut_path():
    size = generator.randrange(200, 300) * BLOCK
    os.truncate(PATH, size)
    os.truncate(plain + PATH, size)

def reopen():
    global lazy, full
    flags = os.O_RDWR
    if generator.random() < 0.1:
        flags |= os.O_TRUNC
    elif generator.random() < 0.1:
        os.unlink(PATH)
        os.unlink(plain + PATH)
        flags |= os.O_CREAT
    elif generator.random() < 0.2:
        for path in (PATH, plain + PATH):
            os.rename(path, path + "_moved")
            os.rename(path + "_moved", path)
    os.close(lazy)
    os.close(full)
    lazy, full = os.open(PATH, flags), os.open(plain + PATH, flags)

def duplicate():
    global lazy
    copy = generator.choice([os.dup, lambda fd: os.dup2(fd, 77),
                             lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 50)])(lazy)
    if copy != lazy:
        os.close(lazy)
    lazy = copy

steps = [read] * 6 + [read_vector, read_on, write_blocks, write_part, write_on, duplicate]
for step in range(250):
    generator.choice(steps + ([cut, cut_path, reopen] if step > 60 else []))()
with open(PATH, "rb") as a, open(plain + PATH, "rb") as b:
    assert a.read() == b.read()
"""


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_have_the_results_of_a_complete_file(files: Files, seed: int) -> None:
    # The server keeps the state at the base LSN; the complete copy changes with the lazy files.
    base = files.root / "base-lsn"
    make_source(base, {FORK: BLOCKS})
    files.server.root = base
    files.run(RANDOM_WALK, str(seed))
    assert read_statistics(files.map_path).blocks_installed > 0


CONCURRENT = """
me, processes = int(sys.argv[1]), int(sys.argv[2])
generator = random.Random(me)
base = open(plain + PATH, "rb").read()
written = {}
fd = os.open(PATH, os.O_RDWR)
for _ in range(600):
    block = generator.randrange(300)
    if block % processes == me and generator.random() < 0.4:
        written[block] = bytes([me + 1, generator.randrange(256)]) * (BLOCK // 2)
        os.pwrite(fd, written[block], block * BLOCK)
        continue
    page = os.pread(fd, BLOCK, block * BLOCK)
    if block % processes == me:
        assert page == written.get(block, base[block * BLOCK:][:BLOCK]), block
    else:
        owner = block % processes + 1
        assert page == base[block * BLOCK:][:BLOCK] or page[0] == owner, block
print(json.dumps({block: page[1] for block, page in written.items()}))
"""


def test_processes_share_the_files(files: Files) -> None:
    n = 4
    processes = [files.start(CONCURRENT, str(i), str(n)) for i in range(n)]
    written: dict[int, bytes] = {}
    for i, output in enumerate([finish(process) for process in processes]):
        for block, value in json.loads(output).items():
            written[int(block)] = bytes([i + 1, value]) * (BLOCK_SIZE // 2)
    base = (files.plain / PATH).read_bytes()
    now = files.run("sys.stdout.write(open(PATH, 'rb').read().hex())")
    expected = bytearray(base)
    for block, page in written.items():
        expected[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = page
    assert bytes.fromhex(now) == expected


def test_disk_full_fails_the_read_and_leaves_the_block_absent(files: Files) -> None:
    # A file size limit stands for the full disk.
    files.run(
        """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fd = os.open(PATH, os.O_RDWR)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100 * BLOCK, limits[1]))
expect(27, os.pread, fd, BLOCK, 200 * BLOCK)
os.pread(fd, BLOCK, 50 * BLOCK)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
with open(plain + PATH, "rb") as f:
    f.seek(200 * BLOCK)
    assert os.pread(fd, BLOCK, 200 * BLOCK) == f.read(BLOCK)
"""
    )


def test_interrupt_is_honoured_only_where_an_error_may_be_raised(files: Files) -> None:
    files.server.faults.refuse = lambda fork, block: None
    files.server.stop()
    process = files.start(
        """
def variable(name):
    return ctypes.c_int.in_dll(symbols, name)
fd = os.open(PATH, os.O_RDWR)
variable("QueryCancelPending").value = 1
expect(125, os.pread, fd, BLOCK, 0)
for held in ("CritSectionCount", "InterruptHoldoffCount"):
    variable(held).value = 1
    child = os.fork()
    if child == 0:
        # Goes on trying while interrupts are held off: only the alarm ends it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        os.pread(fd, BLOCK, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGALRM
    variable(held).value = 0
variable("QueryCancelPending").value = 0
print("waiting", flush=True)
assert len(os.pread(fd, BLOCK, 0)) == BLOCK
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    files.server.start()
    finish(process)


def test_fork_does_not_share_the_connection(files: Files) -> None:
    files.server.faults.delay = 0.002
    files.run(
        """
fd = os.open(PATH, os.O_RDONLY)
os.pread(fd, BLOCK, 0)
os.posix_fadvise(fd, 100 * BLOCK, 100 * BLOCK, os.POSIX_FADV_WILLNEED)
child = os.fork()
path = PATH if child else "base/5/99"
fd = os.open(path, os.O_RDONLY)
with open(plain + path, "rb") as f:
    complete = f.read(300 * BLOCK)
for block in range(1, 300, 3):
    assert os.pread(fd, BLOCK, block * BLOCK) == complete[block * BLOCK :][:BLOCK]
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    )
    assert read_statistics(files.map_path).connections == 2


def test_second_segment(files: Files) -> None:
    files.run(
        """
for path, blocks in (("base/5/99", [0, 131071]), ("base/5/99.1", [0, 4])):
    fd = os.open(path, os.O_RDWR)
    for block in blocks:
        with open(plain + path, "rb") as f:
            f.seek(block * BLOCK)
            assert os.pread(fd, BLOCK, block * BLOCK) == f.read(BLOCK)
    assert os.pread(fd, BLOCK, (blocks[-1] + 1) * BLOCK) == b""
os.ftruncate(fd, 2 * BLOCK)
os.ftruncate(fd, 5 * BLOCK)
assert os.pread(fd, 5 * BLOCK, 2 * BLOCK) == bytes(3 * BLOCK)
"""
    )
    asked = {(block, n) for fork, block, n in files.server.requests if fork.relnode == 99}
    assert {block for block, _ in asked} == {0, SEGMENT_BLOCKS - 1, SEGMENT_BLOCKS, 131076}


def test_other_programs_get_no_incomplete_file(files: Files) -> None:
    del files.environment["TEST_DATADIR"]
    files.environment["LD_PRELOAD"] = files.environment["LD_PRELOAD"].split()[1]
    files.run('expect(1, os.open, PATH, os.O_RDONLY); open("PG_VERSION").read()')
    assert read_statistics(files.map_path).requests == 0


def test_written_map_blocks_are_queued(files: Files) -> None:
    output = files.run(
        """
fd = os.open(PATH + "_fsm", os.O_RDWR)
os.pread(fd, BLOCK, 0)
os.pwrite(fd, bytes(2 * BLOCK), BLOCK)
local = os.open("base/5/7_fsm", os.O_RDWR | os.O_CREAT)
os.write(local, bytes(BLOCK))
os.pwrite(os.open(PATH, os.O_RDWR), bytes(BLOCK), 0)
cursor, block = ctypes.c_uint64(), (ctypes.c_uint32 * 4)()
def queue():
    while (result := symbols.zenith_lazyfiles_next_fsm_write(ctypes.byref(cursor), block)) == 1:
        yield list(block)
    yield result
print(json.dumps(list(queue())))
for _ in range(20000):
    os.pwrite(local, b"x", 0)
print(json.dumps([list(queue()), list(queue())]))
"""
    )
    first, second = map(json.loads, output.splitlines())
    assert first == [[1663, 5, 16384, 1], [1663, 5, 16384, 2], [1663, 5, 7, 0], 0]
    assert second == [[-1], [0]]


def test_sequential_reads_go_ahead(files: Files) -> None:
    files.run("fd = os.open(PATH, os.O_RDONLY)\nwhile os.read(fd, BLOCK): pass")
    assert read_statistics(files.map_path).blocks_present == BLOCKS
    assert len(files.server.requests) <= 12
    assert max(n for _, _, n in files.server.requests) == 64


def test_willneed_asks_without_waiting(files: Files) -> None:
    files.run(
        """
fd = os.open(PATH, os.O_RDONLY)
os.pread(fd, BLOCK, 0)
for block in (10, 20, 30):
    os.posix_fadvise(fd, block * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)
with open(plain + PATH, "rb") as f:
    f.seek(30 * BLOCK)
    assert os.pread(fd, BLOCK, 30 * BLOCK) == f.read(BLOCK)
"""
    )
    asked = [(block, n) for _, block, n in files.server.requests]
    assert asked == [(0, 1), (10, 1), (20, 1), (30, 1)]


# ---- the files and the map ----


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    make_source(tmp_path / "data", {})
    return tmp_path / "data"


def test_files_and_startup_blocks(empty: Path, tmp_path: Path) -> None:
    sizes = {
        Fork(1664, 0, 1260, 0): 1,
        FORK: SEGMENT_BLOCKS * 2 + 1,
        FSM: 0,
        Fork(16400, 5, 16401, 0): 2,
    }
    page = os.urandom(BLOCK_SIZE)
    startup = {(FORK, SEGMENT_BLOCKS + 3): page, (Fork(1664, 0, 1260, 0), 0): page}
    summary = create_lazy_files(
        empty, tmp_path / "map", make_manifest(sizes), make_startup_blocks(startup), owner=None
    )
    assert (summary.forks, summary.files, summary.startup_blocks) == (4, 6, 2)
    made = {
        str(path.relative_to(empty)): path.stat().st_size // BLOCK_SIZE
        for path in empty.rglob("*")
        if path.is_file() and path.name.split(".")[0].split("_")[0].isdigit()
    }
    assert made == {
        "global/1260": 1,
        "base/5/16384": SEGMENT_BLOCKS,
        "base/5/16384.1": SEGMENT_BLOCKS,
        "base/5/16384.2": 1,
        "base/5/16384_fsm": 0,
        "pg_tblspc/16400/PG_15_202209061/5/16401": 2,
    }
    with (empty / "base/5/16384.1").open("rb") as f:
        f.seek(3 * BLOCK_SIZE)
        assert f.read(BLOCK_SIZE) == page
    statistics = read_statistics(tmp_path / "map")
    assert statistics.blocks == summary.blocks == sum(sizes.values())
    assert statistics.blocks_present == 2


def test_contradictions_are_refused(empty: Path, tmp_path: Path) -> None:
    manifest, no_blocks = make_manifest({FORK: 3}), make_startup_blocks({})

    def create(manifest: bytes, blocks: bytes) -> None:
        create_lazy_files(empty, tmp_path / "map", manifest, blocks, owner=None)

    damaged = bytearray(manifest)
    damaged[30] ^= 1
    for bad, blocks, message in [
        (bytes(damaged), no_blocks, "checksum of the manifest"),
        (manifest, bytes(4) + b"x", "checksum of the start-up blocks"),
        (b"", no_blocks, "too short"),
        (make_manifest({Fork(1663, 5, 1, 7): 1}), no_blocks, "not a relation fork"),
        (manifest, make_startup_blocks({(FORK, 3): bytes(BLOCK_SIZE)}), "not in the manifest"),
    ]:
        with pytest.raises(LazyMapError, match=message):
            create(bad, blocks)
        (empty / PATH).unlink(missing_ok=True)
    create(manifest, no_blocks)
    with pytest.raises(LazyMapError, match="in the base backup and in its manifest"):
        create(manifest, no_blocks)
