"""The CheckPoint struct (catalog/pg_control.h), body of checkpoint records and of pg_control."""

from dataclasses import dataclass, fields

from typing_extensions import Buffer

from .versions import PgVersion


@dataclass(frozen=True, slots=True)
class CheckPoint:
    """LSNs and `next_xid` have 64 bits (epoch in the high half), `time` is in Unix seconds."""

    redo: int
    this_timeline_id: int
    prev_timeline_id: int
    full_page_writes: bool
    next_xid: int
    next_oid: int
    next_multi: int
    next_multi_offset: int
    oldest_xid: int
    oldest_xid_db: int
    oldest_multi: int
    oldest_multi_db: int
    time: int
    oldest_commit_ts_xid: int
    newest_commit_ts_xid: int
    oldest_active_xid: int
    wal_level: int | None = None  # None in versions before 18, whose struct lacks it


def parse_checkpoint(data: Buffer, version: PgVersion) -> CheckPoint:
    """CheckPoint from its native bytes; ValueError if `data` is not of the struct's exact size."""
    size = memoryview(data).nbytes
    if size != version.checkpoint.size:
        raise ValueError(
            f"checkpoint of PostgreSQL {version.major} has {version.checkpoint.size} bytes,"
            f" not {size}"
        )
    values = version.checkpoint.unpack(data)
    return CheckPoint(**values)  # type: ignore[arg-type]


def encode_checkpoint(checkpoint: CheckPoint, version: PgVersion) -> bytes:
    """Native bytes of a CheckPoint, padding zeroed; struct.error if a number does not fit."""
    data = bytearray(version.checkpoint.size)
    values = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    version.checkpoint.pack_into(data, {k: v for k, v in values.items() if v is not None})
    return bytes(data)
