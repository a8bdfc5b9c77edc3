"""The WAL written last, in memory for those who follow closely.

WAL goes to the disk past the page cache, so who reads it from the files at once would read it from
the disk. One thread puts, any others read without a lock: a reader copies, and looks afterwards
whether that was overwritten meanwhile. Costs no memory before somebody reads.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cdef extern from *:
    """
    #define wal_load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
    #define wal_store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
    #define wal_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    uint64_t wal_load(uint64_t *p) noexcept nogil
    uint8_t *wal_load_pointer "wal_load"(uint8_t **p) noexcept nogil
    void wal_store(uint64_t *p, uint64_t value) noexcept nogil
    void wal_store_pointer "wal_store"(uint8_t **p, uint8_t *value) noexcept nogil
    void wal_fence() noexcept nogil

cdef enum:
    CAPACITY = 1 << 20


cdef class RecentWal:
    """Holds up to 1 MiB. WAL at a lower LSN than before, after a truncation, replaces everything."""

    def __dealloc__(self):
        free(self.ring)

    cdef void put(self, uint64_t lsn, const uint8_t *data, size_t size) noexcept nogil:
        """Add WAL that was written at `lsn`."""
        cdef uint8_t *ring = self.ring
        cdef uint64_t end = lsn + size
        cdef size_t piece
        if ring == NULL:
            if not self.wanted:
                return
            self.wanted = False
            ring = <uint8_t *> malloc(CAPACITY)
            if ring == NULL:
                return
            self.begin = self.end = lsn
            wal_store_pointer(&self.ring, ring)
        if lsn != self.end:
            wal_store(&self.generation, self.generation + 1)
            wal_fence()
            wal_store(&self.begin, lsn)
            wal_store(&self.end, lsn)
            wal_store(&self.generation, self.generation + 1)
        if end - self.begin > CAPACITY:
            # Before the bytes go.
            wal_store(&self.begin, end - CAPACITY)
        wal_fence()
        if size > CAPACITY:
            data += size - CAPACITY
            lsn += size - CAPACITY
            size = CAPACITY
        while size:
            piece = min(size, CAPACITY - lsn % CAPACITY)
            memcpy(ring + lsn % CAPACITY, data, piece)
            data += piece
            lsn += piece
            size -= piece
        wal_store(&self.end, end)

    def read(self, uint64_t lsn, size_t size):
        """Up to `size` bytes at `lsn`, None if they are not here (any more)."""
        cdef uint8_t *ring = wal_load_pointer(&self.ring)
        cdef uint64_t generation = wal_load(&self.generation)
        cdef uint64_t end = wal_load(&self.end)
        cdef size_t have, piece, at
        cdef bytes result
        cdef uint8_t *out
        if ring == NULL:
            self.wanted = True
            return None
        if generation % 2 or lsn >= end or lsn < wal_load(&self.begin):
            return None
        have = min(<uint64_t> size, end - lsn)
        if have > CAPACITY:
            return None
        result = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> have)
        out = <uint8_t *> PyBytes_AS_STRING(result)
        at = lsn % CAPACITY
        piece = min(have, CAPACITY - at)
        memcpy(out, ring + at, piece)
        memcpy(out + piece, ring, have - piece)
        wal_fence()
        if wal_load(&self.begin) > lsn or wal_load(&self.generation) != generation:
            return None
        return result
