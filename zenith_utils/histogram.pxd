from libc.stdint cimport uint64_t


cdef class HistogramCell:
    cdef readonly tuple bounds
    cdef double *limits
    cdef uint64_t *counts
    cdef int n
    cdef uint64_t total

    cdef void add(self, double value) noexcept nogil
