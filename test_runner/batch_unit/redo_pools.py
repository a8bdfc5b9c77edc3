"""Pools of redo processes for tests, requests that need no recorded WAL, and threads that call.

The fixtures are for the modules that import them.
"""

import contextlib
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from batch_unit.redo_support import PAGE_SIZE
from fixtures.utils import freeze

from pageserver.walredo import RedoRequest, WalRedoPool
from pgxn.build import build_module
from postgres_ffi.distrib import PgDistrib, find_distrib
from zenith_utils.os_user import give, popen_kwargs

MakePool = Callable[..., WalRedoPool]

SLOTS = 64  # requests that one process holds
WINDOW = 16  # requests that one caller has under way


def new_control_file(distrib: PgDistrib) -> bytes:
    """That of a new cluster."""
    root = Path(tempfile.mkdtemp(prefix="redo-pool-"))
    give(root)
    command = [str(distrib.bin_dir / "initdb"), "-N", "-D", str(root / "data")]
    subprocess.run(command, check=True, capture_output=True, cwd="/", **popen_kwargs())
    content = (root / "data/global/pg_control").read_bytes()
    shutil.rmtree(root)
    return content


@contextlib.contextmanager
def pool_maker(distrib: PgDistrib, control_file: bytes) -> Iterator[MakePool]:
    """Makes pools with the given settings; in the end none has left anything behind."""
    root = Path(tempfile.mkdtemp(prefix="redo-pool-"))
    root.chmod(0o755)
    pools: list[WalRedoPool] = []

    def make(**settings: object) -> WalRedoPool:
        arguments: dict[str, object] = {"control_file": control_file, "timeout": 20.0}
        pool = WalRedoPool(
            distrib,
            build_module(distrib, "walredo"),
            root / f"pool{len(pools)}",
            **(arguments | settings),  # type: ignore[arg-type]
        )
        pools.append(pool)
        return pool

    try:
        yield make
    finally:
        for pool in pools:
            pool.close()
    assert not list(root.iterdir())
    root.rmdir()


@pytest.fixture(scope="module")
def distrib() -> PgDistrib:
    return find_distrib()


@pytest.fixture(scope="module")
def control_file(distrib: PgDistrib) -> bytes:
    return new_control_file(distrib)


@pytest.fixture
def make_pool(distrib: PgDistrib, control_file: bytes) -> Iterator[MakePool]:
    with pool_maker(distrib, control_file) as make:
        yield make


def page(n: int) -> bytes:
    """A page that is not empty and differs from others."""
    return struct.pack("<IIHHHHHHI", 0, 8, 0, 0, 24, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE | 4, 0) + (
        n.to_bytes(4, "little") * ((PAGE_SIZE - 24) // 4)
    )


def echo(n: int) -> RedoRequest:
    """A request whose answer is its base image."""
    return RedoRequest(1663, 5, 16384, 0, n, page(n), [])


def processes(pool: WalRedoPool) -> list[int]:
    """Their ids."""
    return sorted(process.pid for process in pool._live.copy())


def in_flight(pool: WalRedoPool) -> int:
    """How many requests are in the lines of the processes."""
    return pool._queue.in_flight


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run in a thread; its result or exception appears in the list."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as e:
            result.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def stopped_pool(make_pool: MakePool, timeout: float) -> tuple[WalRedoPool, int]:
    """A pool whose only process does not get on, and the id of that."""
    pool = make_pool(max_processes=1, timeout=timeout)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    freeze(pid)
    return pool, pid


@pytest.fixture
def stopped(make_pool: MakePool) -> tuple[WalRedoPool, int]:
    """stopped_pool() with more time than a test takes."""
    return stopped_pool(make_pool, 120.0)


def in_line(
    pool: WalRedoPool, numbers: list[range]
) -> list[tuple[range, threading.Thread, list[object]]]:
    """Callers whose requests are in the line in this order."""
    calls = []
    for group in numbers:
        before = in_flight(pool)
        thread, result = in_thread(partial(pool.redo_each, [echo(n) for n in group]))
        wait_until(lambda: in_flight(pool) == before + min(len(group), WINDOW))  # noqa: B023
        calls.append((group, thread, result))
    return calls
