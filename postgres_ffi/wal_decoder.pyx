"""Decoder of a WAL stream: pages to records to block references, every CRC checked.

Input comes in pieces of any size, down to one byte, and is untrusted: each length is checked
before use. Formats: access/xlogrecord.h, access/xlog_internal.h; the checks are those of
access/transam/xlogreader.c, which are stricter here where Postgres leaves them to redo.

A record that lies contiguously in the input is decoded in place; only one that crosses a page or
the end of the input is copied. After an error the decoder stays failed.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

from zenith_utils.unaligned cimport get16, get32, get64
from postgres_ffi.wal_record cimport RecordError, parse_record, record_to_python
from zenith_utils.crc32c cimport crc32c_update

from postgres_ffi.versions import version_of_magic
from postgres_ffi.wal_record import RECORD_REASONS
from zenith_utils.lsn import Lsn

cdef enum:
    PAGE_SIZE = 8192
    SHORT_HEADER = 24
    LONG_HEADER = 40
    RECORD_HEADER = 24
    MAX_RECORD = 0x3FFFFFFF
    KEEP_RECORD_BUFFER = 1 << 20

cdef enum:
    XLP_CONTRECORD = 0x01
    XLP_LONG_HEADER = 0x02
    XLP_OVERWRITE_CONTRECORD = 0x08
    XLP_ALL_FLAGS = 0x0F

cdef enum:
    RM_XLOG = 0
    RM_MIN_CUSTOM = 128
    XLOG_SWITCH = 0x40
    XLOG_OVERWRITE_CONTRECORD = 0xD0

cdef enum:
    BAD_MAGIC = 100     # behind the reasons of wal_record
    BAD_PAGE_INFO
    BAD_PAGE_ADDRESS
    BAD_SYSTEM_ID
    BAD_SEGMENT_SIZE
    BAD_BLOCK_SIZE
    BAD_TIMELINE
    UNEXPECTED_CONTRECORD
    MISSING_CONTRECORD
    BAD_REMAINDER
    BAD_LENGTH
    BAD_RMGR
    BAD_PREV
    BAD_CRC
    BAD_OVERWRITE
    GAP_NOT_ZERO
    NO_MEMORY

_REASONS = RECORD_REASONS | {
    BAD_MAGIC: "invalid WAL page magic {a:04X} (expected {b:04X})",
    BAD_PAGE_INFO: "invalid WAL page info bits {a:04X}",
    BAD_PAGE_ADDRESS: "WAL page claims to be the one of {a_lsn}",
    BAD_SYSTEM_ID: "WAL of database system {a} (expected {b})",
    BAD_SEGMENT_SIZE: "WAL segment size {a} in page header (expected {b})",
    BAD_BLOCK_SIZE: "WAL block size {a} in page header (expected {b})",
    BAD_TIMELINE: "timeline {a} after timeline {b}",
    UNEXPECTED_CONTRECORD: "WAL page continues a record that is not there",
    MISSING_CONTRECORD: "WAL page does not continue the record that starts at {a_lsn}",
    BAD_REMAINDER: "WAL page continues a record with {a} bytes (expected {b})",
    BAD_LENGTH: "invalid WAL record length {a}",
    BAD_RMGR: "invalid resource manager {a}",
    BAD_PREV: "WAL record names {a_lsn} as its predecessor (expected {b_lsn})",
    BAD_CRC: "WAL record crc mismatch",
    BAD_OVERWRITE: "WAL record does not confirm that the one that starts at {a_lsn} is void",
    GAP_NOT_ZERO: "bytes behind the end of a switched WAL segment are not zero",
}


class WalDecodeError(Exception):
    """WAL that cannot be decoded: `lsn` (int) is where, `reason` (str) says what is wrong."""

    def __init__(self, lsn, reason):
        super().__init__(f"{reason} at {Lsn(lsn)}")
        self.lsn = lsn
        self.reason = reason

    def __reduce__(self):
        return WalDecodeError, (self.lsn, self.reason)


cdef inline uint64_t align8(uint64_t lsn) noexcept nogil:
    return (lsn + 7) & ~<uint64_t>7


cdef inline bint all_zero(const uint8_t *p, size_t n) noexcept nogil:
    return n == 0 or (p[0] == 0 and memcmp(p, p + 1, n - 1) == 0)


cdef class WalDecoder:
    """Decodes the WAL that starts at `start_lsn`.

    `start_lsn` is a record's start, or a page or segment boundary: there the input begins with the
    page header. `magic` selects the major version. `prev_lsn`: start of the record before, checked
    against the first record's xl_prev; 0 if unknown. `check_prev`: check the chain of xl_prev.
    `system_identifier`: checked in segment headers unless 0. `join_mid_record`: a first page that
    continues a record is joined behind that record instead of refused. `assume_switch`: zeros at
    the very start are what follows XLOG_SWITCH in a segment (a stream holds no other zeros; for
    files say False, so that zeros are the end of WAL).
    """

    def __cinit__(self, uint64_t start_lsn, uint16_t magic=0xD110, uint32_t seg_size=16 << 20, *,
                  uint64_t prev_lsn=0, bint check_prev=True, uint64_t system_identifier=0,
                  bint join_mid_record=False, bint assume_switch=True):
        cdef uint32_t page_offset = start_lsn % PAGE_SIZE
        cdef uint32_t header = SHORT_HEADER
        version = version_of_magic(magic)
        if seg_size < PAGE_SIZE or seg_size & (seg_size - 1):
            raise ValueError(f"WAL segment size {seg_size} is not a power of two of pages")
        if (start_lsn - page_offset) % seg_size == 0:
            header = LONG_HEADER
        if start_lsn % 8 or 0 < page_offset < header:
            raise ValueError(f"no WAL record can start at {Lsn(start_lsn)}")
        self.magic = magic
        self.seg_size = seg_size
        self.system_identifier = system_identifier
        self.image_bits.has_hole = version.bimg_has_hole
        self.image_bits.apply = version.bimg_apply
        self.image_bits.compressed = version.bimg_compressed
        self.max_builtin_rmgr = version.max_builtin_rmgr
        self.check_prev = check_prev
        self.joining = join_mid_record
        self.assume_switch = assume_switch
        self.at = self.position_lsn = start_lsn
        self.prev_start = prev_lsn
        self.fresh = True

    def __dealloc__(self):
        free(self.copied)
        free(self.record)

    # ---- input

    cdef int feed_raw(self, const uint8_t *p, size_t n) except -1:
        cdef size_t need = self.window_len + n
        cdef uint8_t *grown
        if self.reason:
            self.raise_error()
        if need > self.copied_size:
            grown = <uint8_t *> malloc(need)
            if grown == NULL:
                raise MemoryError(f"no memory for {need} bytes of WAL")
            if self.window_len:
                memcpy(grown, self.window, self.window_len)
            free(self.copied)
            self.copied = grown
            self.copied_size = need
        elif self.window_len:
            memmove(self.copied, self.window, self.window_len)
        if n:
            memcpy(self.copied + self.window_len, p, n)
        self.window = self.copied
        self.window_len = need
        return 0

    cdef int borrow_raw(self, const uint8_t *p, size_t n) except -1:
        if self.reason:
            self.raise_error()
        if self.window_len:
            raise RuntimeError("WAL decoder got new input before it had consumed the last one")
        self.window = p
        self.window_len = n
        return 0

    cdef void consume(self, size_t n) noexcept nogil:
        self.window += n
        self.window_len -= n
        self.at += n

    # ---- records

    cdef int next_raw(self, Record *out) noexcept nogil:
        cdef uint32_t room, tot_len
        cdef uint64_t pad, start
        cdef const uint8_t *p
        cdef int rc
        while self.reason == 0:
            if self.window_len == 0:
                return WAL_NEED_INPUT
            if self.gap_end:
                if self.take_gap() < 0:
                    break
                continue
            room = PAGE_SIZE - <uint32_t> (self.at % PAGE_SIZE)
            if room == PAGE_SIZE:
                if self.take_page_header() < 0:
                    break
                continue
            if self.skip_len:
                tot_len = <uint32_t> min(<size_t> min(room, self.skip_len), self.window_len)
                self.consume(tot_len)
                self.skip_len -= tot_len
                if self.skip_len == 0:
                    self.position_lsn = align8(self.at)
                continue
            if self.record_start == 0:
                pad = align8(self.at) - self.at
                if pad:
                    self.consume(min(<size_t> pad, self.window_len))
                    continue
                if self.window_len >= 4:
                    tot_len = get32(self.window)
                    if tot_len >= RECORD_HEADER and tot_len <= room and tot_len <= self.window_len:
                        p = self.window
                        start = self.at
                        self.consume(tot_len)
                        if self.finish(p, start, out) < 0:
                            break
                        return WAL_RECORD
                if self.start_record() < 0:
                    break
            rc = self.assemble()
            if rc < 0:
                break
            if rc == 1:
                start = self.record_start
                self.record_start = 0
                if self.finish(self.record, start, out) < 0:
                    break
                return WAL_RECORD
        return WAL_NO_MEMORY if self.reason == NO_MEMORY else WAL_BAD

    cdef int start_record(self) noexcept nogil:
        """Prepare to collect a record, starting with its length."""
        self.record_start = self.at
        self.record_have = 0
        self.record_need = 0
        if self.record_size > KEEP_RECORD_BUFFER:
            free(self.record)
            self.record = NULL
            self.record_size = 0
        return self.reserve(PAGE_SIZE)

    cdef int reserve(self, uint32_t size) noexcept nogil:
        """Room for `size` bytes of the record; grows with what arrived, not with what it claims."""
        cdef uint8_t *grown
        cdef size_t new_size = self.record_size
        if size <= new_size:
            return 0
        new_size = max(<size_t> size, new_size * 2)
        grown = <uint8_t *> realloc(self.record, new_size)
        if grown == NULL:
            return self.fail(NO_MEMORY, self.record_start, size, 0)
        self.record = grown
        self.record_size = new_size
        return 0

    cdef int assemble(self) noexcept nogil:
        """Collect bytes of this page: 1 when the record is whole, 0 to go on, -1 failed."""
        cdef uint32_t room = PAGE_SIZE - <uint32_t> (self.at % PAGE_SIZE)
        cdef uint32_t target = self.record_need
        cdef uint32_t take, had = self.record_have
        if target == 0:
            target = 4
        elif had < RECORD_HEADER:
            target = RECORD_HEADER      # checked before more of a senseless length is collected
        take = <uint32_t> min(<size_t> min(room, target - had), self.window_len)
        if self.reserve(had + take) < 0:
            return -1
        memcpy(self.record + had, self.window, take)
        self.record_have = had + take
        self.consume(take)
        if self.record_need == 0 and self.record_have == 4:
            target = get32(self.record)
            if target == 0 and self.fresh and self.assume_switch \
                    and self.record_start == self.position_lsn \
                    and self.record_start % self.seg_size > LONG_HEADER:
                self.gap_end = (self.record_start | (self.seg_size - 1)) + 1
                self.record_start = 0
                return 0
            if self.check_length(target, self.record_start) < 0:
                return -1
            self.record_need = target
        elif had < RECORD_HEADER and self.record_have == RECORD_HEADER:
            if self.check_header(self.record, self.record_start) < 0:
                return -1
        return 1 if self.record_have == self.record_need else 0

    cdef int check_length(self, uint32_t tot_len, uint64_t start) noexcept nogil:
        if tot_len < RECORD_HEADER or tot_len > MAX_RECORD:
            return self.fail(BAD_LENGTH, start, tot_len, 0)
        return 0

    cdef int check_header(self, const uint8_t *p, uint64_t start) noexcept nogil:
        """Check resource manager and predecessor of the record whose 24 header bytes are at p."""
        cdef uint8_t rmid = p[17]
        cdef uint64_t prev = get64(p + 8)
        if rmid > self.max_builtin_rmgr and rmid < RM_MIN_CUSTOM:
            return self.fail(BAD_RMGR, start, rmid, 0)
        if self.check_prev:
            # stale WAL that happens to start on this very byte has a valid CRC, not this link
            if prev >= start or (self.prev_start and prev != self.prev_start):
                return self.fail(BAD_PREV, start, prev, self.prev_start)
        return 0

    cdef int finish(self, const uint8_t *p, uint64_t start, Record *out) noexcept nogil:
        """Check and decode the whole record at p; the input is at its end."""
        cdef uint32_t tot_len = get32(p)
        cdef uint32_t crc
        cdef RecordError error
        if self.check_header(p, start) < 0:
            return -1
        crc = crc32c_update(0xFFFFFFFFU, p + RECORD_HEADER, tot_len - RECORD_HEADER)
        crc = crc32c_update(crc, p, 20) ^ 0xFFFFFFFFU
        if crc != get32(p + 20):
            return self.fail(BAD_CRC, start, 0, 0)
        out.start_lsn = start
        out.end_lsn = align8(self.at)
        if parse_record(p, tot_len, &self.image_bits, out, &error) < 0:
            return self.fail(error.reason, start, error.a, error.b)
        if self.overwritten:
            if out.rmid != RM_XLOG or out.info & 0xF0 != XLOG_OVERWRITE_CONTRECORD \
                    or out.main_len < 8 or get64(out.main_data) != self.overwritten:
                return self.fail(BAD_OVERWRITE, start, self.overwritten, 0)
            self.overwritten = 0
        self.prev_start = start
        self.position_lsn = out.end_lsn
        self.fresh = False
        self.joining = False
        if out.rmid == RM_XLOG and out.info & 0xF0 == XLOG_SWITCH and out.end_lsn % self.seg_size:
            self.gap_end = (out.end_lsn | (self.seg_size - 1)) + 1
        return 0

    # ---- pages

    cdef int take_gap(self) noexcept nogil:
        """Consume zeros up to the end of a switched segment; page headers are zero there, too."""
        cdef size_t n = self.window_len
        if n > self.gap_end - self.at:
            n = <size_t> (self.gap_end - self.at)
        if not all_zero(self.window, n):
            return self.fail(GAP_NOT_ZERO, self.at, 0, 0)
        self.consume(n)
        if self.at == self.gap_end:
            self.position_lsn = self.gap_end
            self.gap_end = 0
        return 0

    cdef int take_page_header(self) noexcept nogil:
        """Collect and check the header at a page boundary: 0, or -1 failed."""
        cdef uint32_t size = SHORT_HEADER if self.at % self.seg_size else LONG_HEADER
        cdef uint32_t take
        cdef const uint8_t *p = self.window
        cdef uint64_t page_lsn = self.at
        # `at` stays on the boundary until the whole header is there
        if self.header_have or self.window_len < size:
            take = <uint32_t> min(<size_t> (size - self.header_have), self.window_len)
            memcpy(self.header + self.header_have, p, take)
            self.header_have += take
            self.window += take
            self.window_len -= take
            if self.header_have < size:
                return 0
            self.header_have = 0
            self.at += size
            p = self.header
        else:
            self.consume(size)
        if self.fresh and self.assume_switch and page_lsn == self.position_lsn \
                and self.record_start == 0 and size == SHORT_HEADER and all_zero(p, size):
            self.gap_end = (page_lsn | (self.seg_size - 1)) + 1
            return 0
        self.at = page_lsn
        if self.check_page_header(p) < 0:
            return -1
        self.at = page_lsn + size
        return self.enter_page(get16(p + 2), get32(p + 16), page_lsn)

    cdef int check_page_header(self, const uint8_t *p) noexcept nogil:
        """Check the header of the page at `at`."""
        cdef uint16_t info = get16(p + 2)
        cdef uint32_t timeline = get32(p + 4)
        cdef bint long_header = self.at % self.seg_size == 0
        if get16(p) != self.magic:
            return self.fail(BAD_MAGIC, self.at, get16(p), self.magic)
        if info & ~XLP_ALL_FLAGS or ((info & XLP_LONG_HEADER) != 0) != long_header:
            return self.fail(BAD_PAGE_INFO, self.at, info, 0)
        if get64(p + 8) != self.at:
            return self.fail(BAD_PAGE_ADDRESS, self.at, get64(p + 8), 0)
        if long_header:
            if self.system_identifier and get64(p + 24) != self.system_identifier:
                return self.fail(BAD_SYSTEM_ID, self.at, get64(p + 24), self.system_identifier)
            if get32(p + 32) != self.seg_size:
                return self.fail(BAD_SEGMENT_SIZE, self.at, get32(p + 32), self.seg_size)
            if get32(p + 36) != PAGE_SIZE:
                return self.fail(BAD_BLOCK_SIZE, self.at, get32(p + 36), PAGE_SIZE)
        if timeline < self.timeline:
            return self.fail(BAD_TIMELINE, self.at, timeline, self.timeline)
        self.timeline = timeline
        return 0

    cdef int enter_page(self, uint16_t info, uint32_t rem_len, uint64_t page_lsn) noexcept nogil:
        """Decide what the first bytes behind the page header are."""
        cdef uint32_t expected = self.skip_len
        if self.record_start:
            expected = self.record_need - self.record_have
        if expected and info & XLP_OVERWRITE_CONTRECORD:
            # the record's tail was lost in a crash; its successor, which starts here, must say so
            if self.record_start:
                self.overwritten = self.record_start
            self.record_start = 0
            self.skip_len = 0
            expected = 0
        if expected == 0:
            if not info & XLP_CONTRECORD:
                return 0
            if not self.joining:
                return self.fail(UNEXPECTED_CONTRECORD, page_lsn, 0, 0)
            if rem_len == 0 or rem_len > MAX_RECORD:
                return self.fail(BAD_LENGTH, page_lsn, rem_len, 0)
            self.joining = False
            self.skip_len = rem_len
            return 0
        if not info & XLP_CONTRECORD:
            return self.fail(MISSING_CONTRECORD, page_lsn, self.record_start, 0)
        if rem_len != expected:
            return self.fail(BAD_REMAINDER, page_lsn, rem_len, expected)
        return 0

    # ---- errors

    cdef int fail(self, int reason, uint64_t lsn, uint64_t a, uint64_t b) noexcept nogil:
        self.reason = reason
        self.reason_lsn = lsn
        self.reason_a = a
        self.reason_b = b
        self.window = NULL      # a borrowed window may be gone by the next call
        self.window_len = 0
        return -1

    cdef int raise_error(self) except -1:
        if self.reason == NO_MEMORY:
            raise MemoryError(f"no memory for a WAL record at {Lsn(self.reason_lsn)}")
        if self.reason == 0:
            raise RuntimeError("WAL decoder has not failed")
        text = _REASONS[self.reason].format(
            a=self.reason_a, b=self.reason_b,
            a_lsn=Lsn(self.reason_a), b_lsn=Lsn(self.reason_b),
        )
        raise WalDecodeError(self.reason_lsn, text)

    # ---- Python

    def feed(self, const uint8_t[::1] data not None):
        """Append WAL bytes that continue the input; WalDecodeError if the decoder has failed."""
        if data.shape[0]:
            self.feed_raw(&data[0], data.shape[0])

    def next_record(self):
        """The next complete record, None if more input is needed; WalDecodeError."""
        cdef Record record
        cdef int rc = self.next_raw(&record)
        if rc < 0:
            self.raise_error()
        return record_to_python(&record) if rc == WAL_RECORD else None

    def scan(self, const uint8_t[::1] data not None):
        """Decode and check everything in `data` without building records; their number.

        `position` tells how far complete records reach. WalDecodeError after the last good one.
        """
        cdef Record record
        cdef int rc
        cdef uint64_t count = 0
        with nogil:
            rc = self.next_raw(&record)
            while rc == WAL_RECORD:
                count += 1
                rc = self.next_raw(&record)
        if rc < 0:
            self.raise_error()
        if data.shape[0] == 0:
            return count
        self.borrow_raw(&data[0], data.shape[0])
        with nogil:
            rc = self.next_raw(&record)
            while rc == WAL_RECORD:
                count += 1
                rc = self.next_raw(&record)
        if rc < 0:
            self.raise_error()
        return count

    @property
    def position(self):
        """End of the last complete record (int), where a decoder can start again.

        Behind XLOG_SWITCH it is the record's end until the rest of the segment was consumed, then
        the segment boundary. Before the first record: the start.
        """
        return self.position_lsn

    @property
    def received_lsn(self):
        """End of the input so far (int)."""
        return self.at + self.header_have + self.window_len

    @property
    def last_record_start(self):
        """Start of the last record (int), the next one's xl_prev; 0 or `prev_lsn` before."""
        return self.prev_start

    @property
    def failed(self):
        """Whether an error was met; the decoder then refuses all input."""
        return self.reason != 0
