"""Cache of the blocks of layer files, checked and unpacked: what reads have got from disk.

A block is known by the number of its layer file, which no other file ever has, and its offset
there. The blocks lie in shards by a hash of the two, each with a lock that is held for the look
into a bucket or a few steps of eviction, never for I/O or copying, and never while waiting for the
GIL.

What goes is chosen by SIEVE (Zhang et al., NSDI 2024): blocks stay in the order they came, a hit
only marks its block, and a hand goes from the oldest to the newest one, takes marks away and takes
out what has none. So a scan, whose blocks are used once, drives out little of what is used again
and again.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from pageserver.layered_repository.layer_leaf cimport leaf_parse

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from *:
    """
    #include <stdint.h>

    static uint64_t block_files;
    static inline uint64_t block_next_file(void)
    { return __atomic_add_fetch(&block_files, 1, __ATOMIC_RELAXED); }

    static inline void block_count_pin(int64_t *pins)
    { __atomic_add_fetch(pins, 1, __ATOMIC_RELAXED); }
    /* How many are left; whoever takes the last one away sees all that the others did. */
    static inline int64_t block_count_unpin(int64_t *pins)
    { return __atomic_sub_fetch(pins, 1, __ATOMIC_ACQ_REL); }

    static inline void block_count_kept(uint32_t *kept, int by)
    { __atomic_add_fetch(kept, (uint32_t) by, __ATOMIC_RELAXED); }
    static inline uint32_t block_kept(const uint32_t *kept)
    { return __atomic_load_n(kept, __ATOMIC_RELAXED); }
    """
    uint64_t block_next_file() noexcept nogil
    void block_count_pin(int64_t *pins) noexcept nogil
    int64_t block_count_unpin(int64_t *pins) noexcept nogil
    void block_count_kept(uint32_t *kept, int by) noexcept nogil
    uint32_t block_kept(const uint32_t *kept) noexcept nogil

cdef enum:
    MAX_SHARDS = 16
    LEAST_SHARD = 1 << 20     # bytes; smaller shards would be filled unevenly
    BUCKET_SHARE = 4096       # bytes of cache for each bucket
    FILE_SLOTS = 1 << 12
    ALLOCATION = 16           # bytes that the allocator adds to a block
    LARGEST_SHARE = 4         # a block takes at most this part of its shard

cdef inline uint64_t block_hash(uint64_t file, uint64_t offset) noexcept nogil:
    cdef uint64_t x = (file * 0x9E3779B97F4A7C15ULL) ^ offset
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    return x ^ (x >> 32)


cdef uint64_t new_file_number() noexcept nogil:
    """A number for the blocks of a file, never given twice; not 0."""
    return block_next_file()


cdef void block_pin(CachedBlock *block) noexcept nogil:
    """Pin a block that is pinned once more."""
    block_count_pin(&block.pins)


cdef void block_release(CachedBlock *block) noexcept nogil:
    if block != NULL and block_count_unpin(&block.pins) == 0:
        free(block)


@cython.final
cdef class BlockCache:
    """At most `capacity` bytes of blocks, with all that they take but what a reader has pinned.

    0 switches the cache off. The page cache may borrow a part of the capacity.
    """

    def __cinit__(self, int64_t capacity):
        cdef Shard *shard
        cdef uint64_t buckets
        cdef int i, n = 1
        self.capacity = max(capacity, 0)
        while n < MAX_SHARDS and self.capacity // (2 * n) >= LEAST_SHARD:
            n *= 2
        self.shards = <Shard *> calloc(n, sizeof(Shard))
        self.kept = <uint32_t *> calloc(FILE_SLOTS, sizeof(uint32_t))
        if self.shards == NULL or self.kept == NULL:
            raise MemoryError
        self.n_shards = n
        buckets = 16
        while buckets * BUCKET_SHARE < <uint64_t> (self.capacity // n):
            buckets *= 2
        for i in range(n):
            shard = &self.shards[i]
            shard.buckets = <CachedBlock **> calloc(buckets, sizeof(CachedBlock *))
            if shard.buckets == NULL or pthread_mutex_init(&shard.mutex, NULL) != 0:
                raise MemoryError
            shard.mask = buckets - 1
            shard.limit = self.limit_of_shard(self.capacity)
            self.n_ready += 1

    def __dealloc__(self):
        cdef Shard *shard
        cdef int i
        if self.shards == NULL:
            return
        with nogil:
            for i in range(self.n_shards):
                shard = &self.shards[i]
                while shard.oldest != NULL:
                    shard_remove(self.kept, shard, shard.oldest)
                free(shard.buckets)
                if i < self.n_ready:
                    pthread_mutex_destroy(&shard.mutex)
        free(self.shards)
        free(self.kept)

    # ---- for people

    def __len__(self):
        return self.totals().count

    @property
    def size(self):
        """Bytes that the blocks in the cache take."""
        return self.totals().size

    @property
    def hits(self):
        """How many blocks were found."""
        return self.totals().hits

    @property
    def misses(self):
        """How many were not."""
        return self.totals().misses

    def clear(self):
        """Forget all blocks; what readers have stays with them."""
        cdef Shard *shard
        cdef int i
        with nogil:
            for i in range(self.n_shards):
                shard = &self.shards[i]
                pthread_mutex_lock(&shard.mutex)
                while shard.oldest != NULL:
                    shard_remove(self.kept, shard, shard.oldest)
                pthread_mutex_unlock(&shard.mutex)

    cdef Totals totals(self) noexcept nogil:
        """The sums over all shards."""
        cdef Totals sums = Totals(0, 0, 0, 0)
        cdef Shard *shard
        cdef int i
        for i in range(self.n_shards):
            shard = &self.shards[i]
            pthread_mutex_lock(&shard.mutex)
            sums.count += shard.totals.count
            sums.size += shard.totals.size
            sums.hits += shard.totals.hits
            sums.misses += shard.totals.misses
            pthread_mutex_unlock(&shard.mutex)
        return sums

    # ---- for readers

    cdef CachedBlock *find(self, uint64_t file, uint64_t offset, bint keep) noexcept nogil:
        cdef uint64_t h = block_hash(file, offset)
        cdef Shard *shard = &self.shards[(h >> 32) & <uint64_t> (self.n_shards - 1)]
        cdef CachedBlock *block
        pthread_mutex_lock(&shard.mutex)
        block = shard.buckets[h & shard.mask]
        while block != NULL and (block.offset != offset or block.file != file):
            block = block.chain
        if block != NULL:
            block_count_pin(&block.pins)
            if keep:
                block.visited = True
            shard.totals.hits += 1
        else:
            shard.totals.misses += 1
        pthread_mutex_unlock(&shard.mutex)
        return block

    cdef CachedBlock *add(self, uint64_t file, uint64_t offset, const uint8_t *payload,
                          uint32_t size, bint leaf) noexcept nogil:
        cdef uint64_t h = block_hash(file, offset)
        cdef Shard *shard = &self.shards[(h >> 32) & <uint64_t> (self.n_shards - 1)]
        cdef int64_t charge = <int64_t> (sizeof(CachedBlock) + ALLOCATION) + size
        cdef CachedBlock *block
        cdef CachedBlock *other
        cdef uint8_t *copy
        if charge > shard.limit // LARGEST_SHARE:
            return NULL
        block = <CachedBlock *> malloc(sizeof(CachedBlock) + size)
        if block == NULL:
            return NULL
        copy = <uint8_t *> (block + 1)
        memcpy(copy, payload, size)
        block.file = file
        block.offset = offset
        block.charge = charge
        block.pins = 2
        block.visited = False
        block.size = size
        block.payload = copy
        block.leaf.number = -1
        if leaf and not leaf_parse(&block.leaf, copy, size):
            free(block)
            return NULL
        pthread_mutex_lock(&shard.mutex)
        other = shard.buckets[h & shard.mask]
        while other != NULL and (other.offset != offset or other.file != file):
            other = other.chain
        if other != NULL:
            # Another reader was faster: both have read the same.
            block_count_pin(&other.pins)
        else:
            shard_insert(shard, block, h)
            block_count_kept(&self.kept[file % FILE_SLOTS], 1)
            shard_shrink(self.kept, shard)
        pthread_mutex_unlock(&shard.mutex)
        if other != NULL:
            free(block)
            return other
        return block

    cdef void forget(self, uint64_t file) noexcept nogil:
        """Drop the blocks of a file that nobody will read again."""
        cdef Shard *shard
        cdef CachedBlock *block
        cdef CachedBlock *newer
        cdef int i
        if block_kept(&self.kept[file % FILE_SLOTS]) == 0:
            return
        for i in range(self.n_shards):
            shard = &self.shards[i]
            pthread_mutex_lock(&shard.mutex)
            block = shard.oldest
            while block != NULL:
                newer = block.newer
                if block.file == file:
                    shard_remove(self.kept, shard, block)
                block = newer
            pthread_mutex_unlock(&shard.mutex)

    cdef void lend(self, int64_t size) noexcept nogil:
        """Keep `size` bytes of the capacity free for somebody else."""
        cdef int64_t limit = self.limit_of_shard(self.capacity - size)
        cdef Shard *shard
        cdef int i
        for i in range(self.n_shards):
            shard = &self.shards[i]
            pthread_mutex_lock(&shard.mutex)
            shard.limit = limit
            shard_shrink(self.kept, shard)
            pthread_mutex_unlock(&shard.mutex)

    cdef int64_t limit_of_shard(self, int64_t size) noexcept nogil:
        return size // self.n_shards if size > 0 else 0


# ---- a shard, its lock held

cdef void shard_insert(Shard *shard, CachedBlock *block, uint64_t h) noexcept nogil:
    block.chain = shard.buckets[h & shard.mask]
    shard.buckets[h & shard.mask] = block
    block.newer = NULL
    block.older = shard.newest
    if shard.newest != NULL:
        shard.newest.newer = block
    else:
        shard.oldest = block
    shard.newest = block
    shard.totals.size += block.charge
    shard.totals.count += 1


cdef void shard_shrink(uint32_t *kept, Shard *shard) noexcept nogil:
    """Move the hand until the blocks take no more than they may."""
    cdef CachedBlock *block
    while shard.totals.size > shard.limit and shard.oldest != NULL:
        block = shard.hand if shard.hand != NULL else shard.oldest
        shard.hand = block.newer
        if block.visited:
            block.visited = False
        else:
            shard_remove(kept, shard, block)


cdef void shard_remove(uint32_t *kept, Shard *shard, CachedBlock *block) noexcept nogil:
    """Take a block out; it goes with its last reader."""
    cdef CachedBlock **link = &shard.buckets[block_hash(block.file, block.offset) & shard.mask]
    while link[0] != block:
        link = &link[0].chain
    link[0] = block.chain
    if block.newer != NULL:
        block.newer.older = block.older
    else:
        shard.newest = block.older
    if block.older != NULL:
        block.older.newer = block.newer
    else:
        shard.oldest = block.newer
    if shard.hand == block:
        shard.hand = block.newer
    shard.totals.size -= block.charge
    shard.totals.count -= 1
    block_count_kept(&kept[block.file % FILE_SLOTS], -1)
    block_release(block)
