"""Ranges of keys that are deleted when much is dropped at once, and what comes after them."""

import struct
from collections.abc import Iterator

import pytest
from batch_unit.ingest_wal import FSM, REL, VM, Bench, Block, commit_data, make_bench, smgr_create

from pageserver import keys
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import Rmgr

OTHER = REL._replace(relnode=16385)
MANY = 200  # blocks: worth a range


@pytest.fixture
def bench() -> Iterator[Bench]:
    with make_bench() as made:
        yield made


def fill(bench: Bench, rel: RelTag, blocks: int) -> int:
    """Extend a fork by a record for its last new block; the ones before are zeros."""
    return bench.add(Rmgr.HEAP, 0x70, b"", [Block(rel, blocks - 1, will_init=True)])


def truncate(bench: Bench, blocks: int, flags: int = 7) -> int:
    return bench.add(Rmgr.SMGR, 0x20, struct.pack("<IIIIi", blocks, *REL[:3], flags))


def page(bench: Bench, rel: RelTag, blkno: int, lsn: int) -> bytes:
    return bench.datadir.get_rel_page(rel, blkno, lsn).rstrip(b"\0")


def deleted(bench: Bench) -> list[tuple[bytes, bytes, int]]:
    return bench.timeline.view.open.tombstones()


def settle(bench: Bench) -> None:
    """Everything to disk, and merged there."""
    bench.timeline.checkpoint()
    bench.timeline.compact(bench.datadir.collect_keyspace, force=True)
    assert deleted(bench) == []


def test_dropped_relation(bench: Bench) -> None:
    fill(bench, OTHER, MANY)
    fill(bench, FSM, 3)
    full = fill(bench, REL, MANY)
    drop = bench.add(Rmgr.XACT, 0x80, commit_data(rels=[REL]), xid=1000)
    assert deleted(bench) == [(*keys.relation_range(*REL[:3]), drop)]
    created = bench.add(*smgr_create(REL))
    again = fill(bench, REL, 2)
    for settled in (False, True):
        if settled:
            settle(bench)
        assert page(bench, REL, MANY - 1, full) == b"0 %X" % full
        assert bench.datadir.get_rel_size(REL, full) == MANY
        assert not bench.datadir.rel_exists(REL, drop)
        assert bench.datadir.list_rels(1663, 5, drop) == [OTHER]
        assert bench.datadir.get_rel_size(OTHER, drop) == MANY
        assert page(bench, OTHER, MANY - 1, drop) != b""
        assert bench.datadir.get_rel_size(REL, created) == 0
        assert bench.datadir.get_rel_pages(REL, 0, 3, again) == [
            ZERO_PAGE,
            (b"0 %X" % again).ljust(8192, b"\0"),
            ZERO_PAGE,
        ]
        assert bench.datadir.logical_size(again) == (MANY + 2) * 8192


def test_little_is_left_to_the_next_image(bench: Bench) -> None:
    fill(bench, REL, 127)
    truncate(bench, 0)
    fill(bench, REL, 127)
    bench.add(Rmgr.XACT, 0x80, commit_data(rels=[REL]), xid=1000)
    assert deleted(bench) == []


def test_forks_count_together(bench: Bench) -> None:
    fill(bench, REL, 126)
    fill(bench, VM, 2)
    drop = bench.add(Rmgr.XACT, 0x20 | 0x80, commit_data(rels=[REL]), xid=1000)
    assert [lsn for _, _, lsn in deleted(bench)] == [drop]


def test_truncated_relation(bench: Bench) -> None:
    kept = bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 9, will_init=True)])
    full = fill(bench, REL, MANY)
    cut = truncate(bench, 10)
    assert deleted(bench) == [(*keys.fork_range(REL, 10), cut)]
    grown = bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 50)])
    for settled in (False, True):
        if settled:
            settle(bench)
        assert page(bench, REL, MANY - 1, full) == b"0 %X" % full
        assert bench.datadir.get_rel_size(REL, cut) == 10
        assert page(bench, REL, 9, cut) == page(bench, REL, 9, grown) == b"0 %X" % kept
        assert bench.datadir.get_rel_pages(REL, 10, 40, grown) == [ZERO_PAGE] * 40
        # Not on top of what the block held before it was cut off.
        assert page(bench, REL, 50, grown) == b"0 %X" % grown


def test_forks_are_cut_each_by_itself(bench: Bench) -> None:
    fill(bench, FSM, MANY)
    full = fill(bench, REL, MANY)
    cut = truncate(bench, MANY - 5)
    assert deleted(bench) == [(*keys.fork_range(FSM, 0), cut)]
    assert page(bench, REL, MANY - 6, cut) == b""
    assert page(bench, REL, MANY - 1, full) == b"0 %X" % full


def test_dropped_database(bench: Bench) -> None:
    """One range for all its relations, whose sizes and neighbours do not lie in it."""
    here, there = REL._replace(dbnode=6), REL._replace(dbnode=7)
    for rel in (here, here._replace(relnode=0xFFFFFFFE), there):
        full = fill(bench, rel, 100)
    drop = bench.add(Rmgr.DBASE, 0x20, struct.pack("<IiI", 6, 1, 1663))
    assert deleted(bench) == [(*keys.database_range(1663, 6), drop)]
    again = fill(bench, here, 1)
    for settled in (False, True):
        if settled:
            settle(bench)
        assert bench.datadir.get_rel_size(here, full) == 100
        assert page(bench, here, 99, full) != b""
        assert (1663, 6) not in bench.datadir.list_dbs(drop)
        assert bench.datadir.list_rels(1663, 6, drop) == []
        assert bench.datadir.get_rel_size(there, drop) == 100
        assert page(bench, there, 99, drop) == b"0 %X" % full
        assert page(bench, here, 0, again) == b"0 %X" % again
        assert bench.datadir.list_rels(1663, 6, again) == [here]


def test_database_copied_over_another(bench: Bench) -> None:
    """What the record itself writes is not deleted by it."""
    here = REL._replace(dbnode=6)
    source = fill(bench, REL, 2)
    fill(bench, here, MANY)
    copied = bench.add(Rmgr.DBASE, 0x00, struct.pack("<IIII", 6, 1663, 5, 1663))
    assert deleted(bench) == []
    for settled in (False, True):
        if settled:
            settle(bench)
        assert bench.datadir.get_rel_size(here, copied) == 2
        assert page(bench, here, 1, copied) == b"0 %X" % source


def test_ranges_end_where_the_next_object_begins() -> None:
    last = RelTag(1663, 5, 0xFFFFFFFF, 3)
    start, end = keys.relation_range(*last[:3])
    assert start <= keys.rel_block_key(last, 0) < end <= keys.relmap_key(1663, 6)
    start, end = keys.database_range(1663, 5)
    assert keys.relmap_key(1663, 5) < keys.rel_size_key(last) < start
    assert start <= keys.rel_block_key(RelTag(1663, 5, 1, 0), 0)
    assert keys.rel_block_key(last, 0xFFFFFFFF) < end <= keys.relmap_key(1663, 6)
    start, end = keys.fork_range(REL, 5)
    assert start == keys.rel_block_key(REL, 5)
    assert keys.rel_block_key(REL, 0xFFFFFFFE) < end <= keys.rel_block_key(FSM, 0)
