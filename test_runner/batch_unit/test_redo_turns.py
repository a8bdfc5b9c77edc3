"""Many callers of few redo processes: whose turn it is, and that nobody waits for ever."""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

import pytest
from batch_unit import redo_pools
from batch_unit.redo_pools import (
    WINDOW,
    MakePool,
    echo,
    in_flight,
    in_line,
    in_thread,
    page,
    processes,
    wait_until,
)
from fixtures.utils import thaw

from pageserver.walredo import RedoRequest, WalRedoClosedError, WalRedoError, WalRedoPool

distrib = redo_pools.distrib
control_file = redo_pools.control_file
make_pool = redo_pools.make_pool
stopped = redo_pools.stopped

TURNS = 2  # at a time, with one process
DEADLINE = 120.0


class Stop(Exception):
    """Ends a call from inside."""


class Endless(Sequence[RedoRequest]):
    """Requests of a call that goes on until it is told to stop."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, n: int) -> RedoRequest:  # type: ignore[override]
        if self.stopped.is_set():
            raise Stop
        return echo(n % 1000)


def waiting_for_turn(pool: WalRedoPool) -> int:
    return pool._queue.waiting_for_turn


def queued(pool: WalRedoPool, callers: int) -> list[tuple[threading.Thread, list[object]]]:
    """Callers that wait for their turn behind others."""
    calls = []
    for n in range(callers):
        calls.append(in_thread(partial(pool.redo, [echo(i) for i in range(300)])))
        wait_until(lambda: waiting_for_turn(pool) == n + 1)  # noqa: B023
    return calls


def join(threads: Sequence[threading.Thread]) -> None:
    """Wait until all have ended."""
    deadline = time.monotonic() + DEADLINE
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
        assert not thread.is_alive()


def test_callers_of_many_pages_take_turns(stopped: tuple[WalRedoPool, int]) -> None:
    """Whoever wants one page stands behind those whose turn it is, and nobody else."""
    pool, pid = stopped
    calls = in_line(pool, [range(500), range(1000, 1500)])
    others = queued(pool, 3)
    assert in_flight(pool) == TURNS * WINDOW
    calls += in_line(pool, [range(7, 8)])
    assert in_flight(pool) == TURNS * WINDOW + 1
    thaw(pid)
    join([thread for _, thread, _ in calls] + [thread for thread, _ in others])
    for group, _, result in calls:
        assert result == [[page(n) for n in group]]
    for _, result in others:
        assert result == [[page(n) for n in range(300)]]
    assert in_flight(pool) == waiting_for_turn(pool) == 0


def test_a_turn_ends_before_the_call_does(make_pool: MakePool) -> None:
    pool = make_pool(max_processes=1)
    pool.redo([echo(0)])
    endless = [Endless() for _ in range(TURNS + 1)]
    calls = [in_thread(partial(pool.redo, requests)) for requests in endless]
    try:
        for _ in range(5):
            thread, result = in_thread(lambda: pool.redo([echo(n) for n in range(300)]))
            join([thread])
            assert result == [[page(n) for n in range(300)]]
    finally:
        for requests in endless:
            requests.stopped.set()
    join([thread for thread, _ in calls])
    assert all(isinstance(result[0], Stop) for _, result in calls)
    assert pool.redo([echo(n) for n in range(300)]) == [page(n) for n in range(300)]
    assert in_flight(pool) == 0


def test_close_ends_those_who_wait_for_their_turn(stopped: tuple[WalRedoPool, int]) -> None:
    pool, _ = stopped
    calls = in_line(pool, [range(500), range(1000, 1500)])
    others = queued(pool, 2)
    pool.close()
    join([thread for _, thread, _ in calls] + [thread for thread, _ in others])
    for result in [result for _, _, result in calls] + [result for _, result in others]:
        assert isinstance(result[0], WalRedoClosedError)


def test_an_interrupted_wait_for_a_turn_leaves_nothing_behind(
    stopped: tuple[WalRedoPool, int],
) -> None:
    pool, pid = stopped

    def interrupt(signo: int, frame: FrameType | None) -> None:
        raise Stop

    calls = in_line(pool, [range(500), range(1000, 1500)])
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        wait_until(lambda: waiting_for_turn(pool) == 1)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        sender, _ = in_thread(send)
        with pytest.raises(Stop):
            pool.redo([echo(n) for n in range(300)])
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert waiting_for_turn(pool) == 0
    thaw(pid)
    join([thread for _, thread, _ in calls])
    assert pool.redo([echo(n) for n in range(300)]) == [page(n) for n in range(300)]


def disturb(pool: WalRedoPool, seed: int, callers: list[threading.Thread]) -> None:
    """Kill and stop processes for as long as there are callers."""
    chance = random.Random(seed)
    while any(thread.is_alive() for thread in callers):
        for pid in processes(pool):
            signo = chance.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGCONT])
            try:
                os.kill(pid, signo)
            except ProcessLookupError:
                continue
        callers[chance.randrange(len(callers))].join(chance.choice([0.002, 0.02, 0.1]))


@pytest.mark.parametrize("max_processes", [1, 2])
def test_nobody_waits_for_ever(make_pool: MakePool, max_processes: int) -> None:
    """Each page is right or said to be lost, whatever becomes of the processes."""
    pool = make_pool(max_processes=max_processes, timeout=0.3)

    def call(caller: int) -> int:
        chance, rebuilt = random.Random(caller), 0
        for _ in range(25):
            numbers = [
                chance.randrange(1 << 30) for _ in range(chance.choice([1, 1, 1, 4, 5, 150]))
            ]
            try:
                outcomes = pool.redo_each([echo(n) for n in numbers])
            except WalRedoError as e:
                assert "did not start within 0.3 s" in str(e)
                continue
            for n, outcome in zip(numbers, outcomes, strict=True):
                if isinstance(outcome, WalRedoError):
                    text = str(outcome)
                    assert f"page {n} of" in text
                    assert "timed out after 0.3 s" in text or "killed twice" in text
                else:
                    assert outcome == page(n)
                    rebuilt += 1
        return rebuilt

    calls = [in_thread(partial(call, caller)) for caller in range(12)]
    threads = [thread for thread, _ in calls]
    disturber, trouble = in_thread(partial(disturb, pool, 1, threads))
    join([*threads, disturber])
    assert trouble == [None]
    for _, result in calls:
        assert isinstance(result[0], int), result
    assert sum(result[0] for _, result in calls if isinstance(result[0], int)) > 0
    assert in_flight(pool) == waiting_for_turn(pool) == pool._queue.waiting == 0
