"""Makes open layers durable by time: after a while anyway, at once when a timeline comes to rest.

Without it a timeline whose WAL stops short of a full layer would stay in memory for ever, and
whoever holds its WAL would have to stay ready to send it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from pageserver.layered_repository.errors import TimelineStopped

if TYPE_CHECKING:
    from pageserver.timelines import TimelineHandle

log = logging.getLogger(__name__)

# How often the ages of open layers are looked at, in seconds and as a part of the time limit.
_MAX_PERIOD: Final = 10.0
_PERIOD_PART: Final = 0.1


class Checkpointer:
    """The one thread that checkpoints the timelines of a pageserver, one after another."""

    def __init__(
        self, timelines: Callable[[], Iterable[TimelineHandle]], checkpoint_timeout: float
    ) -> None:
        """`timelines` gives the loaded ones; the timeout is in seconds, 0 for none."""
        self._timelines = timelines
        self._timeout = checkpoint_timeout
        self._wanted: dict[TimelineHandle, None] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._ages: dict[TimelineHandle, tuple[int, float]] = {}
        """Per timeline with an open layer in use: the layer's start and when it was first seen."""
        self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End after the checkpoint in progress, if any, and wait for that."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def request(self, handle: TimelineHandle) -> None:
        """Checkpoint the timeline soon; returns at once."""
        with self._changed:
            self._wanted[handle] = None
            self._changed.notify_all()

    def _run(self) -> None:
        period = min(self._timeout * _PERIOD_PART, _MAX_PERIOD) if self._timeout else None
        next_look = time.monotonic()
        while True:
            with self._changed:
                while not self._wanted and not self._stopping:
                    left = None if period is None else next_look - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                if self._stopping:
                    return
                wanted = list(self._wanted)
                self._wanted.clear()
            if period is not None and time.monotonic() >= next_look:
                wanted += self._outdated()
                next_look = time.monotonic() + period
            for handle in wanted:
                if self._stopping:
                    return
                self._checkpoint(handle)

    def _outdated(self) -> list[TimelineHandle]:
        """The timelines whose open layer has held data for longer than the timeout."""
        now = time.monotonic()
        ages = {}
        outdated = []
        for handle in self._timelines():
            timeline = handle.timeline
            if timeline.wal_since_freeze <= 0:
                continue
            start = timeline.view.open.start_lsn
            age = self._ages.get(handle)
            if age is None or age[0] != start:
                age = start, now
            ages[handle] = age
            if now - age[1] >= self._timeout:
                outdated.append(handle)
        self._ages = ages
        return outdated

    def _checkpoint(self, handle: TimelineHandle) -> None:
        try:
            handle.timeline.checkpoint()
        except (OSError, TimelineStopped) as error:
            # What is frozen now is tried again by the store, which also logs why it fails.
            log.debug("%s: checkpoint: %s", handle, error)
        except Exception:
            log.exception("%s: checkpoint failed", handle)
