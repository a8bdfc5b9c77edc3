"""The frequent record effects once more in plain Python, to check the native ones against.

Only what concerns one database (its blocks and sizes), the commit log, multixacts, counters and the
times of commits; the relations of other databases are left out.
"""

from collections import defaultdict

from pageserver import keys
from pageserver.values import (
    IMAGE_FLAGS,
    ValueKind,
    encode_multixact_members,
    encode_multixact_offsets,
    encode_xids,
    value_flags,
)
from postgres_ffi import xact_records, xlog_records
from postgres_ffi.decoded_record import DecodedBlock, DecodedRecord
from postgres_ffi.heap_records import HEAPBLOCKS_PER_PAGE, vm_clears
from postgres_ffi.page import restore_image
from postgres_ffi.relfile import RelTag
from postgres_ffi.slru import (
    FIRST_NORMAL_XID,
    SlruKind,
    multixact_precedes,
    next_multixact_id,
    page_position,
    xid_precedes,
)
from postgres_ffi.versions import VERSIONS, Rmgr

U32 = 0xFFFFFFFF
Values = dict[tuple[bytes, int], tuple[int, bytes]]


class Reference:
    """Feed it records; `values` is (key, lsn) -> (flags, data)."""

    def __init__(
        self, database: int, sizes: dict[RelTag, int], counters: tuple[int, int, int]
    ) -> None:
        self.database = database
        self.sizes = dict(sizes)
        self.next_xid, self.next_multi, self.next_offset = counters
        self.commit_time = keys.BEFORE_COMMITS
        self.values: Values = {}
        self.version = VERSIONS[15]

    def apply(self, record: DecodedRecord) -> None:
        """One record."""
        before = self._counters()
        self._see_xid(record.xid)
        self._clear_vm(record)
        self._blocks(record)
        match record.rmid:
            case Rmgr.XACT:
                self._xact(record)
            case Rmgr.SMGR:
                self._smgr(record)
            case Rmgr.MULTIXACT if record.rmgr_info == xlog_records.XLOG_MULTIXACT_CREATE_ID:
                self._multixact(record)
            case Rmgr.XLOG if record.rmgr_info == xlog_records.XLOG_CHECKPOINT_SHUTDOWN:
                fields = self.version.checkpoint.unpack(record.main_data)
                self.next_xid = fields["next_xid"]
                self.next_multi, self.next_offset = (
                    fields["next_multi"],
                    fields["next_multi_offset"],
                )
        if self._counters() != before:
            self._image(keys.COUNTERS_KEY, record, self._counters())

    def _counters(self) -> bytes:
        return keys.encode_counters(self.next_xid, self.next_multi, self.next_offset)

    def _put(self, key: bytes, record: DecodedRecord, flags: int, data: bytes) -> None:
        assert (key, record.end_lsn) not in self.values
        self.values[key, record.end_lsn] = (flags, data)

    def _image(self, key: bytes, record: DecodedRecord, data: bytes) -> None:
        self._put(key, record, IMAGE_FLAGS, data)

    def _size(self, rel: RelTag, record: DecodedRecord, nblocks: int) -> None:
        self.sizes[rel] = nblocks
        self._image(keys.rel_size_key(rel), record, keys.encode_size(nblocks))

    def _clear_vm(self, record: DecodedRecord) -> None:
        by_page: dict[RelTag, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        bits = 0
        for clear in vm_clears(record):
            vm, map_block = clear.rel._replace(forknum=2), clear.heap_blkno // HEAPBLOCKS_PER_PAGE
            bits = clear.flags
            if vm.dbnode == self.database and map_block < self.sizes.get(vm, 0):
                by_page[vm][map_block].append(clear.heap_blkno)
        for vm, pages in by_page.items():
            for map_block, blocks in pages.items():
                data = bytes([bits]) + b"".join(n.to_bytes(4, "little") for n in blocks)
                flags = value_flags(ValueKind.CLEAR_VM)
                self._put(keys.rel_block_key(vm, map_block), record, flags, data)

    def _blocks(self, record: DecodedRecord) -> None:
        is_image = record.rmid == Rmgr.XLOG
        blocks = [
            block
            for block in record.blocks
            if block.rel.dbnode == self.database and not (is_image and block.image is None)
        ]
        ends: dict[RelTag, int] = {}
        for block in blocks:
            ends[block.rel] = max(ends.get(block.rel, 0), block.blkno + 1)
        for block in blocks:
            self._block(block, record, is_image)
        for rel, end in ends.items():
            old = self.sizes.get(rel, 0)
            named = {block.blkno for block in blocks if block.rel == rel}
            for blkno in sorted(set(range(old, end)) - named):
                self._image(keys.rel_block_key(rel, blkno), record, b"")
            if end > old:
                self._size(rel, record, end)

    def _block(self, block: DecodedBlock, record: DecodedRecord, is_image: bool) -> None:
        key = keys.rel_block_key(block.rel, block.blkno)
        if is_image and not block.compressed:
            page = bytearray(restore_image(block) or b"")
            if page[14:16] != b"\0\0":
                page[:8] = (record.end_lsn >> 32).to_bytes(4, "little") + (
                    record.end_lsn & U32
                ).to_bytes(4, "little")
            self._image(key, record, bytes(page))
            return
        is_visible = record.rmid == Rmgr.HEAP2 and record.rmgr_info == 0x40
        if is_visible and block.rel.forknum == 2 and not block.apply_image:
            data = bytes([record.main_data[4]]) + record.blocks[1].blkno.to_bytes(4, "little")
            new = block.blkno >= self.sizes.get(block.rel, 0)
            self._put(key, record, value_flags(ValueKind.SET_VM, new), data)
            return
        init = block.will_init or block.apply_image or block.blkno >= self.sizes.get(block.rel, 0)
        self._put(key, record, value_flags(ValueKind.PG_RECORD, init), record.raw)

    def _xact(self, record: DecodedRecord) -> None:
        op = record.info & xact_records.XLOG_XACT_OPMASK
        if op == xact_records.XLOG_XACT_PREPARE:
            prepare = xact_records.parse_xact_prepare(record.main_data, self.version)
            for xid in (prepare.xid, *prepare.subxacts):
                self._see_xid(xid)
        if op > xact_records.XLOG_XACT_ABORT_PREPARED or op == xact_records.XLOG_XACT_PREPARE:
            return
        end = xact_records.parse_xact_end(record.main_data, record.info, self.version)
        self._see_time(end.xact_time, record)
        pages: dict[int, list[int]] = defaultdict(list)
        for xid in (end.twophase_xid or record.xid, *end.subxacts):
            self._see_xid(xid)
            pages[xid // 32768].append(xid)
        kind = ValueKind.CLOG_COMMITTED if end.committed else ValueKind.CLOG_ABORTED
        for page, xids in pages.items():
            key = keys.slru_block_key(SlruKind.CLOG, *page_position(page))
            self._put(key, record, value_flags(kind), encode_xids(xids))
        for relation in end.relations:
            for forknum in range(4):
                rel = relation.fork(forknum)
                if self.sizes.pop(rel, None) is not None:
                    self._image(keys.rel_size_key(rel), record, b"")

    def _see_time(self, time: int, record: DecodedRecord) -> None:
        before = self.commit_time
        if time > before.time:
            self.commit_time = before._replace(time=time)
        elif time < before.time - keys.CLOCK_TOLERANCE:
            self.commit_time = keys.CommitTime(before.clock_sets + 1, time)
        if self.commit_time != before:
            self._image(keys.COMMIT_TIME_KEY, record, keys.encode_commit_time(self.commit_time))

    def _smgr(self, record: DecodedRecord) -> None:
        if record.rmgr_info == xlog_records.XLOG_SMGR_CREATE:
            rel = xlog_records.parse_smgr_create(record.main_data)
            if rel.dbnode == self.database and rel not in self.sizes:
                self._size(rel, record, 0)
            return
        truncate = xlog_records.parse_smgr_truncate(record.main_data)
        if truncate.relation.dbnode != self.database:
            return
        keep, tail = divmod(truncate.blkno, HEAPBLOCKS_PER_PAGE)
        vm = truncate.relation.fork(2)
        if tail and truncate.flags & 2 and keep < self.sizes.get(vm, 0):
            flags = value_flags(ValueKind.TRUNCATE_VM)
            data = truncate.blkno.to_bytes(4, "little")
            self._put(keys.rel_block_key(vm, keep), record, flags, data)
        new = {0: (1, truncate.blkno), 1: (4, 0), 2: (2, keep + (tail > 0))}
        for forknum, (flag, nblocks) in new.items():
            rel = truncate.relation.fork(forknum)
            if truncate.flags & flag and self.sizes.get(rel, 0) > nblocks:
                self._size(rel, record, nblocks)
            elif truncate.flags & flag and forknum == 0:
                self._size(rel, record, self.sizes[rel])

    def _multixact(self, record: DecodedRecord) -> None:
        create = xlog_records.parse_multixact_create(record.main_data)
        end = (create.moff + len(create.members)) & U32
        offsets: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for multi, offset in (
            (create.mid, create.moff),
            (next_multixact_id(create.mid), end or 1),
        ):
            offsets[multi // 2048].append((multi, offset))
        for page, pairs in offsets.items():
            key = keys.slru_block_key(SlruKind.MULTIXACT_OFFSETS, *page_position(page))
            flags = value_flags(ValueKind.MULTIXACT_OFFSET)
            self._put(key, record, flags, encode_multixact_offsets(pairs))
        members: dict[int, list[tuple[int, tuple[int, int]]]] = defaultdict(list)
        for i, member in enumerate(create.members):
            offset = (create.moff + i) & U32
            members[offset // 1636].append((offset, member))
            self._see_xid(member[0])
        for page, group in members.items():
            key = keys.slru_block_key(SlruKind.MULTIXACT_MEMBERS, *page_position(page))
            flags = value_flags(ValueKind.MULTIXACT_MEMBERS)
            data = encode_multixact_members(group[0][0], [member for _, member in group])
            self._put(key, record, flags, data)
        if multixact_precedes(self.next_multi, (create.mid + 1) & U32):
            self.next_multi = (create.mid + 1) & U32
        if multixact_precedes(self.next_offset, end):
            self.next_offset = end

    def _see_xid(self, xid: int) -> None:
        low = self.next_xid & U32
        if xid >= FIRST_NORMAL_XID and not xid_precedes(xid, low):
            self.next_xid += ((xid - low) & U32) + 1
            self.next_xid += max(FIRST_NORMAL_XID - (self.next_xid & U32), 0)
