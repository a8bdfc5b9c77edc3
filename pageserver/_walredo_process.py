"""One redo process: a stock ``postgres`` that the module in ``pgxn/walredo`` takes over."""

import contextlib
import logging
import os
import select
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pageserver._walredo_io import CHANNEL_SIZE, RedoChannel
from pageserver._walredo_queue import RedoQueue
from postgres_ffi.distrib import PgDistrib
from zenith_utils.os_user import give, popen_kwargs

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 2
DIRECTORY_PREFIX = "process-"

_HELLO = struct.Struct("=IIQ")  # Hello in pgxn/walredo/walredo.h
_LOG_CHUNK = 16384

# Small shared memory, nothing in the background, only WARNING and above on standard error.
_SETTINGS = {
    "shared_buffers": "1MB",
    "wal_buffers": "32kB",
    "max_connections": "2",
    "max_wal_senders": "0",
    "max_worker_processes": "0",
    "max_prepared_transactions": "0",
    "max_locks_per_transaction": "10",
    "autovacuum_max_workers": "1",
    "dynamic_shared_memory_type": "mmap",
    "shared_memory_type": "mmap",
    "huge_pages": "off",
    "log_min_messages": "warning",
    "log_destination": "stderr",
    "log_line_prefix": "",
    "lc_messages": "C",
}


class WalRedoError(Exception):
    """A page could not be rebuilt; the message names the page, the LSNs and the reason."""


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """Everything needed to start a process."""

    distrib: PgDistrib
    module: Path
    workdir: Path
    control_file: bytes
    timeout: float
    wal_log_hints: bool
    sandbox: bool


class RedoProcess:
    """A running redo process; `channel` takes its requests.

    The thread that has started it must supervise it: the process ends with that thread.
    """

    def __init__(self, settings: ProcessSettings, directory: Path) -> None:
        self._timeout = settings.timeout
        self.channel = RedoChannel()
        self._popen = _spawn(settings, directory, self.channel)
        self.channel.close_file()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    def wait_ready(self, version_num: int) -> None:
        """Wait for the process' greeting. Raises WalRedoError with what it complained about."""
        assert self._popen.stdout is not None
        expected = _HELLO.pack(PROTOCOL_VERSION, version_num, CHANNEL_SIZE)
        if not _readable(self._popen.stdout, self._timeout):
            raise WalRedoError(f"a redo process did not start within {self._timeout:g} s")
        hello = self._popen.stdout.read(len(expected))
        self._popen.stdout.close()
        if not hello:
            complaint = self._read_log().decode(errors="replace").strip()
            raise WalRedoError(f"a redo process did not start: {complaint or 'it said nothing'}")
        if hello != expected:
            raise WalRedoError(
                f"server and redo module do not fit this pageserver: the greeting is"
                f" {hello.hex()}, not {expected.hex()}"
            )

    def supervise(self, queue: RedoQueue) -> None:
        """Pass on what Postgres logs until the process ends; kill it when a request times out.

        The process leaves the queue, and only then its requests are given up.
        """
        watch = _Watch(self._timeout)
        timed_out = None
        try:
            while timed_out is None and self._forward_log(watch.interval):
                timed_out = watch.timed_out(self.channel.oldest())
        finally:
            queue.remove(self.channel)
            self.dispose()
            self.channel.mark_gone(timed_out)

    def _read_log(self) -> bytes:
        assert self._popen.stderr is not None
        return self._popen.stderr.read(_LOG_CHUNK)  # what is there: the file is not buffered

    def _forward_log(self, timeout: float) -> bool:
        """Wait for something to log; false when the process has ended."""
        assert self._popen.stderr is not None
        if not _readable(self._popen.stderr, timeout):
            return True
        text = self._read_log()
        for line in text.decode(errors="replace").splitlines():
            logger.warning("redo process %d: %s", self.pid, line)
        return bool(text)

    def kill(self) -> None:
        """End the process; it has nothing to save. Its supervisor notices."""
        self._popen.kill()

    def dispose(self) -> None:
        """Kill, reap and close."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdout, self._popen.stderr):
            assert pipe is not None
            pipe.close()


class _Watch:
    """Notices when the first request of a line has stayed the first for too long."""

    def __init__(self, timeout: float) -> None:
        self.interval = timeout / 16
        self._timeout = timeout
        self._oldest: int | None = None
        self._since = 0.0

    def timed_out(self, oldest: int | None) -> int | None:
        """The position of the oldest request, if its time is over."""
        now = time.monotonic()
        if oldest is None or oldest != self._oldest:
            self._oldest, self._since = oldest, now
            return None
        return oldest if now - self._since >= self._timeout else None


def _readable(file: IO[bytes], timeout: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def start_process(settings: ProcessSettings) -> RedoProcess:
    """Start a process and wait until it takes requests; for the thread that will supervise it.

    Its data directory is gone by then: it has opened all files it needs, and so nothing stays
    behind however it ends. Raises WalRedoError.
    """
    try:
        with _data_directory(settings) as directory:
            process = RedoProcess(settings, directory)
            try:
                process.wait_ready(settings.distrib.version_num)
            except BaseException:
                process.dispose()
                raise
            return process
    except (OSError, ValueError) as e:
        raise WalRedoError(f"a redo process did not start: {e}") from e


def _spawn(
    settings: ProcessSettings, directory: Path, channel: RedoChannel
) -> "subprocess.Popen[bytes]":
    options = _SETTINGS | {
        "shared_preload_libraries": f'"{settings.module}"',
        "wal_log_hints": "on" if settings.wal_log_hints else "off",
        "walredo.sandbox": "on" if settings.sandbox else "off",
    }
    command = [str(settings.distrib.bin_dir / "postgres"), "--single", "-F", "-D", str(directory)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    return subprocess.Popen(
        [*command, "postgres"],
        stdin=channel.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd="/",
        env=_environment(),
        **popen_kwargs(),
    )


def _environment() -> dict[str, str]:
    """What a server needs to run, nothing that would change its behaviour, and no credentials."""
    kept = {n: os.environ[n] for n in ("PATH", "LD_LIBRARY_PATH") if n in os.environ}
    return kept | {"LC_ALL": "C"}


@contextlib.contextmanager
def _data_directory(settings: ProcessSettings) -> Iterator[Path]:
    """The least that a single-user server wants to find, for as long as the block runs."""
    directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=settings.workdir))
    try:
        for name in ("global", "base", "base/1", "pg_dynshmem", "pg_notify"):
            (directory / name).mkdir(mode=0o700)
        (directory / "PG_VERSION").write_text(f"{settings.distrib.major}\n")
        for name in ("postgresql.conf", "postgresql.auto.conf"):
            (directory / name).touch()
        (directory / "global" / "pg_control").write_bytes(settings.control_file)
        give(directory, recursive=True)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
