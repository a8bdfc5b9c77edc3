"""The pool of redo processes: starting, sharing, failing and ending. Redo itself: test_redo_wal."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from batch_unit import redo_pools
from batch_unit.redo_pools import (
    SLOTS,
    MakePool,
    echo,
    in_flight,
    in_thread,
    page,
    processes,
    wait_until,
)
from fixtures.utils import freeze, process_exists, thaw

from pageserver.walredo import RedoRequest, WalRedoClosedError, WalRedoError, WalRedoPool
from postgres_ffi.distrib import PgDistrib
from zenith_utils.thread_priority import become_background

distrib = redo_pools.distrib
control_file = redo_pools.control_file
make_pool = redo_pools.make_pool


def test_starts_at_first_use_and_keeps_the_process(make_pool: MakePool) -> None:
    pool = make_pool()
    assert processes(pool) == []
    for n in range(3):
        assert pool.redo([echo(n)]) == [page(n)]
    assert pool.processes_started == 1
    assert pool.redo([]) == []


def test_large_batches_keep_their_order(make_pool: MakePool) -> None:
    """Far more than the pipes hold in either direction."""
    pool = make_pool()
    numbers = range(2000)
    assert pool.redo([echo(n) for n in numbers]) == [page(n) for n in numbers]


def test_malformed_requests_fail_alone(make_pool: MakePool) -> None:
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
def test_a_killed_process_is_replaced(make_pool: MakePool, killed: signal.Signals) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    os.kill(pid, killed)
    assert pool.redo([echo(n) for n in range(10)]) == [page(n) for n in range(10)]
    assert pool.processes_started == 2
    assert processes(pool) != [pid]


def test_kill_during_a_batch_loses_nothing(make_pool: MakePool) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    freeze(pid)
    numbers = range(300)
    thread, result = in_thread(lambda: pool.redo([echo(n) for n in numbers]))
    wait_until(lambda: in_flight(pool) > 0)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert result == [[page(n) for n in numbers]]


def test_a_process_that_a_background_thread_asked_for_is_not_nice(make_pool: MakePool) -> None:
    pool = make_pool()

    def ask() -> list[bytes]:
        become_background()
        return pool.redo([echo(1)])

    thread, outcome = in_thread(ask)
    thread.join()
    assert outcome == [[page(1)]]
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in processes(pool)] == [
        os.getpriority(os.PRIO_PROCESS, 0)
    ]


def test_a_request_that_times_out(make_pool: MakePool) -> None:
    pool = make_pool(max_processes=1, timeout=2.0)  # it has to start within it
    pool.redo([echo(0)])
    freeze(processes(pool)[0])
    first, second = pool.redo_each([echo(7), echo(8)])
    assert "page 7 of relation 1663/5/16384 fork 0 timed out after 2 s" in str(first)
    assert isinstance(first, WalRedoError)
    assert second == page(8)
    assert pool.processes_started == 2


def test_requests_leave_a_process_that_does_not_get_on(
    make_pool: MakePool,
) -> None:
    """Another process is started for them, up to the limit."""
    pool = make_pool(max_processes=2)
    pool.redo([echo(0)])
    (first,) = processes(pool)
    freeze(first)
    assert pool.redo([echo(n) for n in range(20)]) == [page(n) for n in range(20)]
    (second,) = set(processes(pool)) - {first}

    freeze(second)
    queued = [in_thread(partial(pool.redo, [echo(n)])) for n in range(8)]
    wait_until(lambda: in_flight(pool) >= 8)
    assert len(processes(pool)) == 2
    assert not any(result for _, result in queued)
    thaw(second)
    for n, (thread, result) in enumerate(queued):
        thread.join()
        assert result == [[page(n)]]
    thaw(first)
    assert pool.redo([echo(1)]) == [page(1)]
    assert pool.processes_started == 2


def test_close_ends_calls_and_processes(make_pool: MakePool) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    (pid,) = processes(pool)
    freeze(pid)
    calls = [in_thread(partial(pool.redo, [echo(n)])) for n in range(SLOTS + 2)]
    wait_until(lambda: pool._queue.waiting == 2)
    pool.close()
    for thread, result in calls:
        thread.join()
        assert isinstance(result[0], WalRedoClosedError)
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(WalRedoClosedError):
        pool.redo([echo(3)])
    pool.close()


def test_start_failure_says_why(make_pool: MakePool, control_file: bytes) -> None:
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


def test_processes_are_confined(make_pool: MakePool) -> None:
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
    make_pool: MakePool, signo: signal.Signals
) -> None:
    pool = make_pool()
    pool.redo([echo(0)])
    os.kill(processes(pool)[0], signo)
    assert pool.redo([echo(1)]) == [page(1)]
    assert pool.processes_started == 1


def test_waits_for_a_process_are_told_and_only_these(make_pool: MakePool) -> None:
    waits: list[float] = []
    pool = make_pool(max_processes=1, waited=waits.append)
    pool.redo([echo(0)])
    (until_it_started,) = waits
    assert until_it_started > 0
    for n in range(100):
        pool.redo([echo(n)])
    pool.redo([echo(n) for n in range(100)])
    assert waits == [until_it_started]


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
    wait_until(lambda: not process_exists(pid))
    assert not list((root / "work").iterdir())
    shutil.rmtree(root)
