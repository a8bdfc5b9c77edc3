# The event loop: see loop.pyx.
from libc.stdint cimport uint32_t

cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        int fd

    struct epoll_event:
        uint32_t events
        epoll_data_t data

cdef enum:
    MAX_EVENTS = 32
    # Which descriptors a wait includes: all, all but those of ALL only, those of URGENT only.
    ALL = 0
    MOST = 1
    URGENT = 2
    LEVELS = 3


cdef class EventHandler:
    cdef int handle(self, uint32_t mask) except -1


cdef class EventLoop:
    cdef int[LEVELS] _epolls
    cdef dict _levels
    cdef int _eventfd
    cdef dict _handlers
    cdef object _posted
    cdef epoll_event[MAX_EVENTS] _events
    cdef public bint interrupted

    cdef int control(self, int operation, int fd, int level, uint32_t events) except -1
    cpdef int poll(self, double timeout, int level=*) except -1
