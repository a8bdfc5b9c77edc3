"""Encoding of a leaf of a layer file; the bytes are described in layer_format.pxd."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pageserver.layered_repository.key cimport KEY_SIZE, Key, key_store
from pageserver.layered_repository.layer_format cimport LEAF_ENTRIES, LEAF_HEADER
from zenith_utils.unaligned cimport put16, put64, put64_big

cdef extern from *:
    int __builtin_clzll(unsigned long long) noexcept nogil

cdef struct LeafEntry:
    Key key
    uint64_t lsn
    uint64_t block        # offset of the value's block in the file
    uint32_t size
    uint16_t offset       # of the value in the block
    uint8_t flags


cdef inline int width_of(uint64_t number) noexcept nogil:
    """The bytes that a number needs, 0 to 8."""
    return (71 - __builtin_clzll(number)) >> 3 if number else 0


cdef inline int leaf_prefix(const LeafEntry *entries, int count) noexcept nogil:
    """How many bytes the keys share: they are sorted, so what the first and the last do."""
    cdef uint8_t first[KEY_SIZE]
    cdef uint8_t last[KEY_SIZE]
    cdef int prefix = 0
    key_store(&entries[0].key, first)
    key_store(&entries[count - 1].key, last)
    while prefix < KEY_SIZE and first[prefix] == last[prefix]:
        prefix += 1
    return prefix


cdef inline uint32_t leaf_encode(const LeafEntry *entries, int count,
                                 uint8_t *leaf) noexcept nogil:
    """Make the payload of a leaf of 1 to LEAF_ENTRIES entries; returns its size."""
    cdef uint8_t firsts[LEAF_ENTRIES]
    cdef const LeafEntry *entry
    cdef uint8_t *p
    cdef uint64_t low_lsn = entries[0].lsn, high_lsn = low_lsn, low_block = entries[0].block
    cdef uint64_t position = entries[0].offset
    cdef int prefix = leaf_prefix(entries, count), suffix = KEY_SIZE - prefix, i
    cdef int lsn_width, position_width, block_width, width, blocks = 0
    cdef uint8_t flags = entries[0].flags, flags_width = 0
    for i in range(count):
        entry = &entries[i]
        if entry.lsn < low_lsn:
            low_lsn = entry.lsn
        if entry.lsn > high_lsn:
            high_lsn = entry.lsn
        if i == 0 or entry.block != entries[i - 1].block:
            firsts[blocks] = <uint8_t> i
            blocks += 1
        if entry.flags != flags:
            flags_width = 1
        position += entry.size
    lsn_width = width_of(high_lsn - low_lsn)
    position_width = width_of(position | 1)
    block_width = width_of(entries[count - 1].block - low_block)
    width = suffix + lsn_width + position_width + flags_width

    # From the end to the beginning: 8 bytes are stored of every number and 18 of every key, and
    # what is too much in front is overwritten by what belongs there.
    p = leaf + LEAF_HEADER + prefix + count * width
    for i in range(blocks - 1, -1, -1):
        put64_big(p + blocks + (i + 1) * block_width - 8, entries[firsts[i]].block - low_block)
    memcpy(p, firsts, blocks)
    for i in range(count - 1, -1, -1):
        entry = &entries[i]
        if flags_width:
            p -= 1
            p[0] = entry.flags
        put64_big(p - 8, position)
        p -= position_width
        put64_big(p - 8, entry.lsn - low_lsn)
        p -= lsn_width
        key_store(&entry.key, p - KEY_SIZE)
        p -= suffix
        position -= entry.size
    # The last key stored was the first one, so the prefix is in its place.
    leaf[0] = <uint8_t> count
    leaf[1] = <uint8_t> prefix
    leaf[2] = <uint8_t> lsn_width
    leaf[3] = <uint8_t> position_width
    leaf[4] = <uint8_t> block_width
    leaf[5] = flags_width
    leaf[6] = <uint8_t> blocks
    leaf[7] = 0 if flags_width else flags
    put64(leaf + 8, low_lsn)
    put64(leaf + 16, low_block)
    put16(leaf + 24, entries[0].offset)
    return <uint32_t> (LEAF_HEADER + prefix + count * width + blocks * (1 + block_width))
