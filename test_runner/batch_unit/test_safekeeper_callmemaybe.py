"""Calls to a pageserver that does not answer for some timelines: the others have their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from batch_unit.walproposer_support import wait_until

from safekeeper import callmemaybe
from safekeeper.callmemaybe import Answers, CallMeMaybe, call_pageserver
from zenith_utils.daemonize import bind_listener
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.postgres_backend import Connection, FatalQueryError, PostgresServer

LISTEN = ("127.0.0.1", 1)
PERIOD = 0.02
BATCH = 64


def timeline(number: int) -> TenantTimelineId:
    return TenantTimelineId(TenantId(b"t" * 16), TimelineId(number.to_bytes(16, "big")))


class Attempts:
    """Records the connections to a pageserver that does not answer for some timelines."""

    def __init__(self, *hanging: TenantTimelineId) -> None:
        self.hanging = set(hanging)
        self.batches: list[list[TenantTimelineId]] = []
        self.answered: list[TenantTimelineId] = []

    def __call__(self, connstr: str, timelines: Sequence[TenantTimelineId], listen: Any) -> Answers:
        """Answer up to the first one that hangs."""
        self.batches.append(list(timelines))
        for number, timeline_id in enumerate(timelines):
            if timeline_id in self.hanging:
                return Answers(number, broken="no answer")
            self.answered.append(timeline_id)
        return Answers(len(timelines))

    def position(self, batch: Sequence[TenantTimelineId]) -> int:
        """Where in a batch the first one is that hangs; its length if none does."""
        found = (number for number, t in enumerate(batch) if t in self.hanging)
        return next(found, len(batch))


class Pages:
    """A pageserver that does not answer for one timeline until told, or dies of it."""

    def __init__(self) -> None:
        sock = bind_listener("127.0.0.1:0")
        self.connstr = f"host=127.0.0.1 port={sock.getsockname()[1]}"
        self.called: list[str] = []
        self.hanging = ""
        self.fatal = ""
        self.released = threading.Event()
        self._server = PostgresServer(sock, lambda: self, name="pages")
        self._server.start()

    def startup(self, conn: Connection) -> None:
        """Nothing to look at."""

    def query(self, conn: Connection, query: str) -> None:
        """A call, or the question for the position."""
        command, _, timeline_id, *_ = query.split()
        if command == "wal_position":
            conn.send_result([], [("0/100", "0/80")])
            return
        self.called.append(timeline_id)
        if timeline_id == self.hanging:
            assert self.released.wait(60)
        if timeline_id == self.fatal:
            raise FatalQueryError("it is too much")
        conn.send_command_complete()

    def stop(self) -> None:
        """End it."""
        self.released.set()
        self._server.stop(1)


@pytest.fixture
def pages() -> Iterator[Pages]:
    server = Pages()
    yield server
    server.stop()


def test_a_call_without_an_answer(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs those behind it one attempt; it is made again, and forgiven when it is answered."""
    monkeypatch.setattr(callmemaybe, "_CONNECT_TIMEOUT", 0.5)
    reported: list[TenantTimelineId] = []

    def call(connstr: str, timelines: Sequence[TenantTimelineId], listen: Any) -> Answers:
        return call_pageserver(connstr, timelines, listen, lambda t, *_: reported.append(t))

    hanging, others = timeline(0), [timeline(1), timeline(2)]
    pages.hanging = str(hanging.timeline_id)
    caller = CallMeMaybe(LISTEN, PERIOD, call)
    for timeline_id in (hanging, *others):
        caller.subscribe(timeline_id, pages.connstr)
    caller.start()
    try:
        wait_until(lambda: all(reported.count(t) >= 3 for t in others), "calls of the others")
        assert hanging not in reported
        pages.released.set()
        wait_until(lambda: reported.count(hanging) >= 3, "calls of the one that hung")
    finally:
        caller.stop()


def test_those_not_reached_go_first(caplog: pytest.LogCaptureFixture) -> None:
    hanging, count = timeline(20), 200
    attempts = Attempts(hanging)
    caller = CallMeMaybe(LISTEN, PERIOD, attempts)
    for number in range(count):
        caller.subscribe(timeline(number), "pages")
    caller.start()
    try:
        wait_until(lambda: len(attempts.answered) >= 20 * count, "some rounds")
    finally:
        caller.stop()
    first, second, *later = attempts.batches
    assert first == [timeline(number) for number in range(BATCH)]
    assert second[: BATCH - 1] == [timeline(number) for number in range(21, 20 + BATCH)]
    # Nobody is called twice before all others that answer have been called.
    assert len(set(attempts.answered[: count - 1])) == count - 1
    broken = [batch for batch in later if hanging in batch]
    assert all(batch[-1] == hanging for batch in broken)
    # Pauses double: 20 rounds take 20 periods at least.
    assert len(broken) <= 16
    message = f"timeline {hanging}: pageserver pages does not answer callmemaybe: no answer"
    assert caplog.messages.count(message) == 1
    assert not any("failed" in text or "succeeds" in text for text in caplog.messages)


def test_several_that_hang() -> None:
    """Each attempt meets one of them at most, behind all others, and each is tried again."""
    hanging = [timeline(number) for number in range(4)]
    others = [timeline(number) for number in range(4, 8)]
    attempts = Attempts(*hanging)
    caller = CallMeMaybe(LISTEN, PERIOD, attempts)
    for timeline_id in (*hanging, *others):
        caller.subscribe(timeline_id, "pages")
    caller.start()

    def tried(timeline_id: TenantTimelineId) -> int:
        return sum(batch[attempts.position(batch) :][:1] == [timeline_id] for batch in batches())

    def batches() -> list[list[TenantTimelineId]]:
        return list(attempts.batches)

    try:
        wait_until(lambda: all(tried(t) >= 3 for t in hanging), "attempts")
        wait_until(lambda: all(attempts.answered.count(t) >= 10 for t in others), "calls")
    finally:
        caller.stop()
    known = batches()[len(hanging) :]
    assert all(attempts.position(batch) >= len(batch) - 1 for batch in known)


def test_the_one_that_ends_the_connection_is_blamed(pages: Pages) -> None:
    """And not the one whose call found it closed."""
    timelines = [timeline(number) for number in range(3)]
    pages.fatal = str(timelines[1].timeline_id)
    answers = call_pageserver(pages.connstr, timelines, LISTEN)
    assert (answers.answered, answers.refusals) == (1, {})
    assert "it is too much" in answers.broken
    assert pages.called == [str(t.timeline_id) for t in timelines[:2]]
