"""Cache of the blocks of layer files, checked and unpacked: what reads have got from disk.

A block is known by the number of its layer file, which no other file ever has, and its offset
there. The blocks lie in shards by a hash of the two, each with a lock that is held for the look
into a bucket or a few steps of eviction, never for I/O or copying, and never while waiting for the
GIL.

What goes is chosen by S3-FIFO (Yang et al., SOSP 2023): new blocks wait in a first queue, for a
quarter of the room. Those that were found there before they come to its end go over to the main
queue, where each hit, up to three, is good for another round. The others go, and if they come back
soon they are in the main queue at once. So a scan, whose blocks are used once, drives out little of
what is used again and again.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
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
    FIRST_SHARE = 4           # and the first queue, unless there is nothing else
    MAX_HITS = 3

cdef inline uint64_t block_hash(uint64_t file, uint64_t offset) noexcept nogil:
    cdef uint64_t x = (file * 0x9E3779B97F4A7C15ULL) ^ offset
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    return x ^ (x >> 32)


cdef inline uint32_t block_print(uint64_t h) noexcept nogil:
    """What tells the blocks of a bucket apart after they have gone; not 0."""
    return <uint32_t> (h >> 32) | 1


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
    """The newest and most wanted blocks; safe for many threads.

    They take at most `capacity` bytes of memory with their overhead, 0 switches the cache off. Not
    counted are its tables, 3 bytes for each kilobyte, and blocks that have gone but that a reader
    still has pinned. The page cache may borrow a part of the capacity.
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
            shard.evicted = <uint32_t *> calloc(buckets, sizeof(uint32_t))
            if shard.buckets == NULL or shard.evicted == NULL \
                    or pthread_mutex_init(&shard.mutex, NULL) != 0:
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
                shard_clear(self.kept, shard)
                free(shard.buckets)
                free(shard.evicted)
                if i < self.n_ready:
                    pthread_mutex_destroy(&shard.mutex)
        free(self.shards)
        free(self.kept)

    # ---- from Python

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

    def get(self, uint64_t file, uint64_t offset):
        """A copy of the payload of a block, None if it is not in the cache."""
        cdef CachedBlock *block = self.find(file, offset, True)
        if block == NULL:
            return None
        try:
            return PyBytes_FromStringAndSize(<const char *> block.payload, block.size)
        finally:
            block_release(block)

    def put(self, uint64_t file, uint64_t offset, bytes payload not None):
        """Add the payload of a value block, if there is room."""
        block_release(self.add(file, offset, <const uint8_t *> <const char *> payload,
                               <uint32_t> len(payload), False))

    def clear(self):
        """Forget all blocks; what readers have stays with them."""
        cdef Shard *shard
        cdef int i
        with nogil:
            for i in range(self.n_shards):
                shard = &self.shards[i]
                pthread_mutex_lock(&shard.mutex)
                shard_clear(self.kept, shard)
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
            if keep and block.hits < MAX_HITS:
                block.hits += 1
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
        block.hits = 0
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
        cdef int i
        if block_kept(&self.kept[file % FILE_SLOTS]) == 0:
            return
        for i in range(self.n_shards):
            shard = &self.shards[i]
            pthread_mutex_lock(&shard.mutex)
            shard_forget(self.kept, shard, &shard.first, file)
            shard_forget(self.kept, shard, &shard.main, file)
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

cdef void queue_push(Queue *queue, CachedBlock *block) noexcept nogil:
    """Make it the newest one."""
    block.newer = NULL
    block.older = queue.newest
    if queue.newest != NULL:
        queue.newest.newer = block
    else:
        queue.oldest = block
    queue.newest = block
    queue.size += block.charge


cdef void queue_take(Queue *queue, CachedBlock *block) noexcept nogil:
    """Take a block out, wherever it is."""
    if block.newer != NULL:
        block.newer.older = block.older
    else:
        queue.newest = block.older
    if block.older != NULL:
        block.older.newer = block.newer
    else:
        queue.oldest = block.newer
    queue.size -= block.charge


cdef void shard_insert(Shard *shard, CachedBlock *block, uint64_t h) noexcept nogil:
    cdef uint64_t bucket = h & shard.mask
    block.chain = shard.buckets[bucket]
    shard.buckets[bucket] = block
    block.is_main = shard.evicted[bucket] == block_print(h)
    queue_push(&shard.main if block.is_main else &shard.first, block)
    shard.totals.size += block.charge
    shard.totals.count += 1


cdef void shard_shrink(uint32_t *kept, Shard *shard) noexcept nogil:
    """Evict until the blocks take no more than they may."""
    cdef CachedBlock *block
    cdef uint64_t h
    while shard.totals.size > shard.limit:
        if shard.main.oldest == NULL or shard.first.size > shard.limit // FIRST_SHARE:
            block = shard.first.oldest
            if block.hits:
                queue_take(&shard.first, block)
                block.is_main = True
                queue_push(&shard.main, block)
                continue
            h = block_hash(block.file, block.offset)
            shard.evicted[h & shard.mask] = block_print(h)
        else:
            block = shard.main.oldest
            if block.hits:
                queue_take(&shard.main, block)
                block.hits -= 1
                queue_push(&shard.main, block)
                continue
        shard_remove(kept, shard, block)


cdef void shard_clear(uint32_t *kept, Shard *shard) noexcept nogil:
    while shard.first.oldest != NULL:
        shard_remove(kept, shard, shard.first.oldest)
    while shard.main.oldest != NULL:
        shard_remove(kept, shard, shard.main.oldest)


cdef void shard_forget(uint32_t *kept, Shard *shard, Queue *queue, uint64_t file) noexcept nogil:
    """Remove the blocks of a file from a queue."""
    cdef CachedBlock *block = queue.oldest
    cdef CachedBlock *newer
    while block != NULL:
        newer = block.newer
        if block.file == file:
            shard_remove(kept, shard, block)
        block = newer


cdef void shard_remove(uint32_t *kept, Shard *shard, CachedBlock *block) noexcept nogil:
    """Take a block out; it goes with its last reader."""
    cdef CachedBlock **link = &shard.buckets[block_hash(block.file, block.offset) & shard.mask]
    while link[0] != block:
        link = &link[0].chain
    link[0] = block.chain
    queue_take(&shard.main if block.is_main else &shard.first, block)
    shard.totals.size -= block.charge
    shard.totals.count -= 1
    block_count_kept(&kept[block.file % FILE_SLOTS], -1)
    block_release(block)
