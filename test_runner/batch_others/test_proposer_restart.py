"""The walproposer dies under a living Postgres: it is replaced, or the compute is fenced."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from pathlib import Path

import psycopg2
import pytest
from batch_others.test_durability import BackgroundStatement, waits_for_quorum
from fixtures.postgres import Postgres
from fixtures.utils import frozen, process_exists, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder


def walproposer_pid(pg: Postgres) -> int:
    """The walproposer of a node, which may be starting."""
    return wait_until(pg.walproposer_pid, what="a walproposer")


def postmaster_pid(pg: Postgres) -> int:
    """The first line of postmaster.pid."""
    return int(Path(pg.pg_data_dir_path(), "postmaster.pid").read_text().split()[0])


def kill_walproposer(pg: Postgres) -> None:
    """SIGKILL, and wait for it to be gone."""
    pid = walproposer_pid(pg)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not process_exists(pid), what="the walproposer to die")


def compute_log(pg: Postgres) -> str:
    """What the supervisor and its walproposers say."""
    return (pg.state_dir() / "compute.log").read_text()


def start_with_table(builder: ZenithEnvBuilder) -> tuple[ZenithEnv, Postgres]:
    """An environment of three safekeepers, a node, and a table in it."""
    builder.num_safekeepers = 3
    env = builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (client int, seq int)")
    return env, pg


class Writer(threading.Thread):
    """Inserts one row after another through one connection, which never breaks."""

    def __init__(self, pg: Postgres, number: int) -> None:
        super().__init__()
        self._connection = pg.connect()
        self._number = number
        self.stopping = threading.Event()
        self.acknowledged = 0
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Until told to stop."""
        try:
            with self._connection.cursor() as cur:
                while not self.stopping.is_set():
                    row = (self._number, self.acknowledged + 1)
                    cur.execute("INSERT INTO t VALUES (%s, %s)", row)
                    self.acknowledged += 1
        except psycopg2.Error as e:
            self.error = e
        finally:
            self._connection.close()


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again(zenith_env_builder: ZenithEnvBuilder, kills: int) -> None:
    """Sessions do not notice; what was acknowledged is there, once, on a new compute too.

    The process beside Postgres that every commit needs must not be a reason for an outage.
    """
    _, pg = start_with_table(zenith_env_builder)
    postmaster = postmaster_pid(pg)
    writers = [Writer(pg, number) for number in range(4)]
    try:
        for _ in range(kills):
            before = [writer.acknowledged for writer in writers]
            kill_walproposer(pg)
            wait_until(
                lambda before=before: all(  # type: ignore[misc]
                    w.error or w.acknowledged > b + 1 for w, b in zip(writers, before, strict=True)
                ),
                what="writes to go on",
            )
    finally:
        for writer in writers:
            writer.stopping.set()
        for writer in writers:
            writer.join(60)
    assert [writer.error for writer in writers] == [None] * len(writers)
    assert postmaster_pid(pg) == postmaster
    assert compute_log(pg).count("was killed by signal 9") == kills
    expected = [(w, seq) for w in range(4) for seq in range(1, writers[w].acknowledged + 1)]
    assert sorted(pg.safe_psql("SELECT client, seq FROM t")) == expected
    pg.kill()
    pg.start()
    assert sorted(pg.safe_psql("SELECT client, seq FROM t")) == expected


def test_killed_while_a_commit_waits(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Without a quorum the next one waits for its election, and the commit for both.

    A successor that took what its predecessor had sent for durable would acknowledge what no
    majority has.
    """
    env, pg = start_with_table(zenith_env_builder)
    with frozen(*(s.pid() for s in env.safekeepers[1:])):
        statement = BackgroundStatement(pg, "INSERT INTO t VALUES (1, 1)")
        wait_until(lambda: waits_for_quorum(pg, statement.pid), what="the commit to wait")
        kill_walproposer(pg)
        # Dying in the middle of a campaign is no reason to give up either.
        kill_walproposer(pg)
        walproposer_pid(pg)
        assert waits_for_quorum(pg, statement.pid)
        assert statement.outcome is None
    assert statement.wait() == "acknowledged"
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT * FROM t") == [(1, 1)]


def test_killed_and_stopped(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A clean stop right after is clean: asynchronous commits reach the quorum.

    A stop that calls itself clean must have brought everything to safety, also what nobody
    waited for.
    """
    _, pg = start_with_table(zenith_env_builder)
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("SET synchronous_commit = off")
        kill_walproposer(pg)
        cur.execute("INSERT INTO t VALUES (1, 1)")
    pg.stop()
    assert pg.status() == "stopped"
    pg.start()
    assert pg.safe_psql("SELECT * FROM t") == [(1, 1)]


def test_killed_during_a_clean_stop(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The stop ends, and loses nothing that was acknowledged.

    Two things go wrong at once at the end of a life: the stop must neither hang nor lose.
    """
    env, pg = start_with_table(zenith_env_builder)
    pg.safe_psql("INSERT INTO t VALUES (1, 1)")
    supervisor = pg.supervisor_pid()
    proposer = walproposer_pid(pg)
    with frozen(*(s.pid() for s in env.safekeepers[1:])):
        # The shutdown waits for the walproposer, which waits for the quorum.
        os.kill(supervisor, signal.SIGTERM)
        wait_until(
            lambda: "shutting down" in pg.log_text() or pg.status() == "stopping",
            what="the stop to begin",
        )
        os.kill(proposer, signal.SIGKILL)
        wait_until(lambda: not process_exists(supervisor), what="the supervisor to end")
    assert pg.status() == "stopped"
    pg.start()
    assert pg.safe_psql("SELECT * FROM t") == [(1, 1)]


@pytest.mark.slow
def test_dies_too_often(zenith_env_builder: ZenithEnvBuilder) -> None:
    """One that dies whenever it works is not replaced for ever; the compute says why it ends.

    A loop of restarts hides its cause and eats the machine: it has to end with the reason.
    """
    _, pg = start_with_table(zenith_env_builder)
    supervisor = pg.supervisor_pid()
    pg.safe_psql("INSERT INTO t VALUES (1, 1)")

    streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"

    def kill_one() -> bool:
        """At work: after one that never got there it takes ever longer until the next."""
        if not process_exists(supervisor):
            return True
        with contextlib.suppress(OSError, AssertionError, psycopg2.Error):
            if pg.safe_psql(streams) == [(1,)]:
                os.kill(pg.walproposer_pid(), signal.SIGKILL)
        return False

    wait_until(kill_one, timeout=300, what="the compute to give up")
    pg.wait_crashed()
    assert "for the 12th time within 60 s" in compute_log(pg)
    pg.start()
    assert pg.safe_psql("SELECT * FROM t") == [(1, 1)]


def second_compute(env: ZenithEnv) -> Postgres:
    """Another node on the same timeline."""
    return env.postgres.create_start("main", node_name="second")


def assert_fenced(env: ZenithEnv, first: Postgres, term: int) -> None:
    """The first compute has ended, and everybody who asks is told why.

    The newer one leads in `term`, or a later one if it had to campaign again.
    """
    first.wait_crashed()
    found = re.search(r"a newer compute took over this timeline in term (\d+)", compute_log(first))
    assert found is not None and int(found[1]) >= term
    said = found[0]
    assert said in first.log_text()
    listed = env.zenith_cli.raw_cli(["pg", "list"])
    assert f"{first.node_name}: {said}" in listed.stderr


def test_second_compute_fences_the_first(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Its waiting commit never returns, it is stopped, and says which term took over.

    Two writers on one branch are two truths: exactly one may go on, and everybody must learn
    which.
    """
    env, first = start_with_table(zenith_env_builder)
    first.safe_psql("INSERT INTO t VALUES (1, 1)")
    with frozen(walproposer_pid(first)):
        statement = BackgroundStatement(first, "INSERT INTO t VALUES (1, 2)")
        wait_until(lambda: waits_for_quorum(first, statement.pid), what="the commit to wait")
        second = second_compute(env)
        second.safe_psql("INSERT INTO t VALUES (2, 1)")
        # It cannot know yet: reads see what it knew, commits wait.
        assert first.safe_psql("SELECT * FROM t") == [(1, 1)]
        assert statement.outcome is None
    assert statement.wait().startswith("failed")
    assert_fenced(env, first, 2)
    second.safe_psql("INSERT INTO t VALUES (2, 2)")
    assert second.safe_psql("SELECT * FROM t ORDER BY 1, 2") == [(1, 1), (2, 1), (2, 2)]
    second.kill()
    second.start()
    assert second.safe_psql("SELECT * FROM t ORDER BY 1, 2") == [(1, 1), (2, 1), (2, 2)]


def test_machine_hangs_and_wakes_up(zenith_env_builder: ZenithEnvBuilder) -> None:
    """All processes of the first compute hang while the second starts: nothing comes after it.

    A virtual machine that was paused knows nothing of the time that passed: what it does on
    waking must count for nothing.
    """
    env, first = start_with_table(zenith_env_builder)
    first.safe_psql("INSERT INTO t VALUES (1, 1)")
    connection = first.connect()
    backend = connection.info.backend_pid
    pids = [first.supervisor_pid(), walproposer_pid(first), postmaster_pid(first), backend]
    pids += [pid for (pid,) in first.safe_psql("SELECT pid FROM pg_stat_replication")]
    done: list[str] = []

    def write() -> None:
        with contextlib.suppress(psycopg2.Error), connection.cursor() as cur:
            cur.execute("INSERT INTO t VALUES (1, 2)")
            done.append("acknowledged")

    with frozen(*pids):
        writer = threading.Thread(target=write)
        writer.start()
        second = second_compute(env)
        second.safe_psql("INSERT INTO t VALUES (2, 1)")
    writer.join(60)
    connection.close()
    assert not done
    assert_fenced(env, first, 2)
    assert second.safe_psql("SELECT * FROM t ORDER BY 1, 2") == [(1, 1), (2, 1)]


def test_another_led_meanwhile(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A walproposer that is started anew yields to the compute that led in between.

    A replacement that took the lead back would cut off the compute that users have been moved
    to.
    """
    env, first = start_with_table(zenith_env_builder)
    first.safe_psql("INSERT INTO t VALUES (1, 1)")
    supervisor = first.supervisor_pid()
    proposer = walproposer_pid(first)
    with frozen(supervisor):
        os.kill(proposer, signal.SIGKILL)
        statement = BackgroundStatement(first, "INSERT INTO t VALUES (1, 2)")
        wait_until(lambda: waits_for_quorum(first, statement.pid), what="the commit to wait")
        second = second_compute(env)
        second.safe_psql("INSERT INTO t VALUES (2, 1)")
    assert statement.wait().startswith("failed")
    assert_fenced(env, first, 2)
    # The second was not disturbed: it still leads, in the same term.
    second.safe_psql("INSERT INTO t VALUES (2, 2)")
    assert "fenced" not in compute_log(second)
    assert second.safe_psql("SELECT * FROM t ORDER BY 1, 2") == [(1, 1), (2, 1), (2, 2)]
