"""WAL and pg_control that make a stock hot standby begin in the middle of WAL that it will receive.

Replay begins where the last checkpoint says. No checkpoint was written for this standby's
beginning, so an online one is synthesized. Its record lies in the segment *after* the one replay
begins in: there it contradicts nothing. The server reads it once, at its start, goes back to the
redo LSN, and its walreceiver overwrites it when the real WAL comes that far. Until then nobody can
take it for real WAL: it names as its predecessor a position where no record starts, and a server
that reads on checks that.
"""

from dataclasses import dataclass, replace

from .checkpoint import CheckPoint
from .control_file import ControlFile, DBState
from .startup_wal import PageHeaders, checkpoint_record
from .wal_format import normalize_lsn, segment_start, wal_file_name
from .xlog_records import XLOG_CHECKPOINT_ONLINE


@dataclass(frozen=True, slots=True)
class StandbyWal:
    """The control file, and the segment that holds the checkpoint it names.

    `extents` are (offset, bytes), all that is not zero in the file `file_name` of `seg_size` bytes.
    """

    control: ControlFile
    file_name: str
    seg_size: int
    extents: tuple[tuple[int, bytes], ...]


def build_standby_wal(
    control: ControlFile, redo: int, oldest_active_xid: int, *, open_at: int
) -> StandbyWal:
    """What makes a standby replay from `redo`, the start of a record, on.

    `control` is the control file of a server stopped at that LSN; `oldest_active_xid` is not above
    any transaction that runs there. Queries are let in when the standby has replayed up to
    `open_at` and a record that tells which transactions run.
    """
    seg_size = control.wal_segment_size
    checkpoint: CheckPoint = replace(
        control.checkpoint, redo=redo, oldest_active_xid=oldest_active_xid
    )
    segment = segment_start(redo, seg_size) + seg_size
    lsn = normalize_lsn(segment, seg_size)
    pages = PageHeaders(
        control.version.xlog_page_magic,
        checkpoint.this_timeline_id,
        control.system_identifier,
        seg_size,
    )
    # A page header lies there, so no record does.
    impossible_prev = segment_start(redo, seg_size)
    record = checkpoint_record(checkpoint, impossible_prev, control.version, XLOG_CHECKPOINT_ONLINE)
    standby = control.with_checkpoint(lsn, checkpoint).with_fields(
        {
            "state": DBState.SHUTDOWNED_IN_RECOVERY,
            "min_recovery_point": open_at,
            "min_recovery_point_tli": checkpoint.this_timeline_id,
        }
    )
    return StandbyWal(
        control=standby,
        file_name=wal_file_name(checkpoint.this_timeline_id, segment // seg_size, seg_size),
        seg_size=seg_size,
        extents=((0, pages.header(segment, 0)), (lsn - segment, record)),
    )
