"""Deleted key ranges of the open layer: see range_tombstones.pyx."""
from libc.stdint cimport uint32_t, uint64_t

from pageserver.layered_repository.key cimport Key

cdef struct Tombstone:       # a node of the tree; never changes once it is published
    Key start
    Key end
    Key max_end              # of the subtree
    uint64_t lsn
    uint64_t max_lsn         # of the subtree
    const Tombstone *left    # starts at or below this one's
    const Tombstone *right
    uint32_t priority

cdef struct Arena:
    Arena *older
    uint32_t used, capacity

cdef class RangeTombstones:
    cdef const Tombstone *root
    cdef Arena *arena
    cdef readonly uint64_t count
    cdef readonly uint64_t memory
    cdef uint64_t max_lsn            # newest deletion, 0: none; the writer's

    cdef int add(self, const Key *start, const Key *end, uint64_t lsn) noexcept nogil
    cdef uint64_t newest(self, const Key *key, uint64_t upper) noexcept nogil
    cdef const Tombstone *snapshot(self) noexcept nogil
    cdef list listed(self, uint64_t upper)
    cdef int _reserve(self, uint32_t nodes) noexcept nogil
    cdef Tombstone *_copy(self, const Tombstone *node) noexcept nogil
    cdef const Tombstone *_insert(self, const Tombstone *tree, Tombstone *node) noexcept nogil
    cdef void _split(self, const Tombstone *tree, const Key *start, const Tombstone **left,
                     const Tombstone **right) noexcept nogil

cdef uint64_t newest_covering(const Tombstone *tree, const Key *key, uint64_t upper,
                              uint64_t best) noexcept nogil
