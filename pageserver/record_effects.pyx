"""Which effects a WAL record has beyond its block references: the part that needs only the record.

Formats are those of PostgreSQL 15: access/heapam_xlog.h, access/xact.h, access/multixact.h,
catalog/storage_xlog.h. Whatever is not known to be harmless is refused.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcpy

from zenith_utils.unaligned cimport get32, get64
from postgres_ffi.wal_record cimport Record

cdef enum:
    RM_XLOG = 0
    RM_XACT = 1
    RM_SMGR = 2
    RM_CLOG = 3
    RM_DBASE = 4
    RM_TBLSPC = 5
    RM_MULTIXACT = 6
    RM_RELMAP = 7
    RM_STANDBY = 8
    RM_HEAP2 = 9
    RM_HEAP = 10
    RM_SEQ = 15
    RM_BRIN = 17
    RM_COMMIT_TS = 18
    RM_REPLORIGIN = 19
    RM_GENERIC = 20
    RM_LOGICALMSG = 21
    RM_FIRST_CUSTOM = 128

cdef enum:
    XLOG_CHECKPOINT_SHUTDOWN = 0x00
    XLOG_CHECKPOINT_ONLINE = 0x10
    XLOG_NOOP = 0x20
    XLOG_NEXTOID = 0x30
    XLOG_SWITCH = 0x40
    XLOG_BACKUP_END = 0x50
    XLOG_PARAMETER_CHANGE = 0x60
    XLOG_RESTORE_POINT = 0x70
    XLOG_FPW_CHANGE = 0x80
    XLOG_END_OF_RECOVERY = 0x90
    XLOG_FPI_FOR_HINT = 0xA0
    XLOG_FPI = 0xB0
    XLOG_OVERWRITE_CONTRECORD = 0xD0

cdef enum:
    XLOG_XACT_OPMASK = 0x70
    XLOG_XACT_COMMIT = 0x00
    XLOG_XACT_PREPARE = 0x10
    XLOG_XACT_ABORT = 0x20
    XLOG_XACT_COMMIT_PREPARED = 0x30
    XLOG_XACT_ABORT_PREPARED = 0x40
    XLOG_XACT_ASSIGNMENT = 0x50
    XLOG_XACT_INVALIDATIONS = 0x60
    XLOG_XACT_HAS_INFO = 0x80
    XINFO_HAS_DBINFO = 1 << 0
    XINFO_HAS_SUBXACTS = 1 << 1
    XINFO_HAS_RELFILENODES = 1 << 2
    XINFO_HAS_TWOPHASE = 1 << 4
    XINFO_HAS_ORIGIN = 1 << 5
    XINFO_HAS_GID = 1 << 7

cdef enum:
    XLOG_HEAP_OPMASK = 0x70
    XLOG_HEAP_INSERT = 0x00
    XLOG_HEAP_DELETE = 0x10
    XLOG_HEAP_UPDATE = 0x20
    XLOG_HEAP_HOT_UPDATE = 0x40
    XLOG_HEAP_LOCK = 0x60
    XLOG_HEAP2_VISIBLE = 0x40
    XLOG_HEAP2_MULTI_INSERT = 0x50
    XLOG_HEAP2_LOCK_UPDATED = 0x60
    SMGR_CREATE = 0x10
    SMGR_TRUNCATE = 0x20
    MULTIXACT_CREATE_ID = 0x20

cdef enum:
    VM_FORK = 2
    MAX_FORK = 3
    HEAPBLOCKS_PER_VM_PAGE = 32672
    VM_ALL_FROZEN = 2
    VM_BITS = 3
    FIRST_NORMAL_XID = 3
    MAX_MULTIXACT_STATUS = 5

cdef enum:                       # flags of values, see values.py
    FLAGS_CLOG_COMMITTED = 3 << 1
    FLAGS_CLOG_ABORTED = 4 << 1

_REASONS = {
    UNKNOWN_RMGR: "its resource manager is unknown",
    UNKNOWN_INFO: "its kind is unknown, its effects cannot be tracked",
    UNEXPECTED_BLOCKS: "it refers to blocks, which its kind does not",
    MISSING_BLOCK: "it refers to no block",
    SHORT_MAIN_DATA: "its data are too short",
    NO_IMAGE: "it has no full-page image to restore",
    DUPLICATE_BLOCK: "it refers to the same block twice",
    BAD_BLKNO: "it refers to an invalid block number",
    BAD_XID: "its transaction id is not a normal one",
    BAD_FORK: "its relation fork is invalid",
    BAD_STATUS: "a multixact member has an invalid status",
    BAD_MAP_BLOCK: "it does not refer to the visibility map's page of its heap block",
}


def refusal_text(int refusal):
    """What a Refusal says of the record."""
    return _REASONS[refusal]


cdef int classify(const Record *record, Effects *effects) noexcept nogil:
    cdef uint8_t rmid = record.rmid, op = record.info & 0xF0
    effects.to_handler = False
    effects.n_clears = 0
    effects.set_bits = 0
    effects.creates_fork = False
    effects.n_xids = 0
    effects.ends_transaction = False
    effects.creates_multixact = False
    if rmid == RM_HEAP or rmid == RM_HEAP2:
        return _heap(record, effects)
    if rmid == RM_XLOG:
        return _xlog(record, op, effects)
    if RM_HEAP < rmid <= RM_BRIN or rmid == RM_GENERIC or rmid >= RM_FIRST_CUSTOM:
        return 0
    if rmid > RM_LOGICALMSG:
        return UNKNOWN_RMGR
    if record.nblocks:
        return UNEXPECTED_BLOCKS
    if rmid == RM_XACT:
        return _xact(record, op, effects)
    if rmid == RM_SMGR:
        return _smgr(record, op, effects)
    if rmid == RM_MULTIXACT:
        return _multixact(record, op, effects)
    if rmid == RM_STANDBY:
        return 0 if op <= 0x20 else UNKNOWN_INFO
    if rmid == RM_COMMIT_TS:
        return 0 if op <= 0x20 else UNKNOWN_INFO
    if rmid == RM_LOGICALMSG:
        return 0 if op == 0 else UNKNOWN_INFO
    effects.to_handler = True
    if rmid == RM_DBASE:
        return 0 if op <= 0x20 else UNKNOWN_INFO
    if rmid == RM_RELMAP:
        return 0 if op == 0 else UNKNOWN_INFO
    # CLOG, tablespaces, replication origins: two kinds each
    return 0 if op <= 0x10 else UNKNOWN_INFO


cdef int _xlog(const Record *record, uint8_t op, Effects *effects) noexcept nogil:
    cdef int i
    if op == XLOG_FPI or op == XLOG_FPI_FOR_HINT:
        for i in range(record.nblocks):
            if not record.blocks[i].apply_image and (
                    op == XLOG_FPI or record.blocks[i].has_image):
                return NO_IMAGE
        return 0
    if record.nblocks:
        return UNEXPECTED_BLOCKS
    if (op == XLOG_NOOP or op == XLOG_SWITCH or op == XLOG_BACKUP_END or op == XLOG_RESTORE_POINT
            or op == XLOG_END_OF_RECOVERY or op == XLOG_OVERWRITE_CONTRECORD):
        return 0
    effects.to_handler = True
    if (op == XLOG_CHECKPOINT_SHUTDOWN or op == XLOG_CHECKPOINT_ONLINE or op == XLOG_NEXTOID
            or op == XLOG_PARAMETER_CHANGE or op == XLOG_FPW_CHANGE):
        return 0
    return UNKNOWN_INFO


cdef int _xact(const Record *record, uint8_t op, Effects *effects) noexcept nogil:
    cdef const uint8_t *p = record.main_data
    cdef uint32_t left = record.main_len, xinfo = 0, n, i
    op &= XLOG_XACT_OPMASK
    if op == XLOG_XACT_ASSIGNMENT or op == XLOG_XACT_INVALIDATIONS:
        return 0
    if op > XLOG_XACT_INVALIDATIONS:
        return UNKNOWN_INFO
    if op == XLOG_XACT_PREPARE:
        effects.to_handler = True
        return 0
    if left < 8:
        return SHORT_MAIN_DATA
    effects.ends_transaction = True
    effects.end_time = <int64_t> get64(p)
    if op != XLOG_XACT_COMMIT and op != XLOG_XACT_ABORT:
        effects.to_handler = True
        return 0
    if record.xid < FIRST_NORMAL_XID:
        return BAD_XID
    p += 8
    left -= 8
    if record.info & XLOG_XACT_HAS_INFO:
        if left < 4:
            return SHORT_MAIN_DATA
        xinfo = get32(p)
        p += 4
        left -= 4
    if xinfo & (XINFO_HAS_RELFILENODES | XINFO_HAS_TWOPHASE | XINFO_HAS_ORIGIN | XINFO_HAS_GID):
        effects.to_handler = True
        return 0
    effects.xids[0] = record.xid
    effects.n_xids = 1
    effects.clog_flags = FLAGS_CLOG_COMMITTED if op == XLOG_XACT_COMMIT else FLAGS_CLOG_ABORTED
    if xinfo & XINFO_HAS_SUBXACTS:
        n = 8 if xinfo & XINFO_HAS_DBINFO else 0
        if left < n + 4:
            return SHORT_MAIN_DATA
        p += n
        left -= n + 4
        n = get32(p)
        if n > left // 4:
            return SHORT_MAIN_DATA
        if n >= MAX_NATIVE_XIDS:
            effects.n_xids = 0
            effects.to_handler = True
            return 0
        memcpy(&effects.xids[1], p + 4, n * 4)
        effects.n_xids += n
        for i in range(1, n + 1):
            if effects.xids[i] < FIRST_NORMAL_XID:
                return BAD_XID
    return 0


cdef int _smgr(const Record *record, uint8_t op, Effects *effects) noexcept nogil:
    cdef const uint8_t *p = record.main_data
    if op == SMGR_TRUNCATE:
        effects.to_handler = True
        return 0
    if op != SMGR_CREATE:
        return UNKNOWN_INFO
    if record.main_len < 16:
        return SHORT_MAIN_DATA
    if get32(p + 12) > MAX_FORK or get32(p + 8) == 0:
        return BAD_FORK
    effects.fork.spcnode = get32(p)
    effects.fork.dbnode = get32(p + 4)
    effects.fork.relnode = get32(p + 8)
    effects.fork.forknum = <uint8_t> get32(p + 12)
    effects.creates_fork = True
    return 0


cdef int _multixact(const Record *record, uint8_t op, Effects *effects) noexcept nogil:
    cdef const uint8_t *p = record.main_data
    cdef uint32_t n, i
    if op > 0x30:
        return UNKNOWN_INFO
    if op != MULTIXACT_CREATE_ID:
        effects.to_handler = True
        return 0
    if record.main_len < 12:
        return SHORT_MAIN_DATA
    n = get32(p + 8)
    if n > (record.main_len - 12) // 8:
        return SHORT_MAIN_DATA
    for i in range(n):
        if get32(p + 16 + 8 * i) > MAX_MULTIXACT_STATUS:
            return BAD_STATUS
    effects.creates_multixact = True
    return 0


cdef int _heap(const Record *record, Effects *effects) noexcept nogil:
    """Find what happens to visibility map bits; where they are cleared it is without a reference.

    An update names its new page as block 0 and the old one, if it is another, as the last.
    """
    cdef uint8_t op = record.info & XLOG_HEAP_OPMASK
    cdef int last = record.nblocks - 1
    cdef int rc
    if record.rmid == RM_HEAP2:
        if op == XLOG_HEAP2_MULTI_INSERT:
            return _clear(record, effects, 0, 0, 1, VM_BITS)
        if op == XLOG_HEAP2_LOCK_UPDATED:
            return _clear(record, effects, 0, 7, 1, VM_ALL_FROZEN)
        if op == XLOG_HEAP2_VISIBLE:
            return _visible(record, effects)
        return 0
    if op == XLOG_HEAP_INSERT:
        return _clear(record, effects, 0, 2, 1, VM_BITS)
    if op == XLOG_HEAP_DELETE:
        return _clear(record, effects, 0, 7, 1, VM_BITS)
    if op == XLOG_HEAP_LOCK:
        return _clear(record, effects, 0, 7, 1, VM_ALL_FROZEN)
    if op == XLOG_HEAP_UPDATE or op == XLOG_HEAP_HOT_UPDATE:
        rc = _clear(record, effects, last, 7, 1, VM_BITS)
        return rc if rc else _clear(record, effects, 0, 7, 2, VM_BITS)
    return 0


cdef int _visible(const Record *record, Effects *effects) noexcept nogil:
    if record.nblocks != 2:
        return MISSING_BLOCK
    if record.main_len < 5:
        return SHORT_MAIN_DATA
    if record.blocks[0].forknum != VM_FORK \
            or record.blocks[0].blkno != record.blocks[1].blkno // HEAPBLOCKS_PER_VM_PAGE:
        return BAD_MAP_BLOCK
    effects.set_bits = record.main_data[4] & VM_BITS
    return 0


cdef int _clear(const Record *record, Effects *effects, int block, uint32_t flag_offset,
                uint8_t flag, uint8_t bits) noexcept nogil:
    """Clear the bits of the heap block of a reference if a flag of the main data says so."""
    if record.nblocks < 1:
        return MISSING_BLOCK
    if record.main_len <= flag_offset:
        return SHORT_MAIN_DATA
    if record.main_data[flag_offset] & flag:
        effects.clear_block[effects.n_clears] = record.blocks[block].blkno
        effects.clear_bits = bits
        effects.n_clears += 1
    return 0
