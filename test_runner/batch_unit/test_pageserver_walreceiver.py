"""The WAL receiver against senders that the test controls: choice, reconnects, damage, feedback."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from batch_unit.pageserver_support import (
    HttpError,
    PageClient,
    Pageserver,
    Postgres,
    materialise,
    scratch_directory,
    tar_files,
    wait_until,
)

from postgres_ffi.control_file import parse_control_file
from postgres_ffi.distrib import find_distrib
from postgres_ffi.relfile import RelTag
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, wal_file_name
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.postgres_backend import (
    Column,
    Connection,
    ConnectionClosed,
    FatalQueryError,
    PostgresServer,
    QueryError,
)
from zenith_utils.zenith_feedback import ZenithFeedback

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True)
class History:
    """WAL that a compute wrote on top of a fresh timeline, and where its records end."""

    start: Lsn
    wal: bytes
    ends: list[Lsn]
    """Flush positions taken between transactions."""
    system_identifier: int

    def between(self, start: int, end: int) -> bytes:
        """WAL bytes of [start, end)."""
        return self.wal[start - self.start : end - self.start]


@dataclass
class Site:
    """A running pageserver; every test makes a branch of the same timeline."""

    server: Pageserver
    tenant: TenantId
    root: TimelineId
    history: History

    def branch(self) -> Branch:
        """A new branch at the start of the history."""
        timeline = self.server.create_timeline(self.tenant, ancestor=self.root)
        return Branch(self, timeline)


@dataclass(frozen=True)
class Branch:
    """The timeline of one test."""

    site: Site
    timeline: TimelineId

    def callmemaybe(self, sender: Sender) -> None:
        """As a safekeeper does it."""
        self.site.server.query(
            f"callmemaybe {self.site.tenant} {self.timeline} host=127.0.0.1 port={sender.port}"
            f" options='-c ztimelineid={self.timeline} ztenantid={self.site.tenant}"
            " pageserver_connstr=postgresql://no_user:@127.0.0.1:1'"
        )

    def wait_for(self, lsn: Lsn) -> None:
        """Until everything up to ``lsn`` is ingested, and nothing more."""
        server, tenant = self.site.server, self.site.tenant
        wait_until(
            lambda: server.last_record_lsn(tenant, self.timeline) >= lsn, f"ingestion of {lsn}"
        )
        assert server.last_record_lsn(tenant, self.timeline) == lsn


@dataclass
class Sender:
    """A WAL sender that serves ``[history.start, limit)`` and then waits."""

    history: History
    limit: Lsn
    damaged_byte: int | None = None
    """Distance from the start of the history."""
    shift: int = 0
    system_identifier: int | None = None
    keepalive: int = 0
    """Last byte of the keepalives, 0 to send none."""
    starts: list[Lsn] = field(default_factory=list)
    feedback: list[ZenithFeedback] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)
    """Set: end the stream with an error."""

    def __post_init__(self) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self._server = PostgresServer(sock, lambda: self, name="sender")
        self._server.start()
        self.connections: list[Connection] = []

    def startup(self, conn: Connection) -> None:
        """Takes note of the client."""
        self.connections.append(conn)

    def drop(self) -> None:
        """Cuts all connections as a crash would."""
        for conn in list(self.connections):
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Ends the server."""
        self.end.set()
        self.drop()
        self._server.stop(1)

    def query(self, conn: Connection, query: str) -> None:
        """The two commands a receiver needs."""
        if query == "IDENTIFY_SYSTEM":
            identifier = self.system_identifier
            if identifier is None:
                identifier = self.history.system_identifier
            conn.send_result(
                [Column("systemid"), Column("timeline"), Column("xlogpos"), Column("dbname")],
                [[str(identifier), 1, str(self.limit), None]],
            )
        elif query.startswith("START_REPLICATION PHYSICAL "):
            self._stream(conn, Lsn.parse(query.split()[2]))
        else:
            raise QueryError(f"unsupported command {query}")

    def _stream(self, conn: Connection, start: Lsn) -> None:
        self.starts.append(start)
        conn.send_copy_both_response()
        position = int(start)
        while not self.end.is_set():
            # Small pieces with odd borders: records never arrive whole.
            end = min(self.limit, position + 1001)
            if end > position:
                data = bytearray(self.history.between(position, end))
                if self.damaged_byte is not None:
                    offset = self.history.start + self.damaged_byte - position
                    if 0 <= offset < len(data):
                        data[offset] ^= 0xFF
                header = struct.pack(">BQQq", ord("w"), position + self.shift, self.limit, 0)
                conn.send_copy_data(header, data)
                position = end
                continue
            if self.keepalive:
                conn.send_copy_data(struct.pack(">BQqB", ord("k"), position, 0, self.keepalive))
            conn.flush()
            self._receive(conn)
        raise FatalQueryError("failed to run ReplicationConn")

    def _receive(self, conn: Connection) -> None:
        if not conn.has_buffered_input() and not select.select([conn], [], [], 0.02)[0]:
            return
        message = conn.recv_copy_data()
        if message is None:
            raise ConnectionClosed("the receiver left")
        assert message[0] == ord("z")
        length = int.from_bytes(message[1:9], "big")
        assert length == len(message) - 9
        self.feedback.append(ZenithFeedback.parse(message[9:]))


def read_wal(datadir: Path, start: Lsn, end: Lsn) -> bytes:
    """WAL of a stopped server."""
    data = bytearray()
    for segment in range(start // WAL_SEGMENT_SIZE, end // WAL_SEGMENT_SIZE + 1):
        data += (datadir / "pg_wal" / wal_file_name(1, segment)).read_bytes()
    offset = start % WAL_SEGMENT_SIZE
    return bytes(data[offset : offset + end - start])


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    distrib = find_distrib()
    with scratch_directory() as path:
        server = Pageserver(path / "ps", "wait_lsn_timeout='60 s'")
        server.start()
        try:
            tenant = server.create_tenant()
            root = server.create_timeline(tenant)
            start = server.last_record_lsn(tenant, root)
            client = PageClient(server, tenant, root)
            materialise(server.basebackup(tenant, root), path / "data", client, distrib)
            client.close()
            postgres = Postgres(distrib, path / "data", {"autovacuum": "off"})
            postgres.start()
            ends = []
            for i in range(6):
                postgres.execute(f"create table t{i} as select generate_series(1, 5000) a")
                ends.append(Lsn.parse(postgres.execute("select pg_current_wal_flush_lsn()")[0][0]))
            postgres.stop(signal.SIGQUIT)
            control = parse_control_file((path / "data/global/pg_control").read_bytes())
            history = History(
                start, read_wal(path / "data", start, ends[-1]), ends, control.system_identifier
            )
            yield Site(server, tenant, root, history)
        finally:
            server.stop(signal.SIGKILL)


@pytest.fixture
def senders(site: Site) -> Iterator[Callable[..., Sender]]:
    made = []

    def make(limit: int, **more: object) -> Sender:
        sender = Sender(site.history, site.history.ends[limit], **more)  # type: ignore[arg-type]
        made.append(sender)
        return sender

    yield make
    for sender in made:
        sender.stop()


def test_streams_and_reports(site: Site, senders: Callable[..., Sender]) -> None:
    branch, sender = site.branch(), senders(1)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[1])
    assert sender.starts == [site.history.start]
    wait_until(
        lambda: sender.feedback and sender.feedback[-1].ps_writelsn == sender.limit, "feedback"
    )
    assert sender.feedback[-1].ps_flushlsn == site.history.start
    local = site.server.local(site.tenant, branch.timeline)
    assert sender.feedback[-1].current_timeline_size == local["current_logical_size"]

    sender.limit = site.history.ends[2]
    branch.wait_for(site.history.ends[2])
    site.server.query(f"checkpoint {site.tenant} {branch.timeline}")
    wait_until(lambda: sender.feedback[-1].ps_flushlsn == sender.limit, "flush in the feedback")


def test_makes_wal_durable_when_nobody_writes(site: Site, senders: Callable[..., Sender]) -> None:
    """The safekeeper can forget the timeline then; with a compute small layers would pile up."""
    branch, sender = site.branch(), senders(2, keepalive=1)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[2])
    reports = len(sender.feedback)
    wait_until(lambda: len(sender.feedback) > reports + 20, "replies to keepalives")
    assert sender.feedback[-1].ps_flushlsn == site.history.start
    sender.keepalive = 3
    wait_until(lambda: sender.feedback[-1].ps_flushlsn == sender.limit, "the flush")
    # It stays so: a kill loses nothing, and nothing more is written.
    layers = layer_files(site, branch)
    reports = len(sender.feedback)
    wait_until(lambda: len(sender.feedback) > reports + 20, "replies to keepalives")
    assert layer_files(site, branch) == layers
    assert len(layers) == 1


def layer_files(site: Site, branch: Branch) -> list[Path]:
    folder = site.server.workdir / "tenants" / str(site.tenant) / "timelines"
    return sorted(p for p in (folder / str(branch.timeline)).iterdir() if "__" in p.name)


def test_makes_wal_durable_by_time(site: Site, senders: Callable[..., Sender]) -> None:
    branch, sender = site.branch(), senders(0)
    assert site.server.stop() == 0
    site.server.start("checkpoint_timeout='1 s'")
    try:
        for number in (0, 1):
            sender.limit = site.history.ends[number]
            branch.callmemaybe(sender)
            branch.wait_for(sender.limit)
            wait_until(
                lambda: sender.feedback and sender.feedback[-1].ps_flushlsn == sender.limit,
                "the flush",
            )
        # WAL that takes longer than that to arrive makes more.
        assert len(layer_files(site, branch)) >= 2
        # Several layers may have to wait for their turn: all get it.
        branches = [site.branch() for _ in range(5)]
        for other in branches:
            other.callmemaybe(senders(1))
        for other in branches:
            wait_until(lambda other=other: layer_files(site, other), "the flush")  # type: ignore[misc]
    finally:
        site.server.stop()
        site.server.start()


def test_prefers_the_source_that_is_furthest(site: Site, senders: Callable[..., Sender]) -> None:
    branch, behind, ahead = site.branch(), senders(0), senders(3)
    branch.callmemaybe(behind)
    branch.wait_for(site.history.ends[0])
    branch.callmemaybe(ahead)
    behind.drop()
    branch.wait_for(site.history.ends[3])
    assert ahead.starts == [site.history.ends[0]]


def test_leaves_a_source_that_falls_behind(site: Site, senders: Callable[..., Sender]) -> None:
    branch, behind, ahead = site.branch(), senders(0), senders(3)
    branch.callmemaybe(behind)
    branch.wait_for(site.history.ends[0])
    branch.callmemaybe(ahead)  # the connection to the other one is as alive as ever
    branch.wait_for(site.history.ends[3])
    assert ahead.starts == [site.history.ends[0]]
    assert behind.starts == [site.history.start]


def test_reconnects_after_a_lost_connection(site: Site, senders: Callable[..., Sender]) -> None:
    branch, sender = site.branch(), senders(1)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[1])
    sender.drop()
    sender.limit = site.history.ends[4]
    branch.wait_for(site.history.ends[4])
    assert len(sender.starts) == 2


def test_rests_after_the_sender_has_ended_the_stream(
    site: Site, senders: Callable[..., Sender]
) -> None:
    branch, sender = site.branch(), senders(1)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[1])
    sender.end.set()
    wait_until(lambda: f"{sender.port} ended the stream: FATAL" in site.server.log(), "the end")
    sender.end.clear()
    sender.limit = site.history.ends[2]
    connections = len(sender.connections)
    # Another timeline's work shows that time has passed for the receiver, too.
    other, busy = site.branch(), senders(5)
    other.callmemaybe(busy)
    other.wait_for(site.history.ends[5])
    assert len(sender.connections) == connections
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[2])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ({"damaged_byte": 20_000}, "WalDecodeError"),
        ({"shift": 8}, "was sent instead of"),
        ({"system_identifier": 77}, "system identifier 77 differs"),
    ],
)
def test_bad_wal_is_not_ingested(
    site: Site, senders: Callable[..., Sender], damage: dict[str, object], text: str
) -> None:
    branch, bad, good = site.branch(), senders(3, **damage), senders(2)
    branch.callmemaybe(bad)
    marker = f"127.0.0.1:{bad.port}"
    wait_until(
        lambda: any(
            marker in line and text in line
            for line in site.server.log().splitlines()
            if "ERROR" in line
        ),
        "the error in the log",
    )
    connections = len(bad.connections)
    wait_until(lambda: len(bad.connections) > connections + 1, "another attempt")
    errors = [line for line in site.server.log().splitlines() if "ERROR" in line and marker in line]
    assert len(errors) == 1, errors
    client = PageClient(site.server, site.tenant, branch.timeline)
    assert client.exists(RelTag(1663, 5, 1259, 0), 0, latest=True)
    client.close()
    bad.stop()
    branch.callmemaybe(good)
    branch.wait_for(site.history.ends[2])


def test_unknown_system_identifier_is_accepted(site: Site, senders: Callable[..., Sender]) -> None:
    branch, sender = site.branch(), senders(0, system_identifier=0)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[0])


def test_starts_again_only_when_called_after_a_restart(
    site: Site, senders: Callable[..., Sender]
) -> None:
    branch, sender = site.branch(), senders(1)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[1])
    # A graceful stop makes everything received durable.
    assert site.server.stop() == 0
    site.server.start()
    sender.limit = site.history.ends[2]
    assert len(sender.starts) == 1
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[2])
    assert sender.starts[1] == site.history.ends[1]


def test_branches_at_past_lsns(site: Site, senders: Callable[..., Sender]) -> None:
    branch, sender = site.branch(), senders(3)
    branch.callmemaybe(sender)
    branch.wait_for(site.history.ends[3])
    server, ends = site.server, site.history.ends
    child = server.create_timeline(site.tenant, ancestor=branch.timeline, lsn=ends[1])
    local = server.local(site.tenant, child)
    assert local["last_record_lsn"] == local["ancestor_lsn"] == str(ends[1])
    assert local["prev_record_lsn"] == "0/0"
    with pytest.raises(HttpError, match="less than timeline ancestor lsn"):
        server.create_timeline(site.tenant, ancestor=child, lsn=ends[0])

    with scratch_directory() as path:
        archive = server.basebackup(site.tenant, child)
        assert tar_files(archive)["zenith.signal"] == b"PREV LSN: none"
        client = PageClient(server, site.tenant, child)
        materialise(archive, path / "data", client, find_distrib())
        client.close()
        postgres = Postgres(find_distrib(), path / "data", {})
        postgres.start()
        try:
            tables = postgres.execute("select relname from pg_class where relname ~ '^t[0-9]$'")
            assert sorted(tables) == [("t0",), ("t1",)]
            assert postgres.execute("select sum(a) from t1") == [(12502500,)]
        finally:
            postgres.stop(signal.SIGQUIT)


def test_basebackup_waits_for_its_lsn(site: Site, senders: Callable[..., Sender]) -> None:
    branch, sender = site.branch(), senders(0)
    answer: list[bytes] = []
    thread = threading.Thread(
        target=lambda: answer.append(
            site.server.basebackup(site.tenant, branch.timeline, site.history.ends[0])
        )
    )
    thread.start()
    branch.callmemaybe(sender)
    thread.join(30)
    assert tar_files(answer[0])["pg_xact"] is None
