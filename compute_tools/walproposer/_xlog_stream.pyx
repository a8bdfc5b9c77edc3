"""The WAL of a stream of XLogData frames, which arrive in pieces of any size.

Protocol: "Streaming Replication Protocol" of the PostgreSQL manual. Records are not looked at.

It is taken out in place. What is received goes to where the WAL of its first frame is at WAL_OFFSET
already, in front of which there is room for the header of the message that carries it on; the WAL
of further frames is moved up to it.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from cpython.bytes cimport PyBytes_AS_STRING

from zenith_utils.unaligned cimport get32_big, get64_big

from zenith_utils.lsn import lsn_text

cdef enum:
    # A bigger buffer costs an mmap, and fewer packets fit the caches. It must stay below
    # MAX_SEND_SIZE, the most WAL that one AppendRequest may carry.
    DEFAULT_CAPACITY = 65536
    MAX_CAPACITY = 131072
    FRAME_OFFSET = WAL_OFFSET - XLOG_HEADER_SIZE
    REPLY_FLAG = 22  # offset in a keepalive frame
    COPY_DATA = 0x64
    COMMAND_COMPLETE = 0x43
    ERROR_RESPONSE = 0x45
    XLOG_DATA = 0x77
    KEEPALIVE = 0x6B


class StreamError(Exception):
    """Postgres sent something that makes the stream unusable."""


cdef class XLogStream:
    """Takes the WAL out of what Postgres sends.

    lsn: position of the next WAL byte; reply_requested: Postgres wants a status update; ended: it
    has said that all WAL was sent and acknowledged, and is going down; error: why it has ended the
    stream otherwise.
    """

    def __init__(self, uint64_t lsn, Py_ssize_t capacity=DEFAULT_CAPACITY):
        """`capacity` is the most that is received at once, and the longest frame without WAL."""
        if not XLOG_HEADER_SIZE <= capacity <= MAX_CAPACITY:
            raise ValueError(f"capacity {capacity}")
        free(self.buffer)
        self.buffer = <uint8_t *> malloc(WAL_OFFSET + capacity)
        if self.buffer == NULL:
            raise MemoryError
        self._capacity = capacity
        self.lsn = lsn

    def __dealloc__(self):
        free(self.buffer)

    def feed(self, const uint8_t[::1] data):
        """The WAL in `data`. Raises StreamError."""
        cdef Py_ssize_t position = 0
        cdef Py_ssize_t size, wal
        cdef uint8_t *room
        parts = []
        while position < data.shape[0]:
            room = self.room(&size)
            size = min(size, data.shape[0] - position)
            memcpy(room, &data[position], size)
            position += size
            wal = self.strip(size)
            parts.append(self.buffer[WAL_OFFSET : WAL_OFFSET + wal])
        return b"".join(parts)

    cdef uint8_t *room(self, Py_ssize_t *size) noexcept:
        """Where to receive next, and at most how much (never nothing)."""
        if self._left:
            size[0] = self._capacity
            return self.buffer + WAL_OFFSET
        if self._rest_size:
            memmove(self.buffer + FRAME_OFFSET, self.buffer + self._rest, self._rest_size)
            self._rest = FRAME_OFFSET
        size[0] = self._capacity - self._rest_size
        return self.buffer + FRAME_OFFSET + self._rest_size

    cdef Py_ssize_t strip(self, Py_ssize_t received) except -1:
        """Size of the WAL in what was received to room(): it is at WAL_OFFSET until the next room().

        The bytes in front of it belong to the caller meanwhile. Raises StreamError.
        """
        cdef Py_ssize_t position = WAL_OFFSET if self._left else FRAME_OFFSET
        cdef Py_ssize_t end = position + self._rest_size + received
        cdef Py_ssize_t wal_end = WAL_OFFSET
        cdef Py_ssize_t size
        self._rest_size = 0
        while position < end:
            if self._left:
                size = end - position
                if <uint64_t> size > self._left:
                    size = <Py_ssize_t> self._left
                # Never to the right: before the first piece comes a header at least.
                if wal_end != position:
                    memmove(self.buffer + wal_end, self.buffer + position, size)
                wal_end += size
                position += size
                self._left -= size
                self.lsn += size
                continue
            size = self._frame(self.buffer + position, end - position)
            if size == 0:
                self._rest = position
                self._rest_size = end - position
                break
            position += size
        return wal_end - WAL_OFFSET

    cdef Py_ssize_t _frame(self, const uint8_t *frame, Py_ssize_t available) except -1:
        """Consume a frame, or an XLogData frame's header; 0 if it is not there as a whole."""
        cdef uint64_t length, start
        if available < 5:
            return 0
        length = get32_big(frame + 1)
        if length < 4 or (frame[0] == COPY_DATA and length < 5):
            raise StreamError(f"Postgres sent a message of length {length}")
        if frame[0] == COPY_DATA:
            if available < 6:
                return 0
            if frame[5] == XLOG_DATA:
                if available < XLOG_HEADER_SIZE:
                    return 0
                start = get64_big(frame + 6)
                if length < XLOG_HEADER_SIZE - 1:
                    raise StreamError(f"Postgres sent WAL in a message of length {length}")
                if start != self.lsn:
                    raise StreamError(
                        f"Postgres sent WAL at {lsn_text(start)}, expected {lsn_text(self.lsn)}"
                    )
                self._left = length + 1 - XLOG_HEADER_SIZE
                return XLOG_HEADER_SIZE
        if length + 1 > <uint64_t> self._capacity:
            raise StreamError(f"Postgres sent a message {chr(frame[0])!r} of length {length}")
        if <uint64_t> available < length + 1:
            return 0
        self._other_frame(frame, <Py_ssize_t> length + 1)
        return <Py_ssize_t> length + 1

    cdef int _other_frame(self, const uint8_t *frame, Py_ssize_t size) except -1:
        if frame[0] == COPY_DATA:
            if frame[5] == KEEPALIVE and size > REPLY_FLAG and frame[REPLY_FLAG]:
                self.reply_requested = True
        elif frame[0] == COMMAND_COMPLETE:
            self.ended = True
        elif frame[0] == ERROR_RESPONSE:
            text = frame[5:size].replace(b"\0", b" ").decode("utf-8", "replace")
            self.error = text.strip()
        return 0
