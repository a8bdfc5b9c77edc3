"""Blocked Bloom filter: which keys a layer may hold.

Lines of 64 bytes, one for about 51 keys (10 bits per key). A key sets 6 bits, all in one line, so
a test touches one cache line; about one key in a hundred that was not added passes. With mix() as
below and all numbers of 64 bits: h = mix(mix(hi ^ lo * 0x9E3779B97F4A7C15) ^ mid); the line is
(h >> 32) * lines >> 32; the bits are the six groups of nine bits of mix(h), lowest first, each a
bit number in the line (bit n is bit n % 8 of byte n // 8). hi, mid, lo are those of key.pxd.
"""
from libc.stdint cimport uint8_t, uint64_t

from pageserver.layered_repository.key cimport Key

cdef enum:
    FILTER_LINE = 64
    FILTER_BITS_PER_KEY = 10
    FILTER_PROBES = 6
    FILTER_MAX_LINES = 1 << 25      # 2 GiB; more keys than 1.7e9 only make it less selective


cdef inline uint64_t filter_mix(uint64_t x) noexcept nogil:
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    return x ^ (x >> 32)


cdef inline uint64_t filter_hash(const Key *key) noexcept nogil:
    return filter_mix(filter_mix(key.hi ^ key.lo * <uint64_t> 0x9E3779B97F4A7C15ULL) ^ key.mid)


cdef inline uint64_t filter_lines_for(uint64_t keys) noexcept nogil:
    """How many lines the filter of that many keys has."""
    cdef uint64_t lines = (keys * FILTER_BITS_PER_KEY + 8 * FILTER_LINE - 1) // (8 * FILTER_LINE)
    return lines if lines < FILTER_MAX_LINES else FILTER_MAX_LINES


cdef inline uint64_t filter_line(uint64_t h, uint64_t lines) noexcept nogil:
    """The offset of the key's line in the filter."""
    return ((h >> 32) * lines >> 32) * FILTER_LINE


cdef inline void filter_add(uint8_t *filter, uint64_t lines, uint64_t h) noexcept nogil:
    cdef uint8_t *line = filter + filter_line(h, lines)
    cdef uint64_t bits = filter_mix(h)
    cdef int i
    for i in range(FILTER_PROBES):
        line[(bits & 511) >> 3] |= <uint8_t> (1 << (bits & 7))
        bits >>= 9


cdef inline bint filter_may_contain(const uint8_t *filter, uint64_t lines,
                                    uint64_t h) noexcept nogil:
    return filter_line_may_contain(filter + filter_line(h, lines), h)


cdef inline bint filter_line_may_contain(const uint8_t *line, uint64_t h) noexcept nogil:
    """The same for the key's line of a filter."""
    cdef uint64_t bits = filter_mix(h)
    cdef int i
    for i in range(FILTER_PROBES):
        if not line[(bits & 511) >> 3] & (1 << (bits & 7)):
            return False
        bits >>= 9
    return True
