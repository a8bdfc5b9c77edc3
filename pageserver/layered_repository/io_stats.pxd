from libc.stdint cimport uint64_t

from zenith_utils.histogram cimport HistogramCell


cdef class IoStats:
    cdef HistogramCell open_time, read_time, write_time, fsync_time
    cdef uint64_t read, written

    cdef void count_read(self, double started, size_t size) noexcept nogil
    cdef void count_write(self, double started, size_t size) noexcept nogil
    cdef void count_fsync(self, double started) noexcept nogil


cdef double clock_seconds() noexcept nogil
