"""Deleted key ranges: which keys do not exist at which LSN.

One thread adds, any number of threads look up without a lock. The tree is persistent: adding copies
the nodes on the path from the root and publishes the new root with a release store, so a reader
walks a tree that never changes. Nodes are freed with the whole object only.

It is a treap ordered by the start of the range; each node knows the greatest end and the newest LSN
below it, so that a look-up visits little more than the ranges that hold the key.
"""
from operator import itemgetter

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pageserver.layered_repository.key cimport Key, key_bytes, key_less
from pageserver.layered_repository.layer_memory cimport layer_load_pointer, layer_store_pointer

cdef enum:
    FIRST_ARENA_NODES = 32
    MAX_ARENA_NODES = 4096


cdef inline uint32_t priority_of(uint64_t number) noexcept nogil:
    """Spreads the numbers 1, 2, 3...: a tree of random shape that is the same in every run."""
    number *= 0x9E3779B97F4A7C15ULL
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9ULL
    return <uint32_t> (number >> 32)


cdef inline void refresh(Tombstone *node) noexcept nogil:
    """Compute what the node knows of its subtree."""
    cdef const Tombstone *child
    cdef int side
    node.max_end = node.end
    node.max_lsn = node.lsn
    for side in range(2):
        child = node.right if side else node.left
        if child != NULL:
            if key_less(&node.max_end, &child.max_end):
                node.max_end = child.max_end
            if child.max_lsn > node.max_lsn:
                node.max_lsn = child.max_lsn


cdef uint64_t newest_covering(const Tombstone *tree, const Key *key, uint64_t upper,
                              uint64_t best) noexcept nogil:
    """The newest LSN at or below `upper` at which `key` was deleted, if above `best`; else that."""
    while tree != NULL and tree.max_lsn > best and key_less(key, &tree.max_end):
        best = newest_covering(tree.left, key, upper, best)
        if key_less(key, &tree.start):
            break
        if tree.lsn > best and tree.lsn <= upper and key_less(key, &tree.end):
            best = tree.lsn
        tree = tree.right
    return best


cdef void gather(const Tombstone *tree, uint64_t upper, set found):
    while tree != NULL:
        gather(tree.left, upper, found)
        if tree.lsn <= upper:
            found.add((key_bytes(&tree.start), key_bytes(&tree.end), tree.lsn))
        tree = tree.right


cdef class RangeTombstones:
    """Ranges [start, end) of keys, each with the LSN at which none of its keys existed."""

    def __dealloc__(self):
        cdef Arena *arena = self.arena
        cdef Arena *older
        while arena != NULL:
            older = arena.older
            free(arena)
            arena = older

    cdef int add(self, const Key *start, const Key *end, uint64_t lsn) noexcept nogil:
        """Add a range, which must not be empty; 0, or -1 without memory."""
        cdef const Tombstone *tree = self.root
        cdef Tombstone *node
        cdef uint32_t path = 1
        # Insertion walks one path and copies each node on it once: nothing fails halfway.
        while tree != NULL:
            tree = tree.left if key_less(start, &tree.start) else tree.right
            path += 1
        if self._reserve(path) != 0:
            return -1
        node = self._copy(NULL)
        node.start = start[0]
        node.end = end[0]
        node.lsn = lsn
        node.left = node.right = NULL
        node.priority = priority_of(self.count + 1)
        layer_store_pointer(self.root, self._insert(self.root, node))
        self.count += 1
        if lsn > self.max_lsn:
            self.max_lsn = lsn
        return 0

    cdef int _reserve(self, uint32_t nodes) noexcept nogil:
        """Make the arena have room; what is left in the one before is not used any more."""
        cdef Arena *arena = self.arena
        cdef uint32_t capacity
        if arena != NULL and arena.capacity - arena.used >= nodes:
            return 0
        capacity = 2 * arena.capacity if arena != NULL else FIRST_ARENA_NODES
        if capacity > MAX_ARENA_NODES:
            capacity = MAX_ARENA_NODES
        if capacity < nodes:
            capacity = nodes
        arena = <Arena *> malloc(sizeof(Arena) + capacity * sizeof(Tombstone))
        if arena == NULL:
            return -1
        arena.older = self.arena
        arena.used = 0
        arena.capacity = capacity
        self.arena = arena
        self.memory += sizeof(Arena) + capacity * sizeof(Tombstone)
        return 0

    cdef Tombstone *_copy(self, const Tombstone *node) noexcept nogil:
        """A node from the reserved ones, like `node` if that is not NULL."""
        cdef Tombstone *copy = <Tombstone *> (<uint8_t *> self.arena + sizeof(Arena))
        copy += self.arena.used
        self.arena.used += 1
        if node != NULL:
            copy[0] = node[0]
        return copy

    cdef const Tombstone *_insert(self, const Tombstone *tree, Tombstone *node) noexcept nogil:
        """The tree with `node` in it."""
        cdef Tombstone *copy
        if tree == NULL or node.priority > tree.priority:
            self._split(tree, &node.start, &node.left, &node.right)
            refresh(node)
            return node
        copy = self._copy(tree)
        if key_less(&node.start, &copy.start):
            copy.left = self._insert(copy.left, node)
        else:
            copy.right = self._insert(copy.right, node)
        refresh(copy)
        return copy

    cdef void _split(self, const Tombstone *tree, const Key *start, const Tombstone **left,
                     const Tombstone **right) noexcept nogil:
        """The ranges of a tree that start at or below `start`, and the others."""
        cdef Tombstone *copy
        if tree == NULL:
            left[0] = right[0] = NULL
            return
        copy = self._copy(tree)
        if key_less(start, &copy.start):
            right[0] = copy
            self._split(copy.left, start, left, &copy.left)
        else:
            left[0] = copy
            self._split(copy.right, start, &copy.right, right)
        refresh(copy)

    cdef const Tombstone *snapshot(self) noexcept nogil:
        """The tree of this moment for `newest_covering`, NULL if nothing was deleted."""
        return <const Tombstone *> layer_load_pointer(self.root)

    cdef uint64_t newest(self, const Key *key, uint64_t upper) noexcept nogil:
        """The newest LSN at or below `upper` at which `key` was deleted, 0 if there is none."""
        return newest_covering(self.snapshot(), key, upper, 0)

    cdef list listed(self, uint64_t upper):
        """[(start, end, lsn)] at or below `upper`, each once, ordered by LSN, start and end."""
        cdef set found = set()
        gather(self.snapshot(), upper, found)
        return sorted(found, key=itemgetter(2, 0, 1))
