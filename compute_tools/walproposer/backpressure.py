"""Backpressure: how far acknowledgements may run ahead of the pageserver.

Commits above the limit are durable and wait; they return when the pageserver has caught up. The
limit, and the pageserver's report it follows from, are told to Postgres' processes through the
feedback file.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from compute_tools.feedback_file import NO_LIMIT, FeedbackFile
from zenith_utils.lsn import lsn_text
from zenith_utils.safekeeper_messages import NO_FEEDBACK
from zenith_utils.zenith_feedback import ZenithFeedback

logger = logging.getLogger(__name__)

# Commits that wait now and then are one story in the log, not many.
_CALM: Final = 3.0


@dataclass(frozen=True, slots=True)
class LagLimits:
    """How many bytes of WAL the pageserver may lack; 0 is no limit.

    `write_lag` limits what it has not received, `flush_lag` what it has not on disk, `apply_lag`
    what it has not uploaded. The last one limits nothing where there is no remote storage.
    """

    write_lag: int = 0
    flush_lag: int = 0
    apply_lag: int = 0


@dataclass(frozen=True, slots=True)
class Limit:
    """Commits are acknowledged up to `lsn`: `lag` bytes above where the pageserver stands."""

    lsn: int = NO_LIMIT
    setting: str = ""
    lag: int = 0


def lowest_limit(feedback: ZenithFeedback, limits: LagLimits, start_lsn: int) -> Limit:
    """The limit that is reached first.

    `start_lsn` is where this compute's WAL begins: until a pageserver reports, it is taken to have
    what the compute was made from. It is 0 as long as there is no compute, nor a limit then.
    """
    write, flush, apply = feedback.ps_writelsn, feedback.ps_flushlsn, feedback.ps_applylsn
    if feedback == NO_FEEDBACK:
        write = flush = start_lsn
    candidates = (
        ("max_replication_write_lag", write, limits.write_lag),
        ("max_replication_flush_lag", flush, limits.flush_lag),
        ("max_replication_apply_lag", apply, limits.apply_lag),
    )
    reached = [Limit(at + lag, name, lag) for name, at, lag in candidates if at and lag > 0]
    lowest = min(reached, key=lambda limit: limit.lsn, default=Limit())
    return lowest if lowest.lsn < NO_LIMIT else Limit()


class Backpressure:
    """The limit in force. Used by the walproposer's one thread."""

    def __init__(self, file: FeedbackFile | None) -> None:
        self._file = file
        self._limits = LagLimits()
        self._start_lsn = 0
        self._feedback = NO_FEEDBACK
        self._limit = Limit()
        self._waiting_since: float | None = None
        self._waited_at = 0.0

    def start(self, lsn: int) -> None:
        """Postgres' WAL begins here."""
        self._start_lsn = lsn

    def set_limits(self, limits: LagLimits) -> None:
        """Other limits from now on."""
        self._limits = limits

    def update(self, feedback: ZenithFeedback) -> int:
        """Take a report; the LSN above which commits are not to be acknowledged."""
        self._feedback = feedback
        self._limit = lowest_limit(feedback, self._limits, self._start_lsn)
        if self._file is not None:
            self._file.write(feedback, self._limit.lsn)
        return self._limit.lsn

    def tick(self, now: float, commit_lsn: int) -> None:
        """Say in the log when commits begin to wait for the pageserver, and when that is over."""
        if commit_lsn > self._limit.lsn:
            if self._waiting_since is None:
                self._waiting_since = now
                logger.warning("%s", self._why_waiting(commit_lsn))
            self._waited_at = now
        elif self._waiting_since is not None and now - self._waited_at >= _CALM:
            logger.info(
                "commits no longer wait for the pageserver, as they did for %.0f s",
                max(1.0, self._waited_at - self._waiting_since),
            )
            self._waiting_since = None

    def _why_waiting(self, commit_lsn: int) -> str:
        limit, feedback = self._limit, self._feedback
        stands = "it has not reported yet"
        if feedback != NO_FEEDBACK:
            stands = (
                f"of WAL up to {lsn_text(commit_lsn)} it has received what lies below"
                f" {lsn_text(feedback.ps_writelsn)}, and on disk {lsn_text(feedback.ps_flushlsn)}"
            )
        return (
            f"commits wait until the pageserver catches up: {stands}"
            f" ({limit.setting} is {limit.lag >> 20}MB)"
        )
