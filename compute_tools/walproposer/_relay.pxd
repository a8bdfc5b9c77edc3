# The path of a commit: see _relay.pyx.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from compute_tools.walproposer._link cimport Link
from compute_tools.walproposer._quorum cimport Peer, Quorum
from compute_tools.walproposer._xlog_stream cimport XLogStream
from compute_tools.walproposer.loop cimport EventHandler, EventLoop


cdef class Member:
    cdef readonly Peer peer
    cdef public Link link


cdef class Relay(EventHandler):
    cdef readonly tuple members
    cdef readonly XLogStream stream
    cdef readonly uint64_t reported_lsn
    cdef public uint64_t told_commit
    cdef public uint64_t limit_lsn
    cdef EventLoop _loop
    cdef Quorum _quorum
    cdef object _listener
    cdef object _stream_listener
    cdef object _sock
    cdef int _fd
    cdef bint _readable
    cdef tuple _told_horizon

    cdef int _receive(self) except -1
    cdef int _take(self, Py_ssize_t received) except -1
    cdef int _broadcast(self, uint64_t begin_lsn, Py_ssize_t size) except -1
    cdef int _lose(self, reason) except -1
    cpdef bint report(self, bint force=*) except -1
    cdef int _level(self) noexcept
    cdef int _send_status(self, uint64_t lsn) except -1
    cdef int _send(self, const uint8_t *message, Py_ssize_t size) except -1
