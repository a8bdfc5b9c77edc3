"""Everything stops and starts again, in any order, and the data is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures.oracle import dump_all
from fixtures.pg_protocol import PgBin
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnvBuilder


@pytest.mark.parametrize("num_safekeepers", [0, 1, 3])
def test_restart_everything(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """The compute, then the whole environment, stops cleanly and comes back with the data.

    Restarts are the normal case, on an update or over night: none may need more than a start.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT i, 'payload ' || i AS p FROM generate_series(1, 5000) i")
    for generation in range(1, 4):
        pg.stop()
        assert pg.status() == "stopped"
        if generation == 2:
            env.stop()
            env.start()
        if generation == 3:
            env.pageserver.stop(immediate=True)
            env.pageserver.start()
        pg.start()
        assert pg.status() == "running"
        assert pg.safe_psql("SELECT count(*), sum(i) FROM t WHERE i <= 5000") == [(5000, 12502500)]
        assert pg.safe_psql("SELECT count(*) FROM t WHERE i > 5000") == [(generation - 1,)]
        pg.safe_psql(f"INSERT INTO t VALUES ({5000 + generation}, 'later')")


@pytest.mark.parametrize("num_safekeepers", [0, 1, 3])
def test_killed_compute(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """A compute killed at any time has lost nothing that it acknowledged.

    The directory of a compute is disposable: that is only true if storage has all that was
    acknowledged, and nothing else.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int)")
    for generation in range(4):
        with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
            for i in range(50):
                cur.execute("INSERT INTO t VALUES (%s)", (generation * 50 + i,))
            conn.autocommit = False
            cur.execute("INSERT INTO t SELECT generate_series(1000000, 1010000)")
            if generation % 2:
                pg.kill()
            else:
                pg.kill_supervisor()
        pg.start()
        rows = pg.safe_psql("SELECT i FROM t ORDER BY i")
        assert [i for (i,) in rows] == list(range((generation + 1) * 50))


def test_killed_while_much_was_under_way(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Without safekeepers the next compute begins behind all that the pageserver will ever have.

    What a compute sent before it died may still lie in a socket. Taken in behind the back of the
    next compute, it would be another history than that one's: nobody could write any more.
    """
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t (i int)")

    def asked() -> int:
        log = (env.repo_dir / "pageserver.log").read_text()
        return log.count(f"GET /v1/tenant/{pg.tenant_id.hex}/timeline/")

    env.pageserver.safe_psql("failpoints walreceiver-after-ingest=pause")
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
        cursor.execute("INSERT INTO t SELECT generate_series(1, 20000)")
        cursor.execute("SELECT pg_current_wal_insert_lsn()::text")
        written = cursor.fetchone()[0]
        sent = f"SELECT bool_and(sent_lsn >= '{written}') FROM pg_stat_replication"
        wait_until(lambda: pg.safe_psql(sent) == [(True,)], what="all to be sent")
        pg.kill()
    before = asked()
    with ThreadPoolExecutor() as pool:
        started = pool.submit(pg.start)
        wait_until(lambda: started.done() or asked() >= before + 3, what="questions how far it is")
        env.pageserver.safe_psql("failpoints walreceiver-after-ingest=off")
        started.result()
    # Nobody was promised these.
    ((kept,),) = pg.safe_psql("SELECT count(*) FROM t")
    assert kept in (0, 20000)
    pg.safe_psql("INSERT INTO t VALUES (0)")
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(kept + 1,)]


@pytest.mark.parametrize(
    ("stop_order", "start_order"),
    [("cps", "psc"), ("spc", "spc"), ("pcs", "psc"), ("scp", "spc")],
    ids=lambda order: order,
)
def test_any_order(zenith_env_builder: ZenithEnvBuilder, stop_order: str, start_order: str) -> None:
    """Compute (c), pageserver (p) and safekeepers (s) stop and start in every sensible order.

    Init systems and people do not know the right order: a wrong one may cost time, never data.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["zenith.stop_timeout=2s"])
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    stop: dict[str, Callable[[], object]] = {
        "c": pg.stop,
        "p": env.pageserver.stop,
        "s": lambda: [s.stop() for s in env.safekeepers],
    }
    start: dict[str, Callable[[], object]] = {
        "c": pg.start,
        "p": env.pageserver.start,
        "s": lambda: [s.start() for s in env.safekeepers],
    }
    for part in stop_order:
        stop[part]()
    for part in start_order:
        start[part]()
    assert pg.safe_psql("SELECT count(*), sum(i) FROM t") == [(1000, 500500)]
    pg.safe_psql("INSERT INTO t VALUES (0)")


def test_killed_pageserver(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Commits go on without the pageserver, which catches up; cold reads wait for it.

    Writes must not depend on the pageserver: the quorum of safekeepers is all that a commit
    needs.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 10000) AS i")
    env.pageserver.kill()
    pg.safe_psql("INSERT INTO t SELECT generate_series(10001, 20000)")
    env.pageserver.start()
    lsn = pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    client = env.pageserver.http_client()
    timeline = client.timeline_list(env.initial_tenant)[0]
    wait_until(
        lambda: (
            lsn_from_hex(client.timeline_list(env.initial_tenant)[0]["local"]["last_record_lsn"])
            >= lsn_from_hex(lsn)
        ),
        what=f"the pageserver to catch up with {lsn} from {timeline}",
    )
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*), sum(i) FROM t") == [(20000, 200010000)]


MANY_KINDS = """
CREATE ROLE owner LOGIN CONNECTION LIMIT 7;
CREATE SCHEMA app AUTHORIZATION owner;
CREATE TYPE app.mood AS ENUM ('sad', 'happy');
CREATE DOMAIN app.positive AS int CHECK (VALUE > 0);
CREATE TABLE app.t (i app.positive PRIMARY KEY, m app.mood DEFAULT 'sad', x text UNIQUE);
CREATE INDEX t_expression ON app.t (lower(x)) WHERE i > 10;
CREATE SEQUENCE app.numbers START 5 INCREMENT 5;
CREATE VIEW app.v AS SELECT count(*) AS n FROM app.t;
CREATE MATERIALIZED VIEW app.seen AS SELECT i FROM app.t;
CREATE FUNCTION app.twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n';
CREATE FUNCTION app.shout() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.x := upper(NEW.x); RETURN NEW; END $$;
CREATE TRIGGER shout BEFORE INSERT ON app.t FOR EACH ROW EXECUTE FUNCTION app.shout();
COMMENT ON TABLE app.t IS 'a table';
GRANT SELECT ON app.t TO PUBLIC;
CREATE DATABASE other;
ALTER DATABASE other SET work_mem = '7MB';
ALTER ROLE owner SET search_path = app;
CREATE EXTENSION pg_trgm
"""


def test_every_kind_of_object_survives(zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin) -> None:
    """Roles, types, triggers, databases and what else a dump tells of outlive the compute, often.

    A compute's directory is made anew at each start, catalogs, relation maps and all: whatever were
    left out there would be lost by a mere restart, without any crash.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        for statement in MANY_KINDS.split(";\n"):
            cursor.execute(statement)
    pg.safe_psql("CREATE TABLE there AS SELECT 1 AS i", dbname="other")
    pg.safe_psql("INSERT INTO app.t (i, x) SELECT g, 'row ' || g FROM generate_series(1, 500) g")
    # The mapped catalogs get other files.
    pg.safe_psql("VACUUM FULL pg_class")
    pg.safe_psql("VACUUM FULL pg_database")
    expected = dump_all(pg, pg_bin)
    for generation in range(4):
        if generation % 2:
            pg.kill()
        else:
            pg.stop()
        pg.start()
        assert pg.safe_psql("SELECT app.twice(n::int) FROM app.v") == [(1000,)]
        assert pg.safe_psql("SHOW work_mem", dbname="other") == [("7MB",)]
        assert pg.safe_psql("SHOW search_path", username="owner") == [("app",)]
    assert dump_all(pg, pg_bin) == expected
    pg.safe_psql("INSERT INTO app.t (i, x) VALUES (501, 'row')")
    assert pg.safe_psql("SELECT m::text, x FROM app.t WHERE i = 501") == [("sad", "ROW")]
    assert pg.safe_psql("SELECT nextval('app.numbers')") == [(5,)]
