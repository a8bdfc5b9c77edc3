"""WAL and pg_control that make a stock server start at an LSN without any recovery.

The server finds in pg_control that it was shut down cleanly by a checkpoint whose record starts at
that LSN, reads this one record from pg_wal, and goes on writing behind it. standby_wal.py makes
a server begin with the replay of WAL that exists.
"""

import struct
import time
from dataclasses import dataclass, replace

from zenith_utils.crc32c import crc32c
from zenith_utils.lsn import Lsn

from .checkpoint import CheckPoint, encode_checkpoint
from .control_file import ControlFile, DBState
from .versions import PgVersion, Rmgr
from .wal_format import (
    SIZE_OF_RECORD_HEADER,
    WAL_BLCKSZ,
    WAL_SEGMENT_SIZE,
    XLP_FIRST_IS_CONTRECORD,
    XLP_LONG_HEADER,
    WalPageHeader,
    maxalign,
    normalize_lsn,
    page_header_size,
    segment_start,
    wal_file_name,
)
from .xlog_records import XLOG_CHECKPOINT_SHUTDOWN

_BLOCK_ID_DATA_SHORT = 255
_RECORD_HEADER = struct.Struct("<IIQBBxx")


@dataclass(frozen=True, slots=True)
class StartupWal:
    """WAL around a synthesized checkpoint record.

    `record` starts at `lsn` and ends at `end_lsn` (8-aligned). `extents` are the only bytes of the
    touched segments that are not zero, as (LSN, bytes) in ascending order: page headers from the
    segment's start on and the record.
    """

    lsn: int
    end_lsn: int
    record: bytes
    extents: tuple[tuple[int, bytes], ...]
    timeline: int
    seg_size: int

    @property
    def segments(self) -> tuple[int, ...]:
        """Start LSNs of the touched segments: one, or two if the record crosses into the next."""
        return tuple(sorted({segment_start(lsn, self.seg_size) for lsn, _ in self.extents}))

    def file_name(self, segment_lsn: int) -> str:
        """Name in pg_wal of the segment that starts at `segment_lsn`."""
        return wal_file_name(self.timeline, segment_lsn // self.seg_size, self.seg_size)

    def segment_extents(self, segment_lsn: int) -> tuple[tuple[int, bytes], ...]:
        """(offset in the file, bytes) to write into an otherwise empty, sparse segment file."""
        end = segment_lsn + self.seg_size
        return tuple(
            (lsn - segment_lsn, data) for lsn, data in self.extents if segment_lsn <= lsn < end
        )

    def segment_image(self, segment_lsn: int) -> bytearray:
        """The whole segment file: `seg_size` bytes."""
        image = bytearray(self.seg_size)
        for offset, data in self.segment_extents(segment_lsn):
            image[offset : offset + len(data)] = data
        return image


def shutdown_checkpoint(
    tracked: CheckPoint, lsn: int, *, full_page_writes: bool, now: int | None = None
) -> CheckPoint:
    """The checkpoint a clean shutdown at `lsn` would have written, from the tracked counters.

    `full_page_writes`: the setting the server will run with. `now`: Unix time, default the clock's.
    """
    return replace(
        tracked,
        redo=lsn,
        full_page_writes=full_page_writes,
        time=int(time.time()) if now is None else now,
        oldest_active_xid=0,
    )


def startup_control_file(control: ControlFile, checkpoint: CheckPoint) -> ControlFile:
    """`control` of a server shut down cleanly by `checkpoint`, whose record starts at its redo."""
    return control.with_checkpoint(checkpoint.redo, checkpoint).with_fields(
        {
            "state": DBState.SHUTDOWNED,
            "time": checkpoint.time,
            "min_recovery_point": 0,
            "min_recovery_point_tli": 0,
            "backup_start_point": 0,
            "backup_end_point": 0,
            "backup_end_required": False,
        }
    )


def checkpoint_record(
    checkpoint: CheckPoint,
    prev_lsn: int,
    version: PgVersion,
    info: int = XLOG_CHECKPOINT_SHUTDOWN,
) -> bytes:
    """A checkpoint's WAL record; `prev_lsn` is the start of the record before it."""
    return wal_record(Rmgr.XLOG, info, prev_lsn, encode_checkpoint(checkpoint, version))


def wal_record(rmid: int, info: int, prev_lsn: int, main_data: bytes) -> bytes:
    """A record of no transaction that refers to no block; at most 255 bytes of `main_data`."""
    body = bytes((_BLOCK_ID_DATA_SHORT, len(main_data))) + main_data
    header = _RECORD_HEADER.pack(SIZE_OF_RECORD_HEADER + len(body), 0, prev_lsn, info, rmid)
    return header + struct.pack("<I", crc32c(header, crc32c(body))) + body


def build_startup_wal(
    checkpoint: CheckPoint,
    *,
    prev_lsn: int,
    version: PgVersion,
    system_identifier: int,
    seg_size: int = WAL_SEGMENT_SIZE,
) -> StartupWal:
    """WAL that holds `checkpoint` as a shutdown checkpoint record at `checkpoint.redo`.

    The redo LSN must be a legal record start (`normalize_lsn`) and at or above the LSN of every
    page of the cluster. `prev_lsn` is the start of the last real record; where it is unknown any
    lower LSN will do for the server. ValueError if either does not fit.
    """
    lsn = checkpoint.redo
    if normalize_lsn(lsn, seg_size) != lsn:
        raise ValueError(f"no WAL record can start at {Lsn(lsn)}")
    if not prev_lsn < lsn:
        raise ValueError(f"the record before {Lsn(lsn)} cannot start at {Lsn(prev_lsn)}")
    record = checkpoint_record(checkpoint, prev_lsn, version)
    pages = PageHeaders(
        version.xlog_page_magic, checkpoint.this_timeline_id, system_identifier, seg_size
    )
    extents = pages.before(lsn)
    position, rest = lsn, record
    while True:
        room = WAL_BLCKSZ - position % WAL_BLCKSZ
        extents.append((position, rest[:room]))
        if len(rest) <= room:
            break
        position, rest = position + room, rest[room:]
        header = pages.header(position, len(rest))
        extents.append((position, header))
        position += len(header)
    end_lsn = maxalign(position + len(rest))
    timeline = checkpoint.this_timeline_id
    return StartupWal(lsn, end_lsn, record, tuple(extents), timeline, seg_size)


@dataclass(frozen=True, slots=True)
class PageHeaders:
    """Headers of WAL pages of one cluster; `magic` is that of its major version."""

    magic: int
    timeline: int
    system_identifier: int
    seg_size: int

    def header(self, page_lsn: int, rem_len: int) -> bytes:
        """Header of a page that begins with `rem_len` bytes of an earlier record."""
        info = XLP_FIRST_IS_CONTRECORD if rem_len else 0
        if page_lsn % self.seg_size == 0:
            info |= XLP_LONG_HEADER
        return WalPageHeader(
            magic=self.magic,
            info=info,
            timeline=self.timeline,
            page_lsn=page_lsn,
            rem_len=rem_len,
            system_identifier=self.system_identifier,
            seg_size=self.seg_size,
            wal_block_size=WAL_BLCKSZ,
        ).pack()

    def before(self, lsn: int) -> list[tuple[int, bytes]]:
        """Headers of the pages from the segment's start to that of `lsn`, ascending.

        They claim that one record's tail fills everything up to `lsn`. The server needs only the
        segment's first header and that of the page; with the others, tools that read from the
        segment's start (pg_waldump, a standby) find their way to `lsn`.
        """
        page_lsn = lsn - lsn % WAL_BLCKSZ
        rem_len = lsn - page_lsn - page_header_size(page_lsn, self.seg_size)
        headers = [(page_lsn, self.header(page_lsn, rem_len))]
        while page_lsn % self.seg_size:
            page_lsn -= WAL_BLCKSZ
            rem_len += WAL_BLCKSZ - page_header_size(page_lsn, self.seg_size)
            headers.append((page_lsn, self.header(page_lsn, rem_len)))
        headers.reverse()
        return headers
