"""Where a timeline's WAL is written: the current segment, and the decoder that checks what comes.

What every commit does is here and needs no GIL; changing segments is WalStorage's business.

Segments are written in whole blocks, so that they can be open with O_DIRECT: past the page cache a
small durable write takes half the CPU time. What is written is collected in a buffer, which begins
with the block at whose middle the WAL written before ends; zeros fill its last block up. That block
is written again with the WAL that follows, as the page cache would do.
"""
import os

from libc.errno cimport EINTR, EIO, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, memset

from postgres_ffi.wal_decoder cimport WAL_RECORD, WalDecoder
from postgres_ffi.wal_record cimport Record
from safekeeper.recent_wal cimport RecentWal

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE

cdef extern from "<unistd.h>" nogil:
    ssize_t posix_pwrite "pwrite"(int fd, const void *data, size_t size, int64_t offset)
    ssize_t posix_pread "pread"(int fd, void *data, size_t size, int64_t offset)
    int posix_fdatasync "fdatasync"(int fd)

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef enum:
    # Of all disks: the unit, and the alignment in memory, of direct I/O.
    BLOCK = 4096
    SMALL_BUFFER = 64 << 10
    # More than the largest batch that is flushed at once.
    LARGE_BUFFER = (4 << 20) + (256 << 10)

DIRECT_BLOCK = BLOCK

cdef uint64_t SEGMENT_SIZE = WAL_SEGMENT_SIZE


cdef class WalEnd:
    """No segment is open, and nothing can be written before `restart`.

    Without `sync` nothing is made durable by flushing.
    """

    def __init__(self, *, bint sync):
        self.sync = sync
        self.fd = self.segno = -1
        self.recent = RecentWal()

    def __dealloc__(self):
        free(self.buffer)

    def restart(self, uint64_t lsn, WalDecoder decoder not None):
        """Write at `lsn` next; a new decoder begins there."""
        self.write_lsn = self.record_end = lsn
        self.decoder = decoder

    def use_segment(self, int fd, int64_t segno):
        """Write to this file, which others open and close, from now on; -1 for none.

        It is the segment of `write_lsn`, and may be open with O_DIRECT. What is not flushed of the
        one before is given up. Raises OSError.
        """
        cdef uint64_t offset = self.write_lsn % SEGMENT_SIZE
        cdef int64_t block = <int64_t> (offset - offset % BLOCK)
        cdef ssize_t size = 0
        self.fd = fd
        self.segno = segno
        self.filled = 0
        self.unwritten = False
        if self.capacity > SMALL_BUFFER:
            # It grew with a batch: the next one may be far away.
            free(self.buffer)
            self.buffer = NULL
            self.capacity = 0
        if fd < 0:
            return
        if <int64_t> (self.write_lsn // SEGMENT_SIZE) != segno:
            raise ValueError(f"WAL is not written to segment {segno} next")
        if self.reserve(BLOCK) != 0:
            raise MemoryError
        if offset % BLOCK:
            size = posix_pread(fd, self.buffer, BLOCK, block)
            if size < 0:
                raise OSError(errno, os.strerror(errno))
            if size < <ssize_t> (offset % BLOCK):
                raise OSError(EIO, f"the WAL segment ends at {block + size}, before {offset}")
        self.filled = offset % BLOCK

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
        """Take bytes whose place is `offset` of the segment, which is `write_lsn`."""
        self.dirty = True
        self.recent.put(self.write_lsn, data, size)
        if self.filled + size > LARGE_BUFFER - BLOCK and self.unwritten \
                and self.write_out() != WAL_WRITTEN:
            return WAL_IO_ERROR
        if self.reserve(self.filled + size + BLOCK) != 0:
            self.error = ENOMEM
            return WAL_IO_ERROR
        memcpy(self.buffer + self.filled, data, size)
        self.filled += size
        self.buffered_end = offset + size
        self.unwritten = True
        return WAL_WRITTEN

    cdef int reserve(self, size_t size) noexcept nogil:
        """Have a buffer for so many bytes; 0, or -1 without memory."""
        cdef void *larger
        cdef size_t capacity = SMALL_BUFFER
        if size <= self.capacity:
            return 0
        while capacity < size:
            capacity *= 2
        if posix_memalign(&larger, BLOCK, capacity) != 0:
            return -1
        if self.filled:
            memcpy(larger, self.buffer, self.filled)
        free(self.buffer)
        self.buffer = <uint8_t *> larger
        self.capacity = capacity
        return 0

    cdef int write_out(self) noexcept nogil:
        """Write the buffer to the segment; its last block stays if it is not full."""
        cdef size_t rest = self.filled % BLOCK
        cdef size_t blocks = self.filled - rest
        cdef size_t size = blocks
        cdef const uint8_t *data = self.buffer
        cdef int64_t offset = <int64_t> (self.buffered_end - self.filled)
        cdef ssize_t written
        if rest:
            size += BLOCK
            memset(self.buffer + self.filled, 0, size - self.filled)
        while size:
            written = posix_pwrite(self.fd, data, size, offset)
            if written < 0 and errno == EINTR:
                continue
            if written <= 0:
                self.error = errno if written < 0 else EIO
                return WAL_IO_ERROR
            data += written
            size -= written
            offset += written
        if blocks:
            memmove(self.buffer, self.buffer + blocks, rest)
        self.filled = rest
        self.unwritten = False
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
        if self.unwritten and self.write_out() != WAL_WRITTEN:
            return WAL_IO_ERROR
        while self.sync and posix_fdatasync(self.fd) != 0:
            if errno != EINTR:
                self.error = errno
                return WAL_SYNC_ERROR
        self.dirty = False
        self.flush_lsn = self.record_end
        return WAL_WRITTEN

    cdef int raise_error(self, int result) except -1:
        if result == WAL_INVALID:
            self.decoder.raise_error()
        raise OSError(self.error, os.strerror(self.error))
