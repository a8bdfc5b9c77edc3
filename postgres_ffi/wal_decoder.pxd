from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from postgres_ffi.wal_record cimport BlockRef, ImageBits, Record, restore_image_raw


cdef enum:
    WAL_RECORD = 1                  # results of next_raw
    WAL_NEED_INPUT = 0
    WAL_BAD = -1
    WAL_NO_MEMORY = -2


cdef class WalDecoder:
    # what to expect
    cdef uint16_t magic
    cdef uint32_t seg_size
    cdef uint64_t system_identifier
    cdef ImageBits image_bits
    cdef uint8_t max_builtin_rmgr
    cdef bint check_prev            # xl_prev must name the record before
    cdef bint assume_switch         # zeros at the start position are the rest of a switched segment
    cdef bint joining               # the start may lie in the middle of a record

    # where the decoder stands
    cdef uint64_t at                # LSN of the window's first byte
    cdef uint64_t position_lsn
    cdef uint64_t prev_start        # start of the last record, 0 if unknown
    cdef uint64_t overwritten       # start of an abandoned record until its successor is checked
    cdef uint64_t gap_end           # end of the zeros behind XLOG_SWITCH, 0 outside
    cdef uint32_t timeline          # of the last page header, 0 before the first
    cdef bint fresh                 # no record decoded yet
    cdef int reason                 # why decoding failed, 0 while it has not
    cdef uint64_t reason_lsn, reason_a, reason_b

    # input: borrowed from the caller or lying in `copied`
    cdef const uint8_t *window
    cdef size_t window_len
    cdef uint8_t *copied
    cdef size_t copied_size

    # a page header or record that lies in more than one piece
    cdef uint8_t header[40]
    cdef uint32_t header_have
    cdef uint8_t *record
    cdef size_t record_size
    cdef uint32_t record_have, record_need      # need is 0 until xl_tot_len is known
    cdef uint64_t record_start                  # 0 when no record is being assembled
    cdef uint32_t skip_len                      # what is left of the record joined in the middle

    # Copy `n` bytes of WAL that continue the input. Raises if the decoder has failed.
    cdef int feed_raw(self, const uint8_t *p, size_t n) except -1
    # The same without copying: `p` must stay valid until next_raw returns anything but WAL_RECORD.
    # All earlier input must have been consumed (next_raw returned WAL_NEED_INPUT).
    cdef int borrow_raw(self, const uint8_t *p, size_t n) except -1
    # WAL_RECORD, WAL_NEED_INPUT or an error code; pointers in `out` are valid until the next call.
    cdef int next_raw(self, Record *out) noexcept nogil
    # Raise the WalDecodeError or MemoryError behind a negative result of next_raw.
    cdef int raise_error(self) except -1

    cdef int fail(self, int reason, uint64_t lsn, uint64_t a, uint64_t b) noexcept nogil
    cdef void consume(self, size_t n) noexcept nogil
    cdef int take_gap(self) noexcept nogil
    cdef int take_page_header(self) noexcept nogil
    cdef int check_page_header(self, const uint8_t *p) noexcept nogil
    cdef int enter_page(self, uint16_t info, uint32_t rem_len, uint64_t page_lsn) noexcept nogil
    cdef int start_record(self) noexcept nogil
    cdef int assemble(self) noexcept nogil
    cdef int reserve(self, uint32_t size) noexcept nogil
    cdef int check_length(self, uint32_t tot_len, uint64_t start) noexcept nogil
    cdef int check_header(self, const uint8_t *p, uint64_t start) noexcept nogil
    cdef int finish(self, const uint8_t *p, uint64_t start, Record *out) noexcept nogil
