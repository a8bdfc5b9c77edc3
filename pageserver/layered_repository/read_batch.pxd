"""What a read collects on its way through the layers: see read_batch.pyx."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.block_cache cimport CachedBlock
from pageserver.layered_repository.key cimport Key

cdef struct Query:
    Key key
    uint64_t floor       # values at or below this LSN are not needed: the caller has a base there
    int32_t newest       # index into `found` of the newest and the oldest value, -1: none
    int32_t oldest
    uint32_t count
    bint complete        # nothing older matters
    bint based           # because the caller's base does: there is nothing between it and `oldest`

cdef struct Found:
    uint64_t lsn
    const uint8_t *data
    CachedBlock *pin     # of the block that `data` is in; NULL: they are in the batch
    uint32_t size
    int32_t older        # index of the next older value of the same query, -1: none
    uint8_t flags

cdef struct Chunk:       # of values; they follow
    Chunk *older
    size_t size

cdef enum:
    FEW_FOUND = 4
    FEW_BYTES = 512

cdef class ReadBatch:
    cdef Query *queries
    cdef readonly int count
    cdef readonly int pending          # queries that are not complete
    cdef readonly bint ascending       # the keys are, without duplicates
    cdef bint any_floor
    cdef Found *found
    cdef int32_t n_found, cap_found
    cdef bint keeps_blocks             # what is read from files is to go to the block cache
    cdef uint8_t *room                 # for the next values
    cdef size_t left
    cdef Chunk *chunks
    cdef Query one_query
    cdef Found few_found[FEW_FOUND]
    cdef uint8_t few_bytes[FEW_BYTES]

    cdef int add(self, Query *query, uint64_t lsn, uint8_t flags, const uint8_t *data,
                 uint32_t size) noexcept nogil
    cdef int add_shared(self, Query *query, uint64_t lsn, uint8_t flags, const uint8_t *data,
                        uint32_t size, CachedBlock *block) noexcept nogil
    cdef int add_key(self, bytes key) except -1
    cdef int _more_room(self, uint32_t size) noexcept nogil
    cdef void need_above(self, int i, uint64_t lsn) noexcept nogil
    cdef void close_at(self, int first, int last, uint64_t upper) noexcept nogil
    cdef void close(self, int first, int last) noexcept nogil
    cdef bint any_pending(self, int first, int last) noexcept nogil
    cdef bytes data(self, const Found *entry)
    cdef int _check(self, int i) except -1
