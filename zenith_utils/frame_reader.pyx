"""Messages of the Postgres wire protocol, taken off a socket without the GIL.

For streams whose every message counts; pq_framing.py reads everything else.
"""
import os

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from zenith_utils.sockets cimport MSG_DONTWAIT, recv
from zenith_utils.unaligned cimport get32_big

from zenith_utils.pq_framing import ConnectionClosed, ProtocolError

cdef enum:
    FIRST_BUFFER = 256 << 10
    HEADER = 5                 # type and length, which counts itself
    MIN_ROOM = 16 << 10


cdef class FrameReader:
    """Reads on from descriptor `fd`, where `received` was read already.

    A message has at most `limit` bytes. The descriptor stays the caller's.
    """

    def __cinit__(self, int fd, const uint8_t[::1] received not None, size_t limit):
        self.fd = fd
        self.limit = limit
        self.end = received.shape[0]
        self.capacity = max(<size_t> FIRST_BUFFER, self.end)
        self.buffer = <uint8_t *> malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError
        if self.end:
            memcpy(self.buffer, &received[0], self.end)

    def __dealloc__(self):
        free(self.buffer)

    cdef int take(self) noexcept nogil:
        cdef size_t length, have = self.end - self.start
        if have < HEADER:
            return FRAME_MORE
        length = get32_big(self.buffer + self.start + 1)
        if length < 4 or length > self.limit:
            return FRAME_BAD
        if have < length + 1:
            return FRAME_MORE
        self.kind = self.buffer[self.start]
        self.payload = self.buffer + self.start + HEADER
        self.size = length - 4
        self.start += length + 1
        return FRAME_TAKEN

    cdef void untake(self) noexcept nogil:
        self.start -= HEADER + self.size

    cdef int receive(self, bint wait) noexcept nogil:
        cdef ssize_t count
        if self.make_room() != 0:
            self.error = ENOMEM
            return FRAME_ERROR
        while True:
            count = recv(self.fd, self.buffer + self.end, self.capacity - self.end,
                         0 if wait else MSG_DONTWAIT)
            if count > 0:
                self.end += count
                return FRAME_MORE
            if count == 0:
                return FRAME_END
            if errno == EAGAIN and not wait:
                return FRAME_AGAIN
            if errno != EINTR:
                self.error = errno
                return FRAME_ERROR

    cdef int next(self) noexcept nogil:
        cdef int result = self.take()
        while result == FRAME_MORE:
            result = self.receive(True)
            if result == FRAME_MORE:
                result = self.take()
        return result

    cdef int make_room(self) noexcept nogil:
        """Have some behind what is not taken yet; 0, or -1 without memory."""
        cdef size_t have = self.end - self.start
        cdef void *grown
        if have == 0:
            self.start = self.end = 0
            return 0
        if self.capacity - self.end >= MIN_ROOM:
            return 0
        if self.start:
            memmove(self.buffer, self.buffer + self.start, have)
            self.start = 0
            self.end = have
        if have > self.capacity // 2:
            # Twice what has arrived: a length field alone costs no memory.
            grown = realloc(self.buffer, 2 * self.capacity)
            if grown == NULL:
                return -1
            self.buffer = <uint8_t *> grown
            self.capacity *= 2
        return 0

    cdef object view(self):
        return PyMemoryView_FromMemory(<char *> self.payload, <Py_ssize_t> self.size, PyBUF_READ)

    cdef int raise_error(self, int result) except -1:
        if result == FRAME_BAD:
            raise ProtocolError(
                f"invalid message length {get32_big(self.buffer + self.start + 1)} "
                f"of message type {chr(self.buffer[self.start])!r}"
            )
        if self.error == ENOMEM:
            raise MemoryError("no memory for a message")
        raise ConnectionClosed(f"connection lost: {os.strerror(self.error)}")
