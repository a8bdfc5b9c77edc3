# WAL out of a replication stream: see _xlog_stream.pyx.
from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    XLOG_HEADER_SIZE = 30  # 'd', length, 'w', start, end, time
    WAL_OFFSET = 5 + 72  # behind the header of a CopyData with an AppendRequest


cdef class XLogStream:
    cdef readonly uint64_t lsn
    cdef public bint reply_requested
    cdef readonly bint ended
    cdef readonly object error
    cdef uint8_t *buffer
    cdef Py_ssize_t _capacity
    cdef uint64_t _left
    cdef Py_ssize_t _rest
    cdef Py_ssize_t _rest_size

    cdef uint8_t *room(self, Py_ssize_t *size) noexcept
    cdef Py_ssize_t strip(self, Py_ssize_t received) except -1
    cdef Py_ssize_t _frame(self, const uint8_t *frame, Py_ssize_t available) except -1
    cdef int _other_frame(self, const uint8_t *frame, Py_ssize_t size) except -1
