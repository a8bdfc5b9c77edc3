"""The path of a commit: WAL from Postgres to the safekeepers, and back how much is committed.

In the steady state everything between two waits happens here: one read from Postgres and one send
per safekeeper, or one read per answer (_link.pyx) and one report. Whatever else is to be done is
left to the shell, to which run() returns for it.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_AS_STRING
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from compute_tools.walproposer._link cimport Link
from compute_tools.walproposer._quorum cimport APPEND_HEADER_SIZE, Peer, Quorum
from compute_tools.walproposer._xlog_stream cimport WAL_OFFSET, XLogStream
from compute_tools.walproposer.loop cimport ALL, MOST, URGENT, EventHandler, EventLoop
from zenith_utils.sockets cimport MSG_DONTWAIT, MSG_NOSIGNAL, recv, send
from zenith_utils.unaligned cimport put32_big, put64_big

import os

from compute_tools.walproposer._link import LinkError
from compute_tools.walproposer._quorum import PeerState
from zenith_utils.safekeeper_messages import NO_XMIN
from zenith_utils.zenith_feedback import POSTGRES_EPOCH_MICROS

cdef enum:
    STATUS_SIZE = 39
    COPY_DATA = 0x64
    STATUS_UPDATE = 0x72
    STANDBY_FEEDBACK_SIZE = 30
    STANDBY_FEEDBACK = 0x68

cdef uint64_t NO_LIMIT = <uint64_t> -1
# A commit LSN travels with the next WAL; if there is none so long, alone.
cdef double ANNOUNCE_COMMIT = 0.005
cdef int64_t _EPOCH_MICROS = POSTGRES_EPOCH_MICROS
cdef object _STREAMING = PeerState.STREAMING


cdef double _now() noexcept nogil:
    """time.monotonic()."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cdef int64_t _postgres_now() noexcept nogil:
    """The time as Postgres counts it."""
    cdef timespec time
    clock_gettime(CLOCK_REALTIME, &time)
    return <int64_t> time.tv_sec * 1000000 + time.tv_nsec // 1000 - _EPOCH_MICROS


cdef void _put_xid(uint8_t *p, uint64_t xid) noexcept:
    """A transaction id, then its epoch; zeros for none."""
    if xid == <uint64_t> -1:
        xid = 0
    put32_big(p, <uint32_t> xid)
    put32_big(p + 4, <uint32_t> (xid >> 32))


cdef class Member:
    """A safekeeper: what the quorum knows of it, and the session if there is one."""

    def __init__(self, Peer peer not None):
        self.peer = peer


cdef class Relay(EventHandler):
    """The stream from Postgres, once there is one, and those who get its WAL.

    reported_lsn: what Postgres was told to be committed; told_commit: the commit LSN in the last
    message that went to everybody who keeps pace; limit_lsn: report no LSN above.
    """

    def __init__(
        self, EventLoop loop not None, Quorum quorum not None, tuple members not None, listener
    ):
        """`listener` is told when a link fails."""
        self.members = members
        self.limit_lsn = NO_LIMIT
        self._loop = loop
        self._quorum = quorum
        self._listener = listener
        self._fd = -1
        self._told_horizon = (NO_XMIN, NO_XMIN)

    # ---- the stream

    def attach(self, sock, uint64_t lsn, listener):
        """Take WAL from `lsn` on from a non-blocking socket; `listener` is told when it ends."""
        self.stream = XLogStream(lsn)
        self._stream_listener = listener
        self._sock = sock
        self._fd = sock.fileno()
        self._loop.add(self._fd, self)

    def feed(self, bytes data not None):
        """Take what was received elsewhere. Raises StreamError, as run() does."""
        cdef Py_ssize_t position = 0
        cdef Py_ssize_t size
        cdef uint8_t *room
        while position < len(data) and self._fd >= 0:
            room = self.stream.room(&size)
            size = min(size, len(data) - position)
            memcpy(room, <const uint8_t *> PyBytes_AS_STRING(data) + position, size)
            position += size
            self._take(size)

    def detach(self):
        """Close the socket, if there is one."""
        if self._fd >= 0:
            self._loop.remove(self._fd)
            self._fd = -1
            self._sock.close()
            self._sock = None

    cdef int handle(self, uint32_t mask) except -1:
        # The answers of this round come first: commits wait for them.
        self._readable = True
        return 0

    cdef int _receive(self) except -1:
        cdef Py_ssize_t room_size
        cdef ssize_t size
        cdef uint8_t *room
        self._readable = False
        if self._fd < 0:
            return 0
        room = self.stream.room(&room_size)
        size = recv(self._fd, room, room_size, MSG_DONTWAIT)
        if size > 0:
            return self._take(size)
        if size == 0:
            return self._lose("connection closed")
        if errno != EAGAIN and errno != EINTR:
            return self._lose(os.strerror(errno))
        return 0

    cdef int _take(self, Py_ssize_t received) except -1:
        cdef XLogStream stream = self.stream
        cdef uint64_t begin_lsn = stream.lsn
        cdef Py_ssize_t size = stream.strip(received)
        if size:
            self._broadcast(begin_lsn, size)
        if stream.ended:
            self._loop.interrupted = True
            self._stream_listener.on_stream_end()
        elif stream.error is not None:
            self._lose(stream.error)
        return 0

    cdef int _lose(self, reason) except -1:
        self._loop.interrupted = True
        self._stream_listener.on_stream_lost(reason)
        return 0

    cdef int _broadcast(self, uint64_t begin_lsn, Py_ssize_t size) except -1:
        """Send the stream's WAL to everybody who has all before it."""
        cdef uint8_t *message = self.stream.buffer
        cdef uint64_t end_lsn = begin_lsn + size
        cdef Member member
        cdef Peer peer
        message[0] = COPY_DATA
        put32_big(message + 1, <uint32_t> (4 + APPEND_HEADER_SIZE + size))
        self._quorum.write_append_header(message + 5, begin_lsn, end_lsn)
        for member in self.members:
            peer = member.peer
            if member.link is None or peer.state is not _STREAMING or member.link._unsent:
                continue
            if peer.next_lsn != begin_lsn:
                self._loop.interrupted = True  # one to be caught up
                continue
            peer.next_lsn = end_lsn
            try:
                member.link.transmit(message, WAL_OFFSET + size)
            except LinkError as e:
                self._loop.interrupted = True
                self._listener.on_link_error(member.link, str(e))
        self.told_commit = self._quorum.commit_lsn
        return 0

    # ---- reports

    cpdef bint report(self, bint force=False) except -1:
        """Tell Postgres how much is committed if that is news, or if it must be told anyway.

        Whether Postgres knows now. It lets the commits up to there return.
        """
        cdef uint64_t lsn = max(min(self._quorum.commit_lsn, self.limit_lsn), self.reported_lsn)
        if self._fd < 0:
            return False
        if lsn == self.reported_lsn and not force and not self.stream.reply_requested:
            return True
        if not self._send_status(lsn):
            return False
        self.reported_lsn = lsn
        self.stream.reply_requested = False
        return True

    cdef int _send_status(self, uint64_t lsn) except -1:
        """Standby status update: written, flushed and applied up to `lsn`. Whether it was sent."""
        cdef uint8_t[STATUS_SIZE] message
        message[0] = COPY_DATA
        put32_big(message + 1, <uint32_t> (STATUS_SIZE - 1))
        message[5] = STATUS_UPDATE
        put64_big(message + 6, lsn)
        put64_big(message + 14, lsn)
        put64_big(message + 22, lsn)
        put64_big(message + 30, <uint64_t> _postgres_now())
        message[38] = 0  # no answer is wanted
        return self._send(message, STATUS_SIZE)

    def report_standbys(self):
        """Tell Postgres which transactions hot standbys need if that has changed.

        Its walsender keeps their horizon with its slot, so that vacuum spares what they read.
        """
        cdef uint8_t[STANDBY_FEEDBACK_SIZE] message
        cdef uint64_t xmin, catalog_xmin
        horizon = self._quorum.standby_horizon()
        if self._fd < 0 or horizon == self._told_horizon:
            return
        xmin, catalog_xmin = horizon
        message[0] = COPY_DATA
        put32_big(message + 1, <uint32_t> (STANDBY_FEEDBACK_SIZE - 1))
        message[5] = STANDBY_FEEDBACK
        put64_big(message + 6, <uint64_t> _postgres_now())
        _put_xid(message + 14, xmin)
        _put_xid(message + 22, catalog_xmin)
        if self._send(message, STANDBY_FEEDBACK_SIZE):
            self._told_horizon = horizon

    cdef int _send(self, const uint8_t *message, Py_ssize_t size) except -1:
        """Send a message to Postgres. Whether it was sent."""
        cdef ssize_t sent = send(self._fd, message, size, MSG_NOSIGNAL | MSG_DONTWAIT)
        if sent == size:
            return 1
        if sent >= 0:
            # Half a message cannot be finished later without a buffer: start over instead.
            self._lose("socket buffer is full")
        elif errno != EAGAIN and errno != EINTR:
            self._lose(os.strerror(errno))
        return 0

    # ---- the loop

    def run(self, double timeout, bint once=False):
        """Relay for up to `timeout` seconds, or until there is something for the shell to do.

        The latter is: Python code was called, a member is to be caught up, or the safekeepers are
        to be told of a commit because there was nothing else to tell them. Polls at least, or
        exactly, once; whether the last poll brought anything.
        """
        cdef double deadline = _now() + timeout
        cdef double wait = timeout
        cdef int events
        cdef int level = ALL  # once per call everybody is heard, whatever happens
        self._loop.interrupted = False
        while True:
            if level != ALL or self._quorum.commit_lsn > self.told_commit:
                wait = min(wait, ANNOUNCE_COMMIT)
            events = self._loop.poll(wait, level)
            if events == 0 and level != ALL:
                events = self._loop.poll(0.0, ALL)
            self.report()
            if self._readable:
                self._receive()
                # A keepalive may want an answer.
                self.report()
            if events == 0 or once or self._loop.interrupted:
                return events > 0
            wait = deadline - _now()
            if wait <= 0:
                return True
            level = self._level()

    cdef int _level(self) noexcept:
        """Whom to wait for: nobody is woken up for who cannot move the commit LSN.

        The safekeepers that may be left out are level ALL, one less than a quorum; they have
        answered, mostly, when another one does. Who answers after the quorum is heard with the
        next WAL.
        """
        if self._fd < 0 or self.reported_lsn != self._quorum.commit_lsn:
            return ALL
        if self.stream.lsn == self._quorum.commit_lsn:
            return URGENT if self._quorum.commit_lsn > self.told_commit else ALL
        return MOST if self._quorum.none_ahead() else ALL
