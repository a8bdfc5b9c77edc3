"""Every page of a compute equals what the pageserver rebuilds from WAL, whatever wrote it."""

from __future__ import annotations

import contextlib

import pytest
from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder

ACCESS_METHODS = """
CREATE EXTENSION IF NOT EXISTS btree_gin;
CREATE TABLE h (id int PRIMARY KEY, t text, a int[], p point, r int4range, n int);
INSERT INTO h
SELECT i, repeat(md5(i::text), 1 + i % 4), ARRAY[i % 50, i % 7], point(i % 100, i / 100),
       int4range(i, i + i % 90), i % 1000
FROM generate_series(1, 20000) i;
CREATE INDEX h_t ON h (t);
CREATE INDEX h_hash ON h USING hash (n);
CREATE INDEX h_gin ON h USING gin (a);
CREATE INDEX h_gin_fast ON h USING gin (n) WITH (fastupdate = on);
CREATE INDEX h_gist ON h USING gist (p);
CREATE INDEX h_gist_range ON h USING gist (r);
CREATE INDEX h_spgist ON h USING spgist (p);
CREATE INDEX h_spgist_text ON h USING spgist (t);
CREATE INDEX h_brin ON h USING brin (id) WITH (pages_per_range = 4);
INSERT INTO h
SELECT i, md5(i::text), ARRAY[i % 50, i % 7], point(i % 100, i / 100), int4range(i, i + 5), i % 1000
FROM generate_series(20001, 30000) i;
UPDATE h SET n = n + 1, t = t || 'x' WHERE id % 3 = 0;
DELETE FROM h WHERE id % 5 = 0;
VACUUM h;
SELECT brin_summarize_new_values('h_brin'), gin_clean_pending_list('h_gin_fast');
INSERT INTO h
SELECT i, md5(i::text), ARRAY[i % 50], point(i % 9, i % 11), int4range(1, 2), i
FROM generate_series(40001, 44000) i;
"""

TOAST = """
CREATE TABLE toasted (id serial PRIMARY KEY, big text);
ALTER TABLE toasted ALTER big SET STORAGE external;
INSERT INTO toasted (big) SELECT repeat(md5(i::text), 400) FROM generate_series(1, 200) i;
UPDATE toasted SET big = big || 'tail' WHERE id % 2 = 0;
DELETE FROM toasted WHERE id % 7 = 0;
"""

SEQUENCES = """
CREATE SEQUENCE s1; CREATE SEQUENCE s2 CACHE 10;
SELECT nextval('s1'), nextval('s2') FROM generate_series(1, 500);
SELECT setval('s1', 10000, false);
"""

SPACE = """
CREATE TABLE tail (id int, filler text);
INSERT INTO tail SELECT i, repeat('x', 500) FROM generate_series(1, 5000) i;
DELETE FROM tail WHERE id > 300;
VACUUM tail;
CREATE TABLE emptied (id int PRIMARY KEY, filler text);
INSERT INTO emptied SELECT i, repeat('y', 100) FROM generate_series(1, 3000) i;
VACUUM emptied;
TRUNCATE emptied;
INSERT INTO emptied SELECT i, 'z' FROM generate_series(1, 100) i;
CREATE TABLE rewritten (id int PRIMARY KEY, v int, filler text);
INSERT INTO rewritten SELECT i, i * 7919 % 10000, 'filler' FROM generate_series(1, 10000) i;
CREATE INDEX rewritten_v ON rewritten (v);
DELETE FROM rewritten WHERE id % 2 = 0;
VACUUM FULL rewritten;
CLUSTER rewritten USING rewritten_v;
UPDATE rewritten SET v = v + 1 WHERE id % 3 = 0;
CREATE TABLE dropped (id int); INSERT INTO dropped SELECT generate_series(1, 10000);
DROP TABLE dropped;
BEGIN; CREATE TABLE rolled_back (id int); INSERT INTO rolled_back SELECT generate_series(1, 10000);
ROLLBACK;
CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY, t text);
INSERT INTO unlogged SELECT i, 'u' FROM generate_series(1, 5000) i;
VACUUM FREEZE h, tail;
VACUUM FULL pg_class;
"""


def run_script(pg: Postgres, script: str, dbname: str = "postgres") -> None:
    """Run statements one by one, each in a transaction of its own."""
    with contextlib.closing(pg.connect(dbname=dbname)) as conn, conn.cursor() as cur:
        statement = ""
        for part in script.split(";"):
            statement += part
            if part.strip().upper().startswith("BEGIN"):
                statement += ";"
                continue
            if statement.lstrip().upper().startswith("BEGIN") and "ROLLBACK" not in part.upper():
                statement += ";"
                continue
            if statement.strip():
                cur.execute(statement)
            statement = ""


def multixacts(pg: Postgres) -> None:
    """Row locks shared by several transactions, and updates of locked rows."""
    pg.safe_psql("CREATE TABLE locked AS SELECT i AS id, 0 AS n FROM generate_series(1, 2000) i")
    with contextlib.ExitStack() as stack:
        conns = [
            stack.enter_context(contextlib.closing(pg.connect(autocommit=False))) for _ in range(3)
        ]
        for conn in conns:
            with conn.cursor() as cur:
                cur.execute("SELECT count(*) FROM (SELECT 1 FROM locked FOR KEY SHARE) x")
        with conns[0].cursor() as cur:
            cur.execute("UPDATE locked SET n = n + 1 WHERE id % 2 = 0")
        conns[1].commit()
        conns[0].commit()
        conns[2].rollback()
    pg.safe_psql("UPDATE locked SET n = n + 1 WHERE id % 3 = 0")


def subtransactions(pg: Postgres) -> None:
    """More subtransactions than a backend remembers, some rolled back."""
    pg.safe_psql("CREATE TABLE subs (id int)")
    with contextlib.closing(pg.connect(autocommit=False)) as conn, conn.cursor() as cur:
        for i in range(150):
            cur.execute(f"SAVEPOINT s; INSERT INTO subs VALUES ({i})")
            cur.execute("ROLLBACK TO SAVEPOINT s" if i % 3 == 0 else "RELEASE SAVEPOINT s")
        conn.commit()


def two_phase(pg: Postgres) -> None:
    """Prepared transactions: committed, rolled back, and one left prepared."""
    pg.safe_psql("CREATE TABLE prepared (id int)")
    for i, end in enumerate(("COMMIT PREPARED 'p0'", "ROLLBACK PREPARED 'p1'", None)):
        with contextlib.closing(pg.connect(autocommit=True)) as conn, conn.cursor() as cur:
            cur.execute(
                f"BEGIN; INSERT INTO prepared SELECT generate_series({i * 100}, {i * 100 + 99}); "
                f"SAVEPOINT a; CREATE TABLE made_{i} (id int); PREPARE TRANSACTION 'p{i}'"
            )
            if end is not None:
                cur.execute(end)


def databases(pg: Postgres) -> None:
    """Databases made by both strategies, changed, and one dropped."""
    pg.safe_psql("CREATE DATABASE template STRATEGY wal_log")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 3000) AS i", dbname="template")
    pg.safe_psql("CREATE DATABASE by_log TEMPLATE template STRATEGY wal_log")
    pg.safe_psql("CREATE DATABASE by_copy TEMPLATE template STRATEGY file_copy")
    pg.safe_psql("CREATE DATABASE gone TEMPLATE template STRATEGY file_copy")
    for name in ("by_log", "by_copy"):
        pg.safe_psql("UPDATE t SET i = i + 1", dbname=name)
        pg.safe_psql("CREATE INDEX ON t (i)", dbname=name)
    pg.safe_psql("DROP DATABASE gone")


@pytest.mark.parametrize("checksums", [False, True], ids=["plain", "checksums"])
def test_page_verifier(zenith_env_builder: ZenithEnvBuilder, checksums: bool) -> None:
    """A workload over every access method and every way to create, move and drop storage.

    A page that differs by a byte from what the compute had is corruption, whether any query
    shows it or not.
    """
    zenith_env_builder.num_safekeepers = 1
    if checksums:
        zenith_env_builder.pageserver_config_override = "initdb_options=['--data-checksums']"
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["max_prepared_transactions=10"])
    assert pg.safe_psql("SHOW data_checksums") == [("on" if checksums else "off",)]

    run_script(pg, ACCESS_METHODS)
    run_script(pg, TOAST)
    run_script(pg, SEQUENCES)
    multixacts(pg)
    subtransactions(pg)
    two_phase(pg)
    databases(pg)
    run_script(pg, SPACE)
    count = pg.safe_psql("SELECT count(*), sum(n) FROM h")

    report = verify_pages(pg)
    for kind in ("heap", "btree", "hash", "gin", "gist", "spgist", "brin", "sequence", "vm"):
        assert sum(report["pages"][kind].values()) > 0, f"no page of {kind} was compared"

    # The same data out of storage alone, and the unlogged table empty and usable.
    pg.start()
    assert pg.safe_psql("SELECT count(*), sum(n) FROM h") == count
    assert pg.safe_psql("SELECT count(*) FROM unlogged") == [(0,)]
    pg.safe_psql("INSERT INTO unlogged VALUES (1, 'again')")
    assert pg.safe_psql("SELECT gid FROM pg_prepared_xacts") == [("p2",)]
    pg.safe_psql("COMMIT PREPARED 'p2'")
    assert pg.safe_psql("SELECT count(*) FROM prepared") == [(200,)]
    assert pg.safe_psql("SELECT count(*) FROM made_2") == [(0,)]
    verify_pages(pg)
