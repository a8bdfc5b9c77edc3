"""Import of a data directory that was shut down: the beginning of a timeline."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pageserver import keys
from pageserver.directories import (
    encode_databases,
    encode_numbers,
    encode_origins,
    encode_tablespaces,
)
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.timeline import Timeline
from postgres_ffi import xlog_records as wal
from postgres_ffi.control_file import ControlFile, DBState, parse_control_file
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.page import BLCKSZ, ZERO_PAGE
from postgres_ffi.relfile import (
    DEFAULTTABLESPACE_OID,
    GLOBALTABLESPACE_OID,
    RELSEG_SIZE,
    RelTag,
    parse_rel_file_name,
)
from postgres_ffi.relmap import RELMAP_FILE_NAME, parse_relmap
from postgres_ffi.slru import SLRU_PAGES_PER_SEGMENT, SlruKind, parse_segment_file_name
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import segment_number, wal_file_name
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import lsn_text

_READ_SIZE = 1 << 20
_COUNTERS = ("next_xid", "next_multi", "next_multi_offset")
_IGNORED_FILES = frozenset({"PG_VERSION", "pg_control", "pg_internal.init"})
_TEMPORARY_RELATION = re.compile(r"t[0-9]+_[0-9]+(?:_[a-z]+)?(?:\.[0-9]+)?")
_TWOPHASE_FILE = re.compile(r"[0-9A-F]{8}")
_CRC_SIZE = 4


class ImportDatadirError(Exception):
    """A data directory that cannot be imported; the message names the file and the reason."""


@dataclass(slots=True)
class _Database:
    """What was found of a database: its relation map and the segment files of its forks."""

    spcnode: int
    dbnode: int
    relmap: bytes | None = None
    forks: dict[RelTag, dict[int, Path]] = field(default_factory=dict)


def import_datadir(
    repo: Repository, timeline_id: TimelineId, pgdata: Path, system_identifier: int
) -> Timeline:
    """Make a root timeline of a cluster that was shut down cleanly, durable on return.

    The cluster gets `system_identifier`, its files stay as they are. The timeline starts at the end
    of the shutdown checkpoint's record, with everything in one image layer, so it is there as a
    whole or not at all. Raises ImportDatadirError, OSError, what parsing a damaged file raises
    (ValueError) and what the store raises (TimelineExists).
    """
    control = parse_control_file((pgdata / "global/pg_control").read_bytes())
    checkpoint = _read_checkpoint_record(pgdata, control)
    databases = _find_databases(pgdata)
    items = _all_items(
        pgdata, control.with_fields({"system_identifier": system_identifier}), databases
    )
    timeline = repo.create_timeline(timeline_id, initdb_lsn=checkpoint.end_lsn)
    try:
        timeline.import_image_layer(checkpoint.end_lsn, items, prev_lsn=checkpoint.start_lsn)
    except BaseException:
        with contextlib.suppress(Exception):
            repo.detach_timeline(timeline_id)
        raise
    return timeline


def _read_checkpoint_record(pgdata: Path, control: ControlFile) -> DecodedRecord:
    """The record of the shutdown checkpoint that pg_control names, checked against it."""
    lsn = control.checkpoint_lsn
    if control.state != DBState.SHUTDOWNED or control.checkpoint.redo != lsn:
        raise ImportDatadirError(
            f"{pgdata} was not shut down cleanly (state {control.state.name}): stop its server"
        )
    seg_size = control.wal_segment_size
    name = wal_file_name(
        control.checkpoint.this_timeline_id, segment_number(lsn, seg_size), seg_size
    )
    path = pgdata / "pg_wal" / name
    with path.open("rb") as segment:
        segment.seek(lsn % seg_size)
        data = segment.read(2 * BLCKSZ)
    decoder = WalDecoder(lsn, control.version.xlog_page_magic, seg_size)
    try:
        decoder.feed(data)
        record = decoder.next_record()
    except WalDecodeError as error:
        raise ImportDatadirError(f"{path}: no checkpoint record at {lsn_text(lsn)}: {error}") from (
            error
        )
    if (
        record is None
        or (record.rmid, record.rmgr_info) != (Rmgr.XLOG, wal.XLOG_CHECKPOINT_SHUTDOWN)
        or record.main_data != control.checkpoint_bytes
    ):
        raise ImportDatadirError(
            f"{path}: the record at {lsn_text(lsn)} is not the checkpoint that pg_control names"
        )
    return record


# ---- what is there


def _find_databases(pgdata: Path) -> list[_Database]:
    """The databases, sorted as their keys are."""
    if any((pgdata / "pg_tblspc").iterdir()):
        raise ImportDatadirError(
            f"{pgdata / 'pg_tblspc'}: clusters with tablespaces cannot be imported"
        )
    found = [_find_relations(pgdata / "global", GLOBALTABLESPACE_OID, 0)]
    for directory in (pgdata / "base").iterdir():
        if directory.name == "pgsql_tmp":
            continue
        if not directory.name.isdecimal():
            raise ImportDatadirError(f"{directory}: not the directory of a database")
        found.append(_find_relations(directory, DEFAULTTABLESPACE_OID, int(directory.name)))
    return sorted(found, key=lambda database: (database.spcnode, database.dbnode))


def _find_relations(directory: Path, spcnode: int, dbnode: int) -> _Database:
    database = _Database(spcnode, dbnode)
    for path in directory.iterdir():
        if path.name == RELMAP_FILE_NAME:
            database.relmap = path.read_bytes()
            parse_relmap(database.relmap)
            continue
        parsed = parse_rel_file_name(path.name)
        if parsed is not None:
            relnode, forknum, segno = parsed
            rel = RelTag(spcnode, dbnode, relnode, forknum)
            database.forks.setdefault(rel, {})[segno] = path
        elif path.name not in _IGNORED_FILES and not _TEMPORARY_RELATION.fullmatch(path.name):
            raise ImportDatadirError(f"{path}: not a file of a relation")
    return database


def _fork_segments(rel: RelTag, segments: dict[int, Path]) -> tuple[list[Path], int]:
    """The segment files of a fork in order and its number of blocks."""
    paths, nblocks = [], 0
    for segno in range(len(segments)):
        path = segments.get(segno)
        if path is None or nblocks != segno * RELSEG_SIZE:
            raise ImportDatadirError(
                f"relation {rel}: segment {segno} is missing or the one before it is not full"
            )
        blocks, rest = divmod(path.stat().st_size, BLCKSZ)
        if rest:
            raise ImportDatadirError(f"{path}: its size is not a multiple of {BLCKSZ}")
        nblocks += blocks
        paths.append(path)
    return paths, nblocks


# ---- keys and values, in key order


def _all_items(
    pgdata: Path, control: ControlFile, databases: list[_Database]
) -> Iterator[tuple[bytes, bytes]]:
    directory = {(db.spcnode, db.dbnode): db.relmap is not None for db in databases}
    yield keys.DATABASE_DIRECTORY_KEY, encode_databases(directory)
    for database in databases:
        yield from _database_items(database)
    for kind in SlruKind:
        yield from _slru_items(pgdata / kind.directory, kind)
    yield from _twophase_items(pgdata / "pg_twophase")
    yield keys.CONTROL_FILE_KEY, control.file_bytes()
    yield keys.CHECKPOINT_KEY, control.checkpoint_bytes
    counters = [getattr(control.checkpoint, name) for name in _COUNTERS]
    yield keys.COUNTERS_KEY, keys.encode_counters(*counters)
    yield keys.ORIGINS_KEY, encode_origins({})
    yield keys.TABLESPACES_KEY, encode_tablespaces({})


def _database_items(database: _Database) -> Iterator[tuple[bytes, bytes]]:
    if database.relmap is not None:
        yield keys.relmap_key(database.spcnode, database.dbnode), database.relmap
    forks = {rel: _fork_segments(rel, paths) for rel, paths in database.forks.items()}
    yield from sorted(
        (keys.rel_size_key(rel), keys.encode_size(nblocks)) for rel, (_, nblocks) in forks.items()
    )
    for rel in sorted(forks):
        paths, nblocks = forks[rel]
        blkno = 0
        for path in paths:
            for page in _pages(path):
                yield keys.rel_block_key(rel, blkno), page
                blkno += 1
        if blkno != nblocks:
            raise ImportDatadirError(f"relation {rel} has changed while it was imported")


def _slru_items(directory: Path, kind: SlruKind) -> Iterator[tuple[bytes, bytes]]:
    segments = {}
    for path in directory.iterdir():
        segno = parse_segment_file_name(path.name)
        if segno is not None:
            segments[segno] = path
        elif path.is_file():
            raise ImportDatadirError(f"{path}: not a segment of an SLRU")
    yield keys.slru_directory_key(kind), encode_numbers(segments)
    for segno in sorted(segments):
        pages = list(_pages(segments[segno]))
        if len(pages) > SLRU_PAGES_PER_SEGMENT:
            raise ImportDatadirError(f"{segments[segno]}: it has {len(pages)} pages")
        for blkno, page in enumerate(pages):
            yield keys.slru_block_key(kind, segno, blkno), page
        yield keys.slru_size_key(kind, segno), keys.encode_size(len(pages))


def _twophase_items(directory: Path) -> Iterator[tuple[bytes, bytes]]:
    files = {}
    for path in directory.iterdir():
        if not _TWOPHASE_FILE.fullmatch(path.name):
            raise ImportDatadirError(f"{path}: not the state of a prepared transaction")
        files[int(path.name, 16)] = path
    yield keys.TWOPHASE_DIRECTORY_KEY, encode_numbers(files)
    for xid in sorted(files):
        data = files[xid].read_bytes()
        state, crc = data[:-_CRC_SIZE], data[-_CRC_SIZE:]
        if crc32c(state) != int.from_bytes(crc, "little"):
            raise ImportDatadirError(f"{files[xid]} is damaged: its CRC does not match its content")
        yield keys.twophase_key(xid), state


def _pages(path: Path) -> Iterator[bytes]:
    """The pages of a file; b"" for one of zeros."""
    with path.open("rb") as file:
        while chunk := file.read(_READ_SIZE):
            if len(chunk) % BLCKSZ:
                raise ImportDatadirError(f"{path}: its size is not a multiple of {BLCKSZ}")
            for at in range(0, len(chunk), BLCKSZ):
                page = chunk[at : at + BLCKSZ]
                yield b"" if page == ZERO_PAGE else page
