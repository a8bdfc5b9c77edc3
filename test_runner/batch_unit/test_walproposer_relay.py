"""The native path of a commit: parsers against plain Python, damaged input, slow readers."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, permutations

import pytest

from compute_tools.walproposer._link import Link, LinkError
from compute_tools.walproposer._quorum import PeerState, Quorum
from compute_tools.walproposer._relay import Member, Relay
from compute_tools.walproposer._xlog_stream import StreamError, XLogStream
from compute_tools.walproposer.core import Defeated, Identity, Proposer
from compute_tools.walproposer.loop import EventLoop
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    APPEND_HEADER_SIZE,
    NO_FEEDBACK,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MessageError,
    VoteResponse,
    parse_acceptor_message,
    parse_append_request,
)
from zenith_utils.zenith_feedback import ZenithFeedback

DEADLINE = 30.0
TERM = 1
START = 0x1000000
PROPOSER = bytes(range(16))


# ---- WAL out of a replication stream


def copy_data(payload: bytes) -> bytes:
    return struct.pack(">BI", ord("d"), len(payload) + 4) + payload


def xlog_data(lsn: int, wal: bytes) -> bytes:
    return copy_data(struct.pack(">cQQq", b"w", lsn, lsn + len(wal), 7) + wal)


def keepalive(reply: bool) -> bytes:
    return copy_data(struct.pack(">cQqB", b"k", START, 7, reply))


def reference_wal(data: bytes, lsn: int) -> tuple[bytes, bool, bool, str | None]:
    """The WAL of a whole stream, whether a reply is wanted, whether it has ended, its error."""
    wal, wanted, ended, error = b"", False, False, None
    while len(data) >= 5:
        kind, length = struct.unpack_from(">BI", data)
        payload, data = data[5 : length + 1], data[length + 1 :]
        if kind == ord("d") and payload[:1] == b"w":
            start = struct.unpack_from(">Q", payload, 1)[0]
            if start != lsn + len(wal):
                raise StreamError
            wal += payload[25:]
        elif kind == ord("d") and payload[:1] == b"k":
            wanted = wanted or bool(payload[17])
        elif kind == ord("C"):
            ended = True
        elif kind == ord("E"):
            error = payload.replace(b"\0", b" ").decode().strip()
    return wal, wanted, ended, error


def some_stream(rng: random.Random, end: bytes) -> bytes:
    data, lsn = b"", START
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.3:
            data += keepalive(rng.random() < 0.3)
        wal = rng.randbytes(rng.choice([0, 1, 24, 31, 200]))
        data += xlog_data(lsn, wal)
        lsn += len(wal)
    return data + end


END = b"c\0\0\0\4" + b"C\0\0\0\x0bCOPY 0\0"
ERROR = b"E\0\0\0\x14SFATAL\0Mgone away\0"[:21]


@pytest.mark.parametrize("end", [b"", END, ERROR])
def test_stream_is_cut_anywhere(end: bytes) -> None:
    rng = random.Random(1)
    for _ in range(20):
        data = some_stream(rng, end)
        expected = reference_wal(data, START)
        sizes = [1, 29, 30, 31, 64, 1 << 16]
        for first in [*range(len(data)), *sizes]:
            # The rest of the stream comes at once, or in pieces of one size.
            step = rng.choice([len(data), *sizes])
            cuts = [0, first, *range(first + step, len(data), step), len(data)]
            stream = XLogStream(START, rng.choice([64, 100, 1 << 16]))
            wal = b"".join(stream.feed(data[a:b]) for a, b in pairwise(cuts) if a < b)
            assert (wal, stream.reply_requested, stream.ended, stream.error) == expected
            assert stream.lsn == START + len(wal)


def test_stream_of_nonsense_is_an_error() -> None:
    def feed(data: bytes) -> None:
        XLogStream(START, 64).feed(data)

    with pytest.raises(StreamError, match="expected 0/1000000"):
        feed(xlog_data(START + 8, b"x"))
    with pytest.raises(StreamError, match="WAL in a message of length 28"):
        feed(copy_data(b"w" + bytes(40))[:1] + struct.pack(">I", 28) + b"w" + bytes(40))
    with pytest.raises(StreamError, match="message of length 3"):
        feed(b"C\0\0\0\3")
    with pytest.raises(StreamError, match="message of length 4"):
        feed(b"d\0\0\0\4")
    with pytest.raises(StreamError, match="message 'E' of length 1000"):
        feed(b"E\0\0\3\xe8x")
    with pytest.raises(ValueError, match="capacity"):
        XLogStream(START, 16)


def test_damaged_stream() -> None:
    """Damage of a header is an error or makes other frames of it; nothing else happens."""
    rng = random.Random(2)
    for _ in range(3000):
        data = bytearray(some_stream(rng, END))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        stream = XLogStream(START, 300)
        position = size = 0
        try:
            while position < len(data):
                step = rng.randint(1, 100)
                size += len(stream.feed(data[position : position + step]))
                position += step
        except StreamError:
            continue
        assert stream.lsn == START + size <= START + len(data)


# ---- the rules


def reference_advance(
    flushed: list[int], epoch_start: int, commit: int, truncate: int
) -> tuple[int, int]:
    """Commit LSN and truncate horizon, from what they were and what is durable where."""
    ordered = sorted(flushed)
    quorum = len(flushed) // 2 + 1
    new_commit = ordered[len(flushed) - quorum]
    if new_commit >= epoch_start:
        commit = max(commit, new_commit)
    return commit, max(truncate, min(ordered[0], commit))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_commit_and_truncate_horizon(count: int) -> None:
    rng = random.Random(count)
    for _ in range(300):
        quorum = Quorum(count, PROPOSER)
        quorum.term = 5
        quorum.epoch_start_lsn = epoch_start = rng.randint(0, 40)
        flushed = [0] * count
        commit = truncate = 0
        for peer in quorum.peers:
            peer.state = PeerState.STREAMING
        for _ in range(5 * count):
            index, lsn = rng.randrange(count), rng.randint(0, 100)
            feedback = ZenithFeedback(ps_writelsn=lsn)
            assert quorum.acknowledge(quorum.peers[index], 5, lsn, lsn // 2, feedback)
            if lsn > flushed[index]:
                flushed[index] = lsn
                commit, truncate = reference_advance(flushed, epoch_start, commit, truncate)
            assert (quorum.commit_lsn, quorum.truncate_lsn) == (commit, truncate)
            assert quorum.peers[index].feedback is feedback
        assert [peer.flush_lsn for peer in quorum.peers] == flushed


def test_answers_that_do_not_count() -> None:
    quorum = Quorum(1, PROPOSER)
    (peer,) = quorum.peers
    quorum.term = 5
    assert quorum.acknowledge(peer, 5, 100, 100, NO_FEEDBACK)  # it does not follow us yet
    peer.state = PeerState.STREAMING
    assert quorum.acknowledge(peer, 4, 100, 100, NO_FEEDBACK)
    assert not quorum.acknowledge(peer, 6, 100, 100, NO_FEEDBACK)
    assert (peer.flush_lsn, peer.commit_lsn, quorum.commit_lsn) == (0, 0, 0)


def test_append_header() -> None:
    quorum = Quorum(3, PROPOSER)
    quorum.term, quorum.epoch_start_lsn = (1 << 64) - 1, 2
    quorum.commit_lsn, quorum.truncate_lsn = 5, 1 << 63
    expected = AppendRequest((1 << 64) - 1, 2, 3, 4, 5, 1 << 63, PROPOSER)
    assert quorum.append_header(3, 4) == expected.encode_header()
    with pytest.raises(ValueError, match="at least one"):
        Quorum(0, PROPOSER)
    with pytest.raises(ValueError, match="16 bytes"):
        Quorum(3, b"")


# ---- answers of safekeepers


def leader() -> Proposer:
    """A leader whose three peers stream."""
    core = Proposer(Identity(TenantId(bytes(16)), TimelineId(bytes(16)), PROPOSER), 3)
    for index in range(3):
        core.connected(index)
        core.receive(index, AcceptorGreeting(0))
    for index in range(3):
        core.receive(index, VoteResponse(TERM, True, 0, 0, ()))
    core.start(START)
    assert [peer.state for peer in core.peers] == [PeerState.STREAMING] * 3
    assert [peer.next_lsn for peer in core.peers] == [START] * 3
    return core


class Pool:
    """What stands behind links and relay: members, and a record of what they reported."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.core = leader()
        self.loop = EventLoop()
        self.members = tuple(Member(peer) for peer in self.core.peers)
        self.defeats: list[object] = []
        self.messages: list[bytes] = []
        self.feedbacks = 0
        self.reasons: list[str] = []
        self.ends: list[str] = []
        for index, sock in enumerate(sockets):
            self.members[index].link = Link(self.loop, sock, self.core, index, self)
        self.relay = Relay(self.loop, self.core, self.members, self)

    def link(self, index: int) -> Link:
        """An open link."""
        link = self.members[index].link
        assert link is not None
        return link

    def on_message(self, link: Link, payload: bytes) -> None:
        """As the real one."""
        (index,) = (i for i, member in enumerate(self.members) if member.link is link)
        self.messages.append(payload)
        self.defeats += self.core.receive(index, parse_acceptor_message(payload))

    def on_feedback(self) -> None:
        """Feedback has changed."""
        self.feedbacks += 1

    def on_link_error(self, link: Link, reason: str) -> None:
        """As the real one."""
        (member,) = (member for member in self.members if member.link is link)
        self.reasons.append(reason)
        link.close()
        member.link = None

    def on_stream_end(self) -> None:
        """Postgres has ended."""
        self.ends.append("end")
        self.relay.detach()

    def on_stream_lost(self, reason: str) -> None:
        """Postgres has gone."""
        self.ends.append(reason)
        self.relay.detach()


@contextmanager
def pool_of(count: int, kind: type[Pool] = Pool) -> Iterator[tuple[Pool, list[socket.socket]]]:
    """A pool with links, and their other ends."""
    pairs = [socket.socketpair() for _ in range(count)]
    pool = kind([ours for ours, _ in pairs])
    try:
        yield pool, [theirs for _, theirs in pairs]
    finally:
        pool.relay.detach()
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def some_answers(rng: random.Random) -> list[bytes]:
    answers = []
    feedback = NO_FEEDBACK
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.3:
            feedback = ZenithFeedback(1, rng.randint(0, 9), 2, 3, 4)
        term = rng.choice([0, TERM, TERM, TERM])
        lsn = START + rng.randint(0, 1000)
        hot = HotStandbyFeedback(rng.randint(0, 9))
        answers.append(AppendResponse(term, lsn, lsn // 2, hot, feedback).encode())
        if rng.random() < 0.2:
            answers.append(AcceptorGreeting(TERM).encode())
    return answers


def knowledge(core: Proposer) -> list[object]:
    peers = [(p.state, p.term, p.flush_lsn, p.commit_lsn, p.feedback) for p in core.peers]
    return [core.commit_lsn, core.truncate_lsn, *peers]


def test_answers_are_cut_anywhere() -> None:
    rng = random.Random(3)
    for _ in range(20):
        answers = some_answers(rng)
        reference = leader()
        for answer in answers:
            for index in range(2):
                reference.receive(index, parse_acceptor_message(answer))
        notice = b"N\0\0\0\x05\0"
        data = b"".join(copy_data(answer) + notice for answer in answers)
        for cut in range(0, len(data), 7):
            with pool_of(2) as (pool, ends):
                pool.link(0).feed(data[:cut])
                pool.link(0).feed(data[cut:])
                for part in (data[:cut], data[cut:]):
                    ends[1].sendall(part)
                    pool.relay.run(0.0, once=True)
                assert knowledge(pool.core) == knowledge(reference)
                assert not pool.reasons
                assert pool.link(1).heard or not data


def test_feedback_is_parsed_when_it_changes() -> None:
    first, second = ZenithFeedback(1, 2, 3, 4, 5), ZenithFeedback(1, 9, 3, 4, 5)
    with pool_of(1) as (pool, _):
        for feedback, changes in ((first, 1), (first, 1), (second, 2), (first, 3)):
            response = AppendResponse(TERM, START + 8, 0, feedback=feedback)
            pool.link(0).feed(copy_data(response.encode()))
            assert pool.core.peers[0].feedback == feedback
            assert pool.feedbacks == changes
        assert not pool.messages


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"d\0\0\0\3", "message length 3"),
        (b"d\0\x10\0\1", "message length 1048577"),
        (b"Q\0\0\0\4", "unexpected message type 'Q'"),
        (b"E\0\0\0\x0dMno WAL\0\0", "no WAL"),
        (copy_data(AppendResponse(TERM).encode()[:55]), "55 bytes is cut short"),
        (copy_data(AppendResponse(TERM).encode()[:56]), "empty feedback"),
        (copy_data(AppendResponse(TERM).encode()[:-1]), "value of 8 bytes"),
        (copy_data(b"abc"), "without a tag"),
        (copy_data(b"x" * 8), "unknown acceptor message"),
    ],
)
def test_answers_that_end_the_session(data: bytes, reason: str) -> None:
    with pool_of(1) as (pool, ends):
        with pytest.raises((LinkError, MessageError), match=reason):
            pool.link(0).feed(data)
        link = pool.link(0)
    with pool_of(1) as (pool, ends):
        link = pool.link(0)
        ends[0].sendall(data + copy_data(AppendResponse(TERM, START + 8).encode()))
        pool.relay.run(0.0)
        assert len(pool.reasons) == 1
        assert reason in pool.reasons[0]
        assert link.closed
        assert pool.core.peers[0].flush_lsn == 0  # nothing behind it was read


def test_damaged_answers() -> None:
    rng = random.Random(4)
    for _ in range(2000):
        answer = bytearray(rng.choice(some_answers(rng)))
        answer[rng.randrange(len(answer))] ^= 1 << rng.randrange(8)
        answer = answer[: rng.choice([len(answer), rng.randint(0, len(answer))])]
        reference = leader()
        expected: list[object] | None = []
        try:
            expected = list(reference.receive(0, parse_acceptor_message(answer)))
        except MessageError:
            expected = None
        with pool_of(1) as (pool, _):
            if expected is None:
                with pytest.raises(MessageError):
                    pool.link(0).feed(copy_data(bytes(answer)))
            else:
                pool.link(0).feed(copy_data(bytes(answer)))
                assert pool.defeats == expected
            assert knowledge(pool.core) == knowledge(reference)


def test_a_long_message_arrives_in_pieces() -> None:
    notice = struct.pack(">BI", ord("N"), 1 << 20) + bytes((1 << 20) - 4)
    with pool_of(1) as (pool, ends):
        data = notice + copy_data(AppendResponse(TERM, START + 8).encode())
        sender = threading.Thread(target=ends[0].sendall, args=(data,))
        sender.start()
        while pool.core.peers[0].flush_lsn == 0:
            pool.relay.run(DEADLINE, once=True)
        sender.join()
        ends[0].sendall(b"c\0\0\0\4")
        pool.relay.run(DEADLINE, once=True)
        assert pool.link(0).finished
        ends[0].close()
        pool.relay.run(DEADLINE, once=True)
        assert pool.reasons == ["connection closed"]


def test_defeat_is_told_once_and_changes_nothing() -> None:
    with pool_of(3) as (pool, ends):
        ends[0].sendall(copy_data(AppendResponse(TERM + 1).encode()))
        pool.relay.run(DEADLINE)
        assert pool.defeats == [Defeated(0, TERM + 1)]
        assert pool.core.peers[0].flush_lsn == 0


# ---- the whole path


def raw(end: socket.socket) -> bytes:
    """What waits in a socket."""
    data = b""
    end.setblocking(False)
    try:
        while piece := end.recv(1 << 20):
            data += piece
    except BlockingIOError:
        pass
    return data


def received(end: socket.socket) -> tuple[list[AppendRequest], bytes]:
    """The AppendRequests that wait in a socket, and their WAL."""
    data, requests, wal = raw(end), [], b""
    while data:
        kind, length = struct.unpack_from(">BI", data)
        payload, data = data[5 : length + 1], data[length + 1 :]
        assert kind == ord("d")
        requests.append(parse_append_request(payload))
        assert requests[-1].begin_lsn == START + len(wal)
        wal += payload[APPEND_HEADER_SIZE:]
    return requests, wal


def status_update(lsn: int) -> bytes:
    """A status update without its last nine bytes, the time and a flag."""
    return struct.pack(">BIcQQQ", ord("d"), 38, b"r", lsn, lsn, lsn)


def attach(pool: Pool) -> socket.socket:
    """Postgres' end of a replication stream."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(DEADLINE)
    pool.relay.attach(ours, START, pool)
    return theirs


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
        assert pool.core.truncate_lsn == START + 200
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
