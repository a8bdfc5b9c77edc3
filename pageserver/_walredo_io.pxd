from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

# The layout of the shared memory is that of pgxn/walredo/walredo.h.

cdef enum:
    PAGE_BYTES = 8192
    SLOTS = 64  # CHANNEL_SLOTS
    ITEMS_BYTES = (4 << 20) - PAGE_BYTES - 128

cdef enum:  # SLOT_xxx; the last two are set only here, when the process has gone
    SUBMITTED = 1
    TAKEN = 2
    ANSWERED = 3
    WITHDRAWN = 4
    LOST = 5
    BLAMED = 6

cdef enum:  # RESPONSE_xxx
    PAGE = 0
    REJECTED = 1
    FAILED = 2

cdef struct RequestHeader:
    uint64_t length
    uint64_t after_lsn
    uint8_t type
    uint8_t forknum_or_rmid
    uint8_t has_base
    uint8_t more
    uint32_t spcnode
    uint32_t dbnode
    uint32_t relnode
    uint32_t blkno
    uint32_t nrecords

cdef struct Slot:
    uint32_t state
    uint32_t status
    uint32_t length
    uint32_t unused[13]
    RequestHeader request
    uint64_t unused2[3]
    char payload[PAGE_BYTES]
    char items[ITEMS_BYTES]

cdef struct Memory:
    uint32_t submitted
    uint8_t line[SLOTS]
    uint32_t client_cpu
    uint8_t unused[56]
    uint32_t sleeping
    uint32_t unused2[15]
    uint32_t served
    uint32_t cpu
    uint32_t unused3[974]
    Slot slots[SLOTS]

cdef int add_page(Slot *slot, Py_ssize_t *used, bytes page) except -1
cdef int add_record(Slot *slot, Py_ssize_t *used, uint64_t end_lsn, bytes record) except -1

cdef class RedoChannel:
    cdef object file
    cdef object mapping
    cdef Memory *memory
    cdef uint8_t unused[SLOTS]
    cdef int nunused
    cdef list abandoned
    cdef uint32_t submitted
    cdef uint32_t position[SLOTS]
    cdef bint in_line[SLOTS]
    cdef bint failed
    cdef uint32_t stalled_at
    cdef bint stalled
    cdef int watches_to_skip
    cdef int watches_missed
    cdef readonly long load
    cdef readonly bint gone
    cdef readonly bint timed_out

    cdef int take_slot(self)
    cdef void give_back(self, int number)
    cdef void submit(self, int number)
    cdef void ring(self) noexcept nogil
    cdef bint spin(self, int number, int64_t duration_ns) noexcept nogil
    cdef bint watch(self, int number) noexcept
    cdef int wait(self, int number, long timeout_ms) noexcept nogil
    cdef int state(self, int number) noexcept
    cdef int first_unserved(self) noexcept
    cdef tuple answer(self, int number)
    cdef bint withdraw(self, int number) noexcept
    cdef void abandon(self, int number)
    cdef uint32_t served(self) noexcept
    cdef void note_stall(self) noexcept
    cdef bint is_stalled(self) noexcept
