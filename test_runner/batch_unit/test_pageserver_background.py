"""The background threads: whose turn it is, what rests, what fails, how they end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from batch_unit.pageserver_support import wait_until

from pageserver.background import BackgroundThread
from pageserver.layered_repository.errors import TimelineStopped
from pageserver.maintenance import CompactionTask, GcTask
from pageserver.tenant_config import TenantConf, effective_conf
from pageserver.timelines import TimelineHandle
from zenith_utils.lsn import Lsn


@dataclass(eq=False)
class Handle:
    """Stands for a timeline."""

    name: str
    state: object = 0


@dataclass
class FakeTask:
    """Work that is written down."""

    name: str = "work"
    done: list[str] = field(default_factory=list)
    fails: Callable[[Handle], None] = lambda handle: None
    complete: bool = True

    def period(self, conf: TenantConf) -> float:
        """See Task."""
        return conf.compaction_period

    def state(self, handle: TimelineHandle, conf: TenantConf) -> Any:
        """See Task."""
        return cast(Handle, handle).state

    def work(self, handle: TimelineHandle, conf: TenantConf) -> bool:
        """See Task."""
        self.done.append(cast(Handle, handle).name)
        self.fails(cast(Handle, handle))
        return self.complete


class World:
    """Timelines, a clock, and a thread that is not started: rounds are made by the test."""

    def __init__(self, *names: str, period: str = "10 s") -> None:
        self.now = 1000.0
        self.conf = effective_conf({}, {"compaction_period": period})
        self.handles = [Handle(name) for name in names]
        self.confs: dict[Handle, TenantConf] = {}
        self.task = FakeTask()
        self.thread = BackgroundThread(self.task, self.timelines, clock=lambda: self.now)

    def timelines(self) -> list[tuple[TimelineHandle, TenantConf]]:
        """What the thread goes over."""
        return [(cast(TimelineHandle, h), self.confs.get(h, self.conf)) for h in self.handles]

    def rounds(self, seconds: float) -> str:
        """Names of the timelines worked on in the next so many seconds, in order."""
        self.task.done.clear()
        end = self.now + seconds
        while True:
            pause = self.thread.round()
            if self.now + pause > end:
                self.now = end
                return "".join(self.task.done)
            self.now += pause


def test_every_timeline_has_its_turn_by_its_period() -> None:
    world = World("a", "b", "c")
    world.confs[world.handles[1]] = effective_conf({}, {"compaction_period": "25 s"})
    world.confs[world.handles[2]] = effective_conf({}, {"compaction_period": "0 s"})
    world.task.complete = False
    assert world.rounds(9) == ""
    assert world.rounds(51) == "aabaaaba"
    assert world.rounds(100).count("a") == 10
    assert "c" not in world.rounds(100)


def test_timelines_at_rest_are_left_alone() -> None:
    world = World("a", "b")
    # Once, and once more when it has come to rest.
    assert world.rounds(100) == "abab"
    world.handles[0].state = 1
    assert world.rounds(100) == "aa"
    world.task.complete = False
    world.handles[1].state = 1
    assert world.rounds(100) == "b" * 10
    world.task.complete = True
    assert world.rounds(100) == "b"
    world.rounds(1000)
    # Not for ever: not all that matters shows in the state.
    assert sorted(world.rounds(700)) == ["a", "b"]


def test_state_is_that_of_before_the_work() -> None:
    """What comes while the work is done is not missed."""
    world = World("a")

    def change(handle: Handle) -> None:
        handle.state = len(world.task.done)

    world.task.fails = change
    assert world.rounds(50) == "aaaaa"


def test_new_and_changed_timelines() -> None:
    world = World("a")
    world.rounds(100)
    world.handles.append(Handle("b"))
    assert world.rounds(30) == "bb"
    world.confs[world.handles[0]] = effective_conf({}, {"compaction_period": "1 s"})
    world.handles[0].state = 1
    assert world.rounds(5) == "aa"
    del world.handles[0]
    world.handles[0].state = 1
    assert world.rounds(20) == "bb"


def test_failures_are_backed_off_and_hurt_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    world = World("a", "b", period="1 s")
    world.task.complete = False

    def fail(handle: Handle) -> None:
        if handle.name == "a":
            raise OSError("no space")

    world.task.fails = fail
    done = world.rounds(100)
    assert done.count("b") == 100
    # After 1 s, then pauses of 2, 4, 8...: the next one at 127.
    assert done.count("a") == 6
    assert "no space" in caplog.text
    world.task.fails = lambda handle: None
    assert world.rounds(50).count("a") > 20


def test_stopped_timelines_are_no_failures(caplog: pytest.LogCaptureFixture) -> None:
    world = World("a")

    def fail(handle: Handle) -> None:
        raise TimelineStopped("stopped")

    world.task.fails = fail
    assert world.rounds(30) == "aaa"
    assert "failed" not in caplog.text


def test_thread_ends_in_the_middle_of_a_round() -> None:
    entered, leave = threading.Event(), threading.Event()
    world = World("a", "b", period="1 ms")

    def block(handle: Handle) -> None:
        entered.set()
        leave.wait(30)

    world.task.fails = block
    thread = BackgroundThread(world.task, world.timelines)
    thread.start()
    assert entered.wait(30)
    thread.ask_to_stop()
    leave.set()
    thread.join()
    assert world.task.done == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness")
def test_the_thread_leaves_the_processor_to_others() -> None:
    world = World("a", period="1 ms")
    found: list[int] = []
    done = threading.Event()

    def note(handle: Handle) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        done.set()

    world.task.fails = note
    thread = BackgroundThread(world.task, world.timelines)
    thread.start()
    assert done.wait(30)
    thread.ask_to_stop()
    thread.join()
    assert found[0] > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_thread_survives_and_wakes() -> None:
    """An error outside the work of a timeline ends nothing either; a change is seen at once."""
    world = World("a", period="0 s")
    failing = [True]

    def timelines() -> list[tuple[TimelineHandle, TenantConf]]:
        if failing and failing.pop():
            raise RuntimeError("lost")
        return world.timelines()

    thread = BackgroundThread(world.task, timelines)
    thread.start()
    try:
        wait_until(lambda: not failing, "the first round")
        world.conf = effective_conf({}, {"compaction_period": "1 ms"})
        thread.wake()
        wait_until(lambda: world.task.done, "the work")
    finally:
        thread.ask_to_stop()
        thread.join()


def test_garbage_is_looked_for_again_when_a_lease_ends() -> None:
    leased = {Lsn(80), Lsn(88)}
    timeline = SimpleNamespace(
        view=SimpleNamespace(layers=()),
        latest_gc_cutoff_lsn=Lsn(96),
        last_record_lsn=Lsn(104),
        disk_consistent_lsn=Lsn(104),
    )
    leases = SimpleNamespace(lsns=lambda: frozenset(leased))
    handle = cast(TimelineHandle, SimpleNamespace(timeline=timeline, leases=leases))
    conf = effective_conf({}, {})
    for task in (CompactionTask(), GcTask()):
        before = task.state(handle, conf)
        assert task.state(handle, conf) == before
        leased.pop()
        assert task.state(handle, conf) != before
