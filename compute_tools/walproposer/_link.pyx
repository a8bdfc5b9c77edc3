"""A session with one safekeeper on a non-blocking socket.

Answers to WAL go from here straight to the quorum's rules; all else goes to a listener in Python.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy, memmove

from cpython.bytes cimport PyBytes_AS_STRING

from compute_tools.walproposer._quorum cimport Peer, Quorum
from compute_tools.walproposer.loop cimport ALL, MOST, EventHandler, EventLoop
from zenith_utils.sockets cimport MSG_DONTWAIT, MSG_NOSIGNAL, recv, send
from zenith_utils.unaligned cimport get32_big, get64

import os

from compute_tools.walproposer.loop import READABLE, WRITABLE
from zenith_utils.safekeeper_messages import MessageError
from zenith_utils.zenith_feedback import FeedbackError, ZenithFeedback

cdef enum:
    RECEIVE = 16384
    MAX_MESSAGE = 1048576
    TAG_APPEND = 0x61
    APPEND_RESPONSE_SIZE = 56
    COPY_DATA = 0x64
    ERROR_RESPONSE = 0x45

cdef uint32_t _READABLE = READABLE
cdef uint32_t _WRITABLE = WRITABLE


class LinkError(Exception):
    """The session is over; the message says why."""


cdef class Link(EventHandler):
    """An open session. What the kernel does not take at once waits, and the loop watches for room.

    Errors end the session: handlers report them to the listener, methods raise LinkError (a breach
    of the connection) or MessageError (of the dialogue).
    """

    def __init__(self, EventLoop loop not None, sock, Quorum quorum not None, int index, listener):
        """A session with `quorum.peers[index]`, which the loop watches until close()."""
        sock.setblocking(False)
        self.sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._quorum = quorum
        self._peer = quorum.peers[index]
        self._listener = listener
        self._unsent = []
        self._feedback_bytes = b""
        # Any quorum needs one more than those whom a wait for the quorum leaves out.
        loop.add(self._fd, self, _READABLE, ALL if index < quorum.quorum - 1 else MOST)

    def __dealloc__(self):
        free(self._buffer)

    @property
    def pending(self):
        """Whether something waits for room in the socket."""
        return len(self._unsent) > 0

    @property
    def unsent_bytes(self):
        """How much waits for room in the socket."""
        return sum(map(len, self._unsent))

    def close(self):
        """End the session."""
        if not self.closed:
            self.closed = True
            self._loop.remove(self._fd)
            self._fd = -1
            self.sock.close()

    cdef int handle(self, uint32_t mask) except -1:
        if self.closed:
            return 0
        try:
            if mask & _WRITABLE:
                self._send_unsent()
            if mask & ~_WRITABLE:
                self._receive()
        except (LinkError, MessageError) as e:
            self._loop.interrupted = True
            self._listener.on_link_error(self, str(e))
        return 0

    # ---- sending

    def send(self, bytes message not None):
        """Send a framed message, or keep what does not fit; whether all of it is gone.

        Raises LinkError.
        """
        return self.transmit(<const uint8_t *> PyBytes_AS_STRING(message), len(message)) != 0

    cdef int transmit(self, const uint8_t *message, Py_ssize_t size) except -1:
        """send() of bytes that the caller may overwrite afterwards."""
        cdef Py_ssize_t sent
        if self._unsent:
            self._unsent.append(message[:size])
            return 0
        sent = self._send(message, size)
        if sent == size:
            return 1
        self._unsent.append(message[sent:size])
        self._loop.modify(self._fd, _READABLE | _WRITABLE)
        return 0

    cdef int _send_unsent(self) except -1:
        """There is room again."""
        cdef bytes message
        cdef Py_ssize_t sent
        while self._unsent:
            message = self._unsent[0]
            sent = self._send(<const uint8_t *> PyBytes_AS_STRING(message), len(message))
            if sent < len(message):
                self._unsent[0] = message[sent:]
                return 0
            self._unsent.pop(0)
        self._loop.modify(self._fd, _READABLE)
        # What this safekeeper has missed meanwhile is to be sent to it.
        self._loop.interrupted = True
        return 0

    cdef Py_ssize_t _send(self, const uint8_t *data, Py_ssize_t size) except -1:
        """What the kernel takes now, perhaps nothing."""
        cdef ssize_t sent
        while True:
            sent = send(self._fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent >= 0:
                return sent
            if errno == EAGAIN:
                return 0
            if errno != EINTR:
                raise LinkError(os.strerror(errno))

    # ---- receiving

    def feed(self, bytes data not None):
        """Take what was received elsewhere. Raises LinkError, MessageError."""
        cdef Py_ssize_t size = len(data)
        self._reserve(self._end - self._begin + size)
        memcpy(self._buffer + self._end, PyBytes_AS_STRING(data), size)
        self._end += size
        self._parse()

    cdef int _receive(self) except -1:
        cdef ssize_t size
        self._reserve(RECEIVE)
        size = recv(
            self._fd, self._buffer + self._end, self._capacity - self._end, MSG_DONTWAIT
        )
        if size < 0:
            if errno == EAGAIN or errno == EINTR:
                return 0
            raise LinkError(os.strerror(errno))
        if size == 0:
            raise LinkError("connection closed")
        self.heard = True
        self._end += size
        return self._parse()

    cdef int _reserve(self, Py_ssize_t message_size) except -1:
        """Have room for a message of this size, and for one byte more than is there already."""
        cdef uint8_t *buffer
        cdef Py_ssize_t wanted
        if self._begin:
            memmove(self._buffer, self._buffer + self._begin, self._end - self._begin)
            self._end -= self._begin
            self._begin = 0
        wanted = max(message_size, self._end + 1)
        if wanted > self._capacity:
            wanted = max(wanted, min(2 * self._capacity, MAX_MESSAGE))
            buffer = <uint8_t *> realloc(self._buffer, wanted)
            if buffer == NULL:
                raise MemoryError
            self._buffer = buffer
            self._capacity = wanted
        return 0

    cdef int _parse(self) except -1:
        """Take the complete messages out of the buffer."""
        cdef uint8_t kind
        cdef uint64_t length
        cdef Py_ssize_t payload, size
        while not self.closed and self._end - self._begin >= 5:
            kind = self._buffer[self._begin]
            length = get32_big(self._buffer + self._begin + 1)
            if length < 4 or length > MAX_MESSAGE:
                raise LinkError(f"message length {length}")
            if <uint64_t> (self._end - self._begin) < length + 1:
                break
            payload = self._begin + 5
            size = <Py_ssize_t> length - 4
            # Before the call, which may end the session. It does not read into the buffer.
            self._begin = payload + size
            if kind == COPY_DATA:
                self._payload(self._buffer + payload, size)
            else:
                self._other(kind, self._buffer[payload : payload + size])
        if self._begin == self._end:
            self._begin = self._end = 0
        return 0

    cdef int _payload(self, const uint8_t *payload, Py_ssize_t size) except -1:
        if size >= 8 and get64(payload) == TAG_APPEND:
            return self._append_response(payload, size)
        self._loop.interrupted = True
        self._listener.on_message(self, payload[:size])
        return 0

    cdef int _append_response(self, const uint8_t *payload, Py_ssize_t size) except -1:
        """Layout: tag, term, flush LSN, commit LSN, three of hot standby feedback, feedback."""
        cdef Py_ssize_t feedback_size = size - APPEND_RESPONSE_SIZE
        cdef bytes feedback
        cdef object before = self._peer.feedback
        if feedback_size < 0:
            raise MessageError(f"AppendResponse of {size} bytes is cut short")
        if feedback_size != len(self._feedback_bytes) or memcmp(
            payload + APPEND_RESPONSE_SIZE, PyBytes_AS_STRING(self._feedback_bytes), feedback_size
        ) != 0 or feedback_size == 0:
            feedback = payload[APPEND_RESPONSE_SIZE:size]
            try:
                self._feedback = ZenithFeedback.parse(feedback)
            except FeedbackError as e:
                raise MessageError(f"AppendResponse: {e}") from e
            self._feedback_bytes = feedback
        self._peer.standby_xmin = get64(payload + 40)
        self._peer.standby_catalog_xmin = get64(payload + 48)
        if not self._quorum.acknowledge(
            self._peer, get64(payload + 8), get64(payload + 16), get64(payload + 24),
            self._feedback,
        ):
            # A defeat: what follows from it is decided where all other messages go.
            self._loop.interrupted = True
            self._listener.on_message(self, payload[:size])
        elif self._peer.feedback is not before:
            self._listener.on_feedback()
        return 0

    cdef int _other(self, uint8_t kind, bytes payload) except -1:
        self._loop.interrupted = True
        if kind == ERROR_RESPONSE:
            fields = {field[:1]: field[1:] for field in payload.split(b"\0") if field}
            raise LinkError(fields.get(b"M", b"unknown error").decode("utf-8", "replace"))
        if kind in b"cCZ":
            self.finished = True
        elif kind not in b"NS":
            raise LinkError(f"unexpected message type {chr(kind)!r}")
        return 0
