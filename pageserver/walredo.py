"""WAL redo: pages rebuilt by Postgres' own redo routines in a pool of sandboxed processes.

A redo process keeps nothing between requests, so any process serves any request of its tenant, and
one that fails is replaced. WAL is treated as untrusted: whatever a record does to a process costs
only the request that it belongs to.
"""

import contextlib
import logging
import shutil
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pageserver import _walredo_io as io
from pageserver._walredo_process import (
    DIRECTORY_PREFIX,
    ProcessSettings,
    RedoProcess,
    Request,
    WalRedoError,
    start_process,
)
from postgres_ffi.distrib import PgDistrib
from zenith_utils.lsn import Lsn

__all__ = ["RedoRequest", "WalRedoClosedError", "WalRedoError", "WalRedoPool"]

logger = logging.getLogger(__name__)

CONTROL_FILE_SIZE = 8192


class WalRedoClosedError(WalRedoError):
    """The pool has been closed."""

    def __init__(self) -> None:
        super().__init__("WAL redo is shut down")


@dataclass(frozen=True, slots=True)
class RedoRequest:
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

    def add_to(self, channel: io.RedoChannel) -> None:
        """Encode the request. Raises ValueError, TypeError or OverflowError."""
        channel.add_apply(
            self.spcnode,
            self.dbnode,
            self.relnode,
            self.forknum,
            self.blkno,
            self.base,
            self.records,
        )


@dataclass(frozen=True, slots=True)
class _MaskRequest:
    rmid: int
    blkno: int
    page: bytes

    def describe(self) -> str:
        return f"page {self.blkno}, masked by resource manager {self.rmid},"

    def add_to(self, channel: io.RedoChannel) -> None:
        channel.add_mask(self.rmid, self.blkno, self.page)


class _Waiter:
    """A thread in the queue for a process; is given one, or an error, exactly once."""

    __slots__ = ("error", "process", "ready")

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.process: RedoProcess | None = None
        self.error: WalRedoError | None = None

    def give(self, process: RedoProcess) -> None:
        self.process = process
        self.ready.set()

    def fail(self, error: WalRedoError) -> None:
        self.error = error
        self.ready.set()


class WalRedoPool:
    """The redo processes of one tenant; thread safe.

    Processes start at first use, one more whenever a caller finds none idle, up to
    ``max_processes``. Beyond that callers are served in order of arrival.

    ``module`` is the built ``walredo.so``; ``workdir`` a directory for this pool alone, which the
    unprivileged user can reach; ``control_file`` the cluster's pg_control (8192 bytes), which says
    whether it has data checksums; ``timeout`` the seconds that one request may take;
    ``wal_log_hints`` the setting of the cluster that wrote the WAL. ``sandbox=False`` runs without
    the system call filter. Raises OSError if ``workdir`` cannot be made.
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
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        # Processes are idle or in the hands of one thread; waiters exist only if none is idle.
        self._live: set[RedoProcess] = set()
        self._idle: list[RedoProcess] = []
        self._waiters: deque[_Waiter] = deque()
        self._starting = 0
        self._started = 0
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
        pages: list[bytes] = []
        for outcome in self._serve(requests):
            if isinstance(outcome, WalRedoError):
                raise outcome
            pages.append(outcome)
        return pages

    def redo_each(self, requests: Sequence[RedoRequest]) -> list[bytes | WalRedoError]:
        """Like redo(), but an error takes the place of each page that could not be rebuilt.

        Raises WalRedoError only if no process can be started or the pool is closed.
        """
        return self._serve(requests)

    def mask(self, rmid: int, blkno: int, page: bytes) -> bytes:
        """The page with all that WAL does not determine blanked by the resource manager's rm_mask.

        Raises WalRedoError.
        """
        outcome = self._serve([_MaskRequest(rmid, blkno, page)])[0]
        if isinstance(outcome, WalRedoError):
            raise outcome
        return outcome

    def close(self) -> None:
        """End all processes and wait for them. Calls under way raise WalRedoClosedError."""
        with self._lock:
            self._closed = True
            while self._waiters:
                self._waiters.popleft().fail(WalRedoClosedError())
            idle, self._idle = self._idle, []
            for process in self._live:
                process.kill()
        for process in idle:
            self._discard(process)
        with self._lock:
            self._gone.wait_for(lambda: not self._live and not self._starting)
        with contextlib.suppress(OSError):
            self._settings.workdir.rmdir()

    def _serve(self, requests: Sequence[Request]) -> list[bytes | WalRedoError]:
        outcomes: list[bytes | WalRedoError] = []
        retrying = False
        while len(outcomes) < len(requests):
            left = requests[len(outcomes) :]
            found, end = self._serve_some(left[:1] if retrying else left)
            outcomes += found
            if end in (io.COMPLETE, io.GAVE_UP):
                retrying = False
            elif end == io.TIMED_OUT or retrying:
                outcomes.append(self._unanswered(left[len(found)], end))
                retrying = False
            else:
                # Whoever killed the process did not say at which request, and answers may have
                # got lost with it. So the first request without one is tried again, by itself.
                retrying = True
        return outcomes

    def _serve_some(self, requests: Sequence[Request]) -> tuple[list[bytes | WalRedoError], int]:
        """Have one process serve some of the first requests."""
        process = self._acquire()
        try:
            outcomes, end = process.serve(requests)
        except BaseException as e:
            self._discard(process)
            if isinstance(e, OSError | ValueError):
                raise WalRedoError(f"the connection to a redo process broke: {e}") from e
            raise
        if end == io.COMPLETE:
            self._release(process)
            return outcomes, end
        self._discard(process)
        if self._closed:
            raise WalRedoClosedError
        return outcomes, end

    def _unanswered(self, request: Request, end: int) -> WalRedoError:
        what = f"redo of {request.describe()}"
        if end == io.TIMED_OUT:
            return WalRedoError(f"{what} timed out after {self._settings.timeout:g} s")
        return WalRedoError(f"{what} failed: the redo process was killed twice while at it")

    def _acquire(self) -> RedoProcess:
        """An idle process, now in the caller's hands; waits for one if need be."""
        with self._lock:
            if self._closed:
                raise WalRedoClosedError
            if self._idle:
                return self._idle.pop()
            waiter = _Waiter()
            self._waiters.append(waiter)
            self._start_if_wanted()
        try:
            waiter.ready.wait()
        except BaseException:
            self._withdraw(waiter)
            raise
        if waiter.process is None:
            assert waiter.error is not None
            raise waiter.error
        return waiter.process

    def _withdraw(self, waiter: _Waiter) -> None:
        """Leave the queue, and give back what may have been given in the meantime."""
        with self._lock, contextlib.suppress(ValueError):
            self._waiters.remove(waiter)
        if waiter.process is not None:
            self._release(waiter.process)

    def _release(self, process: RedoProcess) -> None:
        """Pass the process on to the first in the queue."""
        with self._lock:
            if not self._closed:
                self._hand_over(process)
                return
        self._discard(process)

    def _hand_over(self, process: RedoProcess) -> None:
        if self._waiters:
            self._waiters.popleft().give(process)
        else:
            self._idle.append(process)

    def _discard(self, process: RedoProcess) -> None:
        """End a process; somebody in the queue may need another one in its place."""
        process.dispose()
        with self._lock:
            self._live.discard(process)
            self._start_if_wanted()
            self._gone.notify_all()

    def _start_if_wanted(self) -> None:
        """Start one more process if there are waiters for it and the limit allows (lock held).

        In a thread of its own: whoever waits may be served earlier by a process that gets idle.
        """
        if (
            self._starting < len(self._waiters)
            and len(self._live) + self._starting < self._max_processes
        ):
            self._starting += 1
            threading.Thread(target=self._start, name="wal redo start", daemon=True).start()

    def _start(self) -> None:
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
            if not self._closed:
                self._hand_over(process)
                return
        self._discard(process)

    def _start_failed(self, error: WalRedoError) -> None:
        logger.error("%s", error)
        with self._lock:
            self._starting -= 1
            if not self._live and not self._starting:
                while self._waiters:
                    self._waiters.popleft().fail(error)
            self._gone.notify_all()


def _clean_workdir(workdir: Path) -> None:
    """Make the directory; remove what a killed pageserver left in it."""
    workdir.mkdir(parents=True, exist_ok=True)
    workdir.chmod(0o755)  # the processes' own directories in it are private
    for leftover in workdir.glob(f"{DIRECTORY_PREFIX}*"):
        shutil.rmtree(leftover)
