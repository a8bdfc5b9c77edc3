"""Which layer holds the newest values of a key at or below an LSN.

Pure: no I/O, no locks. A map never changes; `with_changes` makes a new one that shares all but the
few nodes on the way to what changed, so a reader works on the map it took however long it needs.

The borders, the keys where layers begin or end, are the leaves of a binary trie: an inner node
parts the borders that share their first `bit` bits by the next one. A layer is kept at the node
where its two borders part. It covers keys on both sides of the cut there, and every key it covers
passes that node on its way down; so a search looks at the nodes on the way of the key only. The
shape follows from the borders alone: adding or removing a border makes or drops one inner node, and
no layer moves.

In a node the layers are in treaps, ordered by LSN, whose subtrees know how far their layers reach.
All layers of one node contain its cut. To a key left of it only their starts matter, to another
only their ends: the subtree whose least start is not above the key has a layer for it. Deltas over
all keys (L0) are in a treap of their own.

Two layers may overlap in LSN (what an interrupted compaction leaves behind): every delta holds all
changes of the keys in its key range that fall into its LSN range, so either answers for the
overlap, and the search never hands out an LSN twice.
"""
from types import GenericAlias
from typing import Protocol

cimport cython
from libc.stdint cimport int64_t, uint16_t, uint64_t

from pageserver.layered_repository.gil cimport let_others_run
from pageserver.layered_repository.key cimport Key, key_bytes, key_equal, key_less, key_parse
from pageserver.layered_repository.layer_treap cimport (
    Item,
    Tree,
    item_is_l0,
    item_new,
    tree_all,
    tree_changed,
    tree_equal,
    tree_newest,
    tree_overlapping,
    tree_reach,
)

cdef extern from *:
    int __builtin_clzll(unsigned long long) noexcept nogil

cdef enum:
    KEY_BITS = 144
    CHANGES_PER_TURN = 32     # then other threads get a chance to run


class LayerRange(Protocol):
    """What the map needs to know of a layer; see LayerName."""

    @property
    def key_start(self):
        """First key of the range."""

    @property
    def key_end(self):
        """End of the key range, exclusive."""

    @property
    def start_lsn(self):
        """First LSN; of an image layer its LSN."""

    @property
    def end_lsn(self):
        """End of the LSN range, exclusive."""

    @property
    def is_image(self):
        """Whether it holds the state at one LSN instead of changes."""


# ---- keys as strings of bits, the most significant first

cdef inline int key_difference(const Key *a, const Key *b) noexcept nogil:
    """The first bit in which two keys differ, KEY_BITS if they are equal."""
    if a.hi != b.hi:
        return __builtin_clzll(a.hi ^ b.hi)
    if a.mid != b.mid:
        return 64 + __builtin_clzll(a.mid ^ b.mid)
    if a.lo != b.lo:
        return 80 + __builtin_clzll(a.lo ^ b.lo)
    return KEY_BITS


cdef inline bint key_bit(const Key *key, int bit) noexcept nogil:
    if bit < 64:
        return key.hi >> (63 - bit) & 1
    if bit < 128:
        return key.mid >> (127 - bit) & 1
    return key.lo >> (143 - bit) & 1


cdef inline Key key_prefix(const Key *key, int bits) noexcept nogil:
    """The first `bits` < KEY_BITS bits of a key, then zeros."""
    cdef Key prefix
    prefix.hi = key.hi if bits >= 64 else key.hi & ~(~<uint64_t> 0 >> bits)
    prefix.mid = prefix.lo = 0
    if bits >= 128:
        prefix.mid = key.mid
        prefix.lo = <uint16_t> (key.lo & ~(0xFFFF >> (bits - 128)))
    elif bits > 64:
        prefix.mid = key.mid & ~(~<uint64_t> 0 >> (bits - 64))
    return prefix


# ---- the trie of borders

@cython.final
@cython.no_gc
@cython.freelist(256)
cdef class Node:
    """The root of a trie; never changes."""


cdef Node border_new(const Key *key, int64_t uses):
    cdef Node node = Node.__new__(Node)
    node.bit = KEY_BITS
    node.uses = uses
    node.low = node.first = key[0]
    return node


cdef Node node_with(Node node, Node left, Node right):
    """The node with other children."""
    cdef Node new = Node.__new__(Node)
    new.bit = node.bit
    new.low = node.low
    new.first = left.first
    new.left = left
    new.right = right
    new.images = node.images
    new.deltas = node.deltas
    return new


cdef Node node_fork(const Key *key, int bit, Node other):
    """The node where a new border parts from others at a bit."""
    cdef Node border = border_new(key, 1)
    cdef Node new = Node.__new__(Node)
    new.bit = bit
    new.low = key_prefix(key, bit)
    new.left, new.right = (other, border) if key_bit(key, bit) else (border, other)
    new.first = new.left.first
    return new


cdef Node border_add(Node node, const Key *key):
    """With one more use of a border."""
    cdef int bit
    if node is None:
        return border_new(key, 1)
    bit = key_difference(key, &node.low)
    if bit < node.bit:
        return node_fork(key, bit, node)
    if node.bit == KEY_BITS:
        return border_new(key, node.uses + 1)
    if key_bit(key, node.bit):
        return node_with(node, node.left, border_add(node.right, key))
    return node_with(node, border_add(node.left, key), node.right)


cdef Node border_remove(Node node, const Key *key):
    """With one use less of a border that there is."""
    cdef Node child
    if node.bit == KEY_BITS:
        return border_new(key, node.uses - 1) if node.uses > 1 else None
    if key_bit(key, node.bit):
        child = border_remove(node.right, key)
        return node.left if child is None else node_with(node, node.left, child)
    child = border_remove(node.left, key)
    return node.right if child is None else node_with(node, child, node.right)


cdef Node item_put(Node node, Item item, int bit, bint add):
    """With the item, or without it, at the node on its way that parts its borders at `bit`."""
    cdef Node new
    if node.bit < bit:
        if key_bit(&item.key_start, node.bit):
            return node_with(node, node.left, item_put(node.right, item, bit, add))
        return node_with(node, item_put(node.left, item, bit, add), node.right)
    new = node_with(node, node.left, node.right)
    if item.is_image:
        new.images = tree_changed(node.images, item, add)
    else:
        new.deltas = tree_changed(node.deltas, item, add)
    return new


cdef int node_overlapping(Node node, const Key *start, const Key *end, bint images,
                          list found) except -1:
    """Append the layers of a kind that overlap the key range."""
    cdef Key prefix
    if node is None or node.bit == KEY_BITS or not key_less(&node.first, end):
        return 0
    prefix = key_prefix(start, node.bit)
    if key_less(&node.low, &prefix):
        return 0        # all of it is before the range
    tree_overlapping(node.images if images else node.deltas, start, end, found)
    node_overlapping(node.left, start, end, images, found)
    node_overlapping(node.right, start, end, images, found)
    return 0


cdef int node_all(Node node, list found) except -1:
    if node is not None and node.bit != KEY_BITS:
        tree_all(node.images, found)
        tree_all(node.deltas, found)
        node_all(node.left, found)
        node_all(node.right, found)
    return 0


# ---- the map

cdef Item choose(Item image, Item delta, Item l0, uint64_t upper, uint64_t *floor):
    """The layer to read next, None if there is none, and the lowest LSN to read there.

    Of the candidates at or below `upper`: the newest image, and the deltas that reach furthest.
    """
    if delta is None or (l0 is not None and l0.end_lsn > delta.end_lsn):
        delta = l0
    if image is None:
        if delta is not None:
            floor[0] = delta.start_lsn
        return delta
    if delta is None or delta.end_lsn <= image.start_lsn + 1 or image.start_lsn == upper:
        floor[0] = image.start_lsn
        return image
    floor[0] = max(delta.start_lsn, image.start_lsn + 1)
    return delta


@cython.final
cdef class LayerMap:
    """The layers of one timeline; layers that cover the same are the same to the map."""

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(self, layers=()):
        cdef object layer
        cdef Py_ssize_t done = 0
        if self.count:
            raise TypeError("a LayerMap never changes")
        for layer in layers:
            self._add(layer)
            done += 1
            if done % CHANGES_PER_TURN == 0:
                let_others_run()

    def with_changes(self, add=(), remove=()):
        """A map without some layers and then with others, in one step for its readers.

        A layer that covers what one in the map covers takes its place; removing a layer that is not
        in the map has no effect. The cost depends on what changes, not on the size of the map.
        """
        cdef LayerMap new = LayerMap.__new__(LayerMap)
        cdef object layer
        cdef Py_ssize_t done = 0
        new.l0 = self.l0
        new.root = self.root
        new.count = self.count
        for layer in remove:
            new._remove(layer)
            done += 1
            if done % CHANGES_PER_TURN == 0:
                let_others_run()
        for layer in add:
            new._add(layer)
            done += 1
            if done % CHANGES_PER_TURN == 0:
                let_others_run()
        return new

    cdef Item _equal(self, Item item):
        """The item that covers the same, or None."""
        cdef Node node = self.root
        cdef int bit
        if item_is_l0(item):
            return tree_equal(self.l0, item)
        bit = key_difference(&item.key_start, &item.key_end)
        while node is not None and node.bit < bit:
            node = node.right if key_bit(&item.key_start, node.bit) else node.left
        if node is None or node.bit != bit:
            return None
        return tree_equal(node.images if item.is_image else node.deltas, item)

    cdef int _add(self, object layer) except -1:
        """Of a map that nobody else has seen yet."""
        cdef Item item = item_new(layer)
        cdef Item present = self._equal(item)
        if present is not None and present.layer is layer:
            return 0
        if present is None:
            self.count += 1
        if item_is_l0(item):
            self.l0 = tree_changed(self.l0, item, True)
            return 0
        if present is None:
            self.root = border_add(self.root, &item.key_start)
            self.root = border_add(self.root, &item.key_end)
        self.root = item_put(
            self.root, item, key_difference(&item.key_start, &item.key_end), True
        )
        return 0

    cdef int _remove(self, object layer) except -1:
        """Of a map that nobody else has seen yet."""
        cdef Item item = item_new(layer)
        cdef Item present = self._equal(item)
        if present is None or present.layer != layer:
            return 0
        self.count -= 1
        if item_is_l0(item):
            self.l0 = tree_changed(self.l0, item, False)
            return 0
        self.root = item_put(
            self.root, item, key_difference(&item.key_start, &item.key_end), False
        )
        self.root = border_remove(self.root, &item.key_start)
        self.root = border_remove(self.root, &item.key_end)
        return 0

    def __len__(self):
        return self.count

    def __contains__(self, layer):
        cdef Item present = self._equal(item_new(layer))
        return present is not None and present.layer == layer

    def __iter__(self):
        cdef list found = []
        tree_all(self.l0, found)
        node_all(self.root, found)
        return iter(found)

    @property
    def l0_deltas(self):
        """The deltas over all keys, ascending by LSN."""
        cdef list found = []
        tree_all(self.l0, found)
        return tuple(found)

    # ---- searching

    cdef void find(self, const Key *key, uint64_t upper, Found *found):
        """The layers with a key range of their own that may be next for a key below `upper`."""
        cdef Node node = self.root
        cdef uint64_t image_end = 0, delta_end = 0
        cdef int bit
        found.image = found.delta = NULL
        found.bordered = False
        while node is not None:
            bit = key_difference(key, &node.low)
            if bit < node.bit:
                # The key parts from all borders below: it is before or after all of them.
                if not key_bit(key, bit):
                    found.bordered = True
                    found.border = node.first
                return
            if node.bit == KEY_BITS:
                return
            tree_newest(node.images, key, upper, &found.image, &image_end)
            tree_newest(node.deltas, key, upper, &found.delta, &delta_end)
            if key_bit(key, node.bit):
                node = node.right
            else:
                found.bordered = True
                found.border = node.right.first
                node = node.left

    cdef Item newest_l0(self, uint64_t upper):
        """The L0 delta that reaches furthest of those that begin at or below `upper`, or None."""
        cdef Key key
        cdef void *best = NULL
        cdef uint64_t end_lsn = 0
        key.hi = key.mid = key.lo = 0
        tree_newest(self.l0, &key, upper, &best, &end_lsn)
        return None if best == NULL else <Item> best

    def search(self, bytes key not None, uint64_t upper):
        """The layer to read next for a key, with the lowest LSN to read there; None: there is none.

        In [floor, upper] no other layer has to be read; go on at floor - 1. After an image the
        search is over: it holds every key that exists.
        """
        cdef Key parsed
        cdef Found found
        cdef Item layer
        cdef uint64_t floor = 0
        key_parse(&parsed, key)
        self.find(&parsed, upper, &found)
        layer = choose(
            None if found.image == NULL else <Item> found.image,
            None if found.delta == NULL else <Item> found.delta,
            self.newest_l0(upper),
            upper,
            &floor,
        )
        return None if layer is None else (layer.layer, floor)

    def next_border(self, bytes key not None):
        """The first key after `key` at which a layer begins or ends, None if there is none.

        For all keys from `key` up to it every search has the same answer.
        """
        cdef Key parsed
        cdef Found found
        key_parse(&parsed, key)
        self.find(&parsed, 0, &found)
        return key_bytes(&found.border) if found.bordered else None

    # ---- for compaction and garbage collection

    def images(self, bytes start not None, bytes end not None):
        """The images that overlap the key range [start, end), as a list in no particular order."""
        cdef list found = []
        self._overlapping(start, end, True, found)
        return found

    def deltas(self, bytes start not None, bytes end not None):
        """The deltas that overlap the key range [start, end), L0 deltas first, as a list."""
        cdef list found = []
        self._overlapping(start, end, False, found)
        return found

    cdef int _overlapping(self, bytes start, bytes end, bint images, list found) except -1:
        cdef Key first, last
        key_parse(&first, start)
        key_parse(&last, end)
        if not key_less(&first, &last):
            return 0
        if not images:
            tree_all(self.l0, found)
        return node_overlapping(self.root, &first, &last, images, found)

    def covering_images(self, bytes start not None, bytes end not None, uint64_t min_lsn,
                        uint64_t max_lsn):
        """Whether images with min_lsn <= LSN <= max_lsn hold all keys of [start, end) together."""
        cdef Key at, reach, last
        cdef Node node
        cdef int bit
        cdef Py_ssize_t done = 0
        key_parse(&at, start)
        key_parse(&last, end)
        while key_less(&at, &last):
            reach = at
            node = self.root
            while node is not None and node.bit < KEY_BITS \
                    and key_difference(&at, &node.low) >= node.bit:
                tree_reach(node.images, &at, min_lsn, max_lsn, &reach)
                node = node.right if key_bit(&at, node.bit) else node.left
            if key_equal(&reach, &at):
                return False
            at = reach
            done += 1
            if done % CHANGES_PER_TURN == 0:
                let_others_run()
        return True
