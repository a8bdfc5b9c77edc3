"""What a WAL record does: see record_effects.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint32_t

from postgres_ffi.wal_record cimport BlockRef, Record

cdef enum:
    MAX_NATIVE_XIDS = 256

cdef enum Refusal:
    UNKNOWN_RMGR = 1
    UNKNOWN_INFO
    UNEXPECTED_BLOCKS
    MISSING_BLOCK
    SHORT_MAIN_DATA
    NO_IMAGE
    DUPLICATE_BLOCK
    BAD_BLKNO
    BAD_XID
    BAD_FORK
    BAD_STATUS
    BAD_MAP_BLOCK

cdef struct Effects:
    bint to_handler              # Python applies the record
    int n_clears                 # heap blocks of the first reference's relation whose bits in the
    uint32_t clear_block[2]      # visibility map are cleared: clear_bits of them
    uint8_t clear_bits
    uint8_t set_bits             # HEAP2 VISIBLE: bits that the map page, the first reference, gets
                                 # for the heap block, the second one; 0 for other records
    bint creates_fork            # SMGR CREATE of `fork`
    BlockRef fork
    int n_xids                   # transactions whose status becomes clog_flags (a value's flags)
    uint32_t xids[MAX_NATIVE_XIDS]
    uint8_t clog_flags
    bint ends_transaction        # commit or abort, also of a prepared transaction, at end_time:
    int64_t end_time             # microseconds since 2000-01-01 UTC
    bint creates_multixact       # MULTIXACT CREATE_ID, its lengths checked

# 0, or the Refusal of a record that cannot be ingested.
cdef int classify(const Record *record, Effects *effects) noexcept nogil
