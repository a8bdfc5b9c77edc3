"""No client is told of success before the quorum has the commit, whatever ends the wait."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from batch_others.test_durability import BackgroundStatement, waits_for_quorum
from fixtures.postgres import Postgres
from fixtures.utils import frozen, process_exists, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

INSERT = "INSERT INTO t VALUES (1)"


@pytest.fixture
def node(zenith_env_builder: ZenithEnvBuilder) -> tuple[ZenithEnv, Postgres]:
    """Three safekeepers, a node, an empty table, and what the statements below need."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start(
        "main", config_lines=["max_prepared_transactions=10", "zenith.stop_timeout=2s"]
    )
    pg.safe_psql("CREATE TABLE t (i int)")
    pg.safe_psql(
        "CREATE PROCEDURE p() LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO t VALUES (1); COMMIT; PERFORM pg_sleep(0); END $$"
    )
    return env, pg


@contextlib.contextmanager
def quorum_away(env: ZenithEnv) -> Iterator[None]:
    """Two of three safekeepers hang."""
    with frozen(*(s.pid() for s in env.safekeepers[1:])):
        yield


def waiting(pg: Postgres, query: str = INSERT) -> BackgroundStatement:
    """A statement whose commit waits for the quorum."""
    statement = BackgroundStatement(pg, query)
    wait_until(lambda: waits_for_quorum(pg, statement.pid), what=f"{query} to wait")
    return statement


def rows_after_crash(pg: Postgres) -> int:
    """What is in the table on a new compute, which has only what the quorum has."""
    pg.kill()
    pg.start()
    return int(pg.safe_psql("SELECT count(*) FROM t")[0][0])


def test_every_kind_of_commit_waits_and_is_there(node: tuple[ZenithEnv, Postgres]) -> None:
    """Cancelled several times, none is acknowledged; with the quorum back each is, and stays.

    There are many ways to commit, and stock Postgres lets each through when it is cancelled:
    one that is forgotten here is a commit that can be lost.
    """
    env, pg = node
    for name in ("p1", "p2", "p3"):
        pg.safe_psql(f"BEGIN; {INSERT}; PREPARE TRANSACTION '{name}'")
    kinds = [
        INSERT,
        f"BEGIN; {INSERT}; COMMIT",
        f"SET synchronous_commit = remote_write; {INSERT}",
        f"SET synchronous_commit = remote_apply; {INSERT}",
        f"SET synchronous_commit = local; {INSERT}",
        f"BEGIN; SET LOCAL synchronous_commit = local; {INSERT}; COMMIT",
        f"SET log_min_messages = panic; SET client_min_messages = error; {INSERT}",
        f"BEGIN; {INSERT}; SET LOCAL statement_timeout = '500ms'; COMMIT",
        f"DO $$ BEGIN {INSERT}; END $$",
        f"BEGIN; {INSERT}; PREPARE TRANSACTION 'p0'",
        "COMMIT PREPARED 'p1'",
        "ROLLBACK PREPARED 'p3'",
        "SELECT pg_logical_emit_message(true, 'a', 'b')",
        "CREATE TABLE u (i int)",
        "CALL p()",
    ]
    with quorum_away(env):
        statements = [waiting(pg, query) for query in kinds]
        for _ in range(3):
            for statement in statements:
                pg.safe_psql(f"SELECT pg_cancel_backend({statement.pid})")
        # The last cancel has been taken: its backend waits as before.
        for statement in statements:
            wait_until(
                lambda s=statement: waits_for_quorum(pg, s.pid),  # type: ignore[misc]
                what="the commit to wait on",
            )
        assert [s.outcome for s in statements] == [None] * len(kinds)
    outcomes = [statement.wait() for statement in statements]
    # The rest of a procedure is cancelled once its commit is durable.
    assert outcomes[:-1] == ["acknowledged"] * (len(kinds) - 1)
    assert "canceling statement" in outcomes[-1]
    inserted = sum(INSERT in query for query in kinds) - 1  # less the one only prepared
    assert rows_after_crash(pg) == inserted + 2  # p1 and the procedure
    assert pg.safe_psql("SELECT gid FROM pg_prepared_xacts ORDER BY gid") == [("p0",), ("p2",)]


def test_cancelled_before_the_wait(node: tuple[ZenithEnv, Postgres]) -> None:
    """A deferred trigger has the commit cancelled before it gets to its wait.

    A cancel that is already pending when the wait begins takes another path in Postgres.
    """
    env, pg = node
    pg.safe_psql(
        "CREATE FUNCTION c() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "SET LOCAL statement_timeout = 0; PERFORM pg_cancel_backend(pg_backend_pid()); "
        "RETURN NULL; EXCEPTION WHEN query_canceled THEN RETURN NULL; END $$"
    )
    pg.safe_psql(
        "CREATE CONSTRAINT TRIGGER c AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION c()"
    )
    with quorum_away(env):
        statement = waiting(pg)
        assert statement.outcome is None
    assert statement.wait() == "acknowledged"
    assert rows_after_crash(pg) == 1


def test_gone_clients_and_terminated_backends(node: tuple[ZenithEnv, Postgres]) -> None:
    """They end without a word of success; what they wrote may be there or not.

    They must end when they are told to, or sessions pile up until nobody can connect; but in
    silence.
    """
    env, pg = node
    with quorum_away(env):
        terminated = waiting(pg)
        cancelled = waiting(pg)
        gone = waiting(pg)
        with socket.socket(fileno=os.dup(gone.connection.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        pg.safe_psql(f"SELECT pg_cancel_backend({cancelled.pid})")
        for statement in (terminated, cancelled):
            pg.safe_psql(f"SELECT pg_terminate_backend({statement.pid})")
            assert statement.wait().startswith("failed")
            wait_until(lambda s=statement: not process_exists(s.pid), what="its end")  # type: ignore[misc]
        assert waits_for_quorum(pg, gone.pid)
        pg.kill()
    assert gone.wait().startswith("failed")
    pg.start()
    assert pg.safe_psql("SELECT count(*) <= 3 FROM t") == [(True,)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_shutdown_during_the_wait(node: tuple[ZenithEnv, Postgres], how: signal.Signals) -> None:
    """Smart, fast, immediate, told to Postgres itself: no client hears of success.

    An operator who stops the server during an outage must not make it say yes to everybody who
    waits.
    """
    env, pg = node
    postmaster = int(Path(pg.pg_data_dir_path(), "postmaster.pid").read_text().split()[0])
    with quorum_away(env):
        statement = waiting(pg)
        os.kill(postmaster, how)
        if how is signal.SIGTERM:
            # A smart one waits for the client, who waits for the quorum.
            wait_until(lambda: "smart shutdown" in pg.log_text(), what="the request")
            assert statement.outcome is None
        else:
            assert statement.wait().startswith("failed")
    if how is signal.SIGTERM:
        assert statement.wait() == "acknowledged"
    pg.wait_crashed()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") in ([(0,)], [(1,)])
    if how is signal.SIGTERM:
        assert pg.safe_psql("SELECT count(*) FROM t") == [(1,)]


def test_levels_that_cannot_be_silenced(node: tuple[ZenithEnv, Postgres]) -> None:
    """Whoever sets it, for whomever: the report that the wait hangs on is generated.

    The wait hangs on a report that settings could suppress: no role, database or function may
    switch durability off so.
    """
    _, pg = node
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("ALTER ROLE zenith_admin SET log_min_messages = panic")
        cur.execute("ALTER ROLE zenith_admin SET synchronous_commit = local")
        cur.execute("ALTER DATABASE postgres SET log_min_messages = fatal")
        cur.execute("ALTER SYSTEM SET log_min_messages = log")
        cur.execute("SELECT pg_reload_conf()")
        cur.execute(
            "CREATE FUNCTION f() RETURNS text LANGUAGE sql SET log_min_messages = panic "
            "AS $$ SELECT current_setting('log_min_messages') $$"
        )
        cur.execute("SELECT f()")
        assert cur.fetchone() == ("warning",)
    for name, value in (("log_min_messages", "warning"), ("synchronous_commit", "on")):
        assert pg.safe_psql(f"SHOW {name}") == [(value,)]
        rows = pg.safe_psql(f"SELECT reset_val FROM pg_settings WHERE name = '{name}'")
        assert rows == [(value,)]


def test_asynchronous_commits_may_be_lost(node: tuple[ZenithEnv, Postgres]) -> None:
    """`off` returns without the quorum: the one level that promises nothing.

    It is what its users ask for; if it waited, they would lose the speed they have paid for
    with the risk.
    """
    env, pg = node
    with quorum_away(env):
        with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
            cur.execute("SET synchronous_commit = off")
            cur.execute(INSERT)
        pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") in ([(0,)], [(1,)])
    with pytest.raises(psycopg2.Error, match="cannot be changed"):
        pg.safe_psql("ALTER SYSTEM SET synchronous_standby_names = 'other'")
