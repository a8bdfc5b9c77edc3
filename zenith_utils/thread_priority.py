"""Threads that leave the processor to others, for work that nobody waits for.

On Linux each thread has a niceness of its own. A thread or process inherits that of the thread that
starts it, and without privileges it can never be lowered again. So a thread that becomes nice first
starts a helper, which stays as it is and starts for it what others will wait for.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import weakref
from typing import Final

BACKGROUND_NICENESS: Final = 10

_own: Final = threading.local()


class _Starter:
    """Starts threads for one that is nice. Ends with the object."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[tuple[threading.Thread, queue.SimpleQueue[object]] | None]
        self._wanted = queue.SimpleQueue()
        name = f"starter of {threading.current_thread().name}"
        threading.Thread(target=_serve, args=(self._wanted,), name=name, daemon=True).start()
        weakref.finalize(self, self._wanted.put, None)

    def start(self, thread: threading.Thread) -> None:
        outcome: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._wanted.put((thread, outcome))
        error = outcome.get()
        if isinstance(error, BaseException):
            raise error


def _serve(
    wanted: queue.SimpleQueue[tuple[threading.Thread, queue.SimpleQueue[object]] | None],
) -> None:
    while (item := wanted.get()) is not None:
        thread, outcome = item
        try:
            thread.start()
        except RuntimeError as error:
            outcome.put(error)
        else:
            outcome.put(None)


def become_background() -> None:
    """From now on this thread gets what others leave of the processors; Linux only."""
    if sys.platform == "linux" and not hasattr(_own, "starter"):
        _own.starter = _Starter()
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + BACKGROUND_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def start_in_foreground(thread: threading.Thread) -> None:
    """Start a thread that others wait for, whoever calls this. Raises RuntimeError like `start`."""
    starter: _Starter | None = getattr(_own, "starter", None)
    if starter is None:
        thread.start()
    else:
        starter.start(thread)
