"""A hash table of the sizes of everything that has blocks: see size_table.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum:
    KIND_RELATION = 0        # a = spcnode, b = dbnode, c = relnode, d = forknum
    KIND_SLRU = 1            # a = SLRU kind, b = 1, c = segment number, d = 0
    KIND_DATABASE = 255      # a = spcnode, b = dbnode, c = d = 0: exists or not, no blocks

cdef enum:
    ABSENT = 0xFFFFFFFFU     # not a possible number of blocks

cdef struct SizeEntry:
    uint32_t a, b, c
    uint32_t nblocks         # ABSENT: known not to exist
    uint8_t kind, d
    bint used

cdef class SizeTable:
    cdef SizeEntry *entries
    cdef readonly int64_t count
    cdef int64_t mask
    # Index of the entry, -1 if nothing is known. Indices hold until the next `set`.
    cdef int64_t find(self, uint8_t kind, uint32_t a, uint32_t b, uint32_t c,
                      uint8_t d) noexcept nogil
    cdef int grow(self) except -1
