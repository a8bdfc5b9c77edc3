"""Threads at the niceness of the daemon, whoever asks for them.

On Linux niceness belongs to a thread, and threads and processes inherit it from the thread that
starts them. Without privileges it can only get worse. So what a niced thread wants to run as all
others do has to be started by a thread that has never been niced.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol


class StartThread(Protocol):
    """Starts a daemon thread. Raises RuntimeError if there can be no more threads."""

    def __call__(self, target: Callable[[], None], name: str) -> None:
        """Start it."""


def start_thread(target: Callable[[], None], name: str) -> None:
    """Start a daemon thread, with the niceness of the calling one."""
    threading.Thread(target=target, name=name, daemon=True).start()


class _Order:
    def __init__(self, target: Callable[[], None], name: str) -> None:
        self.target = target
        self.name = name
        self.done = threading.Event()
        self.error: RuntimeError | None = None


class ThreadStarter:
    """Starts daemon threads with the niceness of the thread that has made this object."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        start_thread(self._run, "thread starter")

    def start(self, target: Callable[[], None], name: str) -> None:
        """Returns when the thread runs. Raises RuntimeError if it cannot, or after close()."""
        order = _Order(target, name)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"thread {name!r} is wanted after the end")
            self._orders.put(order)
        order.done.wait()
        if order.error is not None:
            raise order.error

    def close(self) -> None:
        """End the thread that starts others; these go on."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._orders.put(None)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                start_thread(order.target, order.name)
            except RuntimeError as error:
                order.error = error
            finally:
                order.done.set()
