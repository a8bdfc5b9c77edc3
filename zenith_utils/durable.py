"""Files that are either wholly there after a crash or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

TEMP_SUFFIX = ".___temp"


def write_file_durably(path: Path, data: Buffer, *, sync: bool = True, mode: int = 0o600) -> None:
    """Replace the file at `path` by one holding `data`, atomically and durably.

    The order makes it crash-safe: write a temporary file in the same directory, fsync it (so that
    the name never leads to unwritten blocks), rename it over `path`, fsync the directory (so that
    the rename survives). When it returns the data is on disk; with sync=False the replacement
    is still atomic for other processes but may be lost with the machine. A crash leaves at most
    a file that is_temp_file() recognises.

    Raises OSError; `path` then holds its old content, save when it was the fsync of the directory
    that failed: it holds the new one then, but which of them it will hold after a crash is unknown.
    """
    # Before anything is done: there may be no descriptor for it.
    dir_fd = _open_dir(path.parent) if sync else None
    try:
        _replace_file(path, data, dir_fd, mode)
    finally:
        if dir_fd is not None:
            os.close(dir_fd)


def _replace_file(path: Path, data: Buffer, dir_fd: int | None, mode: int) -> None:
    """Write and rename; durably where there is the descriptor of the directory."""
    temp = path.with_name(f"{path.name}.{os.urandom(4).hex()}{TEMP_SUFFIX}")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            if dir_fd is not None:
                os.fsync(fd)
        finally:
            os.close(fd)
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if dir_fd is not None:
        os.fsync(dir_fd)


def is_temp_file(path: Path) -> bool:
    """Whether a file is what an interrupted write_file_durably() left behind (safe to remove)."""
    return path.name.endswith(TEMP_SUFFIX)


def fsync_dir(path: Path) -> None:
    """Make the entries of a directory durable: creations, renames and removals in it."""
    fd = _open_dir(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_dir(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def fsync_file(path: Path) -> None:
    """Make the content of an existing file durable, whoever wrote it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: Buffer) -> None:
    """write(2) until everything is written; a short write is no error and is continued."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]
