"""Pid files: the number of a daemon, locked as long as it lives, and questions about processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

_LOCK_ATTEMPTS: Final = 10
_LOCK_PAUSE: Final = 0.02
# How long a number is waited for, in seconds: a few system calls come between lock and number.
_NUMBER_DEADLINE: Final = 2.0


class PidFileError(Exception):
    """The pid file is held by a running process, or cannot be written."""


class PidFile:
    """A locked pid file.

    The lock (flock) lives as long as a descriptor of it is open in this process or in a child
    made by fork(), so it is released by any kind of death; the file itself stays behind.
    """

    def __init__(self, path: Path) -> None:
        """Open, lock and empty, without writing yet: the number left behind is no holder's.

        Raises PidFileError if another process holds it.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PidFileError(f"cannot open pid file {path}: {error.strerror}") from error
        try:
            locked = self._lock()
            if locked:
                # In place, as write() does: a file renamed over it would be without our lock.
                os.ftruncate(self._fd, 0)
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
        # A crash before leaves an empty file, which readers take for "no process".
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

    The lock decides: a number left behind and since given to another process is not believed. One
    that has only just been locked is waited for until it has its number. Raises OSError if it does
    not get one: somebody lives, but nobody knows who.
    """
    deadline = time.monotonic() + _NUMBER_DEADLINE
    while _is_locked(path):
        pid = read_pid_file(path)
        if pid is not None:
            return pid
        if time.monotonic() > deadline:
            text = "locked by a process that has not written its number"
            raise BlockingIOError(errno.EAGAIN, text, str(path))
        time.sleep(_LOCK_PAUSE)
    return None


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


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
