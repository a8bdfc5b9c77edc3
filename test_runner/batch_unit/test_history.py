"""The checker of clients' logs finds what a database must not do, and nothing else."""

from __future__ import annotations

import pytest
from fixtures.history import Attempt, Event, Look, Outcome, Row, violations

ACK, UNKNOWN, ABORTED = Outcome.ACKNOWLEDGED, Outcome.UNKNOWN, Outcome.ABORTED


def log(*outcomes: Outcome) -> list[Event]:
    """Attempts 1, 2, 3, … with these outcomes."""
    return [Attempt(number, outcome) for number, outcome in enumerate(outcomes, 1)]


def look(since: int, *seen: int) -> Look:
    """A read."""
    return Look(since, frozenset(seen))


def rows(*pairs: tuple[int, int]) -> list[Row]:
    """Rows (number, before) of client 1."""
    return [Row(1, number, before) for number, before in pairs]


GOOD = [
    pytest.param([], [], id="nothing"),
    pytest.param(log(ACK, ACK), rows((1, 0), (2, 1)), id="all acknowledged"),
    pytest.param(log(ACK, ABORTED, ACK), rows((1, 0), (3, 1)), id="aborted"),
    pytest.param(log(UNKNOWN, ACK), rows((2, 0)), id="unknown is absent"),
    pytest.param(log(UNKNOWN, ACK), rows((1, 0), (2, 1)), id="unknown is there"),
    # Its backend still waits while the client goes on.
    pytest.param(log(UNKNOWN, ACK), rows((1, 0), (2, 0)), id="unknown commits late"),
    pytest.param(
        [*log(UNKNOWN), look(0), Attempt(2, ACK), look(0, 1, 2)],
        rows((1, 0), (2, 0)),
        id="unknown is seen late",
    ),
    pytest.param([*log(ACK, ACK, ACK), look(1, 2, 3)], rows((1, 0), (2, 1), (3, 2)), id="part"),
]
BAD = [
    pytest.param(log(ACK, ACK), rows((1, 0)), "transaction 2 is lost", id="lost"),
    pytest.param(log(ACK, ACK), rows((2, 0)), "transaction 1 is lost", id="lost first"),
    pytest.param(log(ACK), rows((1, 0), (1, 0)), "1 is there twice", id="twice"),
    pytest.param(log(ACK), rows((1, 0), (2, 1)), "2 is there in the end and was never", id="new"),
    pytest.param(log(ABORTED), rows((1, 0)), "aborted transaction 1 is there", id="aborted"),
    pytest.param(
        log(ACK, ACK), rows((1, 0), (2, 0)), "2 did not see 1", id="own write was not seen"
    ),
    pytest.param(
        log(ACK, ACK, ACK), rows((1, 0), (2, 3), (3, 2)), "2 saw 3, which came after", id="order"
    ),
    pytest.param(log(UNKNOWN, ACK), rows((2, 1)), "2 saw 1, which is not there", id="dirty read"),
    pytest.param([*log(ACK), look(0)], rows((1, 0)), "1 is lost after attempt 1", id="late"),
    pytest.param(
        [*log(UNKNOWN), look(0, 1), look(0)], rows((1, 0)), "1 was seen and is gone", id="back"
    ),
    pytest.param(
        [*log(UNKNOWN), look(0, 1)], [], "1 was seen and is gone in the end", id="seen and lost"
    ),
    pytest.param(
        [look(0, 1), *log(ACK)], rows((1, 0)), "1 is there after attempt 0 and was", id="future"
    ),
    pytest.param(
        [*log(ABORTED), look(0, 1)], [], "aborted transaction 1 is there after", id="undone late"
    ),
    pytest.param([], [Row(2, 1, 0)], "a row of client 2", id="stranger"),
]


@pytest.mark.parametrize(("events", "present"), GOOD)
def test_good(events: list[Event], present: list[Row]) -> None:
    assert violations({1: events}, present) == []


@pytest.mark.parametrize(("events", "present", "text"), BAD)
def test_bad(events: list[Event], present: list[Row], text: str) -> None:
    found = violations({1: events}, present)
    assert any(text in line for line in found), found


def test_clients_are_told_apart() -> None:
    logs = {1: log(ACK), 2: log(ACK, ACK)}
    present = [Row(1, 1, 0), Row(2, 1, 0)]
    assert violations(logs, present) == ["client 2: acknowledged transaction 2 is lost in the end"]
