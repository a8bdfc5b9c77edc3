"""The layers of one place in the layer map: see layer_treap.pyx."""
from libc.stdint cimport uint64_t

from pageserver.layered_repository.key cimport Key

cdef class Item:             # a layer and what it covers
    cdef readonly object layer
    cdef Key key_start, key_end
    cdef uint64_t start_lsn, end_lsn
    cdef bint is_image

cdef class Tree:             # None is the empty one
    cdef Item item
    cdef Tree left, right
    cdef uint64_t priority
    cdef uint64_t max_end_lsn
    cdef Key min_start, max_end

cdef Item item_new(object layer)
cdef bint item_is_l0(Item item) noexcept

cdef Tree tree_changed(Tree tree, Item item, bint add)
cdef Item tree_equal(Tree tree, Item item)
cdef int tree_newest(Tree tree, const Key *key, uint64_t upper, void **best,
                     uint64_t *end_lsn) noexcept
cdef int tree_reach(Tree tree, const Key *key, uint64_t min_lsn, uint64_t max_lsn,
                    Key *reach) noexcept
cdef int tree_overlapping(Tree tree, const Key *start, const Key *end, list found) except -1
cdef int tree_all(Tree tree, list found) except -1
