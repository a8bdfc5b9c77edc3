"""Memory that open layers hand on to later ones: see memory_pool.pyx."""
from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    HUGE_PAGE = 2 << 20

cdef struct Block:
    void *data
    size_t size

cdef class MemoryPool:
    cdef PyThread_type_lock lock
    cdef Block *blocks           # in the order they were given
    cdef uint32_t n_blocks
    cdef uint64_t limit
    cdef readonly uint64_t kept  # bytes in `blocks`

    # For any thread. Sizes are multiples of HUGE_PAGE.
    cdef void *take(self, size_t size) noexcept nogil
    cdef void *take_zeroed(self, size_t size) noexcept nogil
    cdef void give(self, void *data, size_t size) noexcept nogil

    # Private.
    cdef void *_take_kept(self, size_t size) noexcept nogil
    cdef void _drop_beyond(self, uint64_t limit) noexcept nogil
