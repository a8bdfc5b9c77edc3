"""CRC-32C (Castagnoli), the checksum of Postgres' WAL, of pg_control and of Zenith's own files.

Uses the SSE 4.2 instruction where the processor has it and a slicing table elsewhere.
"""
from libc.stdint cimport uint8_t, uint32_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <string.h>

    static uint32_t zenith_crc_table[8][256];

    static void zenith_crc_init(void)
    {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++)
                c = (c >> 1) ^ ((c & 1) ? 0x82F63B78u : 0);
            zenith_crc_table[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; i++)
            for (int k = 1; k < 8; k++)
                zenith_crc_table[k][i] = (zenith_crc_table[k - 1][i] >> 8)
                    ^ zenith_crc_table[0][zenith_crc_table[k - 1][i] & 0xFF];
    }

    static uint32_t zenith_crc_sw(uint32_t crc, const uint8_t *p, size_t n)
    {
        while (n >= 8) {
            uint32_t lo, hi;
            memcpy(&lo, p, 4);
            memcpy(&hi, p + 4, 4);
            lo ^= crc;
            crc = zenith_crc_table[7][lo & 0xFF] ^ zenith_crc_table[6][(lo >> 8) & 0xFF]
                ^ zenith_crc_table[5][(lo >> 16) & 0xFF] ^ zenith_crc_table[4][lo >> 24]
                ^ zenith_crc_table[3][hi & 0xFF] ^ zenith_crc_table[2][(hi >> 8) & 0xFF]
                ^ zenith_crc_table[1][(hi >> 16) & 0xFF] ^ zenith_crc_table[0][hi >> 24];
            p += 8;
            n -= 8;
        }
        while (n--)
            crc = (crc >> 8) ^ zenith_crc_table[0][(crc ^ *p++) & 0xFF];
        return crc;
    }

    #if defined(__x86_64__)
    #include <nmmintrin.h>
    static int zenith_crc_hw_available(void) { return __builtin_cpu_supports("sse4.2"); }
    __attribute__((target("sse4.2")))
    static uint32_t zenith_crc_hw(uint32_t crc, const uint8_t *p, size_t n)
    {
        uint64_t c = crc, v;
        while (n >= 8) {
            memcpy(&v, p, 8);
            c = _mm_crc32_u64(c, v);
            p += 8;
            n -= 8;
        }
        while (n--)
            c = _mm_crc32_u8((uint32_t) c, *p++);
        return (uint32_t) c;
    }
    #else
    static int zenith_crc_hw_available(void) { return 0; }
    static uint32_t zenith_crc_hw(uint32_t crc, const uint8_t *p, size_t n)
    { return zenith_crc_sw(crc, p, n); }
    #endif

    static uint32_t (*zenith_crc)(uint32_t, const uint8_t *, size_t);

    static void zenith_crc_choose(void)
    {
        zenith_crc_init();
        zenith_crc = zenith_crc_hw_available() ? zenith_crc_hw : zenith_crc_sw;
    }
    """
    void zenith_crc_choose()
    uint32_t zenith_crc(uint32_t, const uint8_t *, size_t) nogil
    uint32_t zenith_crc_sw(uint32_t, const uint8_t *, size_t) nogil

zenith_crc_choose()


cdef uint32_t crc32c_update(uint32_t state, const uint8_t *p, size_t n) noexcept nogil:
    """Continue a running CRC: start with 0xFFFFFFFF, finish by XOR with 0xFFFFFFFF."""
    return zenith_crc(state, p, n)


def crc32c(const uint8_t[::1] data not None, uint32_t crc=0):
    """CRC-32C of `data`; `crc` is the result for the bytes before it, 0 at the start."""
    cdef uint32_t state = crc ^ 0xFFFFFFFFU
    cdef Py_ssize_t n = data.shape[0]
    if n == 0:
        return crc
    with nogil:
        state = zenith_crc(state, &data[0], n)
    return state ^ 0xFFFFFFFFU


def crc32c_portable(const uint8_t[::1] data not None, uint32_t crc=0):
    """The same by table alone, for processors without the instruction."""
    cdef Py_ssize_t n = data.shape[0]
    if n == 0:
        return crc
    return zenith_crc_sw(crc ^ 0xFFFFFFFFU, &data[0], n) ^ 0xFFFFFFFFU
