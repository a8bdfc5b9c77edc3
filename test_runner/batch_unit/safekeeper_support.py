"""Valid WAL made by hand, for tests that need no Postgres."""

from __future__ import annotations

import random
import struct

from postgres_ffi.wal_format import (
    WAL_BLCKSZ,
    WAL_SEGMENT_SIZE,
    XLP_FIRST_IS_CONTRECORD,
    XLP_LONG_HEADER,
    WalPageHeader,
)
from zenith_utils.crc32c import crc32c

RM_LOGICALMSG = 21
_RECORD_HEADER = struct.Struct("<IIQBBxxI")


class WalWriter:
    """Appends records at consecutive positions, with page headers between."""

    def __init__(self, start_lsn: int, seed: int = 0) -> None:
        self.start_lsn = start_lsn
        self.data = bytearray()
        self.ends: list[int] = []
        """End of each record, 8-aligned: what a flush LSN can be."""
        self._prev = 0
        self._rng = random.Random(seed)

    @property
    def lsn(self) -> int:
        """Where the next byte goes."""
        return self.start_lsn + len(self.data)

    def record(self, size: int) -> int:
        """Append a record with `size` random bytes of main data; its end."""
        body = b"\xfe" + struct.pack("<I", size) + self._rng.randbytes(size)
        total = _RECORD_HEADER.size + len(body)
        if self.lsn % WAL_BLCKSZ == 0:
            self._page_header(0)
        start = self.lsn
        head = _RECORD_HEADER.pack(total, 0, self._prev, 0, RM_LOGICALMSG, 0)
        crc = crc32c(head[:20], crc32c(body))
        self._put(head[:20] + struct.pack("<I", crc) + body)
        self._prev = start
        self.data += bytes(-self.lsn % 8)
        self.ends.append(self.lsn)
        return self.lsn

    def until(self, lsn: int, size: int = 300) -> None:
        """Append records until `lsn` is passed."""
        while self.lsn < lsn:
            self.record(self._rng.randint(1, 2 * size))

    def _put(self, record: bytes) -> None:
        data = memoryview(record)
        while data:
            room = WAL_BLCKSZ - self.lsn % WAL_BLCKSZ
            if room == WAL_BLCKSZ and self.data:
                self._page_header(len(data))
                room = WAL_BLCKSZ - self.lsn % WAL_BLCKSZ
            self.data += data[:room]
            data = data[room:]

    def _page_header(self, rem_len: int) -> None:
        info = XLP_FIRST_IS_CONTRECORD if rem_len else 0
        if self.lsn % WAL_SEGMENT_SIZE == 0:
            info |= XLP_LONG_HEADER
        header = WalPageHeader(0xD110, info, 1, self.lsn, rem_len, 42, WAL_SEGMENT_SIZE, WAL_BLCKSZ)
        self.data += header.pack()
