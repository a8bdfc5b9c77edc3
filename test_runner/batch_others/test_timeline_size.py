"""The logical size of timelines: as it is kept, as it is counted anew, and as Postgres sees it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import pytest
from fixtures.postgres import Postgres
from fixtures.storage import Branch
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

KB = 1 << 10
MB = 1 << 20


@dataclass
class Sizes:
    """The sizes of a node's timeline at its newest state."""

    kept: int
    counted: int
    databases: int

    @classmethod
    def of(cls, pg: Postgres) -> Sizes:
        """After all that the node has written has arrived. Nothing may be writing."""
        branch = Branch.of(pg)
        ((databases,),) = pg.safe_psql("SELECT sum(pg_database_size(oid))::bigint FROM pg_database")
        branch.wait_for(pg)
        return cls(*reported(pg.env, branch.timeline), databases=int(databases))


def reported(env: ZenithEnv, timeline: uuid.UUID) -> tuple[int, int]:
    """What the API says of a timeline: as it is kept, and counted anew."""
    local = env.pageserver.http_client().timeline_detail(env.initial_tenant, timeline)["local"]
    return local["current_logical_size"], local["current_logical_size_non_incremental"]


@pytest.mark.parametrize("num_safekeepers", [0, 1])
def test_timeline_size(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """Through every way to grow and to shrink, on a branch and after crashes, all sizes agree.

    The kept size is what users are billed and limited by. It is only ever added to and taken from:
    each change that it misses stays in it for good.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    main = uuid.UUID(dict(env.zenith_cli.list_timelines())["main"])
    first, counted = reported(env, main)
    assert first == counted > MB

    pg = env.postgres.create_start("main", config_lines=["autovacuum=off"])
    offset: list[int] = []

    def check(pg: Postgres, before: int, low: int, high: int) -> int:
        """The size after a step that must have changed it by an amount within bounds."""
        sizes = Sizes.of(pg)
        assert sizes.kept == sizes.counted
        assert low <= sizes.kept - before <= high, sizes
        # Postgres counts small files, too, and not what databases share: that hardly changes.
        offset.append(sizes.kept - sizes.databases)
        assert abs(offset[-1] - offset[0]) < 600 * KB, offset
        return sizes.kept

    size = check(pg, first, 0, MB)
    pg.safe_psql("CREATE TABLE foo (i int, t text)")
    pg.safe_psql("INSERT INTO foo SELECT g, repeat('x', 1000) FROM generate_series(1, 7000) g")
    size = check(pg, size, 7 * MB, 9 * MB)
    pg.safe_psql("CREATE INDEX ON foo (i, t)")
    pg.safe_psql("BEGIN; CREATE TABLE gone AS SELECT * FROM foo; ROLLBACK")
    pg.safe_psql("CREATE TABLE copied AS SELECT * FROM foo")
    size = check(pg, size, 7 * MB, 11 * MB)
    pg.safe_psql("CREATE DATABASE other")
    size = check(pg, size, 6 * MB, 9 * MB)

    env.zenith_cli.create_branch("branch", "main")
    pg.safe_psql("TRUNCATE foo")
    size = check(pg, size, -11 * MB, -7 * MB)
    pg.safe_psql("DELETE FROM copied WHERE i > 3500")
    # FREEZE waits for each page; without, those that are just being written out are passed over,
    # and one of them at the end keeps the table long.
    pg.safe_psql("VACUUM FREEZE copied")
    size = check(pg, size, -5 * MB, -3 * MB)
    pg.safe_psql("DROP TABLE copied")
    pg.safe_psql("DROP DATABASE other")
    size = check(pg, size, -13 * MB, -9 * MB)
    assert abs(size - first) < MB

    # The branch has kept everything, and goes its own way.
    branch = env.postgres.create_start("branch", config_lines=["autovacuum=off"])
    before = Sizes.of(branch).kept
    assert before > size + 20 * MB
    branch.safe_psql("DROP TABLE copied")
    before = check(branch, before, -9 * MB, -7 * MB)
    env.pageserver.kill()
    env.pageserver.start()
    check(branch, before, -KB, KB)
    check(pg, size, -KB, KB)


def test_size_while_it_changes(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Asked while WAL arrives and branches are made, each answer is of one moment.

    A monitor asks at any time; sizes that fit nothing there ever was would send it off in alarm.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum=off"])
    branch = Branch.of(pg)
    pg.safe_psql("CREATE TABLE foo (t text)")
    start = Sizes.of(pg).kept
    seen = [start]
    # Sizes of the branches just made, before anybody has used them.
    made: list[int] = []
    for number in range(6):
        pg.safe_psql("INSERT INTO foo SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
        seen.append(reported(env, branch.timeline)[0])
        created = env.zenith_cli.create_branch(f"b{number}", "main")
        kept, counted = reported(env, created)
        assert kept == counted
        made.append(kept)
    assert seen == sorted(seen)
    assert made == sorted(made)
    end = Sizes.of(pg)
    assert end.kept == end.counted > start + 6 * MB
    assert max(*seen, *made) <= end.kept
    wait_until(lambda: reported(env, branch.timeline)[0] == end.kept, what="the size to rest")
