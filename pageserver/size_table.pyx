"""The sizes of relation forks and SLRU segments as of the record being ingested.

Every block reference of the WAL looks a size up, so the table is native: open addressing with
linear probing, at most half full. Entries are added when something is met for the first time and
stay; what was dropped is kept as ABSENT, so that only unknown objects ask the store.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free


cdef inline uint64_t _hash(uint8_t kind, uint32_t a, uint32_t b, uint32_t c,
                           uint8_t d) noexcept nogil:
    cdef uint64_t h = ((<uint64_t> a << 32) | b) * 0x9E3779B97F4A7C15ULL
    h ^= (<uint64_t> c << 16 | <uint64_t> d << 8 | kind) * 0xC2B2AE3D27D4EB4FULL
    return (h ^ (h >> 29)) * 0xBF58476D1CE4E5B9ULL >> 20


cdef class SizeTable:
    """Maps (kind, a, b, c, d) to a number of blocks."""

    def __cinit__(self):
        self.mask = 1023
        self.entries = <SizeEntry *> calloc(self.mask + 1, sizeof(SizeEntry))
        if self.entries == NULL:
            raise MemoryError("no memory for the table of relation sizes")

    def __dealloc__(self):
        free(self.entries)

    cdef int64_t find(self, uint8_t kind, uint32_t a, uint32_t b, uint32_t c,
                      uint8_t d) noexcept nogil:
        cdef int64_t at = <int64_t> (_hash(kind, a, b, c, d) & <uint64_t> self.mask)
        cdef SizeEntry *e
        while True:
            e = &self.entries[at]
            if not e.used:
                return -1
            if e.c == c and e.b == b and e.a == a and e.d == d and e.kind == kind:
                return at
            at = (at + 1) & self.mask

    cdef int grow(self) except -1:
        cdef int64_t mask = self.mask * 2 + 1
        cdef SizeEntry *larger = <SizeEntry *> calloc(mask + 1, sizeof(SizeEntry))
        cdef SizeEntry *e
        cdef int64_t i, at
        if larger == NULL:
            raise MemoryError("no memory for the table of relation sizes")
        for i in range(self.mask + 1):
            e = &self.entries[i]
            if e.used:
                at = <int64_t> (_hash(e.kind, e.a, e.b, e.c, e.d) & <uint64_t> mask)
                while larger[at].used:
                    at = (at + 1) & mask
                larger[at] = e[0]
        free(self.entries)
        self.entries = larger
        self.mask = mask
        return 0

    def set(self, uint8_t kind, uint32_t a, uint32_t b, uint32_t c, uint8_t d, nblocks):
        """Record a size; None: the object does not exist."""
        cdef uint32_t value = ABSENT if nblocks is None else nblocks
        cdef int64_t at = self.find(kind, a, b, c, d)
        cdef SizeEntry *e
        if at < 0:
            if self.count * 2 >= self.mask:
                self.grow()
            at = <int64_t> (_hash(kind, a, b, c, d) & <uint64_t> self.mask)
            while self.entries[at].used:
                at = (at + 1) & self.mask
            e = &self.entries[at]
            e.kind, e.a, e.b, e.c, e.d, e.used = kind, a, b, c, d, True
            self.count += 1
        self.entries[at].nblocks = value

    def known(self, uint8_t kind, uint32_t a, uint32_t b, uint32_t c, uint8_t d):
        """Whether anything is recorded for the object."""
        return self.find(kind, a, b, c, d) >= 0

    def get(self, uint8_t kind, uint32_t a, uint32_t b, uint32_t c, uint8_t d):
        """The recorded size, None if the object does not exist; KeyError if nothing is known."""
        cdef int64_t at = self.find(kind, a, b, c, d)
        if at < 0:
            raise KeyError((kind, a, b, c, d))
        return None if self.entries[at].nblocks == ABSENT else self.entries[at].nblocks
