"""The file behind a big open layer: chunks of values that no longer have to be in memory.

It is made with the name `ephemeral-<n>` and loses that name at once, so the system takes its space
back when the layer goes, however that happens. Nothing in it is meant to survive a restart: what it
holds is in the WAL. It is therefore no part of what `Files` lets a test interrupt, and never synced.

One thread appends whole chunks, any number of threads read what was appended. Both go through the
descriptor instead of a mapping: a full or failing disk is an error code then, not a signal, and
reading does not add to the memory of the process.
"""
import os

from libc.errno cimport EEXIST, EINTR, EIO, ENOMEM, ENOSPC, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, realloc

from pageserver.layered_repository.errors import CorruptLayerError

cdef extern from *:
    """
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <sys/types.h>
    #include <unistd.h>

    /* A descriptor of a new file without a name, -1 with errno otherwise. Names that are taken are
       those of files a crash left between the two steps. */
    static int ephemeral_open(const char *directory, uint64_t *number)
    {
        static uint64_t counter;
        char path[4096];
        for (;;) {
            int fd;
            *number = __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
            if (snprintf(path, sizeof path, "%s/ephemeral-%llu", directory,
                         (unsigned long long) *number) >= (int) sizeof path) {
                errno = ENAMETOOLONG;
                return -1;
            }
            fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
            if (fd >= 0 && unlink(path) != 0) {
                int saved = errno;
                close(fd);
                errno = saved;
                return -1;
            }
            if (fd >= 0 || errno != EEXIST)
                return fd;
        }
    }
    """
    int ephemeral_open(const char *directory, uint64_t *number) noexcept nogil
    int posix_close "close"(int fd) noexcept nogil
    ssize_t posix_pread "pread"(int fd, void *data, size_t size, int64_t offset) noexcept nogil
    ssize_t posix_pwrite "pwrite"(int fd, const void *data, size_t size,
                                  int64_t offset) noexcept nogil

cdef enum:
    PAGE_MASK = 4095
    WINDOW_SIZE = 128 << 10      # of a read that goes on where the one before ended,
    MAX_GAP = 8 << 10            # or so far behind it: as quick to read as a system call

EPHEMERAL_PREFIX = "ephemeral-"


cdef uint8_t *window_room(ReadWindow *window, size_t size) noexcept nogil:
    """Memory for `size` bytes instead of what is in the window; NULL, error ENOMEM, without."""
    cdef void *grown
    window.start = window.end = 0
    if size > window.capacity:
        grown = realloc(window.data, size)
        if grown == NULL:
            window.error = ENOMEM
            return NULL
        window.data = <uint8_t *> grown
        window.capacity = size
    return window.data


cdef void window_free(ReadWindow *window) noexcept nogil:
    """Give the memory back; the window can be used again."""
    free(window.data)
    window.data = NULL
    window.capacity = 0
    window.start = window.end = 0


cdef class EphemeralFile:
    """A file in `directory` that is made by the first `append` and goes with the object."""

    def __cinit__(self, directory):
        self.fd = -1
        self.directory = os.fsencode(directory)
        self.directory_path = self.directory

    def __dealloc__(self):
        if self.fd >= 0:
            posix_close(self.fd)

    @property
    def path(self):
        """What the file was called, for messages."""
        return os.path.join(os.fsdecode(self.directory), f"{EPHEMERAL_PREFIX}{self.number}")

    cdef int _create(self) noexcept nogil:
        self.fd = ephemeral_open(self.directory_path, &self.number)
        return 0 if self.fd >= 0 else errno

    cdef int64_t append(self, const uint8_t *data, size_t size) noexcept nogil:
        """Write a chunk to the end of the file; its offset, a multiple of 4096, or minus errno.

        After an error the next chunk goes to the same place.
        """
        cdef size_t done = 0
        cdef ssize_t n
        cdef uint64_t offset = self.size
        self.append_error = 0
        if self.fd < 0:
            self.append_error = self._create()
        while self.append_error == 0 and done < size:
            n = posix_pwrite(self.fd, data + done, size - done, <int64_t> (offset + done))
            if n > 0:
                done += n
            elif n == 0:
                self.append_error = ENOSPC
            elif errno != EINTR:
                self.append_error = errno
        if self.append_error:
            return -<int64_t> self.append_error
        self.size = (offset + size + PAGE_MASK) & ~<uint64_t> PAGE_MASK
        return <int64_t> offset

    cdef const uint8_t *read(self, ReadWindow *window, uint64_t offset, size_t size,
                             uint64_t limit) noexcept nogil:
        """`size` bytes at `offset`, valid until the window's next use; NULL with window.error.

        Values wanted in the order of the file are read ahead of, never beyond `limit`, the end of
        the chunk: what follows may be being written.
        """
        cdef size_t wanted = size, done = 0
        cdef ssize_t n
        if offset >= window.start and offset + size <= window.end:
            return window.data + (offset - window.start)
        if window.end and offset >= window.end and offset - window.end < MAX_GAP:
            if wanted < WINDOW_SIZE:
                wanted = WINDOW_SIZE
            if wanted > limit - offset:
                wanted = limit - offset
        window.failed_at = offset
        if window_room(window, wanted) == NULL:
            return NULL
        while done < wanted:
            n = posix_pread(self.fd, window.data + done, wanted - done, <int64_t> (offset + done))
            if n > 0:
                done += n
            elif n == 0:
                window.error = EIO
                return NULL
            elif errno != EINTR:
                window.error = errno
                return NULL
        window.start = offset
        window.end = offset + wanted
        return window.data

    cdef int raise_error(self, const ReadWindow *window) except -1:
        """Raise why a value could not be had: MemoryError, OSError, CorruptLayerError."""
        if window.error == ENOMEM:
            raise MemoryError("no memory for a value of the open layer")
        if window.error:
            raise OSError(window.error, os.strerror(window.error), self.path)
        raise CorruptLayerError(
            self.path, window.failed_at,
            "the CRC of a value of the open layer does not match: restart the pageserver, which "
            "takes the WAL again, and check the disk")
