"""How much memory the layers of all timelines take, and who gives some back.

Only bookkeeping: the budget knows numbers and says what is to be done, timelines do it. It owns the
pool through which a layer hands its memory on to a later one; what is kept there, the layers leave
free below the hard limit.

Protocol
--------
- After each batch the holder of a timeline's writer calls `grown` with the size of the open layer.
  While the open layers of all timelines together are over the limit, it is answered with the
  timeline whose open layer is the largest, which is to be frozen: if that is its own, by the caller
  at once; if it is another one, by the caller too, provided that timeline's writer lock can be had
  without waiting. If it cannot, somebody is writing there and hears the same after the batch.
  Nobody waits for a writer lock while holding one, so there is no deadlock. If the open layers
  pass even the hard limit, because the writer of the largest gets no time, each caller is answered
  with its own timeline.
- Whoever freezes a layer calls `frozen`, whoever has flushed one `flushed`; a flush may be quicker
  than the one who froze.
- Between batches a writer calls `wait_for_room` and repeats it while it returns False and the
  timeline runs. It waits only while there are frozen layers: their flush ends the wait.
- Whoever fails to flush calls `flush_failed`. Until a flush of that timeline succeeds nobody else
  waits for its frozen layers. Its own writer does when the timelines whose flush fails have more
  of them than the open layers leave: so they cannot use up what the others need. What they hold
  beyond that the others' open layers have less, down to a quarter of the limit.
- A timeline that stops calls `forget`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from pageserver.layered_repository.memory_pool import MemoryPool

# The pool keeps at most this part of the limit: a half.
_POOL_PART: Final = 2

T = TypeVar("T", bound=Hashable)


class MemoryBudget(Generic[T]):
    """Bytes of memory in the layers of the timelines `T` of a pageserver; for any thread.

    limit: of the open layers together. Open and frozen layers may take half as much again; then
    writers have to wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[T, int] = {}
        self._frozen: dict[T, int] = {}
        self._failing: set[T] = set()
        """Those whose last flush failed."""
        self._open_total = 0
        self._frozen_total = 0
        self._room = threading.Condition(threading.Lock())
        self._waiting = 0
        self._pool_limit = limit // _POOL_PART
        self.pool = MemoryPool(self._pool_limit)

    @property
    def limit(self) -> int:
        """Bytes from which on the largest open layer is to be frozen."""
        return self._limit

    @property
    def hard_limit(self) -> int:
        """Bytes of open and frozen layers from which on writers wait."""
        return self._limit + self._limit // 2

    @property
    def failing_limit(self) -> int:
        """Bytes of frozen layers from which on writers of timelines wait whose flush fails."""
        return self.hard_limit - self._limit

    @property
    def total(self) -> int:
        """Bytes of all open and frozen layers."""
        with self._room:
            return self._open_total + self._frozen_total

    def resize(self, limit: int) -> None:
        """Change the limit."""
        with self._room:
            self._limit = limit
            self._limit_pool()
            self._wake()

    def grown(self, timeline: T, size: int) -> T | None:
        """Say how large the open layer of a timeline is; returns the timeline to freeze, if any."""
        with self._room:
            self._set_open(timeline, size)
            if timeline in self._failing:
                return timeline if self._open_total > self._limit else None
            if self._open_total <= self._limit and not self._failing:
                return None
            # To freeze a layer that cannot be flushed gives nothing back.
            sizes = {x: size for x, size in self._open.items() if x not in self._failing}
            open_limit, total = self._open_limit(), sum(sizes.values())
            if total <= open_limit:
                return None
            if total > open_limit + self._limit // 2:
                return timeline
            return max(sizes, key=sizes.__getitem__)

    def frozen(self, timeline: T, size: int) -> None:
        """The open layer became a frozen one of `size` bytes; the new open one is empty."""
        with self._room:
            # In this order, so that nothing counts twice.
            self._set_open(timeline, 0)
            self._add_frozen(timeline, size)
            self._wake()

    def flushed(self, timeline: T, size: int) -> None:
        """A frozen layer of `size` bytes is gone; nothing happens if the timeline is forgotten."""
        with self._room:
            self._failing.discard(timeline)
            if timeline in self._open or timeline in self._frozen:
                self._add_frozen(timeline, -size)
            self._wake()

    def flush_failed(self, timeline: T) -> None:
        """The flush of a frozen layer did not work, and will be tried again."""
        with self._room:
            if timeline in self._frozen:
                self._failing.add(timeline)
                self._wake()

    def forget(self, timeline: T) -> None:
        """The layers of the timeline are gone or soon will be."""
        with self._room:
            self._set_open(timeline, 0)
            self._frozen_total -= self._frozen.pop(timeline, 0)
            self._failing.discard(timeline)
            self._wake()

    def wait_for_room(self, timeline: T, timeout: float) -> bool:
        """Wait, as the writer of a timeline, while a limit is passed; False if it still is.

        `timeout` seconds at most. The caller must not hold anything a flush needs.
        """
        deadline = time.monotonic() + timeout
        with self._room:
            self._waiting += 1
            try:
                while self._must_wait(timeline):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return False
                    self._room.wait(left)
            finally:
                self._waiting -= 1
        return True

    def _must_wait(self, timeline: T) -> bool:
        failing = self._failing_total()
        if timeline in self._failing and failing > self.failing_limit:
            return True
        passed = self._open_total + self._frozen_total > self.hard_limit
        return passed and self._frozen_total > failing

    def _open_limit(self) -> int:
        """Of the open layers of timelines whose flush works: less if the others hold too much.

        What they have when it first fails may be all there is; a quarter is left to others then.
        """
        held = self._failing_total() + sum(self._open.get(x, 0) for x in self._failing)
        return max(self._limit - max(held - self.failing_limit, 0), self._limit // 4)

    def _failing_total(self) -> int:
        return sum(self._frozen.get(timeline, 0) for timeline in self._failing)

    def _set_open(self, timeline: T, size: int) -> None:
        self._open_total += size - self._open.get(timeline, 0)
        if size:
            self._open[timeline] = size
        else:
            self._open.pop(timeline, None)
        self._limit_pool()

    def _add_frozen(self, timeline: T, size: int) -> None:
        self._frozen_total += size
        left = self._frozen.get(timeline, 0) + size
        if left:
            self._frozen[timeline] = left
        else:
            self._frozen.pop(timeline, None)
        self._limit_pool()

    def _limit_pool(self) -> None:
        """Layers and pool together keep to the hard limit."""
        free = self.hard_limit - self._open_total - self._frozen_total
        limit = max(min(self._limit // _POOL_PART, free), 0)
        if limit != self._pool_limit:
            self._pool_limit = limit
            self.pool.resize(limit)

    def _wake(self) -> None:
        if self._waiting:
            self._room.notify_all()
