"""What a read collects on its way through the layers, newest to oldest."""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy

from pageserver.layered_repository.key cimport (
    FLAGS_IMAGE,
    WILL_INIT,
    Key,
    key_bytes,
    key_less,
    key_parse,
)


cdef class ReadBatch:
    """The keys of one read and the values found for them so far.

    Layers add values newest first through `add`; a query is complete at its first value with
    WILL_INIT. The values are copied here, so nothing refers to a layer after its visit.
    """

    def __cinit__(self, list keys not None):
        cdef Py_ssize_t i, n = len(keys)
        if n > 0x7FFFFFFF:
            raise ValueError("too many keys in one read")
        self.count = self.pending = <int> n
        self.found = self.few_found
        self.cap_found = 4
        if n == 1:
            self.queries = &self.one_query
        else:
            self.queries = <Query *> calloc(n + 1, sizeof(Query))
            if self.queries == NULL:
                raise MemoryError
        for i in range(n):
            key_parse(&self.queries[i].key, <bytes?> keys[i])
            self.queries[i].newest = self.queries[i].oldest = -1

    def __dealloc__(self):
        if self.queries != &self.one_query:
            free(self.queries)
        if self.found != self.few_found:
            free(self.found)
        free(self.arena)

    cdef int add(self, Query *query, uint64_t lsn, uint8_t flags, const uint8_t *data,
                 uint32_t size) noexcept nogil:
        """Append the next older value of a query; 0, or -1 without memory."""
        cdef Found *entry
        cdef void *grown
        cdef size_t wanted
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
        if self.used + size > self.capacity:
            wanted = 2 * self.capacity
            if wanted < self.used + size:
                wanted = self.used + size
            if wanted < 16384:
                wanted = 16384
            grown = realloc(self.arena, wanted)
            if grown == NULL:
                return -1
            self.arena = <uint8_t *> grown
            self.capacity = wanted
        if size:
            memcpy(self.arena + self.used, data, size)
        entry = &self.found[self.n_found]
        entry.lsn = lsn
        entry.position = self.used
        entry.size = size
        entry.older = -1
        entry.flags = flags
        self.used += size
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

    def set_floor(self, int i, uint64_t lsn):
        """Say that query `i` needs only values newer than `lsn`."""
        self._check_range(i, i + 1)
        self.queries[i].floor = lsn

    def close_at(self, int first, int last, uint64_t upper):
        """Complete the queries of [first, last) that need nothing at or below `upper`."""
        cdef int i
        cdef Query *query
        self._check_range(first, last)
        for i in range(first, last):
            query = &self.queries[i]
            if not query.complete and query.floor and query.floor >= upper:
                query.complete = True
                self.pending -= 1

    def close(self, int first, int last):
        """Complete the queries [first, last): there is nothing older for them."""
        cdef int i
        self._check_range(first, last)
        for i in range(first, last):
            if not self.queries[i].complete:
                self.queries[i].complete = True
                self.pending -= 1

    def any_pending(self, int first, int last):
        """Whether a query of [first, last) needs older values."""
        cdef int i
        if self.pending == 0:
            return False
        self._check_range(first, last)
        for i in range(first, last):
            if not self.queries[i].complete:
                return True
        return False

    def lower_bound(self, int first, bytes key not None):
        """The first query at or after `first` whose key is not below `key`; keys ascend."""
        cdef Key wanted
        cdef int low = first, high = self.count, middle
        self._check_range(first, first)
        key_parse(&wanted, key)
        while low < high:
            middle = low + (high - low) // 2
            if key_less(&self.queries[middle].key, &wanted):
                low = middle + 1
            else:
                high = middle
        return low

    cdef int _check_range(self, int first, int last) except -1:
        if first < 0 or last > self.count or first > self.count:
            raise IndexError(f"queries {first} to {last} of {self.count}")
        return 0

    def key(self, int i):
        """The key of query `i`."""
        self._check_range(i, i + 1)
        return key_bytes(&self.queries[i].key)

    def is_pending(self, int i):
        """Whether query `i` still needs older values."""
        self._check_range(i, i + 1)
        return not self.queries[i].complete

    def image(self, int i):
        """The bytes of query `i` if its newest value is an image, else None."""
        self._check_range(i, i + 1)
        cdef Query *query = &self.queries[i]
        cdef Found *entry
        if query.newest < 0:
            return None
        entry = &self.found[query.newest]
        if entry.flags != FLAGS_IMAGE:
            return None
        return PyBytes_FromStringAndSize(<char *> self.arena + entry.position, entry.size)

    def found_count(self, int i):
        """How many values query `i` has."""
        self._check_range(i, i + 1)
        return self.queries[i].count

    def values(self, int i):
        """The values of query `i` as [(lsn, flags, data)], oldest first."""
        self._check_range(i, i + 1)
        cdef int32_t at = self.queries[i].newest
        cdef Found *entry
        cdef list result = []
        while at >= 0:
            entry = &self.found[at]
            result.append((entry.lsn, entry.flags, PyBytes_FromStringAndSize(
                <char *> self.arena + entry.position, entry.size)))
            at = entry.older
        result.reverse()
        return result
