"""Redo of real WAL: every page that a workload changed, rebuilt and compared with the server's."""

import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.redo_support import PAGE_SIZE, VARIANTS, Recording, record, redo_request

from pageserver.walredo import RedoRequest, WalRedoError, WalRedoPool
from pgxn.build import build_module
from postgres_ffi.distrib import find_distrib
from postgres_ffi.relfile import (
    FSM_FORKNUM,
    INIT_FORKNUM,
    MAIN_FORKNUM,
    VISIBILITYMAP_FORKNUM,
    RelTag,
)
from postgres_ffi.versions import Rmgr
from zenith_utils.crc32c import crc32c
from zenith_utils.os_user import give

HEADER_SIZE = 24
XLOG_HEAP_INIT_PAGE = 0x80
XLOG_HEAP2_VISIBLE = 0x40
XLOG_HEAP2_MULTI_INSERT = 0x50
BKPBLOCK_HAS_IMAGE = 0x10
HEAPBLOCKS_PER_VM_PAGE = (PAGE_SIZE - HEADER_SIZE) * 4

MASKS = {
    "heap": Rmgr.HEAP,
    "btree": Rmgr.BTREE,
    "hash": Rmgr.HASH,
    "gin": Rmgr.GIN,
    "gist": Rmgr.GIST,
    "spgist": Rmgr.SPGIST,
    "brin": Rmgr.BRIN,
}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory that the unprivileged user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="redo-"))
    path.chmod(0o755)
    give(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module", params=list(VARIANTS))
def recording(request: pytest.FixtureRequest, scratch: Path) -> Recording:
    root = scratch / request.param
    root.mkdir(mode=0o755)
    give(root)
    return record(find_distrib(), VARIANTS[request.param], root)


@pytest.fixture(scope="module")
def pool(recording: Recording, scratch: Path) -> Iterator[WalRedoPool]:
    pool = WalRedoPool(
        recording.distrib,
        build_module(recording.distrib, "walredo"),
        scratch / "redo",
        control_file=recording.control_file,
        wal_log_hints=recording.variant.wal_log_hints,
        max_processes=1,
        timeout=30,
    )
    yield pool
    pool.close()


def without_checksum(page: bytes) -> bytes:
    return page[:8] + bytes(2) + page[10:]


def explains(
    pool: WalRedoPool, recording: Recording, rel: RelTag, blkno: int, ours: bytes, theirs: bytes
) -> bool:
    """Whether two different pages differ only in what WAL does not determine."""
    if rel.forknum == FSM_FORKNUM:  # logged only if a hint changes it
        return True
    if rel.forknum == INIT_FORKNUM:  # some are written before they are logged
        return ours[8:] == theirs[8:]
    _, am = recording.kind(rel)
    if am == "seq":  # WAL logs values ahead of those handed out
        return ours[:8160] == theirs[:8160] and ours[8176:] == theirs[8176:]
    if am == "spgist" and blkno == 0:  # the cache of last used pages
        return ours[: HEADER_SIZE + 4] == theirs[: HEADER_SIZE + 4]
    if am not in MASKS:
        return False
    return pool.mask(MASKS[am], blkno, ours) == pool.mask(MASKS[am], blkno, theirs)


def test_every_changed_page_equals_the_servers(recording: Recording, pool: WalRedoPool) -> None:
    started = pool.processes_started
    # clears of the visibility map are not among the records of its pages
    keys = [
        (rel, blkno)
        for rel, blkno in sorted(recording.chains)
        if rel.forknum != VISIBILITYMAP_FORKNUM or recording.kind(rel)[0] == "still"
    ]
    pages = pool.redo([recording.request(*key) for key in keys])

    compared: Counter[object] = Counter()
    wrong = []
    for (rel, blkno), page in zip(keys, pages, strict=True):
        final = recording.page(recording.after, rel, blkno)
        if final is None:
            continue
        ours, theirs = without_checksum(page), without_checksum(final)
        if ours != theirs and not explains(pool, recording, rel, blkno, ours, theirs):
            wrong.append((rel, blkno, recording.kind(rel), len(recording.chains[rel, blkno])))
        else:
            compared[recording.kind(rel)[1] if rel.forknum == MAIN_FORKNUM else rel.forknum] += 1
    assert not wrong
    assert {*MASKS, "seq", VISIBILITYMAP_FORKNUM, INIT_FORKNUM} <= set(compared)
    assert pool.processes_started == max(started, 1)


def test_losing_a_record_is_noticed_by_the_comparison(
    recording: Recording, pool: WalRedoPool
) -> None:
    """The comparison above is not one that always agrees."""
    keys = [
        key for key in recording.pages_of("log", MAIN_FORKNUM) if len(recording.chains[key]) > 1
    ]
    assert len(keys) > 10
    for rel, blkno in keys:
        complete = recording.request(rel, blkno)
        short = redo_request(rel, blkno, complete.base, complete.records[:-1])
        before, after = pool.redo([short, complete])
        assert pool.mask(Rmgr.HEAP, blkno, before) != pool.mask(Rmgr.HEAP, blkno, after)


# Records with block numbers that the workload cannot reach


def with_crc(raw: bytes) -> bytes:
    crc = crc32c(raw[:20], crc32c(raw[HEADER_SIZE:]))
    return raw[:20] + struct.pack("<I", crc) + raw[HEADER_SIZE:]


def page_image_record(rel: RelTag, blkno: int, image: bytes) -> bytes:
    """An XLOG_FPI record with one whole page (access/xlogrecord.h)."""
    block = struct.pack("<BBHHHB", 0, rel.forknum | BKPBLOCK_HAS_IMAGE, 0, PAGE_SIZE, 0, 0x02)
    block += struct.pack("<4I", *rel[:3], blkno)
    length = HEADER_SIZE + len(block) + PAGE_SIZE
    header = struct.pack("<IIQBBxxI", length, 0, 0, 0xB0, Rmgr.XLOG, 0)
    return with_crc(header + block + image)


def renumbered(raw: bytes, rel: RelTag, old: int, new: int) -> bytes:
    """The record with the number of one of its blocks changed."""
    tag = struct.pack("<4I", *rel[:3], old)
    assert raw.count(tag) == 1
    return with_crc(raw.replace(tag, struct.pack("<4I", *rel[:3], new)))


def test_image_of_any_fork_and_block(pool: WalRedoPool) -> None:
    lsn = 0x7_0000_1000
    images, requests = [], []
    for forknum in range(4):
        for blkno in (0, 131071, 131072, 3_000_000_000, 0xFFFFFFFD):
            rel = RelTag(1663, 5, 99999, forknum)
            image = random.Random(blkno).randbytes(PAGE_SIZE)
            record = page_image_record(rel, blkno, image)
            images.append(image)
            requests.append(redo_request(rel, blkno, None, [(lsn, record)]))
    for page, image in zip(pool.redo(requests), images, strict=True):
        assert page[8:] == image[8:]
        assert struct.unpack_from("<II", page) == (lsn >> 32, lsn & 0xFFFFFFFF)


def ctids(page: bytes) -> list[tuple[int, int]]:
    """(block, offset number) in t_ctid of each tuple of a heap page."""
    (lower,) = struct.unpack_from("<H", page, 12)
    found = []
    for (line_pointer,) in struct.iter_unpack("<I", page[HEADER_SIZE:lower]):
        high, low, offset = struct.unpack_from("<HHH", page, (line_pointer & 0x7FFF) + 12)
        found.append((high << 16 | low, offset))
    return found


@pytest.mark.parametrize("blkno", [131072, 0xFFFFFFFD])
def test_heap_insert_beyond_a_gigabyte(recording: Recording, pool: WalRedoPool, blkno: int) -> None:
    """A page filled by one record: redo looks at its free space map, far out in that fork."""
    rel, old = recording.pages_of("filled", MAIN_FORKNUM)[0]
    ((lsn, raw),) = recording.chains[rel, old]
    assert raw[17] == Rmgr.HEAP2
    assert raw[16] & 0xF0 == XLOG_HEAP2_MULTI_INSERT | XLOG_HEAP_INIT_PAGE
    expected, page = pool.redo(
        [
            redo_request(rel, old, None, [(lsn, raw)]),
            redo_request(rel, blkno, None, [(lsn, renumbered(raw, rel, old, blkno))]),
        ]
    )
    assert pool.mask(Rmgr.HEAP, old, expected) == pool.mask(
        Rmgr.HEAP, old, recording.page(recording.after, rel, old) or b""
    )
    # every tuple points to itself
    assert [ctid[0] for ctid in ctids(page)] == [blkno] * 226
    assert [ctid[1] for ctid in ctids(page)] == [ctid[1] for ctid in ctids(expected)]


def test_visibility_of_a_block_beyond_a_gigabyte(recording: Recording, pool: WalRedoPool) -> None:
    visible = next(
        r
        for r in recording.records
        if r.rmid == Rmgr.HEAP2
        and r.rmgr_info & 0x70 == XLOG_HEAP2_VISIBLE
        and recording.kind(r.blocks[0].rel)[0] == "still"
        and r.blocks[0].image is None
    )
    vm, heap = visible.blocks
    far = 0xFFFFFFFD
    tail = bytes([0xFF, len(visible.main_data)]) + visible.main_data  # XLR_BLOCK_ID_DATA_SHORT
    raw = visible.raw.replace(struct.pack("<I", heap.blkno) + tail, struct.pack("<I", far) + tail)
    raw = raw.replace(
        struct.pack("<4I", *vm.rel[:3], vm.blkno),
        struct.pack("<4I", *vm.rel[:3], far // HEAPBLOCKS_PER_VM_PAGE),
    )
    request = redo_request(
        vm.rel, far // HEAPBLOCKS_PER_VM_PAGE, None, [(visible.end_lsn, with_crc(raw))]
    )
    (page,) = pool.redo([request])
    bits = page[HEADER_SIZE + far % HEAPBLOCKS_PER_VM_PAGE // 4] >> (far % 4 * 2) & 3
    assert bits == visible.main_data[-1] & 3
    assert page.count(0, HEADER_SIZE) == PAGE_SIZE - HEADER_SIZE - 1


# Records that lie


def chains_to_damage(recording: Recording) -> list[RedoRequest]:
    keys = [key for key in sorted(recording.chains) if key[0].forknum != FSM_FORKNUM]
    rng = random.Random(15)
    return [recording.request(*key) for key in rng.sample(keys, 60)]


def damaged(request: RedoRequest, rng: random.Random) -> RedoRequest:
    """The request with some bytes of one record changed, its CRC valid."""
    records = list(request.records)
    i = rng.randrange(len(records))
    raw = bytearray(records[i][1])
    for _ in range(rng.randint(1, 3)):
        raw[rng.choice([16, *range(HEADER_SIZE, len(raw))])] = rng.randrange(256)
    records[i] = (records[i][0], with_crc(bytes(raw)))
    return request._replace(records=records)


def test_damaged_records_do_not_harm_others(recording: Recording, pool: WalRedoPool) -> None:
    rng = random.Random(recording.variant.settings)
    victims = chains_to_damage(recording)
    canaries = [recording.request(*key) for key in recording.pages_of("heap", MAIN_FORKNUM)[:2]]
    expected = pool.redo(canaries)
    errors = 0
    for victim in victims:
        first, outcome, second = pool.redo_each([canaries[0], damaged(victim, rng), canaries[1]])
        assert [first, second] == expected
        errors += isinstance(outcome, WalRedoError)
    assert errors > 10
    assert pool.redo(victims)


def test_an_error_names_page_and_records(recording: Recording, pool: WalRedoPool) -> None:
    """Records without the page they were written for; the rest of the batch is served."""
    rel, blkno = recording.pages_of("heap_pkey", MAIN_FORKNUM)[1]
    good = recording.request(rel, blkno)
    chain = [r for r in good.records if r[1][17] == Rmgr.BTREE][-2:]
    lost = redo_request(rel, blkno, None, chain)
    first, error, last = pool.redo_each([good, lost, good])
    assert first == last
    assert isinstance(error, WalRedoError)
    assert f"page {blkno} of relation {rel[0]}/{rel[1]}/{rel[2]} fork 0" in str(error)
    assert f"from {chain[0][0] >> 32:X}/{chain[0][0] & 0xFFFFFFFF:X}" in str(error)
    with pytest.raises(WalRedoError, match="no content yet"):
        pool.redo([good, lost])


def test_records_of_another_page_are_refused(recording: Recording, pool: WalRedoPool) -> None:
    rel, blkno = next(
        key for key in recording.pages_of("log", MAIN_FORKNUM) if len(recording.chains[key]) > 1
    )
    good = recording.request(rel, blkno)
    pool.redo([good])
    started = pool.processes_started
    outcome = pool.redo_each(
        [
            redo_request(rel, blkno + 1, good.base, good.records),
            redo_request(rel, blkno, good.base, good.records[::-1]),
        ]
    )
    assert "does not refer to the page" in str(outcome[0])
    assert "not in LSN order" in str(outcome[1])
    pool.redo([good])
    assert pool.processes_started == started


def test_a_base_newer_than_the_records_is_refused(recording: Recording, pool: WalRedoPool) -> None:
    rel, blkno = recording.pages_of("log_brin", MAIN_FORKNUM)[1]
    good = recording.request(rel, blkno)
    records = [r for r in good.records if r[1][17] == Rmgr.BRIN]
    (page,) = pool.redo([good])
    with pytest.raises(WalRedoError, match="beyond its last record"):
        pool.redo([redo_request(rel, blkno, page, records[-3:-2])])
