"""Cache of reconstructed values: what redo made of a key at an LSN.

There is no lock: a call neither gives up the GIL nor runs Python code nor allocates what could
start a garbage collection before it is done, so other threads see it as one step.
"""
from itertools import count

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_DelItem, PyDict_GetItemWithError, PyDict_SetItem
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from pageserver.layered_repository.block_cache cimport BlockCache

cdef enum:
    KEY_OVERHEAD = 256        # bytes: the slot, the key itself and its place in the dict
    VERSION_OVERHEAD = 48     # header and rounding of a bytes object
    BORROWED_SHARE = 64       # of the capacity, is borrowed at a time

_timelines = count()


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class Slot:
    """The versions of one key, ascending by LSN, and its neighbours by time of last use."""

    def __dealloc__(self):
        slot_clear(self)


cdef extern from "Python.h":
    void Py_INCREF(PyObject *o)
    void Py_DECREF(PyObject *o)


@cython.final
@cython.no_gc_clear           # the dict is in no cycle, and has to be there to the end
cdef class PageCache:
    """The newest few reconstructed versions of recently used keys; safe for many threads.

    A value is stored with the LSN of the newest record in it, so it holds for every LSN from there
    up to the key's next record. The keys least recently used go first. `capacity` is in bytes, 0
    switches the cache off; `size`, which counts the cache's own structures too, never exceeds it.
    With `blocks` it is not memory of its own: the block cache shrinks as this one grows.
    """

    def __init__(self, int64_t capacity, BlockCache blocks=None):
        if self.slots is not None:
            raise TypeError("a PageCache is made once")
        self.capacity = capacity
        self.blocks = blocks
        self.slots = {}

    def __len__(self):
        return len(self.slots)

    cpdef get(self, bytes key, uint64_t lsn):
        """The newest version (lsn, value) at or below an LSN, or None."""
        cdef PyObject *found = PyDict_GetItemWithError(self.slots, key)
        cdef Slot slot
        cdef int at
        if found != NULL:
            slot = <Slot> found
            if self.newest != <void *> slot:
                self._unlink(slot)
                self._link(slot)
            at = slot_position(slot, lsn)
            if at:
                self.hits += 1
                return slot.lsns[at - 1], <bytes> slot.values[at - 1]
        self.misses += 1
        return None

    cpdef put(self, bytes key, uint64_t lsn, bytes value):
        """Store the version of a key at an LSN; the oldest of too many versions is dropped."""
        cdef PyObject *found
        cdef Slot slot
        cdef int at
        if key is None or value is None:
            raise TypeError("only bytes are kept")
        if PyBytes_GET_SIZE(value) + VERSION_OVERHEAD + KEY_OVERHEAD > self.capacity:
            return
        found = PyDict_GetItemWithError(self.slots, key)
        if found == NULL:
            slot = Slot.__new__(Slot)
            slot.key = key
            PyDict_SetItem(self.slots, key, slot)
            self.size += KEY_OVERHEAD
        else:
            slot = <Slot> found
            self._unlink(slot)
        self._link(slot)
        at = slot_position(slot, lsn)
        if at == 0 or slot.lsns[at - 1] != lsn:
            self.size += slot_insert(slot, at, lsn, value)
            if slot.count > MAX_VERSIONS:
                self.size -= slot_drop_oldest(slot)
        while self.size > self.capacity:
            self._evict(<Slot> self.oldest)
        if self.size > self.borrowed and self.blocks is not None:
            self._borrow()

    cdef void _borrow(self) noexcept:
        """Take from the block cache what the values need, and a little more."""
        self.borrowed = min(self.capacity, self.size + self.capacity // BORROWED_SHARE)
        self.blocks.lend(self.borrowed)

    cdef int _evict(self, Slot slot) except -1:
        """Forget a key with all its versions."""
        self._unlink(slot)
        self.size -= slot_clear(slot) + KEY_OVERHEAD
        PyDict_DelItem(self.slots, slot.key)
        return 0

    cdef void _link(self, Slot slot) noexcept:
        """Make it the one used last."""
        slot.newer = NULL
        slot.older = self.newest
        if self.newest != NULL:
            (<Slot> self.newest).newer = <void *> slot
        else:
            self.oldest = <void *> slot
        self.newest = <void *> slot

    cdef void _unlink(self, Slot slot) noexcept:
        if slot.newer != NULL:
            (<Slot> slot.newer).older = slot.older
        else:
            self.newest = slot.older
        if slot.older != NULL:
            (<Slot> slot.older).newer = slot.newer
        else:
            self.oldest = slot.newer


@cython.final
cdef class TimelineCache:
    """The versions of one timeline's keys in a PageCache.

    It is of a Timeline object, not of an id: a timeline may be deleted and another get its id.
    """

    def __init__(self, PageCache cache not None):
        self.cache = cache
        self.number = next(_timelines)

    cpdef get(self, bytes key, uint64_t lsn):
        """The newest version (lsn, value) of a key at or below an LSN, or None."""
        return self.cache.get(self._name(key), lsn)

    cpdef put(self, bytes key, uint64_t lsn, bytes value):
        """Keep the version whose newest record ends at `lsn`."""
        self.cache.put(self._name(key), lsn, value)

    cdef bytes _name(self, bytes key):
        """The key among those of all timelines."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(key)
        cdef bytes name = PyBytes_FromStringAndSize(NULL, sizeof(self.number) + size)
        cdef char *p = PyBytes_AS_STRING(name)
        memcpy(p, &self.number, sizeof(self.number))
        memcpy(p + sizeof(self.number), PyBytes_AS_STRING(key), size)
        return name


cdef inline int slot_position(Slot slot, uint64_t lsn) noexcept:
    """How many versions are at or below an LSN."""
    cdef int at = slot.count
    while at and slot.lsns[at - 1] > lsn:
        at -= 1
    return at


cdef inline int64_t version_size(PyObject *value) noexcept:
    return PyBytes_GET_SIZE(<bytes> value) + VERSION_OVERHEAD


cdef inline int64_t slot_insert(Slot slot, int at, uint64_t lsn, bytes value) noexcept:
    """Put a version before those from `at` on; there is room. The bytes it takes are returned."""
    cdef int i = slot.count
    while i > at:
        slot.lsns[i] = slot.lsns[i - 1]
        slot.values[i] = slot.values[i - 1]
        i -= 1
    slot.lsns[at] = lsn
    slot.values[at] = <PyObject *> value
    Py_INCREF(slot.values[at])
    slot.count += 1
    return version_size(slot.values[at])


cdef inline int64_t slot_drop_oldest(Slot slot) noexcept:
    """The bytes that are free then are returned."""
    cdef PyObject *value = slot.values[0]
    cdef int64_t size = version_size(value)
    cdef int i
    slot.count -= 1
    for i in range(slot.count):
        slot.lsns[i] = slot.lsns[i + 1]
        slot.values[i] = slot.values[i + 1]
    Py_DECREF(value)
    return size


cdef inline int64_t slot_clear(Slot slot) noexcept:
    """Drop all versions. The bytes that are free then are returned."""
    cdef int64_t size = 0
    while slot.count:
        size += slot_drop_oldest(slot)
    return size
