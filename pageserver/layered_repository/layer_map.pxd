"""Which layer holds the newest values of a key: see layer_map.pyx."""
from libc.stdint cimport int64_t, uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_treap cimport Item, Tree

cdef class Node:             # of the trie of borders
    cdef int bit             # where the two children part; KEY_BITS: a border
    cdef int64_t uses        # of a border: the layers that begin or end there
    cdef Key low             # the bits that all borders below share, then zeros; the border
    cdef Key first           # the least border below
    cdef Node left, right
    cdef Tree images, deltas

cdef struct Found:           # borrowed from the map
    void *image              # Item: newest of the images, NULL if there is none
    void *delta              # Item: of the deltas with a key range, the one that reaches furthest
    bint bordered
    Key border               # up to here, exclusive, other keys have the same answer

cdef class LayerMap:
    cdef Tree l0
    cdef Node root
    cdef Py_ssize_t count

    cdef void find(self, const Key *key, uint64_t upper, Found *found)
    cdef Item newest_l0(self, uint64_t upper)
    cdef int _add(self, object layer) except -1
    cdef int _remove(self, object layer) except -1
    cdef Item _equal(self, Item item)
    cdef int _overlapping(self, bytes start, bytes end, bint images, list found) except -1

cdef Item choose(Item image, Item delta, Item l0, uint64_t upper, uint64_t *floor)
