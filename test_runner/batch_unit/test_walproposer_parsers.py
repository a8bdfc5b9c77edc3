"""The native parsers of the walproposer against plain Python: input that is cut or damaged."""

from __future__ import annotations

import random
import struct
import threading
from itertools import pairwise

import pytest
from batch_unit.relay_support import (
    DEADLINE,
    END,
    ERROR,
    PROPOSER,
    START,
    TERM,
    copy_data,
    keepalive,
    leader,
    pool_of,
    xlog_data,
)

from compute_tools.walproposer._link import LinkError
from compute_tools.walproposer._quorum import PeerState, Quorum
from compute_tools.walproposer._xlog_stream import StreamError, XLogStream
from compute_tools.walproposer.core import Defeated, Proposer
from zenith_utils.safekeeper_messages import (
    NO_FEEDBACK,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MessageError,
    VoteResponse,
    parse_acceptor_message,
)
from zenith_utils.zenith_feedback import ZenithFeedback

# ---- WAL out of a replication stream


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
    flushed: list[int], epoch_start: int, commit: int, previous: int, truncate: int
) -> tuple[int, int, int]:
    """Commit LSN, the one before, and horizon, from what they were and what is durable where."""
    ordered = sorted(flushed)
    quorum = len(flushed) // 2 + 1
    new_commit = ordered[len(flushed) - quorum]
    if new_commit >= epoch_start and new_commit > commit:
        commit, previous = new_commit, commit
    return commit, previous, max(truncate, min(ordered[0], previous))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_commit_and_truncate_horizon(count: int) -> None:
    rng = random.Random(count)
    for _ in range(300):
        quorum = Quorum(count, PROPOSER)
        quorum.term = 5
        quorum.epoch_start_lsn = epoch_start = rng.randint(0, 40)
        flushed = [0] * count
        known = (0, 0, 0)
        for peer in quorum.peers:
            peer.state = PeerState.STREAMING
        for _ in range(5 * count):
            index, lsn = rng.randrange(count), rng.randint(0, 100)
            feedback = ZenithFeedback(ps_writelsn=lsn)
            assert quorum.acknowledge(quorum.peers[index], 5, lsn, lsn // 2, feedback)
            if lsn > flushed[index]:
                flushed[index] = lsn
                known = reference_advance(flushed, epoch_start, *known)
            commit, previous, truncate = known
            assert (quorum.commit_lsn, quorum.previous_commit_lsn) == (commit, previous)
            assert quorum.truncate_lsn == truncate
            assert truncate < commit or not commit
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
            answers.append(VoteResponse(TERM, False, 0, 0, ()).encode())
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
