"""Messages of the Postgres wire protocol, taken off a socket without the GIL: see frame_reader.pyx."""
from libc.stdint cimport uint8_t

cdef enum FrameResult:
    FRAME_TAKEN = 1
    FRAME_MORE = 0             # of a take: not all of it is here; of a receive: something came
    FRAME_AGAIN = -1           # nothing to be had without waiting
    FRAME_END = -2             # the peer sends nothing more
    FRAME_ERROR = -3           # `error` is the errno
    FRAME_BAD = -4             # a length that is impossible, or more than the limit

cdef class FrameReader:
    cdef int fd
    cdef int error
    cdef size_t limit
    cdef uint8_t *buffer
    cdef size_t capacity, start, end
    # The message taken last; valid until the next receive.
    cdef uint8_t kind
    cdef const uint8_t *payload
    cdef size_t size

    # Step to the next message if it is here: FRAME_TAKEN, FRAME_MORE or FRAME_BAD.
    cdef int take(self) noexcept nogil
    # Step back before the message taken last.
    cdef void untake(self) noexcept nogil
    # One recv, waiting or not: FRAME_MORE, FRAME_AGAIN, FRAME_END or FRAME_ERROR.
    cdef int receive(self, bint wait) noexcept nogil
    # Wait for a message: FRAME_TAKEN, FRAME_END, FRAME_BAD or FRAME_ERROR.
    cdef int next(self) noexcept nogil
    cdef int make_room(self) noexcept nogil
    # A view of the message's payload, valid as long as that.
    cdef object view(self)
    # Raise ConnectionClosed or ProtocolError for FRAME_ERROR and FRAME_BAD.
    cdef int raise_error(self, int result) except -1
