"""Safekeepers and the token that a compute gives them for its pageserver."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from batch_unit.auth_tokens import MANAGEMENT, OWN, token
from batch_unit.walproposer_support import Safekeeper, wait_until

from safekeeper import delivery
from safekeeper.callmemaybe import Answers, CallMeMaybe, call_pageserver
from safekeeper.delivery import Delivery
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.timeline import Timeline
from safekeeper.timeline_registry import TimelineRegistry
from zenith_utils.conninfo import parse_conninfo, without_password
from zenith_utils.daemonize import bind_listener
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.postgres_backend import CleartextPasswordAuth, Connection, PostgresServer
from zenith_utils.pq_client import PqError, connect

TIMELINE = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
FIRST, SECOND = token(OWN), token(MANAGEMENT)
NAME = "postgresql://no_user:@127.0.0.1:1"


def connstr(password: str, port: int = 1) -> str:
    return f"postgresql://no_user:{password}@127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("conninfo", "rest"),
    [
        (connstr(FIRST), NAME),
        (NAME, NAME),
        ("postgres://u:p%40w@h/db", "postgres://u:@h/db"),
        (
            "postgresql://h:1/db?user=u&password=secret&x=y",
            "postgresql://h:1/db?user=u&password=&x=y",
        ),
        ("postgresql://h:1", "postgresql://h:1"),
        ("host=h password=secret port=1", "host=h password='' port=1"),
        (r"host=h password='se\'cr et' port=1", "host=h password='' port=1"),
        (r"host=h password=se\ cr&et port=1", "host=h password='' port=1"),
        ("postgres://u:p@ss@h/db", "postgres://u:@h/db"),
        ("postgres://u:p@h?x=a@b", "postgres://u:@h?x=a@b"),
        ("host=h port=1", "host=h port=1"),
    ],
)
def test_without_password(conninfo: str, rest: str) -> None:
    assert without_password(conninfo) == rest
    whole, named = parse_conninfo(conninfo), parse_conninfo(rest)
    assert not whole.pop("password", "") or not named["password"]
    named.pop("password", None)
    assert whole == named


class PagesOfOneTenant:
    """A pageserver that lets one token in, and keeps what it was told."""

    def __init__(self) -> None:
        sock = bind_listener("127.0.0.1:0")
        self.port = sock.getsockname()[1]
        self.passwords: list[str] = []
        self.queries: list[str] = []
        auth = CleartextPasswordAuth(self.passwords.append)
        self._server = PostgresServer(sock, lambda: self, name="pages", auth=auth)
        self._server.start()

    def startup(self, conn: Connection) -> None:
        """Nothing to look at."""

    def query(self, conn: Connection, query: str) -> None:
        """Remember it, and say that everything is here."""
        self.queries.append(query)
        if query.startswith("wal_position"):
            conn.send_result([], [("0/100", "0/80")])
        else:
            conn.send_command_complete()

    def stop(self) -> None:
        """End it."""
        self._server.stop(1)


@pytest.fixture
def pages() -> Iterator[PagesOfOneTenant]:
    server = PagesOfOneTenant()
    yield server
    server.stop()


def test_a_call_logs_in_and_names_the_pageserver_without_the_token(
    pages: PagesOfOneTenant,
) -> None:
    """Whoever the pageserver is told to connect to learns nothing that lets in there."""
    reports: list[Any] = []
    target = connstr(FIRST, pages.port)
    call_pageserver(target, [TIMELINE], ("127.0.0.1", 2), lambda *report: reports.append(report))
    assert pages.passwords == [FIRST]
    callmemaybe, position = pages.queries
    assert callmemaybe.startswith("callmemaybe ") and position.startswith("wal_position ")
    assert f"pageserver_connstr={connstr('', pages.port)}'" in callmemaybe
    assert reports == [(TIMELINE, connstr("", pages.port), 0x100, 0x80)]


def test_a_new_token_is_no_other_pageserver() -> None:
    """A stream that runs goes on to count, and the next call is made with the new token."""
    made: list[str] = []

    def call(target: str, timelines: Sequence[TenantTimelineId], listen: Any) -> Answers:
        made.append(target)
        return Answers(len(timelines))

    other = TenantTimelineId(TIMELINE.tenant_id, TimelineId(bytes(16)))
    caller = CallMeMaybe(("127.0.0.1", 1), 0.02, call)
    caller.start()
    try:
        caller.subscribe(TIMELINE, connstr(FIRST))
        wait_until(lambda: connstr(FIRST) in made, "a call")
        caller.stream_started(TIMELINE, NAME)
        caller.subscribe(TIMELINE, connstr(SECOND))
        caller.subscribe(other, "clock")
        wait_until(lambda: made.count("clock") > 3, "some periods")
        assert connstr(SECOND) not in made
        caller.stream_ended(TIMELINE, NAME)
        wait_until(lambda: connstr(SECOND) in made, "a call with the new token")
        caller.unsubscribe(TIMELINE, NAME, unless=lambda: False)
        assert caller.subscriptions == 1
    finally:
        caller.stop()


def test_a_timeline_knows_its_pageserver_by_name(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as helper:
        timeline = Timeline(
            TIMELINE,
            tmp_path,
            SafekeeperMetrics(),
            registry=TimelineRegistry(tmp_path, [TIMELINE], sync=False),
            instance=bytes(16),
            sync=False,
            helper=helper,
        )
        timeline.deliver_to(connstr(FIRST))
        timeline.delivered(NAME, 0x100, 0x80)
        # The new token is there after a restart, and what was reported before counts.
        timeline.deliver_to(connstr(SECOND))
        assert delivery.load(tmp_path) == Delivery(connstr(SECOND), 0x100, 0x80)
        timeline.delivered(NAME, 0x200, 0x100)
        timeline.save_delivery()
        assert delivery.load(tmp_path) == Delivery(connstr(SECOND), 0x200, 0x100)
        timeline.deliver_to(connstr(SECOND, 2))
        assert delivery.load(tmp_path) == Delivery(connstr(SECOND, 2))
        mode = (tmp_path / delivery.DELIVERY_FILE_NAME).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600


def test_no_token_in_a_log_or_an_answer(tmp_path: Path) -> None:
    """Also where what it stands in cannot be understood."""
    safekeeper = Safekeeper(tmp_path / "sk", 1)
    safekeeper.start()
    try:
        for command in ("start_wal_push {}", "START_WAL_PUSH {}", "IDENTIFY {}", "JSON_CTRL {}"):
            with contextlib.closing(
                connect("127.0.0.1", safekeeper.pg_port, user="x", timeout=10)
            ) as conn:
                with pytest.raises(PqError) as error:
                    conn.simple_query(command.format(connstr(FIRST)))
                assert FIRST not in str(error.value)
        log = (safekeeper.directory / "out.log").read_text()
        assert "unsupported command start_wal_push" in log
        assert FIRST not in log
    finally:
        safekeeper.kill()
