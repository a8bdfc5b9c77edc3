"""A list of keys that is sorted without the GIL, however long it is."""
cimport cython
from libc.stdlib cimport free, qsort, realloc

from pageserver.layered_repository.gil cimport let_others_run
from pageserver.layered_repository.key cimport (
    Key,
    key_bytes,
    key_equal,
    key_less,
    key_parse,
)

cdef enum:
    KEYS_PER_TURN = 2048      # then other threads get a chance to run


@cython.final
cdef class KeyList:
    """Keys in the order they came, for one thread."""

    def __dealloc__(self):
        free(self.keys)

    cdef int extend(self, list keys) except -1:
        """Append keys given as bytes."""
        cdef bytes key
        cdef size_t wanted = self.count + <size_t> len(keys)
        cdef void *grown
        if wanted > self.capacity:
            wanted = max(wanted, 2 * self.capacity)
            grown = realloc(self.keys, wanted * sizeof(Key))
            if grown == NULL:
                raise MemoryError
            self.keys = <Key *> grown
            self.capacity = wanted
        for key in keys:
            key_parse(&self.keys[self.count], key)
            self.count += 1
            if self.count % KEYS_PER_TURN == 0:
                let_others_run()
        return 0

    cdef list ascending(self):
        """Sort them; the keys as bytes, every one once."""
        cdef list result = []
        cdef size_t i
        if self.count:
            with nogil:
                qsort(self.keys, self.count, sizeof(Key), key_order)
        for i in range(self.count):
            if i == 0 or not key_equal(&self.keys[i - 1], &self.keys[i]):
                result.append(key_bytes(&self.keys[i]))
            if i % KEYS_PER_TURN == 0:
                let_others_run()
        return result


cdef int key_order(const void *a, const void *b) noexcept nogil:
    if key_less(<const Key *> a, <const Key *> b):
        return -1
    return key_less(<const Key *> b, <const Key *> a)
