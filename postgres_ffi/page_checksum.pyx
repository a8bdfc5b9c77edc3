"""Data page checksums (storage/checksum_impl.h): FNV-1a over 32 interleaved columns of words."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    #define ZENITH_WIDE __attribute__((target_clones("avx2", "default")))
    #else
    #define ZENITH_WIDE
    #endif

    #define ZENITH_COLUMNS 32
    #define ZENITH_WORDS (8192 / 4)

    static const uint32_t zenith_checksum_start[ZENITH_COLUMNS] = {
        0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2,
        0x83E13D2C, 0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C,
        0xF718902A, 0x0B1C9CDB, 0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979,
        0xCCA6C0B2, 0x304A0979, 0x85AA43D4, 0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E,
        0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756
    };

    /* the columns do not depend on each other, so the inner loops become vector instructions */
    ZENITH_WIDE
    static uint32_t zenith_checksum_block(const uint8_t *page)
    {
        uint32_t sum[ZENITH_COLUMNS], words[ZENITH_COLUMNS], mixed;
        uint32_t result = 0;

        memcpy(sum, zenith_checksum_start, sizeof(sum));
        for (int row = 0; row < ZENITH_WORDS / ZENITH_COLUMNS + 2; row++) {
            if (row < ZENITH_WORDS / ZENITH_COLUMNS)
                memcpy(words, page + row * sizeof(words), sizeof(words));
            else
                memset(words, 0, sizeof(words));
            if (row == 0)
                words[2] &= 0xFFFF0000u;    /* pd_checksum, bytes 8 and 9 */
            for (int i = 0; i < ZENITH_COLUMNS; i++) {
                mixed = sum[i] ^ words[i];
                sum[i] = (mixed * 16777619u) ^ (mixed >> 17);
            }
        }
        for (int i = 0; i < ZENITH_COLUMNS; i++)
            result ^= sum[i];
        return result;
    }
    """
    uint32_t zenith_checksum_block(const uint8_t *page) nogil

cdef enum:
    PAGE_SIZE = 8192
    CHECKSUM_OFFSET = 8     # PageHeaderData.pd_checksum, uint16
    UPPER_OFFSET = 14       # pd_upper: 0 on a page that was never initialised


cdef uint16_t checksum_page_raw(const uint8_t *page, uint32_t blkno) noexcept nogil:
    # never 0, which would read as "not set"
    return <uint16_t> ((zenith_checksum_block(page) ^ blkno) % 65535 + 1)


cdef void set_checksums_raw(uint8_t *pages, size_t npages, uint32_t blkno) noexcept nogil:
    cdef size_t i
    cdef uint16_t checksum
    cdef uint8_t *page
    for i in range(npages):
        page = pages + i * PAGE_SIZE
        if page[UPPER_OFFSET] == 0 and page[UPPER_OFFSET + 1] == 0:
            continue
        checksum = checksum_page_raw(page, blkno + <uint32_t> i)
        memcpy(page + CHECKSUM_OFFSET, &checksum, sizeof(checksum))


def checksum_page(const uint8_t[::1] page not None, uint32_t blkno):
    """Checksum (1..65535) of one 8192-byte page as block `blkno` of its fork; ValueError on size.

    The number is that of the whole fork, not of its 1 GiB file. Meaningless for a new page.
    """
    if page.shape[0] != PAGE_SIZE:
        raise ValueError(f"a page has {PAGE_SIZE} bytes, not {page.shape[0]}")
    return checksum_page_raw(&page[0], blkno)


def set_checksums(uint8_t[::1] pages not None, uint32_t blkno):
    """Store the checksums of consecutive pages in place, the first being block `blkno`.

    New pages (pd_upper 0) stay as they are. ValueError if the size is not a multiple of 8192.
    """
    cdef Py_ssize_t n = pages.shape[0]
    if n % PAGE_SIZE:
        raise ValueError(f"{n} bytes are not a whole number of pages")
    if n:
        with nogil:
            set_checksums_raw(&pages[0], n // PAGE_SIZE, blkno)
