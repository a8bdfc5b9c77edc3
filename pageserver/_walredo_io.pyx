"""Client end of the redo process' pipes; the protocol is described in pgxn/walredo/walredo.h."""

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strerror
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport read, write

import fcntl
import os

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    ctypedef unsigned long nfds_t
    int poll(pollfd *fds, nfds_t nfds, int timeout)
    enum:
        POLLIN
        POLLOUT
        POLLERR
        POLLHUP

PAGE_SIZE = 8192

# Outcome of one request.
PAGE = 0
REJECTED = 1
FAILED = 2
HELLO = 3

# Why exchange() returned.
COMPLETE = 0
GAVE_UP = 1
CLOSED = 2
TIMED_OUT = 3

cdef enum:
    _PAGE_SIZE = 8192
    _REQUEST_APPLY = 65  # 'A'
    _REQUEST_MASK = 77  # 'M'
    _FAILED = 2
    _COMPLETE = 0
    _GAVE_UP = 1
    _CLOSED = 2
    _TIMED_OUT = 3
    _ERROR = 4
    _RECORD_HEADER_SIZE = 24  # SizeOfXLogRecord
    _PIPE_SIZE = 1 << 20
    _READ_SIZE = 256 * 1024
    _KEPT_BUFFER = 4 << 20
    _KEPT_STDERR = 16384
    _MAX_PAYLOAD = 8192

cdef struct RequestHeader:
    uint64_t length
    uint8_t type
    uint8_t forknum_or_rmid
    uint8_t has_base
    uint8_t unused
    uint32_t spcnode
    uint32_t dbnode
    uint32_t relnode
    uint32_t blkno
    uint32_t nrecords

cdef struct RecordHeader:
    uint64_t end_lsn
    uint32_t length
    uint32_t unused

cdef struct ResponseHeader:
    uint32_t length
    uint32_t status

cdef struct Buffer:
    char *data
    size_t size
    size_t used


cdef int _reserve(Buffer *buffer, size_t extra) noexcept nogil:
    """Room for `extra` more bytes; -1 if there is no memory."""
    cdef size_t wanted = buffer.used + extra
    cdef char *moved
    if wanted <= buffer.size:
        return 0
    wanted += wanted // 2
    moved = <char *> realloc(buffer.data, wanted)
    if moved == NULL:
        return -1
    buffer.data = moved
    buffer.size = wanted
    return 0


cdef void _clear(Buffer *buffer) noexcept nogil:
    """Empty the buffer, and give an unusually large one back."""
    buffer.used = 0
    if buffer.size > _KEPT_BUFFER:
        free(buffer.data)
        buffer.data = NULL
        buffer.size = 0


cdef int64_t _now_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * 1000 + now.tv_nsec // 1000000


@cython.final
cdef class RedoChannel:
    """One redo process' standard input, output and error.

    Requests are collected by add_apply() and add_mask(), sent and answered by exchange(). The
    descriptors stay the caller's to close. Not thread safe.
    """

    cdef int to_fd
    cdef int from_fd
    cdef int err_fd
    cdef Buffer requests
    cdef Buffer responses
    cdef Buffer errors
    cdef size_t sent
    cdef size_t parsed  # bytes of complete responses
    cdef int expected
    cdef int answered
    cdef bint gave_up
    cdef int last_errno

    def __cinit__(self, int to_fd, int from_fd, int err_fd):
        self.to_fd = to_fd
        self.from_fd = from_fd
        self.err_fd = err_fd
        for fd in (to_fd, from_fd, err_fd):
            os.set_blocking(fd, False)
        for fd in (to_fd, from_fd):
            try:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, <int> _PIPE_SIZE)
            except PermissionError:
                pass  # beyond this user's quota: smaller pipes only cost more system calls

    def __dealloc__(self):
        free(self.requests.data)
        free(self.responses.data)
        free(self.errors.data)

    cdef int _append(self, const void *data, size_t size) except -1:
        """Append an item to the requests, padded to 8 bytes."""
        cdef size_t padded = (size + 7) & ~(<size_t> 7)
        if _reserve(&self.requests, padded) < 0:
            raise MemoryError
        memcpy(self.requests.data + self.requests.used, data, size)
        memset(self.requests.data + self.requests.used + size, 0, padded - size)
        self.requests.used += padded
        return 0

    cdef int _append_page(self, bytes page) except -1:
        if PyBytes_GET_SIZE(page) != _PAGE_SIZE:
            raise ValueError(f"a page has {_PAGE_SIZE} bytes, not {len(page)}")
        return self._append(PyBytes_AS_STRING(page), _PAGE_SIZE)

    cdef int _append_record(self, RecordHeader *item, bytes record) except -1:
        """Append a WAL record, whose own header must give its length."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(record)
        if size < _RECORD_HEADER_SIZE:
            raise ValueError(f"a WAL record of {size} bytes is shorter than its header")
        memcpy(&item.length, PyBytes_AS_STRING(record), sizeof(item.length))
        if item.length != size:
            raise ValueError(f"a WAL record of {item.length} bytes was given as {size} bytes")
        self._append(item, sizeof(RecordHeader))
        return self._append(PyBytes_AS_STRING(record), size)

    cdef int _finish_request(self, size_t start, RequestHeader *header) noexcept:
        """Write the header of the request that begins at `start`, now that its length is known."""
        header.length = self.requests.used - start - sizeof(RequestHeader)
        memcpy(self.requests.data + start, header, sizeof(RequestHeader))
        self.expected += 1
        return 0

    def add_apply(
        self,
        uint32_t spcnode,
        uint32_t dbnode,
        uint32_t relnode,
        uint8_t forknum,
        uint32_t blkno,
        bytes base,
        records,
    ):
        """Add a request: `base` (8192 bytes, None = zeroes) plus records [(end LSN, bytes)].

        Raises ValueError for a wrong size, TypeError or OverflowError; then nothing was added.
        """
        cdef size_t start = self.requests.used
        cdef RequestHeader header
        cdef RecordHeader item
        cdef bytes record
        memset(&header, 0, sizeof(header))
        memset(&item, 0, sizeof(item))
        header.type = _REQUEST_APPLY
        header.forknum_or_rmid = forknum
        header.has_base = base is not None
        header.spcnode = spcnode
        header.dbnode = dbnode
        header.relnode = relnode
        header.blkno = blkno
        try:
            self._append(&header, sizeof(header))
            if base is not None:
                self._append_page(base)
            for lsn, data in records:
                item.end_lsn = lsn
                record = data
                if record is None:
                    raise TypeError("a WAL record is None")
                self._append_record(&item, record)
                header.nrecords += 1
        except BaseException:
            self.requests.used = start
            raise
        self._finish_request(start, &header)

    def add_mask(self, uint8_t rmid, uint32_t blkno, bytes page not None):
        """Add a request to mask a page of 8192 bytes. Raises ValueError for a wrong size."""
        cdef size_t start = self.requests.used
        cdef RequestHeader header
        memset(&header, 0, sizeof(header))
        header.type = _REQUEST_MASK
        header.forknum_or_rmid = rmid
        header.has_base = 1
        header.blkno = blkno
        try:
            self._append(&header, sizeof(header))
            self._append_page(page)
        except BaseException:
            self.requests.used = start
            raise
        self._finish_request(start, &header)

    @property
    def pending_bytes(self) -> int:
        """Size of the requests added since the last exchange()."""
        return self.requests.used

    def expect_hello(self):
        """Make the next exchange() wait for the frame that a process sends at its start."""
        self.expected += 1

    def exchange(self, double timeout):
        """Send what was added and collect the answers: ([(outcome, bytes)], why it ended).

        COMPLETE: every request is answered. GAVE_UP: the last answer is FAILED and the process
        ends with it. CLOSED: the process has gone without a word. TIMED_OUT: the first request
        without an answer got none for `timeout` seconds. After all but COMPLETE the channel is
        unusable, as it is after an exception: OSError, MemoryError, what a signal handler raised,
        or ValueError for an answer that breaks the protocol.
        """
        cdef int end
        cdef int64_t timeout_ms = <int64_t> (timeout * 1000)
        cdef int64_t deadline
        self.sent = 0
        self.parsed = 0
        self.answered = 0
        self.gave_up = False
        self.responses.used = 0
        deadline = _now_ms() + timeout_ms
        while True:
            with nogil:
                end = self._run(timeout_ms, &deadline)
            if end != -EINTR:
                break
            PyErr_CheckSignals()
        if end == _ERROR:
            if self.last_errno == 0:
                raise ValueError("the redo process broke the protocol")
            raise OSError(self.last_errno, strerror(self.last_errno).decode())
        try:
            return self._outcomes(), end
        finally:
            self.expected = 0
            _clear(&self.requests)
            _clear(&self.responses)

    def take_stderr(self) -> bytes:
        """What the process has written to standard error since the last call (its first 16 kB)."""
        cdef bytes text
        self._drain_stderr()
        if self.errors.used == 0:
            return b""
        text = PyBytes_FromStringAndSize(self.errors.data, self.errors.used)
        self.errors.used = 0
        return text

    cdef list _outcomes(self):
        """The complete responses as Python objects."""
        cdef list found = []
        cdef size_t pos = 0
        cdef ResponseHeader header
        while pos < self.parsed:
            memcpy(&header, self.responses.data + pos, sizeof(header))
            pos += sizeof(header)
            found.append((
                header.status,
                PyBytes_FromStringAndSize(self.responses.data + pos, header.length),
            ))
            pos += header.length
        return found

    cdef int _run(self, int64_t timeout_ms, int64_t *deadline) noexcept nogil:
        """Write while reading until all is answered; -EINTR asks to be called again."""
        cdef pollfd fds[3]
        cdef int ready, before
        cdef int64_t left
        cdef int open_in = 1
        fds[0].fd = self.from_fd
        fds[1].fd = self.err_fd
        fds[0].events = fds[1].events = POLLIN
        fds[2].events = POLLOUT
        if self._send() < 0:
            open_in = 0
        while self.answered < self.expected:
            left = deadline[0] - _now_ms()
            if left <= 0:
                return _TIMED_OUT
            # A process that closed its input may still have said why: read on to the end.
            fds[2].fd = self.to_fd if open_in and self.sent < self.requests.used else -1
            ready = poll(fds, 3, <int> min(left, 1 << 30))
            if ready < 0:
                return self._failed(errno)
            if fds[1].revents & POLLIN:
                self._drain_stderr()
            elif fds[1].revents:
                fds[1].fd = -1
            if fds[0].revents:
                before = self.answered
                ready = self._receive()
                if ready < 0:
                    return self._failed(-ready)
                if ready == 0:
                    return _CLOSED
                if not self._parse():
                    return self._failed(0)
                if self.gave_up:
                    return _GAVE_UP
                if self.answered != before:
                    deadline[0] = _now_ms() + timeout_ms
            if fds[2].fd >= 0 and fds[2].revents and self._send() < 0:
                open_in = 0
        return _COMPLETE

    cdef int _failed(self, int code) noexcept nogil:
        """The result of _run() after a system call failed with an errno; 0 = a broken protocol."""
        if code == EINTR:
            return -EINTR
        self.last_errno = code
        return _ERROR

    cdef int _send(self) noexcept nogil:
        """Write as much as the pipe takes; -1 if nobody reads it any more."""
        cdef ssize_t done
        while self.sent < self.requests.used:
            done = write(
                self.to_fd, self.requests.data + self.sent, self.requests.used - self.sent
            )
            if done < 0:
                if errno == EINTR:
                    continue
                return 0 if errno == EAGAIN else -1
            self.sent += done
        return 0

    cdef int _receive(self) noexcept nogil:
        """Read what is there: 1, or 0 at the end of file, or a negative errno."""
        cdef ssize_t got
        if _reserve(&self.responses, _READ_SIZE) < 0:
            return -ENOMEM
        got = read(
            self.from_fd,
            self.responses.data + self.responses.used,
            self.responses.size - self.responses.used,
        )
        if got < 0:
            return 1 if errno == EAGAIN else -errno
        self.responses.used += got
        return 1 if got > 0 else 0

    cdef bint _parse(self) noexcept nogil:
        """Count the complete responses; false if one makes no sense."""
        cdef ResponseHeader header
        cdef size_t size
        while self.responses.used - self.parsed >= sizeof(header):
            memcpy(&header, self.responses.data + self.parsed, sizeof(header))
            if header.length > _MAX_PAYLOAD or self.answered == self.expected:
                return False
            size = sizeof(header) + header.length
            if self.responses.used - self.parsed < size:
                break
            self.parsed += size
            self.answered += 1
            if header.status == _FAILED:
                self.gave_up = True
                break
        return True

    cdef void _drain_stderr(self) noexcept nogil:
        """Keep the first part of what is there and drop the rest."""
        cdef char chunk[4096]
        cdef ssize_t got
        while True:
            got = read(self.err_fd, chunk, sizeof(chunk))
            if got < 0 and errno == EINTR:
                continue
            if got <= 0:
                return
            if self.errors.used < _KEPT_STDERR and _reserve(&self.errors, got) == 0:
                memcpy(self.errors.data + self.errors.used, chunk, got)
                self.errors.used += got
