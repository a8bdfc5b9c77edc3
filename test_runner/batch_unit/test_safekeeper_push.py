"""A proposer's session with a safekeeper: what arrives in pieces, in batches, or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from batch_unit.safekeeper_support import WalWriter

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.receive_wal import PushSession
from safekeeper.timeline import Timeline, TimelineFailedError
from safekeeper.timelines import Timelines
from safekeeper.wal_files import SegmentReader
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.postgres_connection import Connection, FatalQueryError, QueryError
from zenith_utils.safekeeper_messages import (
    MAX_SEND_SIZE,
    AcceptorMessage,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    VoteResponse,
    parse_acceptor_message,
)
from zenith_utils.zenith_feedback import ZenithFeedback

TIMELINE = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
START = WAL_SEGMENT_SIZE - 3 * 8192 + 24
"""Three pages before the end of a segment."""
TERM = 3


def frame(payload: bytes, kind: bytes = b"d") -> bytes:
    """A message of the wire protocol."""
    return kind + struct.pack(">I", len(payload) + 4) + payload


def opening(term: int = TERM) -> bytes:
    """Greeting, vote and election of a new timeline's first leader."""
    greeting = ProposerGreeting(
        150000, b"p" * 16, 42, TIMELINE.timeline_id, TIMELINE.tenant_id, 1, WAL_SEGMENT_SIZE
    )
    elected = ProposerElected(term, START, (TermLsn(term, START),))
    messages = (greeting, VoteRequest(term), elected)
    return b"".join(frame(message.encode()) for message in messages)


def append(begin: int, data: bytes, *, commit: int = 0, term: int = TERM) -> bytes:
    """An AppendRequest, framed."""
    header = AppendRequest(term, START, begin, begin + len(data), commit, START, b"p" * 16)
    return frame(header.encode_header() + data)


def appends(wal: WalWriter, sizes: Sequence[int]) -> bytes:
    """All of some WAL in requests of these sizes in turn."""
    data, at, number = bytes(wal.data), 0, 0
    out = b""
    while at < len(data):
        piece = data[at : at + sizes[number % len(sizes)]]
        out += append(START + at, piece, commit=START + at)
        at += len(piece)
        number += 1
    return out


class Client:
    """The proposer's end of a session that a thread serves."""

    def __init__(self, timelines: Timelines) -> None:
        self.sock, server = socket.socketpair()
        self.sock.settimeout(30)
        self.conn = Connection(server, "test")
        self.error: Exception | None = None
        self._session = PushSession(self.conn, timelines, TIMELINE, lambda timeline: None)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._file = self.sock.makefile("rb")
        assert self._message()[0] == b"W"

    def _run(self) -> None:
        try:
            self._session.run()
        except Exception as error:
            self.error = error
        finally:
            self.conn.close()

    def _message(self) -> tuple[bytes, bytes]:
        head = self._file.read(5)
        if not head:
            raise EOFError
        (length,) = struct.unpack(">I", head[1:])
        return head[:1], self._file.read(length - 4)

    def answer(self) -> AcceptorMessage:
        """The next one."""
        kind, payload = self._message()
        assert kind == b"d"
        return parse_acceptor_message(payload)

    def flushed(self, lsn: int) -> AppendResponse:
        """The answer that says so; earlier ones are passed."""
        while True:
            answer = self.answer()
            if isinstance(answer, AppendResponse) and answer.flush_lsn >= lsn:
                return answer

    def end(self) -> Exception | None:
        """Send nothing more and wait for the end of the session; how it ended."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def timelines(tmp_path: Path) -> Timelines:
    return Timelines(tmp_path, SafekeeperMetrics(), sync=True)


@pytest.fixture
def client(timelines: Timelines) -> Iterator[Client]:
    client = Client(timelines)
    try:
        yield client
    finally:
        client.end()
        client.sock.close()


def stored(timeline: Timeline, size: int) -> bytes:
    """WAL from its start on, out of the files."""
    reader = SegmentReader(timeline.directory)
    data = b""
    while len(data) < size:
        data += reader.read(START + len(data), size - len(data))
    reader.close()
    return data


def wal_of(size: int, seed: int = 1) -> WalWriter:
    """Some records that go beyond the segment."""
    wal = WalWriter(START, seed)
    wal.until(START + size)
    return wal


@pytest.mark.parametrize("pieces", [1, 7, 4096, 1 << 20], ids="pieces-of-{}".format)
def test_any_cut_of_the_stream(timelines: Timelines, client: Client, pieces: int) -> None:
    """However messages are cut into packets and WAL into messages: the same WAL and answers."""
    wal = wal_of(64 << 10)
    sent = opening() + appends(wal, (1, 300, 5000, 8, 20000))
    if pieces == 1:  # one by one where it matters: headers, and one request of WAL
        head = len(opening()) + 2000
        for at in range(head):
            client.sock.sendall(sent[at : at + 1])
        client.sock.sendall(sent[head:])
    else:
        for at in range(0, len(sent), pieces):
            client.sock.sendall(sent[at : at + pieces])
    answer = client.flushed(wal.ends[-1])
    assert (answer.term, answer.flush_lsn) == (TERM, wal.ends[-1])
    timeline = timelines.get(TIMELINE)
    assert stored(timeline, len(wal.data)) == wal.data
    assert timeline.acceptor.flush_lsn == wal.ends[-1]
    assert START < timeline.commit_lsn <= wal.ends[-1]
    assert client.end() is None
    # The commit LSN survives, and so does the end of WAL.
    assert timelines.get(TIMELINE).acceptor.state.commit_lsn == timeline.commit_lsn


def test_what_was_sent_before_the_end_counts(timelines: Timelines, client: Client) -> None:
    """WAL is flushed although its sender has gone, in the middle of another message too."""
    wal = wal_of(40 << 10)
    cut = append(wal.lsn, b"x" * 500)[:300]
    client.sock.sendall(opening() + appends(wal, (9000,)) + cut)
    assert client.end() is None
    assert timelines.get(TIMELINE).flush_lsn == wal.ends[-1]


def test_answers_carry_feedback(timelines: Timelines, client: Client) -> None:
    """What standbys and the pageserver report reaches the proposer with the next answer."""
    wal = wal_of(100)
    client.sock.sendall(opening())
    assert isinstance(client.answer(), object)
    assert isinstance(client.answer(), VoteResponse)
    timeline = timelines.get(TIMELINE)
    client.sock.sendall(append(START, bytes(wal.data)))
    assert client.flushed(wal.lsn).feedback == ZenithFeedback()
    feedback = ZenithFeedback(10, 20, 30, 40, 50)
    standby = HotStandbyFeedback(1, 700, 800)
    timeline.record_feedback(feedback)
    timeline.record_hs_feedback("standby", standby)
    client.sock.sendall(append(wal.lsn, b"", commit=wal.lsn))
    saved = timeline.acceptor.state.commit_lsn
    assert client.answer() == AppendResponse(TERM, wal.lsn, saved, standby, feedback)
    timeline.record_hs_feedback("standby", None)
    client.sock.sendall(append(wal.lsn, b""))
    answer = client.answer()
    assert isinstance(answer, AppendResponse)
    assert answer.hs_feedback == HotStandbyFeedback()
    assert answer.commit_lsn == timeline.acceptor.state.commit_lsn


def test_another_leader(timelines: Timelines, client: Client) -> None:
    """A leader that was replaced is told the new term; nothing of its WAL is taken."""
    wal = wal_of(1000)
    client.sock.sendall(opening() + append(START, bytes(wal.data)))
    client.flushed(wal.lsn)
    other = Client(timelines)
    try:
        greeting = opening()[: len(opening()) - len(frame(bytes(60)))]
        other.sock.sendall(greeting.replace(struct.pack("<Q", TERM), struct.pack("<Q", TERM + 1)))
        answer = other.answer()
        while not isinstance(answer, VoteResponse):
            answer = other.answer()
        assert (answer.term, answer.vote_given) == (TERM + 1, True)
        client.sock.sendall(append(wal.lsn, b"z" * 100))
        assert client.answer() == AppendResponse(TERM + 1)
        assert timelines.get(TIMELINE).acceptor.next_lsn == wal.lsn
    finally:
        other.end()
        other.sock.close()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (append(START + 8, b"x" * 8), "gap"),
        (append(START, b"x" * 8, term=TERM + 1), "without an election"),
        (append(START, b"x" * (MAX_SEND_SIZE + 8)), "MAX_SEND_SIZE"),
        (frame(append(START, b"x" * 8)[5:-1]), "AppendRequest for 8 bytes"),
        (frame(b"a" + bytes(9)), "cut short"),
        (frame(b"a\1" + bytes(90)), "AppendRequest"),
        (frame(b"q" * 20), "unknown proposer message"),
        (append(START, b"\xff" * 400), "invalid WAL"),
    ],
)
def test_breaches_end_the_session(
    timelines: Timelines, client: Client, message: bytes, text: str
) -> None:
    """A clear error, and nothing of the message is kept."""
    client.sock.sendall(opening() + message)
    error = client.end()
    assert isinstance(error, QueryError)
    assert text in error.message
    assert timelines.get(TIMELINE).flush_lsn in (0, START)


def test_other_messages_of_a_copy(timelines: Timelines, client: Client) -> None:
    """Flush and Sync mean nothing, CopyDone ends the session, impossible lengths too."""
    wal = wal_of(100)
    client.sock.sendall(opening() + frame(b"", b"H") + frame(b"", b"S"))
    client.sock.sendall(append(START, bytes(wal.data)) + frame(b"", b"c") + append(wal.lsn, b"x"))
    assert client.flushed(wal.lsn)
    assert client.end() is None
    second = Client(timelines)
    second.sock.sendall(opening(TERM + 1)[:109] + b"d\0\0\0\1rest")
    assert "invalid message length 1" in str(second.end())
    second.sock.close()


def test_random_batches(timelines: Timelines, client: Client) -> None:
    """Requests, heartbeats and packets of random sizes over several segments."""
    rng = random.Random(7)
    wal = WalWriter(START, 7)
    wal.until(START + 2 * WAL_SEGMENT_SIZE, 30_000)
    data = bytes(wal.data)
    client.sock.sendall(opening())
    reader = threading.Thread(target=client.flushed, args=(wal.ends[-1],))
    reader.start()
    at, out = 0, b""
    while at < len(data):
        size = rng.choice((rng.randint(1, 200), rng.randint(1, MAX_SEND_SIZE)))
        out += append(START + at, data[at : at + size], commit=START + at)
        at = min(at + size, len(data))
        if rng.random() < 0.1:
            out += append(START + at, b"", commit=START + at)
        while len(out) > rng.randint(0, 300_000):
            cut = rng.randint(1, len(out))
            client.sock.sendall(out[:cut])
            out = out[cut:]
    client.sock.sendall(out)
    reader.join(60)
    assert not reader.is_alive()
    timeline = timelines.get(TIMELINE)
    assert timeline.flush_lsn == wal.ends[-1]
    assert stored(timeline, len(data)) == data


@pytest.mark.parametrize(
    ("device", "for_good"), [("/dev/full", False), ("/dev/null", True)], ids=["write", "fdatasync"]
)
def test_disk_fails(timelines: Timelines, client: Client, device: str, for_good: bool) -> None:
    """Nothing is answered; only after a failed fdatasync nobody knows what the disk has."""
    wal = wal_of(2000)
    middle = wal.ends[2]
    client.sock.sendall(opening() + append(START, bytes(wal.data[: middle - START])))
    client.flushed(middle)
    timeline = timelines.get(TIMELINE)
    # The one takes no bytes; the other takes them, and cannot be synced.
    broken = os.open(device, os.O_RDWR)
    os.dup2(broken, timeline.wal_end.fd)
    os.close(broken)
    client.sock.sendall(append(middle, bytes(wal.data[middle - START :])))
    with pytest.raises(EOFError):
        client.answer()
    assert isinstance(client.end(), FatalQueryError)
    assert timeline.failure is not None
    assert timeline.failed_for_good == for_good
    if for_good:
        with pytest.raises(TimelineFailedError):
            timelines.get(TIMELINE)
    else:
        assert timelines.get(TIMELINE).flush_lsn == middle
