"""A small event loop: epoll, one handler per descriptor, and calls posted by other threads."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

Handler = Callable[[int], None]
"""Called with the epoll event mask of its descriptor."""


class EventLoop:
    """Everything but post() and in_thread() belongs to the thread that polls."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add(self._eventfd, self._run_posted)

    def add(self, fd: int, handler: Handler, events: int = READABLE) -> None:
        """Call `handler` when `fd` is ready (level-triggered; errors and hang-ups included)."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Change what a descriptor is watched for."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching; call it before closing the descriptor."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def poll(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds and run the handlers; whether there was anything."""
        events = self._epoll.poll(timeout)
        handlers = self._handlers
        for fd, mask in events:
            handler = handlers.get(fd)  # an earlier handler of this round may have removed it
            if handler is not None:
                handler(mask)
        return bool(events)

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop's thread make a call. From any thread."""
        self._posted.put(call)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._eventfd, 1)

    def in_thread(self, name: str, work: Callable[[], Callable[[], None]]) -> None:
        """Run blocking work in a thread; what it returns is then called in the loop's thread."""
        threading.Thread(target=lambda: self.post(work()), name=name, daemon=True).start()

    def _run_posted(self, mask: int) -> None:
        del mask
        os.eventfd_read(self._eventfd)
        while True:
            try:
                call = self._posted.get_nowait()
            except queue.Empty:
                return
            call()
