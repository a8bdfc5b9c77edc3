"""Cache of reconstructed values: what redo made of a key at an LSN."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import Final

_MAX_VERSIONS: Final = 4
_ENTRY_OVERHEAD: Final = 256


class PageCache:
    """The newest few reconstructed versions of recently used keys; safe for many threads.

    A value is stored with the LSN of the newest record in it, so it holds for every LSN from there
    up to the key's next record. The keys least recently used go first. `capacity` is in bytes, 0
    switches the cache off.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._lock = threading.Lock()
        self._keys: OrderedDict[bytes, list[tuple[int, bytes]]] = OrderedDict()

    def get(self, key: bytes, lsn: int) -> tuple[int, bytes] | None:
        """The newest version (lsn, value) at or below an LSN."""
        if not self._keys:
            return None
        with self._lock:
            versions = self._keys.get(key)
            if versions is None:
                return None
            self._keys.move_to_end(key)
            index = bisect_right(versions, lsn, key=_lsn_of)
            return versions[index - 1] if index else None

    def put(self, key: bytes, lsn: int, value: bytes) -> None:
        """Store the version of a key at an LSN; the oldest of too many versions is dropped."""
        if len(value) + _ENTRY_OVERHEAD > self.capacity:
            return
        with self._lock:
            versions = self._keys.get(key)
            if versions is None:
                versions = self._keys[key] = []
            self._keys.move_to_end(key)
            index = bisect_right(versions, lsn, key=_lsn_of)
            if index and versions[index - 1][0] == lsn:
                return
            versions.insert(index, (lsn, value))
            self.size += len(value) + _ENTRY_OVERHEAD
            if len(versions) > _MAX_VERSIONS:
                self._forget(versions.pop(0))
            while self.size > self.capacity:
                _, dropped = self._keys.popitem(last=False)
                for version in dropped:
                    self._forget(version)

    def _forget(self, version: tuple[int, bytes]) -> None:
        self.size -= len(version[1]) + _ENTRY_OVERHEAD


def _lsn_of(version: tuple[int, bytes]) -> int:
    return version[0]
