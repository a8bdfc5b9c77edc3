"""The leases of a timeline on disk, so that they outlive the pageserver's process.

A text file: the CRC-32C of what follows in 8 hexadecimal digits, a line end, then a JSON array of
``{"lease_id": text, "lsn": "X/X", "ttl": seconds}``. Times of expiry are not in it: after a restart
a lease lasts for its whole time to live once more, in which its holder renews it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zenith_utils.crc32c import crc32c
from zenith_utils.durable import fsync_dir, write_file_durably
from zenith_utils.lsn import Lsn


class LeaseFileError(Exception):
    """The file does not hold what was written to it."""


@dataclass(frozen=True, slots=True)
class StoredLease:
    """What is remembered of a lease. ``ttl`` is in seconds."""

    lease_id: str
    lsn: Lsn
    ttl: float


class LeaseFile:
    """Where the leases of one timeline are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def load(self) -> list[StoredLease]:
        """What was saved last. Raises LeaseFileError, OSError."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        checksum, _, content = data.partition(b"\n")
        if checksum != b"%08x" % crc32c(content):
            raise LeaseFileError(f"{self._path}: checksum mismatch")
        return [
            StoredLease(item["lease_id"], Lsn.parse(item["lsn"]), item["ttl"])
            for item in json.loads(content)
        ]

    def save(self, leases: Iterable[StoredLease]) -> None:
        """Replace what was saved, durably. Raises OSError."""
        items = [{"lease_id": x.lease_id, "lsn": str(x.lsn), "ttl": x.ttl} for x in leases]
        if not items and not self._path.exists():
            return
        if not self._path.parent.exists():
            self._path.parent.mkdir()
            fsync_dir(self._path.parent.parent)
        content = json.dumps(items).encode()
        write_file_durably(self._path, b"%08x\n" % crc32c(content) + content)
