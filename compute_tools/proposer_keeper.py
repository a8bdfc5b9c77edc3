"""The walproposer of one compute, replaced when it dies while Postgres lives.

A new one takes up the stream if no other compute led in between, and commits that waited return.
That is safe because it leads only from a log whose end was written in a term that one of its
predecessors won: all WAL of these terms is this Postgres'. What they asked for and won is
remembered here, out of what each has said before it said it to anybody else.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

from compute_tools.proposer_process import STREAMING_TIMEOUT, ProposerError, ProposerProcess
from compute_tools.spec import ComputeSpec
from compute_tools.walproposer.core import Predecessors
from zenith_utils.lsn import Lsn

log = logging.getLogger(__name__)

MAX_DEATHS: Final = 12
DEATHS_WITHIN: Final = 60.0
_PAUSE_FIRST: Final = 0.1
_PAUSE_MOST: Final = 5.0


class RestartLimit:
    """How often a process may die, and how long to wait before the next one is started."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._pause = 0.0

    def died(self, now: float, *, did_work: bool) -> float | None:
        """Seconds to wait before the next start; None if it has died too often.

        At once after one that did its work, else longer each time.
        """
        self._deaths.append(now)
        while self._deaths[0] < now - DEATHS_WITHIN:
            self._deaths.popleft()
        if len(self._deaths) >= MAX_DEATHS:
            return None
        if did_work:
            self._pause = 0.0
        else:
            self._pause = min(max(2 * self._pause, _PAUSE_FIRST), _PAUSE_MOST)
        return self._pause


class _Stage(Enum):
    STREAMING = "streaming"
    PAUSE = "pause"
    """There is no process: the next one is started at a certain time."""
    ELECTION = "election"
    """As long as it takes: without a quorum commits would wait anyway."""
    CONNECTING = "connecting"


class ProposerKeeper:
    """Use from one thread. Until begin() has returned a death is final."""

    def __init__(self, spec: ComputeSpec, wake: Callable[[], None]) -> None:
        """Start a walproposer. `wake` is called, by another thread, when check() may have to act.

        Raises OSError.
        """
        self._spec = spec
        self._user = spec.superuser
        self._wake = wake
        self._process = self._first = ProposerProcess.start(spec, wake)
        self._stage = _Stage.ELECTION
        self._limit = RestartLimit()
        self._lags = (0, 0, 0)
        self._predecessors = Predecessors(frozenset(), 0)
        self._base_lsn: Lsn | None = None
        self._bootstrap = False
        self._deadline = 0.0

    @property
    def pid(self) -> int:
        """Process id of the walproposer, perhaps a dead one."""
        return self._process.pid

    # The start of the compute

    def wait_elected(self) -> Lsn | None:
        """Wait for a majority; the LSN it agrees on, None if nothing was ever written.

        Raises ProposerError.
        """
        return self._process.wait_elected()

    def begin(self, base_lsn: Lsn, user: str | None = None) -> None:
        """Have it stream from the Postgres that was started at `base_lsn`; raises ProposerError.

        `user` is whom it connects as, if not the superuser of the specification.
        """
        self._user = user or self._user
        self._begin(base_lsn)
        self._process.wait_streaming()
        elected = self._process.event("elected")
        assert elected is not None
        self._predecessors = Predecessors(frozenset({elected["term"]}), elected["term"])
        self._bootstrap = elected["bootstrap"]
        self._base_lsn = base_lsn
        self._stage = _Stage.STREAMING

    def set_limits(self, write_lag: int, flush_lag: int, apply_lag: int) -> None:
        """Hold commits back while the pageserver lags more than that, in bytes; 0 is no limit.

        Raises ProposerError.
        """
        self._lags = (write_lag, flush_lag, apply_lag)
        if self._stage is not _Stage.PAUSE:
            self._process.set_limits(*self._lags)

    # While Postgres runs

    @property
    def streaming(self) -> bool:
        """Whether WAL flows."""
        return self._stage is _Stage.STREAMING and self._process.why_ended() is None

    @property
    def followed_postgres(self) -> bool:
        """Whether the walproposer has ended because Postgres had."""
        return self._stage is not _Stage.PAUSE and self._process.followed_postgres

    @property
    def next_check(self) -> float:
        """When check() has something to do even if nobody calls `wake` (time.monotonic())."""
        return self._deadline if self._stage is not _Stage.STREAMING else float("inf")

    def check(self) -> str | None:
        """Replace a dead walproposer, see the next one through; why the compute must end, or None.

        Never blocks.
        """
        now = time.monotonic()
        if self._stage is _Stage.PAUSE:
            return self._start_next(now) if now >= self._deadline else None
        ended = self._process.why_ended()
        if ended is not None:
            return self._died(ended, now)
        try:
            return self._advance(now)
        except ProposerError:
            return None  # it has just died: seen at the next call

    def _died(self, how: str, now: float) -> str | None:
        process = self._process
        if not process.may_be_followed or self._base_lsn is None:
            return how
        won = process.terms_won
        if process is self._first:
            # begin() has taken down the term that Postgres' start was based on. Others that it may
            # have won before led to nothing.
            won = frozenset()
        self._predecessors = Predecessors(
            self._predecessors.terms | won, max(self._predecessors.last_term, process.last_term)
        )
        did_work = self._stage is _Stage.STREAMING
        process.stop()
        return self._pause(f"{how} (process {process.pid})", now, did_work=did_work)

    def _pause(self, why: str, now: float, *, did_work: bool) -> str | None:
        self._stage = _Stage.PAUSE
        pause = self._limit.died(now, did_work=did_work)
        if pause is None:
            return f"{why}, for the {MAX_DEATHS}th time within {DEATHS_WITHIN:g} s"
        self._deadline = now + pause
        log.warning(
            "%s while Postgres runs: another one is started %s",
            why, f"in {pause:g} s" if pause else "now",
        )  # fmt: skip
        return None if pause else self._start_next(now)

    def _start_next(self, now: float) -> str | None:
        try:
            process = ProposerProcess.start(self._spec, self._wake, self._predecessors)
        except OSError as e:
            return self._pause(f"the walproposer cannot be started: {e}", now, did_work=False)
        self._process = process
        self._stage = _Stage.ELECTION
        self._deadline = float("inf")
        return None

    def _advance(self, now: float) -> str | None:
        process = self._process
        if self._stage is _Stage.ELECTION:
            elected = process.event("elected")
            if elected is None:
                return None
            assert self._base_lsn is not None
            if elected["bootstrap"] and not self._bootstrap:
                return "a majority of the safekeepers has lost the timeline's WAL"
            # Postgres itself refuses to stream from beyond the end of its WAL.
            start = Lsn.parse(elected["epoch_start_lsn"])
            process.set_limits(*self._lags)
            self._begin(self._base_lsn if elected["bootstrap"] else start)
            self._stage = _Stage.CONNECTING
            self._deadline = now + STREAMING_TIMEOUT
        elif self._stage is _Stage.CONNECTING:
            if process.event("streaming") is not None:
                self._stage = _Stage.STREAMING
                log.info(
                    "walproposer %d streams on in place of the one that died, in term %d",
                    process.pid, process.last_term,
                )  # fmt: skip
            elif now >= self._deadline:
                return (
                    "the walproposer that was started anew did not get WAL from Postgres within "
                    f"{STREAMING_TIMEOUT:.0f} s"
                )
        return None

    def _begin(self, lsn: Lsn) -> None:
        self._process.begin(lsn, self._spec.port, self._user)

    # The end

    def drain(self, hurry: Callable[[], bool]) -> bool:
        """After a clean end of Postgres: whether all that it sent has reached the quorum.

        Waits for it until its deadline, or `hurry` is true.
        """
        return self._stage is _Stage.STREAMING and self._process.drain(hurry)

    def stop(self) -> None:
        """End it."""
        if self._stage is not _Stage.PAUSE:
            self._process.stop()
