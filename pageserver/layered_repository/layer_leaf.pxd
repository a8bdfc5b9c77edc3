"""A leaf of a layer file in memory and its entries; the bytes are described in layer_format.pxd."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from pageserver.layered_repository.key cimport KEY_SIZE, Key, key_load
from pageserver.layered_repository.layer_format cimport *
from zenith_utils.unaligned cimport get16, get64, get64_big, put64_big

cdef enum:
    BAD_SIZE = 0xFFFFFFFF        # above MAX_VALUE_SIZE

cdef struct LeafView:
    int64_t number               # of the leaf in its file, -1: none loaded
    int count
    int prefix
    int sorted_width             # of the part of an entry that they are sorted by: key, LSN
    int position_end             # in an entry
    int width                    # of an entry
    int block_count
    int block_width
    bint flags_differ            # else they are `flags`
    uint8_t flags
    uint16_t first_at            # where its first value begins in its block
    uint64_t low_lsn
    uint64_t low_block
    uint64_t lsn_mask            # of the bytes that such a number has
    uint64_t position_mask
    uint64_t block_mask
    const uint8_t *payload
    const uint8_t *entries
    const uint8_t *firsts        # of each block, the number of its first entry
    const uint8_t *blocks

cdef struct LeafEntryView:       # what an entry says
    Key key
    uint64_t lsn
    uint64_t block               # offset of the value's block in the file
    uint32_t size                # BAD_SIZE if the entry is malformed
    uint32_t at                  # of the value in the block
    uint8_t flags


cdef inline uint64_t mask_of_width(int width) noexcept nogil:
    """The bits of a number of 0 to 8 bytes."""
    return 0xFFFFFFFFFFFFFFFFU if width == 8 else (<uint64_t> 1 << 8 * width) - 1


cdef inline uint64_t number_before(const uint8_t *end, uint64_t mask) noexcept nogil:
    """The big-endian number of up to 8 bytes that ends at `end`, with 8 bytes before that."""
    return get64_big(end - 8) & mask


cdef inline bint leaf_parse(LeafView *leaf, const uint8_t *p, uint32_t size) noexcept nogil:
    """Describe the payload of a leaf of `size` bytes; False if it is malformed."""
    cdef uint32_t columns
    leaf.number = -1
    if size < LEAF_HEADER or p[0] > LEAF_ENTRIES or p[1] > KEY_SIZE or p[2] > 8 \
            or not 0 < p[3] <= 8 or p[4] > 8 or p[5] > 1 or not 0 < p[6] <= p[0]:
        return False
    leaf.count = p[0]
    leaf.prefix = p[1]
    leaf.sorted_width = KEY_SIZE - leaf.prefix + p[2]
    leaf.position_end = leaf.sorted_width + p[3]
    leaf.width = leaf.position_end + p[5]
    leaf.block_width = p[4]
    leaf.flags_differ = p[5]
    leaf.block_count = p[6]
    leaf.flags = p[7]
    leaf.low_lsn = get64(p + 8)
    leaf.low_block = get64(p + 16)
    leaf.first_at = get16(p + 24)
    leaf.lsn_mask = mask_of_width(p[2])
    leaf.position_mask = mask_of_width(p[3])
    leaf.block_mask = mask_of_width(leaf.block_width)
    columns = LEAF_HEADER + leaf.prefix + leaf.count * leaf.width
    if columns + leaf.block_count * (1 + leaf.block_width) != size:
        return False
    leaf.payload = p
    leaf.entries = p + LEAF_HEADER + leaf.prefix
    leaf.firsts = p + columns
    leaf.blocks = leaf.firsts + leaf.block_count
    return leaf.firsts[0] == 0


cdef inline const uint8_t *leaf_at(const LeafView *leaf, int number) noexcept nogil:
    return leaf.entries + number * leaf.width


cdef inline void leaf_key(const LeafView *leaf, const uint8_t *entry, Key *key) noexcept nogil:
    cdef uint8_t raw[KEY_SIZE]
    memcpy(raw, entry - leaf.prefix, KEY_SIZE)       # 18 bytes that end where its key does
    memcpy(raw, leaf.payload + LEAF_HEADER, leaf.prefix)
    key_load(key, raw)


cdef inline uint64_t leaf_lsn(const LeafView *leaf, const uint8_t *entry) noexcept nogil:
    return leaf.low_lsn + number_before(entry + leaf.sorted_width, leaf.lsn_mask)


cdef inline uint64_t leaf_value_end(const LeafView *leaf, int number) noexcept nogil:
    """Where the value of an entry ends, counted from the beginning of the leaf's first block."""
    return number_before(leaf_at(leaf, number) + leaf.position_end, leaf.position_mask)


cdef inline int leaf_block(const LeafView *leaf, int number) noexcept nogil:
    """Which of the leaf's blocks has the value of an entry: the last that begins by it."""
    cdef int low = 1, high = leaf.block_count, middle
    while low < high:
        middle = (low + high) >> 1
        if leaf.firsts[middle] <= number:
            low = middle + 1
        else:
            high = middle
    return low - 1


cdef inline void leaf_entry(const LeafView *leaf, const uint8_t *entry,
                            LeafEntryView *view) noexcept nogil:
    """All of an entry; with a size of BAD_SIZE if no value can lie where it says."""
    cdef int number = <int> (<uint32_t> (entry - leaf.entries) // <uint32_t> leaf.width)
    cdef int block = leaf_block(leaf, number), first = leaf.firsts[block]
    cdef uint64_t block_start = leaf_value_end(leaf, first - 1) if first else 0
    cdef uint64_t start = leaf_value_end(leaf, number - 1) if number else leaf.first_at
    cdef uint64_t end = leaf_value_end(leaf, number)
    leaf_key(leaf, entry, &view.key)
    view.lsn = leaf_lsn(leaf, entry)
    view.flags = entry[leaf.position_end] if leaf.flags_differ else leaf.flags
    view.block = leaf.low_block \
        + number_before(leaf.blocks + (block + 1) * leaf.block_width, leaf.block_mask)
    if block_start <= start <= end and start - block_start <= 0xFFFFU \
            and end - start <= MAX_VALUE_SIZE:
        view.at = <uint32_t> (start - block_start)
        view.size = <uint32_t> (end - start)
    else:
        view.at = 0
        view.size = BAD_SIZE


cdef inline int leaf_upper_bound(const LeafView *leaf, const uint8_t *key,
                                 uint64_t lsn) noexcept nogil:
    """How many entries of the leaf are at or below (key, lsn)."""
    cdef uint8_t sought[8 + KEY_SIZE + 8]
    cdef uint8_t *target = sought + 8
    cdef int order = memcmp(key, leaf.payload + LEAF_HEADER, leaf.prefix)
    cdef int low = 0, high = leaf.count, middle
    cdef bint equal_counts = lsn >= leaf.low_lsn
    cdef uint64_t distance = lsn - leaf.low_lsn if equal_counts else 0
    cdef uint64_t mask, number, found
    if order != 0:
        return leaf.count if order > 0 else 0
    if distance > leaf.lsn_mask:
        distance = leaf.lsn_mask
    # The LSN first, with zeros before it, then the rest of the key over them.
    put64_big(target + leaf.sorted_width - 8, distance)
    memcpy(target, key + leaf.prefix, KEY_SIZE - leaf.prefix)
    if leaf.sorted_width <= 8:
        mask = mask_of_width(leaf.sorted_width)
        number = number_before(target + leaf.sorted_width, mask)
        while low < high:
            middle = (low + high) >> 1
            found = number_before(leaf_at(leaf, middle) + leaf.sorted_width, mask)
            if found < number or (found == number and equal_counts):
                low = middle + 1
            else:
                high = middle
        return low
    while low < high:
        middle = (low + high) >> 1
        order = memcmp(leaf_at(leaf, middle), target, leaf.sorted_width)
        if order < 0 or (order == 0 and equal_counts):
            low = middle + 1
        else:
            high = middle
    return low
