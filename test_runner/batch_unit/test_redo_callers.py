"""Callers that share redo processes: each gets its own answers, whatever befalls the others."""

import os
import signal
import struct
import threading
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
    stopped_pool,
    wait_until,
)
from fixtures.utils import freeze, thaw

from pageserver._walredo_process import ProcessSettings, RedoProcess, start_process
from pageserver.walredo import RedoRequest, WalRedoError, WalRedoPool
from postgres_ffi.versions import Rmgr
from zenith_utils.crc32c import crc32c

REL = (1663, 5, 16384)
XLOG_HEAP_INSERT_INIT = 0x80
XLOG_HEAP_INPLACE = 0x70
BKPBLOCK_HAS_DATA = 0x20
BKPBLOCK_WILL_INIT = 0x40

distrib = redo_pools.distrib
control_file = redo_pools.control_file
make_pool = redo_pools.make_pool
stopped = redo_pools.stopped


def heap_record(info: int, flags: int, blkno: int, data: bytes, main: bytes) -> bytes:
    """A heap record with one block (access/xlogrecord.h)."""
    body = struct.pack("<BBH4I", 0, flags, len(data), *REL, blkno)
    body += struct.pack("<BB", 0xFF, len(main)) + data + main
    header = struct.pack("<IIQBBxx", 24 + len(body), 0, 0, info, Rmgr.HEAP)
    return header + struct.pack("<I", crc32c(header, crc32c(body))) + body


def insert(blkno: int, offnum: int, init: bool) -> bytes:
    """An insertion of a tuple with four bytes."""
    return heap_record(
        XLOG_HEAP_INSERT_INIT if init else 0,
        BKPBLOCK_HAS_DATA | (BKPBLOCK_WILL_INIT if init else 0),
        blkno,
        struct.pack("<HHBxI", 1, 0, 24, 0),  # xl_heap_header, a byte of padding, the tuple
        struct.pack("<HB", offnum, 0),
    )


def overwrite(blkno: int, offnum: int, value: int) -> bytes:
    """A change of a tuple's four bytes in place."""
    return heap_record(
        XLOG_HEAP_INPLACE,
        BKPBLOCK_HAS_DATA,
        blkno,
        struct.pack("<I", value),
        struct.pack("<H", offnum),
    )


def crashing(blkno: int) -> RedoRequest:
    """A request that a process does not survive: an insertion into a page that is not there."""
    return RedoRequest(*REL, 0, blkno, None, [(8, insert(blkno, 1, init=False))])


def malformed(blkno: int) -> RedoRequest:
    return RedoRequest(*REL, 0, blkno, b"short", [])


def rejected(blkno: int) -> RedoRequest:
    record = insert(blkno, 1, init=True)
    return RedoRequest(*REL, 0, blkno, None, [(8, record[:-1] + b"x")])


FAILURES = {crashing: "no content yet", malformed: "not 5", rejected: "CRC is wrong"}


def check(n: int, request: RedoRequest, outcome: bytes | WalRedoError) -> None:
    """The outcome is the one of request number n."""
    if request == echo(n):
        assert outcome == page(n)
        return
    (text,) = (text for make, text in FAILURES.items() if make(n) == request)
    assert f"page {n} of relation 1663/5/16384" in str(outcome)
    assert text in str(outcome)


@pytest.mark.parametrize("max_processes", [1, 2])
def test_every_caller_gets_its_own_answers(
    make_pool: MakePool,
    max_processes: int,
) -> None:
    pool = make_pool(max_processes=max_processes)

    def call(caller: int) -> None:
        makers = [echo] * 23 + [rejected] * 3 + [malformed] * 3
        for i in range(30):
            first, count = caller * 100_000 + i * 100, (1, 1, 30)[i % 3]
            numbers = range(first, first + count)
            requests = [makers[(n // 100 + n) % len(makers)](n) for n in numbers]
            if i % 10 == caller:
                requests[0] = crashing(first)
            for n, request, outcome in zip(
                numbers, requests, pool.redo_each(requests), strict=True
            ):
                check(n, request, outcome)

    calls = [in_thread(partial(call, caller)) for caller in range(8)]
    for thread, _ in calls:
        thread.join()
    assert [result for _, result in calls] == [[None]] * 8
    assert in_flight(pool) == 0


GROUPS = [range(1, 2), range(10, 12), range(100, 400), range(20, 21)]


def test_a_killed_process_costs_no_caller_anything(stopped: tuple[WalRedoPool, int]) -> None:
    pool, pid = stopped
    calls = in_line(pool, GROUPS)
    os.kill(pid, signal.SIGKILL)
    for group, thread, result in calls:
        thread.join()
        assert result == [[page(n) for n in group]]
    assert pool.processes_started == 2


def test_only_the_first_in_line_times_out(make_pool: MakePool) -> None:
    pool, _ = stopped_pool(make_pool, 3.0)
    calls = in_line(pool, GROUPS)
    for _, thread, _ in calls:
        thread.join()
    outcomes = [result[0] for _, _, result in calls]
    assert isinstance(outcomes[0], list)
    (error,) = outcomes[0]
    assert isinstance(error, WalRedoError)
    assert "page 1 of relation 1663/5/16384 fork 0 timed out after 3 s" in str(error)
    assert outcomes[1:] == [[page(n) for n in group] for group in GROUPS[1:]]
    assert pool.processes_started == 2


def test_what_was_twice_at_the_head_of_a_killed_process_is_given_up(
    stopped: tuple[WalRedoPool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, pid = stopped
    ((_, thread, result),) = in_line(pool, [range(1, 4)])

    def start_stopped(settings: ProcessSettings) -> RedoProcess:
        process = start_process(settings)
        freeze(process.pid)
        return process

    monkeypatch.setattr("pageserver.walredo.start_process", start_stopped)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: processes(pool) not in ([], [pid]) and in_flight(pool) == 3)
    (second,) = processes(pool)
    monkeypatch.undo()
    os.kill(second, signal.SIGKILL)
    thread.join()
    (outcomes,) = result
    assert isinstance(outcomes, list)
    assert "page 1 of relation" in str(outcomes[0])
    assert "the redo process was killed twice while at it" in str(outcomes[0])
    assert outcomes[1:] == [page(2), page(3)]
    assert pool.processes_started == 3


def test_a_large_batch_leaves_room_for_others(stopped: tuple[WalRedoPool, int]) -> None:
    pool, pid = stopped
    calls = in_line(pool, [range(1000), range(5000, 5001)])
    assert in_flight(pool) == WINDOW + 1
    thaw(pid)
    for group, thread, result in calls:
        thread.join()
        assert result == [[page(n) for n in group]]


def test_more_callers_than_a_process_holds(stopped: tuple[WalRedoPool, int]) -> None:
    pool, pid = stopped
    calls = [(n, *in_thread(partial(pool.redo, [echo(n)]))) for n in range(100)]
    wait_until(lambda: pool._queue.waiting == 36)
    thaw(pid)
    for n, thread, result in calls:
        thread.join()
        assert result == [[page(n)]]
    assert in_flight(pool) == 0


class Interrupt(Exception):
    """What the signal handler raises."""


def test_an_interrupted_call_leaves_nothing_behind(stopped: tuple[WalRedoPool, int]) -> None:
    pool, pid = stopped

    def interrupt(signo: int, frame: FrameType | None) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        main = threading.main_thread().ident
        assert main is not None
        for requests in ([echo(1)], [echo(n) for n in range(40)]):
            expected = in_flight(pool) + min(len(requests), WINDOW)

            def send(expected: int = expected) -> None:
                wait_until(lambda: in_flight(pool) == expected)
                signal.pthread_kill(main, signal.SIGUSR1)

            sender, _ = in_thread(send)
            with pytest.raises(Interrupt):
                pool.redo(requests)
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    thaw(pid)
    assert pool.redo([echo(n) for n in range(100)]) == [page(n) for n in range(100)]
    assert in_flight(pool) == 0
    assert pool.processes_started == 1


# Long chains

TUPLES = 50
CHAIN = 10_000


def chain(blkno: int) -> list[tuple[int, bytes]]:
    """Tuples, and then changes of one after the other."""
    records = [insert(blkno, offnum, offnum == 1) for offnum in range(1, TUPLES + 1)]
    records += [overwrite(blkno, n % TUPLES + 1, n) for n in range(CHAIN - TUPLES)]
    return [(8 + 8 * i, record) for i, record in enumerate(records)]


def values(content: bytes) -> list[int]:
    found: list[int] = []
    for offnum in range(TUPLES):
        (pointer,) = struct.unpack_from("<I", content, 24 + 4 * offnum)
        found += struct.unpack_from("<I", content, (pointer & 0x7FFF) + 24)
    return found


def test_ten_thousand_records(make_pool: MakePool) -> None:
    pool = make_pool(max_processes=1)
    numbers = range(CHAIN - TUPLES)
    expected = [max(n for n in numbers if n % TUPLES == t) for t in range(TUPLES)]
    requests = [RedoRequest(*REL, 0, blkno, None, chain(blkno)) for blkno in (3, 4)]
    first, small, second = pool.redo([requests[0], echo(9), requests[1]])
    assert values(first) == values(second) == expected
    assert small == page(9)
    assert struct.unpack_from("<II", first) == (0, 8 * CHAIN)

    # in steps of our own
    content = None
    for start in range(0, CHAIN, 777):
        part = chain(3)[start : start + 777]
        (content,) = pool.redo([RedoRequest(*REL, 0, 3, content, part)])
    assert content == first


@pytest.mark.parametrize("at", [0, 6000, CHAIN - 1])
def test_a_bad_record_in_a_long_chain(make_pool: MakePool, at: int) -> None:
    pool = make_pool(max_processes=1)
    good = chain(3)
    lsn, raw = good[at]
    for bad, text in (
        ((lsn, raw[:-1] + b"\xff"), "CRC is wrong"),
        ((lsn, raw + b"x"), "was given as"),
        ((0, raw), "not in LSN order"),
        ((lsn, overwrite(4, 1, 1)), "does not refer to the page"),
    ):
        records = [*good[:at], bad, *good[at + 1 :]]
        broken = RedoRequest(*REL, 0, 3, None, records)
        error, other = pool.redo_each([broken, echo(1)])
        assert f"page 3 of relation 1663/5/16384 fork 0 with {CHAIN} records" in str(error)
        assert text in str(error)
        assert other == page(1)
    assert pool.processes_started == 1


def test_a_base_newer_than_a_long_chain(make_pool: MakePool) -> None:
    """Records that the base has already are passed over; one newer than all is refused."""
    pool = make_pool(max_processes=1)
    records = chain(3)
    whole, half = pool.redo(
        [RedoRequest(*REL, 0, 3, None, part) for part in (records, records[: CHAIN // 2])]
    )
    assert pool.redo([RedoRequest(*REL, 0, 3, half, records[1:])]) == [whole]
    with pytest.raises(WalRedoError, match="beyond its last record"):
        pool.redo([RedoRequest(*REL, 0, 3, whole, records[1 : CHAIN - 1])])
