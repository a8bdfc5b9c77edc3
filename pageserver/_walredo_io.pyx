"""Memory shared with a redo process; the protocol is described in pgxn/walredo/walredo.h.

The GIL is the lock of a channel: all but `ring`, `spin` and `wait` is done with it held, and nothing that
must be done at once runs Python code in between. The process is not trusted: what it may have
written is copied before it is checked, and what only the client decides is kept out of its reach.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from libc.errno cimport EINTR
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import fcntl
import mmap
import os

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/futex.h>
    #include <sched.h>
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static inline uint32_t load_acquire(const uint32_t *p)
    {
        return __atomic_load_n(p, __ATOMIC_ACQUIRE);
    }

    static inline void store_release(uint32_t *p, uint32_t value)
    {
        __atomic_store_n(p, value, __ATOMIC_RELEASE);
    }

    static inline uint32_t exchange(uint32_t *p, uint32_t value)
    {
        return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
    }

    static inline int compare_exchange(uint32_t *p, uint32_t expected, uint32_t value)
    {
        return __atomic_compare_exchange_n(p, &expected, value, 0,
                                           __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }

    static inline void full_fence(void)
    {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }

    static inline int64_t now_ns(void)
    {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
    }

    static inline void spin_pause(void)
    {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ volatile("yield");
    #endif
    }

    static inline int futex_wait(uint32_t *p, uint32_t value, long timeout_ms)
    {
        struct timespec timeout = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};

        return syscall(SYS_futex, p, FUTEX_WAIT, value, &timeout, NULL, 0) == 0 ? 0 : errno;
    }

    static inline void futex_wake(uint32_t *p)
    {
        syscall(SYS_futex, p, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
    """
    uint32_t load_acquire(const uint32_t *p) noexcept nogil
    void store_release(uint32_t *p, uint32_t value) noexcept nogil
    uint32_t exchange(uint32_t *p, uint32_t value) noexcept nogil
    bint compare_exchange(uint32_t *p, uint32_t expected, uint32_t value) noexcept nogil
    void full_fence() noexcept nogil
    int64_t now_ns() noexcept nogil
    void spin_pause() noexcept nogil
    int sched_getcpu() noexcept nogil
    int futex_wait(uint32_t *p, uint32_t value, long timeout_ms) noexcept nogil
    void futex_wake(uint32_t *p) noexcept nogil
    enum:
        ETIMEDOUT

CHANNEL_SIZE = sizeof(Memory)

cdef enum:
    WAITED_FOR = 0x100  # SLOT_WAITED_FOR
    # Memory of a slot that is kept; beyond that it is given back after use.
    KEPT_ITEMS = 512 << 10
    RECORD_HEADER_BYTES = 24  # SizeOfXLogRecord
    # Twice what a process that runs takes for a request that is near; the GIL is held meanwhile.
    WATCH_NS = 12000
    # At most every 64th request looks out in vain.
    WATCHES_MISSED = 6


cdef struct RecordHeader:
    uint64_t end_lsn
    uint32_t length
    uint32_t unused


cdef int _add(Slot *slot, Py_ssize_t *used, const void *data, size_t size) except -1:
    """Append an item to a request, padded to 8 bytes."""
    cdef size_t padded = (size + 7) & ~(<size_t> 7)
    if padded > <size_t> (ITEMS_BYTES - used[0]):
        raise ValueError(f"a WAL record of {size} bytes is larger than any that changes pages")
    memcpy(slot.items + used[0], data, size)
    memset(slot.items + used[0] + size, 0, padded - size)
    used[0] += padded
    return 0


cdef int add_page(Slot *slot, Py_ssize_t *used, bytes page) except -1:
    """Append the base page. Raises ValueError for a wrong size."""
    if PyBytes_GET_SIZE(page) != PAGE_BYTES:
        raise ValueError(f"a page has {PAGE_BYTES} bytes, not {len(page)}")
    slot.request.has_base = True
    return _add(slot, used, PyBytes_AS_STRING(page), PAGE_BYTES)


cdef int add_record(Slot *slot, Py_ssize_t *used, uint64_t end_lsn, bytes record) except -1:
    """Append a WAL record. Raises ValueError if its own header gives another length."""
    cdef RecordHeader item
    cdef Py_ssize_t size
    if record is None:
        raise TypeError("a WAL record is None")
    size = PyBytes_GET_SIZE(record)
    if size < RECORD_HEADER_BYTES:
        raise ValueError(f"a WAL record of {size} bytes is shorter than its header")
    memcpy(&item.length, PyBytes_AS_STRING(record), sizeof(item.length))
    if item.length != size:
        raise ValueError(f"a WAL record of {item.length} bytes was given as {size} bytes")
    item.end_lsn = end_lsn
    item.unused = 0
    _add(slot, used, &item, sizeof(item))
    return _add(slot, used, PyBytes_AS_STRING(record), size)


@cython.final
cdef class RedoChannel:
    """A line of requests to one redo process, and the slots that hold them.

    Raises OSError if there is no memory for it. The process gets `fileno()` as its standard input;
    after that `close_file()` closes it here.
    """

    def __cinit__(self):
        cdef Py_buffer view
        cdef int i
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self.file = open(os.memfd_create("walredo", flags), "r+b", 0)
        os.ftruncate(self.file.fileno(), sizeof(Memory))
        # The process must not take away the memory under our feet.
        fcntl.fcntl(
            self.file.fileno(),
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        self.mapping = mmap.mmap(self.file.fileno(), sizeof(Memory))
        PyObject_GetBuffer(self.mapping, &view, PyBUF_WRITABLE)
        self.memory = <Memory *> view.buf
        PyBuffer_Release(&view)  # the mapping stays where it is: nobody else has it to close it
        for i in range(SLOTS):
            self.unused[i] = SLOTS - 1 - i
        self.nunused = SLOTS
        self.abandoned = []

    def fileno(self):
        """The memory file."""
        return self.file.fileno()

    def close_file(self):
        """Close the file; the memory stays."""
        self.file.close()

    def oldest(self):
        """Position in the line of the first request that has not been served, or None."""
        cdef uint32_t position
        cdef int number = self.first_unserved()
        if number < 0:
            return None
        return self.position[number]

    def mark_gone(self, timed_out_at=None):
        """Tell all who wait that the process has ended; it must have.

        The first request that it has not served is blamed for that, unless the process itself has
        said which one is. `timed_out_at` is the position of the one that it was killed for.
        """
        cdef int number, first
        self.gone = True
        self.timed_out = timed_out_at is not None
        first = self.first_unserved()
        for number in range(SLOTS):
            if self.in_line[number] and self.state(number) == ANSWERED:
                self.failed = self.failed or self.memory.slots[number].status == FAILED
        if first >= 0 and (self.failed or self.timed_out and self.position[first] != timed_out_at):
            first = -1
        for number in range(SLOTS):
            if self.in_line[number] and self.state(number) != ANSWERED:
                exchange(&self.memory.slots[number].state, BLAMED if number == first else LOST)
                futex_wake(&self.memory.slots[number].state)

    cdef int state(self, int number) noexcept:
        """SUBMITTED to BLAMED."""
        return load_acquire(&self.memory.slots[number].state) & ~(<uint32_t> WAITED_FOR)

    cdef int first_unserved(self) noexcept:
        """Number of the slot, or -1."""
        cdef int number, first = -1
        for number in range(SLOTS):
            if self.in_line[number] and self.state(number) != ANSWERED and (
                first < 0 or <int32_t> (self.position[number] - self.position[first]) < 0
            ):
                first = number
        return first

    cdef int take_slot(self):
        """The number of an unused slot, now the caller's, or -1."""
        cdef int number
        if self.abandoned:
            for number in list(self.abandoned):
                if self.state(number) == ANSWERED:
                    self.abandoned.remove(number)
                    self.give_back(number)
        if self.nunused == 0:
            return -1
        self.nunused -= 1
        return self.unused[self.nunused]

    cdef void give_back(self, int number):
        """End the use of a slot whose request is not in the line (any more)."""
        cdef uint64_t used = self.memory.slots[number].request.length
        if KEPT_ITEMS < used <= ITEMS_BYTES:
            start = <char *> &self.memory.slots[number].items - <char *> self.memory
            start = (start + KEPT_ITEMS) & ~(mmap.PAGESIZE - 1)
            self.mapping.madvise(mmap.MADV_REMOVE, start, used - KEPT_ITEMS)
        self.in_line[number] = False
        self.unused[self.nunused] = number
        self.nunused += 1

    cdef void submit(self, int number):
        """Put a slot that holds a request into the line."""
        cdef Slot *slot = &self.memory.slots[number]
        self.position[number] = self.submitted
        self.in_line[number] = True
        if self.gone:
            slot.state = LOST
            return
        slot.state = SUBMITTED
        self.memory.line[self.submitted % SLOTS] = number
        self.submitted += 1
        self.memory.client_cpu = sched_getcpu()
        store_release(&self.memory.submitted, self.submitted)

    cdef void ring(self) noexcept nogil:
        """Wake the process if it sleeps; after submit()."""
        full_fence()
        if load_acquire(&self.memory.sleeping) and exchange(&self.memory.sleeping, 0):
            futex_wake(&self.memory.sleeping)

    cdef bint spin(self, int number, int64_t duration_ns) noexcept nogil:
        """Look out for an answer for some time; whether it is there.

        That would only keep the process from running if it is on this CPU.
        """
        cdef uint32_t *p = &self.memory.slots[number].state
        cdef int64_t end
        if <int> self.memory.cpu == sched_getcpu():
            return False
        end = now_ns() + duration_ns
        while load_acquire(p) in (SUBMITTED, TAKEN):
            if now_ns() >= end:
                return False
            spin_pause()
        return True

    cdef bint watch(self, int number) noexcept:
        """Look out, with the GIL held, for an answer that is near; whether it is there.

        It comes sooner than the GIL can be handed to another thread and got back: many callers are
        served one after the other without a system call. That needs a process that runs. If it
        does not, for want of a CPU, this is tried ever more rarely. One that sleeps is left to
        ring().
        """
        if load_acquire(&self.memory.sleeping):
            return False
        if self.watches_to_skip > 0:
            self.watches_to_skip -= 1
            return False
        if self.spin(number, WATCH_NS):
            self.watches_missed = 0
            return True
        self.watches_missed = min(self.watches_missed + 1, WATCHES_MISSED)
        self.watches_to_skip = (1 << self.watches_missed) - 1
        return False

    cdef int wait(self, int number, long timeout_ms) noexcept nogil:
        """Wait for ANSWERED, LOST or BLAMED; 0 after the timeout, -1 after a signal."""
        cdef uint32_t *p = &self.memory.slots[number].state
        cdef uint32_t state
        cdef int end
        while True:
            state = load_acquire(p)
            if state & ~(<uint32_t> WAITED_FOR) in (ANSWERED, LOST, BLAMED):
                return state & ~(<uint32_t> WAITED_FOR)
            if not state & WAITED_FOR:
                if not compare_exchange(p, state, state | WAITED_FOR):
                    continue
            end = futex_wait(p, state | WAITED_FOR, timeout_ms)
            if end == ETIMEDOUT:
                return 0
            if end == EINTR:
                return -1

    cdef tuple answer(self, int number):
        """(PAGE, 8192 bytes), or (REJECTED or FAILED, text) of a slot that is ANSWERED."""
        cdef Slot *slot = &self.memory.slots[number]
        cdef uint32_t status = load_acquire(&slot.status)
        cdef uint32_t length = load_acquire(&slot.length)
        if status == FAILED:
            self.failed = True
        if status == PAGE:
            if length == PAGE_BYTES:
                return PAGE, PyBytes_FromStringAndSize(slot.payload, PAGE_BYTES)
            return REJECTED, "the redo process broke the protocol"
        text = PyBytes_FromStringAndSize(slot.payload, min(length, <uint32_t> PAGE_BYTES))
        return status, text.decode(errors="replace")

    cdef bint withdraw(self, int number) noexcept:
        """Whether a submitted request could be taken back; then abandon() the slot."""
        cdef uint32_t *p = &self.memory.slots[number].state
        cdef uint32_t state = load_acquire(p)
        while state & ~(<uint32_t> WAITED_FOR) == SUBMITTED:
            if compare_exchange(p, state, WITHDRAWN):
                return True
            state = load_acquire(p)
        return False

    cdef void abandon(self, int number):
        """End the use of a slot as soon as the process is done with it."""
        self.abandoned.append(number)

    cdef uint32_t served(self) noexcept:
        """How many requests have been served, by the account of the process."""
        return load_acquire(&self.memory.served)

    cdef void note_stall(self) noexcept:
        """Remember that the process did not get on for some time."""
        self.stalled = True
        self.stalled_at = self.served()

    cdef bint is_stalled(self) noexcept:
        """Whether the process has not got on since note_stall()."""
        if self.stalled and self.served() != self.stalled_at:
            self.stalled = False
        return self.stalled
