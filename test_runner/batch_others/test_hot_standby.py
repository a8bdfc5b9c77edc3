"""Hot standbys: they follow their branch, whoever is killed, and see exactly what is committed."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from fixtures.oracle import dump_all
from fixtures.pg_protocol import PgBin
from fixtures.postgres import Postgres
from fixtures.storage import Branch
from fixtures.utils import child_pids, freeze, frozen, thaw, wait_until
from fixtures.zenith_env import Safekeeper, ZenithEnv, ZenithEnvBuilder

SETTINGS = ["max_prepared_transactions = 5"]


def standby_of(env: ZenithEnv, branch: str, name: str, *lines: str) -> Postgres:
    """A new, running hot standby of a branch."""
    return env.postgres.create_start(branch, node_name=name, hot_standby=True, config_lines=lines)


def catch_up(standby: Postgres, primary: Postgres) -> None:
    """Wait until the standby has replayed what the primary has committed."""
    lsn = primary.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    wait_until(
        lambda: standby.safe_psql(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'")[0][0],
        what=f"{standby.node_name} to replay up to {lsn}",
    )


def same_dump(standby: Postgres, primary: Postgres, pg_bin: PgBin) -> None:
    """Both hold the same; nothing may be writing."""
    catch_up(standby, primary)
    assert dump_all(standby, pg_bin) == dump_all(primary, pg_bin)


def followed_safekeeper(standby: Postgres) -> Safekeeper:
    """The safekeeper that the standby gets its WAL from."""
    ports = "SELECT sender_port FROM pg_stat_wal_receiver WHERE sender_port IS NOT NULL"
    ((port,),) = wait_until(lambda: standby.safe_psql(ports), what="a safekeeper to be followed")
    return next(s for s in standby.env.safekeepers if s.port.pg == port)


class Writer:
    """Commits numbers one after another, on a connection that is made again when it breaks."""

    def __init__(self, primary: Postgres) -> None:
        self.primary = primary
        self.acknowledged = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self.primary.safe_psql("CREATE TABLE IF NOT EXISTS written (n int PRIMARY KEY)")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_more(self) -> None:
        """Wait until something is acknowledged that was not yet asked for before the call."""
        seen = self.acknowledged
        wait_until(lambda: self.acknowledged > seen + 1, what="commits to go on")

    def _run(self) -> None:
        n = 0
        while not self._stop.is_set():
            try:
                connection = self.primary.connect()
                with connection.cursor() as cursor:
                    while not self._stop.is_set():
                        n += 1
                        cursor.execute(f"INSERT INTO written VALUES ({n})")
                        self.acknowledged = n
                connection.close()
            except psycopg2.Error:
                self._stop.wait(0.05)


def check_written(standby: Postgres, writer: Writer) -> None:
    """The standby comes to see what was acknowledged before the call."""
    acknowledged = writer.acknowledged
    wait_until(
        lambda: standby.safe_psql(f"SELECT count(*) FROM written WHERE n = {acknowledged}")[0][0],
        what=f"row {acknowledged} to show on {standby.node_name}",
    )


def test_joins_running_primary(zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin) -> None:
    """Transactions that are open or prepared when a standby begins end on it as they should.

    A standby that begins in the middle of transactions must neither show what was not committed
    nor miss what is.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main", config_lines=SETTINGS)
    for name in ("t", "victim"):
        main.safe_psql(f"CREATE TABLE {name} AS SELECT i FROM generate_series(1, 1000) i")

    def session(*commands: str) -> Any:
        connection = main.connect(autocommit=False)
        with connection.cursor() as cursor:
            for command in commands:
                cursor.execute(command)
        return connection

    commits = session(
        "INSERT INTO t VALUES (2001)",
        "SAVEPOINT a",
        "INSERT INTO t VALUES (2002)",
        "SAVEPOINT b",
        "INSERT INTO t VALUES (2003)",
        "ROLLBACK TO b",
    )
    aborts = session("DELETE FROM t WHERE i > 500", "SAVEPOINT a", "INSERT INTO t VALUES (3001)")
    locks = session("TRUNCATE victim")
    prepared = session("UPDATE t SET i = -1 WHERE i = 1", "PREPARE TRANSACTION 'p'")

    opened = main.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    # Its commit is behind that, and has another snapshot written.
    main.safe_psql("CREATE EXTENSION pg_walinspect")
    marks = (
        f"SELECT count(*) >= 2 FROM pg_get_wal_records_info_till_end_of_wal('{opened}') "
        "WHERE resource_manager = 'XLOG' AND record_type = 'NOOP'"
    )
    wait_until(lambda: main.safe_psql(marks)[0][0], what="a snapshot to be written")
    # From here on nothing is written: no later snapshot makes up for what an earlier one lacks.
    standby = standby_of(env, "main", "replica")
    assert standby.safe_psql("SELECT count(*), min(i), max(i) FROM t") == [(1000, 1, 1000)]
    with standby.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            cursor.execute("SELECT count(*) FROM victim")
    # More subtransactions than a snapshot of the running ones has room for.
    many = session(
        "DO $$ BEGIN FOR i IN 1..100 LOOP BEGIN INSERT INTO t VALUES (4000 + i); "
        "EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$"
    )
    late = standby_of(env, "main", "late")
    with Writer(main) as writer:
        writer.wait_for_more()
        check_written(standby, writer)
        many.commit()
        commits.commit()
        aborts.rollback()
        for node in (standby, late):
            catch_up(node, main)
        new = "SELECT count(*), count(*) FILTER (WHERE i > 4000) FROM t WHERE i > 1000"
        assert standby.safe_psql(new) == late.safe_psql(new) == [(102, 100)]
        assert standby.safe_psql("SELECT count(*) FROM t WHERE i IN (2003, 3001)") == [(0,)]

        assert standby.safe_psql("SELECT count(*) FROM t WHERE i IN (-1, 1)") == [(1,)]
        assert standby.safe_psql("SELECT count(*) FROM t WHERE i = 1") == [(1,)]
        main.safe_psql("COMMIT PREPARED 'p'")
        locks.commit()
        catch_up(standby, main)
        assert standby.safe_psql("SELECT count(*) FROM t WHERE i = -1") == [(1,)]
        assert standby.safe_psql("SELECT count(*) FROM victim") == [(0,)]
    for connection in (commits, aborts, many, locks, prepared):
        connection.close()
    same_dump(standby, main, pg_bin)


def snapshot_writer(primary: Postgres) -> int:
    """Process of a primary that writes the snapshots which standbys begin at, or LookupError."""
    for pid in child_pids(primary.postmaster_pid()):
        with contextlib.suppress(OSError):
            if b"free space map logger" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise LookupError("the process that writes snapshots")


def test_begins_where_a_commit_waits(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What was committed shows on a standby that begins where the commit still had to wait.

    The snapshot that it begins with has the transaction as running, behind its commit record. Where
    nothing else is committed, the row would be missing for good.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    main.safe_psql("CREATE EXTENSION pg_walinspect")
    before = main.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    writer = wait_until(lambda: snapshot_writer(main), what="its background processes")
    whole = (
        f"WITH wal AS (SELECT * FROM pg_get_wal_records_info_till_end_of_wal('{before}'))"
        " SELECT count(*) > 0 FROM wal s JOIN wal c ON c.record_type = 'COMMIT'"
        " AND s.description LIKE '% xacts: ' || c.xid || '%' AND s.start_lsn > c.start_lsn"
        " JOIN wal m ON m.record_type = 'NOOP' AND m.start_lsn > s.start_lsn"
    )
    commit = threading.Thread(target=main.safe_psql, args=("INSERT INTO t VALUES (1)",))
    with frozen(env.safekeepers[0].pid()):
        commit.start()
        wait_until(lambda: main.safe_psql(whole)[0][0], what="a snapshot behind the commit record")
        # There are no snapshots any more.
        freeze(writer)
    try:
        commit.join()
        Branch.of(main).wait_for(main)
        standby = standby_of(env, "main", "replica")
        assert standby.safe_psql("SELECT i FROM t") == [(1,)]
    finally:
        thaw(writer)


# The large table takes the WAL into the next segments, where a standby's first checkpoint lies.
CHANGES = """
CREATE TABLE large AS SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 40000) i;
DROP TABLE large;
CREATE TABLE made (k int PRIMARY KEY, v text);
INSERT INTO made SELECT i, repeat('x', i % 500) FROM generate_series(1, 3000) i;
ALTER TABLE changed ADD COLUMN c text DEFAULT 'new';
UPDATE changed SET c = 'newer' WHERE k % 3 = 0;
CREATE INDEX ON changed (c, k);
DELETE FROM emptied WHERE k > 100;
VACUUM emptied;
INSERT INTO emptied SELECT i, 'again' FROM generate_series(5000, 9000) i;
TRUNCATE truncated;
INSERT INTO truncated SELECT i, 'after' FROM generate_series(1, 100) i;
VACUUM FULL rewritten;
DROP TABLE dropped;
CREATE MATERIALIZED VIEW seen AS SELECT count(*) FROM cold;
UPDATE cold SET v = 'touched' WHERE k % 7 = 0;
VACUUM (FREEZE) changed;
CREATE SEQUENCE numbers;
SELECT setval('numbers', 50)
"""


def test_follows_every_change(zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin) -> None:
    """What the standby reads for the first time after everything has changed is right, too.

    Pages it never read come from storage at the LSN it began at: one that changed since and
    were taken from there would be old.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    for name in ("cold", "changed", "emptied", "truncated", "rewritten", "dropped"):
        main.safe_psql(
            f"CREATE TABLE {name} AS SELECT i AS k, md5(i::text) AS v "
            "FROM generate_series(1, 4000) i"
        )
        main.safe_psql(f"CREATE INDEX ON {name} (k)")
    main.stop()
    # Nothing of the old state is in the standbys' files, and no read-write node runs.
    main.start()
    main.safe_psql("VACUUM cold")
    standbys = [standby_of(env, "main", name) for name in ("one", "two")]
    for command in CHANGES.split(";\n"):
        main.safe_psql(command)
    main.safe_psql("CREATE DATABASE other")
    main.safe_psql("CREATE TABLE there AS SELECT 1 AS one", dbname="other")
    main.safe_psql("CREATE DATABASE gone STRATEGY file_copy")
    main.safe_psql("DROP DATABASE gone")
    for standby in standbys:
        same_dump(standby, main, pg_bin)
    listed = env.zenith_cli.raw_cli(["pg", "list"]).stdout
    assert listed.count("running (hot standby)") == 2
    one, two = standbys
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        one.safe_psql("CREATE TABLE refused ()")
    with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState):
        one.safe_psql("SELECT pg_promote()")
    one.stop()
    assert one.status() == "stopped"
    main.safe_psql("INSERT INTO cold VALUES (0, 'while it was stopped')")
    one.start()
    assert one.safe_psql("SELECT v FROM cold WHERE k = 0") == [("while it was stopped",)]
    main.stop()
    # A standby starts, and answers, while nobody writes.
    two.stop()
    two.start()
    assert two.safe_psql("SELECT v FROM cold WHERE k = 0") == [("while it was stopped",)]
    main.start()
    main.safe_psql("DELETE FROM cold WHERE k = 0")
    for standby in standbys:
        same_dump(standby, main, pg_bin)


def test_survives_kills(zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin) -> None:
    """The primary, each safekeeper in turn and the standby are killed under load; one hangs.

    Reads are moved to standbys for the sake of availability: none may hang on the one process
    that died.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    with Writer(main) as writer:
        standby = standby_of(env, "main", "replica")
        main.kill()
        main.start()
        writer.wait_for_more()
        check_written(standby, writer)
        for safekeeper in env.safekeepers:
            safekeeper.stop(immediate=True)
            writer.wait_for_more()
            check_written(standby, writer)
            safekeeper.start()
        with frozen(followed_safekeeper(standby).pid()):
            writer.wait_for_more()
            check_written(standby, writer)
        standby.kill()
        standby.start()
        check_written(standby, writer)
    same_dump(standby, main, pg_bin)
    assert standby.status() == "running"


def test_what_both_must_know(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Vacuum spares what a standby reads, until that is over; settings that must match do.

    A report that runs for an hour must not be cancelled because of a vacuum elsewhere; and
    bloat must end when the report does.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) i")
    standby = standby_of(env, "main", "replica", "max_standby_streaming_delay = 100ms")

    def horizon() -> int | None:
        held = main.safe_psql("SELECT xmin::text::int FROM pg_replication_slots")[0][0]
        return None if held is None else int(held)

    reader = standby.connect(autocommit=False)
    with reader.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT count(*), txid_snapshot_xmin(txid_current_snapshot()) FROM t")
        count, oldest = cursor.fetchone()
        wait_until(lambda: horizon() == oldest, what="the standby's xmin to reach the primary")
        main.safe_psql("DELETE FROM t")
        main.safe_psql("VACUUM t")
        catch_up(standby, main)
        cursor.execute("SELECT count(*) FROM t")
        assert cursor.fetchone()[0] == count == 1000
    reader.rollback()
    wait_until(lambda: (horizon() or 0) > oldest, what="the xmin to move on")
    reader.close()
    standby.stop()
    wait_until(lambda: horizon() is None, what="the xmin to be given up")
    standby.start()

    # It cannot go on with its settings: it ends, and takes the new ones over.
    main.stop()
    main.config(["max_connections = 150"]).start()
    standby.wait_crashed()
    reason = (standby.state_dir() / "state.json").read_text()
    assert "max_connections = 150, this hot standby 100" in reason
    standby.start()
    main.safe_psql("CREATE TABLE later AS SELECT 1 AS i")
    catch_up(standby, main)
    assert standby.safe_psql("SELECT i FROM later") == [(1,)]


def test_refusals(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What cannot be is refused in one clear line.

    A wrong option has to be told apart from a defect, by what to do instead.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    lsn = main.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]

    def refused(*command: str) -> str:
        done = env.zenith_cli.raw_cli(["pg", *command], check_return_code=False)
        assert done.returncode != 0
        return done.stderr

    both = refused("create", "x", "--hot-standby", "--lsn", lsn)
    assert "--hot-standby follows the branch" in both
    env.zenith_cli.create_branch("untouched", "main")
    port = str(env.port_distributor.get_port())
    new = ["start", "x", "--hot-standby", "--branch-name", "untouched", "--port", port]
    nothing = refused(*new)
    assert "start a read-write node of the branch first" in nothing
    toucher = env.postgres.create("untouched").start()
    toucher.stop()
    env.zenith_cli.raw_cli(["pg", "start", "x"])
    env.zenith_cli.raw_cli(["pg", "stop", "x"])


def test_needs_safekeepers(zenith_simple_env: ZenithEnv) -> None:
    """Without safekeepers there is nobody to follow.

    An environment for trying things out has none: its user must learn at once why this does not
    work.
    """
    command = ["pg", "create", "x", "--hot-standby"]
    done = zenith_simple_env.zenith_cli.raw_cli(command, check_return_code=False)
    assert done.returncode != 0
    assert "gets its WAL from safekeepers" in done.stderr
