"""Looking through WAL for the few records that tell where a hot standby can begin."""

from libc.stdint cimport uint8_t

from postgres_ffi.wal_decoder cimport WAL_RECORD, WalDecoder
from postgres_ffi.wal_record cimport Record, record_to_python
from postgres_ffi.xact_records import parse_xact_end

cdef enum:
    RM_XLOG = 0
    RM_XACT = 1
    RM_STANDBY = 8
    XLOG_CHECKPOINT_SHUTDOWN = 0x00
    XLOG_NOOP = 0x20
    XLOG_RUNNING_XACTS = 0x10
    RMGR_INFO = 0xF0
    XLOG_XACT_OPMASK = 0x70
    XLOG_XACT_COMMIT = 0x00
    XLOG_XACT_ABORT = 0x20
    XLOG_XACT_COMMIT_PREPARED = 0x30
    XLOG_XACT_ABORT_PREPARED = 0x40


def scan(
    WalDecoder decoder not None, const uint8_t[::1] data not None, version, dict ended not None
):
    """Decode WAL that continues the decoder's input; the records of interest, as DecodedRecord.

    These are shutdown checkpoints, records that do nothing, and snapshots of running transactions.
    Commits and aborts go to `ended`: the transaction id (not those of subtransactions), and the
    start LSN of its record. `version` is the server's PgVersion. Raises WalDecodeError,
    RecordFormatError.
    """
    cdef Record record
    cdef int rc
    cdef list found = []
    if data.shape[0] == 0:
        return found
    decoder.borrow_raw(&data[0], data.shape[0])
    while True:
        with nogil:
            rc = decoder.next_raw(&record)
            while rc == WAL_RECORD and not _of_interest(&record):
                rc = decoder.next_raw(&record)
        if rc != WAL_RECORD:
            break
        if record.rmid == RM_XACT:
            ended[_ended_xid(&record, version)] = record.start_lsn
        else:
            found.append(record_to_python(&record))
    if rc < 0:
        decoder.raise_error()
    return found


cdef bint _of_interest(const Record *record) noexcept nogil:
    cdef uint8_t info = record.info & RMGR_INFO
    if record.rmid == RM_XLOG:
        return info == XLOG_CHECKPOINT_SHUTDOWN or info == XLOG_NOOP
    if record.rmid == RM_XACT:
        info = record.info & XLOG_XACT_OPMASK
        return (
            info == XLOG_XACT_COMMIT
            or info == XLOG_XACT_ABORT
            or info == XLOG_XACT_COMMIT_PREPARED
            or info == XLOG_XACT_ABORT_PREPARED
        )
    return record.rmid == RM_STANDBY and info == XLOG_RUNNING_XACTS


cdef object _ended_xid(const Record *record, object version):
    cdef uint8_t info = record.info & XLOG_XACT_OPMASK
    if info == XLOG_XACT_COMMIT or info == XLOG_XACT_ABORT:
        return record.xid
    main_data = record.main_data[: record.main_len]
    return parse_xact_end(main_data, record.info, version).twophase_xid
