"""What a proposer sends, and the way of a commit through a safekeeper.

AppendRequests are taken off the socket, written, flushed and answered here: as many at a time as
have arrived, and without the GIL. What they mean is decided by AppendState; whatever is not plain
sailing (a refusal, another segment, an error) is left to the Timeline.
"""
import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from safekeeper.append_state cimport AppendHeader, AppendState
from safekeeper.wal_end cimport WAL_OTHER_SEGMENT, WAL_SYNC_ERROR, WAL_WRITTEN, WalEnd
from zenith_utils.frame_reader cimport FRAME_AGAIN, FRAME_END, FRAME_MORE, FRAME_TAKEN, FrameReader
from zenith_utils.sockets cimport MSG_NOSIGNAL, send
from zenith_utils.unaligned cimport get64, put32_big, put64

from zenith_utils.pq_framing import ConnectionClosed

cdef enum:
    MAX_MESSAGE = 32 << 20     # the longest term history fits
    # Flush and answer at least this often while requests keep coming faster than they are written.
    MAX_BATCH = 4 << 20
    # From this size on a batch asks the socket for more; below it only takes what has been read,
    # which saves a system call on the commit path.
    BULK = 32 << 10

    # Formats: CopyData, and safekeeper_messages.py.
    COPY_DATA = 100            # 'd'
    TAG_APPEND = 97            # 'a'
    APPEND_HEADER = 72
    MAX_SEND_SIZE = 131072
    REPLY_TAIL_AT = 37         # of an answer: frame (5), tag, term, flush LSN, commit LSN
    MAX_REPLY_TAIL = 4096

cdef enum Outcome:
    TAKEN_ALL = 0              # what was here is written and flushed
    NOT_ACCEPTED = 1           # the message at hand is for the Timeline
    OTHER_SEGMENT = 2          # the WAL at hand is accepted and checked, but not written yet
    WRITE_FAILED = 3
    FLUSH_FAILED = 4


cdef inline double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef class PushStream:
    """Reads a session from `conn`, from which nobody else receives meanwhile, into `timeline`."""

    cdef object conn, timeline, session
    cdef FrameReader frames
    cdef AppendState log
    cdef WalEnd wal
    cdef int fd
    cdef bint ended            # the proposer sends nothing more
    # of the batch at hand
    cdef size_t taken          # bytes of messages
    cdef uint64_t wal_bytes
    cdef double begun, wrote, flushed
    cdef bint must_persist     # before it is answered
    cdef int failure           # of `wal`

    def __init__(self, conn not None, session not None, timeline not None):
        self.conn = conn
        self.session = session
        self.timeline = timeline
        self.log = timeline.acceptor.log
        self.wal = timeline.wal_end
        self.fd = conn.fileno()
        self.frames = FrameReader(self.fd, conn.reader.take_buffered(), MAX_MESSAGE)

    def next_message(self):
        """Serve AppendRequests until another message comes: its payload, None at the end.

        Raises ConnectionClosed, ProtocolError, QueryError (CopyFail), and what Timeline.append
        raises.
        """
        cdef FrameReader frames = self.frames
        cdef int result
        while not (self.ended or self.conn.stopping):
            with nogil:
                result = frames.next()
            if result == FRAME_END:
                return None
            if result != FRAME_TAKEN:
                frames.raise_error(result)
            if frames.kind != COPY_DATA:
                if self.conn.copy_ended(frames.kind, frames.view()):
                    return None
            elif self._is_append():
                self._serve_batch()
            else:
                return bytes(frames.view())
        return None

    # ---- a batch

    cdef int _serve_batch(self) except -1:
        """Take the AppendRequest at hand and all that are here; flush once and answer once."""
        cdef uint8_t reply[REPLY_TAIL_AT + MAX_REPLY_TAIL]
        cdef size_t size = 0
        cdef int error
        cdef uint64_t commit_lsn = self.log.commit_lsn
        cdef object refusal
        self.taken = self.wal_bytes = 0
        self.begun = 0.0
        with self.timeline.lock:
            self.timeline.check_usable()
            refusal = self._take_batch()
            if refusal is None:
                self.timeline.appended(
                    self.wal_bytes,
                    self.wrote - self.begun,
                    self.flushed - self.wrote,
                    self.must_persist,
                )
                size = self._fill_reply(reply)
        if refusal is not None:
            self.conn.send_copy_data(refusal.encode())
            self.conn.flush()
            return 0
        with nogil:
            error = send_all(self.fd, reply, size)
        if error:
            raise ConnectionClosed(f"cannot send to the peer: {os.strerror(error)}")
        if self.log.commit_lsn != commit_lsn:
            # After the answer: the proposer's commit waits for that, readers can.
            self.timeline.wake_readers()
        return 0

    cdef object _take_batch(self):
        """Under the timeline's lock: the answer to a message that was refused, or None."""
        cdef bint more = True
        cdef int outcome
        cdef object refusal
        with nogil:
            outcome = self._take_appends()
        while outcome != TAKEN_ALL:
            if outcome == NOT_ACCEPTED:
                refusal = self.timeline.append(self.session, self.frames.view())
                if refusal is not None:
                    return refusal
            elif outcome == OTHER_SEGMENT:
                self.timeline.write_across(self.frames.view()[APPEND_HEADER:])
            else:
                self._raise_failure(outcome)
            with nogil:
                if self._next_append():
                    outcome = self._take_appends()
                else:
                    outcome = self._flush()
        return None

    cdef int _raise_failure(self, int outcome) except -1:
        try:
            self.wal.raise_error(self.failure)
        except Exception as error:
            self.timeline.append_failed(error, flushing=outcome == FLUSH_FAILED)

    cdef size_t _fill_reply(self, uint8_t *reply) except 0:
        """An AppendResponse in a CopyData message; its size."""
        cdef bytes tail = self.timeline.reply_tail
        cdef size_t size = PyBytes_GET_SIZE(tail)
        if size > MAX_REPLY_TAIL:
            raise ValueError(f"a pageserver's feedback of {size} bytes")
        reply[0] = COPY_DATA
        put32_big(reply + 1, <uint32_t> (REPLY_TAIL_AT - 1 + size))
        put64(reply + 5, TAG_APPEND)
        put64(reply + 13, self.log.term)
        put64(reply + 21, self.log.flush_lsn)
        put64(reply + 29, self.log.saved_commit_lsn)
        memcpy(reply + REPLY_TAIL_AT, PyBytes_AS_STRING(tail), size)
        return REPLY_TAIL_AT + size

    # ---- without the GIL

    cdef bint _is_append(self) noexcept nogil:
        """Whether the message at hand claims to be an AppendRequest."""
        return self.frames.kind == COPY_DATA and self.frames.size > 0 \
            and self.frames.payload[0] == TAG_APPEND

    cdef int _take_appends(self) noexcept nogil:
        """Accept and write the message at hand and those behind it, then flush; an Outcome."""
        cdef AppendHeader header
        cdef int outcome
        if self.begun == 0.0:
            self.begun = now()
        while True:
            if not self._parse(&header) or not self.log.append_raw(<void *> self.session, &header):
                return NOT_ACCEPTED
            outcome = self._write()
            if outcome != TAKEN_ALL:
                return outcome
            if not self._next_append():
                return self._flush()

    cdef bint _parse(self, AppendHeader *header) noexcept nogil:
        """Read the AppendRequest at hand; False if it is malformed."""
        cdef const uint8_t *p = self.frames.payload
        cdef uint64_t size
        if self.frames.size < APPEND_HEADER or get64(p) != TAG_APPEND:
            return False
        header.term = get64(p + 8)
        header.epoch_start_lsn = get64(p + 16)
        header.begin_lsn = get64(p + 24)
        header.end_lsn = get64(p + 32)
        header.commit_lsn = get64(p + 40)
        header.truncate_lsn = get64(p + 48)
        size = header.end_lsn - header.begin_lsn
        return size <= MAX_SEND_SIZE and size == self.frames.size - APPEND_HEADER

    cdef int _write(self) noexcept nogil:
        """Write the WAL of the AppendRequest at hand; an Outcome."""
        cdef size_t size = self.frames.size - APPEND_HEADER
        cdef int result
        if size == 0:
            return TAKEN_ALL
        self.wal_bytes += size
        result = self.wal.write_raw(self.frames.payload + APPEND_HEADER, size)
        if result == WAL_WRITTEN:
            return TAKEN_ALL
        self.failure = result
        return OTHER_SEGMENT if result == WAL_OTHER_SEGMENT else WRITE_FAILED

    cdef bint _next_append(self) noexcept nogil:
        """Go to the next AppendRequest, unless it must be waited for or the batch is big enough."""
        cdef int result
        self.taken += self.frames.size
        while self.taken < MAX_BATCH:
            result = self.frames.take()
            if result == FRAME_TAKEN:
                if self._is_append():
                    return True
                self.frames.untake()
                return False
            if result != FRAME_MORE or self.taken < BULK:
                return False
            result = self.frames.receive(False)
            if result != FRAME_MORE:
                # What the proposer sent before it left is flushed like everything else.
                self.ended = result != FRAME_AGAIN
                return False
        return False

    cdef int _flush(self) noexcept nogil:
        """Make durable what is written; an Outcome."""
        cdef int result
        self.wrote = now()
        result = self.wal.flush_raw()
        self.flushed = now()
        if result != WAL_WRITTEN:
            self.failure = result
            return FLUSH_FAILED if result == WAL_SYNC_ERROR else WRITE_FAILED
        self.must_persist = self.log.flushed_raw(self.wal.flush_lsn)
        return TAKEN_ALL


cdef int send_all(int fd, const uint8_t *data, size_t size) noexcept nogil:
    """0 or an errno."""
    cdef ssize_t sent
    while size:
        sent = send(fd, data, size, MSG_NOSIGNAL)
        if sent < 0:
            if errno == EINTR:
                continue
            return errno
        data += sent
        size -= sent
    return 0
