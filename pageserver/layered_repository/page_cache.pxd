"""Cache of reconstructed values: see page_cache.pyx."""
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t

from pageserver.layered_repository.block_cache cimport BlockCache

cdef enum:
    MAX_VERSIONS = 4          # of one key; the oldest one goes

cdef class Slot:
    cdef bytes key
    cdef int count
    cdef uint64_t lsns[MAX_VERSIONS + 1]
    cdef PyObject *values[MAX_VERSIONS + 1]      # owned
    cdef void *newer                             # Slots; NULL: none. The dict owns them.
    cdef void *older

cdef class PageCache:
    cdef readonly int64_t capacity
    cdef readonly int64_t size
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef BlockCache blocks       # whose capacity this cache borrows; None: it has one of its own
    cdef int64_t borrowed        # bytes of it
    cdef dict slots
    cdef void *newest
    cdef void *oldest

    cpdef get(self, bytes key, uint64_t lsn)
    cpdef put(self, bytes key, uint64_t lsn, bytes value)
    cdef void _borrow(self) noexcept
    cdef int _evict(self, Slot slot) except -1
    cdef void _link(self, Slot slot) noexcept
    cdef void _unlink(self, Slot slot) noexcept

cdef class TimelineCache:
    cdef PageCache cache
    cdef uint64_t number

    cpdef get(self, bytes key, uint64_t lsn)
    cpdef put(self, bytes key, uint64_t lsn, bytes value)
    cdef bytes _name(self, bytes key)
