"""Commits over a quorum of real safekeepers: faults, recovery, fencing, and the very same bytes."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from batch_unit.walproposer_support import (
    DEADLINE,
    Postgres,
    Safekeeper,
    WalCluster,
    wait_until,
    wal_cluster,
)
from batch_unit.workspace import temporary_workspace
from fixtures.utils import freeze, thaw

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, wal_file_name
from zenith_utils.lsn import Lsn, lsn_text
from zenith_utils.pq_client import PqError
from zenith_utils.zenith_feedback import ZenithFeedback

DEFEATED = 3


@pytest.fixture
def cluster() -> Iterator[WalCluster]:
    with temporary_workspace() as directory, wal_cluster(directory) as cluster:
        yield cluster


class Commit(threading.Thread):
    """A commit that may have to wait."""

    def __init__(self, postgres: Postgres, statement: str) -> None:
        super().__init__(daemon=True)
        self._postgres = postgres
        self._statement = statement
        self.done = False
        self.start()

    def run(self) -> None:
        """Run the statement."""
        # A test may end with the commit still waiting, and take Postgres away from it.
        with contextlib.suppress(psycopg2.OperationalError):
            self._postgres.sql(self._statement)
            self.done = True

    def wait_until_blocked(self) -> None:
        """Wait until the commit waits for the quorum."""

        def blocked() -> bool:
            waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"
            return bool(self._postgres.sql(waits)[0][0])

        wait_until(blocked, "a commit that waits")
        assert not self.done


def stored_wal(cluster: WalCluster, safekeeper: Safekeeper, begin: int, end: int) -> bytes:
    """WAL of a range out of a safekeeper's files."""
    directory = safekeeper.directory / str(cluster.tenant) / str(cluster.timeline)
    return wal_of_directory(directory, begin, end)


def wal_of_directory(directory: Path, begin: int, end: int) -> bytes:
    data = b""
    while begin < end:
        segno, offset = divmod(begin, WAL_SEGMENT_SIZE)
        path = directory / wal_file_name(1, segno)
        if not path.exists():
            path = path.with_name(f"{path.name}.partial")
        size = min(WAL_SEGMENT_SIZE - offset, end - begin)
        with path.open("rb") as file:
            data += os.pread(file.fileno(), size, offset)
        begin += size
    return data


def caught_up(cluster: WalCluster, safekeeper: Safekeeper, lsn: Lsn) -> None:
    wait_until(lambda: cluster.flush_lsn(safekeeper) >= lsn, f"{safekeeper.id} at {lsn}")


def current_lsn(postgres: Postgres) -> Lsn:
    return Lsn.parse(postgres.sql("select pg_current_wal_flush_lsn()::text")[0][0])


def stream(cluster: WalCluster, safekeeper: Safekeeper, begin: int, end: int) -> bytes:
    """WAL of a range through START_REPLICATION."""
    data = b""
    with cluster.connect(safekeeper) as conn:
        conn.start_copy_both(f"START_REPLICATION PHYSICAL {lsn_text(begin)}")
        while begin + len(data) < end:
            message = conn.recv_copy_data(timeout=DEADLINE)
            assert message is not None
            if message[0] != ord("w"):
                continue
            start, limit = struct.unpack_from(">QQ", message, 1)
            assert start == begin + len(data)
            assert len(message) - 25 <= 131072
            data += message[25:]
            assert start + len(message) - 25 <= limit
    return data[: end - begin]


def test_quorum(cluster: WalCluster) -> None:
    postgres, proposer = cluster.start()
    assert cluster.postgres is postgres
    one, two, three = cluster.safekeepers
    start = postgres.checkpoint_lsn()
    postgres.sql("create table t (a int)")
    postgres.sql("insert into t values (1)")

    # A minority away never blocks, and is caught up when it returns.
    one.kill()
    for number in range(20):
        postgres.sql(f"insert into t values ({number})")
    postgres.sql("insert into t select generate_series(1, 10000)")
    lsn = current_lsn(postgres)
    one.start()
    caught_up(cluster, one, lsn)

    # A majority away blocks, and loses nothing.
    one.kill()
    two.kill()
    commit = Commit(postgres, "insert into t values (-1)")
    commit.wait_until_blocked()
    two.start()
    wait_until(lambda: commit.done, "the commit")
    one.start()
    caught_up(cluster, one, current_lsn(postgres))

    # A clean stop leaves everything, the shutdown checkpoint included, committed everywhere.
    assert postgres.stop() == 0
    finished = proposer.event("finished")
    assert finished["clean"]
    assert proposer.process is not None
    assert proposer.process.wait(DEADLINE) == 0
    end = Lsn.parse(finished["commit_lsn"])
    assert end > postgres.checkpoint_lsn() > start
    ours = wal_of_directory(postgres.pgdata / "pg_wal", start, end)
    for safekeeper in cluster.safekeepers:
        # The last word to one that is slow is not waited for.
        wait_until(
            lambda s=safekeeper: cluster.status(s)["commit_lsn"] == str(end),  # type: ignore[misc]
            f"safekeeper {safekeeper.id} to know the end",
        )
        status = cluster.status(safekeeper)
        assert status["commit_lsn"] == status["flush_lsn"] == str(end)
        assert stored_wal(cluster, safekeeper, start, end) == ours
        labels = f'tenant_id="{cluster.tenant}",timeline_id="{cluster.timeline}"'
        assert f"safekeeper_flush_lsn{{{labels}}} {int(end)}\n" in safekeeper.metrics()
        assert f"safekeeper_commit_lsn{{{labels}}} {int(end)}\n" in safekeeper.metrics()
    assert stream(cluster, two, start, end) == ours
    page = start - start % 8192
    assert stream(cluster, two, page, end)[start - page :] == ours
    segment = start - start % WAL_SEGMENT_SIZE
    assert stream(cluster, three, segment, end)[start - segment :] == ours
    check_with_waldump(cluster, postgres, one, start, end)

    # The next compute starts where this one ended, in a new term.
    successor = cluster.proposer()
    elected = successor.event("elected")
    assert elected == {
        "event": "elected", "term": 2, "epoch_start_lsn": str(end), "bootstrap": False,
    }  # fmt: skip
    wait_until(lambda: cluster.status(two)["acceptor_state"]["term"] == 2, "the vote of each")


def check_with_waldump(
    cluster: WalCluster, postgres: Postgres, safekeeper: Safekeeper, start: int, end: int
) -> None:
    """pg_waldump reads a safekeeper's WAL from end to end."""
    directory = cluster.directory / "waldump"
    directory.mkdir()
    # The segment's beginning, which pg_waldump wants, is older than the timeline.
    segno, offset = divmod(start, WAL_SEGMENT_SIZE)
    name = wal_file_name(1, segno)
    assert end < (segno + 1) * WAL_SEGMENT_SIZE
    head = wal_of_directory(postgres.pgdata / "pg_wal", start - offset, start)
    tail = stored_wal(cluster, safekeeper, start, (segno + 1) * WAL_SEGMENT_SIZE)
    (directory / name).write_bytes(head + tail)
    command = [str(postgres.distrib.bin_dir / "pg_waldump"), "-q", "-p", str(directory)]
    command += ["-s", lsn_text(start), "-e", lsn_text(end)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_old_compute_is_fenced(cluster: WalCluster) -> None:
    postgres, proposer = cluster.start()
    postgres.sql("create table t (a int)")
    successor = cluster.proposer()
    elected = successor.event("elected")
    assert elected["term"] == 2
    commit = Commit(postgres, "insert into t values (1)")
    assert proposer.event("defeated")["term"] == 2
    assert proposer.process is not None
    assert proposer.process.wait(DEADLINE) == DEFEATED
    commit.wait_until_blocked()
    # What the old compute still writes reaches nobody; who hears of the successor last cuts it off.
    first, epoch_start = cluster.safekeepers[0], Lsn.parse(elected["epoch_start_lsn"])

    def newest_term() -> int:
        history = cluster.status(first)["acceptor_state"]["term_history"]
        return int(history[-1]["term"])

    wait_until(lambda: newest_term() == 2, "safekeeper 1 to follow the successor")
    wait_until(lambda: cluster.flush_lsn(first) == epoch_start, "its log to end there")


def test_a_killed_proposer_is_followed_by_another(cluster: WalCluster) -> None:
    postgres, proposer = cluster.start()
    _, two, three = cluster.safekeepers
    postgres.sql("create table t (a int)")
    three.kill()
    postgres.sql("insert into t select generate_series(1, 20000)")
    # Not what Postgres has flushed: it writes records of its own.
    acknowledged = "select flush_lsn::text from pg_stat_replication where sync_state = 'sync'"
    committed = Lsn.parse(postgres.sql(acknowledged)[0][0])
    proposer.kill()
    # The one that has everything and the one that lags are the quorum now: the laggard is
    # brought up before a compute may start.
    two.kill()
    three.start()
    successor = cluster.proposer()
    elected = successor.event("elected")
    epoch_start = Lsn.parse(elected["epoch_start_lsn"])
    assert epoch_start >= committed
    assert cluster.flush_lsn(three) == epoch_start
    assert cluster.status(three)["commit_lsn"] == str(epoch_start)
    successor.start(postgres, epoch_start)
    postgres.sql("insert into t values (1)")
    two.start()
    caught_up(cluster, two, current_lsn(postgres))
    state = cluster.status(two)["acceptor_state"]
    assert state["epoch"] == state["term"] == 2
    assert [entry["term"] for entry in state["term_history"]] == [1, 2]


def test_a_laggard_gets_from_a_peer_what_postgres_has_removed(cluster: WalCluster) -> None:
    postgres, proposer = cluster.start("max_wal_size=32MB", "min_wal_size=32MB")
    start = postgres.checkpoint_lsn()
    laggard = cluster.safekeepers[2]
    laggard.kill()
    postgres.sql("create table t (a int, b text)")
    first = postgres.pgdata / "pg_wal" / wal_file_name(1, start // WAL_SEGMENT_SIZE)
    for _ in range(3):
        postgres.sql("insert into t select i, repeat('x', 100) from generate_series(1, 120000) i")
        postgres.sql("checkpoint")
    wait_until(lambda: not first.exists(), "removal of old WAL by Postgres")
    postgres.sql("insert into t values (1)")
    laggard.start()
    lsn = current_lsn(postgres)
    caught_up(cluster, laggard, lsn)
    reference = stored_wal(cluster, cluster.safekeepers[0], start, lsn)
    assert stored_wal(cluster, laggard, start, lsn) == reference
    assert proposer.process is not None
    assert proposer.process.poll() is None


def test_a_frozen_safekeeper_costs_no_memory(cluster: WalCluster) -> None:
    postgres, proposer = cluster.start()
    frozen = cluster.safekeepers[0]
    assert frozen.process is not None
    assert proposer.process is not None
    freeze(frozen.process.pid)
    postgres.sql("create table t (a int, b text)")
    before = resident_kb(proposer.process.pid)
    postgres.sql("insert into t select i, repeat('x', 100) from generate_series(1, 200000) i")
    assert resident_kb(proposer.process.pid) - before < 8192
    thaw(frozen.process.pid)
    caught_up(cluster, frozen, current_lsn(postgres))


def resident_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_feedback_and_acknowledgement_limits(cluster: WalCluster) -> None:
    """A pageserver's report travels to the compute's side; too much lag holds commits back."""
    postgres, proposer = cluster.start()
    postgres.sql("create table t (a int)")
    lsn = current_lsn(postgres)
    with cluster.connect(cluster.safekeepers[1]) as conn:
        conn.start_copy_both(f"START_REPLICATION PHYSICAL {lsn}")
        report = ZenithFeedback(8192, lsn, lsn, 0, 5)
        payload = report.encode()
        conn.send_copy_data(b"z" + len(payload).to_bytes(8, "big"), payload)

        def reported() -> dict[str, Any] | None:
            event = proposer.event("status")
            feedback: dict[str, Any] = event["feedback"]
            return feedback if feedback["ps_writelsn"] == str(lsn) else None

        feedback = wait_until(reported, "the feedback")
        assert feedback["current_timeline_size"] == 8192
        proposer.command(cmd="limits", max_write_lag=16384, max_flush_lag=0, max_apply_lag=0)
        commit = Commit(postgres, "insert into t select generate_series(1, 5000)")
        commit.wait_until_blocked()
        report = ZenithFeedback(8192, lsn + (1 << 24), lsn, 0, 6)
        payload = report.encode()
        conn.send_copy_data(b"z" + len(payload).to_bytes(8, "big"), payload)
        wait_until(lambda: commit.done, "the commit")


def test_single_safekeeper_with_fsync() -> None:
    with temporary_workspace() as directory, wal_cluster(directory, 1, sync=True) as cluster:
        postgres, proposer = cluster.start()
        (safekeeper,) = cluster.safekeepers
        postgres.sql("create table t (a int)")
        safekeeper.kill()
        commit = Commit(postgres, "insert into t values (1)")
        commit.wait_until_blocked()
        safekeeper.start()
        wait_until(lambda: commit.done, "the commit")
        postgres.kill()
        assert not proposer.event("finished")["clean"]


def test_commands_of_the_wal_service(cluster: WalCluster) -> None:
    (safekeeper, *_) = cluster.safekeepers
    safekeeper.start()
    with (
        cluster.connect(safekeeper) as conn,
        pytest.raises(PqError, match="is not on this safekeeper"),
    ):
        conn.simple_query("IDENTIFY_SYSTEM")
    with cluster.connect(safekeeper) as conn:
        with pytest.raises(PqError, match="unsupported command TIMELINE_STATUS"):
            conn.simple_query("TIMELINE_STATUS")
        assert conn.simple_query("SET datestyle TO 'ISO'") == []
