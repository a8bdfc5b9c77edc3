"""Delivery of WAL to pageservers: who is called after a restart, and when a pageserver may rest."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from batch_unit.safekeeper_support import WalWriter
from batch_unit.walproposer_support import Safekeeper, wait_until

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper import control_file, delivery
from safekeeper.consensus import ControlState, ServerInfo
from safekeeper.delivery import DELIVERY_FILE_NAME, Delivery, DeliveryFileError
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.timeline import Timeline
from safekeeper.timeline_registry import TimelineRegistry
from safekeeper.timelines import Timelines
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.postgres_backend import Connection, PostgresServer, QueryError
from zenith_utils.pq_client import PqConnection, PqError, connect
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    AcceptorMessage,
    AppendRequest,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    parse_acceptor_message,
)
from zenith_utils.zenith_feedback import ZenithFeedback

TENANT = TenantId(b"t" * 16)
START = 3 * WAL_SEGMENT_SIZE + 8192 + 24
PAGESERVER = "postgresql://no_user:@127.0.0.1:1"


def timeline_id(number: int) -> TenantTimelineId:
    return TenantTimelineId(TENANT, TimelineId(number.to_bytes(16, "big")))


def timeline_directory(root: Path, number: int) -> Path:
    return root / str(TENANT) / str(timeline_id(number).timeline_id)


def make_timeline(root: Path, number: int, commit_lsn: int, known: Delivery | None) -> Path:
    """A timeline as an earlier run left it; its WAL is not needed to decide about calls."""
    directory = timeline_directory(root, number)
    directory.mkdir(parents=True)
    state = ControlState(
        *timeline_id(number),
        term=1,
        term_history=(TermLsn(1, START),),
        server=ServerInfo(150000, 1, WAL_SEGMENT_SIZE),
        commit_lsn=commit_lsn,
    )
    control_file.store(directory, state, sync=False)
    if known is not None:
        delivery.store(directory, known, sync=False)
    return directory


# ---- the file


def test_file_survives_and_damage_is_found(tmp_path: Path) -> None:
    assert delivery.load(tmp_path) is None
    saved = Delivery("host=pageserver password=gehöim", 0x1_2345_6788)
    delivery.store(tmp_path, saved, sync=True)
    assert delivery.load(tmp_path) == saved
    path = tmp_path / DELIVERY_FILE_NAME
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(DeliveryFileError, match="until a compute is started on it") as error:
            delivery.load(tmp_path)
        assert str(path) in str(error.value)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(DeliveryFileError):
            delivery.load(tmp_path)


def test_damaged_file_harms_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        make_timeline(tmp_path, number, START + 8, Delivery(PAGESERVER, START))
    make_timeline(tmp_path, 3, START + 8, Delivery(PAGESERVER, START + 8))
    make_timeline(tmp_path, 4, START + 8, None)
    damaged = timeline_directory(tmp_path, 1) / DELIVERY_FILE_NAME
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    (timeline_directory(tmp_path, 2) / control_file.CONTROL_FILE_NAME).write_bytes(b"damaged")
    timelines = Timelines(tmp_path, SafekeeperMetrics(), sync=False)
    assert list(timelines.undelivered()) == [(timeline_id(0), PAGESERVER)]
    assert sum(str(damaged) in message for message in caplog.messages) == 1
    assert not timelines.loaded()


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_timeline_remembers_its_pageserver(
    tmp_path: Path, helper: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_timeline(tmp_path, 0, 0, None)

    def load() -> Timeline:
        return Timeline(
            timeline_id(0),
            directory,
            SafekeeperMetrics(),
            registry=TimelineRegistry(tmp_path, [timeline_id(0)], sync=False),
            instance=bytes(16),
            sync=False,
            helper=helper,
        )

    timeline = load()
    timeline.delivered("nobody asked for it", START)
    timeline.save_delivery()
    assert delivery.load(directory) is None
    timeline.deliver_to("first")
    assert delivery.load(directory) == Delivery("first", 0)
    timeline.delivered("first", START)
    timeline.deliver_to("first")
    assert delivery.load(directory) == Delivery("first", 0)
    timeline.save_delivery()
    assert delivery.load(directory) == Delivery("first", START)
    # A pageserver that has lost something says so, and is believed.
    timeline.delivered("first", START - 8)
    timeline.save_delivery()
    assert delivery.load(directory) == Delivery("first", START - 8)
    # What one has does not count for another.
    timeline.deliver_to("second")
    timeline.delivered("first", START + 8)
    timeline.save_delivery()
    assert delivery.load(directory) == Delivery("second", 0)
    # Damage costs the knowledge, not the timeline, and a compute brings it back.
    (directory / DELIVERY_FILE_NAME).write_bytes(b"damaged")
    timeline = load()
    assert any("safekeeper delivery file" in message for message in caplog.messages)
    timeline.deliver_to("second")
    assert delivery.load(directory) == Delivery("second", 0)


# ---- the program


@dataclass
class FakePageserver:
    """Takes calls and does nothing about them."""

    calls: list[str] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        sock = socket.create_server(("127.0.0.1", 0))
        self.connstr = f"postgresql://no_user:@127.0.0.1:{sock.getsockname()[1]}"
        self._server = PostgresServer(sock, lambda: self, name="fake pageserver")
        self._server.start()

    def startup(self, conn: Connection) -> None:
        """Count a connection."""
        with self._lock:
            self.connections += 1

    def query(self, conn: Connection, query: str) -> None:
        """Take a call."""
        words = query.split()
        if words[0] != "callmemaybe":
            raise QueryError(f"unexpected {query}")
        with self._lock:
            self.calls.append(words[2])
        conn.send_command_complete("SELECT 1")

    def stop(self) -> None:
        """End the server."""
        self._server.stop(1)


@pytest.fixture
def pageserver() -> Iterator[FakePageserver]:
    server = FakePageserver()
    yield server
    server.stop()


@pytest.fixture
def safekeeper(tmp_path: Path) -> Iterator[Safekeeper]:
    process = Safekeeper(tmp_path / "sk", 1)
    yield process
    process.kill()


def metric(safekeeper: Safekeeper, name: str) -> int:
    match = re.search(rf"^safekeeper_{name} (\d+)$", safekeeper.metrics(), re.MULTILINE)
    assert match is not None, name
    return int(match[1])


def test_200_timelines_at_rest_cost_nothing(
    pageserver: FakePageserver, safekeeper: Safekeeper
) -> None:
    """After a restart only the pageserver of WAL that it may lack is called, all in one go."""
    for number in range(200):
        known = Delivery(pageserver.connstr, START + 64)
        make_timeline(safekeeper.directory, number, START + 64, known)
    waiting = {str(timeline_id(number).timeline_id) for number in (200, 201, 202)}
    for number in (200, 201, 202):
        known = Delivery(pageserver.connstr, START)
        make_timeline(safekeeper.directory, number, START + 64, known)
    for _ in range(2):
        before = pageserver.connections
        pageserver.calls.clear()
        safekeeper.start()
        wait_until(lambda: len(pageserver.calls) >= 12, "the calls")
        assert set(pageserver.calls) == waiting
        assert pageserver.connections - before <= len(pageserver.calls) / 3 + 1
        assert metric(safekeeper, "callmemaybe_subscriptions") == 3
        assert metric(safekeeper, "pageserver_streams") == 0
        # None was loaded, which would have cost reading its WAL.
        assert "loaded timeline" not in (safekeeper.directory / "out.log").read_text()
        safekeeper.kill()


@dataclass
class Proposer:
    """A compute's session, with as much of the protocol as it takes to commit WAL."""

    safekeeper: Safekeeper
    wal: WalWriter
    pageserver: str
    sent: int = START
    """End of the WAL that the safekeeper has."""
    number: int = 0

    def __enter__(self) -> Proposer:
        self.conn = session(self.safekeeper, self.number, "proposer")
        self.conn.start_copy_both(f"START_WAL_PUSH {self.pageserver}")
        tenant, timeline = timeline_id(self.number)
        greeting = ProposerGreeting(
            150000, bytes(16), 1, timeline, tenant, 1, WAL_SEGMENT_SIZE
        ).encode()
        answer = self._ask(greeting)
        assert isinstance(answer, AcceptorGreeting)
        self.term = answer.term + 1
        self._ask(VoteRequest(self.term).encode())
        history = tuple(TermLsn(term, START) for term in range(1, self.term + 1))
        self.conn.send_copy_data(ProposerElected(self.term, self.sent, history).encode())
        return self

    def __exit__(self, *exc: object) -> None:
        self.conn.close()

    def commit(self) -> int:
        """Push what is new in the WAL and have it known as committed; its end."""
        begin, end = self.sent, self.wal.lsn
        data = bytes(self.wal.data[begin - self.wal.start_lsn :])
        self._append(begin, end, 0, data)
        self._append(end, end, end, b"")
        self.sent = end
        return end

    def _append(self, begin: int, end: int, commit: int, data: bytes) -> None:
        request = AppendRequest(self.term, START, begin, end, commit, START, bytes(16))
        self._ask(request.encode_header() + data)

    def _ask(self, message: bytes) -> AcceptorMessage:
        self.conn.send_copy_data(message)
        reply = self.conn.recv_copy_data(timeout=10)
        assert reply is not None
        return parse_acceptor_message(reply)


def session(safekeeper: Safekeeper, number: int, name: str, pageserver: str = "") -> PqConnection:
    tenant, timeline = timeline_id(number)
    options = f"-c ztimelineid={timeline} ztenantid={tenant} pageserver_connstr={pageserver}"
    return connect(
        "127.0.0.1", safekeeper.pg_port, user="test", options=options, application_name=name
    )


def report(conn: PqConnection, write_lsn: int, flush_lsn: int) -> None:
    payload = ZenithFeedback(8192, write_lsn, flush_lsn, 0, 5).encode()
    conn.send_copy_data(b"z" + len(payload).to_bytes(8, "big"), payload)


def next_keepalive(conn: PqConnection) -> int:
    """Last byte of the next keepalive."""
    while True:
        message = conn.recv_copy_data(timeout=10)
        assert message is not None
        if message[0] == ord("k"):
            return message[17]


def persisted(safekeeper: Safekeeper, number: int) -> Delivery | None:
    return delivery.load(timeline_directory(safekeeper.directory, number))


def test_stream_lasts_until_wal_is_durable(
    pageserver: FakePageserver, safekeeper: Safekeeper
) -> None:
    """Having received the WAL is not enough: the pageserver may forget what it has in memory."""
    safekeeper.start()
    wal = WalWriter(START)
    wal.until(START + 20_000)
    with Proposer(safekeeper, wal, pageserver.connstr) as proposer:
        assert persisted(safekeeper, 0) == Delivery(pageserver.connstr, 0)
        end = proposer.commit()
        with contextlib.closing(session(safekeeper, 0, "ps", pageserver.connstr)) as conn:
            conn.start_copy_both(f"START_REPLICATION PHYSICAL {START >> 32:X}/{START:X}")
            report(conn, end, end)
            assert next_keepalive(conn) == 1
            proposer.__exit__()
            # All is known to be durable and nobody writes: the end.
            with pytest.raises(PqError, match="end streaming, no compute is connected"):
                for _ in range(3):
                    next_keepalive(conn)
    wait_until(lambda: metric(safekeeper, "callmemaybe_subscriptions") == 0, "the end of calls")
    assert persisted(safekeeper, 0) == Delivery(pageserver.connstr, end)

    wal.until(wal.lsn + 20_000)
    with Proposer(safekeeper, wal, pageserver.connstr, sent=end) as proposer:
        end = proposer.commit()
    pageserver.calls.clear()
    with contextlib.closing(session(safekeeper, 0, "ps", pageserver.connstr)) as conn:
        conn.start_copy_both(f"START_REPLICATION PHYSICAL {START >> 32:X}/{START:X}")
        report(conn, end, end - 8)
        # It is told that nobody writes, and called again when it is lost.
        wait_until(lambda: next_keepalive(conn) == 3, "word that nobody writes")
        assert [next_keepalive(conn) for _ in range(3)] == [3, 3, 3]
        assert metric(safekeeper, "pageserver_streams") == 1
    wait_until(lambda: len(pageserver.calls) >= 2, "calls after the stream")
    # So it is after a crash of both.
    safekeeper.kill()
    pageserver.calls.clear()
    safekeeper.start()
    wait_until(lambda: len(pageserver.calls) >= 2, "calls after a restart")
    with contextlib.closing(session(safekeeper, 0, "ps", pageserver.connstr)) as conn:
        conn.start_copy_both(f"START_REPLICATION PHYSICAL {START >> 32:X}/{START:X}")
        report(conn, end, end)
        with pytest.raises(PqError, match="end streaming"):
            for _ in range(3):
                next_keepalive(conn)
    wait_until(lambda: metric(safekeeper, "callmemaybe_subscriptions") == 0, "the end of calls")
    safekeeper.kill()
    calls = len(pageserver.calls)
    safekeeper.start()
    assert metric(safekeeper, "callmemaybe_subscriptions") == 0
    assert len(pageserver.calls) == calls
