"""The data directory of a hot standby: a base backup that replay begins on, and does not end at."""

from __future__ import annotations

from pathlib import Path

from compute_tools.standby_start import StandbyStart
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.standby_wal import build_standby_wal
from postgres_ffi.wal_format import segment_start, wal_file_name

_XID_MASK = 0xFFFF_FFFF
_HALF = 1 << 31


def begin_replay(datadir: Path, start: StandbyStart) -> None:
    """Change a base backup at `start.lsn` so that its server replays the WAL from there on.

    The WAL itself comes from the safekeepers. Of the backup's only the headers of the pages before
    remain: a server that reads a segment looks at its first header. Raises OSError.
    """
    control_path = datadir / "global/pg_control"
    control = parse_control_file(control_path.read_bytes())
    xids = [int(path.name, 16) for path in (datadir / "pg_twophase").iterdir()]
    if start.oldest_running_xid is not None:
        xids.append(start.oldest_running_xid)
    wal = build_standby_wal(
        control,
        start.lsn,
        _oldest(xids, control.checkpoint.next_xid),
        open_at=max(start.lsn, start.committed_lsn),
    )
    _forget_wal_from(datadir / "pg_wal", start.lsn, wal.seg_size)
    with (datadir / "pg_wal" / wal.file_name).open("xb") as f:
        for offset, data in wal.extents:
            f.seek(offset)
            f.write(data)
        f.truncate(wal.seg_size)
    control_path.write_bytes(wal.control.file_bytes())


def _oldest(xids: list[int], next_xid: int) -> int:
    """The oldest of some 32-bit transaction ids, all before `next_xid`; that one if there are none.

    As in TransactionIdPrecedes(), the distance says which is older, not the number.
    """
    upper = next_xid & _XID_MASK
    distances = [(upper - xid) & _XID_MASK for xid in xids]
    # A snapshot may be a little ahead of what storage has seen of the transactions by then.
    return (upper - max((d for d in distances if d < _HALF), default=0)) & _XID_MASK


def _forget_wal_from(pg_wal: Path, lsn: int, seg_size: int) -> None:
    """Leave zeros behind `lsn`: the end of WAL, from which on it is streamed."""
    segment = segment_start(lsn, seg_size)
    keep = wal_file_name(1, segment // seg_size, seg_size)
    for path in pg_wal.iterdir():
        if path.is_file() and path.name != keep:
            path.unlink()
    with (pg_wal / keep).open("r+b") as f:
        f.truncate(lsn - segment)
        f.truncate(seg_size)
