# A session with one safekeeper: see _link.pyx.
from libc.stdint cimport uint8_t, uint32_t

from compute_tools.walproposer._quorum cimport Peer, Quorum
from compute_tools.walproposer.loop cimport EventHandler, EventLoop


cdef class Link(EventHandler):
    cdef readonly object sock
    cdef readonly bint finished
    cdef readonly bint closed
    cdef public bint heard
    cdef int _fd
    cdef EventLoop _loop
    cdef Quorum _quorum
    cdef Peer _peer
    cdef object _listener
    cdef list _unsent
    cdef uint8_t *_buffer
    cdef Py_ssize_t _capacity
    cdef Py_ssize_t _begin
    cdef Py_ssize_t _end
    cdef bytes _feedback_bytes
    cdef object _feedback

    cdef int transmit(self, const uint8_t *message, Py_ssize_t size) except -1
    cdef int _send_unsent(self) except -1
    cdef Py_ssize_t _send(self, const uint8_t *data, Py_ssize_t size) except -1
    cdef int _receive(self) except -1
    cdef int _reserve(self, Py_ssize_t message_size) except -1
    cdef int _parse(self) except -1
    cdef int _payload(self, const uint8_t *payload, Py_ssize_t size) except -1
    cdef int _append_response(self, const uint8_t *payload, Py_ssize_t size) except -1
    cdef int _other(self, uint8_t kind, bytes payload) except -1
