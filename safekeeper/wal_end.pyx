"""Where a timeline's WAL is written: the current segment, and the decoder that checks what comes.

What every commit does is here and needs no GIL; changing segments is WalStorage's business.
"""
import os

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t

from postgres_ffi.wal_decoder cimport WAL_RECORD, WalDecoder
from postgres_ffi.wal_record cimport Record

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE

cdef extern from "<unistd.h>" nogil:
    ssize_t posix_pwrite "pwrite"(int fd, const void *data, size_t size, int64_t offset)
    int posix_fdatasync "fdatasync"(int fd)

cdef uint64_t SEGMENT_SIZE = WAL_SEGMENT_SIZE


cdef class WalEnd:
    """No segment is open, and nothing can be written before `restart`.

    Without `sync` nothing is made durable by flushing.
    """

    def __init__(self, *, bint sync):
        self.sync = sync
        self.fd = self.segno = -1

    def restart(self, uint64_t lsn, WalDecoder decoder not None):
        """Write at `lsn` next; a new decoder begins there."""
        self.write_lsn = self.record_end = lsn
        self.decoder = decoder

    def use_segment(self, int fd, int64_t segno):
        """Write to this file, which others open and close, from now on; -1 for none."""
        self.fd = fd
        self.segno = segno

    @property
    def started(self):
        """Whether it is known where to write."""
        return self.decoder is not None

    def write(self, const uint8_t[::1] data not None):
        """Check bytes and write them at `write_lsn`; False if they belong (also) to other segments.

        Then nothing was written: `write_piece` does it. Nothing is durable before `flush`. Raises
        WalDecodeError (nothing written), OSError.
        """
        cdef int result
        cdef size_t size = data.shape[0]
        if size == 0:
            return True
        with nogil:
            result = self.write_raw(&data[0], size)
        if result < 0:
            self.raise_error(result)
        return result == WAL_WRITTEN

    def write_piece(self, const uint8_t[::1] data not None):
        """Write bytes that have been checked to the current segment, in which they fit.

        Raises OSError.
        """
        cdef int result
        cdef size_t size = data.shape[0]
        cdef uint64_t offset = self.write_lsn % SEGMENT_SIZE
        if <int64_t> (self.write_lsn // SEGMENT_SIZE) != self.segno or offset + size > SEGMENT_SIZE:
            raise ValueError("the bytes belong to another segment")
        with nogil:
            result = self.put(&data[0], size, offset)
            self.advance(size)
        if result < 0:
            self.raise_error(result)

    def flush(self):
        """Make all that was written durable; `flush_lsn` then tells how far. Raises OSError."""
        cdef int result
        with nogil:
            result = self.flush_raw()
        if result < 0:
            self.raise_error(result)

    cdef int write_raw(self, const uint8_t *data, size_t size) noexcept nogil:
        """Check and write; a WalEndResult. `size` is not 0."""
        cdef uint64_t offset = self.write_lsn % SEGMENT_SIZE
        cdef Record record
        cdef int result = WAL_RECORD
        # It has consumed, or copied, all that it was given before.
        self.decoder.window = data
        self.decoder.window_len = size
        while result == WAL_RECORD:
            result = self.decoder.next_raw(&record)
        if result < 0:
            return WAL_INVALID
        if <int64_t> (self.write_lsn // SEGMENT_SIZE) != self.segno or offset + size > SEGMENT_SIZE:
            return WAL_OTHER_SEGMENT
        result = self.put(data, size, offset)
        if result == WAL_WRITTEN:
            self.advance(size)
        return result

    cdef int put(self, const uint8_t *data, size_t size, uint64_t offset) noexcept nogil:
        cdef ssize_t written
        self.dirty = True
        while size:
            written = posix_pwrite(self.fd, data, size, <int64_t> offset)
            if written < 0 and errno == EINTR:
                continue
            if written <= 0:
                self.error = errno if written < 0 else EIO
                return WAL_IO_ERROR
            data += written
            size -= written
            offset += written
        return WAL_WRITTEN

    cdef void advance(self, size_t size) noexcept nogil:
        self.write_lsn += size
        # A record ends with its padding, which may still be missing: it does not count then.
        if self.decoder.position_lsn <= self.write_lsn:
            self.record_end = self.decoder.position_lsn
        elif self.decoder.prev_start <= self.write_lsn:
            self.record_end = self.decoder.prev_start

    cdef int flush_raw(self) noexcept nogil:
        if not self.dirty:
            return WAL_WRITTEN
        while self.sync and posix_fdatasync(self.fd) != 0:
            if errno != EINTR:
                self.error = errno
                return WAL_IO_ERROR
        self.dirty = False
        self.flush_lsn = self.record_end
        return WAL_WRITTEN

    cdef int raise_error(self, int result) except -1:
        if result == WAL_INVALID:
            self.decoder.raise_error()
        raise OSError(self.error, os.strerror(self.error))
