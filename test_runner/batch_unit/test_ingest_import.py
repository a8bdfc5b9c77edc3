"""Import of data directories, and the pieces that records and directories are made of."""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.ingest_support import Cluster
from batch_unit.ingest_wal import RecordingRedo
from batch_unit.workspace import temporary_workspace
from hypothesis import given
from hypothesis import strategies as st

from pageserver import import_datadir as module
from pageserver import keys
from pageserver._custom_redo import apply_custom_records
from pageserver.directories import (
    DirectoryError,
    decode_databases,
    decode_numbers,
    decode_origins,
    decode_tablespaces,
    encode_databases,
    encode_numbers,
    encode_origins,
    encode_tablespaces,
)
from pageserver.import_datadir import ImportDatadirError, import_datadir
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.pgdatadir_mapping import DatadirTimeline, RelationNotFound
from pageserver.reconstruct import ReconstructError, make_reconstruct
from pageserver.values import ValueKind, value_flags
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.distrib import find_distrib
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import VERSIONS
from zenith_utils.ids import TenantId, TimelineId

u32 = st.integers(0, 0xFFFFFFFF)


@pytest.fixture(scope="module")
def fresh_cluster() -> Iterator[Path]:
    with temporary_workspace() as root:
        cluster = Cluster(find_distrib(), root / "data")
        cluster.run("initdb", "-A", "trust", "-N", "-D", cluster.datadir)
        yield cluster.datadir


@pytest.fixture
def datadir(fresh_cluster: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fresh_cluster, tmp_path / "data"))


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    path = tmp_path / "repository"
    path.mkdir()
    made = Repository(path, TenantId.generate(), StoreSettings(), make_reconstruct(RecordingRedo()))
    yield made
    made.shutdown(flush=False)


def test_fresh_cluster(datadir: Path, repository: Repository) -> None:
    control = parse_control_file((datadir / "global/pg_control").read_bytes())
    timeline = import_datadir(repository, TimelineId.generate(), datadir, 4711)
    end = timeline.last_record_lsn
    assert timeline.prev_record_lsn == control.checkpoint_lsn < end == timeline.initdb_lsn
    assert timeline.disk_consistent_lsn == end
    cluster = DatadirTimeline(timeline, VERSIONS[15])
    assert parse_control_file(cluster.control_file(end)).system_identifier == 4711
    assert cluster.checkpoint(end) == control.checkpoint_bytes
    assert cluster.list_dbs(end) == {(1663, n): True for n in (1, 4, 5)} | {(1664, 0): True}
    assert cluster.twophase_files(end) == {}
    assert cluster.replication_origins(end) == {}
    pages = 0
    for rel, nblocks in cluster.relation_sizes(end):
        suffix = ("", "_fsm", "_vm", "_init")[rel.forknum]
        where = f"base/{rel.dbnode}" if rel.dbnode else "global"
        content = (datadir / where / f"{rel.relnode}{suffix}").read_bytes()
        assert b"".join(cluster.get_rel_pages(rel, 0, nblocks, end)) == content
        pages += nblocks
    assert pages > 2500
    assert cluster.logical_size(end) == pages * 8192


def test_relations_of_several_segments(
    datadir: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELSEG_SIZE", 2)
    for path in [*datadir.glob("base/*/*"), *datadir.glob("global/*")]:
        if path.name[0].isdigit():
            content = path.read_bytes()
            for segno in range(len(content) // 16384 + 1):
                part = content[segno * 16384 : segno * 16384 + 16384]
                path.with_name(path.name + (f".{segno}" if segno else "")).write_bytes(part)
    class_file = datadir / "base/5/1255"
    numbers = range(1, len(list(datadir.glob("base/5/1255.*"))) + 1)
    suffixes = ["", *(f".{number}" for number in numbers)]
    whole = b"".join((datadir / f"base/5/1255{suffix}").read_bytes() for suffix in suffixes)
    assert len(class_file.read_bytes()) == 16384 < len(whole)
    timeline = import_datadir(repository, TimelineId.generate(), datadir, 1)
    cluster = DatadirTimeline(timeline, VERSIONS[15])
    lsn = timeline.last_record_lsn
    rel = RelTag(1663, 5, 1255, 0)
    pages = cluster.get_rel_pages(rel, 0, cluster.get_rel_size(rel, lsn), lsn)
    assert b"".join(pages) == whole
    (datadir / "base/5/1255.1").unlink()
    with pytest.raises(ImportDatadirError, match="segment 1 is missing"):
        import_datadir(repository, TimelineId.generate(), datadir, 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("state", "not shut down cleanly"),
        ("wal", "no checkpoint record"),
        ("strange", "not a file of a relation"),
        ("odd", "not a multiple"),
        ("relmap", "pg_filenode.map"),
        ("tablespace", "tablespaces"),
        ("twophase", "damaged"),
    ],
)
def test_directory_that_cannot_be_imported_leaves_nothing(
    datadir: Path, repository: Repository, damage: str, reason: str
) -> None:
    control_path = datadir / "global/pg_control"
    control = parse_control_file(control_path.read_bytes())
    match damage:
        case "state":
            control_path.write_bytes(control.with_fields({"state": 6}).file_bytes())
        case "wal":
            segment = next((datadir / "pg_wal").glob("0*"))
            content = bytearray(segment.read_bytes())
            content[control.checkpoint_lsn % (16 << 20) + 30] ^= 1
            segment.write_bytes(content)
        case "strange":
            (datadir / "base/5/core").write_bytes(b"")
        case "odd":
            with (datadir / "base/5/1255").open("ab") as file:
                file.write(b"x")
        case "relmap":
            (datadir / "base/5/pg_filenode.map").write_bytes(bytes(512))
        case "tablespace":
            (datadir / "pg_tblspc/16500").mkdir()
        case "twophase":
            (datadir / "pg_twophase/00000300").write_bytes(b"statecrc!")
    timeline_id = TimelineId.generate()
    with pytest.raises((ImportDatadirError, ValueError), match=reason):
        import_datadir(repository, timeline_id, datadir, 1)
    assert repository.timelines() == []
    assert not list((repository.path / "timelines").iterdir())


def test_relations_that_do_not_exist(datadir: Path, repository: Repository) -> None:
    timeline = import_datadir(repository, TimelineId.generate(), datadir, 1)
    cluster = DatadirTimeline(timeline, VERSIONS[15])
    lsn = timeline.last_record_lsn
    rel = RelTag(1663, 5, 99999, 0)
    assert not cluster.rel_exists(rel, lsn)
    assert cluster.get_rel_pages(rel, 7, 2, lsn) == [ZERO_PAGE] * 2
    assert cluster.get_rel_size(rel._replace(forknum=1), lsn) == 0
    assert cluster.get_rel_size(rel._replace(forknum=2), lsn) == 0
    with pytest.raises(RelationNotFound, match="1663/5/99999"):
        cluster.get_rel_size(rel, lsn)
    existing = RelTag(1663, 5, 1255, 0)
    end = cluster.get_rel_size(existing, lsn)
    pages = cluster.get_rel_pages(existing, end - 1, 3, lsn)
    assert pages[0] != ZERO_PAGE and pages[1:] == [ZERO_PAGE] * 2


# ---- reconstruction


def custom(kind: ValueKind, data: bytes, *, will_init: bool = False) -> tuple[int, int, bytes]:
    return 0x100, value_flags(kind, will_init), data


@given(st.lists(st.tuples(st.sampled_from(["set", "clear", "freeze", "cut"]), st.integers(0, 600))))
def test_visibility_map_changes(changes: list[tuple[str, int]]) -> None:
    bits = dict.fromkeys(range(700), 0)
    values = [custom(ValueKind.SET_VM, struct.pack("<BI", 1, 699), will_init=True)]
    bits[699] = 1
    for what, block in changes:
        match what:
            case "set":
                bits[block] |= 3
                values.append(custom(ValueKind.SET_VM, struct.pack("<BI", 3, block)))
            case "clear":
                bits[block] = 0
                values.append(custom(ValueKind.CLEAR_VM, struct.pack("<BI", 3, 32672 * 5 + block)))
            case "freeze":
                bits[block] &= 1
                bits[block + 1] &= 1
                data = struct.pack("<BII", 2, block, block + 1)
                values.append(custom(ValueKind.CLEAR_VM, data))
            case "cut":
                bits |= dict.fromkeys(range(block, 700), 0)
                values.append(custom(ValueKind.TRUNCATE_VM, struct.pack("<I", block)))
    page = apply_custom_records(ZERO_PAGE, values)
    assert {block: page[24 + block // 4] >> (block % 4 * 2) & 3 for block in bits} == bits
    assert not any(page[24 + 175 :])


@given(st.integers(1, 8), st.binary(max_size=40))
def test_malformed_changes_are_refused_or_stay_on_the_page(kind: int, data: bytes) -> None:
    try:
        page = apply_custom_records(ZERO_PAGE, [(8, kind << 1, data)])
    except ValueError:
        return
    assert len(page) == 8192


def test_runs_of_postgres_and_other_records_are_applied_in_their_order() -> None:
    redo = RecordingRedo()
    rel = RelTag(1663, 5, 16384, 2)
    clear = struct.pack("<BI", 3, 0)
    vm = ReconstructInput(
        keys.rel_block_key(rel, 0),
        0x50,
        b"",
        [
            (0x10, value_flags(ValueKind.PG_RECORD), b"a"),
            (0x18, value_flags(ValueKind.PG_RECORD), b"b"),
            (0x20, value_flags(ValueKind.CLEAR_VM), clear),
            (0x50, value_flags(ValueKind.PG_RECORD), b"c"),
        ],
    )
    heap = ReconstructInput(
        keys.rel_block_key(rel._replace(forknum=0), 3),
        0x40,
        None,
        [(0x40, value_flags(ValueKind.PG_RECORD, True), b"d")],
    )
    pages = make_reconstruct(redo)([vm, heap])
    assert [page.rstrip(b"\0") for page in pages] == [b"0 10 18 50", b"0 40"]
    assert [(r.forknum, r.blkno, r.base is None, list(r.records)) for r in redo.requests] == [
        (2, 0, False, [(0x10, b"a"), (0x18, b"b")]),
        (0, 3, True, [(0x40, b"d")]),
        (2, 0, False, [(0x50, b"c")]),
    ]


@pytest.mark.parametrize(
    ("key", "base", "flags"),
    [
        (keys.rel_block_key(RelTag(1663, 5, 16384, 0), 0), None, value_flags(ValueKind.PG_RECORD)),
        (keys.CHECKPOINT_KEY, b"x" * 8192, value_flags(ValueKind.PG_RECORD)),
        (keys.CHECKPOINT_KEY, b"short", value_flags(ValueKind.CLEAR_VM)),
        (keys.CHECKPOINT_KEY, b"x" * 8192, 99 << 1),
    ],
)
def test_values_that_make_no_sense_name_their_key(
    key: bytes, base: bytes | None, flags: int
) -> None:
    value = ReconstructInput(key, 0x40, base, [(0x40, flags, b"?")])
    with pytest.raises(ReconstructError, match=keys.key_text(key)):
        make_reconstruct(RecordingRedo())([value])


# ---- encodings


@given(st.dictionaries(st.tuples(u32, u32), st.booleans()), st.sets(u32))
def test_directories(databases: dict[tuple[int, int], bool], numbers: set[int]) -> None:
    assert decode_databases(encode_databases(databases)) == databases
    assert decode_numbers(encode_numbers(numbers)) == numbers
    with pytest.raises(DirectoryError):
        decode_numbers(encode_numbers(numbers)[:-1])


@given(
    st.dictionaries(st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1)),
    st.dictionaries(u32, st.text(alphabet="/abcäö ")),
)
def test_origins_and_tablespaces(origins: dict[int, int], tablespaces: dict[int, str]) -> None:
    assert decode_origins(encode_origins(origins)) == origins
    assert decode_tablespaces(encode_tablespaces(tablespaces)) == tablespaces
    with pytest.raises(DirectoryError):
        decode_tablespaces(encode_tablespaces(tablespaces) + b"x")


@given(
    st.tuples(u32, u32, st.integers(1, 0xFFFFFFFF), st.integers(0, 3)), st.integers(0, 0xFFFFFFFE)
)
def test_keys_sort_as_relations_do(fields: tuple[int, int, int, int], blkno: int) -> None:
    rel = RelTag(*fields)
    key = keys.rel_block_key(rel, blkno)
    assert keys.next_key(key) == keys.rel_block_key(rel, blkno + 1)
    size_key = keys.rel_size_key(rel)
    assert keys.rel_of_size_key(size_key) == rel
    start, end = keys.rel_size_range(rel.spcnode, rel.dbnode)
    assert start <= size_key < end <= key
