"""Comparison of a timeline with the files of the server whose WAL it ingested."""

import struct
from collections import Counter, defaultdict
from collections.abc import Iterator

from batch_unit.ingest_support import Recording

from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.walredo import WalRedoPool
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import (
    FSM_FORKNUM,
    INIT_FORKNUM,
    MAIN_FORKNUM,
    RELSEG_SIZE,
    VISIBILITYMAP_FORKNUM,
    RelTag,
    database_path,
    parse_rel_file_name,
)
from postgres_ffi.slru import SlruKind
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecoder
from zenith_utils.crc32c import crc32c

_MASKING = (
    *(Rmgr.HEAP2, Rmgr.HEAP, Rmgr.BTREE, Rmgr.HASH, Rmgr.GIN, Rmgr.GIST, Rmgr.SEQ),
    *(Rmgr.SPGIST, Rmgr.BRIN, Rmgr.GENERIC),
)


class Oracle:
    """`differences` are what must not be, `counts` what was compared."""

    def __init__(self, recording: Recording, datadir: DatadirTimeline, redo: WalRedoPool) -> None:
        self.recording = recording
        self.datadir = datadir
        self.redo = redo
        self.lsn = datadir.timeline.last_record_lsn
        self.differences: list[str] = []
        self.counts: Counter[str] = Counter()
        self.rmgrs = _rmgrs_by_page(recording)

    def compare(self) -> None:
        """Compare everything."""
        databases = self._compare_databases()
        stored = dict(self.datadir.relation_sizes(self.lsn))
        files = {rel: n for db in databases for rel, n in self._files(*db).items()}
        unlogged = {rel[:3] for rel in stored if rel.forknum == INIT_FORKNUM}
        for rel in sorted(stored.keys() | files.keys()):
            if rel.forknum == FSM_FORKNUM:
                continue  # not in the WAL
            if rel[:3] in unlogged and rel.forknum != INIT_FORKNUM:
                continue  # their main fork is made from the init fork
            if stored.get(rel) != files.get(rel):
                self.differences.append(
                    f"size of {rel}: {stored.get(rel)}, file has {files.get(rel)}"
                )
            elif files[rel]:
                self._compare_fork(rel, files[rel])
        for kind in SlruKind:
            self._compare_slru(kind)
        self._compare_twophase()
        self._compare_control_file()

    def _compare_databases(self) -> list[tuple[int, int]]:
        after, version = self.recording.after, self.recording.version
        databases = self.datadir.list_dbs(self.lsn)
        expected = {(1664, 0)} | {(1663, int(p.name)) for p in (after / "base").glob("[0-9]*")}
        for space in (after / "pg_tblspc").iterdir():
            inside = space / version.tablespace_version_directory
            expected |= {(int(space.name), int(p.name)) for p in inside.glob("[0-9]*")}
        # a tablespace keeps the directories of databases that once had a relation there
        for database in databases.keys() ^ expected:
            if self._files(*database):
                self.differences.append(f"database {database} is on one side only")
        for (spcnode, dbnode), has_relmap in databases.items():
            path = after / database_path(spcnode, dbnode, version) / "pg_filenode.map"
            if has_relmap != path.exists():
                self.differences.append(f"relation map of {spcnode}/{dbnode}: {has_relmap}")
            elif has_relmap:
                self.counts["relation maps"] += 1
                if path.read_bytes() != self.datadir.relmap(spcnode, dbnode, self.lsn):
                    self.differences.append(f"relation map of {spcnode}/{dbnode} differs")
        return sorted(databases.keys() | expected)

    def _files(self, spcnode: int, dbnode: int) -> dict[RelTag, int]:
        directory = self.recording.after / database_path(spcnode, dbnode, self.recording.version)
        sizes: dict[RelTag, int] = defaultdict(int)
        if directory.exists():
            for path in directory.iterdir():
                parsed = parse_rel_file_name(path.name)
                if parsed:
                    rel = RelTag(spcnode, dbnode, parsed[0], parsed[1])
                    sizes[rel] += path.stat().st_size // 8192
        return sizes

    def _compare_fork(self, rel: RelTag, nblocks: int) -> None:
        path = self.recording.after / database_path(*rel[:2], self.recording.version)
        suffix = ("", "_fsm", "_vm", "_init")[rel.forknum]
        content = b"".join(
            (path / f"{rel.relnode}{suffix}{f'.{segno}' if segno else ''}").read_bytes()
            for segno in range((nblocks + RELSEG_SIZE - 1) // RELSEG_SIZE)
        )
        for start in range(0, nblocks, 256):
            count = min(256, nblocks - start)
            pages = self.datadir.get_rel_pages(rel, start, count, self.lsn)
            for blkno, page in enumerate(pages, start):
                self._compare_page(rel, blkno, page, content[blkno * 8192 : blkno * 8192 + 8192])

    def _compare_page(self, rel: RelTag, blkno: int, page: bytes, file_page: bytes) -> None:
        fork = "main" if rel.forknum == MAIN_FORKNUM else "vm or init"
        self.counts[f"{fork} pages"] += 1
        ours, theirs = _without_checksum(page), _without_checksum(file_page)
        if ours == theirs:
            return
        if rel.forknum == MAIN_FORKNUM and self._equal_when_masked(rel, blkno, ours, theirs):
            self.counts["pages equal when masked"] += 1
            return
        if rel.forknum == INIT_FORKNUM and ours[8:] == theirs[8:]:
            self.counts["init pages written before they were logged"] += 1
            return
        if rel.forknum == VISIBILITYMAP_FORKNUM and self._lost_in_copy(rel, blkno, ours, theirs):
            self.counts["vm pages logged without their bits"] += 1
            return
        self.differences.append(f"page {blkno} of {rel} differs ({self.rmgrs[rel, blkno]})")

    def _equal_when_masked(self, rel: RelTag, blkno: int, ours: bytes, theirs: bytes) -> bool:
        if ZERO_PAGE in (ours, theirs):
            return False
        if Rmgr.SEQ in self.rmgrs[rel, blkno]:
            return _logged_ahead(ours, theirs)
        rmids = self.rmgrs[rel, blkno] or {_rmgr_of_page(theirs)}
        return any(
            self.redo.mask(rmid, blkno, ours) == self.redo.mask(rmid, blkno, theirs)
            for rmid in sorted(rmids)
        )

    def _lost_in_copy(self, rel: RelTag, blkno: int, ours: bytes, theirs: bytes) -> bool:
        """CREATE DATABASE logs map pages like heap pages, leaving out what looks like a hole."""
        only_images = not self.rmgrs[rel, blkno]
        return only_images and ours[:24] == theirs[:24] and not any(ours[24:])

    def _compare_slru(self, kind: SlruKind) -> None:
        directory = self.recording.after / kind.directory
        files = {int(path.name, 16): path for path in directory.iterdir()}
        stored = self.datadir.slru_segments(kind, self.lsn)
        if sorted(files) != stored:
            self.differences.append(f"segments of {kind.directory}: {stored}, files {list(files)}")
            return
        for segno in stored:
            theirs, ours = files[segno].read_bytes(), self._slru_segment(kind, segno)
            self.counts[f"{kind.directory} pages"] += len(theirs) // 8192
            # pages behind the last one that was written back may be missing in the file
            if ours[: len(theirs)] != theirs or ours[len(theirs) :].strip(b"\0"):
                pages = [
                    i // 8192
                    for i in range(0, len(theirs), 8192)
                    if ours[i : i + 8192] != theirs[i : i + 8192]
                ]
                self.differences.append(
                    f"{kind.directory}/{segno:04X}: {len(ours)} bytes, file {len(theirs)},"
                    f" pages {pages} differ"
                )

    def _slru_segment(self, kind: SlruKind, segno: int) -> bytes:
        content = self.datadir.slru_segment(kind, segno, self.lsn)
        assert len(content) == 8192 * self.datadir.slru_segment_size(kind, segno, self.lsn)
        return content

    def _compare_twophase(self) -> None:
        stored = self.datadir.twophase_files(self.lsn)
        directory = self.recording.after / "pg_twophase"
        files = {int(path.name, 16): path.read_bytes() for path in directory.iterdir()}
        self.counts["prepared transactions"] = len(files)
        if {xid: data + struct.pack("<I", crc32c(data)) for xid, data in stored.items()} != files:
            self.differences.append(f"prepared transactions: {list(stored)}, files {list(files)}")

    def _compare_control_file(self) -> None:
        control = self.recording.control(self.recording.after)
        stored = self.datadir.checkpoint(self.lsn)
        if stored != control.checkpoint_bytes:
            unpack = control.version.checkpoint.unpack
            self.differences.append(
                f"checkpoint {unpack(stored)} instead of {unpack(control.checkpoint_bytes)}"
            )
        ours = self.datadir.control_file(self.lsn)
        for name in (
            *("wal_level", "wal_log_hints", "max_connections", "max_worker_processes"),
            *("max_wal_senders", "max_prepared_xacts", "max_locks_per_xact"),
            *("track_commit_timestamp", "system_identifier", "data_checksum_version"),
        ):
            offset, code = control.version.control_file.fields[name]
            if struct.unpack_from("<" + code, ours, offset)[0] != control.field(name):
                self.differences.append(f"{name} of the control file differs")


def _rmgrs_by_page(recording: Recording) -> dict[tuple[RelTag, int], set[int]]:
    """Which resource managers' records touch each page."""
    rmgrs: dict[tuple[RelTag, int], set[int]] = defaultdict(set)
    for record in records(recording):
        if record.rmid in _MASKING:
            for block in record.blocks:
                rmgrs[block.rel, block.blkno].add(record.rmid)
    return rmgrs


def records(recording: Recording) -> Iterator[DecodedRecord]:
    """All records of the recording."""
    decoder = WalDecoder(recording.start_lsn)
    for start in range(0, len(recording.wal), 1 << 20):
        decoder.feed(recording.wal[start : start + (1 << 20)])
        while (record := decoder.next_record()) is not None:
            yield record


def _without_checksum(page: bytes) -> bytes:
    return page[:8] + b"\0\0" + page[10:]


def _rmgr_of_page(page: bytes) -> int:
    """Whose page it is, if only images of it were logged: heap pages have no special space."""
    (special,) = struct.unpack_from("<H", page, 16)
    return Rmgr.HEAP if special == len(page) else Rmgr.BTREE


def _logged_ahead(ours: bytes, theirs: bytes) -> bool:
    """A sequence's WAL names the value up to which nextval needs no more WAL."""
    (ours_value, _), (value, remaining) = _sequence(ours), _sequence(theirs)
    return ours_value == value + remaining


def _sequence(page: bytes) -> tuple[int, int]:
    """(last_value, log_cnt) of the only tuple."""
    (item,) = struct.unpack_from("<I", page, 24)
    start = item & 0x7FFF
    last_value, log_cnt = struct.unpack_from("<qq", page, start + page[start + 22])
    return last_value, log_cnt
