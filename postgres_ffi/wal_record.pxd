from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef struct BlockRef:
    uint32_t spcnode, dbnode, relnode, blkno
    uint8_t id                      # block id in the record: ascending, not always dense
    uint8_t forknum                 # 0..3
    uint8_t bimg_info               # raw bits; has_image, apply_image say the common things
    bint has_image
    bint apply_image                # redo restores the image (not a consistency check only)
    bint will_init                  # BKPBLOCK_WILL_INIT alone
    bint compressed                 # the image is compressed
    uint16_t data_len
    uint16_t bimg_len               # bytes at `image`
    uint16_t hole_offset, hole_length
    const uint8_t *image            # NULL without an image
    const uint8_t *data             # data_len bytes


cdef struct Record:
    uint64_t start_lsn              # of the record header's first byte
    uint64_t end_lsn                # behind the last byte, rounded up to 8
    uint64_t prev                   # xl_prev
    uint32_t tot_len, xid, toplevel_xid, main_len
    uint8_t info, rmid
    uint16_t origin                 # replication origin id, 0 if none
    int nblocks
    BlockRef blocks[33]
    const uint8_t *main_data        # main_len bytes
    const uint8_t *raw              # tot_len bytes, page headers taken out


# Bits of bimg_info, which differ between major versions.
cdef struct ImageBits:
    uint8_t has_hole, apply, compressed


# Why a record was refused; `a` and `b` belong to the text of the reason.
cdef struct RecordError:
    int reason
    uint64_t a, b


# Fill `out` (all but start_lsn, end_lsn) from the contiguous record of `size` bytes at `p`, of
# which at least the 24 header bytes exist. Its CRC is not looked at. 0, or -1 with `error` set.
cdef int parse_record(const uint8_t *p, uint32_t size, const ImageBits *bits, Record *out,
                      RecordError *error) noexcept nogil

# A DecodedRecord with copies of everything.
cdef object record_to_python(const Record *record)

# Build the 8192-byte page of an uncompressed image, its hole zeroed: 1; 0 if it is compressed.
cdef int restore_image_raw(const BlockRef *block, uint8_t *page) noexcept nogil
