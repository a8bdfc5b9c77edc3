"""The file a layer is written to: a buffer, and system calls without the GIL.

They go through the store's Files object if that is more than the plain Files.
"""
import os

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EINTR, EIO, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from pageserver.layered_repository.files import Files
from pageserver.layered_repository.io_stats cimport clock_seconds

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdint.h>
    #include <unistd.h>

    /* Have the system begin to write a range, so that the fsync at the end has little left. */
    static void layer_start_writing(int fd, uint64_t from, uint64_t to)
    {
    #ifdef SYNC_FILE_RANGE_WRITE
        (void) sync_file_range(fd, (off_t) from, (off_t) (to - from), SYNC_FILE_RANGE_WRITE);
    #else
        (void) fd; (void) from; (void) to;
    #endif
    }
    """
    void layer_start_writing(int fd, uint64_t start, uint64_t end) noexcept nogil
    ssize_t posix_pwrite "pwrite"(int fd, const void *data, size_t size,
                                  int64_t offset) noexcept nogil
    int posix_fsync "fsync"(int fd) noexcept nogil

cdef enum:
    PUSH_SIZE = 8 << 20


cdef object view_of(const uint8_t *data, size_t size):
    return PyMemoryView_FromMemory(<char *> data, <Py_ssize_t> size, PyBUF_READ)


cdef class LayerOutput:
    """A new file at `path`, written from its start through the Files object. Raises OSError."""

    def __cinit__(self, str path not None, files not None, IoStats io=None):
        self.fd = -1
        self.path = path
        self.files = files
        self.io = io
        self.native = type(files) is Files
        self.buffer = <uint8_t *> malloc(OUTPUT_SIZE)
        if self.buffer == NULL:
            raise MemoryError
        self.fd = files.create(path)

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)
        free(self.buffer)

    cdef int flush(self) noexcept nogil:
        """Write what is in the buffer."""
        cdef int code = self.write(self.buffer, self.used)
        self.used = 0
        return code

    cdef int write(self, const uint8_t *data, size_t size) noexcept nogil:
        """Append, past the buffer, which is empty or `data` itself."""
        cdef int code = self.write_at(data, size, self.position)
        if code != 0:
            return code
        self.position += size
        if self.native and self.position - self.pushed >= PUSH_SIZE:
            layer_start_writing(self.fd, self.pushed, self.position)
            self.pushed = self.position
        return 0

    cdef int write_at(self, const uint8_t *data, size_t size, uint64_t offset) noexcept nogil:
        cdef ssize_t written
        cdef double started
        cdef size_t whole = size
        if size == 0:
            return 0
        started = clock_seconds()
        if not self.native:
            with gil:
                try:
                    self.files.write(self.fd, self.path, view_of(data, size), offset)
                except BaseException as error:
                    self.raised = error
                    return OUTPUT_RAISED
            return 0
        while size:
            written = posix_pwrite(self.fd, data, size, <int64_t> offset)
            if written < 0:
                if errno == EINTR:
                    continue
                return errno
            if written == 0:
                return EIO
            data += written
            size -= written
            offset += written
        if self.io is not None:
            self.io.count_write(started, whole)
        return 0

    cdef int sync(self) noexcept nogil:
        """Make the content durable."""
        cdef double started
        if not self.native:
            with gil:
                try:
                    self.files.fsync(self.fd, self.path)
                except BaseException as error:
                    self.raised = error
                    return OUTPUT_RAISED
            return 0
        started = clock_seconds()
        if posix_fsync(self.fd) != 0:
            return errno
        if self.io is not None:
            self.io.count_fsync(started)
        return 0

    cdef int raise_error(self, int code) except -1:
        """Raise the exception of a result that is not 0."""
        cdef object raised = self.raised
        if code == OUTPUT_RAISED and raised is not None:
            self.raised = None
            raise raised
        if code == ENOMEM:
            raise MemoryError(f"{self.path}: no memory for the index of the layer")
        raise OSError(code, os.strerror(code), self.path)

    def close(self):
        """Close the file. Raises OSError."""
        cdef int fd = self.fd
        if fd >= 0:
            self.fd = -1
            self.files.close(fd)

    def remove(self):
        """Remove the file, which is closed. Raises OSError."""
        self.files.unlink(self.path)
