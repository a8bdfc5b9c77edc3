"""Records of transactions that the native loop leaves to Python (xact_redo)."""

from collections.abc import Iterable

from pageserver.datadir_modification import DatadirModification
from pageserver.values import ValueKind, encode_xids
from pageserver.walingest_context import IngestContext, IngestError
from pageserver.walingest_xlog import advance_origin
from postgres_ffi import xact_records as wal
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.slru import CLOG_XACTS_PER_PAGE, FIRST_NORMAL_XID, SlruKind


def ingest_xact(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """PREPARE, and the end of a transaction that drops relations, was prepared, has an origin."""
    if record.info & wal.XLOG_XACT_OPMASK == wal.XLOG_XACT_PREPARE:
        _prepare(record, mod, context)
    else:
        _end(record, mod, context)


def _prepare(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    prepare = wal.parse_xact_prepare(record.main_data, context.version)
    _check_xids((prepare.xid, *prepare.subxacts))
    for xid in (prepare.xid, *prepare.subxacts):
        mod.see_xid(xid)
    mod.add_twophase(prepare.xid, record.main_data)
    if record.origin:
        advance_origin(mod, record.origin, prepare.origin_lsn)


def _end(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    end = wal.parse_xact_end(record.main_data, record.info, context.version)
    xids = (end.twophase_xid if end.prepared else record.xid, *end.subxacts)
    _check_xids(xids)
    for xid in xids:
        mod.see_xid(xid)
    kind = ValueKind.CLOG_COMMITTED if end.committed else ValueKind.CLOG_ABORTED
    by_page: dict[int, list[int]] = {}
    for xid in xids:
        by_page.setdefault(xid // CLOG_XACTS_PER_PAGE, []).append(xid)
    for page, group in by_page.items():
        mod.put_slru_record(SlruKind.CLOG, page, kind, encode_xids(group))
    for relation in end.relations:
        mod.drop_relation(relation.spcnode, relation.dbnode, relation.relnode)
    if end.prepared:
        mod.drop_twophase(end.twophase_xid)
    if end.xinfo & wal.XINFO_HAS_ORIGIN and record.origin:
        advance_origin(mod, record.origin, end.origin_lsn)


def _check_xids(xids: Iterable[int]) -> None:
    for xid in xids:
        if xid < FIRST_NORMAL_XID:
            raise IngestError(f"transaction id {xid} is not a normal one")
