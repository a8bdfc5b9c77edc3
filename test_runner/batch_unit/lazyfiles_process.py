"""Processes on lazily opened files that look like a server to the library."""

import contextlib
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batch_unit.lazyfiles_support import (
    BLOCK_SIZE,
    SEGMENT_BLOCKS,
    Fork,
    PageServer,
    fork_path,
    lazy_environment,
    make_manifest,
    make_startup_blocks,
)

from compute_tools.lazy_map import LazyStatistics, create_lazy_files, read_statistics
from pgxn.build import build_module
from postgres_ffi.distrib import find_distrib

SERVER_SYMBOLS = """
#include <signal.h>
#include <stdlib.h>
char *DataDir;
volatile unsigned CritSectionCount, InterruptHoldoffCount;
volatile sig_atomic_t ProcDiePending, QueryCancelPending;
__attribute__((constructor)) static void start(void) { DataDir = getenv("TEST_DATADIR"); }
"""

FORK = Fork(1663, 5, 16384, 0)
FSM = Fork(1663, 5, 16384, 1)
PATH = "base/5/16384"
BLOCKS = 300

PRELUDE = """
import ctypes, fcntl, json, mmap, os, random, resource, signal, sys
BLOCK = 8192
PATH = "base/5/16384"
plain = os.environ["TEST_PLAIN"] + "/"
symbols = ctypes.CDLL(None)
def expect(error, call, *args):
    try:
        call(*args)
    except OSError as e:
        assert e.errno == error, e
    else:
        raise AssertionError("no error")
def complete(path, block, n=1):
    with open(plain + path, "rb") as f:
        f.seek(block * BLOCK)
        return f.read(n * BLOCK)
def same(fd, path, block):
    assert os.pread(fd, BLOCK, block * BLOCK) == complete(path, block), block
def want(fd, first, n):
    os.posix_fadvise(fd, first * BLOCK, n * BLOCK, os.POSIX_FADV_WILLNEED)
def in_child(work):
    if (pid := os.fork()) == 0:
        try:
            work()
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


@dataclass
class Files:
    """A directory of lazily opened files, and what a program needs to work on it."""

    root: Path
    server: PageServer
    environment: dict[str, str]

    @property
    def map_path(self) -> Path:
        """The map file."""
        return self.root / "map"

    @property
    def statistics(self) -> LazyStatistics:
        """Counters of the library."""
        return read_statistics(self.map_path)

    @property
    def plain(self) -> Path:
        """The same files, complete."""
        return self.root / "plain"

    def start(self, program: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start a Python program in the directory, with the library preloaded."""
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, *arguments],
            cwd=self.root / "data",
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *arguments: str) -> str:
        """Run a program to its end; its output."""
        return finish(self.start(program, *arguments))


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a program to end well; its output."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def make_source(directory: Path, sizes: dict[Fork, int]) -> None:
    """A directory like a stopped cluster's, its relations filled with random bytes."""
    generator = random.Random(1)
    (directory / "global").mkdir(parents=True)
    (directory / "PG_VERSION").write_text("15\n")
    (directory / "global/pg_control").write_bytes(bytes(12) + (202209061).to_bytes(4, "little"))
    (directory / "base/5").mkdir(parents=True)
    for fork, blocks in sizes.items():
        segments = max(1, -(-blocks // SEGMENT_BLOCKS))
        for segment in range(segments):
            n = min(blocks - segment * SEGMENT_BLOCKS, SEGMENT_BLOCKS)
            with fork_path(directory, fork, segment).open("wb") as f:
                f.write(generator.randbytes(min(n, BLOCKS) * BLOCK_SIZE))
                f.truncate(n * BLOCK_SIZE)


def build_symbols(directory: Path) -> Path:
    """The library of the server's variables that the library under test looks at."""
    library = directory / "symbols.so"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
    subprocess.run(command, input=SERVER_SYMBOLS, text=True, check=True)
    return library


@contextlib.contextmanager
def lazy_files(root: Path, symbols: Path) -> Iterator[Files]:
    """Lazily opened files below `root`, and a server that has their blocks."""
    sizes = {FORK: BLOCKS, FSM: 3, Fork(1663, 5, 99, 0): SEGMENT_BLOCKS + 5}
    make_source(root / "plain", sizes)
    data = root / "data"
    (data / "global").mkdir(parents=True)
    for name in ("PG_VERSION", "global/pg_control"):
        (data / name).write_bytes((root / "plain" / name).read_bytes())
    create_lazy_files(data, root / "map", make_manifest(sizes), make_startup_blocks({}), owner=None)
    module = build_module(find_distrib(), "lazyfiles")
    with PageServer(root / "plain") as server:
        environment = lazy_environment(module, root / "map", server.port)
        environment["LD_PRELOAD"] = f"{symbols} {module}"
        environment["TEST_DATADIR"] = str(data)
        environment["TEST_PLAIN"] = str(root / "plain")
        yield Files(root, server, environment)
