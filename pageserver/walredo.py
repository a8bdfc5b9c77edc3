"""WAL redo: pages rebuilt by Postgres' own redo routines in a pool of sandboxed processes.

A redo process keeps nothing between requests, so any process serves any request of its tenant, and
one that fails is replaced. WAL is treated as untrusted: whatever a record does to a process costs
only the request that it belongs to.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pageserver._walredo_process import (
    DIRECTORY_PREFIX,
    ProcessSettings,
    RedoProcess,
    WalRedoError,
    start_process,
)
from pageserver._walredo_queue import MaskRequest, RedoQueue
from postgres_ffi.distrib import PgDistrib
from zenith_utils.lsn import Lsn
from zenith_utils.thread_priority import start_in_foreground

__all__ = ["RedoRequest", "WalRedoClosedError", "WalRedoError", "WalRedoPool"]

logger = logging.getLogger(__name__)

CONTROL_FILE_SIZE = 8192

# How long the processes that there are must do after a failure to start one more.
_RETRY_SECONDS = 1.0


class WalRedoClosedError(WalRedoError):
    """The pool has been closed."""

    def __init__(self) -> None:
        super().__init__("WAL redo is shut down")


class RedoRequest(NamedTuple):
    """One page to rebuild: a base image (None = zeroes) and the records to apply to it.

    ``records`` are (end LSN, raw WAL record), oldest first; each must refer to the page.
    """

    spcnode: int
    dbnode: int
    relnode: int
    forknum: int
    blkno: int
    base: bytes | None
    records: Sequence[tuple[int, bytes]]

    def describe(self) -> str:
        """The page and its LSN range, for messages."""
        rel = f"{self.spcnode}/{self.dbnode}/{self.relnode}"
        page = f"page {self.blkno} of relation {rel} fork {self.forknum}"
        if not self.records:
            return page
        first, last = Lsn(self.records[0][0]), Lsn(self.records[-1][0])
        return f"{page} with {len(self.records)} records from {first} to {last}"


class WalRedoPool:
    """The redo processes of one tenant; thread safe.

    Processes start at first use, and one more when those there are have much to do or do not get
    on, up to ``max_processes``. A process serves its callers in order of arrival; those that want
    many pages take turns, and long chains of records are sent in steps, so that a caller that
    wants one page waits for some dozens of others at most.

    ``module`` is the built ``walredo.so``; ``workdir`` a directory for this pool alone, which the
    unprivileged user can reach; ``control_file`` the cluster's pg_control (8192 bytes), which says
    whether it has data checksums; ``timeout`` the seconds that one request may take;
    ``wal_log_hints`` the setting of the cluster that wrote the WAL. ``sandbox=False`` runs without
    the system call filter. ``waited(seconds)`` is called after a call that had to wait until a
    process could take a request. Raises OSError if ``workdir`` cannot be made.
    """

    def __init__(
        self,
        distrib: PgDistrib,
        module: Path,
        workdir: Path,
        *,
        control_file: bytes,
        max_processes: int = 2,
        timeout: float = 60.0,
        wal_log_hints: bool = False,
        sandbox: bool = True,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        if len(control_file) != CONTROL_FILE_SIZE:
            raise ValueError(
                f"a control file has {CONTROL_FILE_SIZE} bytes, not {len(control_file)}"
            )
        if max_processes < 1:
            raise ValueError("a redo pool needs at least one process")
        self._settings = ProcessSettings(
            distrib=distrib,
            module=module,
            workdir=workdir.absolute(),
            control_file=control_file,
            timeout=timeout,
            wal_log_hints=wal_log_hints,
            sandbox=sandbox,
        )
        self._max_processes = max_processes
        self._queue = RedoQueue(self._start_another, _failure, timeout, waited)
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        self._live: set[RedoProcess] = set()
        self._starting = 0
        self._started = 0
        self._next_start = 0.0
        self._closed = False
        _clean_workdir(self._settings.workdir)

    @property
    def processes_started(self) -> int:
        """How many processes have been started so far, replacements included."""
        return self._started

    def redo(self, requests: Sequence[RedoRequest]) -> list[bytes]:
        """The pages (8192 bytes each) in request order.

        Raises the WalRedoError of the first request that failed, when all have been tried.
        """
        pages: list[bytes] = self._queue.serve(requests)
        for page in pages:
            if isinstance(page, WalRedoError):
                raise page
        return pages

    def redo_each(self, requests: Sequence[RedoRequest]) -> list[bytes | WalRedoError]:
        """Like redo(), but an error takes the place of each page that could not be rebuilt.

        Raises WalRedoError only if no process can be started or the pool is closed.
        """
        outcomes: list[bytes | WalRedoError] = self._queue.serve(requests)
        return outcomes

    def mask(self, rmid: int, blkno: int, page: bytes) -> bytes:
        """The page with all that WAL does not determine blanked by the resource manager's rm_mask.

        Raises WalRedoError.
        """
        outcome: bytes | WalRedoError = self._queue.serve([MaskRequest(rmid, blkno, page)])[0]
        if isinstance(outcome, WalRedoError):
            raise outcome
        return outcome

    def close(self) -> None:
        """End all processes and wait for them. Calls under way raise WalRedoClosedError."""
        with self._lock:
            self._closed = True
            self._queue.close(WalRedoClosedError)
            for process in self._live:
                process.kill()
            self._gone.wait_for(lambda: not self._live and not self._starting)
        with contextlib.suppress(OSError):
            self._settings.workdir.rmdir()

    def _start_another(self) -> None:
        """Start one more process if the limit allows.

        In a thread of its own, which stays with the process: whoever has asked for it may be
        served earlier by another one. It serves readers too, whoever has asked.
        """
        with self._lock:
            if self._closed or len(self._live) + self._starting >= self._max_processes:
                return
            if self._live and time.monotonic() < self._next_start:
                return
            self._starting += 1
            self._update_may_start()
        try:
            start_in_foreground(
                threading.Thread(target=self._run_process, name="wal redo", daemon=True)
            )
        except RuntimeError as e:
            self._start_failed(WalRedoError(f"a redo process did not start: {e}"))

    def _run_process(self) -> None:
        try:
            process = start_process(self._settings)
        except Exception as e:
            error = e if isinstance(e, WalRedoError) else WalRedoError(f"WAL redo: {e!r}")
            self._start_failed(error)
            return
        logger.info("started redo process %d", process.pid)
        with self._lock:
            self._starting -= 1
            self._started += 1
            self._live.add(process)
            if self._closed:
                process.kill()
            self._queue.add(process.channel)
            self._update_may_start()
        try:
            process.supervise(self._queue)
        finally:
            self._forget(process)

    def _forget(self, process: RedoProcess) -> None:
        """Once the process has ended; those who wait need another one."""
        with self._lock:
            self._live.discard(process)
            self._update_may_start()
            self._gone.notify_all()
        if self._queue.waiting:
            self._start_another()

    def _start_failed(self, error: WalRedoError) -> None:
        logger.error("%s", error)
        with self._lock:
            self._starting -= 1
            self._next_start = time.monotonic() + _RETRY_SECONDS
            self._update_may_start()
            if not self._live and not self._starting:
                self._queue.fail_waiting(error)
            self._gone.notify_all()

    def _update_may_start(self) -> None:
        room = len(self._live) + self._starting < self._max_processes
        self._queue.may_start = room and not self._closed


def _failure(request: RedoRequest | MaskRequest, reason: str) -> WalRedoError:
    return WalRedoError(f"redo of {request.describe()}{reason}")


def _clean_workdir(workdir: Path) -> None:
    """Make the directory; remove what a killed pageserver left in it."""
    workdir.mkdir(parents=True, exist_ok=True)
    workdir.chmod(0o755)  # the processes' own directories in it are private
    for leftover in workdir.glob(f"{DIRECTORY_PREFIX}*"):
        shutil.rmtree(leftover)
