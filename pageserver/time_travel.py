"""From a time to an LSN: where a timeline stood when the clock of its cluster showed that time.

The rule is that of Postgres' recovery_target_time: the state just before the first transaction that
ended (committed or aborted) later. So everything acknowledged by then is included, and nothing
whose commit began later.

`keys.COMMIT_TIME_KEY` never decreases along the WAL, so the place is found by binary search. Where
the clock was set back by more than `keys.CLOCK_TOLERANCE`, the times in between were shown twice:
the last occasion counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pageserver.keys import BEFORE_COMMITS, CommitTime
from pageserver.pgdatadir_mapping import DatadirTimeline
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import INVALID_LSN, Lsn, align8
from zenith_utils.zenith_feedback import postgres_timestamp

_STEP = 8  # values have LSNs that are multiples of it


class TimestampKind(StrEnum):
    """What the LSN of an answer is; the values are those of the HTTP API."""

    PRESENT = "present"
    """The state at the time: the next transaction ended later."""
    FUTURE = "future"
    """The newest state: nothing ended later, so far."""
    PAST = "past"
    """The oldest state with a time: what the history that can be read begins with is later."""
    NODATA = "nodata"
    """The newest state, of a timeline where no transaction has ended: there are no times."""


@dataclass(frozen=True, slots=True)
class TimestampLsn:
    """The state of a timeline at a time.

    `commit_time` (microseconds since 2000-01-01 UTC) is the newest that is included at `lsn`, with
    PAST the oldest that can be asked for; None with NODATA. `ancestor_id` is given with PAST where
    the history before belongs to the ancestor: it is to be asked instead.
    """

    lsn: Lsn
    kind: TimestampKind
    commit_time: int | None
    ancestor_id: TimelineId | None = None


def lsn_by_timestamp(datadir: DatadirTimeline, time: int) -> TimestampLsn:
    """Where the timeline stood at `time` (microseconds since 2000-01-01 UTC).

    Searches what can be read of the timeline's own history: from the garbage collection cutoff, on
    a branch from the branch point, up to the last record. About 40 reads of one key; raises what
    reading the store raises.
    """
    while True:
        oldest = _oldest_lsn(datadir)
        found = _search(datadir, oldest, time)
        # What was read below a cutoff that has been published meanwhile means nothing.
        if _oldest_lsn(datadir) == oldest:
            return found


def cutoff_by_time(datadir: DatadirTimeline, pitr_interval: float, now: float) -> Lsn:
    """The lowest LSN that has to stay readable for going back `pitr_interval` seconds from `now`.

    `now` is a Unix time in seconds. The LSN is the end of the newest commit (or abort) that was
    at least that long ago; 0 if that is not known, or not in the timeline's own history.
    """
    time = postgres_timestamp(now - pitr_interval)
    while True:
        oldest = _oldest_lsn(datadir)
        found = _search(datadir, oldest, time)
        if found.kind in (TimestampKind.PAST, TimestampKind.NODATA):
            return INVALID_LSN
        cutoff = _first(datadir, oldest, found.lsn, datadir.commit_time(found.lsn))
        if _oldest_lsn(datadir) == oldest:
            return cutoff


def _oldest_lsn(datadir: DatadirTimeline) -> Lsn:
    """Where the part of the timeline's own history begins that can be read."""
    timeline = datadir.timeline
    begin = timeline.initdb_lsn if timeline.ancestor is None else timeline.ancestor_lsn
    return Lsn(align8(max(begin, timeline.latest_gc_cutoff_lsn)))


def _search(datadir: DatadirTimeline, oldest: Lsn, time: int) -> TimestampLsn:
    last = datadir.timeline.last_record_lsn
    reached = datadir.commit_time(last)
    if reached == BEFORE_COMMITS:
        return TimestampLsn(last, TimestampKind.NODATA, None)
    if reached.time <= time:
        return TimestampLsn(last, TimestampKind.FUTURE, reached.time)
    begin = datadir.commit_time(oldest)
    lsn = last
    # Each round goes back to the time, or to where the clock was set back last.
    while reached.time > time:
        limit = CommitTime(reached.clock_sets, time)
        if begin > limit:
            return _past(datadir, oldest, begin)
        lsn = Lsn(_first(datadir, oldest, lsn, limit._replace(time=time + 1)) - _STEP)
        reached = datadir.commit_time(lsn)
    if reached == BEFORE_COMMITS:
        later = Lsn(lsn + _STEP)
        return TimestampLsn(later, TimestampKind.PAST, datadir.commit_time(later).time)
    return TimestampLsn(lsn, TimestampKind.PRESENT, reached.time)


def _past(datadir: DatadirTimeline, oldest: Lsn, begin: CommitTime) -> TimestampLsn:
    timeline = datadir.timeline
    answer = TimestampLsn(oldest, TimestampKind.PAST, begin.time)
    if oldest == timeline.ancestor_lsn:
        return replace(answer, ancestor_id=timeline.ancestor_id)
    return answer


def _first(datadir: DatadirTimeline, low: Lsn, high: Lsn, wanted: CommitTime) -> Lsn:
    """The lowest LSN in [low, high] whose commit time is `wanted` or more, as that of `high` is."""
    if datadir.commit_time(low) >= wanted:
        return low
    while high - low > _STEP:
        middle = Lsn((low + high) // (2 * _STEP) * _STEP)
        if datadir.commit_time(middle) >= wanted:
            high = middle
        else:
            low = middle
    return high
