"""The native part of WAL ingestion: records to values in the open layer, without the GIL.

`IngestLoop.run` decodes and applies records until it needs Python: for more WAL, for the size of a
relation it has not met, or for a record whose effects are handled there. Each record is worked on
in three steps, so that one that is refused leaves nothing behind:

classify    what kind it is and which special effects it has; its lengths are checked
resolve     the sizes of everything it touches; stops here while one is unknown
apply       values into the layer, sizes into the table

Block references become one copy of the record and one entry per block. Formats are those of
PostgreSQL 15: access/heapam_xlog.h, access/xact.h, access/multixact.h, catalog/storage_xlog.h.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pageserver.layered_repository.inmemory_layer cimport PUT_OK, InMemoryLayer
from pageserver.layered_repository.key cimport FLAGS_IMAGE, Key, key_parse
from pageserver.native_keys cimport (
    PAGES_PER_SEGMENT, SLRU_CLOG, SLRU_MEMBERS, SLRU_OFFSETS, block_key, make_key, rel_size_key,
    slru_key)
from pageserver.record_effects cimport BAD_BLKNO, DUPLICATE_BLOCK, Effects, classify
from pageserver.size_table cimport (
    ABSENT, KIND_DATABASE, KIND_RELATION, KIND_SLRU, SizeEntry, SizeTable)
from postgres_ffi.wal_decoder cimport WAL_NEED_INPUT, WAL_RECORD, WalDecoder
from postgres_ffi.wal_record cimport BlockRef, Record, restore_image_raw
from zenith_utils.unaligned cimport get16, get32, put32

from pageserver.record_effects import refusal_text
from postgres_ffi.decoded_record import DecodedRecord

cdef enum:
    RM_XLOG = 0
    XLOG_FPI_FOR_HINT = 0xA0
    VM_FORK = 2
    FIRST_NORMAL_XID = 3
    FIRST_MULTIXACT = 1
    BLCKSZ = 8192
    PD_UPPER_OFFSET = 14
    MAX_BLOCKS_PER_RECORD = 33
    HEAPBLOCKS_PER_VM_PAGE = 32672
    CLOG_XACTS_PER_PAGE = 32768
    OFFSETS_PER_PAGE = 2048
    MEMBERS_PER_PAGE = 1636
    CLOCK_TOLERANCE = 60000000   # microseconds, see keys.py

cdef enum:                       # flags of values, see values.py
    FLAGS_PG_RECORD = 1 << 1
    FLAGS_CLEAR_VM = 2 << 1
    FLAGS_MULTIXACT_OFFSET = 5 << 1
    FLAGS_MULTIXACT_MEMBERS = 6 << 1
    FLAGS_SET_VM = 8 << 1

cdef enum:                       # results of run()
    _NEED_INPUT = 0
    _NEED_SIZE = 1
    _NEED_DATABASE = 2
    _NEED_HANDLER = 3
    _RECORD_DONE = 4
    _BAD_WAL = -1
    _BAD_RECORD = -2
    _PUT_FAILED = -3

NEED_INPUT = _NEED_INPUT
NEED_SIZE = _NEED_SIZE
NEED_DATABASE = _NEED_DATABASE
NEED_HANDLER = _NEED_HANDLER
RECORD_DONE = _RECORD_DONE
BAD_WAL = _BAD_WAL
BAD_RECORD = _BAD_RECORD


cdef inline bint precedes(uint32_t a, uint32_t b) noexcept nogil:
    """Whether counter `a` is before `b`, modulo 2^32 (TransactionIdPrecedes)."""
    return <int32_t> (a - b) < 0


cdef class IngestLoop:
    """Applies records to the open layer; one per timeline, used by one thread at a time.

    `decoder` stands at the first record to ingest. `next_xid` is the FullTransactionId,
    `next_multi` and `next_multi_offset` are the multixact counters before that record, `commit_time`
    and `clock_sets` are what keys.CommitTime says.
    """

    cdef readonly WalDecoder decoder
    cdef readonly SizeTable sizes
    cdef InMemoryLayer layer

    # counters of the cluster, kept here because nearly every transaction moves them
    cdef readonly uint64_t next_xid
    cdef readonly uint32_t next_multi, next_multi_offset
    cdef bint counters_changed
    cdef Key counters_key

    # when transactions ended, see keys.CommitTime
    cdef readonly int64_t commit_time
    cdef readonly uint32_t clock_sets
    cdef Key commit_time_key

    # the record in hand
    cdef Record record
    cdef bint pending            # `record` is not completely applied
    cdef readonly bint dirty     # ... but some of its values are in the layer
    cdef public bint stepwise    # stop after each record

    cdef Effects effects         # what classify() found out about it

    # what _resolve found out
    cdef int64_t entry[MAX_BLOCKS_PER_RECORD]       # of each reference, -1: without effect
    cdef uint32_t old_nblocks[MAX_BLOCKS_PER_RECORD]
    cdef int64_t vm_entry
    cdef int64_t fork_entry

    # why run() stopped
    cdef uint8_t need_kind, need_d
    cdef uint32_t need_a, need_b, need_c
    cdef int refusal, put_result
    cdef Key put_key

    # what was completed
    cdef readonly uint64_t done_lsn, done_start, records
    cdef int64_t block_delta

    cdef uint8_t scratch[16384]

    def __cinit__(self, WalDecoder decoder not None, SizeTable sizes not None,
                  bytes counters_key not None, uint64_t next_xid, uint32_t next_multi,
                  uint32_t next_multi_offset, bytes commit_time_key not None,
                  uint32_t clock_sets, int64_t commit_time):
        self.decoder = decoder
        self.sizes = sizes
        key_parse(&self.counters_key, counters_key)
        self.next_xid = next_xid
        self.next_multi = next_multi
        self.next_multi_offset = next_multi_offset
        key_parse(&self.commit_time_key, commit_time_key)
        self.clock_sets = clock_sets
        self.commit_time = commit_time

    # ---- Python's side

    def use_layer(self, InMemoryLayer layer not None):
        """Where values go from now on: the open layer, which changes when it is published."""
        self.layer = layer

    def run(self, const uint8_t[::1] data=None):
        """Ingest `data`, or go on with the rest of it.

        RECORD_DONE comes after each record if `stepwise` is set, but for those Python handles.
        `data` must stay valid until NEED_INPUT or an error is returned. Returns one of the status
        constants; whatever it asks for must be done before the next call, which goes on there.
        """
        cdef int status
        if data is not None and data.shape[0]:
            self.decoder.borrow_raw(&data[0], data.shape[0])
        with nogil:
            status = self._run()
        if status == _PUT_FAILED:
            self._raise_put_error()
        return status

    def raise_bad_wal(self):
        """Raise the WalDecodeError behind BAD_WAL."""
        self.decoder.raise_error()

    def bad_record_reason(self):
        """What is wrong with the record in hand, after BAD_RECORD."""
        return refusal_text(self.refusal)

    def needed(self):
        """(kind, a, b, c, d): the entry of the size table that run() asked for."""
        return self.need_kind, self.need_a, self.need_b, self.need_c, self.need_d

    def current_record(self):
        """The record in hand as a DecodedRecord without blocks: those Python handles have none."""
        cdef Record *r = &self.record
        return DecodedRecord(
            start_lsn=r.start_lsn, end_lsn=r.end_lsn, prev=r.prev, xid=r.xid,
            toplevel_xid=r.toplevel_xid, rmid=r.rmid, info=r.info, origin=r.origin, blocks=(),
            main_data=(<const char *> r.main_data)[:r.main_len],
            raw=(<const char *> r.raw)[:r.tot_len])

    def put(self, bytes key not None, uint8_t flags, const uint8_t[::1] data not None):
        """Add a value of the record in hand."""
        cdef Key parsed
        cdef uint32_t size = <uint32_t> data.shape[0]
        key_parse(&parsed, key)
        if self._put(&parsed, flags, &data[0] if size else NULL, size):
            self._raise_put_error()

    def delete_range(self, bytes start not None, bytes end not None):
        """No key in [start, end) exists at the end of the record in hand, which puts none there."""
        self.dirty = True
        self.layer.delete_range(start, end, self.record.end_lsn)

    def see_xid(self, uint32_t xid):
        """Raise next_xid above `xid`."""
        self._see_xid(xid)

    def see_multi(self, uint32_t multi, uint32_t offset):
        """Raise next_multi to `multi` and next_multi_offset to `offset`."""
        self._see_multi(multi, offset)

    def set_counters(self, uint64_t next_xid, uint32_t next_multi, uint32_t next_multi_offset):
        """What a shutdown checkpoint says."""
        if (next_xid, next_multi, next_multi_offset) != (
                self.next_xid, self.next_multi, self.next_multi_offset):
            self.next_xid = next_xid
            self.next_multi = next_multi
            self.next_multi_offset = next_multi_offset
            self.counters_changed = True

    def finish_handled(self):
        """Complete the record in hand after Python has put its values."""
        self._see_xid(self.record.xid)
        if self._apply_counters() or self._apply_commit_time():
            self._raise_put_error()
        self._finish()

    cdef int _raise_put_error(self) except -1:
        return self.layer.raise_put_error(self.put_result, &self.put_key, self.record.end_lsn)

    def add_blocks(self, int64_t delta):
        """Count blocks that Python added to (or took from) relations."""
        self.block_delta += delta

    def take_block_delta(self):
        """By how many blocks relations have grown since the last call."""
        cdef int64_t delta = self.block_delta
        self.block_delta = 0
        return delta

    # ---- the loop

    cdef int _run(self) noexcept nogil:
        cdef int rc, refusal
        while True:
            if not self.pending:
                rc = self.decoder.next_raw(&self.record)
                if rc == WAL_NEED_INPUT:
                    return _NEED_INPUT
                if rc != WAL_RECORD:
                    return _BAD_WAL
                self.pending = True
            refusal = classify(&self.record, &self.effects)
            if refusal:
                return self._bad(refusal)
            rc = self._resolve()
            if rc == 0:
                if self.effects.to_handler:
                    return _NEED_HANDLER
                rc = self._apply()
            if rc:
                return rc
            self._finish()
            if self.stepwise:
                return _RECORD_DONE

    cdef inline void _finish(self) noexcept nogil:
        self.done_lsn = self.record.end_lsn
        self.done_start = self.record.start_lsn
        self.records += 1
        self.pending = False
        self.dirty = False

    cdef int _bad(self, int refusal) noexcept nogil:
        self.refusal = refusal
        return _BAD_RECORD

    cdef int _need(self, int status, uint8_t kind, uint32_t a, uint32_t b, uint32_t c,
                   uint8_t d) noexcept nogil:
        self.need_kind = kind
        self.need_a = a
        self.need_b = b
        self.need_c = c
        self.need_d = d
        return status

    # ---- resolve: 0 or a status

    cdef int _resolve(self) noexcept nogil:
        cdef int rc
        if self.record.nblocks:
            rc = self._resolve_blocks()
            if rc == 0 and self.effects.n_clears:
                rc = self._resolve_clears()
            return rc
        if self.effects.n_xids:
            return self._resolve_clog()
        if self.effects.creates_fork:
            self.fork_entry = self._resolve_fork(&self.effects.fork)
            return 0 if self.fork_entry >= 0 else <int> -self.fork_entry
        if self.effects.creates_multixact:
            return self._resolve_multixact()
        return 0

    cdef int _resolve_blocks(self) noexcept nogil:
        cdef int i, j, n = self.record.nblocks
        cdef const BlockRef *b
        cdef const BlockRef *before
        cdef uint8_t op = self.record.info & 0xF0
        cdef bint hint = self.record.rmid == RM_XLOG and op == XLOG_FPI_FOR_HINT
        for i in range(n):
            b = &self.record.blocks[i]
            if b.blkno >= 0xFFFFFFFEU or b.relnode == 0:
                return self._bad(BAD_BLKNO)
            if hint and not b.has_image:        # full_page_writes was off: nothing to redo
                self.entry[i] = -1
                continue
            before = &self.record.blocks[i - 1] if i else NULL
            if before != NULL and self.entry[i - 1] >= 0 and before.relnode == b.relnode \
                    and before.forknum == b.forknum and before.dbnode == b.dbnode \
                    and before.spcnode == b.spcnode:
                self.entry[i] = self.entry[i - 1]
            else:
                self.entry[i] = self._resolve_fork(b)
                if self.entry[i] < 0:
                    return <int> -self.entry[i]
            for j in range(i):
                if self.entry[j] == self.entry[i] and self.record.blocks[j].blkno == b.blkno:
                    return self._bad(DUPLICATE_BLOCK)
        return 0

    cdef int64_t _resolve_fork(self, const BlockRef *block) noexcept nogil:
        """Index of a fork's entry, or minus the status: its database is new, its size unknown."""
        cdef int64_t at = self.sizes.find(KIND_RELATION, block.spcnode, block.dbnode, block.relnode,
                                          block.forknum)
        cdef int64_t database
        if at < 0:
            return -self._need(_NEED_SIZE, KIND_RELATION, block.spcnode, block.dbnode,
                               block.relnode, block.forknum)
        if self.sizes.entries[at].nblocks == ABSENT:
            database = self.sizes.find(KIND_DATABASE, block.spcnode, block.dbnode, 0, 0)
            if database < 0 or self.sizes.entries[database].nblocks == ABSENT:
                return -self._need(_NEED_DATABASE, KIND_DATABASE, block.spcnode, block.dbnode, 0, 0)
        return at

    cdef int _resolve_clears(self) noexcept nogil:
        cdef const BlockRef *b = &self.record.blocks[0]
        self.vm_entry = self.sizes.find(KIND_RELATION, b.spcnode, b.dbnode, b.relnode, VM_FORK)
        if self.vm_entry < 0:
            return self._need(_NEED_SIZE, KIND_RELATION, b.spcnode, b.dbnode, b.relnode, VM_FORK)
        return 0

    cdef int _resolve_clog(self) noexcept nogil:
        cdef int i, rc
        cdef uint32_t page, last_page = 0xFFFFFFFFU
        for i in range(self.effects.n_xids):
            page = self.effects.xids[i] // CLOG_XACTS_PER_PAGE
            if page != last_page:
                rc = self._resolve_slru_page(SLRU_CLOG, page)
                if rc:
                    return rc
                last_page = page
        return 0

    cdef int _resolve_multixact(self) noexcept nogil:
        cdef const uint8_t *p = self.record.main_data
        cdef uint32_t multi = get32(p), offset = get32(p + 4), n = get32(p + 8), i = 0, take
        cdef int rc = self._resolve_slru_page(SLRU_OFFSETS, multi // OFFSETS_PER_PAGE)
        if rc == 0:
            multi += 1
            if multi < FIRST_MULTIXACT:
                multi = FIRST_MULTIXACT
            rc = self._resolve_slru_page(SLRU_OFFSETS, multi // OFFSETS_PER_PAGE)
        while rc == 0 and i < n:
            rc = self._resolve_slru_page(SLRU_MEMBERS, (offset + i) // MEMBERS_PER_PAGE)
            take = members_on_page(offset + i, n - i)
            i += take
        return rc

    cdef int _resolve_slru_page(self, uint8_t kind, uint32_t page) noexcept nogil:
        """A page that does not exist yet is Python's to create."""
        cdef uint32_t segno = page // PAGES_PER_SEGMENT
        cdef int64_t at = self.sizes.find(KIND_SLRU, kind, 1, segno, 0)
        cdef uint32_t nblocks
        if at < 0:
            return self._need(_NEED_SIZE, KIND_SLRU, kind, 1, segno, 0)
        nblocks = self.sizes.entries[at].nblocks
        if nblocks == ABSENT or page % PAGES_PER_SEGMENT >= nblocks:
            self.effects.to_handler = True
        return 0

    # ---- apply: 0, or _PUT_FAILED

    cdef int _apply(self) noexcept nogil:
        cdef int i, rc = 0
        self._see_xid(self.record.xid)
        if self.record.nblocks:
            if self.effects.n_clears:
                rc = self._apply_clears()
            if rc == 0:
                rc = self._apply_sizes()
            if rc == 0:
                rc = self._apply_blocks()
        elif self.effects.n_xids:
            for i in range(1, self.effects.n_xids):
                self._see_xid(self.effects.xids[i])
            rc = self._apply_clog()
        elif self.effects.creates_fork:
            if self.sizes.entries[self.fork_entry].nblocks == ABSENT:
                self.sizes.entries[self.fork_entry].nblocks = 0
                rc = self._put_size(self.fork_entry)
        elif self.effects.creates_multixact:
            rc = self._apply_multixact()
        if rc == 0:
            rc = self._apply_counters()
        if rc == 0:
            rc = self._apply_commit_time()
        return rc

    cdef int _apply_clears(self) noexcept nogil:
        """One value for each map page: for both blocks if they share it."""
        cdef const BlockRef *b = &self.record.blocks[0]
        cdef uint32_t nblocks = self.sizes.entries[self.vm_entry].nblocks
        cdef uint32_t map_block, size
        cdef int i, rc
        cdef Key key
        if nblocks == ABSENT:
            return 0
        for i in range(self.effects.n_clears):
            map_block = self.effects.clear_block[i] // HEAPBLOCKS_PER_VM_PAGE
            if map_block >= nblocks or (
                    i == 1 and map_block == self.effects.clear_block[0] // HEAPBLOCKS_PER_VM_PAGE):
                continue
            self.scratch[0] = self.effects.clear_bits
            put32(self.scratch + 1, self.effects.clear_block[i])
            size = 5
            if i == 0 and self.effects.n_clears == 2 \
                    and map_block == self.effects.clear_block[1] // HEAPBLOCKS_PER_VM_PAGE:
                put32(self.scratch + 5, self.effects.clear_block[1])
                size = 9
            key = make_key(KIND_RELATION, b.spcnode, b.dbnode, b.relnode, VM_FORK, map_block)
            rc = self._put(&key, FLAGS_CLEAR_VM, self.scratch, size)
            if rc:
                return rc
        return 0

    cdef int _apply_sizes(self) noexcept nogil:
        """Extend each fork the record refers to, once, to its highest block."""
        cdef int i, j, n = self.record.nblocks, rc
        cdef uint32_t old, new
        cdef bint first
        cdef SizeEntry *e
        for i in range(n):
            if self.entry[i] < 0:
                continue
            first = True
            for j in range(i):
                if self.entry[j] == self.entry[i]:
                    self.old_nblocks[i] = self.old_nblocks[j]
                    first = False
                    break
            if not first:
                continue
            e = &self.sizes.entries[self.entry[i]]
            old = 0 if e.nblocks == ABSENT else e.nblocks
            new = old
            for j in range(i, n):
                if self.entry[j] == self.entry[i] and self.record.blocks[j].blkno >= new:
                    new = self.record.blocks[j].blkno + 1
            self.old_nblocks[i] = old
            if new == old:
                continue
            rc = self._fill_gap(self.entry[i], old, new)
            if rc:
                return rc
            self.block_delta += new - old
            e.nblocks = new
            rc = self._put_size(self.entry[i])
            if rc:
                return rc
        return 0

    cdef int _fill_gap(self, int64_t entry, uint32_t start, uint32_t end) noexcept nogil:
        """Zero pages for new blocks the record skips: older values of these keys may exist."""
        cdef SizeEntry *e = &self.sizes.entries[entry]
        cdef uint32_t blkno, named = 0
        cdef int j, rc
        cdef bint is_named
        cdef int64_t position = -1
        cdef Key key
        for j in range(self.record.nblocks):
            if self.entry[j] == entry and self.record.blocks[j].blkno >= start:
                named += 1
        if named == end - start:
            return 0
        position = self.layer.append_value(NULL, 0)
        for blkno in range(start, end):
            is_named = False
            for j in range(self.record.nblocks):
                if self.entry[j] == entry and self.record.blocks[j].blkno == blkno:
                    is_named = True
                    break
            if is_named:
                continue
            key = make_key(KIND_RELATION, e.a, e.b, e.c, e.d, blkno)
            rc = self._put_ref(&key, FLAGS_IMAGE, position, 0)
            if rc:
                return rc
        return 0

    cdef int _apply_blocks(self) noexcept nogil:
        """One copy of the record, one entry for each block; a plain image of a page as an image."""
        cdef int i, rc, n = self.record.nblocks
        cdef int64_t position = -1
        cdef const BlockRef *b
        # what lies beyond the end of the fork starts from zeros, whatever the key held before
        cdef bint will_init
        cdef bint images = self.record.rmid == RM_XLOG
        cdef Key key
        for i in range(n):
            if self.entry[i] < 0:
                continue
            b = &self.record.blocks[i]
            if images and not b.compressed:
                rc = self._apply_image(b)
                if rc:
                    return rc
                continue
            will_init = b.will_init or b.apply_image or b.blkno >= self.old_nblocks[i]
            key = block_key(b)
            if i == 0 and self.effects.set_bits and not b.apply_image:
                rc = self._apply_visible(&key, will_init)
                if rc:
                    return rc
                continue
            if position < 0:
                position = self.layer.append_value(self.record.raw, self.record.tot_len)
            rc = self._put_ref(&key, FLAGS_PG_RECORD | will_init, position, self.record.tot_len)
            if rc:
                return rc
        return 0

    cdef int _apply_visible(self, const Key *key, bint will_init) noexcept nogil:
        """Bits set in a map page, as a value of a few bytes that is applied without redo."""
        self.scratch[0] = self.effects.set_bits
        put32(self.scratch + 1, self.record.blocks[1].blkno)
        return self._put(key, FLAGS_SET_VM | will_init, self.scratch, 5)

    cdef int _apply_image(self, const BlockRef *block) noexcept nogil:
        """The page with its hole filled; like redo, a page of zeros gets no LSN."""
        cdef Key key = block_key(block)
        cdef uint64_t lsn = self.record.end_lsn
        restore_image_raw(block, self.scratch)
        if get16(self.scratch + PD_UPPER_OFFSET):
            put32(self.scratch, <uint32_t> (lsn >> 32))
            put32(self.scratch + 4, <uint32_t> lsn)
        return self._put(&key, FLAGS_IMAGE, self.scratch, BLCKSZ)

    cdef int _apply_clog(self) noexcept nogil:
        """The status of the transaction and its subtransactions, one value for each clog page."""
        cdef int i, j, rc
        cdef uint32_t page, size
        cdef bint done
        cdef Key key
        for i in range(self.effects.n_xids):
            page = self.effects.xids[i] // CLOG_XACTS_PER_PAGE
            done = False
            for j in range(i):
                if self.effects.xids[j] // CLOG_XACTS_PER_PAGE == page:
                    done = True
                    break
            if done:
                continue
            size = 0
            for j in range(i, self.effects.n_xids):
                if self.effects.xids[j] // CLOG_XACTS_PER_PAGE == page:
                    put32(self.scratch + size, self.effects.xids[j])
                    size += 4
            key = slru_key(SLRU_CLOG, page)
            rc = self._put(&key, self.effects.clog_flags, self.scratch, size)
            if rc:
                return rc
        return 0

    cdef int _apply_multixact(self) noexcept nogil:
        """The multixact's offset, the next one's (where this one's members end), the members."""
        cdef const uint8_t *p = self.record.main_data
        cdef uint32_t multi = get32(p), offset = get32(p + 4), n = get32(p + 8), i = 0, take
        cdef uint32_t following = multi + 1, end = offset + n
        cdef int rc
        for i in range(n):
            self._see_xid(get32(p + 12 + 8 * i))
        self._see_multi(following, end)
        if following < FIRST_MULTIXACT:
            following = FIRST_MULTIXACT
        if end == 0:                 # offset 0 means "not set"
            end = 1
        rc = self._put_offsets(multi, offset, following, end)
        i = 0
        while rc == 0 and i < n:
            take = members_on_page(offset + i, n - i)
            rc = self._put_members(offset + i, p + 12 + 8 * i, take)
            i += take
        return rc

    cdef int _put_offsets(self, uint32_t multi, uint32_t offset, uint32_t following,
                          uint32_t end) noexcept nogil:
        cdef uint8_t data[16]
        cdef Key key = slru_key(SLRU_OFFSETS, multi // OFFSETS_PER_PAGE)
        cdef int rc
        put32(data, multi)
        put32(data + 4, offset)
        put32(data + 8, following)
        put32(data + 12, end)
        if multi // OFFSETS_PER_PAGE == following // OFFSETS_PER_PAGE:
            return self._put(&key, FLAGS_MULTIXACT_OFFSET, data, 16)
        rc = self._put(&key, FLAGS_MULTIXACT_OFFSET, data, 8)
        if rc == 0:
            key = slru_key(SLRU_OFFSETS, following // OFFSETS_PER_PAGE)
            rc = self._put(&key, FLAGS_MULTIXACT_OFFSET, data + 8, 8)
        return rc

    cdef int _put_members(self, uint32_t offset, const uint8_t *members, uint32_t n) noexcept nogil:
        cdef Key key = slru_key(SLRU_MEMBERS, offset // MEMBERS_PER_PAGE)
        put32(self.scratch, offset)
        memcpy(self.scratch + 4, members, 8 * n)
        return self._put(&key, FLAGS_MULTIXACT_MEMBERS, self.scratch, 4 + 8 * n)

    cdef int _apply_counters(self) noexcept nogil:
        cdef uint8_t data[16]
        if not self.counters_changed:
            return 0
        self.counters_changed = False
        memcpy(data, &self.next_xid, 8)
        put32(data + 8, self.next_multi)
        put32(data + 12, self.next_multi_offset)
        return self._put(&self.counters_key, FLAGS_IMAGE, data, 16)

    cdef int _apply_commit_time(self) noexcept nogil:
        cdef int64_t time = self.effects.end_time
        cdef uint8_t data[12]
        if not self.effects.ends_transaction:
            return 0
        if time <= self.commit_time:
            # unsigned: the difference of any two times, exactly
            if <uint64_t> self.commit_time - <uint64_t> time <= CLOCK_TOLERANCE:
                return 0
            self.clock_sets += 1
        self.commit_time = time
        memcpy(data, &self.commit_time, 8)
        put32(data + 8, self.clock_sets)
        return self._put(&self.commit_time_key, FLAGS_IMAGE, data, 12)

    cdef int _put(self, const Key *key, uint8_t flags, const uint8_t *data,
                  uint32_t size) noexcept nogil:
        return self._put_ref(key, flags, self.layer.append_value(data, size), size)

    cdef int _put_ref(self, const Key *key, uint8_t flags, int64_t position,
                      uint32_t size) noexcept nogil:
        cdef int result = <int> position
        if position >= 0:
            result = self.layer.put_ref(key, self.record.end_lsn, flags, position, size)
            self.dirty = True
        if result == PUT_OK:
            return 0
        self.put_result = result
        self.put_key = key[0]
        return _PUT_FAILED

    cdef int _put_size(self, int64_t at) noexcept nogil:
        cdef SizeEntry *e = &self.sizes.entries[at]
        cdef uint8_t data[4]
        cdef Key key = rel_size_key(e.a, e.b, e.c, e.d)
        put32(data, e.nblocks)
        return self._put(&key, FLAGS_IMAGE, data, 4)

    cdef inline void _see_xid(self, uint32_t xid) noexcept nogil:
        """AdvanceNextFullTransactionIdPastXid: past `xid`, over the ids that are not normal."""
        cdef uint32_t low = <uint32_t> self.next_xid
        if xid < FIRST_NORMAL_XID or precedes(xid, low):
            return
        self.next_xid += <uint64_t> (xid - low) + 1
        low = <uint32_t> self.next_xid
        if low < FIRST_NORMAL_XID:
            self.next_xid += FIRST_NORMAL_XID - low
        self.counters_changed = True

    cdef void _see_multi(self, uint32_t multi, uint32_t offset) noexcept nogil:
        if precedes(self.next_multi, multi):
            self.next_multi = multi
            self.counters_changed = True
        if precedes(self.next_multi_offset, offset):
            self.next_multi_offset = offset
            self.counters_changed = True


cdef inline uint32_t members_on_page(uint32_t offset, uint32_t n) noexcept nogil:
    """How many of `n` members from `offset` on lie on its page; offsets wrap at 2^32."""
    cdef uint32_t room = MEMBERS_PER_PAGE - offset % MEMBERS_PER_PAGE
    if n < room:
        room = n
    # 2^32 is not a multiple of the page's members: the last page ends early
    if <uint64_t> offset + room > <uint64_t> 0x100000000ULL:
        room = <uint32_t> (<uint64_t> 0x100000000ULL - offset)
    return room
