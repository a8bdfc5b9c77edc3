"""Main data of WAL records that change something other than the blocks they refer to.

Transaction records are in `xact_records`, heap records in `heap_records`.

Each parser takes a record's main data and returns it as a frozen dataclass. Every length is
checked: RecordFormatError. Times are TimestampTz: microseconds since 2000-01-01 UTC.
"""

import struct
from dataclasses import dataclass

from typing_extensions import Buffer

from .record_reader import RecordReader, RelFileNode
from .relfile import MAX_FORKNUM, RelTag
from .versions import PgVersion

# RM_XLOG_ID (catalog/pg_control.h)
XLOG_CHECKPOINT_SHUTDOWN = 0x00
XLOG_CHECKPOINT_ONLINE = 0x10
XLOG_NOOP = 0x20
XLOG_NEXTOID = 0x30
XLOG_SWITCH = 0x40
XLOG_BACKUP_END = 0x50
XLOG_PARAMETER_CHANGE = 0x60
XLOG_RESTORE_POINT = 0x70
XLOG_FPW_CHANGE = 0x80
XLOG_END_OF_RECOVERY = 0x90
XLOG_FPI_FOR_HINT = 0xA0
XLOG_FPI = 0xB0
XLOG_OVERWRITE_CONTRECORD = 0xD0

# RM_SMGR_ID (catalog/storage_xlog.h)
XLOG_SMGR_CREATE = 0x10
XLOG_SMGR_TRUNCATE = 0x20
SMGR_TRUNCATE_HEAP = 1
SMGR_TRUNCATE_VM = 2
SMGR_TRUNCATE_FSM = 4

# RM_DBASE_ID (commands/dbcommands_xlog.h), RM_TBLSPC_ID (commands/tablespace.h)
XLOG_DBASE_CREATE_FILE_COPY = 0x00
XLOG_DBASE_CREATE_WAL_LOG = 0x10
XLOG_DBASE_DROP = 0x20
XLOG_TBLSPC_CREATE = 0x00
XLOG_TBLSPC_DROP = 0x10

# RM_CLOG_ID (access/clog.h), RM_MULTIXACT_ID (access/multixact.h), RM_RELMAP_ID
CLOG_ZEROPAGE = 0x00
CLOG_TRUNCATE = 0x10
XLOG_MULTIXACT_ZERO_OFF_PAGE = 0x00
XLOG_MULTIXACT_ZERO_MEM_PAGE = 0x10
XLOG_MULTIXACT_CREATE_ID = 0x20
XLOG_MULTIXACT_TRUNCATE_ID = 0x30
XLOG_RELMAP_UPDATE = 0x00

# RM_REPLORIGIN_ID (replication/origin.h)
XLOG_REPLORIGIN_SET = 0x00
XLOG_REPLORIGIN_DROP = 0x10

# ---- storage, databases, tablespaces


@dataclass(frozen=True, slots=True)
class SmgrTruncate:
    """`blkno` is the main fork's new size; `flags` are SMGR_TRUNCATE_*."""

    blkno: int
    relation: RelFileNode
    flags: int


def parse_smgr_create(data: Buffer) -> RelTag:
    """SMGR CREATE: the fork that is created empty."""
    reader = RecordReader(data, "SMGR CREATE")
    (relation,) = reader.relations(1)
    forknum = reader.number("i")
    if not 0 <= forknum <= MAX_FORKNUM:
        raise reader.error(f"has fork number {forknum}")
    reader.end()
    return relation.fork(forknum)


def parse_smgr_truncate(data: Buffer) -> SmgrTruncate:
    """SMGR TRUNCATE."""
    reader = RecordReader(data, "SMGR TRUNCATE")
    blkno = reader.number("I")
    (relation,) = reader.relations(1)
    flags = reader.number("i")
    reader.end()
    return SmgrTruncate(blkno, relation, flags)


@dataclass(frozen=True, slots=True)
class DbaseCreateFileCopy:
    """A database made by copying the files of another one."""

    dbnode: int
    spcnode: int
    source_dbnode: int
    source_spcnode: int


@dataclass(frozen=True, slots=True)
class DbaseCreateWalLog:
    """A database made empty; its relations follow in WAL."""

    dbnode: int
    spcnode: int


@dataclass(frozen=True, slots=True)
class DbaseDrop:
    """A database that vanishes from the tablespaces named."""

    dbnode: int
    spcnodes: tuple[int, ...]


def parse_dbase_create_file_copy(data: Buffer) -> DbaseCreateFileCopy:
    """DBASE CREATE_FILE_COPY."""
    reader = RecordReader(data, "DBASE CREATE_FILE_COPY")
    fields = reader.u32s(4)
    reader.end()
    return DbaseCreateFileCopy(*fields)


def parse_dbase_create_wal_log(data: Buffer) -> DbaseCreateWalLog:
    """DBASE CREATE_WAL_LOG."""
    reader = RecordReader(data, "DBASE CREATE_WAL_LOG")
    fields = reader.u32s(2)
    reader.end()
    return DbaseCreateWalLog(*fields)


def parse_dbase_drop(data: Buffer) -> DbaseDrop:
    """DBASE DROP."""
    reader = RecordReader(data, "DBASE DROP")
    dbnode = reader.number("I")
    spcnodes = reader.u32s(reader.number("i"))
    reader.end()
    return DbaseDrop(dbnode, spcnodes)


@dataclass(frozen=True, slots=True)
class TablespaceCreate:
    """`location` is empty for an in-place tablespace."""

    spcnode: int
    location: str


def parse_tblspc_create(data: Buffer) -> TablespaceCreate:
    """TBLSPC CREATE."""
    reader = RecordReader(data, "TBLSPC CREATE")
    spcnode = reader.number("I")
    location = reader.cstring()
    return TablespaceCreate(spcnode, location)


def parse_tblspc_drop(data: Buffer) -> int:
    """TBLSPC DROP: the tablespace's oid."""
    reader = RecordReader(data, "TBLSPC DROP")
    spcnode = reader.number("I")
    reader.end()
    return spcnode


# ---- SLRUs and the relation map


@dataclass(frozen=True, slots=True)
class ClogTruncate:
    """`page` is the cutoff page; older segments are dropped."""

    page: int
    oldest_xid: int
    oldest_xid_db: int


def parse_zero_page(data: Buffer, version: PgVersion) -> int:
    """CLOG ZEROPAGE, MULTIXACT ZERO_OFF_PAGE or ZERO_MEM_PAGE: the page number."""
    reader = RecordReader(data, "ZEROPAGE")
    page = reader.number(version.slru_page_code)
    if page < 0:
        raise reader.error(f"has page number {page}")
    reader.end()
    return page


def parse_clog_truncate(data: Buffer, version: PgVersion) -> ClogTruncate:
    """CLOG TRUNCATE."""
    reader = RecordReader(data, "CLOG TRUNCATE")
    page = reader.number(version.slru_page_code)
    if page < 0:
        raise reader.error(f"has page number {page}")
    oldest_xid, oldest_xid_db = reader.u32s(2)
    reader.end()
    return ClogTruncate(page, oldest_xid, oldest_xid_db)


@dataclass(frozen=True, slots=True)
class MultiXactCreate:
    """A new multixact `mid`: its (xid, status) members at member offset `moff` and on."""

    mid: int
    moff: int
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MultiXactTruncate:
    """Ranges [start, end) of multixact ids and of member offsets that are no longer needed."""

    oldest_multi_db: int
    start_multi: int
    end_multi: int
    start_member: int
    end_member: int


def parse_multixact_create(data: Buffer) -> MultiXactCreate:
    """MULTIXACT CREATE_ID; statuses are MultiXactStatus, 0 to 5."""
    reader = RecordReader(data, "MULTIXACT CREATE_ID")
    mid, moff = reader.u32s(2)
    count = reader.count(reader.number("i"))
    members = tuple(struct.iter_unpack("<II", reader.take(8 * count)))
    for _, status in members:
        if status > 0xFF:
            raise reader.error(f"has member status {status}")
    reader.end()
    return MultiXactCreate(mid, moff, members)


def parse_multixact_truncate(data: Buffer) -> MultiXactTruncate:
    """MULTIXACT TRUNCATE_ID."""
    reader = RecordReader(data, "MULTIXACT TRUNCATE_ID")
    fields = reader.u32s(5)
    reader.end()
    return MultiXactTruncate(*fields)


@dataclass(frozen=True, slots=True)
class RelmapUpdate:
    """The new content of a relation map file (shared: dbnode 0, spcnode 1664)."""

    dbnode: int
    spcnode: int
    data: bytes


def parse_relmap_update(data: Buffer) -> RelmapUpdate:
    """RELMAP UPDATE; the content is not looked into (see `relmap`)."""
    reader = RecordReader(data, "RELMAP UPDATE")
    dbnode, spcnode = reader.u32s(2)
    content = reader.take(reader.number("i"))
    reader.end()
    return RelmapUpdate(dbnode, spcnode, content)


# ---- XLOG and replication origins


@dataclass(frozen=True, slots=True)
class ParameterChange:
    """Settings that a standby must match, named as in `PgVersion.control_file`."""

    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_xacts: int
    max_locks_per_xact: int
    wal_level: int
    wal_log_hints: bool
    track_commit_timestamp: bool

    def control_fields(self) -> dict[str, int | bool]:
        """The fields of pg_control this record sets, for `ControlFile.with_fields`."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class OverwriteContrecord:
    """The record that starts at `overwritten_lsn` was never completed and is void."""

    overwritten_lsn: int
    overwrite_time: int


@dataclass(frozen=True, slots=True)
class ReplOriginSet:
    """Progress of a replication origin; without `force` it never goes back."""

    remote_lsn: int
    node_id: int
    force: bool


def parse_next_oid(data: Buffer) -> int:
    """XLOG NEXTOID."""
    reader = RecordReader(data, "XLOG NEXTOID")
    oid = reader.number("I")
    reader.end()
    return oid


def parse_parameter_change(data: Buffer) -> ParameterChange:
    """XLOG PARAMETER_CHANGE."""
    reader = RecordReader(data, "XLOG PARAMETER_CHANGE")
    numbers = struct.unpack("<6i2?", reader.take(26))
    return ParameterChange(*numbers)


def parse_fpw_change(data: Buffer) -> bool:
    """XLOG FPW_CHANGE: the new full_page_writes."""
    reader = RecordReader(data, "XLOG FPW_CHANGE")
    return reader.number("?") != 0


def parse_overwrite_contrecord(data: Buffer) -> OverwriteContrecord:
    """XLOG OVERWRITE_CONTRECORD."""
    reader = RecordReader(data, "XLOG OVERWRITE_CONTRECORD")
    return OverwriteContrecord(reader.number("Q"), reader.number("q"))


def parse_replorigin_set(data: Buffer) -> ReplOriginSet:
    """REPLORIGIN SET."""
    reader = RecordReader(data, "REPLORIGIN SET")
    return ReplOriginSet(reader.number("Q"), reader.number("H"), reader.number("?") != 0)


def parse_replorigin_drop(data: Buffer) -> int:
    """REPLORIGIN DROP: the origin's id."""
    reader = RecordReader(data, "REPLORIGIN DROP")
    return reader.number("H")
