"""Commits wait for a pageserver that lags behind and go on when it has caught up; SQL shows it."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fixtures.postgres import Postgres
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnvBuilder

MB = 1 << 20
MESSAGE = 100_000
# WAL of one transaction of a Writer, and of what the server logs on its own.
ONE_TRANSACTION = MESSAGE + 50_000
WAITING = "commits wait until the pageserver catches up"
NO_LONGER = "commits no longer wait for the pageserver"


@dataclass
class Writer:
    """Commits as fast as it may, in a thread; `committed` counts what was acknowledged."""

    connection: Any
    committed: int = 0
    error: Exception | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def pid(self) -> int:
        """The backend's process id."""
        pid: int = self.connection.get_backend_pid()
        return pid

    def stop(self) -> None:
        """Commit no more, and wait for the commit that is under way."""
        self.stopping.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), "a commit does not return"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            with self.connection.cursor() as cursor:
                while not self.stopping.is_set():
                    cursor.execute(
                        "INSERT INTO t SELECT %s FROM"
                        f" pg_logical_emit_message(true, '', repeat('x', {MESSAGE}))",
                        [self.committed + 1],
                    )
                    self.committed += 1
        except Exception as e:
            self.error = e


@contextlib.contextmanager
def writer(pg: Postgres) -> Iterator[Writer]:
    """A writer, stopped at the end."""
    with contextlib.closing(pg.connect()) as connection:
        running = Writer(connection)
        try:
            yield running
        finally:
            running.stopping.set()


class Session:
    """A session whose statements need nothing of the pageserver, once warm."""

    def __init__(self, connection: Any) -> None:
        self._cursor = connection.cursor()

    def row(self, query: str) -> Any:
        """The one row of a query."""
        self._cursor.execute(query)
        return self._cursor.fetchone()

    def lag(self) -> int:
        """Bytes of WAL that the pageserver has not received."""
        # The end of the WAL first: what is received meanwhile is no lag.
        return int(
            self.row(
                "SELECT flushed - (SELECT received_lsn FROM backpressure_lsns()) "
                "FROM (SELECT pg_current_wal_flush_lsn() AS flushed OFFSET 0) x"
            )[0]
        )

    def is_held(self, pid: int) -> bool:
        """Whether a backend waits in a commit above the limit."""
        return bool(
            self.row(
                "SELECT wait_event = 'SyncRep' AND backpressure_limit_lsn() <"
                f" pg_current_wal_flush_lsn() FROM pg_stat_activity WHERE pid = {pid}"
            )[0]
        )


@contextlib.contextmanager
def session(pg: Postgres) -> Iterator[Session]:
    """A warm session on a node with the extension and an empty table t."""
    with contextlib.closing(pg.connect()) as connection:
        warm = Session(connection)
        connection.cursor().execute("CREATE EXTENSION IF NOT EXISTS zenith; CREATE TABLE t (i int)")
        connection.cursor().execute("SET statement_timeout = '30s'")
        warm.lag()
        warm.is_held(connection.get_backend_pid())
        warm.row("SELECT count(*) FROM t")
        yield warm


def compute_log(pg: Postgres) -> str:
    """What supervisor and walproposer have said."""
    return (pg.state_dir() / "compute.log").read_text()


def start(builder: ZenithEnvBuilder, *lines: str) -> Postgres:
    """A node over three safekeepers."""
    builder.num_safekeepers = 3
    return builder.init_start().postgres.create_start("main", config_lines=lines)


def test_write_lag(zenith_env_builder: ZenithEnvBuilder) -> None:
    """With the pageserver away commits go on up to the limit, then wait, then go on.

    Unbounded, a pageserver that is away would let WAL pile up until every disk is full; held
    too early, its restart would stop all work.
    """
    pg = start(zenith_env_builder, "max_replication_write_lag=1MB")
    with session(pg) as probe, contextlib.closing(pg.connect()) as connection:
        assert probe.row("SELECT pg_size_bytes(current_setting('max_replication_write_lag'))") == (
            MB,
        )
        assert probe.row("SELECT count(*) FROM t") == (0,)
        warm = Writer(connection)
        wait_until(lambda: warm.committed, what="a commit")
        warm.stop()
        # No report of what was written before is under way any more.
        wait_until(lambda: probe.lag() == 0, what="the pageserver to have everything")
        with pg.env.pageserver.suspended():
            writing = Writer(connection, warm.committed)
            wait_until(lambda: probe.is_held(writing.pid), what="a commit to be held back")
            assert MB - ONE_TRANSACTION < probe.lag() < MB + ONE_TRANSACTION
            acknowledged = writing.committed
            assert acknowledged >= warm.committed + 5
            wait_until(lambda: WAITING in compute_log(pg), what="the log to say so")
            # Who reads does not wait, and who is held does not get through.
            assert probe.row("SELECT count(*) FROM t") == (acknowledged,)
            assert writing.committed == acknowledged
            assert probe.is_held(writing.pid)
        wait_until(lambda: writing.committed > acknowledged + 20, what="commits to go on")
        writing.stop()
        assert probe.row("SELECT count(*) FROM t") == (writing.committed,)
        wait_until(lambda: NO_LONGER in compute_log(pg), what="the log to say that it is over")
        assert compute_log(pg).count(WAITING) == 1


def test_lag_of_a_slow_pageserver(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The lag stays within the limit, by not more than the transactions under way.

    The limit is what bounds how long a new compute, or a cold read, has to wait: it must hold
    under load, too, not only at rest.
    """
    pg = start(zenith_env_builder, "max_replication_write_lag=1MB")
    with session(pg) as probe, writer(pg) as one, writer(pg) as other:
        worst = 0
        for _ in range(8):
            with pg.env.pageserver.suspended():
                worst = max(worst, *(probe.lag() for _ in range(30)))
            done = one.committed + other.committed
            wait_until(lambda done=done: one.committed + other.committed > done + 5, what="commits")  # type: ignore[misc]
            worst = max(worst, *(probe.lag() for _ in range(30)))
        one.stop()
        other.stop()
        assert worst < MB + 2 * ONE_TRANSACTION
        assert probe.row("SELECT count(*) FROM t") == (one.committed + other.committed,)


def test_flush_lag_and_reload(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What the pageserver has received counts when it is on disk; a reload changes the limits.

    What is only in the pageserver's memory must be sent again after a crash: this limit bounds
    how much, and an operator turns it without a restart.
    """
    pg = start(zenith_env_builder, "max_replication_write_lag=-1", "max_replication_flush_lag=1MB")
    with session(pg) as probe, writer(pg) as writing:
        wait_until(lambda: probe.is_held(writing.pid), what="a commit to be held back")
        wait_until(lambda: probe.lag() == 0, what="the pageserver to receive everything")
        flushed = "SELECT disk_consistent_lsn FROM backpressure_lsns()"
        before = probe.row(flushed)
        done = writing.committed
        pg.env.pageserver.safe_psql(f"checkpoint {pg.tenant_id.hex} {timeline_id(pg).hex}")
        wait_until(lambda: writing.committed > done + 5, what="commits to go on")
        assert probe.row(flushed) != before

        wait_until(lambda: probe.is_held(writing.pid), what="a commit to be held back")
        done = writing.committed
        with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("ALTER SYSTEM SET zenith.max_replication_flush_lag = '0.01GB'")
            cursor.execute("SELECT pg_reload_conf()")
        wait_until(lambda: writing.committed > done + 50, what="commits to go on")
        assert probe.row("SHOW max_replication_flush_lag") == ("10MB",)
        wait_until(lambda: probe.is_held(writing.pid), what="a commit to be held back")
        pg.config(["max_replication_flush_lag=off_limits", "max_replication_apply_lag=1MB"])
        with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("ALTER SYSTEM RESET ALL")

        def refused() -> bool:
            # The server reads what the supervisor makes of the file, which may come after a reload.
            pg.safe_psql("SELECT pg_reload_conf()")
            return "invalid value for parameter" in pg.log_text()

        # A value that Postgres refuses changes nothing; without remote storage nothing is uploaded.
        wait_until(refused, what="the refusal")
        assert probe.is_held(writing.pid)
        pg.config(["max_replication_flush_lag=-1"])
        with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_reload_conf()")
        done = writing.committed
        wait_until(lambda: writing.committed > done + 20, what="commits to go on")
        assert probe.row("SELECT backpressure_limit_lsn()") == (None,)
        writing.stop()


def timeline_id(pg: Postgres) -> uuid.UUID:
    """Id of the node's timeline."""
    return uuid.UUID(pg.safe_psql("SHOW zenith.zenith_timeline")[0][0])


def test_stop_while_commits_are_held(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A clean stop does not wait for the pageserver, and keeps what was held back.

    Somebody whose pageserver is down must still be able to shut down cleanly, and to find what
    was committed.
    """
    pg = start(zenith_env_builder, "max_replication_write_lag=1MB")
    with session(pg) as probe, writer(pg) as writing:
        wait_until(lambda: writing.committed, what="a commit")
        with pg.env.pageserver.suspended():
            wait_until(lambda: probe.is_held(writing.pid), what="a commit to be held back")
            pg.stop()
        assert pg.status() == "stopped"
        assert "was ended immediately" not in compute_log(pg)
        writing.thread.join(10)
    pg.start()
    ((rows, highest),) = pg.safe_psql("SELECT count(*), max(i) FROM t")
    assert rows == highest
    assert writing.committed <= rows <= writing.committed + 1


@pytest.mark.parametrize("num_safekeepers", [0, 3])
def test_extension(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int, pg_bin: Any) -> None:
    """CREATE EXTENSION on a distribution that knows nothing of it: dumps, restarts, old states.

    Users dump, restore and look back at databases with the extension in them: it must survive
    all that on stock Postgres.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    listed = (
        "SELECT default_version, installed_version FROM pg_available_extensions"
        " WHERE name = 'zenith'"
    )
    assert pg.safe_psql(listed) == [("1.0", None)]
    assert ("plpgsql",) in pg.safe_psql("SELECT name FROM pg_available_extensions")
    pg.safe_psql("CREATE EXTENSION zenith")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 10000) AS i")
    assert pg.safe_psql(listed) == [("1.0", "1.0")]

    def caught_up() -> bool:
        query = "SELECT received_lsn >= pg_current_wal_flush_lsn() FROM backpressure_lsns()"
        return bool(pg.safe_psql(query)[0][0])

    lsns = (
        "SELECT received_lsn, disk_consistent_lsn, remote_consistent_lsn FROM backpressure_lsns()"
    )
    wait_until(caught_up, what="the pageserver to have everything")
    ((received, flushed, uploaded),) = pg.safe_psql(lsns)
    assert received is not None and flushed is not None and uploaded is None
    ((size,),) = pg.safe_psql("SELECT pg_cluster_size()")
    detail = env.pageserver.http_client().timeline_detail(env.initial_tenant, timeline_id(pg))
    assert size == detail["local"]["current_logical_size_non_incremental"]

    dump = f"{pg_bin.log_dir}/dump"
    pg_bin.run(["pg_dump", "-Fc", "-f", dump, pg.connstr()])
    pg.safe_psql("CREATE DATABASE restored")
    pg_bin.run(["pg_restore", "--exit-on-error", "-d", pg.connstr(dbname="restored"), dump])
    assert pg.safe_psql("SELECT pg_cluster_size() > 0", dbname="restored") == [(True,)]
    assert pg.safe_psql(
        "SELECT extversion FROM pg_extension WHERE extname = 'zenith'", dbname="restored"
    ) == [("1.0",)]
    ((lsn,),) = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")

    pg.stop()
    pg.start()
    assert pg.safe_psql(
        "SELECT pg_cluster_size() > 0, received_lsn IS NOT NULL FROM backpressure_lsns()"
    ) == [(True, True)]
    past = env.postgres.create_start("main", node_name="past", lsn=lsn)
    assert past.safe_psql(
        f"SELECT received_lsn >= '{lsn}',  disk_consistent_lsn FROM backpressure_lsns()"
    ) == [(True, None)]
    assert past.safe_psql("SELECT pg_cluster_size()")[0][0] > size
    pg.safe_psql("DROP EXTENSION zenith")
    assert pg.safe_psql(listed) == [("1.0", None)]
