"""Feedback of a pageserver about one timeline, carried to safekeepers and to the compute.

Encoding, all big-endian: u8 number of pairs, then per pair a NUL-terminated key, an i32 value
length and the value. Unknown keys are skipped, so that senders may be newer than receivers.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

from typing_extensions import Buffer

# Microseconds between the Unix epoch and Postgres' own, 2000-01-01 UTC (timestamp.h).
POSTGRES_EPOCH_MICROS = 946_684_800 * 1_000_000

_FIELDS = (
    (b"current_timeline_size", "current_timeline_size", struct.Struct(">Q")),
    (b"ps_writelsn", "ps_writelsn", struct.Struct(">Q")),
    (b"ps_flushlsn", "ps_flushlsn", struct.Struct(">Q")),
    (b"ps_applylsn", "ps_applylsn", struct.Struct(">Q")),
    (b"ps_replytime", "ps_replytime", struct.Struct(">q")),
)
_BY_KEY = {key: (name, codec) for key, name, codec in _FIELDS}
_LENGTH = struct.Struct(">i")


class FeedbackError(ValueError):
    """Malformed feedback message."""


@dataclass(frozen=True, slots=True)
class ZenithFeedback:
    """How far a pageserver is with a timeline. Zero means unknown or none.

    current_timeline_size: logical size in bytes; ps_writelsn: received; ps_flushlsn: durable in
    layer files; ps_applylsn: uploaded to remote storage; ps_replytime: microseconds since
    2000-01-01 UTC.
    """

    current_timeline_size: int = 0
    ps_writelsn: int = 0
    ps_flushlsn: int = 0
    ps_applylsn: int = 0
    ps_replytime: int = 0

    def encode(self) -> bytes:
        """The wire form of the message, without the CopyData tag and length around it."""
        parts = [bytes([len(_FIELDS)])]
        for key, name, codec in _FIELDS:
            parts += (key, b"\0", _LENGTH.pack(codec.size), codec.pack(getattr(self, name)))
        return b"".join(parts)

    @classmethod
    def parse(cls, data: Buffer) -> ZenithFeedback:
        """Parse the wire form; absent keys keep their defaults. Raises FeedbackError."""
        raw = bytes(data)
        if not raw:
            raise FeedbackError("empty feedback message")
        values: dict[str, int] = {}
        position = 1
        for _ in range(raw[0]):
            key_end = raw.find(b"\0", position)
            if key_end < 0 or key_end + 5 > len(raw):
                raise FeedbackError(f"feedback message of {len(raw)} bytes is cut short")
            key, start = raw[position:key_end], key_end + 5
            (length,) = _LENGTH.unpack_from(raw, key_end + 1)
            position = start + length
            if length < 0 or position > len(raw):
                raise FeedbackError(f"feedback key {key!r} has a value of {length} bytes")
            known = _BY_KEY.get(key)
            if known is None:
                continue
            name, codec = known
            if length != codec.size:
                raise FeedbackError(f"feedback key {key!r} has {length} bytes, not {codec.size}")
            (values[name],) = codec.unpack_from(raw, start)
        return cls(**values)


def postgres_timestamp(unix_seconds: float | None = None) -> int:
    """Microseconds since 2000-01-01 UTC of a Unix time in seconds; default now."""
    micros = time.time_ns() // 1000 if unix_seconds is None else round(unix_seconds * 1_000_000)
    return micros - POSTGRES_EPOCH_MICROS
