"""A leaf of a layer file in memory and its entries; the bytes are described in layer_format.pxd."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from pageserver.layered_repository.key cimport KEY_SIZE, Key, key_load
from pageserver.layered_repository.layer_format cimport *
from zenith_utils.unaligned cimport get16, get32, get64, get_big, put_big

cdef struct LeafView:
    int64_t number               # of the leaf in its file, -1: none loaded
    int count
    int prefix
    int lsn_width
    int block_width
    int width                    # of an entry
    uint64_t low_lsn
    uint64_t low_block
    const uint8_t *payload
    const uint8_t *entries

cdef struct LeafEntryView:       # what an entry says
    Key key
    uint64_t lsn
    uint64_t block               # offset of the value's block in the file
    uint32_t size
    uint32_t at                  # of the value in the block
    uint8_t flags


cdef inline bint leaf_parse(LeafView *leaf, const uint8_t *p, uint32_t size) noexcept nogil:
    """Describe the payload of a leaf of `size` bytes; False if it is malformed."""
    leaf.number = -1
    if size < LEAF_HEADER:
        return False
    leaf.count = get16(p)
    leaf.prefix = p[2]
    leaf.lsn_width = 8 if p[3] & WIDE_LSN else 4
    leaf.block_width = 8 if p[3] & WIDE_BLOCK else 4
    leaf.width = KEY_SIZE - leaf.prefix + leaf.lsn_width + 7 + leaf.block_width
    leaf.low_lsn = get64(p + 8)
    leaf.low_block = get64(p + 16)
    leaf.payload = p
    leaf.entries = p + LEAF_HEADER
    return 0 < leaf.count <= LEAF_ENTRIES and leaf.prefix <= KEY_SIZE \
        and LEAF_HEADER + <uint32_t> (leaf.count * leaf.width) == size


cdef inline const uint8_t *leaf_at(const LeafView *leaf, int number) noexcept nogil:
    return leaf.entries + number * leaf.width


cdef inline void leaf_key(const LeafView *leaf, const uint8_t *entry, Key *key) noexcept nogil:
    cdef uint8_t raw[KEY_SIZE]
    memcpy(raw, leaf.payload + 24, leaf.prefix)
    memcpy(raw + leaf.prefix, entry, KEY_SIZE - leaf.prefix)
    key_load(key, raw)


cdef inline uint64_t leaf_lsn(const LeafView *leaf, const uint8_t *entry) noexcept nogil:
    return leaf.low_lsn + get_big(entry + KEY_SIZE - leaf.prefix, leaf.lsn_width)


cdef inline void leaf_entry(const LeafView *leaf, const uint8_t *entry,
                            LeafEntryView *view) noexcept nogil:
    """All of an entry."""
    cdef const uint8_t *p = entry + KEY_SIZE - leaf.prefix
    leaf_key(leaf, entry, &view.key)
    view.lsn = leaf.low_lsn + get_big(p, leaf.lsn_width)
    p += leaf.lsn_width
    view.flags = p[0]
    view.at = get16(p + 1)
    view.size = get32(p + 3)
    view.block = leaf.low_block + (get64(p + 7) if leaf.block_width == 8 else get32(p + 7))


cdef inline int leaf_upper_bound(const LeafView *leaf, const uint8_t *key,
                                 uint64_t lsn) noexcept nogil:
    """How many entries of the leaf are at or below (key, lsn)."""
    cdef uint8_t target[KEY_SIZE + 8]
    cdef int order = memcmp(key, leaf.payload + 24, leaf.prefix)
    cdef int suffix = KEY_SIZE - leaf.prefix, low = 0, high = leaf.count, middle
    cdef bint equal_counts = lsn >= leaf.low_lsn
    cdef uint64_t distance = lsn - leaf.low_lsn if equal_counts else 0
    if order != 0:
        return leaf.count if order > 0 else 0
    if leaf.lsn_width == 4 and distance > 0xFFFFFFFFU:
        distance = 0xFFFFFFFFU
    memcpy(target, key + leaf.prefix, suffix)
    put_big(target + suffix, distance, leaf.lsn_width)
    while low < high:
        middle = (low + high) >> 1
        order = memcmp(leaf_at(leaf, middle), target, suffix + leaf.lsn_width)
        if order < 0 or (order == 0 and equal_counts):
            low = middle + 1
        else:
            high = middle
    return low
