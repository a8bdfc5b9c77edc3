"""The file behind a big open layer: see ephemeral_file.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef struct ReadWindow:      # where one thread's values are copied to; zeroed before its first use
    uint8_t *data
    size_t capacity
    uint64_t start           # the part of the file that is in `data`, empty: none
    uint64_t end
    uint64_t failed_at       # offset of the value that could not be had
    int error                # why: errno; 0: its CRC does not match

cdef class EphemeralFile:
    cdef readonly int fd             # -1 until the first append
    cdef readonly uint64_t size      # bytes appended, a multiple of the page size
    cdef readonly int append_error   # errno of the last append, 0: it worked
    cdef bytes directory
    cdef const char *directory_path  # of those bytes
    cdef uint64_t number

    cdef int64_t append(self, const uint8_t *data, size_t size) noexcept nogil
    cdef const uint8_t *read(self, ReadWindow *window, uint64_t offset, size_t size,
                             uint64_t limit) noexcept nogil
    cdef int raise_error(self, const ReadWindow *window) except -1
    cdef int _create(self) noexcept nogil

cdef uint8_t *window_room(ReadWindow *window, size_t size) noexcept nogil
cdef void window_free(ReadWindow *window) noexcept nogil
