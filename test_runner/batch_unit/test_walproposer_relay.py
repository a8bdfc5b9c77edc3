"""The native path of a commit: who gets WAL, what is reported, slow and broken safekeepers."""

from __future__ import annotations

import random
import socket
import struct
import threading
from itertools import permutations

import pytest
from batch_unit.relay_support import (
    DEADLINE,
    END,
    ERROR,
    START,
    TERM,
    Pool,
    attach,
    copy_data,
    keepalive,
    pool_of,
    raw,
    received,
    status_update,
    xlog_data,
)

from compute_tools.walproposer._link import Link
from compute_tools.walproposer.safekeepers import Safekeeper
from zenith_utils.safekeeper_messages import (
    APPEND_HEADER_SIZE,
    AcceptorGreeting,
    AppendResponse,
    parse_append_request,
)


def test_frames_that_came_together_leave_as_one_message() -> None:
    wal = bytes(range(200))
    with pool_of(3) as (pool, ends), attach(pool) as postgres:
        data = keepalive(False) + xlog_data(START, wal[:70]) + xlog_data(START + 70, wal[70:])
        postgres.sendall(data[:-10])
        pool.relay.run(0.0)
        postgres.sendall(data[-10:])
        pool.relay.run(0.0)
        for end in ends:
            requests, got = received(end)
            assert got == wal
            assert [request.end_lsn - request.begin_lsn for request in requests] == [190, 10]
        assert [peer.next_lsn for peer in pool.core.peers] == [START + 200] * 3
        # Nobody was told of a commit, as there is none; a wish of Postgres is answered.
        postgres.sendall(keepalive(True))
        pool.relay.run(0.0)
        assert postgres.recv(100)[:30] == status_update(0)


@pytest.mark.parametrize("answering", list(permutations(range(3), 2)))
def test_commit_with_any_two_in_any_order(answering: tuple[int, int]) -> None:
    with pool_of(3) as (pool, ends), attach(pool) as postgres:
        results: list[bytes] = []

        def drive() -> None:
            try:
                for number in (1, 2):
                    lsn = START + 100 * number
                    postgres.sendall(xlog_data(lsn - 100, bytes(100)))
                    for end in ends:
                        end.settimeout(DEADLINE)
                        end.recv(5 + APPEND_HEADER_SIZE + 100, socket.MSG_WAITALL)
                    for index in answering:
                        ends[index].sendall(copy_data(AppendResponse(TERM, lsn).encode()))
                    results.append(postgres.recv(39, socket.MSG_WAITALL))
                # The third one answers at last.
                (last,) = {0, 1, 2} - set(answering)
                ends[last].sendall(copy_data(AppendResponse(TERM, lsn).encode()))
            finally:
                pool.loop.post(lambda: done.append(True))

        done: list[bool] = []
        thread = threading.Thread(target=drive)
        thread.start()
        while not done:
            pool.relay.run(DEADLINE)
        thread.join()
        pool.relay.run(0.0)
        assert [result[:30] for result in results] == [
            status_update(START + 100), status_update(START + 200),
        ]  # fmt: skip
        assert pool.core.truncate_lsn == START + 100  # less than all that is committed
        assert not pool.reasons


def test_one_answer_is_no_commit_and_the_limit_holds_reports_back() -> None:
    with pool_of(3) as (pool, ends), attach(pool) as postgres:
        postgres.sendall(xlog_data(START, bytes(100)))
        pool.relay.run(0.0)
        pool.relay.limit_lsn = START + 40
        ends[0].sendall(copy_data(AppendResponse(TERM, START + 100).encode()))
        pool.relay.run(0.0)
        assert pool.core.commit_lsn == pool.relay.reported_lsn == 0
        ends[2].sendall(copy_data(AppendResponse(TERM, START + 100).encode()))
        pool.relay.run(0.0)
        assert pool.core.commit_lsn == START + 100
        assert postgres.recv(100)[:30] == status_update(START + 40)
        pool.relay.limit_lsn = START
        assert pool.relay.report(force=True)  # never less than before
        assert postgres.recv(100)[:30] == status_update(START + 40)
        # The commit is told with the next WAL.
        received(ends[1])
        assert pool.relay.told_commit == 0
        postgres.sendall(xlog_data(START + 100, bytes(8)))
        pool.relay.run(0.0)
        assert pool.relay.told_commit == START + 100
        _, request = struct.unpack_from(">BI", ends[1].recv(5)), ends[1].recv(1000)
        assert parse_append_request(request).commit_lsn == START + 100


def test_a_slow_reader_holds_one_unsent_message() -> None:
    size, count = 60000, 20
    with pool_of(3) as (pool, ends), attach(pool) as postgres:
        link = pool.link(1)
        link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10000)
        wal = random.Random(5).randbytes(size * count)
        others: list[bytes] = [b"", b""]
        most = 0
        for number in range(count):
            lsn = START + number * size
            postgres.sendall(xlog_data(lsn, wal[number * size : (number + 1) * size]))
            pool.relay.run(0.0)
            for position, index in enumerate((0, 2)):
                others[position] += raw(ends[index])
            most = max(most, link.unsent_bytes)
        assert link.pending
        assert 0 < most <= 5 + APPEND_HEADER_SIZE + size
        assert others[0] == others[1]
        assert len(others[0]) == count * (5 + APPEND_HEADER_SIZE + size)
        # Room again: what waits goes out, whole messages arrived, and it is to be caught up.
        data = b""
        while link.pending:
            data += raw(ends[1])
            pool.relay.run(0.0)
        data += raw(ends[1])
        sent = pool.core.peers[1].next_lsn - START
        assert 0 < sent < size * count
        assert others[0].startswith(data)
        assert len(data) == sent // size * (5 + APPEND_HEADER_SIZE + size)
        assert pool.core.peers[0].next_lsn == START + size * count
        # New WAL would leave a gap.
        postgres.sendall(xlog_data(START + size * count, bytes(8)))
        pool.relay.run(DEADLINE)
        assert raw(ends[0])
        assert not raw(ends[1])
        assert pool.core.peers[1].next_lsn == START + sent


def test_nothing_is_read_of_a_session_that_was_ended_meanwhile() -> None:
    class Leaving(Pool):
        def on_message(self, link: Link, payload: bytes) -> None:
            super().on_message(link, payload)
            self.on_link_error(link, "left")

    with pool_of(1, Leaving) as (pool, ends):
        greeting, answer = AcceptorGreeting(TERM), AppendResponse(TERM, START + 8)
        ends[0].sendall(copy_data(greeting.encode()) + copy_data(answer.encode()))
        pool.relay.run(0.0)
        assert pool.reasons == ["left"]
        assert pool.core.peers[0].flush_lsn == 0


def test_waits_that_leave_safekeepers_out() -> None:
    """All but so many that a quorum needs one more, or all; a wait for everything reads them."""
    with pool_of(3) as (pool, ends):
        for end in ends:
            end.sendall(copy_data(AppendResponse(TERM, START + 8).encode()))
        assert pool.loop.poll(0.0, 2) == 0
        assert pool.loop.poll(0.0, 1) == 2
        assert [peer.flush_lsn for peer in pool.core.peers] == [0, START + 8, START + 8]
        assert pool.loop.poll(0.0) == 1
        assert pool.core.peers[0].flush_lsn == START + 8
        pool.link(2).close()
        assert pool.loop.poll(0.0) == 0


def test_a_broken_link_does_not_stop_the_others() -> None:
    with pool_of(3) as (pool, ends), attach(pool) as postgres:
        postgres.sendall(xlog_data(START, bytes(100)))
        ends[0].close()
        pool.relay.run(0.0)
        assert len(pool.reasons) == 1
        assert pool.members[0].link is None
        pool.relay.run(0.0)
        assert received(ends[1])[1] == received(ends[2])[1] == bytes(100)


def test_the_end_of_the_stream() -> None:
    with pool_of(3) as (pool, ends):
        with attach(pool) as postgres:
            postgres.sendall(xlog_data(START, bytes(10)) + END)
            pool.relay.run(0.0)
            assert received(ends[2])[1] == bytes(10)
        with attach(pool) as postgres:
            postgres.sendall(ERROR)
            pool.relay.run(0.0)
        with attach(pool) as postgres:
            pass
        pool.relay.run(0.0)
        assert pool.ends == ["end", ERROR[5:].replace(b"\0", b" ").decode().strip(),
                             "connection closed"]  # fmt: skip
        assert not pool.relay.report(force=True)


def test_pauses_between_sessions() -> None:
    """One who takes us and fails each time is tried less and less often; after a good session not.

    Seconds are the test's own.
    """
    with pool_of(1) as (pool, _):
        member = Safekeeper(0, ("localhost", 1), pool.core.peers[0])
    now, pauses = 1000.0, []
    for _ in range(8):
        member.connected_at = now
        member.back_off(now + 0.25)
        pauses.append(member.retry_at - now - 0.25)
        now = member.retry_at
    assert pauses[0] < 0.1
    assert pauses == sorted(pauses)
    assert pauses[-2:] == [1.0, 1.0]
    member.connected_at = now
    member.back_off(now + 60.0)
    assert member.retry_at - now - 60.0 == pytest.approx(pauses[0])
