"""The pool of redo processes: starting, sharing, failing and ending. Redo itself: test_redo_wal."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pageserver.walredo import RedoRequest, WalRedoClosedError, WalRedoError, WalRedoPool
from pgxn.build import build_module
from postgres_ffi.distrib import PgDistrib, find_distrib
from zenith_utils.os_user import give, popen_kwargs

PAGE_SIZE = 8192


@pytest.fixture(scope="module")
def distrib() -> PgDistrib:
    return find_distrib()


@pytest.fixture(scope="module")
def control_file(distrib: PgDistrib) -> Iterator[bytes]:
    root = Path(tempfile.mkdtemp(prefix="redo-pool-"))
    give(root)
    command = [str(distrib.bin_dir / "initdb"), "-N", "-D", str(root / "data")]
    subprocess.run(command, check=True, capture_output=True, cwd="/", **popen_kwargs())
    content = (root / "data/global/pg_control").read_bytes()
    shutil.rmtree(root)
    yield content


@pytest.fixture
def make_pool(distrib: PgDistrib, control_file: bytes) -> Iterator[Callable[..., WalRedoPool]]:
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

    yield make
    for pool in pools:
        pool.close()
    assert not list(root.iterdir())
    root.rmdir()


def page(n: int) -> bytes:
    """A page that is not empty and differs from others."""
    return struct.pack("<IIHHHHHHI", 0, 8, 0, 0, 24, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE | 4, 0) + (
        n.to_bytes(4, "little") * ((PAGE_SIZE - 24) // 4)
    )


def echo(n: int) -> RedoRequest:
    """A request whose answer is its base image."""
    return RedoRequest(1663, 5, 16384, 0, n, page(n), [])


def processes(pool: WalRedoPool) -> list[int]:
    return sorted(process.pid for process in pool._live)


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


def test_starts_at_first_use_and_keeps_the_process(make_pool: Callable[..., WalRedoPool]) -> None:
    pool = make_pool()
    assert processes(pool) == []
    for n in range(3):
        assert pool.redo([echo(n)]) == [page(n)]
    assert pool.processes_started == 1
    assert pool.redo([]) == []


def test_large_batches_keep_their_order(make_pool: Callable[..., WalRedoPool]) -> None:
    """Far more than the pipes hold in either direction."""
    pool = make_pool()
    numbers = range(2000)
    assert pool.redo([echo(n) for n in numbers]) == [page(n) for n in numbers]


def test_malformed_requests_fail_alone(make_pool: Callable[..., WalRedoPool]) -> None:
    pool = make_pool()
    header_only = struct.pack("<IIQBBxxI", 24, 0, 0, 0, 10, 0)
    bad = [
        (RedoRequest(1663, 5, 1, 0, 0, b"short", []), "a page has 8192 bytes, not 5"),
        (RedoRequest(1663, 5, 1, 0, 0, None, [(8, b"short")]), "shorter than its header"),
        (RedoRequest(1663, 5, 1, 0, 0, None, [(8, header_only + b"x")]), "given as 25 bytes"),
        (RedoRequest(1663, 5, 1, 0, 0, None, [(8, header_only)]), "CRC is wrong"),
        (RedoRequest(1663, 5, 1, 4, 0, None, []), "no such page"),
        (RedoRequest(1663, 5, 1, 0, 0xFFFFFFFF, None, []), "no such page"),
        (RedoRequest(1663, 5, 1, 0, 1 << 32, None, []), "too large"),
    ]
    outcomes = pool.redo_each([*(request for request, _ in bad), echo(1)])
    for outcome, (_, text) in zip(outcomes, bad, strict=False):
        assert isinstance(outcome, WalRedoError)
        assert text in str(outcome)
    assert outcomes[-1] == page(1)
    assert pool.processes_started == 1
    with pytest.raises(WalRedoError, match="mask"):
        pool.mask(0, 0, page(1))


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_replaced(
    make_pool: Callable[..., WalRedoPool], killed: signal.Signals
) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    os.kill(pid, killed)
    assert pool.redo([echo(n) for n in range(10)]) == [page(n) for n in range(10)]
    assert pool.processes_started == 2
    assert processes(pool) != [pid]


def test_kill_during_a_batch_loses_nothing(make_pool: Callable[..., WalRedoPool]) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    os.kill(pid, signal.SIGSTOP)
    numbers = range(300)
    thread, result = in_thread(lambda: pool.redo([echo(n) for n in numbers]))
    wait_until(lambda: not pool._idle)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert result == [[page(n) for n in numbers]]


def test_a_request_that_times_out(make_pool: Callable[..., WalRedoPool]) -> None:
    pool = make_pool(max_processes=1, timeout=0.5)
    pool.redo([echo(0)])
    os.kill(processes(pool)[0], signal.SIGSTOP)
    first, second = pool.redo_each([echo(7), echo(8)])
    assert "page 7 of relation 1663/5/16384 fork 0 timed out after 0.5 s" in str(first)
    assert isinstance(first, WalRedoError)
    assert second == page(8)
    assert pool.processes_started == 2


def test_contention_starts_processes_up_to_the_limit(
    make_pool: Callable[..., WalRedoPool],
) -> None:
    pool = make_pool(max_processes=2)
    pool.redo([echo(0)])
    (first,) = processes(pool)
    os.kill(first, signal.SIGSTOP)
    stuck, stuck_result = in_thread(lambda: pool.redo([echo(1)]))
    wait_until(lambda: not pool._idle)
    assert pool.redo([echo(2)]) == [page(2)]  # by a second process
    (second,) = set(processes(pool)) - {first}

    os.kill(second, signal.SIGSTOP)
    waiting, waiting_result = in_thread(lambda: pool.redo([echo(3)]))
    wait_until(lambda: not pool._idle)
    queued = [in_thread(partial(pool.redo, [echo(n)])) for n in (4, 5, 6)]
    wait_until(lambda: len(pool._waiters) == 3)
    assert len(processes(pool)) == 2
    assert not stuck_result
    assert not waiting_result

    os.kill(second, signal.SIGCONT)
    for n, (thread, result) in zip((4, 5, 6), queued, strict=True):
        thread.join()
        assert result == [[page(n)]]
    os.kill(first, signal.SIGCONT)
    stuck.join()
    waiting.join()
    assert (stuck_result, waiting_result) == ([[page(1)]], [[page(3)]])
    assert pool.processes_started == 2


def test_close_ends_calls_and_processes(make_pool: Callable[..., WalRedoPool]) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    os.kill(pid, signal.SIGSTOP)
    busy, busy_result = in_thread(lambda: pool.redo([echo(1)]))
    wait_until(lambda: not pool._idle)
    queued, queued_result = in_thread(lambda: pool.redo([echo(2)]))
    wait_until(lambda: len(pool._waiters) == 1)
    pool.close()
    busy.join()
    queued.join()
    assert isinstance(busy_result[0], WalRedoClosedError)
    assert isinstance(queued_result[0], WalRedoClosedError)
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(WalRedoClosedError):
        pool.redo([echo(3)])
    pool.close()


def test_start_failure_says_why(make_pool: Callable[..., WalRedoPool], control_file: bytes) -> None:
    damaged = bytes([control_file[0] ^ 1]) + control_file[1:]
    pool = make_pool(control_file=damaged)
    for _ in range(2):
        with pytest.raises(WalRedoError, match=r"did not start.*checksum in control file"):
            pool.redo([echo(1)])


def test_leftovers_of_a_killed_server_are_removed(
    distrib: PgDistrib, control_file: bytes, tmp_path: Path
) -> None:
    leftover = tmp_path / "redo" / "process-abc" / "base"
    leftover.mkdir(parents=True)
    pool = WalRedoPool(
        distrib, tmp_path / "walredo.so", tmp_path / "redo", control_file=control_file
    )
    assert not leftover.parent.exists()
    pool.close()


def test_processes_are_confined(make_pool: Callable[..., WalRedoPool]) -> None:
    pool = make_pool()
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert "Max core file size        0                    0" in (
        Path(f"/proc/{pid}/limits").read_text()
    )


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_meant_for_the_pageserver_are_ignored(
    make_pool: Callable[..., WalRedoPool], signo: signal.Signals
) -> None:
    pool = make_pool()
    pool.redo([echo(0)])
    os.kill(processes(pool)[0], signo)
    assert pool.redo([echo(1)]) == [page(1)]
    assert pool.processes_started == 1


ORPHAN = """
import os, pathlib, signal, sys
from pageserver.walredo import RedoRequest, WalRedoPool
from pgxn.build import build_module
from postgres_ffi.distrib import find_distrib
distrib = find_distrib()
pool = WalRedoPool(
    distrib, build_module(distrib, "walredo"), pathlib.Path(sys.argv[1]),
    control_file=sys.stdin.buffer.read(),
)
pool.redo([RedoRequest(1663, 5, 1, 0, 0, None, [])])
print(next(iter(pool._live)).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_the_pageserver(control_file: bytes) -> None:
    root = Path(tempfile.mkdtemp(prefix="redo-pool-"))
    root.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(root / "work")],
        input=control_file,
        capture_output=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    pid = int(result.stdout)
    wait_until(lambda: not running(pid))
    assert not list((root / "work").iterdir())
    shutil.rmtree(root)


def running(pid: int) -> bool:
    """Whether the process still runs; one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
