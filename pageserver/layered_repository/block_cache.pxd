"""Cache of the blocks of layer files: see block_cache.pyx.

A block is found and added without the GIL, by any number of threads. What `find` and `add` return
is pinned: its bytes stay until `block_release`, whether the cache keeps the block or not.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.layer_leaf cimport LeafView

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef struct CachedBlock:     # the shard's lock is for the links, `hits` and `is_main`
    CachedBlock *chain       # of the same bucket
    CachedBlock *newer       # in its queue
    CachedBlock *older
    uint64_t file
    uint64_t offset
    int64_t charge           # bytes of memory
    int64_t pins             # of readers, and one of the cache while it keeps the block; atomic
    int hits                 # up to MAX_HITS, less one for each round in the main queue
    bint is_main             # which queue
    uint32_t size            # of the payload
    LeafView leaf            # of a leaf: the parsed payload
    const uint8_t *payload

cdef struct Queue:
    CachedBlock *newest
    CachedBlock *oldest
    int64_t size             # bytes

cdef struct Totals:
    int64_t count
    int64_t size             # bytes
    uint64_t hits
    uint64_t misses

cdef struct Shard:           # on cache lines of its own
    pthread_mutex_t mutex
    CachedBlock **buckets
    uint64_t mask
    uint32_t *evicted        # hashes of blocks that left the first queue, one for each bucket
    Queue first
    Queue main
    int64_t limit
    Totals totals
    uint8_t padding[64]

cdef class BlockCache:
    cdef readonly int64_t capacity
    cdef Shard *shards
    cdef int n_shards, n_ready
    cdef uint32_t *kept          # how many blocks of the files of each number modulo FILE_SLOTS

    # The block at an offset of a file, NULL if it is not there; `keep`: count that for its stay.
    cdef CachedBlock *find(self, uint64_t file, uint64_t offset, bint keep) noexcept nogil
    # Copy a block, NULL if there is no room or no memory for it; `leaf`: its payload is parsed.
    cdef CachedBlock *add(self, uint64_t file, uint64_t offset, const uint8_t *payload,
                          uint32_t size, bint leaf) noexcept nogil
    cdef void forget(self, uint64_t file) noexcept nogil
    cdef void lend(self, int64_t size) noexcept nogil
    cdef Totals totals(self) noexcept nogil
    cdef int64_t limit_of_shard(self, int64_t size) noexcept nogil

cdef void block_pin(CachedBlock *block) noexcept nogil
cdef void block_release(CachedBlock *block) noexcept nogil
cdef uint64_t new_file_number() noexcept nogil
