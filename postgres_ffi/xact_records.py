"""Main data of transaction records (access/xact.h): commit, abort, prepare.

Times are TimestampTz: microseconds since 2000-01-01 UTC. Every length is checked:
RecordFormatError.
"""

import struct
from dataclasses import dataclass

from typing_extensions import Buffer

from .record_reader import RecordReader, RelFileNode
from .versions import PgVersion

XLOG_XACT_OPMASK = 0x70
XLOG_XACT_COMMIT = 0x00
XLOG_XACT_PREPARE = 0x10
XLOG_XACT_ABORT = 0x20
XLOG_XACT_COMMIT_PREPARED = 0x30
XLOG_XACT_ABORT_PREPARED = 0x40
XLOG_XACT_ASSIGNMENT = 0x50
XLOG_XACT_INVALIDATIONS = 0x60
XLOG_XACT_HAS_INFO = 0x80

XINFO_HAS_DBINFO = 1 << 0
XINFO_HAS_SUBXACTS = 1 << 1
XINFO_HAS_RELFILENODES = 1 << 2
XINFO_HAS_INVALS = 1 << 3
XINFO_HAS_TWOPHASE = 1 << 4
XINFO_HAS_ORIGIN = 1 << 5
XINFO_HAS_AE_LOCKS = 1 << 6
XINFO_HAS_GID = 1 << 7
XINFO_HAS_DROPPED_STATS = 1 << 8

_CRC_SIZE = 4  # total_len counts the CRC that the file ends with
_PREPARE_HEADER = struct.Struct("<IIIIqIiiiiii?xHQq")


@dataclass(frozen=True, slots=True)
class XactEnd:
    """Commit or abort, also of a prepared transaction.

    `twophase_xid` is the transaction to end (0: the record's own xl_xid); `gid` is None unless
    logged. `relations` are dropped with all their forks. `origin_lsn` is 0 without an origin.
    """

    committed: bool
    prepared: bool
    xact_time: int
    xinfo: int
    dbnode: int
    spcnode: int
    subxacts: tuple[int, ...]
    relations: tuple[RelFileNode, ...]
    twophase_xid: int
    gid: str | None
    origin_lsn: int
    origin_timestamp: int


def parse_xact_end(data: Buffer, info: int, version: PgVersion) -> XactEnd:
    """XACT COMMIT, ABORT, COMMIT_PREPARED or ABORT_PREPARED; `info` is the record's xl_info.

    RecordFormatError also if `info` is none of these.
    """
    op = info & XLOG_XACT_OPMASK
    reader = RecordReader(data, "XACT COMMIT/ABORT")
    if op not in _XACT_ENDS:
        raise reader.error(f"has operation {op:02X}")
    committed, prepared = _XACT_ENDS[op]
    xact_time = reader.number("q")
    xinfo = reader.number("I") if info & XLOG_XACT_HAS_INFO else 0
    dbnode = spcnode = twophase_xid = origin_lsn = origin_timestamp = 0
    subxacts: tuple[int, ...] = ()
    relations: tuple[RelFileNode, ...] = ()
    gid: str | None = None
    if xinfo & XINFO_HAS_DBINFO:
        dbnode, spcnode = reader.u32s(2)
    if xinfo & XINFO_HAS_SUBXACTS:
        subxacts = reader.u32s(reader.number("i"))
    if xinfo & XINFO_HAS_RELFILENODES:
        relations = reader.relations(reader.number("i"))
    if xinfo & XINFO_HAS_DROPPED_STATS:
        reader.skip(reader.number("i"), version.dropped_stats_size)
    if committed and xinfo & XINFO_HAS_INVALS:
        reader.skip(reader.number("i"), version.invalidation_size)
    if xinfo & XINFO_HAS_TWOPHASE:
        twophase_xid = reader.number("I")
        if xinfo & XINFO_HAS_GID:
            gid = reader.cstring()
    if prepared and not twophase_xid:
        raise reader.error("ends a prepared transaction but does not name it")
    if xinfo & XINFO_HAS_ORIGIN:
        origin_lsn, origin_timestamp = reader.number("Q"), reader.number("q")
    return XactEnd(
        committed=committed,
        prepared=prepared,
        xact_time=xact_time,
        xinfo=xinfo,
        dbnode=dbnode,
        spcnode=spcnode,
        subxacts=subxacts,
        relations=relations,
        twophase_xid=twophase_xid,
        gid=gid,
        origin_lsn=origin_lsn,
        origin_timestamp=origin_timestamp,
    )


_XACT_ENDS = {
    XLOG_XACT_COMMIT: (True, False),
    XLOG_XACT_COMMIT_PREPARED: (True, True),
    XLOG_XACT_ABORT: (False, False),
    XLOG_XACT_ABORT_PREPARED: (False, True),
}


@dataclass(frozen=True, slots=True)
class XactPrepare:
    """PREPARE TRANSACTION. The record's main data is the state file without its CRC."""

    xid: int
    dbnode: int
    prepared_at: int
    owner: int
    gid: str
    subxacts: tuple[int, ...]
    commit_relations: tuple[RelFileNode, ...]
    abort_relations: tuple[RelFileNode, ...]
    origin_lsn: int
    origin_timestamp: int


def parse_xact_prepare(data: Buffer, version: PgVersion) -> XactPrepare:
    """XACT PREPARE, or a pg_twophase file without its CRC (TwoPhaseFileHeader; parts 8-aligned)."""
    reader = RecordReader(data, "XACT PREPARE")
    (
        magic,
        total_len,
        xid,
        dbnode,
        prepared_at,
        owner,
        nsubxacts,
        ncommitrels,
        nabortrels,
        _ncommitstats,
        _nabortstats,
        _ninvalmsgs,
        _initfileinval,
        gidlen,
        origin_lsn,
        origin_timestamp,
    ) = _PREPARE_HEADER.unpack(reader.take(_PREPARE_HEADER.size))
    if magic != version.twophase_magic:
        raise reader.error(f"has magic {magic:08X} (expected {version.twophase_magic:08X})")
    if total_len != len(reader.data) + _CRC_SIZE:
        raise reader.error(f"has {len(reader.data)} bytes and claims {total_len}")
    gid = reader.take(gidlen).rstrip(b"\0").decode("utf-8", "surrogateescape")
    reader.align()
    subxacts = reader.u32s(nsubxacts)
    reader.align()
    commit_relations = reader.relations(ncommitrels)
    reader.align()
    abort_relations = reader.relations(nabortrels)
    return XactPrepare(
        xid=xid,
        dbnode=dbnode,
        prepared_at=prepared_at,
        owner=owner,
        gid=gid,
        subxacts=subxacts,
        commit_relations=commit_relations,
        abort_relations=abort_relations,
        origin_lsn=origin_lsn,
        origin_timestamp=origin_timestamp,
    )
