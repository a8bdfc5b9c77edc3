"""Damaged files of a timeline are put aside, not deleted: they may hold what no other place has.

They lie in a directory ``damaged-N`` of the timeline's directory until the timeline is whole again.
Before WAL is put aside it is durable that the timeline is recovering; a control file that is put
aside could not be read, or is missed because the registry knows the timeline. So a crash in between
finds a shorter log of a timeline that does not vote, never a shorter log of one that does.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Final

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.control_file import CONTROL_FILE_NAME
from safekeeper.wal_files import (
    TEMP_SUFFIX,
    list_segment_files,
    pwrite_all,
    segment_path,
)
from zenith_utils.durable import fsync_dir

logger = logging.getLogger(__name__)

_PREFIX: Final = "damaged-"
_CHUNK: Final = 1 << 20


def set_wal_aside(directory: Path, good_end: int, *, sync: bool) -> Path:
    """Put aside all segments that hold WAL at or behind `good_end`; the directory they are in now.

    What the first of them has below is copied to a segment in its place. Raises OSError.
    """
    segno, offset = divmod(good_end, WAL_SEGMENT_SIZE)
    aside = _make_directory(directory)
    # Later ones first: a crash leaves a shorter log, never a hole.
    for number, path in reversed(list_segment_files(directory)):
        if number < segno:
            break
        rest = None
        if number == segno and offset:
            rest = _copy_head(directory, path, number, offset, sync=sync)
        path.rename(aside / path.name)
        if rest is not None:
            rest.rename(segment_path(directory, number, partial=True))
    _sync(sync, aside, directory)
    return aside


def set_all_aside(directory: Path, *, sync: bool) -> Path:
    """Put aside the control file, which is damaged or gone, and all WAL; where they are now.

    Raises OSError.
    """
    aside = _make_directory(directory)
    for _, path in reversed(list_segment_files(directory)):
        path.rename(aside / path.name)
    # Last: as long as it is there the timeline cannot be loaded as if nothing was wrong.
    control = directory / CONTROL_FILE_NAME
    if control.exists():
        control.rename(aside / control.name)
    _sync(sync, aside, directory)
    return aside


def remove_set_aside(directory: Path) -> None:
    """The timeline is whole again: remove what was put aside."""
    for aside in _directories(directory):
        try:
            shutil.rmtree(aside)
        except OSError as e:
            logger.warning("cannot remove %s: %s", aside, e)


def _directories(directory: Path) -> list[Path]:
    return [path for path in directory.glob(f"{_PREFIX}*") if path.is_dir()]


def _make_directory(directory: Path) -> Path:
    numbers = [
        int(n) for path in _directories(directory) if (n := path.name[len(_PREFIX) :]).isdecimal()
    ]
    aside = directory / f"{_PREFIX}{max(numbers, default=0) + 1}"
    aside.mkdir(mode=0o700)
    return aside


def _copy_head(directory: Path, path: Path, segno: int, size: int, *, sync: bool) -> Path:
    """A segment under a temporary name with the first `size` bytes of `path`, then zeros."""
    partial = segment_path(directory, segno, partial=True)
    temp = partial.with_name(partial.name + TEMP_SUFFIX)
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for offset in range(0, WAL_SEGMENT_SIZE, _CHUNK):
                data = b""
                if offset < size:
                    data = os.pread(source, min(_CHUNK, size - offset), offset)
                pwrite_all(target, data + bytes(_CHUNK - len(data)), offset)
            if sync:
                os.fsync(target)
        finally:
            os.close(target)
    finally:
        os.close(source)
    return temp


def _sync(sync: bool, *directories: Path) -> None:
    if sync:
        for directory in directories:
            fsync_dir(directory)
