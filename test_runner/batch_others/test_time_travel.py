"""Branches and read-only nodes at a time instead of an LSN."""

from __future__ import annotations

import re
import uuid
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone

import psycopg2
import pytest
from fixtures.page_verifier import wait_for_shutdown_checkpoint
from fixtures.postgres import Postgres
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnvBuilder

TWO_PHASE = ["max_prepared_transactions=5"]
ROWS = "SELECT array_agg(i ORDER BY i) FROM t"


def moment(pg: Postgres) -> datetime:
    """A time after all commits so far and before all later ones, by the server's clock."""
    with closing(pg.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (now,) = cursor.fetchone()

        def passed() -> bool:
            cursor.execute("SELECT clock_timestamp() > %s", (now,))
            return bool(cursor.fetchone()[0])

        wait_until(passed, what="the server's clock to move on")
    assert isinstance(now, datetime)
    return now.astimezone(UTC)


def rows(pg: Postgres) -> list[int]:
    ((found,),) = pg.safe_psql(ROWS)
    return list(found)


@pytest.mark.parametrize("num_safekeepers", [0, 1])
def test_branch_and_node_at_a_time(
    zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int
) -> None:
    """They hold exactly what was committed by then, aborted and prepared transactions included.

    People know when the accident happened, not at which LSN: one commit too many and the
    accident is in, one too few and work is lost.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main", config_lines=TWO_PHASE)
    main.safe_psql("CREATE TABLE t (i int)")
    main.safe_psql("INSERT INTO t VALUES (1)")
    first = moment(main)
    main.safe_psql("INSERT INTO t VALUES (2)")
    main.safe_psql("BEGIN; INSERT INTO t VALUES (-1); ROLLBACK")
    main.safe_psql("BEGIN; INSERT INTO t VALUES (4); PREPARE TRANSACTION 'four'")
    second = moment(main)
    main.safe_psql("INSERT INTO t VALUES (3)")
    third = moment(main)
    main.safe_psql("COMMIT PREPARED 'four'")
    last = moment(main)

    env.zenith_cli.create_branch("first", "main", at=str(first))
    branch = env.postgres.create_start("first")
    assert rows(branch) == [1]
    branch.safe_psql("INSERT INTO t VALUES (10)")
    assert rows(branch) == [1, 10]

    # Another zone, a `T`; the prepared transaction waits there for its end.
    india = second.astimezone(timezone(timedelta(hours=5, minutes=30)))
    env.zenith_cli.create_branch("second", "main", at=india.isoformat())
    branch = env.postgres.create_start("second", config_lines=TWO_PHASE)
    assert rows(branch) == [1, 2]
    branch.safe_psql("COMMIT PREPARED 'four'")
    assert rows(branch) == [1, 2, 4]

    node = env.postgres.create_start("main", node_name="third", at=str(third))
    assert rows(node) == [1, 2, 3]
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        node.safe_psql("INSERT INTO t VALUES (0)")
    env.zenith_cli.create_branch("last", "main", at=str(last))
    assert rows(env.postgres.create_start("last", config_lines=TWO_PHASE)) == [1, 2, 3, 4]
    assert rows(main) == [1, 2, 3, 4]


def test_lookup(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The answers of the pageserver, on a branch too; they are the same after its restart.

    The answer decides where a rescue begins: it must not change with a restart, and say so when
    a time is outside of what is known.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    client = env.pageserver.http_client()
    timelines = {name: uuid.UUID(hex) for name, hex in env.zenith_cli.list_timelines()}

    def ask(branch: str, time: datetime) -> dict[str, str | None]:
        return client.timeline_lsn_by_timestamp(env.initial_tenant, timelines[branch], time)

    assert ask("main", datetime.now(UTC))["kind"] == "nodata"
    main = env.postgres.create_start("main")
    lsns, times = [], []
    for step in range(3):
        main.safe_psql(f"CREATE TABLE t{step} ()")
        lsns.append(main.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0])
        times.append(moment(main))
    timelines["child"] = env.zenith_cli.create_branch("child", "main", at=str(times[1]))
    child = env.postgres.create_start("child")
    child.safe_psql("CREATE TABLE c ()")
    times.append(moment(child))
    for node, name in ((main, "main"), (child, "child")):
        node.stop()
        # The newest state moves on with all WAL that arrives.
        wait_for_shutdown_checkpoint(node, timelines[name])

    def answers() -> list[dict[str, str | None]]:
        asked = [ask(branch, time) for branch in ("main", "child") for time in times]
        return [{k: v for k, v in answer.items() if k != "received_lsn"} for answer in asked]

    found = answers()
    kinds = [answer["kind"] for answer in found]
    assert kinds == [*["present"] * 2, *["future"] * 2, "past", *["present"] * 2, "future"]
    for step in range(2):
        lsn = lsn_from_hex(str(found[step]["lsn"]))
        assert lsn_from_hex(lsns[step]) <= lsn < lsn_from_hex(lsns[step + 1])
        assert datetime.fromisoformat(str(found[step]["commit_time"])) <= times[step]
    past = found[4]
    assert past["ancestor_timeline_id"] == timelines["main"].hex
    # The oldest time that the branch has is the newest commit it took over.
    assert past["commit_time"] == found[1]["commit_time"]
    assert [answer["ancestor_timeline_id"] for answer in found if answer != past] == [None] * 7

    env.pageserver.stop()
    env.pageserver.start()
    assert answers() == found


def test_commits_that_the_pageserver_has_not_got_yet(
    zenith_env_builder: ZenithEnvBuilder,
) -> None:
    """They are waited for, not left out; and if they do not come, it is said.

    A branch as of now, minutes after the commits, must have them, although their WAL is still
    under way.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    insert = "INSERT INTO t SELECT generate_series(1, 50000)"
    main.safe_psql(insert)
    moment(main)  # what comes reads no block that is not here already
    env.pageserver.kill()
    for _ in range(3):
        main.safe_psql(insert)  # all in all less than commits may run ahead
    time = moment(main)
    env.pageserver.start()
    env.zenith_cli.create_branch("late", "main", at=str(time))
    assert env.postgres.create_start("late").safe_psql("SELECT count(*) FROM t") == [(200_000,)]

    for safekeeper in env.safekeepers:
        safekeeper.stop(immediate=True)
    with pytest.raises(Exception, match="no safekeeper answers"):
        env.zenith_cli.create_branch("refused", "main", at=str(time))


def test_times_that_lead_nowhere(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Each is refused with the reason and the way out, and nothing is left behind.

    Times are typed in a hurry: the nearest possible answer to a wrong one would be the wrong
    database.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()

    def refused(at: str, *more: str, ancestor: str = "main") -> str:
        command = ["timeline", "branch", "--branch-name", "refused", "--at", at, *more]
        command += ["--ancestor-branch-name", ancestor]
        done = env.zenith_cli.raw_cli(command, check_return_code=False)
        assert done.returncode != 0
        assert done.stdout == ""
        return done.stderr

    now = str(datetime.now(UTC))
    assert "branch 'main' has no commits yet" in refused(now)
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    time = moment(main)
    main.safe_psql("INSERT INTO t VALUES (1)")
    later = moment(main)
    done = env.zenith_cli.raw_cli(
        ["timeline", "branch", "--branch-name", "child", "--at", str(later)]
    )
    said = re.search(r"is at Lsn (\S+), its newest commit of (.+)$", done.stdout, re.MULTILINE)
    assert said is not None
    assert f" at Lsn {said[1]} " in done.stdout.splitlines()[-1]
    taken_over = said[2]
    assert time < datetime.fromisoformat(taken_over) < later

    assert "'noon' is no time: expected one like" in refused("noon")
    assert "exclude each other" in refused(now, "--ancestor-start-lsn", "0/28")
    assert "is in the future: it is " in refused("2999-12-31 00:00:00+00")
    before = refused("2000-01-01 00:00:00+00")
    oldest = re.search(r"before the history of branch 'main': the oldest time .* is (.+)$", before)
    assert oldest is not None
    env.zenith_cli.create_branch("oldest", "main", at=oldest[1].strip())
    before = refused(str(time), ancestor="child")
    assert f"the oldest time that can be had of it is {taken_over}" in before
    assert "in the history of its ancestor, branch 'main'" in before
    with pytest.raises(Exception, match="is in the future"):
        env.zenith_cli.pg_create("main", node_name="refused", at="2999-12-31")
    names = {name for name, _ in env.zenith_cli.list_timelines()}
    assert names == {"main", "child", "oldest"}
