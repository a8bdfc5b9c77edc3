"""Pid files: the number of a daemon, locked as long as it lives, and questions about processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Final

_LOCK_ATTEMPTS: Final = 10
_LOCK_PAUSE: Final = 0.02


class PidFileError(Exception):
    """The pid file is held by a running process, or cannot be written."""


class PidFile:
    """A locked pid file.

    The lock (flock) lives as long as a descriptor of it is open in this process or in a child
    made by fork(), so it is released by any kind of death; the file itself stays behind.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock, without writing yet. Raises PidFileError if another process holds it."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PidFileError(f"cannot open pid file {path}: {error.strerror}") from error
        try:
            locked = self._lock()
        except OSError as error:
            os.close(self._fd)
            raise PidFileError(f"cannot lock pid file {path}: {error.strerror}") from error
        if not locked:
            os.close(self._fd)
            holder = read_pid_file(path) or "unknown"
            raise PidFileError(f"already running with pid {holder}: pid file {path} is locked")

    def _lock(self) -> bool:
        """Take the lock; False if a process holds it for longer than running_pid() looks."""
        for attempt in range(_LOCK_ATTEMPTS):
            if attempt:
                time.sleep(_LOCK_PAUSE)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        return False

    def write(self) -> None:
        """Write the number of this process, digits only, durably."""
        # In place: a renamed-over file would be another inode, without our lock. A crash between
        # truncating and writing leaves an empty file, which readers take for "no process".
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d" % os.getpid(), 0)
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock, unless a forked child has it too."""
        os.close(self._fd)


def read_pid_file(path: Path) -> int | None:
    """The number in a pid file; None if there is no file or no number in it."""
    try:
        text = path.read_text("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None


def running_pid(path: Path) -> int | None:
    """Number of the living process that holds a pid file of the class above, else None.

    The lock decides: a number left behind and since given to another process is not believed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_pid_file(path)
    finally:
        os.close(fd)
    return None


def is_alive(pid: int) -> bool:
    """Whether a process exists and still runs: a zombie counts as gone."""
    process = Path(f"/proc/{pid}")
    try:
        stat = (process / "stat").read_bytes()
        # The state follows the command in parentheses, which may hold any character.
        if stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] not in (b"Z", b"X"):
            return True
        # A main thread that has exited looks like a zombie while other threads still run, and
        # these hold files and locks.
        return len(list((process / "task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False
