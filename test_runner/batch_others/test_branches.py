"""Branches and time travel: every state there ever was, each with a Postgres of its own."""

from __future__ import annotations

import itertools

import psycopg2
import pytest
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex, lsn_to_hex, wait_until
from fixtures.zenith_env import ZenithEnvBuilder


@pytest.mark.parametrize("num_safekeepers", [0, 1])
def test_branches(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """At the newest and at past LSNs, a branch of a branch of a branch; writers do not meet.

    It is what Zenith is for: any state as a database of its own, at no cost, and nothing done
    in it shows in another.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int, origin text)")
    lsns = []
    for step in range(5):
        main.safe_psql(f"INSERT INTO t SELECT {step}, 'main' FROM generate_series(1, 1000)")
        lsns.append(main.safe_psql(FLUSH_LSN)[0][0])
    main.safe_psql("UPDATE t SET origin = 'changed'")

    env.zenith_cli.create_branch("past", "main", ancestor_start_lsn=lsns[1])
    # Without an LSN a branch begins with what the pageserver has by then.
    Branch.of(main).wait_for(main)
    env.zenith_cli.create_branch("newest", "main")
    past, newest = env.postgres.create_start("past"), env.postgres.create_start("newest")
    assert past.safe_psql("SELECT count(*), max(i), min(origin) FROM t") == [(2000, 1, "main")]
    assert newest.safe_psql("SELECT count(*), max(i), min(origin) FROM t") == [(5000, 4, "changed")]

    past.safe_psql("INSERT INTO t VALUES (100, 'past')")
    newest.safe_psql("DELETE FROM t WHERE i < 3")
    main.safe_psql("INSERT INTO t VALUES (200, 'main')")
    assert past.safe_psql("SELECT count(*), max(i) FROM t") == [(2001, 100)]
    assert newest.safe_psql("SELECT count(*), max(i) FROM t") == [(2000, 4)]
    assert main.safe_psql("SELECT count(*), max(i) FROM t") == [(5001, 200)]

    Branch.of(past).wait_for(past)
    parent = "past"
    for depth in range(3):
        child = f"depth{depth}"
        env.zenith_cli.create_branch(child, parent)
        pg = env.postgres.create_start(child)
        assert pg.safe_psql("SELECT count(*) FROM t") == [(2001 + depth,)]
        pg.safe_psql(f"INSERT INTO t VALUES ({1000 + depth}, '{child}')")
        pg.stop()
        pg.start()
        assert pg.safe_psql("SELECT count(*) FROM t") == [(2002 + depth,)]
        parent = child
    assert past.safe_psql("SELECT count(*), max(i) FROM t") == [(2001, 100)]
    names = {name for name, _ in env.zenith_cli.list_timelines()}
    assert names == {"main", "past", "newest", "depth0", "depth1", "depth2"}


def test_newest_state_has_what_was_acknowledged(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A branch has the commits before it also if the pageserver is behind, or it is said.

    Who branches to look at what has just been done must not get what was before.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    insert = "INSERT INTO t SELECT generate_series(1, 10000)"
    # The second time it needs no pages that the compute does not have.
    main.safe_psql(insert)
    env.pageserver.kill()
    main.safe_psql(insert)
    env.pageserver.start()
    names = (f"newest{number}" for number in itertools.count())

    def with_everything() -> str | None:
        """A branch; None where it is said that something may be missing, as on a busy machine."""
        name = next(names)
        branched = env.zenith_cli.raw_cli(["timeline", "branch", "--branch-name", name])
        return None if "the newest commits may be missing" in branched.stderr else name

    newest = wait_until(with_everything, what="a branch with all that was acknowledged")
    assert newest is not None
    assert env.postgres.create_start(newest).safe_psql("SELECT count(*) FROM t") == [(20000,)]

    for safekeeper in env.safekeepers[:2]:
        safekeeper.stop()
    branched = env.zenith_cli.raw_cli(["timeline", "branch", "--branch-name", "unsure"])
    assert "the newest commits may be missing" in branched.stderr
    assert "only 1 of the 3 safekeepers answer" in branched.stderr


def test_branch_at_segment_boundary(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A branch at 0/3000000 and the like starts on a page header, not on a record.

    Users pick LSNs, not record boundaries: WAL that begins at a page header must not end in a
    branch that cannot start or be written to.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    main.safe_psql("INSERT INTO t SELECT generate_series(1, 400000)")
    end = lsn_from_hex(main.safe_psql(FLUSH_LSN)[0][0])
    boundary = end - end % (16 << 20)
    assert boundary > 16 << 20
    for name, lsn in (("segment", boundary), ("page", boundary + 8192), ("inside", boundary + 96)):
        env.zenith_cli.create_branch(name, "main", ancestor_start_lsn=lsn_to_hex(lsn))
        pg = env.postgres.create_start(name)
        # The transaction that crosses the boundary had not committed there.
        assert pg.safe_psql("SELECT count(*) FROM t") == [(0,)]
        pg.safe_psql("INSERT INTO t VALUES (1)")
        pg.kill()
        pg.start()
        assert pg.safe_psql("SELECT count(*) FROM t") == [(1,)]
        pg.stop()


def test_read_only_nodes(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Nodes at an LSN see exactly that state, refuse writes, and several run at once.

    Who looks into the past for what was lost must find just that moment, however often and from
    wherever it is looked at.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    main.safe_psql("CREATE TABLE dropped AS SELECT generate_series(1, 20000) AS i")
    lsns = []
    for step in range(3):
        main.safe_psql(f"INSERT INTO t SELECT {step} FROM generate_series(1, 500)")
        lsns.append(main.safe_psql(FLUSH_LSN)[0][0])
    main.safe_psql("TRUNCATE t; DROP TABLE dropped")
    nodes = [
        env.postgres.create_start("main", node_name=f"at{step}", lsn=lsn)
        for step, lsn in enumerate(lsns)
    ]
    for step, node in enumerate(nodes):
        assert node.safe_psql("SELECT count(*), max(i) FROM t") == [((step + 1) * 500, step)]
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            node.safe_psql("INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg2.Error, match="read-only"):
            node.safe_psql("SELECT pg_promote()")
    main.safe_psql("INSERT INTO t VALUES (7)")
    for step, node in enumerate(nodes):
        assert node.safe_psql("SELECT count(*) FROM t") == [((step + 1) * 500,)]
        # Blocks that this node has never read, of a table that is long gone on the branch.
        assert node.safe_psql("SELECT count(*), sum(i) FROM dropped") == [(20000, 200010000)]
    assert main.safe_psql("SELECT count(*) FROM t") == [(1,)]


def test_bad_lsns(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What cannot be branched is refused with the reason, and nothing is left behind.

    An LSN is easily mistyped: a branch at some other point than the one meant would be worse
    than none.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = "wait_lsn_timeout='1 s'"
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t (i int)")
    lsn = Branch.of(main).wait_for(main)
    env.zenith_cli.create_branch("child", "main", ancestor_start_lsn=lsn)

    def branch(ancestor: str, at: str) -> None:
        env.zenith_cli.create_branch("refused", ancestor, ancestor_start_lsn=at)

    with pytest.raises(Exception, match="Failed to parse ancestor start Lsn"):
        branch("main", "0x16B")
    with pytest.raises(Exception, match="invalid branch start lsn"):
        branch("main", "0/28")
    with pytest.raises(Exception, match="less than timeline ancestor lsn"):
        branch("child", "0/28")
    with pytest.raises(Exception, match="Timed out while waiting for WAL record at LSN F/0"):
        branch("main", "F/0")
    with pytest.raises(Exception, match="Found no timeline id for branch name 'nowhere'"):
        branch("nowhere", lsn)
    with pytest.raises(Exception, match="already mapped to timeline"):
        env.zenith_cli.create_branch("child", "main")
    assert {name for name, _ in env.zenith_cli.list_timelines()} == {"main", "child"}
    assert main.safe_psql("SELECT count(*) FROM t") == [(0,)]
