"""What stock Postgres would lose or let through on a disposable compute, and Zenith must not."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from fixtures.postgres import Postgres
from fixtures.utils import frozen, wait_until
from fixtures.zenith_env import Safekeeper, ZenithEnv, ZenithEnvBuilder


def lose_quorum(env: ZenithEnv) -> list[Safekeeper]:
    """Kill two of three safekeepers."""
    lost = env.safekeepers[1:]
    for safekeeper in lost:
        safekeeper.kill()
    return lost


class BackgroundStatement:
    """A statement running in a thread, and how it ended."""

    def __init__(self, pg: Postgres, statement: str, settings: str = "") -> None:
        """Start `statement` once `settings`, a statement of its own, was executed."""
        self.connection: Any = pg.connect()
        if settings:
            self.connection.cursor().execute(settings)
        self.pid = self.connection.info.backend_pid
        self.outcome: str | None = None
        self._statement = statement
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.connection.cursor() as cur:
                cur.execute(self._statement)
            self.outcome = "acknowledged"
        except psycopg2.Error as e:
            self.outcome = f"failed: {e}"

    def wait(self) -> str:
        """The outcome, once there is one."""
        self._thread.join(60)
        assert self.outcome is not None, "the statement has not ended"
        self.connection.close()
        return self.outcome


def waits_for_quorum(pg: Postgres, pid: int) -> bool:
    """Whether a backend waits in its commit."""
    rows = pg.safe_psql(f"SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}")
    return rows == [("SyncRep",)]


def assert_durable_with_quorum(
    pg: Postgres, statement: BackgroundStatement, lost: list[Safekeeper]
) -> None:
    """With the quorum back the waiting insert of row 1 is acknowledged, and survives a crash."""
    for safekeeper in lost:
        safekeeper.start()
    assert statement.wait() == "acknowledged"
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT i FROM t") == [(1,)]


def test_cancelled_commit(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Stock Postgres answers a cancelled wait with a warning and success; here it goes on waiting.

    The row must be acknowledged only once it is durable, and then survive a crash.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int)")
    lost = lose_quorum(env)
    statement = BackgroundStatement(pg, "INSERT INTO t VALUES (1)")
    with contextlib.closing(pg.connect()) as other, other.cursor() as cur:
        wait_until(lambda: waits_for_quorum(pg, statement.pid), what="the commit to wait")
        for _ in range(3):
            cur.execute("SELECT pg_cancel_backend(%s)", (statement.pid,))
            wait_until(lambda: waits_for_quorum(pg, statement.pid), what="the commit to wait on")
            assert statement.outcome is None
    assert_durable_with_quorum(pg, statement, lost)


def test_terminated_commit(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A backend terminated while its commit waits tells its client nothing of success.

    A client that is told of success goes on to act on it: better no word than a false one.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int)")
    lose_quorum(env)
    statement = BackgroundStatement(pg, "INSERT INTO t VALUES (1)")
    wait_until(lambda: waits_for_quorum(pg, statement.pid), what="the commit to wait")
    pg.safe_psql(f"SELECT pg_terminate_backend({statement.pid})")
    assert statement.wait().startswith("failed")


def test_statement_timeout_of_commit(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A statement timeout that strikes in the commit's wait acknowledges nothing either.

    A timeout is how most applications bound a query: it must not turn into an acknowledgement
    of what could still be lost. It strikes where the commit is part of a statement; at the end of
    one it counts no more.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int); CREATE TABLE u (i int)")
    lost = lose_quorum(env)
    settings = "SET statement_timeout = '2s'"
    inside = BackgroundStatement(
        pg, "DO $$ BEGIN INSERT INTO u VALUES (1); COMMIT; PERFORM 1; END $$", settings
    )
    statement = BackgroundStatement(pg, "INSERT INTO t VALUES (1)", settings)
    for one in (inside, statement):
        wait_until(
            lambda one=one: (  # type: ignore[misc]
                waits_for_quorum(pg, one.pid)
                and pg.safe_psql(
                    "SELECT now() - query_start > '3 s' FROM pg_stat_activity "
                    f"WHERE pid = {one.pid}"
                )
                == [(True,)]
            ),
            what="the timeout to have passed",
        )
    assert inside.outcome is statement.outcome is None
    assert_durable_with_quorum(pg, statement, lost)
    # The rest of what the other was part of is not executed.
    assert "statement timeout" in inside.wait()
    assert pg.safe_psql("SELECT i FROM u") == [(1,)]


def test_stop_without_quorum(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A fast shutdown would wait for the walsender for ever: the stop ends by its deadline.

    A node that cannot be stopped while safekeepers are down would keep its machine from being
    repaired.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["zenith.stop_timeout=2s"])
    pg.safe_psql("CREATE TABLE t AS SELECT 1 AS i")
    lost = lose_quorum(env)
    statement = BackgroundStatement(pg, "INSERT INTO t VALUES (2)")
    wait_until(lambda: waits_for_quorum(pg, statement.pid), what="the commit to wait")
    pg.stop()
    assert pg.status() == "stopped"
    assert statement.wait().startswith("failed")
    for safekeeper in lost:
        safekeeper.start()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t WHERE i = 1") == [(1,)]


def test_free_space_survives(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The free space map is not WAL-logged by Postgres: a half-empty table must not grow.

    Computes start often: a table that forgot its free space each time would grow without
    bounds.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum=off"])
    pg.safe_psql("CREATE TABLE t (i int, filler text)")
    pg.safe_psql("INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 20000) i")
    pg.safe_psql("DELETE FROM t WHERE i % 2 = 0")
    pg.safe_psql("VACUUM t")
    sizes = [pg.safe_psql("SELECT pg_relation_size('t')")[0][0]]
    newest = 20000
    for generation in range(5):
        if generation % 2:
            # Before a crash a checkpoint is what carries the map.
            pg.safe_psql("CHECKPOINT")
            pg.kill()
        else:
            pg.stop()
        pg.start()
        # As many new rows as old ones go: all of them find room in the half-empty table.
        pg.safe_psql(
            "INSERT INTO t SELECT i, repeat('x', 500) "
            f"FROM generate_series({newest + 1}, {newest + 2000}) i"
        )
        newest += 2000
        sizes.append(pg.safe_psql("SELECT pg_relation_size('t')")[0][0])
        pg.safe_psql("DELETE FROM t WHERE i IN (SELECT i FROM t ORDER BY i LIMIT 2000)")
        pg.safe_psql("VACUUM t")
    assert max(sizes) <= sizes[0] * 1.02, sizes


def test_local_files_survive(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Statistics, ALTER SYSTEM, pg_hba.conf and the user's own files outlive the directory.

    The directory is made anew at each start, which its users do not know: what they put there
    must be there.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    pg.safe_psql("SELECT count(*) FROM t")
    pg.safe_psql("ALTER SYSTEM SET work_mem = '12345kB'")
    pgdata = Path(pg.pg_data_dir_path())
    with (pgdata / "pg_hba.conf").open("a") as hba:
        hba.write("# a line of my own\n")
    (pgdata / "server.crt").write_text("certificate")
    (pgdata / "conf.d").mkdir()
    (pgdata / "conf.d" / "mine.conf").write_text("# mine\n")
    inserted = wait_until(
        lambda: pg.safe_psql("SELECT n_tup_ins FROM pg_stat_user_tables WHERE n_tup_ins > 0"),
        what="the statistics to be counted",
    )
    pg.stop()
    pg.start()
    assert pg.safe_psql("SELECT n_tup_ins FROM pg_stat_user_tables") == inserted
    for kill in (False, True):
        if kill:
            pg.kill()
            pg.start()
        assert pg.safe_psql("SHOW work_mem") == [("12345kB",)]
        assert "# a line of my own" in (pgdata / "pg_hba.conf").read_text()
        assert (pgdata / "server.crt").read_text() == "certificate"
        assert (pgdata / "conf.d" / "mine.conf").exists()


def test_wal_waits_for_proposer(zenith_env_builder: ZenithEnvBuilder) -> None:
    """WAL that the walproposer has not read yet is not removed by checkpoints.

    WAL that goes before the quorum has it is gone for good: the node could never commit again.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start(
        "main", config_lines=["wal_keep_size=0", "max_wal_size=32MB", "wal_sender_timeout=0"]
    )
    pg.safe_psql("CREATE TABLE t (i int, filler text)")
    pid = env.safekeepers[0].pid()
    with frozen(pid), contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("SET synchronous_commit = off")
        for _ in range(6):
            cur.execute(
                "INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 16000) i"
            )
            cur.execute("CHECKPOINT")
    # With WAL missing it would wait for ever: in the background it fails by a deadline instead.
    statement = BackgroundStatement(pg, "INSERT INTO t VALUES (0, 'acknowledged')")
    assert statement.wait() == "acknowledged"
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(96001,)]


def test_limits_never_too_low(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Settings below what the WAL was written with are raised instead of failing the start.

    Postgres refuses to start below such a limit: a change of a setting must not lock anybody
    out of their data.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["max_prepared_transactions=5"])
    pg.safe_psql("CREATE TABLE t (i int)")
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'p'")
    lsn = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    pg.stop()
    pg.config(["max_prepared_transactions=0"])
    pg.start()
    assert pg.safe_psql("SELECT gid FROM pg_prepared_xacts") == [("p",)]
    past = env.postgres.create_start(
        "main", node_name="past", lsn=lsn, config_lines=["max_connections=20", "max_wal_senders=0"]
    )
    assert past.safe_psql("SELECT count(*) FROM t") == [(0,)]


def test_promoted_node_is_stopped(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A read-only node promoted behind Postgres' back would diverge: it is stopped.

    It would take writes that no storage ever gets, and lose them without a word.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t AS SELECT 1 AS i")
    lsn = main.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    past = env.postgres.create_start("main", node_name="past", lsn=lsn)
    pgdata = Path(past.pg_data_dir_path())
    (pgdata / "promote").touch()
    postmaster = int((pgdata / "postmaster.pid").read_text().splitlines()[0])
    os.kill(postmaster, signal.SIGUSR1)
    past.wait_crashed()


@pytest.mark.parametrize("num_safekeepers", [1])
def test_durability_cannot_be_switched_off(
    zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int
) -> None:
    """What acknowledged commits rest on cannot be changed by ALTER SYSTEM or the file.

    One line copied from a tuning guide must not make commits volatile.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["synchronous_standby_names = ''"])
    with pytest.raises(psycopg2.Error, match="cannot be changed"):
        pg.safe_psql("ALTER SYSTEM SET synchronous_standby_names = ''")
    pg.config(["synchronous_standby_names = 'somebody'"])
    pg.safe_psql("SELECT pg_reload_conf()")
    assert pg.safe_psql("SHOW synchronous_standby_names") == [("walproposer",)]
    env.safekeepers[0].kill()
    statement = BackgroundStatement(pg, "CREATE TABLE t (i int)")
    wait_until(lambda: waits_for_quorum(pg, statement.pid), what="the commit to wait")
    env.safekeepers[0].start()
    assert statement.wait() == "acknowledged"
