"""One running postmaster: start, readiness, signals, and nothing left behind after its death."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from zenith_utils.os_user import popen_kwargs, postgres_user

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IPC_RMID = 0
_IPC_STAT = 2
_SHMID_DS_SIZE = 256  # more than struct shmid_ds; its second u32 is the owner's user id
_libc = ctypes.CDLL(None, use_errno=True)
# Looked up here, not in a forked child, where another thread may have held the loader's lock.
_prctl = _libc.prctl

START_TIMEOUT = 60.0
KILL_TIMEOUT = 10.0
MAX_LOG_SIZE = 64 * 1024 * 1024
_POLL = 0.005
_TAIL_SIZE = 64 * 1024


class PostgresError(Exception):
    """Postgres did not start, or ended where it should not."""


def become_subreaper() -> None:
    """Make orphans of our children ours, so that backends of a killed postmaster can be ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_strangers(known: Collection[int]) -> None:
    """Reap dead orphans that became our children, up to one of the `known` ones."""
    with contextlib.suppress(ChildProcessError):
        while True:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None or dead.si_pid in known:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)


class PostgresProcess:
    """A postmaster that is our child; its log begins at byte `log_start` of pg.log."""

    def __init__(self, pgdata: Path, process: subprocess.Popen[bytes], log_start: int) -> None:
        self._pgdata = pgdata
        self._process = process
        self._log_start = log_start

    @classmethod
    def start(
        cls, postgres: Path, pgdata: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> PostgresProcess:
        """Start `postgres` on a prepared directory; output is appended to its pg.log.

        Should this process die, the kernel tells the postmaster to quit at once: a compute
        without its supervisor must not go on. The signal is bound to the calling thread, so call
        it from one that lives as long as the process.
        """
        log = _open_log(pgdata / "pg.log")
        try:
            log_start = os.fstat(log).st_size
            process = subprocess.Popen(
                [str(postgres), "-D", str(pgdata), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=pgdata,
                env=dict(environment),
                # Runs in the child after the change of user, which would clear the setting.
                preexec_fn=_dies_with(os.getpid()),
                **popen_kwargs(),
            )
        finally:
            os.close(log)
        return cls(pgdata, process, log_start)

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status if the postmaster has ended (negative: the signal that killed it)."""
        return self._process.poll()

    def wait_ready(self) -> None:
        """Wait until connections are accepted; raises PostgresError with the end of the log."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if self.poll() is not None:
                raise PostgresError(f"Postgres ended while starting:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise PostgresError(
                    f"Postgres is not ready after {START_TIMEOUT:.0f} s:\n{self.log_tail()}"
                )
            time.sleep(_POLL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the postmaster if it lives."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def note(self, text: str) -> None:
        """Say in pg.log, as Postgres would, why it is about to be ended."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        line = f"{now} UTC [{os.getpid()}] FATAL:  {text}\n"
        with contextlib.suppress(OSError):
            log = _open_log(self._pgdata / "pg.log")
            try:
                os.write(log, line.encode())
            finally:
                os.close(log)

    def wait(self, timeout: float) -> bool:
        """Whether the postmaster ended within `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def clean_up(self, *, spare: Collection[int]) -> None:
        """After the postmaster's death: end all that it left, and its shared memory segment.

        Backends notice the death by themselves only at their next wait, and their own children
        (COPY ... PROGRAM, archive commands) never. As orphans all of them are our children now,
        beside the ones to `spare`.
        """
        deadline = time.monotonic() + KILL_TIMEOUT
        # The end of one may make its children ours: until there are no more.
        while (remaining := _children() - set(spare)) and time.monotonic() < deadline:
            for pid in remaining:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                # By its id: one of the spared, dead and not waited for, would be in the way.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(_POLL)
        _remove_shared_memory(self._pgdata)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that this postmaster wrote to pg.log."""
        try:
            with (self._pgdata / "pg.log").open("rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(self._log_start, size - _TAIL_SIZE))
                text = f.read().decode(errors="replace")
        except OSError as e:
            return f"(no log: {e})"
        return "\n".join(text.splitlines()[-lines:])

    def _is_ready(self) -> bool:
        """Line 8 of postmaster.pid is the postmaster's own account (miscadmin.h, pidfile.h)."""
        lines = pid_file_lines(self._pgdata)
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


def end_leftovers(pgdata: Path) -> None:
    """End a server that still runs in the directory, its supervisor having been killed.

    Only a clean end removes postmaster.pid. Raises PostgresError if a process cannot be ended.
    """
    if not (pgdata / "postmaster.pid").exists():
        return
    deadline = time.monotonic() + KILL_TIMEOUT
    while remaining := servers_in(pgdata):
        if time.monotonic() > deadline:
            raise PostgresError(f"processes {remaining} of an earlier life of the node do not end")
        for pid in remaining:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL)
    _remove_shared_memory(pgdata)


def _dies_with(parent: int) -> Callable[[], None]:
    number = int(signal.SIGQUIT)

    def prepare_child() -> None:
        # Shells have what they start in the background ignore it.
        signal.signal(number, signal.SIG_DFL)
        _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before the setting could tell

    return prepare_child


def _open_log(path: Path) -> int:
    """Open pg.log to append to, owned by Postgres' user; a large one is put aside first.

    The directory belongs to that user: no link of theirs is followed.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.lstat().st_size > MAX_LOG_SIZE:
            path.replace(path.with_name("pg.log.old"))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    user = postgres_user()
    if user is not None:
        os.fchown(fd, user.pw_uid, user.pw_gid)
    return fd


def _processes() -> Iterator[Path]:
    return (p for p in Path("/proc").iterdir() if p.name.isdecimal())


def _children() -> set[int]:
    """Our children that live or wait to be reaped."""
    own, found = str(os.getpid()), set()
    for process in _processes():
        with contextlib.suppress(OSError):
            # proc(5): pid (comm) state ppid; the command may hold any character.
            if (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                found.add(int(process.name))
    return found


def servers_in(pgdata: Path) -> list[int]:
    """Postgres processes whose working directory is `pgdata`, which a server never leaves."""
    found = []
    for process in _processes():
        with contextlib.suppress(OSError):
            here = (process / "cwd").samefile(pgdata)
            if here and (process / "exe").readlink().name.startswith("postgres"):
                found.append(int(process.name))
    return found


def pid_file_lines(pgdata: Path) -> list[str]:
    """The lines of postmaster.pid (miscadmin.h), none if it is not there."""
    try:
        return (pgdata / "postmaster.pid").read_text(errors="replace").splitlines()
    except OSError:
        return []


def _remove_shared_memory(pgdata: Path) -> None:
    """Remove the System V segment named in line 7 of postmaster.pid, there after an unclean end.

    The file is in the hands of Postgres' user: a segment of somebody else's is left alone.
    """
    try:
        segment = int(pid_file_lines(pgdata)[6].split()[1])
    except (IndexError, ValueError):
        return
    status = ctypes.create_string_buffer(_SHMID_DS_SIZE)
    if _libc.shmctl(segment, _IPC_STAT, status) != 0:
        return
    user = postgres_user()
    owner = os.geteuid() if user is None else user.pw_uid
    if int.from_bytes(status.raw[4:8], "little") == owner:
        _libc.shmctl(segment, _IPC_RMID, None)
