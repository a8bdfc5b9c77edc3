"""The pageserver stops and starts while computes live, and while they do not."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator

import psycopg2
import pytest
from fixtures.postgres import Postgres
from fixtures.storage import Branch
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnvBuilder

ROWS = 30_000
# A commit that waits for a pageserver which is never told of it waits for ever.
pytestmark = pytest.mark.timeout(600)
FILL = (
    "INSERT INTO foo SELECT 'long string to consume some space' || g FROM generate_series(%d, %d) g"
)


class Reader(threading.Thread):
    """Counts a table again and again on one connection; how often, or what went wrong."""

    def __init__(self, pg: Postgres) -> None:
        super().__init__(daemon=True)
        self._connection = pg.connect()
        self.stopping = threading.Event()
        self.scans = 0
        self.wrong: list[object] = []

    def run(self) -> None:
        """Until told to stop, or something is wrong."""
        try:
            with contextlib.closing(self._connection), self._connection.cursor() as cursor:
                while not self.stopping.is_set() and not self.wrong:
                    cursor.execute("SELECT count(*), count(DISTINCT t) FROM foo")
                    row = cursor.fetchone()
                    if row != (ROWS, ROWS):
                        self.wrong.append(row)
                    self.scans += 1
        except psycopg2.Error as error:
            self.wrong.append(error)


@contextlib.contextmanager
def reading(pg: Postgres) -> Iterator[Reader]:
    """A reader meanwhile, in the end without a complaint."""
    reader = Reader(pg)
    reader.start()
    try:
        yield reader
    finally:
        reader.stopping.set()
        reader.join(60)
    assert not reader.is_alive(), "a read hangs"
    assert not reader.wrong


@pytest.mark.parametrize("num_safekeepers", [0, 1])
def test_restarts_under_a_living_compute(
    zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int
) -> None:
    """Sessions, a transaction and a cold scan go on over restarts of the pageserver, clean or not.

    Somebody who updates or loses a pageserver must not have to restart the computes it serves, nor
    may their clients see an error or a wrong row.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE foo (t text)")
    pg.safe_psql(FILL % (1, ROWS))
    pg.safe_psql("CREATE TABLE log (i int)")
    # Nothing of the table is here: each round reads a part of it for the first time.
    pg.stop()
    pg.start()
    part = "SELECT count(t) FROM foo WHERE ctid >= '(%d,0)' AND ctid < '(%d,0)'"
    with contextlib.closing(pg.connect(autocommit=False)) as open_one:
        cursor = open_one.cursor()
        cursor.execute("INSERT INTO log VALUES (0)")
        counted = 0
        for number in range(3):
            if number % 2:
                env.pageserver.kill()
            else:
                env.pageserver.stop()
            env.pageserver.start()
            cursor.execute(part % (number * 20, number * 20 + 20))
            counted += cursor.fetchone()[0]
            pg.safe_psql(f"INSERT INTO log VALUES ({number + 1})")
        cursor.execute("SELECT count(*) FROM foo WHERE ctid < '(60,0)'")
        assert cursor.fetchone() == (counted,)
        open_one.commit()
    with reading(pg) as reader:
        for _ in range(2):
            done = reader.scans
            env.pageserver.stop(immediate=True)
            env.pageserver.start()
            wait_until(lambda done=done: reader.scans > done or reader.wrong, what="scans")  # type: ignore[misc]
    expected = [(4, 6)]
    assert pg.safe_psql("SELECT count(*), sum(i) FROM log") == expected
    if not num_safekeepers:
        # What the pageserver has lost with its memory is with the compute only until it is back.
        Branch.of(pg).wait_for(pg)
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*), sum(i) FROM log") == expected
    assert pg.safe_psql("SELECT count(*), count(DISTINCT t) FROM foo") == [(ROWS, ROWS)]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_catchup_while_compute_down(zenith_env_builder: ZenithEnvBuilder, how: str) -> None:
    """What was committed while the pageserver was away is there for the next compute.

    The pageserver has to get it from the safekeepers, with nobody left who had written it. Were
    only a living compute to set it going, the next start would wait for ever, or show old data.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE foo (t text)")
    # One session, which has what it needs of the catalogs.
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(FILL % (1, 10_000))
        if how == "stopped":
            env.pageserver.stop()
        else:
            env.pageserver.kill()
        cursor.execute(FILL % (10_001, ROWS))
    if how == "stopped":
        pg.stop()
    else:
        pg.kill()
    env.pageserver.start()
    pg.start()
    assert pg.safe_psql("SELECT count(*), count(DISTINCT t) FROM foo") == [(ROWS, ROWS)]
    Branch.of(pg).wait_for(pg)


def test_branch_of_wal_that_was_in_memory_only(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A pageserver that was killed loads a branch before the WAL that it branched from is back.

    Safekeepers call for their timelines one after the other: if the call for a branch waited for
    its ancestor's WAL, the ancestor's turn would never come, and both would be gone for good.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = "wait_lsn_timeout='5 s'"
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE foo (t text)")
    main.safe_psql(FILL % (1, ROWS))
    Branch.of(main).wait_for(main)
    timeline = env.zenith_cli.create_branch("branch", "main")
    branch = env.postgres.create_start("branch")
    branch.safe_psql("INSERT INTO foo VALUES ('on the branch')")
    env.pageserver.kill()
    # Nobody brings the WAL of the one or the other for the time being.
    safekeeper = env.safekeepers[0]
    safekeeper.stop(immediate=True)
    env.pageserver.start()
    ids, source = f"{env.initial_tenant.hex} {timeline.hex}", f"port={safekeeper.port.pg}"
    assert env.pageserver.safe_psql(f"callmemaybe {ids} host=localhost {source}") == []
    # What is known is told all the same, without the size; nobody waits for more.
    client = env.pageserver.http_client()
    local = client.timeline_detail(env.initial_tenant, timeline)["local"]
    assert local["current_logical_size"] is local["current_logical_size_non_incremental"] is None
    listed = json.loads(env.zenith_cli.raw_cli(["timeline", "list", "--json"]).stdout)
    assert {info["branch"]: info["logical_size"] is None for info in listed}["branch"]
    nodes = json.loads(env.zenith_cli.raw_cli(["pg", "list", "--json"]).stdout)
    assert {node["last_record_lsn"] for node in nodes} >= {local["last_record_lsn"]}
    safekeeper.start()
    count = "SELECT count(*), count(DISTINCT t) FROM foo"
    for node, rows in ((branch, ROWS + 1), (main, ROWS)):
        Branch.of(node).wait_for(node)
        node.kill()
        assert node.start().safe_psql(count) == [(rows, rows)]
