"""Work on timelines that nobody waits for: compaction and garbage collection.

One thread for each of the two serves the whole pageserver, however many timelines there are. It
goes over the timelines in rounds, each of them as often as its tenant's settings say. Most of them
are idle most of the time, so looking at one that has nothing to do costs about a microsecond. What
fails is logged and tried again after a pause that grows; the other timelines do not notice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from pageserver.layered_repository.errors import TimelineStopped
from zenith_utils.thread_priority import become_background

if TYPE_CHECKING:
    from pageserver.tenant_config import TenantConf
    from pageserver.timelines import TimelineHandle

log = logging.getLogger(__name__)

# Time between two rounds: at least, and at most, so that new timelines are found. In seconds, like
# the longest pause after failures.
_MIN_PAUSE: Final = 0.05
_MAX_PAUSE: Final = 10.0
_MAX_BACKOFF: Final = 600.0
# A timeline at rest is worked on every so many looks: not all that matters shows in its state.
_IDLE_LOOKS: Final = 64


class Task(Protocol):
    """A kind of work."""

    @property
    def name(self) -> str:
        """For logs."""

    def period(self, conf: TenantConf) -> float:
        """Seconds between two looks at a timeline, 0 for none at all."""

    def state(self, handle: TimelineHandle, conf: TenantConf) -> Any:
        """What the work depends on. Cheap."""

    def work(self, handle: TimelineHandle, conf: TenantConf) -> bool:
        """Do it; False if there is more to do although the state stays the same."""


@dataclass(slots=True)
class _Schedule:
    """When a timeline is looked at next."""

    due: float
    period: float
    state: Any = None
    """That of the last work."""
    idle_looks: int = 0
    """How often it has been the same since, 0 if there was more to do."""
    failures: int = 0


class BackgroundThread:
    """Runs one task on all timelines.

    ``timelines`` gives the loaded ones that take part, with their tenants' settings.
    """

    def __init__(
        self,
        task: Task,
        timelines: Callable[[], Iterable[tuple[TimelineHandle, TenantConf]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._task = task
        self._timelines = timelines
        self._clock = clock
        self._schedules: dict[TimelineHandle, _Schedule] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=task.name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Look at the timelines now: there are more of them, or their periods have changed."""
        self._wake.set()

    def ask_to_stop(self) -> None:
        """Begin no more work."""
        self._stopping = True
        self._wake.set()

    def join(self) -> None:
        """Wait for the work in progress, after `ask_to_stop`."""
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        become_background()
        while True:
            self._wake.clear()
            if self._stopping:
                return
            try:
                pause = self.round()
            except Exception:
                log.exception("%s: a round over the timelines failed", self._task.name)
                pause = 1.0
            self._wake.wait(pause)

    def round(self) -> float:
        """Work on every timeline whose time has come; seconds until the next round.

        Called by the thread; by tests instead of starting it.
        """
        now = self._clock()
        next_due = now + _MAX_PAUSE
        schedules: dict[TimelineHandle, _Schedule] = {}
        for handle, conf in self._timelines():
            if self._stopping:
                return 0.0
            schedule = self._schedules.get(handle)
            period = self._task.period(conf)
            if schedule is None:
                schedule = _Schedule(now + period, period)
            elif schedule.period != period:
                schedule.due, schedule.period = now + period, period
            schedules[handle] = schedule
            if period <= 0:
                continue
            if now >= schedule.due:
                self._look(handle, conf, schedule, now)
            next_due = min(next_due, schedule.due)
        self._schedules = schedules
        return max(next_due - self._clock(), _MIN_PAUSE)

    def _look(
        self, handle: TimelineHandle, conf: TenantConf, schedule: _Schedule, now: float
    ) -> None:
        # From the beginning of the round, so that timelines with one period stay together.
        schedule.due = now + schedule.period
        try:
            state = self._task.state(handle, conf)
            if state != schedule.state:
                schedule.idle_looks = 0
            elif schedule.idle_looks % _IDLE_LOOKS:
                schedule.idle_looks += 1
                return
            # The state of before: what changes meanwhile is looked at the next time.
            done = self._task.work(handle, conf)
            # Work without a change since the last one finds a timeline at rest.
            at_rest = state == schedule.state
            schedule.state = state
            schedule.idle_looks = 1 if done and at_rest else 0
            schedule.failures = 0
        except TimelineStopped as error:
            log.debug("%s: %s: %s", handle, self._task.name, error)
        except Exception:
            schedule.idle_looks = 0
            schedule.failures += 1
            pause = min(schedule.period * 2.0**schedule.failures, _MAX_BACKOFF)
            schedule.due = max(self._clock() + pause, schedule.due)
            log.exception("%s: %s failed, next try in %.0f s", handle, self._task.name, pause)
