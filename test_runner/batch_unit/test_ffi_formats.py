"""Postgres' formats without a server: arithmetic, names, damage, and finding an installation."""

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from postgres_ffi import slru, xact_records, xlog_records
from postgres_ffi.checkpoint import CheckPoint, encode_checkpoint, parse_checkpoint
from postgres_ffi.control_file import ControlFile, ControlFileError, DBState, parse_control_file
from postgres_ffi.decoded_record import DecodedBlock, DecodedRecord
from postgres_ffi.distrib import DistribError, find_distrib
from postgres_ffi.heap_records import VmClear, vm_clears, vm_position
from postgres_ffi.page import is_new, page_lsn, parse_page_header, set_page_lsn
from postgres_ffi.page_checksum import checksum_page, set_checksums
from postgres_ffi.record_reader import RecordFormatError, RelFileNode
from postgres_ffi.relfile import RelTag, parse_rel_file_name, parse_relpath, relpath
from postgres_ffi.relmap import RelMapError, parse_relmap
from postgres_ffi.slru import SlruKind
from postgres_ffi.startup_wal import build_startup_wal
from postgres_ffi.versions import VERSIONS, Rmgr, UnsupportedVersionError, version_of_major
from postgres_ffi.wal_format import (
    end_of_bytes,
    normalize_lsn,
    parse_wal_file_name,
    wal_file_name,
)
from zenith_utils.crc32c import crc32c

V15 = VERSIONS[15]
SEG = 16 << 20
CHECKPOINT = CheckPoint(
    redo=0x5000028,
    this_timeline_id=1,
    prev_timeline_id=1,
    full_page_writes=True,
    next_xid=(3 << 32) | 700,
    next_oid=16384,
    next_multi=1,
    next_multi_offset=0,
    oldest_xid=716,
    oldest_xid_db=1,
    oldest_multi=1,
    oldest_multi_db=1,
    time=1700000000,
    oldest_commit_ts_xid=0,
    newest_commit_ts_xid=0,
    oldest_active_xid=0,
)


# ---- WAL addresses


@pytest.mark.parametrize(
    ("lsn", "expected"),
    [
        (SEG, SEG + 40),
        (SEG + 39, SEG + 40),
        (SEG + 41, SEG + 48),
        (SEG + 8192, SEG + 8192 + 24),
        (SEG + 8192 + 8, SEG + 8192 + 24),
        (SEG + 8191, SEG + 8192 + 24),
        (2 * SEG - 1, 2 * SEG + 40),
        (SEG + 12345, SEG + 12352),
    ],
)
def test_normalized_lsn_is_where_a_record_can_start(lsn: int, expected: int) -> None:
    assert normalize_lsn(lsn) == expected


def test_end_of_bytes_steps_over_page_headers() -> None:
    assert end_of_bytes(SEG + 40, 8152) == SEG + 8192
    assert end_of_bytes(SEG + 40, 8153) == SEG + 8192 + 25
    assert end_of_bytes(SEG + 8192, 8168 * 2) == SEG + 3 * 8192
    assert end_of_bytes(2 * SEG - 8, 9) == 2 * SEG + 41


def test_wal_file_names() -> None:
    assert wal_file_name(1, 0x1FF) == "0000000100000001000000FF"
    assert parse_wal_file_name("0000000100000001000000FF") == (1, 0x1FF)
    assert wal_file_name(5, 3, 1 << 30) == "000000050000000000000003"
    for bad in ("000000010000000100000100", "0000000100000001000000ff", "00000001", "x" * 24):
        assert parse_wal_file_name(bad) is None


# ---- relation files


@pytest.mark.parametrize(
    ("rel", "segno", "path"),
    [
        (RelTag(1663, 5, 16384, 0), 0, "base/5/16384"),
        (RelTag(1663, 5, 16384, 2), 3, "base/5/16384_vm.3"),
        (RelTag(1664, 0, 1262, 1), 0, "global/1262_fsm"),
        (RelTag(16999, 5, 17000, 3), 1, "pg_tblspc/16999/PG_15_202209061/5/17000_init.1"),
    ],
)
def test_relation_paths(rel: RelTag, segno: int, path: str) -> None:
    assert relpath(rel, V15, segno) == path
    assert parse_relpath(path, V15) == (rel, segno)


@pytest.mark.parametrize(
    "name",
    [
        *("t3_16384", "pg_filenode.map", "PG_VERSION", "016384", "16384.0", "16384_"),
        *("4294967296", "16384_fsm.", "16384.1_vm", "\u0661\u0662", "16384\n", ""),
    ],
)
def test_other_files_are_no_relations(name: str) -> None:
    assert parse_rel_file_name(name) is None
    assert parse_relpath(f"base/5/{name}", V15) is None


def test_paths_outside_databases_are_no_relations() -> None:
    for path in ("base/5/6/1", "pg_tblspc/1/PG_14_202107181/5/2", "base/x/1", "1", ""):
        assert parse_relpath(path, V15) is None


# ---- SLRUs


def test_positions_in_slrus() -> None:
    assert slru.clog_position(32768 + 7) == (1, 1, 6)
    assert slru.multixact_offset_position(2049) == (1, 4)
    assert slru.multixact_member_position(0) == (0, 0, 4)
    assert slru.multixact_member_position(1636 + 6) == (1, 20 + 2, 20 + 4 + 8)
    assert slru.page_position(65) == (2, 1)
    assert slru.segment_file_name(0xAB) == "00AB"
    assert slru.parse_segment_file_name("14078") == 0x14078
    assert slru.parse_segment_file_name("00ab") is None


def test_clog_truncation_wraps_around() -> None:
    def deleted(cutoff_xid: int, segments: list[int]) -> list[int]:
        cutoff = cutoff_xid // slru.CLOG_XACTS_PER_PAGE
        return [s for s in segments if slru.may_delete_segment(SlruKind.CLOG, s, cutoff)]

    last = 0xFFFFFFFF // slru.CLOG_XACTS_PER_PAGE // 32
    assert deleted(3 * 32 * 32768, [0, 1, 2, 3, 4]) == [0, 1, 2]
    assert deleted(3 * 32 * 32768 - 1, [0, 1, 2, 3, 4]) == [0, 1]
    # behind the wraparound the highest segments are the oldest
    assert deleted(40 * 32768, [last - 1, last, 0, 1]) == [last - 1, last, 0]
    assert deleted(5, [last - 1, last, 0, 1]) == [last - 1, last]


def test_page_precedes_only_if_its_last_entry_does() -> None:
    half = (1 << 31) // slru.CLOG_XACTS_PER_PAGE
    assert slru.page_precedes(SlruKind.CLOG, 0, half - 1)
    assert not slru.page_precedes(SlruKind.CLOG, 0, half)
    assert not slru.page_precedes(SlruKind.CLOG, 0, 0)


def test_multixact_truncation_wraps_around() -> None:
    per_segment = slru.MULTIXACT_MEMBERS_PER_PAGE * 32
    last = 0xFFFFFFFF // per_segment
    segments = slru.deleted_member_segments(per_segment * (last - 1), per_segment * 2 + 5)
    assert list(segments) == [last - 1, last, 0, 1]
    assert list(slru.deleted_member_segments(5, 6)) == []
    assert slru.offsets_cutoff_page(2048) == 0
    assert slru.offsets_cutoff_page(1) == 0xFFFFFFFF // 2048
    assert slru.next_multixact_id(0xFFFFFFFF) == 1
    assert slru.may_delete_segment(SlruKind.MULTIXACT_OFFSETS, 0, 64)
    assert not slru.may_delete_segment(SlruKind.MULTIXACT_OFFSETS, 1, 63)


# ---- pg_control, checkpoint, relation map


def control_file() -> ControlFile:
    data = bytearray(V15.control_file.size)
    V15.control_file.pack_into(data, {"control_version": 1300, "catalog_version": 202209061})
    blank = ControlFile(V15, bytes(data))
    return blank.with_fields({"state": DBState.IN_PRODUCTION, "system_identifier": 1 << 63})


def test_checkpoint_round_trip() -> None:
    encoded = encode_checkpoint(CHECKPOINT, V15)
    assert len(encoded) == 88
    assert parse_checkpoint(encoded, V15) == CHECKPOINT
    assert struct.unpack_from("<Q", encoded, 24) == ((3 << 32) | 700,)
    with pytest.raises(ValueError, match="88 bytes"):
        parse_checkpoint(encoded + b"\0", V15)


def test_control_file_changes_only_what_is_named() -> None:
    control = control_file()
    changed = control.with_checkpoint(0x5000028, CHECKPOINT)
    assert (changed.checkpoint_lsn, changed.checkpoint) == (0x5000028, CHECKPOINT)
    assert (changed.state, changed.system_identifier) == (DBState.IN_PRODUCTION, 1 << 63)
    file = changed.file_bytes()
    assert len(file) == 8192
    assert parse_control_file(file) == parse_control_file(file[:292].ljust(296, b"\0")) == changed
    with pytest.raises(KeyError):
        control.with_fields({"no_such_field": 1})


def test_damaged_control_file_is_refused() -> None:
    file = control_file().file_bytes()
    for offset in (0, 16, 100, 287, 288, 291):
        damaged = bytearray(file)
        damaged[offset] ^= 1
        with pytest.raises(ControlFileError, match="damaged"):
            parse_control_file(damaged)
    with pytest.raises(ControlFileError, match="291 bytes"):
        parse_control_file(file[:291])
    other = bytearray(file)
    struct.pack_into("<I", other, 8, 1201)
    with pytest.raises(UnsupportedVersionError, match="1201"):
        parse_control_file(other)


def test_relation_map() -> None:
    body = struct.pack("<IiIIII", 0x592717, 2, 1259, 16400, 1249, 1249).ljust(504, b"\0")
    good = body + struct.pack("<II", crc32c(body), 0)
    assert parse_relmap(good) == {1259: 16400, 1249: 1249}
    for offset in (0, 4, 8, 504):
        damaged = bytearray(good)
        damaged[offset] ^= 1
        with pytest.raises(RelMapError):
            parse_relmap(damaged)
    with pytest.raises(RelMapError):
        parse_relmap(good[:511])


def test_unsupported_major_version() -> None:
    with pytest.raises(UnsupportedVersionError, match="PostgreSQL 14 is not supported"):
        version_of_major(14)


# ---- pages


def reference_checksum(page: bytes, blkno: int) -> int:
    """storage/checksum_impl.h in plain Python."""
    source = (Path(__file__).parents[2] / "postgres_ffi/page_checksum.pyx").read_text()
    table = source[source.index("zenith_checksum_start[") :]
    sums = [int(word, 16) for word in re.findall(r"0x[0-9A-F]{8}", table)[:32]]
    words = struct.unpack("<2048I", page[:8] + b"\0\0" + page[10:]) + (0,) * 64
    for i, word in enumerate(words):
        mixed = sums[i % 32] ^ word
        sums[i % 32] = (mixed * 16777619 ^ mixed >> 17) & 0xFFFFFFFF
    result = blkno
    for column in sums:
        result ^= column
    return result % 65535 + 1


def test_checksums_of_a_run_of_pages() -> None:
    pages = bytearray(bytes(range(1, 256)) * 130)[: 4 * 8192]
    pages[8192:16384] = bytes(8192)
    expected = bytearray(pages)
    for i in (0, 2, 3):
        checksum = reference_checksum(bytes(pages[i * 8192 : (i + 1) * 8192]), 0xFFFFFFFC + i)
        struct.pack_into("<H", expected, i * 8192 + 8, checksum)
        assert checksum_page(pages[i * 8192 : (i + 1) * 8192], 0xFFFFFFFC + i) == checksum
    set_checksums(pages, 0xFFFFFFFC)
    assert pages == expected
    assert is_new(pages[8192:16384]) and not is_new(pages[:8192])
    for size in (0, 8191):
        with pytest.raises(ValueError, match="page"):
            checksum_page(bytes(size), 0)
    with pytest.raises(ValueError, match="whole number of pages"):
        set_checksums(bytearray(8193), 0)


def test_page_header() -> None:
    page = bytearray(struct.pack("<IIHHHHHHI", 0, 0, 7, 4, 32, 8000, 8176, 0x2004, 99).ljust(8192))
    set_page_lsn(page, 0x1_2345_6789_ABCD)
    header = parse_page_header(page)
    assert page_lsn(page) == header.lsn == 0x1_2345_6789_ABCD
    assert page[:8] == struct.pack("<II", 0x12345, 0x6789ABCD)
    assert (header.checksum, header.flags, header.lower, header.upper) == (7, 4, 32, 8000)
    assert (header.special, header.size, header.layout_version) == (8176, 8192, 4)
    assert header.prune_xid == 99


# ---- records


NODE = struct.pack("<III", 1663, 5, 16384)
COMMIT = struct.pack("<qIIIiII", 1, 0x1FF & ~0x40, 5, 1663, 2, 701, 702)
COMMIT += struct.pack("<i", 1) + NODE + struct.pack("<iiII", 1, 2, 5, 9)
COMMIT += struct.pack("<i", 1) + bytes(16) + struct.pack("<I", 700) + b"gid\0"
COMMIT += struct.pack("<Qq", 0xABC, 2)
PREPARE = struct.pack(
    "<IIIIqIiiiiii?xHQq", V15.twophase_magic, 128, 700, 5, 1, 10, 2, 1, 1, 0, 0, 0, False, 4, 7, 8
)
PREPARE += b"gid\0\0\0\0\0" + struct.pack("<II", 701, 702) + NODE + bytes(4) + NODE
EXAMPLES: list[tuple[Callable[[bytes], object], bytes]] = [
    (lambda data: xact_records.parse_xact_end(data, 0x80 | 0x30, V15), COMMIT),
    (lambda data: xact_records.parse_xact_prepare(data, V15), PREPARE.ljust(124, b"\0")),
    (xlog_records.parse_smgr_create, NODE + struct.pack("<i", 3)),
    (xlog_records.parse_smgr_truncate, struct.pack("<I", 9) + NODE + struct.pack("<i", 7)),
    (xlog_records.parse_dbase_create_file_copy, struct.pack("<IIII", 1, 2, 3, 4)),
    (xlog_records.parse_dbase_create_wal_log, struct.pack("<II", 1, 2)),
    (xlog_records.parse_dbase_drop, struct.pack("<IiII", 1, 2, 1663, 1700)),
    (xlog_records.parse_tblspc_create, struct.pack("<I", 1) + b"/x\0"),
    (xlog_records.parse_tblspc_drop, struct.pack("<I", 1)),
    (lambda data: xlog_records.parse_zero_page(data, V15), struct.pack("<i", 4)),
    (lambda data: xlog_records.parse_clog_truncate(data, V15), struct.pack("<iII", 4, 5, 6)),
    (xlog_records.parse_multixact_create, struct.pack("<IIiIIII", 1, 2, 2, 700, 5, 701, 0)),
    (xlog_records.parse_multixact_truncate, struct.pack("<5I", 1, 2, 3, 4, 5)),
    (xlog_records.parse_relmap_update, struct.pack("<IIi", 5, 1663, 3) + b"abc"),
    (xlog_records.parse_next_oid, struct.pack("<I", 1)),
    (xlog_records.parse_parameter_change, struct.pack("<6i2?", 1, 2, 3, 4, 5, 6, True, False)),
    (xlog_records.parse_fpw_change, b"\1"),
    (xlog_records.parse_overwrite_contrecord, struct.pack("<Qq", 1, 2)),
    (xlog_records.parse_replorigin_set, struct.pack("<QH?", 1, 2, True)),
    (xlog_records.parse_replorigin_drop, struct.pack("<H", 2)),
]


@pytest.mark.parametrize(("parse", "data"), EXAMPLES)
def test_short_records_are_refused(parse: Callable[[bytes], object], data: bytes) -> None:
    parse(data)
    for size in range(len(data)):
        with pytest.raises(RecordFormatError):
            parse(data[:size])


def test_every_part_of_a_commit() -> None:
    end = xact_records.parse_xact_end(COMMIT, 0x80 | xact_records.XLOG_XACT_COMMIT_PREPARED, V15)
    assert end.committed and end.prepared
    assert (end.dbnode, end.spcnode, end.subxacts) == (5, 1663, (701, 702))
    assert end.relations == (RelFileNode(1663, 5, 16384),)
    assert (end.twophase_xid, end.gid, end.origin_lsn) == (700, "gid", 0xABC)


def test_senseless_numbers_in_records_are_refused() -> None:
    bad: list[tuple[Callable[[bytes], object], bytes]] = [
        (xlog_records.parse_dbase_drop, struct.pack("<Ii", 1, -1)),
        (xlog_records.parse_multixact_create, struct.pack("<IIi", 1, 2, -1)),
        (xlog_records.parse_relmap_update, struct.pack("<IIi", 5, 1663, -3)),
        (xlog_records.parse_smgr_create, NODE + struct.pack("<i", 4)),
        (lambda data: xlog_records.parse_zero_page(data, V15), struct.pack("<i", -4)),
        (lambda data: xact_records.parse_xact_end(data, 0x10, V15), bytes(8)),
        (lambda data: xact_records.parse_xact_end(data, 0x30, V15), bytes(8)),
        (lambda data: xact_records.parse_xact_prepare(data, V15), bytes(80)),
    ]
    for parse, data in bad:
        with pytest.raises(RecordFormatError):
            parse(data)


def heap_record(rmid: int, info: int, main_data: bytes, *blknos: int) -> DecodedRecord:
    rel = RelTag(1663, 5, 16384, 0)
    blocks = tuple(
        DecodedBlock(i, rel, blkno, False, False, False, 0, 0, 0, None, b"")
        for i, blkno in enumerate(blknos)
    )
    return DecodedRecord(0, 0, 0, 0, 0, rmid, info, 0, blocks, main_data, b"")


@pytest.mark.parametrize(
    ("rmid", "info", "main_data", "blknos", "expected"),
    [
        (Rmgr.HEAP, 0x80, b"\1\0\1", (8,), [(8, 3)]),
        (Rmgr.HEAP, 0x00, b"\1\0\2", (8,), []),
        (Rmgr.HEAP, 0x10, bytes(7) + b"\1", (8,), [(8, 3)]),
        (Rmgr.HEAP, 0x20, bytes(7) + b"\3", (8, 9), [(9, 3), (8, 3)]),
        (Rmgr.HEAP, 0x40, bytes(7) + b"\1", (8,), [(8, 3)]),
        (Rmgr.HEAP, 0x20, bytes(7) + b"\2", (8, 9), [(8, 3)]),
        (Rmgr.HEAP, 0x60, bytes(7) + b"\1", (8,), [(8, 2)]),
        (Rmgr.HEAP2, 0x50, b"\1\0\0\0", (8,), [(8, 3)]),
        (Rmgr.HEAP2, 0x60, bytes(7) + b"\1", (8,), [(8, 2)]),
        (Rmgr.HEAP, 0x70, bytes(7) + b"\1", (8,), []),
        (Rmgr.BTREE, 0x00, b"\1\0\1", (8,), []),
    ],
)
def test_visibility_map_bits_that_heap_records_clear(
    rmid: int, info: int, main_data: bytes, blknos: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    clears = vm_clears(heap_record(rmid, info, main_data, *blknos))
    assert clears == tuple(
        VmClear(RelTag(1663, 5, 16384, 0), blkno, flags) for blkno, flags in expected
    )


def test_short_heap_record_is_refused() -> None:
    with pytest.raises(RecordFormatError):
        vm_clears(heap_record(Rmgr.HEAP, 0x10, bytes(7), 8))
    with pytest.raises(RecordFormatError):
        vm_clears(heap_record(Rmgr.HEAP, 0x10, bytes(8)))


def test_visibility_map_position() -> None:
    assert vm_position(0) == (0, 24, 0)
    assert vm_position(32672 + 7) == (1, 25, 6)


# ---- starting at an LSN


@pytest.mark.parametrize("lsn", [SEG, SEG + 8192, SEG + 44, SEG + 8192 + 16])
def test_startup_wal_only_where_a_record_can_start(lsn: int) -> None:
    with pytest.raises(ValueError, match="no WAL record can start"):
        build_startup_wal(
            replace(CHECKPOINT, redo=lsn), prev_lsn=8, version=V15, system_identifier=1
        )


def test_startup_wal_needs_an_earlier_record() -> None:
    with pytest.raises(ValueError, match="cannot start at"):
        build_startup_wal(CHECKPOINT, prev_lsn=0x5000028, version=V15, system_identifier=1)


# ---- distributions


def fake_distrib(root: Path, version: str) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    postgres = root / "bin/postgres"
    postgres.write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
    postgres.chmod(0o755)
    return root


def test_distribution_given_explicitly_or_by_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fake_distrib(tmp_path / "first", "15.7 (Debian 15.7-0)")
    second = fake_distrib(tmp_path / "second", "15.8")
    headers = second / "include/postgresql/server"
    headers.mkdir(parents=True)
    (headers / "postgres.h").touch()
    monkeypatch.setenv("POSTGRES_DISTRIB_DIR", str(second))
    found = find_distrib(first)
    assert (found.bin_dir, found.version_num, found.major) == (first / "bin", 150007, 15)
    assert (found.pkglib_dir, found.include_server_dir) == (first / "lib", None)
    assert found.version is V15
    found = find_distrib()
    assert (found.bin_dir, found.include_server_dir) == (second / "bin", headers)
    with pytest.raises(DistribError, match="Can't find initdb in"):
        found.binary("initdb")


def test_no_distribution(tmp_path: Path) -> None:
    with pytest.raises(DistribError, match=f"^Can't find postgres binary at {tmp_path}"):
        find_distrib(tmp_path)
    with pytest.raises(DistribError, match=r"PostgreSQL 14 at .* is not supported: install"):
        find_distrib(fake_distrib(tmp_path / "old", "14.2"))
    with pytest.raises(DistribError, match="no release version"):
        find_distrib(fake_distrib(tmp_path / "odd", "devel"))


@pytest.mark.parametrize("version", ["15.0", "15.12", "15beta2"])
def test_releases_whose_commits_do_not_wait_are_refused(tmp_path: Path, version: str) -> None:
    distrib = find_distrib(fake_distrib(tmp_path, version))
    with pytest.raises(DistribError, match=r"commits .*: install PostgreSQL 15\.13 or a later 15$"):
        distrib.require_commits_wait()


def test_the_first_release_whose_commits_wait(tmp_path: Path) -> None:
    distrib = find_distrib(fake_distrib(tmp_path, "15.13 (Debian 15.13-0+deb12u1)"))
    distrib.require_commits_wait()
    assert distrib.release == "15.13"
