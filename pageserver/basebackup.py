"""The base backup: a tar stream from which a stock Postgres starts at one LSN.

It holds everything of a data directory but the relation files: configuration stubs, SLRUs,
relation maps, prepared transactions, a control file in state "shut down" and a WAL segment whose
only record, a shutdown checkpoint at the LSN, is where the server begins. Relation files are
described by two entries of our own:

``zenith.manifest`` (little-endian)
    8 bytes ``ZNMANIF1``, u64 base LSN, u32 count, u32 flags (1: data checksums), count times
    {u32 spcnode, dbnode, relnode, forknum, nblocks, u32 0} sorted, u32 CRC-32C of all before.
``zenith.startup_blocks`` (little-endian)
    repeated {u32 spcnode, dbnode, relnode, forknum, blkno, 8192 bytes}, then the u32 CRC-32C.

Main forks of unlogged relations come whole: a start without recovery does not reset them, so they
are what recovery would have made of them, copies of their init forks.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping

from pageserver.startup_blocks import startup_ranges
from pageserver.tar_stream import TarStream
from pageserver.timelines import LsnNotReadableError, TimelineHandle
from postgres_ffi.checkpoint import parse_checkpoint
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.relfile import (
    INIT_FORKNUM,
    MAIN_FORKNUM,
    RelTag,
    database_path,
    relpath,
)
from postgres_ffi.relmap import RELMAP_FILE_NAME, RELMAP_SIZE, parse_relmap
from postgres_ffi.slru import SlruKind, segment_file_name
from postgres_ffi.startup_wal import (
    build_startup_wal,
    shutdown_checkpoint,
    startup_control_file,
)
from postgres_ffi.wal_format import normalize_lsn
from zenith_utils.crc32c import crc32c
from zenith_utils.lsn import Lsn
from zenith_utils.postgres_backend import Connection, QueryError

MANIFEST_NAME = "zenith.manifest"
STARTUP_BLOCKS_NAME = "zenith.startup_blocks"
MANIFEST_MAGIC = b"ZNMANIF1"
MANIFEST_CHECKSUMS = 1

# replication/logical/origin.c
_ORIGIN_MAGIC = 0x1257DADE

_DIRECTORIES = (
    "global",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
    "pg_twophase",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "base",
    "base/1",
    "pg_replslot",
    "pg_tblspc",
    "pg_stat",
    "pg_stat_tmp",
    "pg_xact",
    "pg_logical",
    "pg_logical/snapshots",
    "pg_logical/mappings",
)
_PG_HBA = b"""\
# TYPE  DATABASE        USER            ADDRESS                 METHOD
local   all             all                                     trust
host    all             all             127.0.0.1/32            trust
host    all             all             ::1/128                 trust
local   replication     all                                     trust
host    replication     all             127.0.0.1/32            trust
host    replication     all             ::1/128                 trust
"""
_MANIFEST_HEADER = struct.Struct("<8sQII")
_MANIFEST_ENTRY = struct.Struct("<IIIIII")
_BLOCK_HEADER = struct.Struct("<IIIII")
_CRC = struct.Struct("<I")
_ORIGIN = struct.Struct("<H6xQ")


def send_basebackup(conn: Connection, handle: TimelineHandle, lsn: Lsn | None) -> None:
    """Answers with the base backup at ``lsn`` (None: at the last record) as COPY OUT.

    Waits for an LSN that has not arrived yet. Raises QueryError if it is gone,
    LsnNotReadableError if it does not come.
    """
    latest = lsn is None
    lsn = Lsn(0) if lsn is None else lsn.align8()
    try:
        if not latest and not handle.owner(lsn).leases.is_leased(lsn):
            handle.check_readable(lsn)  # what is gone is not waited for
    except LsnNotReadableError as error:
        raise QueryError("invalid basebackup lsn") from error
    with handle.reading(lsn, latest=latest) as at:
        conn.send_copy_out_response()
        _BaseBackup(handle, at, TarStream(conn.send_copy_data, int(time.time()))).write()
        conn.send_copy_done()


class _BaseBackup:
    """One base backup being written."""

    def __init__(self, handle: TimelineHandle, lsn: Lsn, tar: TarStream) -> None:
        self._handle = handle
        self._datadir = handle.datadir
        self._version = handle.version
        self._lsn = lsn
        self._base_lsn = Lsn(normalize_lsn(lsn))
        self._tar = tar
        self._relmaps: dict[tuple[int, int], bytes] = {}

    def write(self) -> None:
        for name in _DIRECTORIES:
            self._tar.directory(name)
        self._tar.file("pg_hba.conf", _PG_HBA)
        self._tar.file("pg_ident.conf")
        self._tar.file("postgresql.auto.conf")
        self._write_slrus()
        self._write_databases()
        self._write_relations()
        self._write_twophase()
        self._write_origins()
        self._write_zenith_signal()
        self._write_control_file_and_wal()
        self._tar.end()

    # Everything that is not a relation

    def _write_slrus(self) -> None:
        for kind in SlruKind:
            for segno in sorted(self._datadir.slru_segments(kind, self._lsn)):
                content = self._datadir.slru_segment(kind, segno, self._lsn)
                self._tar.file(f"{kind.directory}/{segment_file_name(segno)}", content)

    def _write_databases(self) -> None:
        version_file = b"%d\n" % self._version.major
        self._tar.file("PG_VERSION", version_file)
        for spcnode in sorted(self._datadir.tablespaces(self._lsn)):
            self._tar.directory(f"pg_tblspc/{spcnode}")
            self._tar.directory(f"pg_tblspc/{spcnode}/{self._version.tablespace_version_directory}")
        for (spcnode, dbnode), has_relmap in sorted(self._datadir.list_dbs(self._lsn).items()):
            path = database_path(spcnode, dbnode, self._version)
            if path not in _DIRECTORIES:
                self._tar.directory(path)
            if not has_relmap:
                continue
            relmap = self._datadir.relmap(spcnode, dbnode, self._lsn)
            if len(relmap) != RELMAP_SIZE:
                raise QueryError(f"relation map of {path} has {len(relmap)} bytes")
            self._relmaps[spcnode, dbnode] = relmap
            self._tar.file(f"{path}/PG_VERSION", version_file)
            self._tar.file(f"{path}/{RELMAP_FILE_NAME}", relmap)

    def _write_twophase(self) -> None:
        for xid, state in sorted(self._datadir.twophase_files(self._lsn).items()):
            self._tar.file(f"pg_twophase/{xid:08X}", state, _CRC.pack(crc32c(state)))

    def _write_origins(self) -> None:
        origins = self._datadir.replication_origins(self._lsn)
        if origins:
            content = _CRC.pack(_ORIGIN_MAGIC) + b"".join(
                _ORIGIN.pack(origin, position) for origin, position in sorted(origins.items())
            )
            self._tar.file("pg_logical/replorigin_checkpoint", content, _CRC.pack(crc32c(content)))

    def _write_zenith_signal(self) -> None:
        timeline = self._handle.timeline
        prev = self._prev_lsn()
        if prev:
            text = str(Lsn(prev))
        elif timeline.ancestor_id is not None and self._lsn == timeline.ancestor_lsn:
            text = "none"
        else:
            text = "invalid"
        self._tar.file("zenith.signal", f"PREV LSN: {text}".encode())

    def _prev_lsn(self) -> int:
        """Start of the record that ends at our LSN, 0 if unknown."""
        last, prev = self._handle.timeline.last_record
        return prev if last == self._lsn else 0

    def _write_control_file_and_wal(self) -> None:
        """The checkpoint at the base LSN: in the control file, and as the only record of the WAL.

        The compute's directory is disposable, so it runs without full-page writes.
        """
        control = parse_control_file(self._datadir.control_file(self._lsn))
        tracked = parse_checkpoint(self._datadir.checkpoint(self._lsn), self._version)
        checkpoint = shutdown_checkpoint(tracked, self._base_lsn, full_page_writes=False)
        wal = build_startup_wal(
            checkpoint,
            prev_lsn=self._prev_lsn() or min(control.checkpoint_lsn, self._base_lsn - 8),
            version=self._version,
            system_identifier=control.system_identifier,
            seg_size=control.wal_segment_size,
        )
        self._tar.file("global/pg_control", startup_control_file(control, checkpoint).file_bytes())
        for segment in wal.segments:
            self._tar.file(f"pg_wal/{wal.file_name(segment)}", wal.segment_image(segment))

    # Relations

    def _write_relations(self) -> None:
        relations = self._datadir.relation_sizes(self._lsn)
        sizes = dict(relations)
        unlogged = {rel[:3] for rel in sizes if rel.forknum == INIT_FORKNUM}
        for rel in sorted(rel for rel in sizes if rel.forknum == INIT_FORKNUM):
            main = rel._replace(forknum=MAIN_FORKNUM)
            pages = self._handle.get_pages(rel, 0, sizes[rel], self._lsn) if sizes[rel] else ()
            self._tar.file(relpath(main, self._version), *pages)
        lazy = {
            rel: nblocks
            for rel, nblocks in relations
            if rel.forknum == INIT_FORKNUM or rel[:3] not in unlogged
        }
        self._tar.file(MANIFEST_NAME, self._manifest(lazy))
        self._tar.file(STARTUP_BLOCKS_NAME, *self._startup_blocks(lazy))

    def _manifest(self, sizes: Mapping[RelTag, int]) -> bytes:
        flags = MANIFEST_CHECKSUMS if self._handle.data_checksums else 0
        pack = _MANIFEST_ENTRY.pack
        content = _MANIFEST_HEADER.pack(
            MANIFEST_MAGIC, self._base_lsn, len(sizes), flags
        ) + b"".join(pack(*rel, nblocks, 0) for rel, nblocks in sizes.items())
        return content + _CRC.pack(crc32c(content))

    def _startup_blocks(self, sizes: Mapping[RelTag, int]) -> list[bytes]:
        parts: list[bytes] = []
        crc = 0
        for rel, count in startup_ranges(self._version.major, sizes, self._mapped):
            pages = b"".join(self._handle.get_pages(rel, 0, count, self._lsn))
            for blkno in range(count):
                part = _BLOCK_HEADER.pack(*rel, blkno) + pages[blkno * 8192 : (blkno + 1) * 8192]
                crc = crc32c(part, crc)
                parts.append(part)
        parts.append(_CRC.pack(crc))
        return parts

    def _mapped(self, spcnode: int, dbnode: int) -> Mapping[int, int]:
        relmap = self._relmaps.get((spcnode, dbnode))
        return parse_relmap(relmap) if relmap is not None else {}
