"""The inside of a WAL record: block references, images, main data (access/xlogrecord.h).

The checks are those of DecodeXLogRecord in access/transam/xlogreader.c; a good CRC does not make
lengths trustworthy, so none is used unchecked.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zenith_utils.unaligned cimport get16, get32, get64

from postgres_ffi.decoded_record import DecodedBlock, DecodedRecord
from postgres_ffi.relfile import RelTag

cdef enum:
    PAGE_SIZE = 8192
    RECORD_HEADER = 24
    MAX_BLOCK_ID = 32
    MAX_FORK = 3

cdef enum:
    BKPBLOCK_FORK_MASK = 0x0F
    BKPBLOCK_HAS_IMAGE = 0x10
    BKPBLOCK_HAS_DATA = 0x20
    BKPBLOCK_WILL_INIT = 0x40
    BKPBLOCK_SAME_REL = 0x80
    BLOCK_ID_DATA_SHORT = 255
    BLOCK_ID_DATA_LONG = 254
    BLOCK_ID_ORIGIN = 253
    BLOCK_ID_TOPLEVEL_XID = 252

cdef enum:
    SHORT_DATA = 1
    BAD_BLOCK_ID
    BAD_BLOCK_ORDER
    BAD_FORK
    BAD_DATA_FLAG
    BAD_IMAGE
    NO_PREVIOUS_REL

RECORD_REASONS = {
    SHORT_DATA: "WAL record's parts do not add up to its length",
    BAD_BLOCK_ID: "invalid block id {a} in WAL record",
    BAD_BLOCK_ORDER: "block id {a} out of order in WAL record",
    BAD_FORK: "invalid fork number {a} in WAL record",
    BAD_DATA_FLAG: "data flag of a block contradicts its length {a} in WAL record",
    BAD_IMAGE: "invalid page image: length {a}, hole {b} in WAL record",
    NO_PREVIOUS_REL: "block refers to the relation of an earlier one that is not there",
}


cdef inline int refuse(RecordError *error, int reason, uint64_t a, uint64_t b) noexcept nogil:
    error.reason = reason
    error.a = a
    error.b = b
    return -1


cdef int parse_record(const uint8_t *p, uint32_t size, const ImageBits *bits, Record *out,
                      RecordError *error) noexcept nogil:
    cdef uint32_t remaining = size - RECORD_HEADER
    cdef uint64_t payload = 0
    cdef const uint8_t *q = p + RECORD_HEADER
    cdef uint8_t block_id
    cdef BlockRef *block
    cdef int i
    out.raw = p
    out.tot_len = size
    out.xid = get32(p + 4)
    out.prev = get64(p + 8)
    out.info = p[16]
    out.rmid = p[17]
    out.toplevel_xid = 0
    out.origin = 0
    out.main_len = 0
    out.nblocks = 0
    while remaining > payload:
        block_id = q[0]
        if block_id <= MAX_BLOCK_ID:
            if parse_block(&q, &remaining, &payload, bits, out, error) < 0:
                return -1
        elif block_id == BLOCK_ID_DATA_SHORT:
            if remaining < 2:
                return refuse(error, SHORT_DATA, 0, 0)
            out.main_len = q[1]
            payload += out.main_len
            q += 2
            remaining -= 2
            break
        elif block_id == BLOCK_ID_DATA_LONG:
            if remaining < 5:
                return refuse(error, SHORT_DATA, 0, 0)
            out.main_len = get32(q + 1)
            payload += out.main_len
            q += 5
            remaining -= 5
            break
        elif block_id == BLOCK_ID_ORIGIN:
            if remaining < 3:
                return refuse(error, SHORT_DATA, 0, 0)
            out.origin = get16(q + 1)
            q += 3
            remaining -= 3
        elif block_id == BLOCK_ID_TOPLEVEL_XID:
            if remaining < 5:
                return refuse(error, SHORT_DATA, 0, 0)
            out.toplevel_xid = get32(q + 1)
            q += 5
            remaining -= 5
        else:
            return refuse(error, BAD_BLOCK_ID, block_id, 0)
    if remaining != payload:
        return refuse(error, SHORT_DATA, 0, 0)
    for i in range(out.nblocks):
        block = &out.blocks[i]
        block.image = q if block.has_image else NULL
        q += block.bimg_len
        block.data = q
        q += block.data_len
    out.main_data = q
    return 0

cdef int parse_block(const uint8_t **cursor, uint32_t *remaining, uint64_t *payload,
                     const ImageBits *bits, Record *out, RecordError *error) noexcept nogil:
    """One XLogRecordBlockHeader with what follows it."""
    cdef const uint8_t *q = cursor[0]
    cdef BlockRef *block = &out.blocks[out.nblocks]
    cdef BlockRef *last = NULL
    cdef uint8_t flags
    cdef uint32_t size
    if remaining[0] < 4:
        return refuse(error, SHORT_DATA, 0, 0)
    # ids ascend and are at most 32, so there are never more than 33 blocks
    if out.nblocks:
        last = &out.blocks[out.nblocks - 1]
        if q[0] <= last.id:
            return refuse(error, BAD_BLOCK_ORDER, q[0], 0)
    block.id = q[0]
    flags = q[1]
    block.forknum = flags & BKPBLOCK_FORK_MASK
    block.will_init = (flags & BKPBLOCK_WILL_INIT) != 0
    block.has_image = (flags & BKPBLOCK_HAS_IMAGE) != 0
    block.data_len = get16(q + 2)
    if block.forknum > MAX_FORK:
        return refuse(error, BAD_FORK, block.forknum, 0)
    if ((flags & BKPBLOCK_HAS_DATA) != 0) != (block.data_len != 0):
        return refuse(error, BAD_DATA_FLAG, block.data_len, 0)
    payload[0] += block.data_len
    cursor[0] = q + 4
    remaining[0] -= 4
    block.apply_image = block.compressed = False
    block.bimg_info = 0
    block.bimg_len = block.hole_offset = block.hole_length = 0
    if block.has_image and parse_image(cursor, remaining, payload, bits, block, error) < 0:
        return -1
    size = 4 if flags & BKPBLOCK_SAME_REL else 16
    if remaining[0] < size:
        return refuse(error, SHORT_DATA, 0, 0)
    q = cursor[0]
    if size == 16:
        block.spcnode = get32(q)
        block.dbnode = get32(q + 4)
        block.relnode = get32(q + 8)
    elif last == NULL:
        return refuse(error, NO_PREVIOUS_REL, 0, 0)
    else:
        block.spcnode = last.spcnode
        block.dbnode = last.dbnode
        block.relnode = last.relnode
    block.blkno = get32(q + size - 4)
    cursor[0] = q + size
    remaining[0] -= size
    out.nblocks += 1
    return 0

cdef int parse_image(const uint8_t **cursor, uint32_t *remaining, uint64_t *payload,
                     const ImageBits *bits, BlockRef *block, RecordError *error) noexcept nogil:
    """XLogRecordBlockImageHeader and, for a compressed image with a hole, the hole's length."""
    cdef const uint8_t *q = cursor[0]
    cdef uint32_t size = 5
    cdef bint has_hole, bad
    if remaining[0] < 5:
        return refuse(error, SHORT_DATA, 0, 0)
    block.bimg_len = get16(q)
    block.hole_offset = get16(q + 2)
    block.bimg_info = q[4]
    block.apply_image = (q[4] & bits.apply) != 0
    block.compressed = (q[4] & bits.compressed) != 0
    has_hole = (q[4] & bits.has_hole) != 0
    if block.bimg_len > PAGE_SIZE:
        return refuse(error, BAD_IMAGE, block.bimg_len, 0)
    if not block.compressed:
        block.hole_length = PAGE_SIZE - block.bimg_len
    elif has_hole:
        if remaining[0] < 7:
            return refuse(error, SHORT_DATA, 0, 0)
        block.hole_length = get16(q + 5)
        size = 7
    if has_hole:
        bad = block.hole_offset == 0 or block.hole_length == 0 \
            or <uint32_t> block.hole_offset + block.hole_length > PAGE_SIZE
    else:
        bad = block.hole_offset != 0 or block.hole_length != 0
    if bad or (block.compressed and block.bimg_len == PAGE_SIZE):
        return refuse(error, BAD_IMAGE, block.bimg_len, block.hole_length)
    payload[0] += block.bimg_len
    cursor[0] = q + size
    remaining[0] -= size
    return 0


cdef object record_to_python(const Record *record):
    cdef const BlockRef *block
    cdef int i
    blocks = []
    for i in range(record.nblocks):
        block = &record.blocks[i]
        blocks.append(DecodedBlock(
            id=block.id,
            rel=RelTag(block.spcnode, block.dbnode, block.relnode, block.forknum),
            blkno=block.blkno,
            will_init=block.will_init,
            apply_image=block.apply_image,
            compressed=block.compressed,
            bimg_info=block.bimg_info,
            hole_offset=block.hole_offset,
            hole_length=block.hole_length,
            image=(<const char *> block.image)[:block.bimg_len] if block.has_image else None,
            data=(<const char *> block.data)[:block.data_len],
        ))
    return DecodedRecord(
        start_lsn=record.start_lsn,
        end_lsn=record.end_lsn,
        prev=record.prev,
        xid=record.xid,
        toplevel_xid=record.toplevel_xid,
        rmid=record.rmid,
        info=record.info,
        origin=record.origin,
        blocks=tuple(blocks),
        main_data=(<const char *> record.main_data)[:record.main_len],
        raw=(<const char *> record.raw)[:record.tot_len],
    )


cdef int restore_image_raw(const BlockRef *block, uint8_t *page) noexcept nogil:
    cdef uint32_t hole_end = <uint32_t> block.hole_offset + block.hole_length
    if not block.has_image or block.compressed:
        return 0
    memcpy(page, block.image, block.hole_offset)
    memset(page + block.hole_offset, 0, block.hole_length)
    memcpy(page + hole_end, block.image + block.hole_offset, PAGE_SIZE - hole_end)
    return 1
