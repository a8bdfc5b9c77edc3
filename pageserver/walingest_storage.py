"""Records that create, cut and drop storage: SMGR, databases, tablespaces, relation maps."""

from pageserver import keys
from pageserver.datadir_modification import DatadirModification
from pageserver.values import ValueKind, encode_truncate_vm
from pageserver.walingest_context import IngestContext
from postgres_ffi import xlog_records as wal
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.heap_records import HEAPBLOCKS_PER_PAGE
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import FSM_FORKNUM, MAIN_FORKNUM, VISIBILITYMAP_FORKNUM, RelTag
from postgres_ffi.relmap import parse_relmap

_COPY_AT_ONCE = 256  # pages


def ingest_smgr(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """TRUNCATE (smgr_redo); CREATE is native."""
    truncate = wal.parse_smgr_truncate(record.main_data)
    main = truncate.relation.fork(MAIN_FORKNUM)
    if mod.fork_size(main) is None:
        mod.set_fork_size(main, 0)
    if truncate.flags & wal.SMGR_TRUNCATE_HEAP:
        mod.set_fork_size(main, min(truncate.blkno, mod.fork_size(main) or 0))
    fsm = truncate.relation.fork(FSM_FORKNUM)
    if truncate.flags & wal.SMGR_TRUNCATE_FSM and mod.fork_size(fsm):
        mod.set_fork_size(fsm, 0)
    if truncate.flags & wal.SMGR_TRUNCATE_VM:
        _truncate_vm(truncate.relation.fork(VISIBILITYMAP_FORKNUM), truncate.blkno, mod)


def _truncate_vm(vm: RelTag, heap_blkno: int, mod: DatadirModification) -> None:
    """Cut the map and clear the rest of its last page (visibilitymap_prepare_truncate).

    If the heap grows again, bits left behind would make its new pages all-visible.
    """
    nblocks = mod.fork_size(vm)
    if not nblocks:
        return
    keep, tail = divmod(heap_blkno, HEAPBLOCKS_PER_PAGE)
    if tail:
        if keep < nblocks:
            key = keys.rel_block_key(vm, keep)
            mod.put_record(key, ValueKind.TRUNCATE_VM, encode_truncate_vm(heap_blkno))
        keep += 1
    if keep < nblocks:
        mod.set_fork_size(vm, keep)


def ingest_dbase(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """CREATE_FILE_COPY, CREATE_WAL_LOG, DROP (dbase_redo)."""
    match record.rmgr_info:
        case wal.XLOG_DBASE_CREATE_FILE_COPY:
            _copy_database(wal.parse_dbase_create_file_copy(record.main_data), mod, context)
        case wal.XLOG_DBASE_CREATE_WAL_LOG:
            create = wal.parse_dbase_create_wal_log(record.main_data)
            mod.add_database(create.spcnode, create.dbnode)
        case wal.XLOG_DBASE_DROP:
            drop = wal.parse_dbase_drop(record.main_data)
            lsn = context.publish()
            for spcnode in drop.spcnodes:
                forks = context.datadir.database_sizes(spcnode, drop.dbnode, lsn)
                mod.drop_database(spcnode, drop.dbnode, forks)


def _copy_database(
    copy: wal.DbaseCreateFileCopy, mod: DatadirModification, context: IngestContext
) -> None:
    """The new database gets images of all pages, as they are before this record.

    The pages go straight to the layer: a database does not fit the memory of a modification.
    """
    datadir, lsn = context.datadir, context.publish()
    source = (copy.source_spcnode, copy.source_dbnode)
    leftover = datadir.database_sizes(copy.spcnode, copy.dbnode, lsn)
    if (copy.spcnode, copy.dbnode) in mod.databases or leftover:
        mod.drop_database(copy.spcnode, copy.dbnode, leftover, replaced=True)
    has_relmap = mod.databases.get(source, False)
    mod.add_database(copy.spcnode, copy.dbnode, has_relmap=has_relmap)
    if has_relmap:
        mod.put_image(keys.relmap_key(copy.spcnode, copy.dbnode), datadir.relmap(*source, lsn))
    for rel, nblocks in datadir.database_sizes(*source, lsn):
        target = RelTag(copy.spcnode, copy.dbnode, rel.relnode, rel.forknum)
        mod.set_fork_size(target, nblocks)
        for start in range(0, nblocks, _COPY_AT_ONCE):
            count = min(_COPY_AT_ONCE, nblocks - start)
            for blkno, page in enumerate(datadir.get_rel_pages(rel, start, count, lsn), start):
                image = b"" if page == ZERO_PAGE else page
                mod.put_now(keys.rel_block_key(target, blkno), image)


def ingest_tblspc(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """CREATE and DROP (tblspc_redo). A tablespace is dropped when nothing is in it."""
    if record.rmgr_info == wal.XLOG_TBLSPC_CREATE:
        create = wal.parse_tblspc_create(record.main_data)
        mod.set_tablespace(create.spcnode, create.location)
        return
    spcnode = wal.parse_tblspc_drop(record.main_data)
    mod.set_tablespace(spcnode, None)
    lsn = context.publish()
    for space, dbnode in list(mod.databases):
        if space == spcnode:
            forks = context.datadir.database_sizes(spcnode, dbnode, lsn)
            mod.drop_database(spcnode, dbnode, forks)


def ingest_relmap(record: DecodedRecord, mod: DatadirModification, context: IngestContext) -> None:
    """UPDATE (relmap_redo): the whole new file."""
    update = wal.parse_relmap_update(record.main_data)
    parse_relmap(update.data)
    mod.add_database(update.spcnode, update.dbnode, has_relmap=True)
    mod.put_image(keys.relmap_key(update.spcnode, update.dbnode), update.data)
