"""The file through which a pageserver's feedback reaches the processes of Postgres.

One process writes it, the server's processes map it and read it (pgxn/zenith/feedback.c), at any
time and without a lock. It belongs to one life of a compute: nothing of it has to survive.

Layout, native byte order: magic (8 bytes), u64 generation, and at 64 and at 128 the two slots, each
six u64: logical size, received LSN, flushed LSN, uploaded LSN, time of the report (microseconds
since 2000-01-01), the LSN above which commits are held back. Generation g is in slot g % 2; before
the first one, 0, there is nothing to read. A writer fills the other slot, then counts the
generation up: who dies in between has changed nothing, and a reader has read one generation if it
is the same after reading as before.
"""

from libc.stdint cimport uint8_t, uint64_t

import mmap
import os

from zenith_utils.zenith_feedback import ZenithFeedback

cdef extern from *:
    """
    #define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define fence_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define fence_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    """
    void store_release(uint64_t *p, uint64_t value) noexcept nogil
    void store_relaxed(uint64_t *p, uint64_t value) noexcept nogil
    uint64_t load_acquire(const uint64_t *p) noexcept nogil
    uint64_t load_relaxed(const uint64_t *p) noexcept nogil
    void fence_acquire() noexcept nogil
    void fence_release() noexcept nogil

cdef enum:
    FILE_SIZE = 4096
    GENERATION = 8
    SLOTS = 64
    SLOT_SIZE = 64
    VALUES = 6

MAGIC = b"ZNFEEDB1"
NO_LIMIT = (1 << 64) - 1


class FeedbackFileError(Exception):
    """The file is not one of feedback; the message names it."""


def create(path):
    """Make the file anew, with nothing in it yet; readers of an old one keep that. Raises OSError.

    It is readable by everybody whom its directory lets in.
    """
    temp = path.with_name(path.name + ".new")
    temp.unlink(missing_ok=True)
    fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o644)
        # Allocated now: a hole that cannot be filled later would kill who writes through mmap.
        os.posix_fallocate(fd, 0, FILE_SIZE)
        os.pwrite(fd, MAGIC, 0)
    finally:
        os.close(fd)
    temp.replace(path)


cdef class FeedbackFile:
    """The open file. One process may call write()."""

    cdef object _map
    cdef uint8_t[::1] _view
    cdef uint8_t *_data

    def __init__(self, path):
        """Open a file that create() has made. Raises OSError, FeedbackFileError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != FILE_SIZE or os.pread(fd, len(MAGIC), 0) != MAGIC:
                raise FeedbackFileError(f"{path} is not a file of pageserver feedback")
            self._map = mmap.mmap(fd, FILE_SIZE)
        finally:
            os.close(fd)
        self._view = self._map
        self._data = &self._view[0]

    def write(self, feedback not None, uint64_t limit_lsn):
        """Let readers see this report, and that commits above `limit_lsn` are held back."""
        cdef uint64_t *generation = <uint64_t *> (self._data + GENERATION)
        cdef uint64_t following = load_relaxed(generation) + 1
        cdef uint64_t *slot = <uint64_t *> (self._data + SLOTS + SLOT_SIZE * (following & 1))
        cdef uint64_t[VALUES] values
        cdef int i
        values[0] = feedback.current_timeline_size
        values[1] = feedback.ps_writelsn
        values[2] = feedback.ps_flushlsn
        values[3] = feedback.ps_applylsn
        values[4] = <uint64_t> <long long> feedback.ps_replytime
        values[5] = limit_lsn
        # Whoever sees one of these sees that the generation before is over, too.
        fence_release()
        for i in range(VALUES):
            store_relaxed(slot + i, values[i])
        store_release(generation, following)

    def read(self):
        """The newest report and limit, None if there is none yet."""
        cdef uint64_t *generation = <uint64_t *> (self._data + GENERATION)
        cdef uint64_t *slot
        cdef uint64_t[VALUES] values
        cdef uint64_t current
        cdef int i
        while True:
            current = load_acquire(generation)
            if current == 0:
                return None
            slot = <uint64_t *> (self._data + SLOTS + SLOT_SIZE * (current & 1))
            for i in range(VALUES):
                values[i] = load_relaxed(slot + i)
            fence_acquire()
            if load_relaxed(generation) == current:
                break
        feedback = ZenithFeedback(
            values[0], values[1], values[2], values[3], <long long> values[4]
        )
        return feedback, values[5]
