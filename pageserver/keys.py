"""The key space: how relations, SLRUs and the rest of a cluster map to the store's 18-byte keys.

A key is six big-endian fields, `u8 kind, u32 a, u32 b, u32 c, u8 d, u32 e`, compared as bytes:

==================  ====  =======  ======  =======  =======  ==========  ==========================
what                kind  a        b       c        d        e           value
==================  ====  =======  ======  =======  =======  ==========  ==========================
database directory  0     0        0       0        0        0           databases and relmap flags
relation map file   0     spcnode  dbnode  0        0        0           pg_filenode.map
fork size           0     spcnode  dbnode  0        1+fork   relnode     u32 blocks, empty: dropped
relation block      0     spcnode  dbnode  relnode  forknum  blkno       page
SLRU directory      1     kind     0       0        0        0           segment numbers
SLRU block          1     kind     1       segno    0        block       page
SLRU segment size   1     kind     1       segno    0        0xFFFFFFFF  u32 blocks
two-phase directory 2     0        0       0        0        0           xids
two-phase state     2     0        0       0        0        xid         state data without CRC
control file        3     0        0       0        0        0           pg_control as imported
checkpoint          3     0        0       0        0        1           CheckPoint struct
counters            3     0        0       0        0        2           next xid, multixact, offset
parameters          3     0        0       0        0        3           xl_parameter_change
commit time         3     0        0       0        0        4           CommitTime of the newest
origins             4     0        0       0        0        0           replication progress
tablespaces         5     0        0       0        0        0           oids and locations
==================  ====  =======  ======  =======  =======  ==========  ==========================

A fork exists exactly when its size value is not empty. The sizes of a database lie together, so
that listing relations and their sizes reads one narrow range, and creating one of 100,000 relations
writes one small value. Relations never have relnode 0, which keeps that range free of blocks.

The parameters are absent until they change, the commit time is until the first commit.
"""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from postgres_ffi.relfile import RelTag
from postgres_ffi.slru import SlruKind

KEY_SIZE = 18
MAX_BLOCKS = 0xFFFFFFFE  # of one fork: MaxBlockNumber, one less than Postgres could address

_KEY = Struct(">BIIIBI")
_SIZE = Struct("<I")
_COUNTERS = Struct("<QII")
_COMMIT_TIME = Struct("<qI")
_LAST_U32 = 0xFFFFFFFF
_SIZE_BLKNO = _LAST_U32


class KeyKind(IntEnum):
    """First byte of a key."""

    RELATION = 0
    SLRU = 1
    TWOPHASE = 2
    CONTROL = 3
    ORIGINS = 4
    TABLESPACES = 5


class CommitTime(NamedTuple):
    """When the newest transactions ended, by the clock of the cluster; never decreases.

    `time` is the greatest time (TimestampTz: microseconds since 2000-01-01 UTC) of a commit or
    abort, also of a prepared transaction: the records that recovery_target_time looks at. A backend
    takes the time before its record gets its place in the WAL, so neighbours may be in the wrong
    order; a time that is less than the greatest by no more than CLOCK_TOLERANCE changes nothing. If
    it is less by more, the clock was set back: `clock_sets` counts that, and `time` starts anew.
    """

    clock_sets: int
    time: int


CLOCK_TOLERANCE = 60_000_000  # microseconds
BEFORE_COMMITS = CommitTime(0, -(1 << 63))

DATABASE_DIRECTORY_KEY = _KEY.pack(KeyKind.RELATION, 0, 0, 0, 0, 0)
TWOPHASE_DIRECTORY_KEY = _KEY.pack(KeyKind.TWOPHASE, 0, 0, 0, 0, 0)
CONTROL_FILE_KEY = _KEY.pack(KeyKind.CONTROL, 0, 0, 0, 0, 0)
CHECKPOINT_KEY = _KEY.pack(KeyKind.CONTROL, 0, 0, 0, 0, 1)
COUNTERS_KEY = _KEY.pack(KeyKind.CONTROL, 0, 0, 0, 0, 2)
PARAMETERS_KEY = _KEY.pack(KeyKind.CONTROL, 0, 0, 0, 0, 3)
COMMIT_TIME_KEY = _KEY.pack(KeyKind.CONTROL, 0, 0, 0, 0, 4)
ORIGINS_KEY = _KEY.pack(KeyKind.ORIGINS, 0, 0, 0, 0, 0)
TABLESPACES_KEY = _KEY.pack(KeyKind.TABLESPACES, 0, 0, 0, 0, 0)


def relmap_key(spcnode: int, dbnode: int) -> bytes:
    """Key of a database's pg_filenode.map (1664, 0 for the shared one)."""
    return _KEY.pack(KeyKind.RELATION, spcnode, dbnode, 0, 0, 0)


def rel_block_key(rel: RelTag, blkno: int) -> bytes:
    """Key of a block of a relation fork."""
    return _KEY.pack(KeyKind.RELATION, rel.spcnode, rel.dbnode, rel.relnode, rel.forknum, blkno)


def fork_range(rel: RelTag, blkno: int) -> tuple[bytes, bytes]:
    """[start, end) of the keys of all blocks of a fork from ``blkno`` on."""
    return rel_block_key(rel, blkno), next_key(rel_block_key(rel, _LAST_U32))


def relation_range(spcnode: int, dbnode: int, relnode: int) -> tuple[bytes, bytes]:
    """[start, end) of the keys of all blocks of all forks of a relation."""
    start = _KEY.pack(KeyKind.RELATION, spcnode, dbnode, relnode, 0, 0)
    last = _KEY.pack(KeyKind.RELATION, spcnode, dbnode, relnode, 0xFF, _LAST_U32)
    return start, next_key(last)


def database_range(spcnode: int, dbnode: int) -> tuple[bytes, bytes]:
    """[start, end) of the keys of all blocks of all relations of a database, not of their sizes."""
    start = _KEY.pack(KeyKind.RELATION, spcnode, dbnode, 1, 0, 0)
    last = _KEY.pack(KeyKind.RELATION, spcnode, dbnode, _LAST_U32, 0xFF, _LAST_U32)
    return start, next_key(last)


def rel_size_key(rel: RelTag) -> bytes:
    """Key of a fork's number of blocks, which is also its directory entry."""
    return _KEY.pack(KeyKind.RELATION, rel.spcnode, rel.dbnode, 0, 1 + rel.forknum, rel.relnode)


def rel_size_range(spcnode: int, dbnode: int) -> tuple[bytes, bytes]:
    """[start, end) of the size keys of all forks of a database."""
    return (
        _KEY.pack(KeyKind.RELATION, spcnode, dbnode, 0, 1, 0),
        _KEY.pack(KeyKind.RELATION, spcnode, dbnode, 1, 0, 0),
    )


def rel_of_size_key(key: bytes) -> RelTag:
    """The fork whose size lies at `key`; ValueError if it is no size key."""
    kind, spcnode, dbnode, zero, fork_plus_1, relnode = _KEY.unpack(key)
    if kind != KeyKind.RELATION or zero != 0 or not 1 <= fork_plus_1 <= 4:
        raise ValueError(f"{key_text(key)} is not the key of a relation size")
    return RelTag(spcnode, dbnode, relnode, fork_plus_1 - 1)


def slru_directory_key(kind: SlruKind) -> bytes:
    """Key of the set of an SLRU's segment numbers."""
    return _KEY.pack(KeyKind.SLRU, kind, 0, 0, 0, 0)


def slru_block_key(kind: SlruKind, segno: int, blkno: int) -> bytes:
    """Key of a page of an SLRU segment (`blkno` 0..31)."""
    return _KEY.pack(KeyKind.SLRU, kind, 1, segno, 0, blkno)


def slru_size_key(kind: SlruKind, segno: int) -> bytes:
    """Key of an SLRU segment's number of blocks."""
    return _KEY.pack(KeyKind.SLRU, kind, 1, segno, 0, _SIZE_BLKNO)


def twophase_key(xid: int) -> bytes:
    """Key of the state data of a prepared transaction."""
    return _KEY.pack(KeyKind.TWOPHASE, 0, 0, 0, 0, xid)


def encode_size(nblocks: int | None) -> bytes:
    """Value of a size key; empty if the object is dropped."""
    return b"" if nblocks is None else _SIZE.pack(nblocks)


def decode_size(value: bytes | None) -> int | None:
    """The reverse of `encode_size`; None also for a key that was never written."""
    return int(_SIZE.unpack(value)[0]) if value else None


def encode_counters(next_xid: int, next_multi: int, next_multi_offset: int) -> bytes:
    """Value of COUNTERS_KEY: full transaction id, multixact id, multixact member offset."""
    return _COUNTERS.pack(next_xid, next_multi, next_multi_offset)


def decode_counters(value: bytes) -> tuple[int, int, int]:
    """The reverse of `encode_counters`."""
    counters: tuple[int, int, int] = _COUNTERS.unpack(value)
    return counters


def encode_commit_time(value: CommitTime) -> bytes:
    """Value of COMMIT_TIME_KEY: i64 time, u32 how often the clock was set back, little-endian."""
    return _COMMIT_TIME.pack(value.time, value.clock_sets)


def decode_commit_time(value: bytes | None) -> CommitTime:
    """The reverse of `encode_commit_time`; BEFORE_COMMITS for a key that was never written."""
    if not value:
        return BEFORE_COMMITS
    time, clock_sets = _COMMIT_TIME.unpack(value)
    return CommitTime(clock_sets, time)


def split_key(key: bytes) -> tuple[int, int, int, int, int, int]:
    """The six fields of a key."""
    fields: tuple[int, int, int, int, int, int] = _KEY.unpack(key)
    return fields


def next_key(key: bytes) -> bytes:
    """The smallest key above `key`: the exclusive end of a range that ends with it."""
    return (int.from_bytes(key, "big") + 1).to_bytes(KEY_SIZE, "big")


def key_text(key: bytes) -> str:
    """36 upper-case hexadecimal digits."""
    return key.hex().upper()
