"""The layers of one place in the layer map, ordered by LSN: persistent treaps.

A treap never changes; adding or removing a layer makes a new one that shares all but the nodes on
the way to it. Every subtree knows how far its layers reach, in keys and in LSNs, so that a search
looks only where it can find something.
"""
cimport cython
from libc.stdint cimport uint64_t

from pageserver.layered_repository.key cimport Key, key_equal, key_less, key_parse


@cython.final
@cython.no_gc
cdef class Item:
    """A layer with its ranges in machine words."""


cdef Item item_new(object layer):
    cdef Item item = Item.__new__(Item)
    item.layer = layer
    key_parse(&item.key_start, layer.key_start)
    key_parse(&item.key_end, layer.key_end)
    item.start_lsn = layer.start_lsn
    item.end_lsn = layer.end_lsn
    item.is_image = layer.is_image
    if not key_less(&item.key_start, &item.key_end) or item.start_lsn >= item.end_lsn:
        raise ValueError(f"{layer!r}: the key range or the LSN range is empty")
    return item


cdef bint item_is_l0(Item item) noexcept:
    return not item.is_image and item.key_start.hi == 0 and item.key_start.mid == 0 \
        and item.key_start.lo == 0 and item.key_end.hi == ~<uint64_t> 0 \
        and item.key_end.mid == ~<uint64_t> 0 and item.key_end.lo == 0xFFFF


cdef inline int item_order(Item a, Item b) noexcept:
    """-1, 0 or 1; 0 if they cover the same."""
    if a.start_lsn != b.start_lsn:
        return -1 if a.start_lsn < b.start_lsn else 1
    if a.end_lsn != b.end_lsn:
        return -1 if a.end_lsn < b.end_lsn else 1
    if not key_equal(&a.key_start, &b.key_start):
        return -1 if key_less(&a.key_start, &b.key_start) else 1
    if not key_equal(&a.key_end, &b.key_end):
        return -1 if key_less(&a.key_end, &b.key_end) else 1
    return 0


cdef inline uint64_t item_priority(Item item) noexcept:
    """A hash of what it covers: random enough to keep the treaps balanced."""
    cdef uint64_t h = item.start_lsn * 0x9E3779B97F4A7C15ULL ^ item.end_lsn
    h = (h ^ (h >> 29)) * 0xC2B2AE3D27D4EB4FULL + (item.key_start.hi ^ item.key_start.mid)
    h = (h ^ (h >> 32)) * 0x9FB21C651E98DF25ULL + (item.key_end.mid ^ item.key_end.hi)
    h = (h ^ (h >> 29)) * 0x165667B19E3779F9ULL + (<uint64_t> item.key_start.lo << 16) \
        + item.key_end.lo
    h = (h ^ (h >> 32)) * 0xC2B2AE3D27D4EB4FULL
    return h ^ (h >> 29)


cdef inline bint item_contains(Item item, const Key *key) noexcept:
    return not key_less(key, &item.key_start) and key_less(key, &item.key_end)


# ---- treaps

@cython.final
@cython.no_gc
@cython.freelist(256)
cdef class Tree:
    """The root of a treap; never changes."""


cdef Tree tree_new(Item item, uint64_t priority, Tree left, Tree right):
    cdef Tree tree = Tree.__new__(Tree)
    tree.item = item
    tree.priority = priority
    tree.left = left
    tree.right = right
    tree.max_end_lsn = item.end_lsn
    tree.min_start = item.key_start
    tree.max_end = item.key_end
    if left is not None:
        tree_widen(tree, left)
    if right is not None:
        tree_widen(tree, right)
    return tree


cdef inline void tree_widen(Tree tree, Tree child) noexcept:
    if child.max_end_lsn > tree.max_end_lsn:
        tree.max_end_lsn = child.max_end_lsn
    if key_less(&child.min_start, &tree.min_start):
        tree.min_start = child.min_start
    if key_less(&tree.max_end, &child.max_end):
        tree.max_end = child.max_end


cdef Tree tree_below(Tree tree, Item item):
    """What comes before an item."""
    if tree is None:
        return None
    if item_order(tree.item, item) < 0:
        return tree_new(tree.item, tree.priority, tree.left, tree_below(tree.right, item))
    return tree_below(tree.left, item)


cdef Tree tree_above(Tree tree, Item item):
    """What comes after an item."""
    if tree is None:
        return None
    if item_order(tree.item, item) > 0:
        return tree_new(tree.item, tree.priority, tree_above(tree.left, item), tree.right)
    return tree_above(tree.right, item)


cdef Tree tree_add(Tree tree, Item item, uint64_t priority):
    cdef int order
    if tree is None or priority > tree.priority:
        return tree_new(item, priority, tree_below(tree, item), tree_above(tree, item))
    order = item_order(item, tree.item)
    if order < 0:
        return tree_new(tree.item, tree.priority, tree_add(tree.left, item, priority), tree.right)
    if order > 0:
        return tree_new(tree.item, tree.priority, tree.left, tree_add(tree.right, item, priority))
    return tree_new(item, priority, tree.left, tree.right)


cdef Tree tree_join(Tree left, Tree right):
    if left is None:
        return right
    if right is None:
        return left
    if left.priority >= right.priority:
        return tree_new(left.item, left.priority, left.left, tree_join(left.right, right))
    return tree_new(right.item, right.priority, tree_join(left, right.left), right.right)


cdef Tree tree_remove(Tree tree, Item item):
    cdef int order = item_order(item, tree.item)
    if order < 0:
        return tree_new(tree.item, tree.priority, tree_remove(tree.left, item), tree.right)
    if order > 0:
        return tree_new(tree.item, tree.priority, tree.left, tree_remove(tree.right, item))
    return tree_join(tree.left, tree.right)


cdef Tree tree_changed(Tree tree, Item item, bint add):
    """With the item, in the place of one that covers the same; or without it, there is one."""
    return tree_add(tree, item, item_priority(item)) if add else tree_remove(tree, item)


cdef Item tree_equal(Tree tree, Item item):
    """The item that covers the same, or None."""
    cdef int order
    while tree is not None:
        order = item_order(item, tree.item)
        if order == 0:
            return tree.item
        tree = tree.left if order < 0 else tree.right
    return None


cdef int tree_newest(Tree tree, const Key *key, uint64_t upper, void **best,
                     uint64_t *end_lsn) noexcept:
    """Of the layers that contain the key and begin at or below `upper` the one with the greatest
    end LSN, if that is above `end_lsn`."""
    while tree is not None and tree.max_end_lsn > end_lsn[0] and end_lsn[0] <= upper \
            and not key_less(key, &tree.min_start) and key_less(key, &tree.max_end):
        if tree.item.start_lsn <= upper:
            tree_newest(tree.right, key, upper, best, end_lsn)
            if tree.item.end_lsn > end_lsn[0] and end_lsn[0] <= upper \
                    and item_contains(tree.item, key):
                best[0] = <void *> tree.item
                end_lsn[0] = tree.item.end_lsn
        tree = tree.left
    return 0


cdef int tree_reach(Tree tree, const Key *key, uint64_t min_lsn, uint64_t max_lsn,
                    Key *reach) noexcept:
    """Move `reach` to the furthest end of the images in an LSN range that contain the key."""
    while tree is not None and key_less(reach, &tree.max_end) \
            and not key_less(key, &tree.min_start):
        if min_lsn <= tree.item.start_lsn <= max_lsn and item_contains(tree.item, key) \
                and key_less(reach, &tree.item.key_end):
            reach[0] = tree.item.key_end
        if tree.item.start_lsn < min_lsn:
            tree = tree.right
            continue
        if tree.item.start_lsn <= max_lsn:
            tree_reach(tree.right, key, min_lsn, max_lsn, reach)
        tree = tree.left
    return 0


cdef int tree_overlapping(Tree tree, const Key *start, const Key *end, list found) except -1:
    """Append the layers that overlap the key range, by LSN."""
    if tree is None or not key_less(&tree.min_start, end) or not key_less(start, &tree.max_end):
        return 0
    tree_overlapping(tree.left, start, end, found)
    if key_less(&tree.item.key_start, end) and key_less(start, &tree.item.key_end):
        found.append(tree.item.layer)
    tree_overlapping(tree.right, start, end, found)
    return 0


cdef int tree_all(Tree tree, list found) except -1:
    if tree is not None:
        tree_all(tree.left, found)
        found.append(tree.item.layer)
        tree_all(tree.right, found)
    return 0
