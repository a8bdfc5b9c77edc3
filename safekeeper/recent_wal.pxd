"""The WAL written last, in memory for those who follow closely: see recent_wal.pyx."""
from libc.stdint cimport uint8_t, uint64_t

cdef class RecentWal:
    cdef uint8_t *ring                 # NULL while nobody has asked
    cdef uint64_t begin, end           # what is in it
    cdef uint64_t generation           # of what follows each other; odd while that changes
    cdef bint wanted

    cdef void put(self, uint64_t lsn, const uint8_t *data, size_t size) noexcept nogil
