"""The state of a compute as others see it: a small file and a lock its supervisor holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import struct
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from zenith_utils.durable import is_temp_file, write_file_durably

log = logging.getLogger(__name__)

SPEC_FILE = "spec.json"
"""The node's specification, written by the command that starts it."""

_LOCK = "supervisor.lock"
_STATE = "state.json"
_LEASE = "lease"
_LEASE_ID = re.compile(r"[0-9a-f]{32}")
# struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = "hhqqi"
# Of the lock, in bytes: a supervisor's reaches to the end of the file, however long. Both begin at
# byte 0 and so exclude each other.
_SUPERVISOR_LENGTH = 0
_DESTROYER_LENGTH = 1


class Phase(StrEnum):
    """Where a compute is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class ComputeState:
    """What the supervisor last said, corrected by whether it is alive.

    While the node is `destroying`, `supervisor_pid` is the process that removes it: no supervisor,
    and not to be signalled, since what it leaves half done nobody finishes.
    """

    phase: Phase
    supervisor_pid: int | None
    reason: str
    destroying: bool = False

    @property
    def ending(self) -> bool:
        """Whether a living supervisor is past the node's end and only cleans up."""
        over = self.phase in (Phase.STOPPING, Phase.STOPPED, Phase.CRASHED)
        return over and self.supervisor_pid is not None


class AlreadyRunning(Exception):
    """Another process holds the node."""


def lock(state_dir: Path, *, to_destroy: bool = False) -> int:
    """Become the only process that may touch the node; returns the descriptor of the lock.

    With `to_destroy` not as its supervisor, which others can tell.

    The lock vanishes with the process, however it ends, and with any descriptor of the file that
    the process closes (fcntl(2)): do not read() the state while holding it. Raises AlreadyRunning
    and OSError.
    """
    length = _DESTROYER_LENGTH if to_destroy else _SUPERVISOR_LENGTH
    while True:
        fd = os.open(state_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            raise AlreadyRunning("The node is already running") from None
        except OSError:
            os.close(fd)
            raise
        if _is_lock_file(fd, state_dir):
            return fd
        # The node was destroyed between the two calls: this lock excludes nobody.
        os.close(fd)


def write(state_dir: Path, phase: Phase, reason: str = "") -> None:
    """Record the phase. A disk that takes no word of it must not take the compute down, too."""
    data = json.dumps({"phase": phase, "reason": reason}).encode()
    try:
        write_file_durably(state_dir / _STATE, data, sync=False, mode=0o644)
    except OSError as e:
        log.error("cannot record that the compute is %s: %s", phase, e)


def lease_id(state_dir: Path) -> str:
    """The id of the node's lease, the same in all of its lives. Only for the holder of the lock.

    So the lease of a life that was killed passes on to the next one. Raises OSError.
    """
    path = state_dir / _LEASE
    with contextlib.suppress(FileNotFoundError):
        known = path.read_text(errors="replace")
        if _LEASE_ID.fullmatch(known):
            return known
    new = os.urandom(16).hex()
    write_file_durably(path, new.encode())
    return new


def remove_temp_files(state_dir: Path) -> None:
    """Remove what interrupted writes left behind. Only for the holder of the lock."""
    for path in state_dir.iterdir():
        # A command that does not know of us yet may be writing another specification.
        if is_temp_file(path) and not path.name.startswith(SPEC_FILE):
            path.unlink()


def forget(state_dir: Path) -> None:
    """Remove the directory of a destroyed node, the lock last. Only for its holder."""
    for path in state_dir.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (state_dir / _LOCK).unlink()
    # Not empty if a node of this name is being made again.
    with contextlib.suppress(OSError):
        state_dir.rmdir()


def read(state_dir: Path) -> ComputeState:
    """The node's state; a supervisor that died without a word has crashed."""
    holder = _lock_holder(state_dir)
    while True:
        phase, reason = _said(state_dir)
        now = _lock_holder(state_dir)
        if now == holder:
            break
        # A supervisor came or went in between: what was read may not be its own word.
        holder = now
    pid, destroying = holder
    if destroying:
        return ComputeState(Phase.STOPPING, pid, "", destroying=True)
    if pid is None and phase in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING):
        phase, reason = Phase.CRASHED, "its supervisor was killed"
    return ComputeState(phase, pid, reason)


def _said(state_dir: Path) -> tuple[Phase, str]:
    try:
        said = json.loads((state_dir / _STATE).read_text())
        return Phase(said["phase"]), str(said["reason"])
    except FileNotFoundError:
        return Phase.STOPPED, ""
    except (OSError, ValueError, KeyError, TypeError) as e:
        return Phase.CRASHED, f"its state file is unreadable: {e}"


def _is_lock_file(fd: int, state_dir: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), (state_dir / _LOCK).stat())
    except FileNotFoundError:
        return False


def _lock_holder(state_dir: Path) -> tuple[int | None, bool]:
    """Process that holds the lock, and whether it destroys the node.

    Asked of the kernel without taking the lock (fcntl(2), F_GETLK).
    """
    try:
        fd = os.open(state_dir / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None, False
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, length, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
        if kind == fcntl.F_UNLCK:
            return None, False
        return int(pid), length == _DESTROYER_LENGTH
    finally:
        os.close(fd)
