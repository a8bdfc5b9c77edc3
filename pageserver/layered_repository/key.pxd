"""The 18-byte key of the store as three integers, so that comparing is three machine compares.

The bytes are read big-endian (bytes 0-7, 8-15, 16-17): the order of the structs is the order of
the byte strings.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    uint64_t __builtin_bswap64(uint64_t) noexcept nogil
    uint16_t __builtin_bswap16(uint16_t) noexcept nogil

cdef enum:
    KEY_SIZE = 18

cdef enum:
    WILL_INIT = 1        # bit 0 of a value's flags: reconstruction may stop at this value
    FLAGS_IMAGE = 1      # kind 0 with WILL_INIT: the data are the bytes of the key at this LSN

cdef struct Key:
    uint64_t hi
    uint64_t mid
    uint16_t lo


cdef inline void key_load(Key *key, const uint8_t *p) noexcept nogil:
    """Read the 18 bytes at `p`."""
    cdef uint64_t hi, mid
    cdef uint16_t lo
    memcpy(&hi, p, 8)
    memcpy(&mid, p + 8, 8)
    memcpy(&lo, p + 16, 2)
    key.hi = __builtin_bswap64(hi)
    key.mid = __builtin_bswap64(mid)
    key.lo = __builtin_bswap16(lo)


cdef inline void key_store(const Key *key, uint8_t *p) noexcept nogil:
    """Write the key as 18 bytes to `p`."""
    cdef uint64_t hi = __builtin_bswap64(key.hi), mid = __builtin_bswap64(key.mid)
    cdef uint16_t lo = __builtin_bswap16(key.lo)
    memcpy(p, &hi, 8)
    memcpy(p + 8, &mid, 8)
    memcpy(p + 16, &lo, 2)


cdef inline bint key_equal(const Key *a, const Key *b) noexcept nogil:
    return a.hi == b.hi and a.mid == b.mid and a.lo == b.lo


cdef inline bint key_less(const Key *a, const Key *b) noexcept nogil:
    if a.hi != b.hi:
        return a.hi < b.hi
    if a.mid != b.mid:
        return a.mid < b.mid
    return a.lo < b.lo


cdef inline int key_parse(Key *key, bytes raw) except -1:
    """Read a Python key; ValueError unless it has 18 bytes."""
    if len(raw) != KEY_SIZE:
        raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(raw)}")
    key_load(key, <const uint8_t *> <const char *> raw)
    return 0


cdef inline bytes key_bytes(const Key *key):
    """The key as a bytes object."""
    cdef uint8_t raw[KEY_SIZE]
    key_store(key, raw)
    return (<char *> raw)[:KEY_SIZE]
