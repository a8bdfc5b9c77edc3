"""The safekeeper's libpq service as its clients see it: parameters, commands, replies, errors."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from batch_unit.walproposer_support import Safekeeper
from batch_unit.workspace import temporary_workspace

from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.pq_client import PqConnection, PqError, connect

START = 0x16B9188
RECORD = 64
POSTGRES_EPOCH = 946_684_800
PAGESERVER = "postgresql://no_user@127.0.0.1:1"


@pytest.fixture(scope="module")
def safekeeper() -> Iterator[Safekeeper]:
    with temporary_workspace() as directory:
        safekeeper = Safekeeper(directory / "sk", 1)
        safekeeper.start()
        try:
            yield safekeeper
            assert "Traceback" not in (safekeeper.directory / "out.log").read_text()
        finally:
            safekeeper.kill()


class Timeline:
    """A timeline that nobody else uses, and sessions about it."""

    def __init__(self, safekeeper: Safekeeper) -> None:
        self.safekeeper = safekeeper
        self.tenant, self.timeline = TenantId.generate(), TimelineId.generate()
        self.end = START

    def connect(self, *more: str, application: str = "test") -> PqConnection:
        """A session with these words in its options."""
        options = " ".join(
            ["-c", f"ztimelineid={self.timeline}", f"ztenantid={self.tenant}", *more]
        )
        return connect(
            "127.0.0.1",
            self.safekeeper.pg_port,
            user="test",
            options=options,
            application_name=application,
            timeout=10,
        )

    def append(self, *, commit: bool, term: int = 1) -> dict[str, Any]:
        """One record more."""
        request = {
            "lm_prefix": "prefix",
            "lm_message": "message",
            "set_commit_lsn": commit,
            "send_proposer_elected": self.end == START,
            "term": term,
            "begin_lsn": self.end,
            "epoch_start_lsn": START,
            "truncate_lsn": START,
        }
        with self.connect() as conn:
            ((text,),) = conn.simple_query(f"JSON_CTRL {json.dumps(request)}")
        assert text is not None
        answer: dict[str, Any] = json.loads(text)
        self.end = answer["inserted_wal"]["end_lsn"]
        return answer


@pytest.fixture
def timeline(safekeeper: Safekeeper) -> Timeline:
    return Timeline(safekeeper)


COMMANDS = ("IDENTIFY_SYSTEM", "START_REPLICATION 0/0", "JSON_CTRL {}", "START_WAL_PUSH")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "tenantid is required"),
        (f"-c ztimelineid={'1' * 32}", "tenantid is required"),
        (f"-c ztenantid={'1' * 32}", "timelineid is required"),
        (f"-c ztenantid={'1' * 31} ztimelineid={'1' * 32}", "invalid tenant id '1{31}'"),
        (
            "-c ztenantid=11111111-1111-1111-1111-111111111111 ztimelineid=x",
            "invalid tenant id '11111111-1111",
        ),
        (f"-c ztenantid={'1' * 32} ztimelineid=zz", "invalid timeline id 'zz'"),
    ],
)
def test_ids_are_required(safekeeper: Safekeeper, command: str, options: str, message: str) -> None:
    """An error that ends neither the connection nor anything else."""
    with connect("127.0.0.1", safekeeper.pg_port, user="u", options=options, timeout=10) as conn:
        for _ in range(2):
            with pytest.raises(PqError, match=message):
                conn.simple_query(command)


@pytest.mark.parametrize(
    "command",
    [
        "SELECT 1",
        "identify_system",
        "START_REPLICATION",
        "START_REPLICATION LOGICAL 0/0",
        "JSON_CTRLX",
    ],
)
def test_unsupported_commands(timeline: Timeline, command: str) -> None:
    with timeline.connect() as conn:
        with pytest.raises(PqError) as caught:
            conn.simple_query(command)
        assert caught.value.message == f"unsupported command {command}"
        assert conn.simple_query("SET application_name TO 'x'") == []


def test_ids_as_plain_parameters(timeline: Timeline) -> None:
    """Beside `user`, for clients that can send what they like."""
    timeline.append(commit=True)
    params = {"user": "u", "ztenantid": timeline.tenant, "ztimelineid": timeline.timeline}
    words = [str(word).encode() for pair in params.items() for word in pair]
    startup = struct.pack(">I", 3 << 16) + b"".join(word + b"\0" for word in words) + b"\0"
    query = b"IDENTIFY_SYSTEM\0"
    with socket.create_connection(("127.0.0.1", timeline.safekeeper.pg_port), timeout=10) as sock:
        sock.sendall(struct.pack(">I", len(startup) + 4) + startup)
        sock.sendall(b"Q" + struct.pack(">I", len(query) + 4) + query + b"X\0\0\0\4")
        answer = b""
        while data := sock.recv(65536):
            answer += data
    assert lsn_text(timeline.end).encode() in answer


def test_who_creates_timelines(timeline: Timeline) -> None:
    """Those who write; asking for one that does not exist is an error that names it."""
    name = f"timeline {timeline.tenant}-{timeline.timeline} is not on this safekeeper"
    for command in ("IDENTIFY_SYSTEM", f"START_REPLICATION {lsn_text(START)}"):
        with (
            timeline.connect(f"pageserver_connstr={PAGESERVER}") as conn,
            pytest.raises(PqError, match=name),
        ):
            conn.simple_query(command)
    timeline.append(commit=False)
    with timeline.connect() as conn:
        assert len(conn.simple_query("IDENTIFY_SYSTEM")) == 1


def test_identify_system(timeline: Timeline) -> None:
    """One row as of a stock walsender; the position is how far WAL is durable here."""
    timeline.append(commit=False)
    options = f"-c ztimelineid={timeline.timeline} ztenantid={timeline.tenant}"
    conn = psycopg2.connect(
        host="127.0.0.1",
        port=timeline.safekeeper.pg_port,
        user="u",
        replication="0",
        options=options,
    )
    with contextlib.closing(conn), conn.cursor() as cursor:
        conn.autocommit = True
        cursor.execute("IDENTIFY_SYSTEM")
        columns = [(column.name, column.type_code) for column in cursor.description or ()]
        assert columns == [("systemid", 25), ("timeline", 23), ("xlogpos", 25), ("dbname", 25)]
        assert cursor.fetchall() == [("0", 1, lsn_text(START + RECORD), None)]


def test_streaming_needs_a_pageserver(timeline: Timeline) -> None:
    timeline.append(commit=True)
    with timeline.connect() as conn:
        with pytest.raises(PqError, match="pageserver_connstr is required"):
            conn.simple_query(f"START_REPLICATION PHYSICAL {lsn_text(START)}")
        # The connection is as good as before.
        assert len(conn.simple_query("IDENTIFY_SYSTEM")) == 1
    with (
        timeline.connect(f"pageserver_connstr={PAGESERVER}") as conn,
        pytest.raises(PqError, match=r"invalid LSN '123456789/0'"),
    ):
        conn.simple_query("START_REPLICATION 123456789/0")


@pytest.mark.parametrize("physical", ["PHYSICAL ", ""])
def test_stream_of_committed_wal(timeline: Timeline, physical: str) -> None:
    """XLogData up to the commit LSN, then keepalives; and what is not committed stays here."""
    timeline.append(commit=True)
    committed = timeline.end
    timeline.append(commit=False)
    with timeline.connect(f"pageserver_connstr={PAGESERVER}") as conn:
        conn.start_copy_both(f"START_REPLICATION {physical}{lsn_text(START)}")
        message = conn.recv_copy_data(timeout=10)
        assert message is not None
        kind, begin, end, sent_at = struct.unpack_from(">cQQq", message)
        assert (kind, begin, end) == (b"w", START, committed)
        assert len(message) - 25 == committed - START
        # Microseconds since 2000-01-01.
        assert sent_at / 1e6 + POSTGRES_EPOCH > 1_700_000_000
        message = conn.recv_copy_data(timeout=10)
        assert message is not None and len(message) == 18
        kind, position, _, reply_requested = struct.unpack(">cQqB", message)
        assert (kind, position) == (b"k", committed)
        assert reply_requested & 1


def test_stream_for_recovery(timeline: Timeline) -> None:
    """A proposer gets what is not committed, too; the stream ends where the WAL does."""
    timeline.append(commit=True)
    timeline.append(commit=False)
    with timeline.connect(application="wal_proposer_recovery") as conn:
        conn.start_copy_both(f"START_REPLICATION PHYSICAL {lsn_text(START)}")
        data = b""
        while (message := conn.recv_copy_data(timeout=10)) is not None:
            assert message[0] == ord("w")
            data += message[25:]
        conn.end_copy()
    assert len(data) == timeline.end - START == 2 * RECORD


def test_reply_to_json_ctrl(timeline: Timeline) -> None:
    """All that scripts read of it, as plain integers."""
    answer = timeline.append(commit=True)
    inserted = answer["inserted_wal"]
    assert (inserted["begin_lsn"], inserted["end_lsn"]) == (START, START + RECORD)
    response = inserted["append_response"]
    assert {key: response[key] for key in ("term", "flush_lsn", "commit_lsn")} == {
        "term": 1,
        "flush_lsn": START + RECORD,
        "commit_lsn": START + RECORD,
    }
    state = answer["state"]
    assert (state["tenant_id"], state["timeline_id"]) == (
        str(timeline.tenant),
        str(timeline.timeline),
    )
    assert state["commit_lsn"] == START + RECORD
    assert state["acceptor_state"] == {"term": 1, "term_history": [{"term": 1, "lsn": START}]}
