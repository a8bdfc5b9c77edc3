"""Failpoints: the grammar of their actions, which term applies, and what each action does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from zenith_utils.failpoints import (
    Action,
    Failpoint,
    FailpointError,
    FailpointFormatError,
    FailpointPanic,
    Term,
    configure,
    parse_terms,
)

DEADLINE = 30.0


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("off", [Term(Action.OFF)]),
        ("sleep(20)", [Term(Action.SLEEP, "20", seconds=0.02)]),
        ("delay(5)", [Term(Action.DELAY, "5", seconds=0.005)]),
        ("return", [Term(Action.RETURN)]),
        ("return(50%*2 is (not) a term)", [Term(Action.RETURN, "50%*2 is (not) a term")]),
        ("return()", [Term(Action.RETURN, "")]),
        ("panic", [Term(Action.PANIC)]),
        ("pause", [Term(Action.PAUSE)]),
        ("yield", [Term(Action.YIELD)]),
        ("25%panic(x)", [Term(Action.PANIC, "x", probability=0.25)]),
        ("12.5%yield", [Term(Action.YIELD, probability=0.125)]),
        ("3*print(x)", [Term(Action.PRINT, "x", count=3)]),
        (
            "50%2*sleep(1) -> 1*return(a)->off",
            [
                Term(Action.SLEEP, "1", probability=0.5, count=2, seconds=0.001),
                Term(Action.RETURN, "a", count=1),
                Term(Action.OFF),
            ],
        ),
    ],
)
def test_grammar(text: str, terms: list[Term]) -> None:
    assert list(parse_terms(text)) == terms


@pytest.mark.parametrize(
    "text",
    [
        *("", "of", "OFF", "sleep", "sleep()", "sleep(x)", "sleep(-1)", "sleep(1", "sleep(1)x"),
        *("101%off", "x%off", "-1%off", "%off%off", "1.5*off", "x*off", "-1*off", "off->", "->off"),
        *("2*50%off", "sleep(1)(2", "sleep(\u0661)", "1e9%off", "99999999999*off"),
    ],
)
def test_bad_actions_are_refused(text: str) -> None:
    with pytest.raises(FailpointFormatError, match=r"^Invalid failpoints format"):
        parse_terms(text)


def test_first_term_that_applies_is_executed() -> None:
    """Counts run out, probabilities are drawn one by one, and without a term nothing happens."""
    point = Failpoint("p")
    assert point.choose() is None and not point.active
    point.set(parse_terms("25%2*print(a)->1*print(b)->print(c)"))
    draws = iter([0.3, 0.2, 0.24, 0.0])
    texts = [term.argument for _ in range(4) if (term := point.choose(lambda: next(draws)))]
    # Once b's one time is over c is left; the second a uses up its two times.
    assert texts == ["b", "a", "a", "c"]
    assert next(draws, None) == 0.0
    point.set(parse_terms("1*return(x)"))
    with pytest.raises(FailpointError, match=r"^x$"):
        point.hit()
    point.hit()


@pytest.fixture
def points() -> Iterator[dict[str, Failpoint]]:
    made = {name: Failpoint(name) for name in ("one", "two")}
    yield made
    for point in made.values():
        point.release()


def test_configuration_is_all_or_nothing(points: dict[str, Failpoint]) -> None:
    configure(points, "one=return(a=b); two=off;")
    assert (points["one"].active, points["two"].active) == (True, False)
    for text in ("", "one", "one=off;two=x", "two=panic;three=off", "=off", "one=off;;two=off"):
        with pytest.raises(FailpointFormatError):
            configure(points, text)
    with pytest.raises(FailpointFormatError, match=r"no failpoint 'three', only one, two"):
        configure(points, "three=off")
    with pytest.raises(FailpointError, match=r"^a=b$"):
        points["one"].hit()
    configure(points, "one=off")
    points["one"].hit()
    assert not points["one"].active


def test_actions(points: dict[str, Failpoint], caplog: pytest.LogCaptureFixture) -> None:
    point = points["one"]
    point.set(parse_terms("panic"))
    with pytest.raises(FailpointPanic, match="failpoint one panic"):
        point.hit()
    assert not issubclass(FailpointPanic, Exception)
    point.set(parse_terms("return"))
    with pytest.raises(FailpointError, match="failpoint one"):
        point.hit()
    with caplog.at_level(logging.INFO, "zenith_utils.failpoints"):
        for text in ("1*print(seen)->print", "delay(1)", "sleep(1)", "yield"):
            point.set(parse_terms(text))
            point.hit()
            point.hit()
    assert caplog.messages == ["seen", "failpoint one executed."]


@pytest.mark.parametrize(
    ("action", "release"),
    [("pause", True), ("pause", False), ("sleep(3600000)", True), ("delay(3600000)", True)],
)
def test_whoever_waits_is_let_go(points: dict[str, Failpoint], action: str, release: bool) -> None:
    """A pause ends when the failpoint is set anew; all waits end when the program stops."""
    point = points["one"]
    point.set(parse_terms(action))
    end: Callable[[], None] = point.release if release else lambda: point.set(())
    waiting = threading.Thread(target=point.hit, daemon=True)
    waiting.start()
    assert waiting.is_alive()
    end()
    waiting.join(DEADLINE)
    assert not waiting.is_alive()
