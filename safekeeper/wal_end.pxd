"""Where a timeline's WAL is written: see wal_end.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from postgres_ffi.wal_decoder cimport WalDecoder
from safekeeper.recent_wal cimport RecentWal

cdef enum WalEndResult:
    WAL_WRITTEN = 0
    WAL_OTHER_SEGMENT = 1      # checked, but not (all) in the current segment: nothing was written
    WAL_INVALID = -1           # the decoder says why
    WAL_IO_ERROR = -2          # `error` is the errno
    WAL_SYNC_ERROR = -3        # as well; nobody knows what is durable

cdef class WalEnd:
    cdef readonly int fd               # of the current segment, -1 for none
    cdef readonly int64_t segno
    cdef readonly uint64_t write_lsn   # where the next byte goes
    cdef readonly uint64_t record_end  # end of the last record that is complete with its padding
    cdef public uint64_t flush_lsn     # end of the last complete durable record, or where WAL begins
    cdef public bint dirty             # something was written since the last flush
    cdef readonly bint sync            # flushing means fdatasync
    cdef readonly RecentWal recent     # what was written last, for readers
    cdef uint8_t *buffer               # whole blocks of the segment, the last one in part
    cdef size_t capacity, filled
    cdef uint64_t buffered_end         # offset in the segment where what is in it ends
    cdef bint unwritten                # the buffer has bytes that the segment lacks
    cdef int error
    cdef WalDecoder decoder

    cdef int write_raw(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int put(self, const uint8_t *data, size_t size, uint64_t offset) noexcept nogil
    cdef int reserve(self, size_t size) noexcept nogil
    cdef int write_out(self) noexcept nogil
    cdef void advance(self, size_t size) noexcept nogil
    cdef int flush_raw(self) noexcept nogil
    cdef int raise_error(self, int result) except -1
