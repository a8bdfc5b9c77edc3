"""A small event loop: epoll, one handler per descriptor, and calls posted by other threads.

Waking up costs more than all else on the path of a commit. So a wait may leave out descriptors
whose news can wait for other news: each has a level, and there is an epoll instance per level.
"""

from libc.errno cimport EINTR, errno
from libc.math cimport ceil
from libc.stdint cimport uint32_t
from libc.string cimport memset

from cpython.exc cimport PyErr_CheckSignals
from posix.unistd cimport close as c_close

import contextlib
import os
import queue
import threading

cdef extern from "sys/epoll.h" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
        EPOLLIN
        EPOLLOUT
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

READABLE = EPOLLIN
WRITABLE = EPOLLOUT


cdef class EventHandler:
    """Native handler of a descriptor; in Python any callable is one, which gets the mask."""

    cdef int handle(self, uint32_t mask) except -1:
        """What epoll has to say about the descriptor."""
        raise NotImplementedError


cdef class EventLoop:
    """Everything but post() and in_thread() belongs to the thread that polls."""

    def __cinit__(self):
        cdef int level
        for level in range(LEVELS):
            self._epolls[level] = -1
        for level in range(LEVELS):
            self._epolls[level] = epoll_create1(EPOLL_CLOEXEC)
            if self._epolls[level] < 0:
                raise OSError(errno, os.strerror(errno))

    def __init__(self):
        self._handlers = {}
        self._levels = {}
        self._posted = queue.SimpleQueue()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add(self._eventfd, self._run_posted)

    def __dealloc__(self):
        cdef int level
        for level in range(LEVELS):
            if self._epolls[level] >= 0:
                c_close(self._epolls[level])
        if self._eventfd > 0:
            c_close(self._eventfd)

    def add(self, int fd, handler, uint32_t events=EPOLLIN, int level=URGENT):
        """Call `handler` when `fd` is ready (level-triggered; errors and hang-ups included).

        `level`: the scarcest waits that include it.
        """
        if not ALL <= level <= URGENT:
            raise ValueError(f"level {level}")
        self.control(EPOLL_CTL_ADD, fd, level, events)
        self._handlers[fd] = handler
        self._levels[fd] = level

    def modify(self, int fd, uint32_t events):
        """Change what a descriptor is watched for."""
        self.control(EPOLL_CTL_MOD, fd, self._levels[fd], events)

    def remove(self, int fd):
        """Stop watching; call it before closing the descriptor."""
        del self._handlers[fd]
        self.control(EPOLL_CTL_DEL, fd, self._levels.pop(fd), 0)

    cdef int control(self, int operation, int fd, int level, uint32_t events) except -1:
        cdef epoll_event event
        cdef int i
        memset(&event, 0, sizeof(event))
        event.events = events
        event.data.fd = fd
        for i in range(level + 1):
            if epoll_ctl(self._epolls[i], operation, fd, &event) != 0:
                raise OSError(errno, os.strerror(errno))
        return 0

    cpdef int poll(self, double timeout, int level=ALL) except -1:
        """Wait up to `timeout` seconds and run the handlers; how many events there were.

        `interrupted` is set when a handler in Python ran, or a signal came.
        """
        cdef int milliseconds = <int> ceil(min(max(timeout, 0.0), 3600.0) * 1000)
        cdef int count, i
        cdef int error = 0
        cdef object handler
        PyErr_CheckSignals()
        with nogil:
            count = epoll_wait(self._epolls[level], self._events, MAX_EVENTS, milliseconds)
            if count < 0:
                error = errno
        if count < 0:
            if error != EINTR:
                raise OSError(error, os.strerror(error))
            PyErr_CheckSignals()
            self.interrupted = True
            return 0
        for i in range(count):
            # An earlier handler of this round may have removed it.
            handler = self._handlers.get(self._events[i].data.fd)
            if isinstance(handler, EventHandler):
                (<EventHandler> handler).handle(self._events[i].events)
            elif handler is not None:
                self.interrupted = True
                handler(self._events[i].events)
        return count

    def post(self, call):
        """Have the loop's thread make a call. From any thread."""
        self._posted.put(call)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._eventfd, 1)

    def in_thread(self, str name, work):
        """Run blocking work in a thread; what it returns is then called in the loop's thread."""

        def run():
            self.post(work())

        threading.Thread(target=run, name=name, daemon=True).start()

    def _run_posted(self, mask):
        del mask
        os.eventfd_read(self._eventfd)
        while True:
            try:
                call = self._posted.get_nowait()
            except queue.Empty:
                return
            call()
