"""What a read collects on its way through the layers, newest to oldest."""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy

from pageserver.layered_repository.block_cache cimport CachedBlock, block_pin, block_release
from pageserver.layered_repository.key cimport (
    FLAGS_IMAGE,
    WILL_INIT,
    Key,
    key_less,
    key_parse,
)

cdef enum:
    LONG_VALUE = 1024        # bytes from which on pinning is cheaper than copying
    LEAST_CHUNK = 16 << 10
    MOST_CHUNK = 1 << 20


@cython.final
@cython.freelist(16)
cdef class ReadBatch:
    """The keys of one read and the values found for them so far.

    Layers add values newest first through `add`; a query is complete at its first value with
    WILL_INIT. The values are copied here, or in a block of the block cache that is pinned for them,
    so nothing refers to a layer after its visit.
    """

    def __cinit__(self, keys=()):
        cdef Py_ssize_t i, n = len(keys)
        if n > 0x7FFFFFFF:
            raise ValueError("too many keys in one read")
        self.keeps_blocks = True
        self.ascending = True
        self.found = self.few_found
        self.cap_found = FEW_FOUND
        self.room = self.few_bytes
        self.left = FEW_BYTES
        self.queries = &self.one_query
        if n > 1:
            self.queries = <Query *> calloc(n, sizeof(Query))
            if self.queries == NULL:
                raise MemoryError
        for i in range(n):
            self.add_key(<bytes?> keys[i])

    def __dealloc__(self):
        cdef Chunk *chunk = self.chunks
        cdef int i
        for i in range(self.n_found):
            block_release(self.found[i].pin)
        if self.queries != &self.one_query:
            free(self.queries)
        if self.found != self.few_found:
            free(self.found)
        while chunk != NULL:
            self.chunks = chunk.older
            free(chunk)
            chunk = self.chunks

    cdef int add_key(self, bytes key) except -1:
        """Ask for one more key; there is room for one in a batch made without any."""
        cdef Query *query = &self.queries[self.count]
        key_parse(&query.key, key)
        query.newest = query.oldest = -1
        if self.count and not key_less(&self.queries[self.count - 1].key, &query.key):
            self.ascending = False
        self.count += 1
        self.pending += 1
        return 0

    cdef int add(self, Query *query, uint64_t lsn, uint8_t flags, const uint8_t *data,
                 uint32_t size) noexcept nogil:
        """Append a copy of the next older value of a query; 0, or -1 without memory."""
        return self.add_shared(query, lsn, flags, data, size, NULL)

    cdef int add_shared(self, Query *query, uint64_t lsn, uint8_t flags, const uint8_t *data,
                        uint32_t size, CachedBlock *block) noexcept nogil:
        """The same; a long value that is in a pinned block stays there."""
        cdef Found *entry
        cdef void *grown
        if self.n_found == self.cap_found:
            if self.found == self.few_found:
                grown = malloc(64 * sizeof(Found))
                if grown == NULL:
                    return -1
                memcpy(grown, self.few_found, sizeof(self.few_found))
                self.cap_found = 64
            else:
                if self.cap_found > 0x3FFFFFFF:
                    return -1
                grown = realloc(self.found, 2 * <size_t> self.cap_found * sizeof(Found))
                if grown == NULL:
                    return -1
                self.cap_found *= 2
            self.found = <Found *> grown
        entry = &self.found[self.n_found]
        if block != NULL and size >= LONG_VALUE:
            block_pin(block)
            entry.pin = block
            entry.data = data
        else:
            if size > self.left and self._more_room(size) != 0:
                return -1
            if size:
                memcpy(self.room, data, size)
            entry.pin = NULL
            entry.data = self.room
            self.room += size
            self.left -= size
        entry.lsn = lsn
        entry.size = size
        entry.older = -1
        entry.flags = flags
        if query.oldest >= 0:
            self.found[query.oldest].older = self.n_found
        else:
            query.newest = self.n_found
        query.oldest = self.n_found
        query.count += 1
        self.n_found += 1
        if flags & WILL_INIT and not query.complete:
            query.complete = True
            self.pending -= 1
        return 0

    cdef int _more_room(self, uint32_t size) noexcept nogil:
        """Have room for `size` bytes of values; 0, or -1 without memory."""
        cdef size_t wanted = LEAST_CHUNK
        cdef Chunk *chunk
        if self.chunks != NULL:
            wanted = min(2 * self.chunks.size, <size_t> MOST_CHUNK)
        if wanted < size:
            wanted = size
        chunk = <Chunk *> malloc(sizeof(Chunk) + wanted)
        if chunk == NULL:
            return -1
        chunk.older = self.chunks
        chunk.size = wanted
        self.chunks = chunk
        self.room = <uint8_t *> (chunk + 1)
        self.left = wanted
        return 0

    cdef void need_above(self, int i, uint64_t lsn) noexcept nogil:
        """Say that query `i` needs only values newer than `lsn`: the caller has its base there."""
        self.queries[i].floor = lsn
        self.any_floor = True

    cdef void close_at(self, int first, int last, uint64_t upper) noexcept nogil:
        """Complete the queries of [first, last) that need nothing at or below `upper`."""
        cdef int i
        cdef Query *query
        if not self.any_floor:
            return
        for i in range(first, last):
            query = &self.queries[i]
            if not query.complete and query.floor and query.floor >= upper:
                query.complete = query.based = True
                self.pending -= 1

    cdef void close(self, int first, int last) noexcept nogil:
        """Complete the queries [first, last): nothing older counts, not even a base."""
        cdef int i
        for i in range(first, last):
            if not self.queries[i].complete:
                self.queries[i].complete = True
                self.pending -= 1

    cdef bint any_pending(self, int first, int last) noexcept nogil:
        """Whether a query of [first, last) needs older values."""
        cdef int i
        if self.pending == 0:
            return False
        for i in range(first, last):
            if not self.queries[i].complete:
                return True
        return False

    cdef int _check(self, int i) except -1:
        if not 0 <= i < self.count:
            raise IndexError(f"query {i} of {self.count}")
        return 0

    def set_floor(self, int i, uint64_t lsn):
        """Say that query `i` needs only values newer than `lsn`."""
        self._check(i)
        self.need_above(i, lsn)

    def is_pending(self, int i):
        """Whether query `i` still needs older values."""
        self._check(i)
        return not self.queries[i].complete

    cdef bytes data(self, const Found *entry):
        """The bytes of a value."""
        return PyBytes_FromStringAndSize(<const char *> entry.data, entry.size)

    def image(self, int i):
        """The bytes of query `i` if its newest value is an image, else None."""
        self._check(i)
        cdef int32_t newest = self.queries[i].newest
        if newest < 0 or self.found[newest].flags != FLAGS_IMAGE:
            return None
        return self.data(&self.found[newest])

    def values(self, int i):
        """The values of query `i` as [(lsn, flags, data)], oldest first."""
        self._check(i)
        cdef int32_t at = self.queries[i].newest
        cdef Found *entry
        cdef list result = []
        while at >= 0:
            entry = &self.found[at]
            result.append((entry.lsn, entry.flags, self.data(entry)))
            at = entry.older
        result.reverse()
        return result
