"""Failpoints of a whole pageserver: what they do there, and recovery from a death at each."""

from __future__ import annotations

import contextlib
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from batch_unit.ingest_wal import NEXT_XID, REL, Block, commit_data, make_bench, smgr_create
from batch_unit.pageserver_support import (
    Postgres,
    Root,
    materialise,
    running,
    scratch_directory,
    settings_for,
    wait_until,
)

from pageserver.failpoints import AFTER_INGEST
from postgres_ffi.distrib import find_distrib
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import Rmgr
from zenith_utils.failpoints import FailpointError, parse_terms
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqConnectionLost, PqError

pytestmark = pytest.mark.timeout(120)

INGEST, METADATA = "walreceiver-after-ingest", "checkpoint-before-saving-metadata"
INSERT = struct.pack("<HB", 1, 0)
PG_CLASS = RelTag(1663, 5, 1259, 0)


@dataclass
class Site:
    """A pageserver that gets the WAL of a stock server."""

    root: Root
    postgres: Postgres
    tables: int = 0

    @property
    def names(self) -> str:
        """Ids of tenant and timeline, as commands take them."""
        return f"{self.root.tenant} {self.root.timeline}"

    def follow(self) -> None:
        """Have the pageserver connect to the server."""
        self.root.server.query(f"callmemaybe {self.names} {self.postgres.conninfo()}")

    def last(self) -> Lsn:
        """End of the last record that the pageserver has."""
        return self.root.server.last_record_lsn(self.root.tenant, self.root.timeline)

    def durable(self) -> Lsn:
        """Up to where it has it on disk."""
        local = self.root.server.local(self.root.tenant, self.root.timeline)
        return Lsn.parse(local["disk_consistent_lsn"])

    def write(self) -> Lsn:
        """A table more; where the server's WAL ends then."""
        self.tables += 1
        self.postgres.execute(f"create table t{self.tables} as select generate_series(1, 300) a")
        return Lsn.parse(self.postgres.execute("select pg_current_wal_flush_lsn()")[0][0])

    def wait_for(self, lsn: Lsn) -> None:
        """Until the pageserver has ingested everything up to there."""
        wait_until(lambda: self.last() >= lsn, f"ingestion of {lsn}")

    def pages(self) -> list[bytes]:
        """All of pg_class, which every table changes, at the last record."""
        with self.root.pages() as client:
            count = client.nblocks(PG_CLASS, 0, latest=True)
            return [client.page(PG_CLASS, block, 0, latest=True) for block in range(count)]

    def set(self, text: str) -> None:
        """Set failpoints."""
        assert self.root.server.query(f"failpoints {text}") == []

    def pause(self, name: str) -> Callable[[], object]:
        """Set a failpoint to ``pause``; what waits until somebody does."""
        text, log = f"failpoint {name} pauses", self.root.server.log
        before = log().count(text)
        self.set(f"{name}=pause")
        return lambda: wait_until(lambda: log().count(text) > before, text)

    def command(self, text: str) -> threading.Thread:
        """Send a command whose answer may never come."""

        def send() -> None:
            with contextlib.suppress(PqError):
                self.root.server.query(text)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def running_site() -> Iterator[Site]:
    distrib = find_distrib()
    with scratch_directory() as scratch, running() as root:
        with root.pages() as client:
            backup = root.server.basebackup(root.tenant, root.timeline)
            materialise(backup, scratch / "data", client, distrib)
        settings = settings_for(root.tenant, root.timeline, autovacuum="off")
        postgres = Postgres(distrib, scratch / "data", settings)
        postgres.start()
        try:
            yield Site(root, postgres)
        finally:
            postgres.stop(signal.SIGQUIT)


@pytest.fixture
def site(running_site: Site) -> Iterator[Site]:
    """The same for all tests, which leave it running; without failpoints."""
    running_site.follow()
    yield running_site
    running_site.set(";".join(f"{name}=off" for name in (INGEST, METADATA)))


def test_ingestion_is_slowed_down_record_by_record(site: Site) -> None:
    """The classic of backpressure tests: each record takes its time and is visible at once."""
    site.wait_for(site.write())
    site.set(f"{INGEST}=sleep(200)")
    end = site.write()
    seen: set[Lsn] = set()
    while len(seen) < 10:
        seen.add(site.last())
    assert max(seen) < end
    site.set(f"{INGEST}=off")
    site.wait_for(end)
    expected = site.pages()
    site.set(f"{INGEST}=yield")
    end = site.write()
    site.wait_for(end)
    assert site.pages() != expected


def test_pause_holds_ingestion_until_it_is_taken_away(site: Site) -> None:
    site.wait_for(site.write())
    paused = site.pause(INGEST)
    end = site.write()
    paused()
    assert site.last() < end
    site.set(f"{INGEST}=off")
    site.wait_for(end)


def test_failed_ingestion_begins_again_with_the_next_record(site: Site) -> None:
    site.wait_for(site.write())
    site.set(f"{INGEST}=2*return(told so)")
    site.wait_for(site.write())
    assert "FailpointError: told so" in site.root.server.log()


def test_checkpoint_fails_as_told_and_succeeds_afterwards(site: Site) -> None:
    # From here on nothing that was not under way becomes durable.
    site.set(f"{METADATA}=return(no room)")
    site.wait_for(site.write())
    # One that was under way has ended when this one fails.
    with pytest.raises(PqError, match="no room"):
        site.root.server.query(f"checkpoint {site.names}")
    before = site.durable()
    with pytest.raises(PqError, match="no room"):
        site.root.server.query(f"checkpoint {site.names}")
    assert site.durable() == before
    pages = site.pages()
    site.set(f"{METADATA}=off")
    end = site.last()
    site.root.server.query(f"checkpoint {site.names}")
    assert site.durable() >= end - 8
    assert site.pages() == pages


def test_panic_shuts_the_pageserver_down(site: Site) -> None:
    """What was not durable is gone, comes again, and is the same."""
    server = site.root.server
    end = site.write()
    site.wait_for(end)
    pages, durable = site.pages(), site.durable()
    site.set(f"{METADATA}=panic(the end)")
    with pytest.raises(PqConnectionLost):
        server.query(f"checkpoint {site.names}")
    assert server.wait() == 1
    assert "FailpointPanic: the end" in server.log()
    assert "failed: the end" in server.log()
    server.start()
    assert site.last() == site.durable() == durable
    site.follow()
    site.wait_for(end)
    assert site.pages() == pages
    server.query(f"checkpoint {site.names}")
    assert site.pages() == pages


@pytest.mark.parametrize(
    ("failpoint", "command"),
    [
        (METADATA, "checkpoint {}"),
        ("compaction-before-rename", "compact {}"),
        ("layers-before-delete", "do_gc {} 0"),
    ],
)
def test_death_at_a_failpoint_loses_nothing(site: Site, failpoint: str, command: str) -> None:
    server = site.root.server
    for _ in range(2):
        site.wait_for(site.write())
        if failpoint != METADATA:
            server.query(f"checkpoint {site.names}")
    end, pages = site.last(), site.pages()
    paused = site.pause(failpoint)
    waiting = site.command(command.format(site.names))
    paused()
    server.stop(signal.SIGKILL)
    waiting.join()
    server.start()
    site.follow()
    site.wait_for(end)
    assert site.pages() == pages
    server.query(command.format(site.names))
    assert site.pages() == pages


def test_stop_lets_go_who_pauses(site: Site) -> None:
    site.wait_for(site.write())
    end = site.last()
    paused = site.pause(METADATA)
    waiting = site.command(f"checkpoint {site.names}")
    paused()
    assert site.root.server.stop(signal.SIGTERM) == 0
    waiting.join()
    site.root.server.start()
    # Its Postgres writes a record of its own now and then.
    assert site.last() >= end


# ---- the steps of ingestion


@pytest.fixture
def stepwise() -> Iterator[None]:
    AFTER_INGEST.set(parse_terms("yield"))
    yield
    AFTER_INGEST.set(())


@pytest.mark.usefixtures("stepwise")
def test_each_record_is_visible_at_the_failpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever handles it, natively or not; and the end is the same as without steps."""
    seen: list[int] = []
    with make_bench() as bench:
        hit = AFTER_INGEST.hit

        def look() -> None:
            seen.append(bench.timeline.last_record_lsn)
            hit()

        monkeypatch.setattr(AFTER_INGEST, "hit", look, raising=False)
        ends = [
            bench.wal.add(*smgr_create(REL)),
            bench.wal.add(Rmgr.HEAP, 0, INSERT, [Block(REL, 0, data=b"x")], xid=NEXT_XID),
            bench.wal.add(Rmgr.SMGR, 0x20, struct.pack("<I3Ii", 0, *REL[:3], 7)),  # by Python
            bench.wal.add(Rmgr.XACT, 0x80, commit_data(), xid=NEXT_XID),
        ]
        bench.run()
        assert seen == ends
        assert bench.timeline.last_record_lsn == ends[-1]


def test_failure_at_the_failpoint_keeps_the_record() -> None:
    with make_bench() as bench:
        first = bench.wal.add(*smgr_create(REL))
        bench.wal.add(Rmgr.XACT, 0x80, commit_data(), xid=NEXT_XID)
        AFTER_INGEST.set(parse_terms("return(stop)"))
        try:
            with pytest.raises(FailpointError, match="stop"):
                bench.run()
        finally:
            AFTER_INGEST.set(())
        assert bench.timeline.last_record_lsn == first
