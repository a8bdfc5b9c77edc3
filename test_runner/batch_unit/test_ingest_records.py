"""Effects of single WAL records, written by hand."""

import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from batch_unit.ingest_wal import (
    FSM,
    INIT,
    NEXT_XID,
    REL,
    START_LSN,
    VM,
    Bench,
    Block,
    commit_data,
    make_bench,
    smgr_create,
)

from pageserver import keys
from pageserver.walingest import IngestError
from postgres_ffi.checkpoint import parse_checkpoint
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import RelTag
from postgres_ffi.slru import SlruKind
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError

HEAP_INSERT, HEAP_UPDATE, HEAP_LOCK = 0x00, 0x20, 0x60
INSERT_CLEARS = struct.pack("<HB", 1, 1)
HAS_INFO = 0x80


@pytest.fixture
def bench() -> Iterator[Bench]:
    with make_bench() as made:
        yield made


def page_text(bench: Bench, rel: RelTag, blkno: int) -> str:
    page = bench.datadir.get_rel_page(rel, blkno, bench.timeline.last_record_lsn)
    return page.rstrip(b"\0").decode()


def size(bench: Bench, rel: RelTag) -> int | None:
    return bench.datadir.stored_fork_size(rel, bench.timeline.last_record_lsn)


def vm_bits(bench: Bench, heap_blkno: int) -> int:
    page = bench.datadir.get_rel_page(VM, heap_blkno // 32672, bench.timeline.last_record_lsn)
    index = heap_blkno % 32672
    return page[24 + index // 4] >> (index % 4 * 2) & 3


def add_vm(bench: Bench, blocks: int = 1, fill: int = 0xFF) -> None:
    """A visibility map with all bits set."""
    image = bytes(14) + b"\1" + bytes(9) + bytes([fill]) * 8168
    for blkno in range(blocks):
        bench.add(Rmgr.XLOG, 0xB0, b"", [Block(VM, blkno, image=image)])


def clog_status(bench: Bench, xid: int) -> int:
    segno, page = divmod(xid // 32768, 32)
    content = bench.datadir.slru_page(SlruKind.CLOG, segno, page, bench.timeline.last_record_lsn)
    index = xid % 32768
    return content[index // 4] >> (index % 4 * 2) & 3


def next_xid(bench: Bench) -> int:
    return bench.datadir.counters(bench.timeline.last_record_lsn)[0]


# ---- block references


def test_record_is_applied_to_each_block_it_names(bench: Bench) -> None:
    first = bench.add(Rmgr.BTREE, 0, b"x", [Block(REL, 0, will_init=True), Block(REL, 1)])
    second = bench.add(Rmgr.BTREE, 0, b"x", [Block(REL, 1, b"data")])
    assert page_text(bench, REL, 0) == f"0 {first:X}"
    assert page_text(bench, REL, 1) == f"0 {first:X} {second:X}"
    assert size(bench, REL) == 2
    assert bench.datadir.get_rel_page(REL, 1, first).rstrip(b"\0") == b"0 %X" % first


@pytest.mark.parametrize(("count", "rebuilt_again"), [(63, 0), (64, 64)])
def test_only_reads_of_few_pages_fill_the_page_cache(
    bench: Bench, count: int, rebuilt_again: int
) -> None:
    for blkno in range(count):
        lsn = bench.add(Rmgr.BTREE, 0, b"x", [Block(REL, blkno, will_init=True)])
    pages = bench.datadir.get_rel_pages(REL, 0, count, lsn)
    rebuilt = len(bench.redo.requests)
    assert bench.datadir.get_rel_pages(REL, 0, count, lsn) == pages
    assert len(bench.redo.requests) - rebuilt == rebuilt_again


def test_blocks_between_the_end_and_a_new_block_are_zeros(bench: Bench) -> None:
    lsn = bench.add(Rmgr.HASH, 0, b"x", [Block(REL, 5), Block(REL, 2)])
    assert size(bench, REL) == 6
    pages = bench.datadir.get_rel_pages(REL, 0, 8, lsn)
    written = [blkno for blkno, page in enumerate(pages) if page != ZERO_PAGE]
    assert written == [2, 5]
    assert not [r for r in bench.redo.requests if r.blkno not in (2, 5)]


def test_block_beyond_the_end_starts_from_zeros_though_it_had_a_value(bench: Bench) -> None:
    bench.add(Rmgr.HEAP2, 0x10, bytes(8), [Block(REL, 3, will_init=True)])
    bench.add(Rmgr.SMGR, 0x20, struct.pack("<IIIIi", 1, *REL[:3], 1))
    assert size(bench, REL) == 1
    assert bench.datadir.get_rel_page(REL, 3, bench.timeline.last_record_lsn) == ZERO_PAGE
    lsn = bench.add(Rmgr.GENERIC, 0, b"", [Block(REL, 3, b"delta")])
    assert page_text(bench, REL, 3) == f"0 {lsn:X}"
    assert bench.datadir.get_rel_page(REL, 2, lsn) == ZERO_PAGE


def test_full_page_image_becomes_the_page_with_its_hole_and_lsn(bench: Bench) -> None:
    head, tail = bytes(14) + b"\xf0\x1f" + b"h" * 84, b"t" * 92
    image = Block(REL, 0, image=head + tail, hole=(100, 8000))
    lsn = bench.add(Rmgr.XLOG, 0xB0, b"", [image])
    page = bench.datadir.get_rel_page(REL, 0, lsn)
    assert page[8:] == (head + bytes(8000) + tail)[8:]
    assert struct.unpack_from("<II", page) == (lsn >> 32, lsn & 0xFFFFFFFF)
    assert not bench.redo.requests


def test_image_of_a_new_page_gets_no_lsn(bench: Bench) -> None:
    lsn = bench.add(Rmgr.XLOG, 0xB0, b"", [Block(REL, 0, image=bytes(92), hole=(50, 8100))])
    assert bench.datadir.get_rel_page(REL, 0, lsn) == ZERO_PAGE


def test_compressed_image_is_left_to_redo(bench: Bench) -> None:
    block = Block(REL, 0, image=b"compressed", hole=(24, 100), compression=4)
    lsn = bench.add(Rmgr.XLOG, 0xA0, b"", [block])
    assert page_text(bench, REL, 0) == f"0 {lsn:X}"


def test_hint_record_without_image_has_no_effect(bench: Bench) -> None:
    bench.add(Rmgr.XLOG, 0xA0, b"", [Block(FSM, 3, b"x"), Block(REL, 7, b"x")])
    assert size(bench, FSM) is None
    assert size(bench, REL) == 0


def test_relation_in_an_unknown_database_makes_it_known(bench: Bench) -> None:
    rel = RelTag(20000, 77, 30000, 0)
    lsn = bench.add(*smgr_create(rel))
    assert bench.datadir.list_dbs(lsn)[20000, 77] is False
    assert bench.datadir.list_rels(20000, 77, lsn) == [rel]
    assert (20000, 77) not in bench.datadir.list_dbs(START_LSN)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((Rmgr.XLOG, 0xC0), "unknown"),
        ((Rmgr.XLOG, 0xB0, b"", [Block(REL, 0, b"x")]), "no full-page image"),
        ((Rmgr.XACT, 0x70, bytes(8)), "unknown"),
        ((Rmgr.XACT, 0x00, b"short"), "too short"),
        ((Rmgr.XACT, HAS_INFO, struct.pack("<qIi", 0, 2, 9)), "too short"),
        ((Rmgr.SMGR, 0x30), "unknown"),
        ((Rmgr.SMGR, 0x10, struct.pack("<IIIi", *REL[:3], 4)), "fork"),
        ((Rmgr.DBASE, 0x30), "unknown"),
        ((Rmgr.MULTIXACT, 0x20, struct.pack("<IIi", 1, 1, 1)), "too short"),
        ((Rmgr.MULTIXACT, 0x20, struct.pack("<IIiII", 1, 1, 1, 5, 6)), "status"),
        ((Rmgr.RELMAP, 0x00, struct.pack("<IIi", 5, 1663, 512) + bytes(512)), "pg_filenode.map"),
        ((Rmgr.CLOG, 0x00, b"", [Block(REL, 0)]), "refers to blocks"),
        ((Rmgr.HEAP, HEAP_INSERT, INSERT_CLEARS), "no block"),
        ((Rmgr.HEAP, HEAP_INSERT, b"", [Block(REL, 0)]), "too short"),
        ((Rmgr.HEAP2, 0x40, bytes(5), [Block(REL, 0), Block(REL, 0)]), "visibility map"),
        ((Rmgr.HEAP2, 0x40, bytes(5), [Block(VM, 1), Block(REL, 0)]), "visibility map"),
        ((Rmgr.BTREE, 0, b"", [Block(REL, 0), Block(REL, 0)]), "twice"),
        ((Rmgr.BTREE, 0, b"", [Block(REL, 0xFFFFFFFF)]), "block number"),
    ],
)
def test_record_that_is_not_understood_stops_ingestion(
    bench: Bench, arguments: tuple[object, ...], reason: str
) -> None:
    good = bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 0, will_init=True)], xid=2000)
    bench.wal.add(*arguments, xid=5000)  # type: ignore[arg-type]
    bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 9, will_init=True)], xid=6000)
    with pytest.raises(IngestError, match=reason):
        bench.run()
    assert bench.timeline.last_record_lsn == good
    assert page_text(bench, REL, 0) == f"0 {good:X}"
    assert size(bench, REL) == 1
    assert next_xid(bench) == 2001
    with pytest.raises(IngestError, match="start it anew"):
        bench.ingest.ingest(b"")
    bench.reopen()
    lsn = bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 1, will_init=True)], xid=2001)
    assert size(bench, REL) == 2
    assert bench.datadir.counters(lsn)[0] == 2002


def test_damaged_wal_stops_ingestion_behind_the_last_good_record(bench: Bench) -> None:
    good = bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 0, will_init=True)])
    intact = bench.wal.take()
    bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 1, will_init=True)])
    damaged = bytearray(bench.wal.take())
    damaged[40] ^= 1
    with pytest.raises(WalDecodeError):
        bench.ingest.ingest(intact + damaged)
    assert bench.timeline.last_record_lsn == good
    assert size(bench, REL) == 1


def test_custom_resource_manager_has_its_block_references(bench: Bench) -> None:
    lsn = bench.add(130, 0x10, b"anything", [Block(REL, 0, will_init=True)])
    assert page_text(bench, REL, 0) == f"0 {lsn:X}"


# ---- visibility map


def test_insert_clears_the_bits_of_its_page(bench: Bench) -> None:
    add_vm(bench)
    lsn = bench.add(Rmgr.HEAP, HEAP_INSERT, INSERT_CLEARS, [Block(REL, 6, will_init=True)])
    assert [vm_bits(bench, blkno) for blkno in (5, 6, 7)] == [3, 0, 3]
    assert bench.datadir.get_rel_page(VM, 0, lsn - 8)[24:30] == b"\xff" * 6


def test_update_clears_the_old_and_the_new_page(bench: Bench) -> None:
    add_vm(bench, 2)
    blocks = [Block(REL, 40000, will_init=True), Block(REL, 3)]
    data = struct.pack("<IHBBIH", 0, 1, 0, 3, 0, 1)
    bench.add(Rmgr.HEAP, HEAP_UPDATE, data, blocks)
    assert [vm_bits(bench, blkno) for blkno in (3, 4, 39999, 40000)] == [0, 3, 3, 0]
    bench.add(Rmgr.HEAP, HEAP_UPDATE, data, [Block(REL, 10), Block(REL, 9)])
    assert [vm_bits(bench, blkno) for blkno in (8, 9, 10, 11)] == [3, 0, 0, 3]


def test_update_that_clears_one_page_only(bench: Bench) -> None:
    add_vm(bench)
    blocks = [Block(REL, 5, will_init=True), Block(REL, 3)]
    bench.add(Rmgr.HEAP, HEAP_UPDATE, struct.pack("<IHBBIH", 0, 1, 0, 1, 0, 1), blocks)
    assert [vm_bits(bench, blkno) for blkno in (3, 5)] == [0, 3]


def test_lock_clears_the_frozen_bit_alone(bench: Bench) -> None:
    add_vm(bench)
    bench.add(Rmgr.HEAP, HEAP_LOCK, struct.pack("<IHBB", 0, 1, 0, 1), [Block(REL, 2)])
    assert [vm_bits(bench, blkno) for blkno in (1, 2, 3)] == [3, 1, 3]


def test_bits_are_set_without_redo(bench: Bench) -> None:
    """The first record makes the page, one that sets what is set leaves even its LSN alone."""
    bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 9, will_init=True)])
    for heap_blkno, bits in ((6, 1), (7, 3), (6, 3), (7, 3)):
        data = struct.pack("<IB", 700, bits)
        lsn = bench.add(Rmgr.HEAP2, 0x40, data, [Block(VM, 0), Block(REL, heap_blkno)])
    assert [vm_bits(bench, blkno) for blkno in (5, 6, 7, 8)] == [0, 3, 3, 0]
    page = bench.datadir.get_rel_page(VM, 0, lsn)
    assert struct.unpack_from("<6H", page, 8) == (0, 0, 24, 8192, 8192, 8192 | 4)
    assert int.from_bytes(page[4:8], "little") < lsn
    assert not [request for request in bench.redo.requests if request.forknum == VM.forknum]


def test_clearing_where_no_map_is_has_no_effect(bench: Bench) -> None:
    bench.add(Rmgr.HEAP, HEAP_INSERT, INSERT_CLEARS, [Block(REL, 0, will_init=True)])
    assert size(bench, VM) is None
    add_vm(bench)
    bench.add(Rmgr.HEAP, HEAP_INSERT, INSERT_CLEARS, [Block(REL, 40000, will_init=True)])
    assert size(bench, VM) == 1


def test_truncation_cuts_the_map_and_clears_the_rest_of_its_last_page(bench: Bench) -> None:
    add_vm(bench, 3)
    bench.add(Rmgr.HEAP2, 0x10, bytes(8), [Block(REL, 70000, will_init=True)])
    bench.add(Rmgr.XLOG, 0xB0, b"", [Block(FSM, 2, image=bytes(8192))])
    bench.add(Rmgr.SMGR, 0x20, struct.pack("<IIIIi", 32672 + 6, *REL[:3], 7))
    assert (size(bench, REL), size(bench, FSM), size(bench, VM)) == (32678, 0, 2)
    assert [vm_bits(bench, 32672 + n) for n in (4, 5, 6, 7, 8, 1000)] == [3, 3, 0, 0, 0, 0]
    assert vm_bits(bench, 32671) == 3
    bench.add(Rmgr.SMGR, 0x20, struct.pack("<IIIIi", 0, *REL[:3], 7))
    assert (size(bench, REL), size(bench, VM)) == (0, 0)


# ---- transactions


def test_commit_and_abort_with_subtransactions_on_two_pages(bench: Bench) -> None:
    bench.add(Rmgr.CLOG, 0x00, struct.pack("<i", 1))
    bench.add(Rmgr.XACT, HAS_INFO, commit_data(subxacts=[32767, 32768, 32770]), xid=32766)
    bench.add(Rmgr.XACT, 0x20 | HAS_INFO, commit_data(subxacts=[32769]), xid=32765)
    bench.add(Rmgr.XACT, 0x00, bytes(8), xid=32764)
    status = [clog_status(bench, xid) for xid in range(32763, 32772)]
    assert status == [0, 1, 2, 1, 1, 1, 2, 1, 0]
    assert next_xid(bench) == 32771


def test_many_subtransactions(bench: Bench) -> None:
    subxacts = range(5000, 6000)
    bench.add(Rmgr.XACT, HAS_INFO, commit_data(subxacts=subxacts), xid=4999)
    assert [clog_status(bench, xid) for xid in (4998, 4999, 5000, 5999, 6000)] == [0, 1, 1, 1, 0]
    assert next_xid(bench) == 6000


def test_commit_on_a_page_that_was_never_created(bench: Bench) -> None:
    xid = 40 * 32768 + 5
    lsn = bench.add(Rmgr.XACT, 0x00, bytes(8), xid=xid)
    assert clog_status(bench, xid) == 1
    assert bench.datadir.slru_segments(SlruKind.CLOG, lsn) == [0, 1]
    assert bench.datadir.slru_segment_size(SlruKind.CLOG, 1, lsn) == 9
    assert bench.datadir.slru_page(SlruKind.CLOG, 1, 0, lsn) == ZERO_PAGE


def test_commit_drops_all_forks(bench: Bench) -> None:
    add_vm(bench)
    bench.add(*smgr_create(INIT))
    other = REL._replace(relnode=16385)
    bench.add(*smgr_create(other))
    before = bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 4, will_init=True)])
    counted = bench.datadir.current_logical_size()
    lsn = bench.add(Rmgr.XACT, HAS_INFO, commit_data(rels=[REL]), xid=1000)
    assert bench.datadir.list_rels(1663, 5, lsn) == [other]
    assert bench.datadir.get_rel_page(REL, 4, lsn) == ZERO_PAGE
    assert bench.datadir.get_rel_size(REL, before) == 5
    assert clog_status(bench, 1000) == 1
    assert counted == bench.datadir.logical_size(before) == 6 * 8192
    assert bench.datadir.current_logical_size() == bench.datadir.logical_size(lsn) == 0


@pytest.mark.parametrize(
    ("before", "xid", "after"),
    [
        (1000, 999, 1000),
        (1000, 1000, 1001),
        (1000, 5, 1000),
        (1000, 0xFFFFFFF0, 1000),
        ((1 << 32) + 5, 0xFFFFFFF0, (1 << 32) + 5),
        ((1 << 32) - 5, 0xFFFFFFFF, (1 << 32) + 3),
        ((1 << 32) - 5, 7, (1 << 32) + 8),
        ((3 << 32) + 1000, 2000, (3 << 32) + 2001),
    ],
)
def test_next_xid_follows_xids_and_wraps(bench: Bench, before: int, xid: int, after: int) -> None:
    checkpoint = parse_checkpoint(bench.datadir.checkpoint(START_LSN), bench.datadir.version)
    shutdown_checkpoint(bench, checkpoint, next_xid=before)
    lsn = bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 0, will_init=True)], xid=xid)
    assert bench.datadir.counters(lsn)[0] == after


def shutdown_checkpoint(bench: Bench, checkpoint: object, **changes: int) -> int:
    data = bytearray(bench.datadir.version.checkpoint.size)
    bench.datadir.version.checkpoint.pack_into(data, changes)
    return bench.add(Rmgr.XLOG, 0x00, bytes(data))


def test_xids_of_prepared_transactions_and_their_end(bench: Bench) -> None:
    magic = bench.datadir.version.twophase_magic
    state = struct.pack(
        "<IIIIqIiiiiii?xHQq", magic, 92, 1200, 5, 0, 10, 1, 0, 0, 0, 0, 0, False, 4, 0x77, 0
    )
    state += b"gid\0" + bytes(4) + struct.pack("<II", 1300, 0)
    lsn = bench.add(Rmgr.XACT, 0x10, state, origin=3)
    assert bench.datadir.twophase_files(lsn) == {1200: state}
    assert bench.datadir.counters(lsn)[0] == 1301
    assert bench.datadir.replication_origins(lsn) == {3: 0x77}
    end = commit_data(xinfo=16 | 32, subxacts=[1300], tail=struct.pack("<IQq", 1200, 0x99, 0))
    done = bench.add(Rmgr.XACT, 0x30 | HAS_INFO, end, xid=0, origin=3)
    assert bench.datadir.twophase_files(done) == {}
    assert bench.datadir.twophase_files(lsn) == {1200: state}
    assert [clog_status(bench, xid) for xid in (1200, 1300)] == [1, 1]
    assert bench.datadir.replication_origins(done) == {3: 0x99}


def test_origins_advance_and_are_dropped(bench: Bench) -> None:
    tail = struct.pack("<Qq", 0x500, 0)
    bench.add(Rmgr.XACT, HAS_INFO, commit_data(xinfo=32, tail=tail), xid=1000, origin=2)
    bench.add(Rmgr.REPLORIGIN, 0x00, struct.pack("<QHBx4x", 0x400, 2, 0))
    lsn = bench.add(Rmgr.REPLORIGIN, 0x00, struct.pack("<QHBx4x", 0x10, 4, 0))
    assert bench.datadir.replication_origins(lsn) == {2: 0x500, 4: 0x10}
    lsn = bench.add(Rmgr.REPLORIGIN, 0x00, struct.pack("<QHBx4x", 0x400, 2, 1))
    assert bench.datadir.replication_origins(lsn)[2] == 0x400
    lsn = bench.add(Rmgr.REPLORIGIN, 0x10, struct.pack("<H", 2))
    assert bench.datadir.replication_origins(lsn) == {4: 0x10}


# ---- multixacts


def multixact(bench: Bench, mid: int, moff: int, *members: tuple[int, int]) -> int:
    data = struct.pack("<IIi", mid, moff, len(members))
    return bench.add(Rmgr.MULTIXACT, 0x20, data + b"".join(struct.pack("<II", *m) for m in members))


def offset_of(bench: Bench, mid: int) -> int:
    segno, page = divmod(mid // 2048, 32)
    content = bench.datadir.slru_page(
        SlruKind.MULTIXACT_OFFSETS, segno, page, bench.timeline.last_record_lsn
    )
    (offset,) = struct.unpack_from("<I", content, mid % 2048 * 4)
    return int(offset)


def member_at(bench: Bench, offset: int) -> tuple[int, int]:
    segno, page = divmod(offset // 1636, 32)
    content = bench.datadir.slru_page(
        SlruKind.MULTIXACT_MEMBERS, segno, page, bench.timeline.last_record_lsn
    )
    group, index = divmod(offset % 1636, 4)
    (xid,) = struct.unpack_from("<I", content, group * 20 + 4 + 4 * index)
    return xid, content[group * 20 + index]


@pytest.mark.parametrize("pages_exist", [True, False])
def test_multixact_sets_its_offset_the_next_one_and_its_members(
    bench: Bench, pages_exist: bool
) -> None:
    """On existing pages natively, else by Python: with the same result."""
    if pages_exist:
        for page in (0, 1):
            bench.add(Rmgr.MULTIXACT, 0x00, struct.pack("<i", page))
            bench.add(Rmgr.MULTIXACT, 0x10, struct.pack("<i", page))
    members = [(2000 + i, i % 6) for i in range(10)]
    lsn = multixact(bench, 2047, 1630, *members)
    assert (offset_of(bench, 2047), offset_of(bench, 2048)) == (1630, 1640)
    assert [member_at(bench, 1630 + i) for i in range(10)] == members
    assert bench.datadir.counters(lsn) == (2010, 2048, 1640)
    lsn = multixact(bench, 5, 100, (3000, 1))
    assert (offset_of(bench, 5), offset_of(bench, 6)) == (100, 101)
    assert bench.datadir.counters(lsn) == (3001, 2048, 1640)


def test_page_of_offsets_that_was_made_early_is_not_cleared_again(bench: Bench) -> None:
    multixact(bench, 2047, 10, (2000, 1))
    bench.add(Rmgr.MULTIXACT, 0x00, struct.pack("<i", 1))
    assert offset_of(bench, 2048) == 11
    bench.add(Rmgr.MULTIXACT, 0x00, struct.pack("<i", 1))
    assert offset_of(bench, 2048) == 0


def test_multixacts_wrap(bench: Bench) -> None:
    top = 0xFFFFFFFF
    shutdown_checkpoint(bench, None, next_xid=NEXT_XID, next_multi=top, next_multi_offset=top - 1)
    lsn = multixact(bench, top, top - 1, (10, 1), (11, 2), (12, 3))
    assert (offset_of(bench, top), offset_of(bench, 1)) == (top - 1, 1)
    assert [member_at(bench, n & top) for n in (top - 1, top, top + 1)] == [
        (10, 1),
        (11, 2),
        (12, 3),
    ]
    assert bench.datadir.counters(lsn)[1:] == (0, 1)


def test_multixact_truncation_drops_segments(bench: Bench) -> None:
    for page in (0, 31, 32, 64):
        bench.add(Rmgr.MULTIXACT, 0x00, struct.pack("<i", page))
        bench.add(Rmgr.MULTIXACT, 0x10, struct.pack("<i", page))
    data = struct.pack("<IIIII", 5, 1, 33 * 2048, 1, 33 * 1636)
    lsn = bench.add(Rmgr.MULTIXACT, 0x30, data)
    for kind in (SlruKind.MULTIXACT_OFFSETS, SlruKind.MULTIXACT_MEMBERS):
        assert bench.datadir.slru_segments(kind, lsn) == [1, 2]
        assert bench.datadir.slru_segments(kind, lsn - 8) == [0, 1, 2]
    checkpoint = parse_checkpoint(bench.datadir.checkpoint(lsn), bench.datadir.version)
    assert (checkpoint.oldest_multi, checkpoint.oldest_multi_db) == (33 * 2048, 5)


def test_clog_truncation_drops_segments(bench: Bench) -> None:
    bench.add(Rmgr.XACT, 0x00, bytes(8), xid=70 * 32768)
    lsn = bench.add(Rmgr.CLOG, 0x10, struct.pack("<iII", 33, 33 * 32768, 5))
    assert bench.datadir.slru_segments(SlruKind.CLOG, lsn) == [2]
    checkpoint = parse_checkpoint(bench.datadir.checkpoint(lsn), bench.datadir.version)
    assert (checkpoint.oldest_xid, checkpoint.oldest_xid_db) == (33 * 32768, 5)


# ---- checkpoints and the rest


def test_online_checkpoint_only_raises(bench: Bench) -> None:
    shutdown_checkpoint(
        bench, None, next_xid=5000, next_oid=20000, next_multi=50, next_multi_offset=90,
        oldest_xid=700, oldest_xid_db=1, oldest_multi=9, oldest_multi_db=1,
    )  # fmt: skip
    data = bytearray(bench.datadir.version.checkpoint.size)
    fields = {
        "next_xid": 4000, "next_oid": 30000, "next_multi": 60, "next_multi_offset": 80,
        "oldest_xid": 600, "oldest_xid_db": 2, "oldest_multi": 12, "oldest_multi_db": 2,
        "full_page_writes": True, "newest_commit_ts_xid": 77,
    }  # fmt: skip
    bench.datadir.version.checkpoint.pack_into(data, fields)
    lsn = bench.add(Rmgr.XLOG, 0x10, bytes(data))
    checkpoint = parse_checkpoint(bench.datadir.checkpoint(lsn), bench.datadir.version)
    assert (checkpoint.next_xid, checkpoint.next_oid) == (5000, 20000)
    assert (checkpoint.next_multi, checkpoint.next_multi_offset) == (60, 90)
    assert (checkpoint.oldest_xid, checkpoint.oldest_xid_db) == (700, 1)
    assert (checkpoint.oldest_multi, checkpoint.oldest_multi_db) == (12, 2)
    assert (checkpoint.full_page_writes, checkpoint.newest_commit_ts_xid) == (True, 77)


def test_counters_that_a_shutdown_checkpoint_sets_back(bench: Bench) -> None:
    bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 0, will_init=True)], xid=9000)
    bench.add(Rmgr.XLOG, 0x30, struct.pack("<I", 30000))
    lsn = shutdown_checkpoint(bench, None, next_xid=8000, next_oid=25000, next_multi=1)
    checkpoint = parse_checkpoint(bench.datadir.checkpoint(lsn), bench.datadir.version)
    assert (checkpoint.next_xid, checkpoint.next_oid) == (8000, 25000)
    before = parse_checkpoint(bench.datadir.checkpoint(lsn - 8), bench.datadir.version)
    assert (before.next_xid, before.next_oid) == (9001, 30000)


def test_parameters_reach_the_control_file(bench: Bench) -> None:
    data = struct.pack("<6i2?2x", 123, 9, 8, 7, 65, 2, True, True)
    lsn = bench.add(Rmgr.XLOG, 0x60, data)
    layout = bench.datadir.version.control_file
    assert layout.unpack(bench.datadir.control_file(lsn))["max_connections"] == 123
    assert layout.unpack(bench.datadir.control_file(lsn))["track_commit_timestamp"] is True
    assert layout.unpack(bench.datadir.control_file(START_LSN))["max_connections"] == 0


def test_tablespaces_come_and_go_with_their_databases(bench: Bench) -> None:
    lsn = bench.add(Rmgr.TBLSPC, 0x00, struct.pack("<I", 20000) + b"/mnt/x\0")
    bench.add(*smgr_create(RelTag(20000, 5, 17000, 0)))
    dropped = bench.add(Rmgr.TBLSPC, 0x10, struct.pack("<I", 20000))
    assert bench.datadir.tablespaces(lsn) == {20000: "/mnt/x"}
    assert bench.datadir.tablespaces(dropped) == {}
    assert (20000, 5) not in bench.datadir.list_dbs(dropped)
    assert not bench.datadir.rel_exists(RelTag(20000, 5, 17000, 0), dropped)


def test_database_copied_and_dropped_in_one_batch(bench: Bench) -> None:
    """The copy sees what earlier records of the same batch did, and a later change is its own."""
    source = bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 2, will_init=True)])
    copied = bench.wal.add(Rmgr.DBASE, 0x00, struct.pack("<IIII", 99, 1663, 5, 1663))
    later = bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL._replace(dbnode=99), 2)])
    dropped = bench.wal.add(Rmgr.DBASE, 0x20, struct.pack("<IiI", 99, 1, 1663))
    assert bench.run() == dropped
    copy = REL._replace(dbnode=99)
    assert bench.datadir.list_rels(1663, 99, copied) == [copy]
    assert bench.datadir.get_rel_size(copy, copied) == 3
    assert bench.datadir.get_rel_page(copy, 0, copied) == ZERO_PAGE
    assert bench.datadir.get_rel_page(copy, 2, copied).rstrip(b"\0") == b"0 %X" % source
    page = bench.datadir.get_rel_page(copy, 2, later).rstrip(b"\0")
    assert page == b"0 %X %X" % (source, later)
    assert (1663, 99) not in bench.datadir.list_dbs(dropped)
    assert not bench.datadir.rel_exists(copy, dropped)
    assert bench.datadir.current_logical_size() == bench.datadir.logical_size(dropped) == 3 * 8192


def test_switch_moves_the_end_to_the_next_segment(bench: Bench) -> None:
    switch = bench.wal.add(Rmgr.XLOG, 0x40)
    start = bench.wal.prev
    assert bench.run() == switch
    bench.wal.fill_segment()
    assert bench.run() == 0x3000000
    assert bench.timeline.prev_record_lsn == start
    lsn = bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 0, will_init=True)])
    assert lsn > 0x3000000
    assert size(bench, REL) == 1


def test_keyspace_holds_what_lives(bench: Bench) -> None:
    add_vm(bench)
    bench.add(*smgr_create(RelTag(1663, 5, 17000, 0)))
    bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 4, will_init=True)])
    lsn = bench.add(Rmgr.XACT, HAS_INFO, commit_data(rels=[RelTag(1663, 5, 17000, 0)]), xid=1000)
    ranges = bench.datadir.collect_keyspace(lsn)
    assert ranges == sorted(ranges)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))

    def covered(key: bytes) -> bool:
        return any(start <= key < end for start, end in ranges)

    assert covered(keys.rel_block_key(REL, 4)) and not covered(keys.rel_block_key(REL, 5))
    assert covered(keys.rel_size_key(VM))
    assert not covered(keys.rel_size_key(RelTag(1663, 5, 17000, 0)))
    live = bench.timeline.scan_keys(bytes(18), b"\xff" * 18, lsn)
    unneeded = {keys.rel_size_key(RelTag(1663, 5, 17000, 0))}
    assert {key for key in live if not covered(key)} == unneeded
