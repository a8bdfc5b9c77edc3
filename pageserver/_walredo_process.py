"""One redo process: a stock ``postgres`` that the module in ``pgxn/walredo`` takes over."""

import contextlib
import logging
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pageserver import _walredo_io as io
from postgres_ffi.distrib import PgDistrib
from zenith_utils.os_user import give, popen_kwargs

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
DIRECTORY_PREFIX = "process-"

# Bounds of what one caller has answered at a time while others wait.
_BATCH_REQUESTS = 128
_BATCH_BYTES = 16 << 20

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


class Request(Protocol):
    """What a redo process can be asked."""

    def describe(self) -> str:
        """The request in an error message."""

    def add_to(self, channel: io.RedoChannel) -> None:
        """Encode the request. Raises ValueError, TypeError or OverflowError."""


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
    """A running redo process, used by one thread at a time."""

    def __init__(self, popen: "subprocess.Popen[bytes]", timeout: float) -> None:
        assert popen.stdin is not None
        assert popen.stdout is not None
        assert popen.stderr is not None
        self._popen = popen
        self._timeout = timeout
        self._pipes = (popen.stdin, popen.stdout, popen.stderr)
        self._channel = io.RedoChannel(*(pipe.fileno() for pipe in self._pipes))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    def wait_ready(self, version_num: int) -> None:
        """Wait for the process' first frame. Raises WalRedoError with what it complained about."""
        self._channel.expect_hello()
        answers, end = self._channel.exchange(self._timeout)
        if end == io.TIMED_OUT:
            raise WalRedoError(f"a redo process did not start within {self._timeout:g} s")
        if not answers:
            complaint = self._channel.take_stderr().decode(errors="replace").strip()
            raise WalRedoError(f"a redo process did not start: {complaint or 'it said nothing'}")
        outcome, payload = answers[0]
        expected = struct.pack("<II", PROTOCOL_VERSION, version_num)
        if outcome != io.HELLO or payload != expected:
            raise WalRedoError(
                f"server and redo module do not fit this pageserver: the greeting is"
                f" {payload.hex()}, not {expected.hex()}"
            )

    def serve(self, requests: Sequence[Request]) -> tuple[list[bytes | WalRedoError], int]:
        """Outcomes of some of the first requests, at least one, and how the exchange ended.

        See RedoChannel.exchange() for the ends and their meaning.
        """
        channel = self._channel
        malformed: dict[int, WalRedoError] = {}
        taken = 0
        for request in requests[:_BATCH_REQUESTS]:
            try:
                request.add_to(channel)
            except (ValueError, TypeError, OverflowError) as e:
                malformed[taken] = WalRedoError(f"redo of {request.describe()}: {e}")
            taken += 1
            if channel.pending_bytes > _BATCH_BYTES:
                break
        answers, end = channel.exchange(self._timeout)
        self._forward_log()

        outcomes: list[bytes | WalRedoError] = []
        answered = iter(answers)
        for i in range(taken):
            if i in malformed:
                outcomes.append(malformed[i])
                continue
            answer = next(answered, None)
            if answer is None:
                break
            outcomes.append(_outcome(requests[i], *answer))
        return outcomes, end

    def _forward_log(self) -> None:
        """Pass on what Postgres has logged."""
        text = self._channel.take_stderr()
        if text:
            for line in text.decode(errors="replace").splitlines():
                logger.warning("redo process %d: %s", self.pid, line)

    def kill(self) -> None:
        """End the process; a thread that waits for its answers notices. It has nothing to save."""
        self._popen.kill()

    def dispose(self) -> None:
        """Kill, reap and close; only by the thread that uses the process."""
        self._popen.kill()
        self._popen.wait()
        self._forward_log()
        for pipe in self._pipes:
            pipe.close()


def _outcome(request: Request, status: int, payload: bytes) -> bytes | WalRedoError:
    if status == io.PAGE and len(payload) == io.PAGE_SIZE:
        return payload
    reason = payload.decode(errors="replace")
    return WalRedoError(f"redo of {request.describe()} failed: {reason}")


def start_process(settings: ProcessSettings) -> RedoProcess:
    """Start a process and wait until it takes requests.

    Its data directory is gone by then: it has opened all files it needs, and so nothing stays
    behind however it ends. Raises WalRedoError.
    """
    try:
        with _data_directory(settings) as directory:
            process = _spawn(settings, directory)
            try:
                process.wait_ready(settings.distrib.version_num)
            except BaseException:
                process.dispose()
                raise
            return process
    except (OSError, ValueError) as e:
        raise WalRedoError(f"a redo process did not start: {e}") from e


def _spawn(settings: ProcessSettings, directory: Path) -> RedoProcess:
    options = _SETTINGS | {
        "shared_preload_libraries": f'"{settings.module}"',
        "wal_log_hints": "on" if settings.wal_log_hints else "off",
        "walredo.sandbox": "on" if settings.sandbox else "off",
    }
    command = [str(settings.distrib.bin_dir / "postgres"), "--single", "-F", "-D", str(directory)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    popen = subprocess.Popen(
        [*command, "postgres"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd="/",
        env=_environment(),
        **popen_kwargs(),
    )
    return RedoProcess(popen, settings.timeout)


def _environment() -> dict[str, str]:
    """Ours without what would change the server's behaviour."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_", "ZENITH_")) and name not in ("LANG", "LD_PRELOAD")
    }
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
