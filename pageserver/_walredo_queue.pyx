"""Requests of many threads, spread over redo processes.

Every caller puts its own requests into the line of a process and takes the answers out of it; the
process wakes exactly the thread that waits for the answer. So requests of different callers follow
each other without a pause, and no thread works for another one.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from pageserver._walredo_io cimport (
    ANSWERED,
    BLAMED,
    LOST,
    PAGE,
    RedoChannel,
    RequestHeader,
    SLOTS,
    SUBMITTED,
    Slot,
    add_page,
    add_record,
)

import threading
import time
from collections import deque

cdef enum:
    REQUEST_APPLY = 65  # 'A'
    REQUEST_MASK = 77  # 'M'
    # Of a chain, so much is sent at a time: other callers come in between.
    STEP_BYTES = 128 << 10
    # What one caller has in the lines at a time, so that others need not wait long.
    WINDOW = 16
    WINDOW_BYTES = 256 << 10
    # Requests of one call beyond which it is made in turns with other such calls: the lines stay
    # short for those who want few pages, and the memory of the slots in use stays in the caches.
    FEW = 4
    # Requests after which a turn ends if others wait for one.
    TURN = 64
    # Load of a process (records, with so many added for a page) up to which it gets more, even if
    # another one has nothing to do: a request costs less if nobody has to be woken for it.
    PAGE_LOAD = 8
    BUSY_LOAD = 64
    # Time without progress after which requests are taken to another process.
    PATIENCE_MS = 10

@cython.final
cdef class MaskRequest:
    """A page (8192 bytes) to mask with a resource manager's own rm_mask."""

    cdef object rmid
    cdef object blkno
    cdef bytes page

    def __init__(self, rmid, blkno, bytes page not None):
        self.rmid = rmid
        self.blkno = blkno
        self.page = page

    def describe(self):
        """The request in an error message."""
        return f"page {self.blkno}, masked by resource manager {self.rmid},"


@cython.final
@cython.freelist(64)
cdef class Call:
    """A request on its way."""

    cdef object request
    cdef Py_ssize_t index
    cdef object records  # list or tuple; None for a MaskRequest
    cdef bytes page  # as of records[:done]
    cdef Py_ssize_t done
    cdef Py_ssize_t sent
    cdef uint64_t after_lsn
    cdef RedoChannel channel  # while it is in a line
    cdef int slot
    cdef long load
    cdef Py_ssize_t size
    cdef int killed


@cython.final
cdef class Waiter:
    """A thread that waits for a slot or for its turn; is given it, or an error, exactly once."""

    cdef object given
    cdef RedoChannel channel
    cdef int slot
    cdef object error

    def __cinit__(self):
        self.given = threading.Lock()
        self.given.acquire()


cdef int _encode(Call call, Slot *slot) except -1:
    """Write the next step of a request. Raises ValueError, TypeError or OverflowError."""
    cdef MaskRequest mask
    cdef Py_ssize_t used = 0
    cdef RequestHeader *header = &slot.request
    memset(header, 0, sizeof(header[0]))
    if isinstance(call.request, MaskRequest):
        mask = call.request
        header.type = REQUEST_MASK
        header.forknum_or_rmid = mask.rmid
        header.blkno = mask.blkno
        add_page(slot, &used, mask.page)
    else:
        request = call.request
        if call.records is None:
            _open(call)
        header.type = REQUEST_APPLY
        header.spcnode = request.spcnode
        header.dbnode = request.dbnode
        header.relnode = request.relnode
        header.forknum_or_rmid = request.forknum
        header.blkno = request.blkno
        if call.page is not None:
            add_page(slot, &used, call.page)
        _add_records(call, slot, &used)
    header.length = used
    call.size = used
    call.load = PAGE_LOAD + header.nrecords
    return 0


cdef int _open(Call call) except -1:
    """Before the first step."""
    records = call.request.records
    call.records = records if isinstance(records, (list, tuple)) else list(records)
    call.page = call.request.base
    return 0


cdef int _add_records(Call call, Slot *slot, Py_ssize_t *used) except -1:
    cdef RequestHeader *header = &slot.request
    cdef uint64_t end_lsn = call.after_lsn
    cdef Py_ssize_t i = call.done
    header.after_lsn = end_lsn
    while i < len(call.records) and used[0] < STEP_BYTES:
        lsn, record = call.records[i]
        end_lsn = lsn
        add_record(slot, used, end_lsn, record)
        i += 1
    header.nrecords = i - call.done
    header.more = i < len(call.records)
    call.sent = i
    return 0


cdef class RedoQueue:
    """The lines of a pool's processes, as one.

    ``want_process()`` is called when one more process would be of use, and ``may_start`` allows it;
    ``explain(request, reason)`` makes the exception that takes the place of a page;
    ``timeout`` is only mentioned in it; ``waited(seconds)`` is called when a request had to wait
    until a process could take it, and only then. Thread safe.
    """

    cdef public bint may_start
    cdef object want_process
    cdef object explain
    cdef object timeout
    cdef list channels
    cdef object waited
    cdef object waiters  # deque; not empty only if no slot is unused
    cdef object turn_waiters  # deque; not empty only if all turns are taken
    cdef Py_ssize_t turns  # taken
    cdef object closed  # makes the exception to raise

    def __init__(self, want_process, explain, double timeout, waited):
        self.may_start = True
        self.want_process = want_process
        self.explain = explain
        self.timeout = timeout
        self.waited = waited
        self.channels = []
        self.waiters = deque()
        self.turn_waiters = deque()
        self.turns = 0
        self.closed = None

    # Processes

    def add(self, RedoChannel channel not None):
        """A process that takes requests."""
        self.channels.append(channel)
        self._give_slots()
        self._give_turns()

    def remove(self, RedoChannel channel not None):
        """A process that takes no more requests."""
        self.channels.remove(channel)

    @property
    def in_flight(self) -> int:
        """How many requests are in the lines."""
        cdef RedoChannel channel
        cdef int count = 0
        for channel in self.channels:
            count += SLOTS - channel.nunused
        return count

    @property
    def waiting(self) -> int:
        """How many callers wait for a place in a line."""
        return len(self.waiters)

    @property
    def waiting_for_turn(self) -> int:
        """How many callers wait until it is their turn to put many requests into the lines."""
        return len(self.turn_waiters)

    def fail_waiting(self, error):
        """Raise the error in all callers that wait for a place in a line or for their turn."""
        cdef Waiter waiter
        for waiters in (self.waiters, self.turn_waiters):
            while waiters:
                waiter = waiters.popleft()
                waiter.error = error
                waiter.given.release()

    def close(self, make_error):
        """From now on raise an error in all calls that need a process."""
        self.closed = make_error
        self.fail_waiting(make_error())

    # Requests

    def serve(self, requests):
        """What became of the requests, in their order: bytes or an exception from explain().

        Raises what close() or fail_waiting() was told to raise, and what a signal handler raises.
        """
        cdef Py_ssize_t done = 0, count = len(requests)
        cdef list outcomes = [None] * count
        if count <= FEW:
            self._serve_from(requests, 0, outcomes)
            return outcomes
        while done < count:
            self._take_turn()
            try:
                done = self._serve_from(requests, done, outcomes)
            finally:
                self._end_turn()
        return outcomes

    cdef Py_ssize_t _serve_from(self, requests, Py_ssize_t start, list outcomes) except -1:
        """Serve requests until the turn ends; returns the index of the first that is left."""
        cdef Py_ssize_t next_index = start, count = len(requests)
        cdef list flying = []
        cdef list again = []
        cdef Py_ssize_t size = 0
        cdef Call call
        if self.closed is not None:
            raise self.closed()
        try:
            while True:
                while len(flying) < WINDOW and size < WINDOW_BYTES:
                    if next_index - start >= TURN and self.turn_waiters:
                        count = next_index
                    if again:
                        call = again.pop(0)
                    elif next_index < count:
                        call = _new_call(requests[next_index], next_index)
                        next_index += 1
                    else:
                        break
                    if not self._place(call, not flying, outcomes):
                        again.insert(0, call)
                        break
                    if call.channel is not None:
                        flying.append(call)
                        size += call.size
                if not flying:
                    return next_index
                self._wait(flying, next_index < count or again)
                size = self._collect(flying, again, outcomes)
        except BaseException:
            for call in flying:
                self._abandon(call)
            raise

    # Turns

    cdef int _take_turn(self) except -1:
        """Wait until this thread may have many requests in the lines."""
        cdef Waiter waiter
        if not self.turn_waiters and self._turn_is_free():
            self.turns += 1
            return 0
        if self.closed is not None:
            raise self.closed()
        waiter = Waiter()
        started = time.monotonic()
        self.turn_waiters.append(waiter)
        try:
            while not waiter.given.acquire(timeout=1.0):
                PyErr_CheckSignals()  # of one that came just before the wait
            if waiter.error is not None:
                raise waiter.error
            self.waited(time.monotonic() - started)
        except BaseException:
            if waiter in self.turn_waiters:
                self.turn_waiters.remove(waiter)
            elif waiter.error is None:
                self._end_turn()
            raise
        return 0

    cdef int _end_turn(self) except -1:
        self.turns -= 1
        return self._give_turns()

    cdef int _give_turns(self) except -1:
        """Give free turns to the threads that wait longest."""
        cdef Waiter waiter
        while self.turn_waiters and self._turn_is_free():
            waiter = self.turn_waiters.popleft()
            self.turns += 1
            waiter.given.release()
        return 0

    cdef bint _turn_is_free(self) noexcept:
        """One more than processes: they have work while a turn passes on."""
        return self.turns <= len(self.channels)

    # Slots

    cdef bint _place(self, Call call, bint wait, list outcomes) except -1:
        """Put a request into a line; false if there is no room and we shall not wait for it."""
        cdef RedoChannel channel = None
        cdef int slot = -1
        cdef Waiter waiter
        if not self.waiters:
            channel = self._choose()
            if channel is not None:
                slot = channel.take_slot()
        if slot < 0:
            if not wait:
                return False
            waiter = self._wait_for_slot()
            channel, slot = waiter.channel, waiter.slot
        self._submit(call, channel, slot, outcomes)
        return True

    cdef int _submit(self, Call call, RedoChannel channel, int slot, list outcomes) except -1:
        """Send the next step of a request; one that is malformed has its outcome."""
        try:
            _encode(call, &channel.memory.slots[slot])
        except BaseException as e:
            self._release(channel, slot)
            if not isinstance(e, ValueError | TypeError | OverflowError):
                raise
            outcomes[call.index] = self.explain(call.request, f": {e}")
            return 0
        call.channel = channel
        call.slot = slot
        channel.load += call.load
        channel.submit(slot)
        return 0

    cdef RedoChannel _choose(self):
        """The process to send a request to, or None if all have full lines or none is there."""
        cdef RedoChannel channel, best = None, stalled = None
        for channel in self.channels:
            if channel.nunused == 0 and not channel.abandoned:
                continue
            if channel.stalled and channel.is_stalled():
                stalled = channel
                continue
            if channel.load < BUSY_LOAD:
                return channel
            if best is None or channel.load < best.load:
                best = channel
        if best is None:
            best = stalled
        if best is not None and self.may_start:
            self.want_process()
        return best

    cdef Waiter _wait_for_slot(self):
        cdef Waiter waiter = Waiter()
        if self.closed is not None:
            raise self.closed()
        started = time.monotonic()
        self.waiters.append(waiter)
        try:
            if self.may_start:
                self.want_process()
            # Slots of withdrawn requests get free without anybody noticing.
            while not waiter.given.acquire(timeout=1.0):
                PyErr_CheckSignals()
                self._give_slots()
            if waiter.error is not None:
                raise waiter.error
            self.waited(time.monotonic() - started)
        except BaseException:
            if waiter in self.waiters:
                self.waiters.remove(waiter)
            elif waiter.channel is not None:
                self._release(waiter.channel, waiter.slot)
            raise
        return waiter

    cdef int _give_slots(self) except -1:
        """Give unused slots to the threads that wait longest."""
        cdef RedoChannel channel
        cdef Waiter waiter
        cdef int slot
        for channel in self.channels:
            while self.waiters:
                slot = channel.take_slot()
                if slot < 0:
                    break
                waiter = self.waiters.popleft()
                waiter.channel = channel
                waiter.slot = slot
                waiter.given.release()
        return 0

    cdef int _release(self, RedoChannel channel, int slot) except -1:
        """End the use of a slot; the next caller may wait for it."""
        channel.give_back(slot)
        if self.waiters:
            self._give_slots()
        return 0

    cdef int _leave(self, Call call) except -1:
        """Take a request that is answered or lost out of its line."""
        cdef RedoChannel channel = call.channel
        call.channel = None
        channel.load -= call.load
        return self._release(channel, call.slot)

    cdef int _abandon(self, Call call) except -1:
        """Take a request out of its line, in whatever state it is."""
        cdef RedoChannel channel = call.channel
        if channel is None:
            return 0
        call.channel = None
        channel.load -= call.load
        channel.withdraw(call.slot)
        channel.abandon(call.slot)
        return 0

    cdef int _wait(self, list flying, bint more) except -1:
        """Wait for answers; not for all if more is to be sent."""
        cdef Py_ssize_t count = len(flying)
        cdef Call call = flying[count // 2 if more else count - 1]
        cdef RedoChannel channel = call.channel
        cdef RedoChannel other
        cdef uint32_t served = channel.served()
        cdef bint alone = channel.nunused == SLOTS - 1
        cdef int state
        for other in self.channels:
            if other is not channel:
                other.ring()
                alone = alone and other.nunused == SLOTS
        while True:
            with nogil:
                channel.ring()
                if alone:
                    channel.spin(call.slot)
                state = channel.wait(call.slot, PATIENCE_MS)
            if state > 0:
                return 0
            PyErr_CheckSignals()
            if state < 0:
                continue
            if channel.served() == served:
                channel.note_stall()
                return 0
            served = channel.served()

    cdef Py_ssize_t _collect(self, list flying, list again, list outcomes) except -1:
        """Take the answers that are there; returns the size of the requests still in the lines.

        Adds to `again` what another process has to do.
        """
        cdef Py_ssize_t size = 0
        cdef Call call
        cdef list left = []
        cdef int state
        for call in flying:
            state = call.channel.state(call.slot)
            if state == ANSWERED:
                self._take_answer(call, outcomes)
            elif state in (LOST, BLAMED):
                self._lost(call, state == BLAMED, again, outcomes)
            elif state == SUBMITTED and call.channel.stalled and self._take_back(call):
                again.append(call)
            if call.channel is not None:
                left.append(call)
                size += call.size
        flying[:] = left
        return size

    cdef int _take_answer(self, Call call, list outcomes) except -1:
        cdef RedoChannel channel = call.channel
        status, content = channel.answer(call.slot)
        if status == PAGE and call.records is not None and call.sent < len(call.records):
            call.after_lsn = call.records[call.sent - 1][0]
            call.page = content
            call.done = call.sent
            channel.load -= call.load
            call.channel = None
            self._submit(call, channel, call.slot, outcomes)
            return 0
        self._leave(call)
        outcomes[call.index] = (
            content if status == PAGE else self.explain(call.request, f" failed: {content}")
        )
        return 0

    cdef int _lost(self, Call call, bint blamed, list again, list outcomes) except -1:
        cdef RedoChannel channel = call.channel
        self._leave(call)
        if self.closed is not None:
            raise self.closed()
        call.killed += blamed
        if blamed and channel.timed_out:
            reason = f" timed out after {self.timeout:g} s"
        elif call.killed == 2:
            reason = " failed: the redo process was killed twice while at it"
        else:
            again.append(call)
            return 0
        outcomes[call.index] = self.explain(call.request, reason)
        return 0

    cdef bint _take_back(self, Call call) except -1:
        """Withdraw a request from a process that does not get on, if there is another one."""
        cdef RedoChannel other
        for other in self.channels:
            if other is not call.channel and not other.is_stalled():
                if not call.channel.withdraw(call.slot):
                    return False
                self._abandon(call)
                return True
        if self.may_start:
            self.want_process()
        return False


cdef Call _new_call(request, Py_ssize_t index):
    cdef Call call = Call.__new__(Call)
    call.request = request
    call.index = index
    return call
