from libc.stdint cimport uint8_t, uint16_t, uint32_t


# Checksum of the 8192-byte page at `page` as block `blkno`; its pd_checksum field counts as 0.
cdef uint16_t checksum_page_raw(const uint8_t *page, uint32_t blkno) noexcept nogil

# Store the checksum in each of `npages` pages, blocks `blkno` and on; new (all-zero header) pages
# have none and are left as they are.
cdef void set_checksums_raw(uint8_t *pages, size_t npages, uint32_t blkno) noexcept nogil
