"""Main data of the records by which a hot standby learns which transactions run (standbydefs.h)."""

import struct
from dataclasses import dataclass

from typing_extensions import Buffer

from .record_reader import RecordReader

# RM_STANDBY_ID
XLOG_STANDBY_LOCK = 0x00
XLOG_RUNNING_XACTS = 0x10

_RUNNING_XACTS = struct.Struct("<2i?3x3I")


@dataclass(frozen=True, slots=True)
class RunningXacts:
    """A snapshot of the running transactions; `xids` are those of subtransactions, too.

    With `subxid_overflow` the latter are not complete.
    """

    subxid_overflow: bool
    next_xid: int
    oldest_running_xid: int
    latest_completed_xid: int
    xids: tuple[int, ...]


def parse_running_xacts(data: Buffer) -> RunningXacts:
    """STANDBY RUNNING_XACTS. Raises RecordFormatError."""
    reader = RecordReader(data, "STANDBY RUNNING_XACTS")
    count, subcount, overflow, next_xid, oldest, latest = _RUNNING_XACTS.unpack(
        reader.take(_RUNNING_XACTS.size)
    )
    if count < 0 or subcount < 0:
        raise reader.error(f"has {count} transactions and {subcount} subtransactions")
    xids = reader.u32s(count + subcount)
    reader.end()
    return RunningXacts(overflow, next_xid, oldest, latest, xids)
