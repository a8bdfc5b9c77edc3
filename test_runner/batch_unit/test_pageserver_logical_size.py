"""Sizes in descriptions of timelines: of one LSN, and told without waiting for WAL."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_unit.ingest_wal import REL, VERSION, Bench, Block, make_bench

from compute_tools.pageserver_client import PageserverClient
from pageserver.http.api import describe
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.timeline_writer import TimelineWriter
from pageserver.lease_file import LeaseFile
from pageserver.metrics import PageserverMetrics
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.timelines import TimelineHandle
from pageserver.walingest import WalIngest
from postgres_ffi.versions import Rmgr
from zenith_utils.ids import TenantId, TimelineId

pytestmark = pytest.mark.timeout(60)
HOURS = 10_000.0


@pytest.fixture
def bench() -> Iterator[Bench]:
    with make_bench() as made:
        yield made


def opened(
    timeline: Timeline, repository: Repository, path: Path, ancestor: TimelineHandle | None = None
) -> TimelineHandle:
    return TimelineHandle(
        TenantId.generate(),
        timeline,
        VERSION,
        PageserverMetrics(),
        repository=repository,
        ancestor=ancestor,
        lease_file=LeaseFile(path / str(timeline.timeline_id)),
        wait_lsn_timeout=HOURS,
        request_checkpoint=lambda handle: None,
    )


def grow(bench: Bench, nblocks: int) -> bytes:
    """WAL of a record that makes the table so many blocks long."""
    bench.wal.add(Rmgr.HEAP, 0x70, b"", [Block(REL, nblocks - 1, will_init=True)])
    return bench.wal.take()


def sizes(local: Any) -> tuple[int | None, int | None]:
    return local["current_logical_size"], local["current_logical_size_non_incremental"]


def test_a_branch_whose_ancestor_has_lost_its_memory(bench: Bench, tmp_path: Path) -> None:
    """It is described at once, without the size, and with it when the WAL has come again."""
    root, branch_id = bench.timeline.timeline_id, TimelineId.generate()
    wal = grow(bench, 5)
    lsn = bench.ingest.ingest(wal)
    bench.repository.branch_timeline(branch_id, ancestor_id=root)
    bench.repository.shutdown(flush=False)

    settings = StoreSettings(wait_lsn_timeout=HOURS)
    repository = Repository(
        bench.repository.path,
        bench.repository.tenant_id,
        settings,
        bench.timeline.reconstruct,
    )
    try:
        ancestor = opened(repository.timeline(root), repository, tmp_path)
        branch = opened(repository.timeline(branch_id), repository, tmp_path, ancestor)
        assert ancestor.timeline.last_record_lsn < lsn
        for recount in (False, True):
            local = describe(branch, recount=recount)["local"]
            assert sizes(local) == (None, None)
            assert local["last_record_lsn"] == local["ancestor_lsn"] == str(lsn)
        assert branch.logical_size() is None
        assert sizes(describe(ancestor, recount=True)["local"]) == (0, 0)
        ancestor.start_ingest().ingest(wal)
        assert sizes(describe(branch, recount=True)["local"]) == (5 * 8192, 5 * 8192)
    finally:
        repository.shutdown(flush=False)


class Busy(DatadirTimeline):
    """WAL arrives whenever its size is about to be counted."""

    arrive: Callable[[], object]

    def logical_size(self, lsn: int) -> int:
        """As ever, after more WAL has been ingested."""
        self.arrive()
        return super().logical_size(lsn)


def test_both_sizes_are_of_one_lsn(bench: Bench, tmp_path: Path) -> None:
    """However much WAL arrives while they are told; and what they are told of stays readable."""
    handle = opened(bench.timeline, bench.repository, tmp_path)
    handle.datadir = datadir = Busy(bench.timeline, VERSION)
    ingest = WalIngest(datadir)
    count = 3
    ingest.ingest(grow(bench, count))

    def arrive() -> None:
        nonlocal count
        count += 2
        ingest.ingest(grow(bench, count))
        assert list(bench.timeline.pins.values()) == [lsn]

    datadir.arrive = arrive
    lsn = bench.timeline.last_record_lsn
    # The first count: the size grows while it is made, and that is counted, too.
    assert handle.logical_size() == 5 * 8192
    for expected in (5, 7, 9):
        lsn = bench.timeline.last_record_lsn
        local = describe(handle, recount=True)["local"]
        assert sizes(local) == (expected * 8192, expected * 8192)
        assert local["last_record_lsn"] == str(lsn) < str(bench.timeline.last_record_lsn)
    assert not bench.timeline.pins


def test_both_sizes_while_another_thread_ingests(bench: Bench, tmp_path: Path) -> None:
    handle = opened(bench.timeline, bench.repository, tmp_path)
    handle.datadir = bench.datadir
    done = threading.Event()

    def ingest() -> None:
        for nblocks in itertools.count(1):
            if done.is_set():
                break
            bench.ingest.ingest(grow(bench, nblocks))

    writer = threading.Thread(target=ingest, daemon=True)
    seen: set[int | None] = set()
    # Threads take turns at any place, not every 5 ms.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writer.start()
    try:
        while writer.is_alive() and len(seen) < 100:
            size, counted = sizes(describe(handle, recount=True)["local"])
            assert size == counted
            seen.add(size)
    finally:
        done.set()
        sys.setswitchinterval(interval)
        writer.join(30)
    assert len(seen) == 100


def test_ingestion_that_waits_for_the_disk_holds_up_nobody(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is visible counts, though its writer waits for a flush that does not end."""
    handle = opened(bench.timeline, bench.repository, tmp_path)
    handle.datadir = bench.datadir
    assert handle.logical_size() == 0
    waiting, released = threading.Event(), threading.Event()
    make_room = TimelineWriter.make_room

    def wait(writer: TimelineWriter) -> None:
        waiting.set()
        released.wait(HOURS)
        make_room(writer)

    monkeypatch.setattr(TimelineWriter, "make_room", wait)
    writer = threading.Thread(target=bench.ingest.ingest, args=(grow(bench, 4),), daemon=True)
    writer.start()
    try:
        assert waiting.wait(30)
        assert sizes(describe(handle, recount=True)["local"]) == (4 * 8192, 4 * 8192)
    finally:
        released.set()
        writer.join(30)
    assert not writer.is_alive()


def test_no_feedback_without_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compute keeps to the size it knows."""
    client = object.__new__(PageserverClient)
    local = {
        "current_logical_size": 8192,
        "last_record_lsn": "0/40",
        "disk_consistent_lsn": "0/38",
    }
    monkeypatch.setattr(PageserverClient, "_http", lambda *args: {"local": local, "remote": None})
    feedback = client.feedback()
    assert feedback is not None and feedback.current_timeline_size == 8192
    local |= {"current_logical_size": None}
    assert client.feedback() is None
