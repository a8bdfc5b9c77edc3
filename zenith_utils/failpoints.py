"""Failpoints: places in a program that do something unusual when a test tells them to.

What a failpoint does is a text in the grammar of Rust's ``fail`` crate::

    [<pct>%][<cnt>*]<type>[(args)][-><more terms>]

A term applies with a probability of ``pct`` percent, ``cnt`` times at most; the first one that
applies is executed. Types: ``off`` nothing, ``return(msg)`` the work fails with that message,
``sleep(ms)``, ``delay(ms)`` the same without giving up the processor, ``panic(msg)`` the thread
dies, ``print(msg)`` to the log, ``pause`` until the failpoint is set anew, ``yield``.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

log = logging.getLogger(__name__)

INVALID_FORMAT = "Invalid failpoints format"


class FailpointFormatError(ValueError):
    """The text does not say what failpoints are to do, or names one that does not exist."""


class FailpointError(Exception):
    """What work fails with at a failpoint set to ``return``."""


class FailpointPanic(BaseException):
    """Ends a thread at a failpoint set to ``panic``; nobody catches it, as nobody does a defect."""


class Action(Enum):
    """What a term does."""

    OFF = "off"
    RETURN = "return"
    SLEEP = "sleep"
    DELAY = "delay"
    PANIC = "panic"
    PRINT = "print"
    PAUSE = "pause"
    YIELD = "yield"


_TIMED = (Action.SLEEP, Action.DELAY)


@dataclass(frozen=True, slots=True)
class Term:
    """One term. `argument`: the text in parentheses, None without."""

    action: Action
    argument: str | None = None
    probability: float = 1.0
    count: int | None = None
    """How often it applies, None for any number of times."""
    seconds: float = 0.0
    """Of ``sleep`` and ``delay``."""


def parse_terms(text: str) -> tuple[Term, ...]:
    """The terms of one failpoint. Raises FailpointFormatError."""
    return tuple(_parse_term(part.strip()) for part in text.split("->"))


def _parse_term(text: str) -> Term:
    # The argument first: it may hold anything.
    head, parenthesis, rest = text.partition("(")
    argument = None
    if parenthesis:
        if not rest.endswith(")"):
            raise FailpointFormatError(f"{INVALID_FORMAT}: parentheses do not match in '{text}'")
        argument = rest[:-1]
    percent, _, head = head.rpartition("%")
    times, _, name = head.rpartition("*")
    try:
        action = Action(name)
    except ValueError:
        known = ", ".join(action.value for action in Action)
        raise FailpointFormatError(
            f"{INVALID_FORMAT}: unknown action '{name}', expected one of {known}"
        ) from None
    return Term(
        action,
        argument,
        _number(percent, text, 100.0) / 100 if percent else 1.0,
        int(_number(times, text)) if times else None,
        _number(argument or "", text) / 1000 if action in _TIMED else 0.0,
    )


def _number(text: str, term: str, maximum: float | None = None) -> float:
    """A number of milliseconds or times, with a maximum also one with decimals."""
    digits = text if maximum is None else text.replace(".", "", 1)
    if digits.isascii() and digits.isdigit() and float(text) <= (maximum or 1 << 32):
        return float(text)
    raise FailpointFormatError(f"{INVALID_FORMAT}: '{text}' is not a valid number in '{term}'")


class Failpoint:
    """A place in the program. Code there says ``if POINT.active: POINT.hit()``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.active = False
        """Whether hit() may do anything."""
        self._changed = threading.Condition()
        self._terms: tuple[Term, ...] = ()
        self._left: list[int | None] = []
        self._released = False

    def set(self, terms: Iterable[Term]) -> None:
        """What it does from now on; whoever pauses or sleeps there goes on."""
        with self._changed:
            self._terms = tuple(terms)
            self._left = [term.count for term in self._terms]
            self.active = any(term.action is not Action.OFF for term in self._terms)
            self._released = False
            self._changed.notify_all()

    def release(self) -> None:
        """Nobody sleeps or pauses there any more: the program is about to end."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def choose(self, chance: Callable[[], float] = random.random) -> Term | None:
        """The term to execute now, which counts as executed. `chance` gives numbers in [0, 1)."""
        with self._changed:
            return self._choose(chance)

    def _choose(self, chance: Callable[[], float]) -> Term | None:
        for number, term in enumerate(self._terms):
            left = self._left[number]
            if left == 0 or (term.probability < 1 and chance() >= term.probability):
                continue
            if left is not None:
                self._left[number] = left - 1
            return term
        return None

    def hit(self) -> None:
        """Do what is set. Raises FailpointError, FailpointPanic."""
        term = self.choose()
        if term is None or term.action is Action.OFF:
            return
        text = term.argument
        if term.action is Action.RETURN:
            raise FailpointError(text or f"failpoint {self.name}")
        if term.action is Action.PANIC:
            raise FailpointPanic(text or f"failpoint {self.name} panic")
        if term.action is Action.PRINT:
            log.info("%s", text or f"failpoint {self.name} executed.")
        elif term.action is Action.YIELD:
            os.sched_yield()
        elif term.action is Action.DELAY:
            end = time.monotonic() + term.seconds
            while time.monotonic() < end and not self._released:
                pass
        else:
            self._wait(term)

    def _wait(self, term: Term) -> None:
        """Until it is not what is set any more; a sleep, no longer than its time."""

        def is_over() -> bool:
            return self._released or not any(other is term for other in self._terms)

        with self._changed:
            if term.action is Action.PAUSE:
                log.info("failpoint %s pauses", self.name)
            self._changed.wait_for(is_over, term.seconds if term.action is Action.SLEEP else None)


def configure(points: Mapping[str, Failpoint], text: str) -> None:
    """Set failpoints by ``<name>=<terms>[;...]``: all of them or, if that is wrong, none.

    Raises FailpointFormatError.
    """
    changes = []
    for part in text.strip().removesuffix(";").split(";"):
        name, equals, terms = part.strip().partition("=")
        if not equals:
            raise FailpointFormatError(INVALID_FORMAT)
        point = points.get(name.strip())
        if point is None:
            raise FailpointFormatError(
                f"there is no failpoint '{name.strip()}', only {', '.join(sorted(points))}"
            )
        changes.append((point, parse_terms(terms)))
    for point, parsed in changes:
        point.set(parsed)
