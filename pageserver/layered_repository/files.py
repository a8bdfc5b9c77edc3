"""Every change the store makes to the file system goes through one object.

So a test can count the steps of a flush or a compaction, fail any of them, or end the world there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from zenith_utils.durable import TEMP_SUFFIX, fsync_dir


class Files:
    """The real file system. Stateless; every method raises OSError.

    Code that writes much in native code may make the same system calls itself, but only if the
    object's type is exactly this class.
    """

    __slots__ = ()

    def create(self, path: str | Path) -> int:
        """Open a file for writing, new or emptied, and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def write(self, fd: int, path: str | Path, data: Buffer, offset: int) -> None:
        """Write all of `data` at an offset; `path` names the file of the descriptor.

        `data` may be memory that is valid during the call only.
        """
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(fd, view, offset)
            offset += written
            view = view[written:]

    def fsync(self, fd: int, path: str | Path) -> None:
        """Make the content of the file durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def rename(self, source: str | Path, target: str | Path) -> None:
        """Give a file or directory another name; a file of that name is replaced."""
        Path(source).replace(target)

    def unlink(self, path: str | Path) -> None:
        """Remove a file."""
        Path(path).unlink()

    def mkdir(self, path: str | Path) -> None:
        """Make a directory in an existing one."""
        Path(path).mkdir()

    def rmtree(self, path: str | Path) -> None:
        """Remove a directory with everything in it."""
        shutil.rmtree(path)

    def fsync_dir(self, path: str | Path) -> None:
        """Make the entries of a directory durable: creations, renames and removals in it."""
        fsync_dir(Path(path))

    def write_file(self, path: str | Path, data: Buffer) -> None:
        """Write a file and make its content durable, not yet its name. If it fails none stays."""
        fd = self.create(path)
        try:
            try:
                self.write(fd, path, data, 0)
                self.fsync(fd, path)
            finally:
                self.close(fd)
        except BaseException:
            self.discard(path)
            raise

    def write_file_durably(self, path: str | Path, data: Buffer) -> None:
        """Replace the file at `path` by one holding `data`, atomically and durably.

        A temporary file gets the data and an fsync, so that the name never leads to unwritten
        blocks; then the name; then the directory its fsync. A crash leaves the old content, and
        at most a file that is_temp_file() recognises.
        """
        path = Path(path)
        temp = temp_path(path)
        self.write_file(temp, data)
        try:
            self.rename(temp, path)
        except BaseException:
            self.discard(temp)
            raise
        self.fsync_dir(path.parent)

    def discard(self, path: str | Path) -> None:
        """Remove a file that does not count, if that is possible: the next start does it else."""
        with contextlib.suppress(OSError):
            self.unlink(path)


def temp_path(path: Path) -> Path:
    """A name that no file has, for one that is to replace that at `path`."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")


FILES: Final = Files()
