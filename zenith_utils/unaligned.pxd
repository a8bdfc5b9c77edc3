# Numbers at any address: little-endian, and big-endian ones where the name says so.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    uint32_t __builtin_bswap32(uint32_t) noexcept nogil
    uint64_t __builtin_bswap64(uint64_t) noexcept nogil


cdef inline uint16_t get16(const uint8_t *p) noexcept nogil:
    cdef uint16_t v
    memcpy(&v, p, 2)
    return v


cdef inline uint32_t get32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline uint64_t get64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline void put16(uint8_t *p, uint16_t v) noexcept nogil:
    memcpy(p, &v, 2)


cdef inline void put32(uint8_t *p, uint32_t v) noexcept nogil:
    memcpy(p, &v, 4)


cdef inline void put64(uint8_t *p, uint64_t v) noexcept nogil:
    memcpy(p, &v, 8)


cdef inline uint32_t get32_big(const uint8_t *p) noexcept nogil:
    return __builtin_bswap32(get32(p))


cdef inline void put32_big(uint8_t *p, uint32_t v) noexcept nogil:
    put32(p, __builtin_bswap32(v))


cdef inline uint64_t get64_big(const uint8_t *p) noexcept nogil:
    return __builtin_bswap64(get64(p))


cdef inline void put64_big(uint8_t *p, uint64_t v) noexcept nogil:
    put64(p, __builtin_bswap64(v))


cdef inline uint64_t get_big(const uint8_t *p, int width) noexcept nogil:
    """A big-endian number of 4 or 8 bytes."""
    return get64_big(p) if width == 8 else get32_big(p)


cdef inline void put_big(uint8_t *p, uint64_t v, int width) noexcept nogil:
    if width == 8:
        put64_big(p, v)
    else:
        put32_big(p, <uint32_t> v)
