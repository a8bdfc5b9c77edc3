"""Garbage collection of a timeline in use: readers, leases, branches, time."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.ingest_wal import REL, VERSION, Bench, Block, make_bench

from pageserver.layered_repository.timeline import Timeline
from pageserver.lease_file import LeaseFile
from pageserver.leases import LeaseGoneError
from pageserver.metrics import PageserverMetrics
from pageserver.timelines import LsnNotReadableError, TimelineHandle
from postgres_ffi.versions import Rmgr
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.zenith_feedback import postgres_timestamp

DAY = 86400.0


BLOCKS = 64  # enough for their old versions to be worth collecting
PER_RECORD = 16


class World:
    """A timeline whose pages are rewritten again and again, and branches of it."""

    def __init__(self, bench: Bench, path: Path) -> None:
        self.bench = bench
        self.path = path
        self.tenant_id = TenantId.generate()
        self.metrics = PageserverMetrics()
        self.versions: dict[bytes, Lsn] = {}
        """By what the first page holds behind its own LSN."""
        self.handle = self.open(bench.timeline, None)

    def open(self, timeline: Timeline, ancestor: TimelineHandle | None) -> TimelineHandle:
        """A timeline as the services see it."""
        return TimelineHandle(
            self.tenant_id,
            timeline,
            VERSION,
            self.metrics,
            repository=self.bench.repository,
            ancestor=ancestor,
            lease_file=LeaseFile(self.path / str(timeline.timeline_id)),
            wait_lsn_timeout=1.0,
            request_checkpoint=lambda handle: None,
        )

    def write(self) -> Lsn:
        """One more version of all pages, in a layer of its own; its LSN."""
        content = random.Random(len(self.versions)).randbytes
        images = [bytes(8) + content(8184) for _ in range(BLOCKS)]
        for start in range(0, BLOCKS, PER_RECORD):
            blocks = range(start, start + PER_RECORD)
            self.bench.wal.add(
                Rmgr.XLOG, 0xB0, b"", [Block(REL, blkno, image=images[blkno]) for blkno in blocks]
            )
        lsn = Lsn(self.bench.run())
        self.bench.timeline.checkpoint()
        self.versions[images[0][8:]] = lsn
        return lsn

    def read(self, handle: TimelineHandle, lsn: Lsn) -> Lsn:
        """The version of the first page at an LSN."""
        with handle.reading(lsn) as at:
            page = handle.get_page(REL, 0, at)
        return self.versions[bytes(page[8:])]

    def commit(self, ago: float) -> Lsn:
        """A transaction that ended so many seconds ago."""
        time = struct.pack("<q", postgres_timestamp(NOW - ago))
        return Lsn(self.bench.add(Rmgr.XACT, 0x00, time, xid=1000))


NOW = 1_800_000_000.0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_bench() as bench:
        yield World(bench, tmp_path)


def test_everything_before_the_last_record_goes(world: World) -> None:
    versions = [world.write() for _ in range(5)]
    result = world.handle.collect_all_garbage(0)
    assert result.layers_removed > 0
    assert world.read(world.handle, versions[-1]) == versions[-1]
    for version in versions[:-1]:
        with pytest.raises(LsnNotReadableError, match="garbage collected"):
            world.read(world.handle, version)
    with world.handle.reading(versions[0], latest=True) as at:
        assert at == versions[-1]
    assert world.handle.collect_all_garbage(0).layers_removed == 0


def test_horizon_is_kept(world: World) -> None:
    versions = [world.write() for _ in range(5)]
    world.handle.collect_all_garbage(1 << 40)
    assert [world.read(world.handle, x) for x in versions] == versions
    world.handle.collect_all_garbage(versions[-1] - versions[2])
    assert [world.read(world.handle, x) for x in versions[2:]] == versions[2:]
    with pytest.raises(LsnNotReadableError):
        world.read(world.handle, versions[1])


def test_reads_in_progress_are_kept(world: World) -> None:
    versions = [world.write() for _ in range(4)]
    with world.handle.reading(versions[1]) as at:
        world.handle.collect_all_garbage(0)
        page = bytes(world.handle.get_page(REL, 0, at))
        assert world.versions[page[8:]] == versions[1]
    with pytest.raises(LsnNotReadableError):
        world.read(world.handle, versions[1])


def test_leased_state_is_kept_and_readable(world: World) -> None:
    versions = [world.write() for _ in range(5)]
    lease = world.handle.acquire_lease(versions[1], 60)
    world.handle.collect_all_garbage(0)
    assert world.handle.timeline.latest_gc_cutoff_lsn == versions[-1]
    assert world.read(world.handle, versions[1]) == versions[1]
    for lost in (versions[0], versions[2]):
        with pytest.raises(LsnNotReadableError):
            world.read(world.handle, lost)
        with pytest.raises(LsnNotReadableError):
            world.handle.acquire_lease(lost, 60)
    # The process ends, and the lease with it only if it is not renewed.
    again = world.open(world.bench.timeline, None)
    assert world.read(again, versions[1]) == versions[1]
    assert again.renew_lease(lease.lease_id, 60, None).lsn == versions[1]
    again.collect_all_garbage(0)
    assert world.read(again, versions[1]) == versions[1]
    with again.reading(versions[1]) as at:
        again.release_lease(lease.lease_id)
        again.collect_all_garbage(0)
        page = bytes(again.get_page(REL, 0, at))
        assert world.versions[page[8:]] == versions[1]
    with pytest.raises(LsnNotReadableError):
        world.read(again, versions[1])
    with pytest.raises(LeaseGoneError):
        again.renew_lease(lease.lease_id, 60, None)


def test_branches_and_leases_below_their_start(world: World) -> None:
    """What a branch shares with its ancestor is kept by the ancestor, for all that read it."""
    versions = [world.write() for _ in range(6)]
    timeline = world.bench.repository.branch_timeline(
        TimelineId.generate(),
        ancestor_id=world.handle.timeline_id,
        start_lsn=versions[3],
    )
    branch = world.open(timeline, world.handle)
    lease = branch.acquire_lease(versions[1], 60)
    world.handle.collect_all_garbage(0)
    assert world.read(branch, versions[3]) == versions[3]
    assert world.read(branch, versions[1]) == versions[1]
    assert world.read(world.handle, versions[1]) == versions[1]
    for lost in (versions[0], versions[2]):
        with pytest.raises(LsnNotReadableError):
            world.read(branch, lost)
        with pytest.raises(LsnNotReadableError):
            branch.acquire_lease(lost, 60)
    assert branch.renew_lease(lease.lease_id, 60, versions[1]).lsn == versions[1]
    assert branch.renew_lease(lease.lease_id, 60, None).lsn == versions[1]
    branch.release_lease(lease.lease_id)
    with pytest.raises(LsnNotReadableError):
        world.read(branch, versions[1])
    assert world.read(branch, versions[3]) == versions[3]


def test_time_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pageserver.timelines.time.time", lambda: NOW)
    first = world.write()
    world.commit(3 * DAY)
    second = world.write()
    old = world.commit(2 * DAY)
    third = world.write()
    recent = world.commit(DAY / 2)
    last = world.write()
    world.handle.collect_garbage(0, DAY)
    # The state of a day ago is that of the transaction two days ago.
    assert world.handle.timeline.latest_gc_cutoff_lsn == old
    assert world.read(world.handle, old) == second
    assert [world.read(world.handle, x) for x in (third, recent, last)] == [third, third, last]
    with pytest.raises(LsnNotReadableError):
        world.read(world.handle, first)
    # The horizon may keep more than the time, and the time more than an order to keep nothing.
    world.handle.collect_garbage(last - third, DAY / 4)
    assert world.handle.timeline.latest_gc_cutoff_lsn == third
    world.handle.collect_garbage(0, 0.0)
    assert world.handle.timeline.latest_gc_cutoff_lsn == last


def test_without_times_nothing_is_too_old(world: World) -> None:
    versions = [world.write() for _ in range(3)]
    world.handle.collect_garbage(0, DAY)
    assert [world.read(world.handle, x) for x in versions] == versions
