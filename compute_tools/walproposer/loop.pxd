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


cdef class EventHandler:
    cdef int handle(self, uint32_t mask) except -1


cdef class EventLoop:
    cdef int _epoll
    cdef int _eventfd
    cdef dict _handlers
    cdef object _posted
    cdef epoll_event[MAX_EVENTS] _events
    cdef public bint interrupted

    cdef int control(self, int operation, int fd, uint32_t events) except -1
    cpdef int poll(self, double timeout) except -1
