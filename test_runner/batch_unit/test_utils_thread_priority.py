"""Threads that leave the processor to others, and that what others wait for does not inherit it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from zenith_utils.thread_priority import (
    BACKGROUND_NICENESS,
    become_background,
    start_in_foreground,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness")

CHILD = [sys.executable, "-c", "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"]


def niceness() -> int:
    """That of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_background(work: Callable[[], None], name: str = "nice one") -> None:
    """Do it in a thread that became one of the background."""
    failures: list[BaseException] = []

    def run() -> None:
        become_background()
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_only_the_thread_itself_becomes_nice() -> None:
    before = niceness()
    found: list[int] = []
    in_background(lambda: found.append(niceness()))
    assert found == [min(before + BACKGROUND_NICENESS, 19)]
    assert niceness() == before


def test_becoming_nice_twice_is_once() -> None:
    found: list[int] = []

    def work() -> None:
        become_background()
        found.append(niceness())

    in_background(work)
    assert found == [min(niceness() + BACKGROUND_NICENESS, 19)]


def test_what_others_wait_for_is_not_nice() -> None:
    found: list[int] = []

    def note() -> None:
        found.append(niceness())
        found.append(int(subprocess.run(CHILD, capture_output=True, check=True).stdout))

    def work() -> None:
        thread = threading.Thread(target=note)
        start_in_foreground(thread)
        thread.join()

    in_background(work)
    work()
    assert found == [niceness()] * 4


def test_a_thread_that_cannot_be_started_is_the_callers_error() -> None:
    def work() -> None:
        thread = threading.Thread(target=lambda: None)
        start_in_foreground(thread)
        thread.join()
        with pytest.raises(RuntimeError, match="only be started once"):
            start_in_foreground(thread)
        start_in_foreground(threading.Thread(target=lambda: None))

    in_background(work)
    work()


def test_the_helper_ends_with_the_thread() -> None:
    helpers: list[threading.Thread] = []

    def work() -> None:
        helpers.extend(t for t in threading.enumerate() if t.name == "starter of the last one")

    in_background(work, "the last one")
    assert len(helpers) == 1
    helpers[0].join(timeout=30)
    assert not helpers[0].is_alive()
