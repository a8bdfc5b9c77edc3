"""Making a compute's data directory from a base backup, keeping what its user put there.

The new directory is made beside the old one and exchanged with it in one step, so that a crash at
any point leaves either the old directory or the new one, and the user's files in both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import re
import shutil
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

from compute_tools import state
from compute_tools.lazy_map import create_lazy_files
from compute_tools.standby_datadir import begin_replay
from compute_tools.standby_start import StandbyStart
from zenith_utils.os_user import give, postgres_user

MANIFEST = "zenith.manifest"
STARTUP_BLOCKS = "zenith.startup_blocks"

# Files of the top directory that belong to one life of the server and are made anew.
_OWN_FILES = re.compile(
    r"PG_VERSION|postmaster\.(pid|opts)|current_logfiles|.*\.signal|promote|backup_label.*"
    r"|tablespace_map.*|zenith\.(manifest|startup_blocks)|.*\.tmp"
)
# Directories of Postgres; any other directory is the user's (conf.d, certificates, log).
_OWN_DIRECTORIES = frozenset(
    {
        "base",
        "global",
        "pg_commit_ts",
        "pg_dynshmem",
        "pg_logical",
        "pg_multixact",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_tblspc",
        "pg_twophase",
        "pg_wal",
        "pg_xact",
    }
)
# Written by a clean shutdown and removed at the next start: there only after a clean stop.
_STATISTICS = Path("pg_stat/pgstat.stat")
_ZEROS = bytes(64 * 1024)

_NEW = "pgdata.new"
_OLD = "pgdata.old"
_NEW_MAP = "blocks.map.new"
_MAP = "blocks.map"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class DatadirError(Exception):
    """A base backup that is no base backup, or a directory that cannot be made."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A new data directory, not yet in place."""

    path: Path
    map_path: Path
    relation_files: int


def prepare(
    basebackup: bytes,
    old: Path,
    state_dir: Path,
    *,
    standby: bool,
    replay: StandbyStart | None = None,
) -> Prepared:
    """Make a data directory from a base backup, with the files to keep from `old`.

    The server on it is a `standby` that stays where it is, or one that begins to `replay`. The
    directory and the block map are made in `state_dir`; swap_in() puts them in place. Nothing
    is left of them on a failure. Raises DatadirError, LazyMapError and OSError.
    """
    new, map_path = state_dir / _NEW, state_dir / _NEW_MAP
    remove_leftovers(state_dir)
    try:
        _spread_directories(state_dir)
        new.mkdir(mode=0o700)
        special = _extract(basebackup, new)
        if MANIFEST not in special or STARTUP_BLOCKS not in special:
            raise DatadirError("extracting base backup failed: it holds no relation manifest")
        _keep(old, new)
        if replay is not None:
            begin_replay(new, replay)
        if standby:
            (new / "standby.signal").touch(mode=0o600)
        give(new, recursive=True)
        summary = create_lazy_files(
            new, map_path, special[MANIFEST], special[STARTUP_BLOCKS], owner=postgres_user()
        )
    except BaseException:
        # Above all on a full disk: what was made of the new directory must not keep it full.
        remove_leftovers(state_dir)
        raise
    return Prepared(new, map_path, summary.files)


def swap_in(prepared: Prepared, pgdata: Path, state_dir: Path) -> Path:
    """Put a prepared directory in the place of the old one; returns the path of its block map.

    The old directory is left to remove_leftovers(): it may be large.
    """
    map_path = state_dir / _MAP
    if not _exchange(prepared.path, pgdata):
        # recover_swap() undoes a crash between the two renames.
        old = state_dir / _OLD
        pgdata.rename(old)
        prepared.path.rename(pgdata)
        old.rename(prepared.path)
    prepared.map_path.replace(map_path)
    return map_path


def recover_swap(pgdata: Path, state_dir: Path) -> None:
    """Bring back the old directory if an earlier start died between its two renames."""
    old = state_dir / _OLD
    if not old.exists():
        return
    if pgdata.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(pgdata)


def remove_leftovers(state_dir: Path) -> None:
    """Remove a directory that was swapped out, or was never swapped in."""
    shutil.rmtree(state_dir / _NEW, ignore_errors=True)
    (state_dir / _NEW_MAP).unlink(missing_ok=True)


def destroy(pgdata: Path, state_dir: Path) -> None:
    """Remove a node for good: it vanishes in one step, whatever happens afterwards.

    For the holder of the node's lock. Raises OSError.
    """
    remove_leftovers(state_dir)
    shutil.rmtree(state_dir / _OLD, ignore_errors=True)
    if pgdata.exists():
        pgdata.rename(state_dir / _NEW)
    shutil.rmtree(state_dir / _NEW, ignore_errors=True)
    state.forget(state_dir)


def _spread_directories(path: Path) -> None:
    """Ask ext4 to put new directories of `path` far from each other (chattr +T).

    It passes over inodes that were freed in the last seconds, one by one for each new file: where
    a directory with a thousand files has just been removed, making another takes half a second.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Other file systems refuse, and need no such hint.
        with contextlib.suppress(OSError):
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)))
            if not flags & _FS_TOPDIR_FL:
                fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _FS_TOPDIR_FL))
    finally:
        os.close(fd)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places (renameat2(2)); False if the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _extract(basebackup: bytes, target: Path) -> dict[str, bytes]:
    """Unpack the tar stream below `target`; returns the entries meant for us, not for Postgres."""
    special = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(basebackup), mode="r:") as tar:
            for member in tar:
                name = member.name.rstrip("/")
                path = target / name
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DatadirError(f"extracting base backup failed: entry {name!r}")
                if member.isdir():
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
                    continue
                stream = tar.extractfile(member)
                if stream is None:
                    raise DatadirError(f"extracting base backup failed: entry {name!r} is no file")
                data = stream.read()
                if name in (MANIFEST, STARTUP_BLOCKS):
                    special[name] = data
                else:
                    _write(path, data)
    except (tarfile.TarError, OSError) as e:
        raise DatadirError(f"extracting base backup failed: {e}") from e
    return special


def _write(path: Path, data: bytes) -> None:
    """Write a file, leaving what is zero in it (most of a WAL segment) as holes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as f:
        for start in range(0, len(data), len(_ZEROS)):
            piece = data[start : start + len(_ZEROS)]
            if piece != _ZEROS[: len(piece)]:
                f.seek(start)
                f.write(piece)
        f.truncate(len(data))


def _keep(old: Path, new: Path) -> None:
    """Carry over what lives outside WAL: configuration, certificates, logs, statistics."""
    if not old.is_dir():
        return
    for entry in old.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in _OWN_DIRECTORIES:
                _link(entry, new / entry.name)
        elif entry.name not in _OWN_DIRECTORIES and not _OWN_FILES.fullmatch(entry.name):
            _link(entry, new / entry.name)
    if (old / _STATISTICS).is_file():
        _link(old / _STATISTICS, new / _STATISTICS)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or for each file of a directory.

    So the old directory stays whole until it is swapped out: Postgres replaces these files by
    rename and appends to its log. Sockets and pipes belong to who made them and are left out.
    """
    if source.is_symlink():
        target.unlink(missing_ok=True)
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir(mode=0o700, exist_ok=True)
        shutil.copymode(source, target)
        for entry in source.iterdir():
            _link(entry, target / entry.name)
    elif source.is_file():
        target.unlink(missing_ok=True)
        target.hardlink_to(source)
