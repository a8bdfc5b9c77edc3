"""Looking through WAL for the few records that tell where a hot standby can begin."""

from libc.stdint cimport uint8_t

from postgres_ffi.wal_decoder cimport WAL_RECORD, WalDecoder
from postgres_ffi.wal_record cimport Record, record_to_python

cdef enum:
    RM_XLOG = 0
    RM_STANDBY = 8
    XLOG_CHECKPOINT_SHUTDOWN = 0x00
    XLOG_NOOP = 0x20
    XLOG_RUNNING_XACTS = 0x10
    RMGR_INFO = 0xF0


def scan(WalDecoder decoder not None, const uint8_t[::1] data not None):
    """Decode WAL that continues the decoder's input; the records of interest, as DecodedRecord.

    These are shutdown checkpoints, records that do nothing, and snapshots of running transactions.
    Raises WalDecodeError.
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
        found.append(record_to_python(&record))
    if rc < 0:
        decoder.raise_error()
    return found


cdef bint _of_interest(const Record *record) noexcept nogil:
    cdef uint8_t info = record.info & RMGR_INFO
    if record.rmid == RM_XLOG:
        return info == XLOG_CHECKPOINT_SHUTDOWN or info == XLOG_NOOP
    return record.rmid == RM_STANDBY and info == XLOG_RUNNING_XACTS
