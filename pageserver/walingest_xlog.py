"""Records of XLOG: checkpoints and parameters (xlog_redo), and of replication origins."""

from pageserver import keys
from pageserver.datadir_modification import DatadirModification
from pageserver.walingest_context import IngestContext
from postgres_ffi import xlog_records as wal
from postgres_ffi.checkpoint import CheckPoint, parse_checkpoint
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.slru import multixact_precedes, xid_precedes

_DO_NOT_REPLICATE_ID = 0xFFFF  # DoNotReplicateId: changes without a tracked origin


def ingest_xlog(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """Checkpoints, NEXTOID, PARAMETER_CHANGE, FPW_CHANGE."""
    match record.rmgr_info:
        case wal.XLOG_CHECKPOINT_SHUTDOWN:
            checkpoint = parse_checkpoint(record.main_data, context.version)
            mod.set_counters(
                checkpoint.next_xid, checkpoint.next_multi, checkpoint.next_multi_offset
            )
            mod.set_checkpoint_fields(next_oid=checkpoint.next_oid)
            _take_checkpoint(checkpoint, mod)
        case wal.XLOG_CHECKPOINT_ONLINE:
            checkpoint = parse_checkpoint(record.main_data, context.version)
            _raise_counters(checkpoint, mod)
            _take_checkpoint(checkpoint, mod)
        case wal.XLOG_NEXTOID:
            mod.set_checkpoint_fields(next_oid=wal.parse_next_oid(record.main_data))
        case wal.XLOG_PARAMETER_CHANGE:
            wal.parse_parameter_change(record.main_data)
            mod.put_image(keys.PARAMETERS_KEY, record.main_data)
        case wal.XLOG_FPW_CHANGE:
            mod.set_checkpoint_fields(full_page_writes=wal.parse_fpw_change(record.main_data))


def _raise_counters(checkpoint: CheckPoint, mod: DatadirModification) -> None:
    """An online checkpoint was written while its counters went on: they are lower bounds."""
    next_xid, next_multi, next_multi_offset = mod.counters
    if multixact_precedes(next_multi, checkpoint.next_multi):
        next_multi = checkpoint.next_multi
    if multixact_precedes(next_multi_offset, checkpoint.next_multi_offset):
        next_multi_offset = checkpoint.next_multi_offset
    mod.set_counters(max(next_xid, checkpoint.next_xid), next_multi, next_multi_offset)


def _take_checkpoint(checkpoint: CheckPoint, mod: DatadirModification) -> None:
    """What both kinds of checkpoints say. The horizons never go back."""
    current = mod.checkpoint_fields()
    if not xid_precedes(checkpoint.oldest_xid, current["oldest_xid"]):
        mod.set_checkpoint_fields(
            oldest_xid=checkpoint.oldest_xid, oldest_xid_db=checkpoint.oldest_xid_db
        )
    if not multixact_precedes(checkpoint.oldest_multi, current["oldest_multi"]):
        mod.set_checkpoint_fields(
            oldest_multi=checkpoint.oldest_multi, oldest_multi_db=checkpoint.oldest_multi_db
        )
    mod.set_checkpoint_fields(
        redo=checkpoint.redo,
        this_timeline_id=checkpoint.this_timeline_id,
        prev_timeline_id=checkpoint.prev_timeline_id,
        full_page_writes=checkpoint.full_page_writes,
        time=checkpoint.time,
        oldest_commit_ts_xid=checkpoint.oldest_commit_ts_xid,
        newest_commit_ts_xid=checkpoint.newest_commit_ts_xid,
        oldest_active_xid=checkpoint.oldest_active_xid,
    )


def ingest_replorigin(
    record: DecodedRecord, mod: DatadirModification, context: IngestContext
) -> None:
    """SET (advance or force) and DROP (replorigin_redo)."""
    if record.rmgr_info == wal.XLOG_REPLORIGIN_DROP:
        mod.set_origin(wal.parse_replorigin_drop(record.main_data), None)
        return
    progress = wal.parse_replorigin_set(record.main_data)
    if progress.force:
        mod.set_origin(progress.node_id, progress.remote_lsn)
    else:
        advance_origin(mod, progress.node_id, progress.remote_lsn)


def advance_origin(mod: DatadirModification, origin: int, remote_lsn: int) -> None:
    """An origin's progress, which does not go back (replorigin_advance)."""
    if origin != _DO_NOT_REPLICATE_ID and remote_lsn >= mod.origins.get(origin, 0):
        mod.set_origin(origin, remote_lsn)
