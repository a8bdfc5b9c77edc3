"""What walproposer and safekeepers write to their logs: events once, and nothing else."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from batch_unit.walproposer_support import WalCluster, wait_until, wal_cluster
from batch_unit.workspace import temporary_workspace

from compute_tools.walproposer.member_log import MemberLog
from zenith_utils.lsn import Lsn


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> MemberLog:
    caplog.set_level("INFO")
    return MemberLog("safekeeper a:1", clock)


def test_an_absence(log: MemberLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log.connected()
    log.following(0x1000)
    clock.now += 100
    log.lost("connection closed")
    for _ in range(50):
        clock.now += 1
        log.cannot_connect("connection refused")
    log.connected()
    log.following(0x2000)
    clock.now += 10
    log.tick()
    assert caplog.messages == [
        "connected to safekeeper a:1",
        "streaming to safekeeper a:1 from 0/1000",
        "session with safekeeper a:1 ends: connection closed",
        "cannot connect to safekeeper a:1, will keep trying: connection refused",
        "connected to safekeeper a:1, which was away for 50.0 s",
        "streaming to safekeeper a:1 from 0/2000, which was away for 50.0 s",
    ]


def test_one_that_comes_and_goes(
    log: MemberLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A few lines a minute, however often it happens; and its end is told."""
    for number in range(120):
        log.connected()
        log.following(0x1000 + number)
        log.behind(0x1000 + number, 1 << 30, "pg_wal", tell=True)
        log.tick()
        clock.now += 1
        log.lost("disk full")
    assert 4 <= len(caplog.messages) <= 12
    caplog.clear()
    log.connected()
    log.following(0x5000)
    log.tick()
    assert caplog.messages == []
    clock.now += 6
    log.tick()
    log.tick()
    assert caplog.messages == ["streaming to safekeeper a:1 from 0/5000, which was away for 6.0 s"]
    # Another reason is another event.
    log.lost("no answer for 15 s")
    log.connected()
    assert len(caplog.messages) == 3


def test_recovery(log: MemberLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    # The usual small lag is none.
    log.behind(0x1000, 0x3000, "pg_wal")
    log.caught_up(0x3000)
    assert caplog.messages == []
    log.behind(0x3000, 0x1003000, "pg_wal")
    clock.now += 1
    log.behind(0x803000, 0x1003000, "pg_wal")
    log.behind(0xF03000, 0x1003000, "safekeeper b:2", tell=True)
    clock.now += 1
    log.caught_up(0x1003000)
    log.caught_up(0x1003000)
    assert caplog.messages == [
        "recovery of safekeeper a:1: it lacks WAL from 0/3000 to 0/1003000, 16777216 bytes; "
        "sending it from pg_wal",
        "recovery of safekeeper a:1: it lacks WAL from 0/F03000 to 0/1003000, 1048576 bytes; "
        "sending it from safekeeper b:2",
        "recovery of safekeeper a:1 ends at 0/1003000: 16777216 bytes in 2.0 s",
    ]
    caplog.clear()
    # One that takes long is told of when it does.
    log.behind(0x1000, 0x3000, "pg_wal")
    assert caplog.messages == []
    clock.now += 1.5
    log.behind(0x1000, 0x4000, "pg_wal")
    log.caught_up(0x4000)
    assert len(caplog.messages) == 2


@pytest.fixture
def cluster() -> Iterator[WalCluster]:
    with temporary_workspace() as directory, wal_cluster(directory) as cluster:
        yield cluster


def test_lines_of_processes(cluster: WalCluster) -> None:
    postgres, proposer = cluster.start()
    one, two, _ = cluster.safekeepers
    path = cluster.directory / "walproposer.log"

    def lines(pattern: str) -> list[str]:
        return re.findall(f"^.*{pattern}.*$", path.read_text(), re.MULTILINE)

    def appears(pattern: str) -> None:
        wait_until(lambda: lines(pattern), pattern)

    assert len(lines("elected in term 1 with the votes of .*; nothing was written yet")) == 1
    appears("streaming from Postgres at")
    postgres.sql("create table t (a int, b text)")
    wait_until(lambda: len(lines("streaming to safekeeper")) == 3, "all safekeepers")
    # Commits leave no trace.
    before = path.read_text()
    deadline = time.monotonic() + 1.5  # longer than the period of everything periodic
    while time.monotonic() < deadline:
        postgres.sql("insert into t values (1, 'x')")
    assert path.read_text() == before

    one.kill()
    appears(f"session with safekeeper {one.address} ends: ")
    postgres.sql("insert into t select i, repeat('x', 100) from generate_series(1, 20000) i")
    one.start()
    appears(f"streaming to safekeeper {one.address} from .*, which was away for ")
    appears(f"recovery of safekeeper {one.address}: it lacks WAL from .*; sending it from ")
    appears(f"recovery of safekeeper {one.address} ends at .*: [0-9]+ bytes in ")

    # Another proposer's election is told of by all; the safekeeper two has to be recovered.
    two.kill()
    postgres.sql("insert into t select i, repeat('x', 100) from generate_series(1, 100) i")
    proposer.kill()
    two.start()
    elected = cluster.proposer().event("elected")
    appears(
        f"elected in term 2 with the votes of .*; WAL starts at {elected['epoch_start_lsn']}, "
        "as safekeeper"
    )
    lsn = Lsn.parse(elected["epoch_start_lsn"])
    wait_until(lambda: cluster.flush_lsn(two) >= lsn, "safekeeper 2")
    appears(f"recovery of safekeeper {two.address}: it lacks WAL from .*; sending it from safe")
    appears(f"recovery of safekeeper {two.address} ends at {lsn}")
    text = (two.directory / "out.log").read_text()
    for line in (
        r"session of proposer 127\.0\.0\.1:\d+ begins",
        r"voted in term 1, with WAL up to 0/0 of term 0",
        r"follows the leader of term 1, whose WAL continues ours from",
        r"follows the leader of term 2, whose WAL continues ours from",
    ):
        assert re.search(line, text), line
