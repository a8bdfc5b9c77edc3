"""The registry: which timelines this safekeeper has, and the highest term promised in each.

It lies in the data directory, apart from the timelines' own directories, so that one that vanished
or whose control file is damaged is not taken for a new timeline: it is missed, and what it promised
is still known. A promise of a term goes here before it goes into the control file; a new timeline
comes here after its control file is durable and before anything is answered in it.

Layout, little-endian: u32 magic, u32 version, then entries of 16 bytes of tenant id, 16 bytes of
timeline id, u64 term, u32 CRC-32C of the 40 bytes before it. Entries are only appended; of several
of a timeline the one with the highest term counts. Each start replaces the file by a tidy one.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from zenith_utils.crc32c import crc32c
from zenith_utils.durable import fsync_dir, write_file_durably
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId

logger = logging.getLogger(__name__)

REGISTRY_FILE_NAME: Final = "safekeeper.timelines"
MAGIC: Final = 0xCAFE7115
VERSION: Final = 1

_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<16s16sQ")
_CRC = struct.Struct("<I")
_ENTRY_SIZE: Final = _ENTRY.size + _CRC.size


class RegistryError(Exception):
    """The registry was written by another version, or cannot be written any more."""


class TimelineRegistry:
    """The open registry of a data directory. Any thread may use it."""

    def __init__(self, directory: Path, present: Iterable[TenantTimelineId], *, sync: bool) -> None:
        """Read it; `present` are the timelines with a control file, which are added if missing.

        A damaged file is put aside and made anew of the entries that are whole. Raises
        RegistryError, OSError.
        """
        self._path = directory / REGISTRY_FILE_NAME
        self._sync = sync
        self._lock = threading.Lock()
        self._failed = False
        data = self._read()
        self._terms, damaged = _parse(data, self._path)
        if damaged:
            aside = self._path.with_name(f"{REGISTRY_FILE_NAME}.damaged")
            write_file_durably(aside, data, sync=sync)
            logger.error(
                "%s is damaged, see %s: a timeline without a directory may have been forgotten",
                self._path, aside,
            )  # fmt: skip
        for timeline_id in present:
            self._terms.setdefault(timeline_id, 0)
        tidy = _encode(self._terms)
        if tidy != data:
            write_file_durably(self._path, tidy, sync=sync)
        elif sync:
            # A process that died between renaming and fsync may have left it in the cache only.
            fsync_dir(directory)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if sync:
            os.fsync(self._fd)
        self._end = len(tidy)

    def timelines(self) -> list[TenantTimelineId]:
        """All timelines."""
        with self._lock:
            return list(self._terms)

    def term(self, timeline_id: TenantTimelineId) -> int | None:
        """The highest term promised in a timeline, 0 if none was; None if it is not known."""
        return self._terms.get(timeline_id)

    def note(self, timeline_id: TenantTimelineId, term: int) -> None:
        """Remember a timeline, and that it promises `term`; durable on return.

        Raises RegistryError, OSError.
        """
        with self._lock:
            known = self._terms.get(timeline_id)
            if known is not None and known >= term:
                return
            if self._failed:
                raise RegistryError(
                    f"{self._path} could not be made durable before: restart this safekeeper"
                )
            entry = _encode_entry(timeline_id, term)
            # At a position, not at the end: what an attempt without space left is overwritten.
            if os.pwrite(self._fd, entry, self._end) != len(entry):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            if self._sync:
                try:
                    os.fdatasync(self._fd)
                except OSError:
                    self._failed = True
                    raise
            self._end += len(entry)
            self._terms[timeline_id] = term

    def close(self) -> None:
        """Release the file."""
        os.close(self._fd)

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""


def _parse(data: bytes, path: Path) -> tuple[dict[TenantTimelineId, int], bool]:
    """The terms of all whole entries, and whether there is damage.

    A last entry that is cut short or wrong is what a crash leaves: nobody was answered for it.
    """
    if not data:
        return {}, False
    damaged = True
    if len(data) >= _HEADER.size:
        magic, version = _HEADER.unpack_from(data)
        damaged = magic != MAGIC
        if not damaged and version != VERSION:
            raise RegistryError(
                f"unsupported version {version} of {path}, this program reads {VERSION} only"
            )
    terms: dict[TenantTimelineId, int] = {}
    for offset in range(_HEADER.size, len(data) - _ENTRY_SIZE + 1, _ENTRY_SIZE):
        content = data[offset : offset + _ENTRY.size]
        if _CRC.unpack_from(data, offset + _ENTRY.size)[0] != crc32c(content):
            damaged = damaged or offset + 2 * _ENTRY_SIZE <= len(data)
            continue
        tenant, timeline, term = _ENTRY.unpack(content)
        timeline_id = TenantTimelineId(TenantId(tenant), TimelineId(timeline))
        terms[timeline_id] = max(term, terms.get(timeline_id, 0))
    return terms, damaged


def _encode(terms: dict[TenantTimelineId, int]) -> bytes:
    entries = [_encode_entry(timeline_id, term) for timeline_id, term in terms.items()]
    return _HEADER.pack(MAGIC, VERSION) + b"".join(entries)


def _encode_entry(timeline_id: TenantTimelineId, term: int) -> bytes:
    content = _ENTRY.pack(timeline_id.tenant_id.raw, timeline_id.timeline_id.raw, term)
    return content + _CRC.pack(crc32c(content))
