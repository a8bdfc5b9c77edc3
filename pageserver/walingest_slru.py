"""Records of the commit log (clog_redo) and of multixacts (multixact_redo)."""

from collections.abc import Iterator

from pageserver.datadir_modification import DatadirModification
from pageserver.values import ValueKind, encode_multixact_members, encode_multixact_offsets
from pageserver.walingest_context import IngestContext, IngestError
from postgres_ffi import xlog_records as wal
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.slru import (
    CLOG_XACTS_PER_PAGE,
    MULTIXACT_MEMBERS_PER_PAGE,
    MULTIXACT_OFFSETS_PER_PAGE,
    SlruKind,
    deleted_member_segments,
    may_delete_segment,
    next_multixact_id,
    offsets_cutoff_page,
    page_precedes,
)

_U32 = 0xFFFFFFFF
_MAX_MULTIXACT_STATUS = 5  # MultiXactStatusUpdate


def ingest_clog(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """ZEROPAGE and TRUNCATE."""
    if record.rmgr_info == wal.CLOG_ZEROPAGE:
        page = wal.parse_zero_page(record.main_data, context.version)
        mod.put_slru_zero_page(SlruKind.CLOG, page)
        return
    truncate = wal.parse_clog_truncate(record.main_data, context.version)
    mod.set_checkpoint_fields(oldest_xid=truncate.oldest_xid, oldest_xid_db=truncate.oldest_xid_db)
    newest_page = ((mod.counters[0] - 1) & _U32) // CLOG_XACTS_PER_PAGE
    if not page_precedes(SlruKind.CLOG, newest_page, truncate.page):
        _truncate(mod, SlruKind.CLOG, truncate.page)


def ingest_multixact(
    record: DecodedRecord, mod: DatadirModification, context: IngestContext
) -> None:
    """ZERO_OFF_PAGE, ZERO_MEM_PAGE, TRUNCATE_ID, and CREATE_ID if it comes to a new page."""
    match record.rmgr_info:
        case wal.XLOG_MULTIXACT_ZERO_OFF_PAGE:
            page = wal.parse_zero_page(record.main_data, context.version)
            if page != context.early_offsets_page:
                mod.put_slru_zero_page(SlruKind.MULTIXACT_OFFSETS, page)
            context.early_offsets_page = None
        case wal.XLOG_MULTIXACT_ZERO_MEM_PAGE:
            page = wal.parse_zero_page(record.main_data, context.version)
            mod.put_slru_zero_page(SlruKind.MULTIXACT_MEMBERS, page)
        case wal.XLOG_MULTIXACT_CREATE_ID:
            _create(wal.parse_multixact_create(record.main_data), mod, context)
        case wal.XLOG_MULTIXACT_TRUNCATE_ID:
            _truncate_multixacts(wal.parse_multixact_truncate(record.main_data), mod)


def _create(create: wal.MultiXactCreate, mod: DatadirModification, context: IngestContext) -> None:
    if any(status > _MAX_MULTIXACT_STATUS for _, status in create.members):
        raise IngestError(f"a member of multixact {create.mid} has an invalid status")
    end = (create.moff + len(create.members)) & _U32
    following = next_multixact_id(create.mid)
    # Offset 0 means "not set", so the counter skips it.
    pairs = {create.mid: create.moff, following: end or 1}
    page, next_page = (
        create.mid // MULTIXACT_OFFSETS_PER_PAGE,
        following // MULTIXACT_OFFSETS_PER_PAGE,
    )
    if next_page != page and not mod.slru_page_exists(SlruKind.MULTIXACT_OFFSETS, next_page):
        # Older minor versions create the page only with the next multixact, and zero it then.
        context.early_offsets_page = next_page
    for wanted in dict.fromkeys((page, next_page)):
        group = [(m, o) for m, o in pairs.items() if m // MULTIXACT_OFFSETS_PER_PAGE == wanted]
        mod.put_slru_record(
            SlruKind.MULTIXACT_OFFSETS,
            wanted,
            ValueKind.MULTIXACT_OFFSET,
            encode_multixact_offsets(group),
        )
    for offset, members in _members_by_page(create):
        mod.put_slru_record(
            SlruKind.MULTIXACT_MEMBERS,
            offset // MULTIXACT_MEMBERS_PER_PAGE,
            ValueKind.MULTIXACT_MEMBERS,
            encode_multixact_members(offset, members),
        )
    mod.see_multi((create.mid + 1) & _U32, end)
    for xid, _ in create.members:
        mod.see_xid(xid)


def _members_by_page(
    create: wal.MultiXactCreate,
) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """(first offset, members) of each page; offsets wrap at 2^32, where the last page ends."""
    done = 0
    while done < len(create.members):
        offset = (create.moff + done) & _U32
        room = MULTIXACT_MEMBERS_PER_PAGE - offset % MULTIXACT_MEMBERS_PER_PAGE
        room = min(room, _U32 + 1 - offset)
        yield offset, create.members[done : done + room]
        done += room


def _truncate_multixacts(truncate: wal.MultiXactTruncate, mod: DatadirModification) -> None:
    mod.set_checkpoint_fields(
        oldest_multi=truncate.end_multi, oldest_multi_db=truncate.oldest_multi_db
    )
    for segno in deleted_member_segments(truncate.start_member, truncate.end_member):
        mod.drop_slru_segment(SlruKind.MULTIXACT_MEMBERS, segno)
    _truncate(mod, SlruKind.MULTIXACT_OFFSETS, offsets_cutoff_page(truncate.end_multi))


def _truncate(mod: DatadirModification, kind: SlruKind, cutoff_page: int) -> None:
    for segno in sorted(mod.slru_segments(kind)):
        if may_delete_segment(kind, segno, cutoff_page):
            mod.drop_slru_segment(kind, segno)
