"""Times of commits in the store, and the way back from a time to an LSN."""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from batch_unit.ingest_wal import NEXT_XID, REL, START_LSN, Bench, Block, commit_data, make_bench
from hypothesis import given
from hypothesis import strategies as st

from pageserver.keys import BEFORE_COMMITS, CLOCK_TOLERANCE, COMMIT_TIME_KEY, CommitTime
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.time_travel import TimestampKind, TimestampLsn, cutoff_by_time, lsn_by_timestamp
from pageserver.walingest import IngestError
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import Rmgr
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.timestamp import (
    TimestampParseError,
    parse_timestamp,
    timestamp_of,
    timestamp_text,
)
from zenith_utils.zenith_feedback import POSTGRES_EPOCH_MICROS

PRESENT, FUTURE, PAST, NODATA = TimestampKind
COMMIT, PREPARE, ABORT, COMMIT_PREPARED, ABORT_PREPARED = range(0, 0x50, 0x10)
HAS_INFO = 0x80
MINUTE = 60_000_000


@pytest.fixture
def bench() -> Iterator[Bench]:
    with make_bench() as made:
        yield made


def end(bench: Bench, time: int, op: int = COMMIT) -> Lsn:
    """A transaction that ends; the LSN of its record."""
    data = struct.pack("<q", time)
    if op in (COMMIT_PREPARED, ABORT_PREPARED):
        data += struct.pack("<II", 1 << 4, NEXT_XID)
        return Lsn(bench.add(Rmgr.XACT, op | HAS_INFO, data))
    return Lsn(bench.add(Rmgr.XACT, op, data, xid=NEXT_XID))


def other(bench: Bench) -> Lsn:
    """A record that says nothing about time."""
    return Lsn(bench.add(Rmgr.HEAP, 0x70, b"", [Block(REL, 0, will_init=True)]))


def time_at(bench: Bench, lsn: int) -> CommitTime:
    return bench.datadir.commit_time(lsn)


# ---- what ingestion stores


def test_every_end_of_a_transaction_counts_and_nothing_else(bench: Bench) -> None:
    assert time_at(bench, START_LSN) == BEFORE_COMMITS
    for time, op in enumerate((COMMIT, ABORT, COMMIT_PREPARED, ABORT_PREPARED), -1):
        before = other(bench)
        lsn = end(bench, time, op)
        assert time_at(bench, lsn) == CommitTime(0, time)
        assert time_at(bench, before) == time_at(bench, lsn - 8) != CommitTime(0, time)
    # One that Python handles: it drops a relation.
    data = bytearray(commit_data(rels=[RelTag(1663, 5, 17000, 0)]))
    struct.pack_into("<q", data, 0, 1000)
    dropped = bench.add(Rmgr.XACT, COMMIT | HAS_INFO, bytes(data), xid=NEXT_XID)
    assert time_at(bench, dropped) == CommitTime(0, 1000)
    bench.reopen()
    assert time_at(bench, end(bench, 999)) == CommitTime(0, 1000)
    for op in (0x50, 0x60):  # ASSIGNMENT, INVALIDATIONS
        timeless = bench.add(Rmgr.XACT, op, struct.pack("<q", 2000), xid=NEXT_XID)
        assert time_at(bench, timeless) == CommitTime(0, 1000)


@pytest.mark.parametrize("op", [COMMIT, ABORT, COMMIT_PREPARED, ABORT_PREPARED])
def test_an_end_without_a_time_is_refused(bench: Bench, op: int) -> None:
    bench.wal.add(Rmgr.XACT, op, bytes(7), xid=NEXT_XID)
    with pytest.raises(IngestError, match="data are too short"):
        bench.run()


def test_clock_that_goes_back(bench: Bench) -> None:
    """A little is the order of backends, more is a clock that was set, also after a restart."""
    end(bench, 10 * MINUTE)
    assert time_at(bench, end(bench, 10 * MINUTE - CLOCK_TOLERANCE)) == (0, 10 * MINUTE)
    assert time_at(bench, end(bench, 10 * MINUTE + 1)) == (0, 10 * MINUTE + 1)
    assert time_at(bench, end(bench, 9 * MINUTE)) == (1, 9 * MINUTE)
    bench.reopen()
    assert time_at(bench, end(bench, 9 * MINUTE - 1)) == (1, 9 * MINUTE)
    assert time_at(bench, end(bench, -(1 << 63))) == (2, -(1 << 63))
    assert time_at(bench, end(bench, (1 << 63) - 1)) == (2, (1 << 63) - 1)
    assert time_at(bench, end(bench, -(1 << 63))) == (3, -(1 << 63))


def test_images_contain_the_time(bench: Bench) -> None:
    lsn = end(bench, 1)
    ranges = bench.datadir.collect_keyspace(lsn)
    assert any(start <= COMMIT_TIME_KEY < stop for start, stop in ranges)


# ---- the search


@dataclass
class History:
    """Stands for a timeline: `ends` are (LSN, time) of the transactions that ended."""

    ends: list[tuple[int, CommitTime]]
    oldest: int
    last: int
    reads: int = 0
    moved: dict[int, int] = field(default_factory=dict)
    """At the n-th read the cutoff moves there, and what is below becomes unreadable."""

    def __post_init__(self) -> None:
        self.timeline = SimpleNamespace(
            ancestor=None,
            ancestor_lsn=0,
            initdb_lsn=8,
            latest_gc_cutoff_lsn=self.oldest,
            last_record_lsn=self.last,
        )

    def commit_time(self, lsn: int) -> CommitTime:
        """What `DatadirTimeline.commit_time` says."""
        self.reads += 1
        cutoff = self.moved.get(self.reads, self.timeline.latest_gc_cutoff_lsn)
        self.timeline.latest_gc_cutoff_lsn = cutoff
        assert lsn % 8 == 0
        if lsn < cutoff:
            return BEFORE_COMMITS
        return max((value for at, value in self.ends if at <= lsn), default=BEFORE_COMMITS)

    @property
    def datadir(self) -> DatadirTimeline:
        """As what it stands for."""
        return cast(DatadirTimeline, self)

    def expected(self, time: int) -> tuple[int, TimestampKind]:
        """The rule, applied to every LSN there is."""
        lsns = range(self.oldest, self.last + 8, 8)
        values = [self.commit_time(lsn) for lsn in lsns]
        if values[-1] == BEFORE_COMMITS:
            return self.last, NODATA
        known = [value for value in values if value != BEFORE_COMMITS]
        occasions = [value.clock_sets for value in known if value.time <= time]
        if not occasions:
            return lsns[values.index(known[0])], PAST
        limit = CommitTime(max(occasions), time)
        index = max(i for i, value in enumerate(values) if value <= limit)
        return lsns[index], FUTURE if index == len(values) - 1 else PRESENT


def answer(found: TimestampLsn) -> tuple[int, TimestampKind]:
    return found.lsn, found.kind


@given(st.integers(0, 2**32))
def test_search_finds_what_the_rule_says(seed: int) -> None:
    generator = random.Random(seed)
    ends, value, lsn = [], CommitTime(0, 100), 8
    for _ in range(generator.randrange(6)):
        lsn += 8 * generator.randrange(1, 9)
        if generator.random() < 0.3:
            value = CommitTime(value.clock_sets + 1, value.time - generator.randrange(1, 20))
        else:
            value = value._replace(time=value.time + generator.randrange(1, 10))
        ends.append((lsn, value))
    last = lsn + 8 * generator.randrange(5)
    history = History(ends, generator.randrange(8, last + 8, 8), last)
    for time in range(50, 160):
        found = lsn_by_timestamp(history.datadir, time)
        assert answer(found) == history.expected(time)
        if found.kind is not NODATA:
            assert found.commit_time == history.commit_time(found.lsn).time


def test_search_reads_little() -> None:
    ends = [(8 * i, CommitTime(0, i)) for i in range(1000, 2000)]
    history = History(ends, 8, 1 << 40)
    assert answer(lsn_by_timestamp(history.datadir, 1500)) == (8 * 1501 - 8, PRESENT)
    assert history.reads < 50


@pytest.mark.parametrize("read", range(1, 12))
def test_search_starts_again_when_history_goes(read: int) -> None:
    """What is read below a cutoff that has just moved must not be believed."""
    ends = [(800 * i, CommitTime(0, i)) for i in range(1, 10)]
    history = History(ends, 8, 8000, moved={read: 4000})
    assert answer(lsn_by_timestamp(history.datadir, 3)) == (4000, PAST)
    history = History(ends, 8, 8000, moved={read: 4000})
    assert answer(lsn_by_timestamp(history.datadir, 7)) == (6392, PRESENT)


def test_commits_of_one_moment(bench: Bench) -> None:
    """Backends that are a little late stay with those before them; equal times stay together."""
    first = end(bench, 1000)
    second = end(bench, 2000)
    end(bench, 1500)
    end(bench, 2000)
    third = end(bench, 2001)
    last = other(bench)
    assert answer(lsn_by_timestamp(bench.datadir, 999)) == (first, PAST)
    assert answer(lsn_by_timestamp(bench.datadir, 1999)) == (second - 8, PRESENT)
    assert answer(lsn_by_timestamp(bench.datadir, 2000)) == (third - 8, PRESENT)
    assert lsn_by_timestamp(bench.datadir, 5000) == TimestampLsn(last, FUTURE, 2001)


def test_branches(bench: Bench) -> None:
    """A branch knows its own history, and names the one to ask about what was before."""
    nothing = bench.repository.branch_timeline(
        TimelineId.generate(), ancestor_id=bench.timeline.timeline_id, start_lsn=START_LSN
    )
    empty = DatadirTimeline(nothing, bench.datadir.version)
    assert lsn_by_timestamp(empty, 1) == TimestampLsn(Lsn(START_LSN), NODATA, None)
    end(bench, 100)
    point = other(bench)
    end(bench, 200)
    timeline = bench.repository.branch_timeline(
        TimelineId.generate(), ancestor_id=bench.timeline.timeline_id, start_lsn=point
    )
    branch = DatadirTimeline(timeline, bench.datadir.version)
    before = TimestampLsn(point, PAST, 100, bench.timeline.timeline_id)
    assert lsn_by_timestamp(branch, 99) == before
    assert lsn_by_timestamp(branch, 200) == TimestampLsn(point, FUTURE, 100)
    parent = bench.datadir
    bench.datadir = branch
    bench.reopen()
    lsn = end(bench, 300)
    assert lsn_by_timestamp(branch, 99) == before
    assert lsn_by_timestamp(branch, 250) == TimestampLsn(Lsn(lsn - 8), PRESENT, 100)
    assert lsn_by_timestamp(parent, 250).commit_time == 200
    assert cutoff_by_time(branch, 0, unix(99)) == 0
    assert cutoff_by_time(branch, 0, unix(250)) == point
    assert cutoff_by_time(branch, 0, unix(300)) == lsn


def unix(time: int) -> float:
    return (time + POSTGRES_EPOCH_MICROS) / 1e6


def test_cutoff_is_the_last_commit_that_is_old_enough(bench: Bench) -> None:
    minutes = [end(bench, i * MINUTE) for i in (1, 2, 3)]
    other(bench)
    assert cutoff_by_time(bench.datadir, 60, unix(90 * 1_000_000)) == 0
    assert cutoff_by_time(bench.datadir, 60, unix(3 * MINUTE - 1)) == minutes[0]
    assert cutoff_by_time(bench.datadir, 60, unix(3 * MINUTE)) == minutes[1]
    # Later WAL, of unknown age, stays.
    assert cutoff_by_time(bench.datadir, 60, unix(60 * MINUTE)) == minutes[2]
    assert cutoff_by_time(bench.datadir, 86400, unix(60 * MINUTE)) == 0


def test_cutoff_without_commits(bench: Bench) -> None:
    other(bench)
    assert cutoff_by_time(bench.datadir, 0, unix(MINUTE)) == 0


def test_cutoff_does_not_go_below_what_is_kept() -> None:
    ends = [(800 * i, CommitTime(0, i)) for i in range(1, 10)]
    history: Any = History(ends, 2000, 8000)
    assert cutoff_by_time(history, 0, unix(1)) == 0
    assert cutoff_by_time(history, 0, unix(2)) == 2000
    assert cutoff_by_time(history, 0, unix(3)) == 2400


# ---- times as text


def test_timestamps() -> None:
    assert parse_timestamp("2000-01-01T00:00:00Z") == 0
    assert parse_timestamp("1999-12-31T23:59:59.999999+00:00") == -1
    assert parse_timestamp("2026-11-22 10:00:00.1234567-05:30") == timestamp_of(
        datetime(2026, 11, 22, 15, 30, 0, 123456, UTC)
    )
    assert timestamp_text(-1) == "1999-12-31T23:59:59.999999Z"
    for time in (0, 1, 846_590_400_000_001):
        assert parse_timestamp(timestamp_text(time)) == time
    assert timestamp_text(1 << 62) == "9999-12-31T23:59:59.999999Z"
    assert timestamp_text(-(1 << 63)) == "0001-01-01T00:00:00Z"
    for text in ("", "now", "2026-11-22", "2026-11-22T10:00:00", "2026-02-30T00:00:00Z", "10:00Z"):
        with pytest.raises(TimestampParseError, match=f"invalid timestamp '{text}'"):
            parse_timestamp(text)
