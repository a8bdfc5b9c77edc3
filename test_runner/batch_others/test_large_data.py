"""Many relations, tables far larger than the buffers, wide rows, on a compute without files."""

from __future__ import annotations

import contextlib

from fixtures.page_verifier import verify_pages
from fixtures.zenith_env import ZenithEnvBuilder

RELATIONS = 1000
BIG_ROWS = 150_000


def test_many_relations(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A thousand tables with indexes, made in one go and one by one, all there after a restart.

    Schemas of real applications are like that, and every relation costs storage an entry in a
    directory: were each change of it to rewrite the whole, creation would slow down to a crawl.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["max_locks_per_transaction=512"])
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        for number in range(RELATIONS // 2):
            cursor.execute(f"CREATE TABLE t{number} (i int PRIMARY KEY)")
            cursor.execute(f"INSERT INTO t{number} VALUES ({number})")
        cursor.execute(
            "DO $$ BEGIN FOR n IN %s..%s LOOP EXECUTE format("
            "'CREATE TABLE t%%s (i int PRIMARY KEY); INSERT INTO t%%s VALUES (%%s)', n, n, n);"
            " END LOOP; END $$",
            (RELATIONS // 2, RELATIONS - 1),
        )
        cursor.execute("CREATE TABLE parts (i int) PARTITION BY HASH (i)")
        for number in range(100):
            cursor.execute(
                f"CREATE TABLE part{number} PARTITION OF parts"
                f" FOR VALUES WITH (MODULUS 100, REMAINDER {number})"
            )
        cursor.execute("INSERT INTO parts SELECT generate_series(1, 5000)")
    pg.kill()
    pg.start()
    query = "SELECT count(*) FROM pg_class WHERE relname ~ '^(t[0-9]+(_pkey)?|part[0-9]+)$'"
    assert pg.safe_psql(query) == [(2 * RELATIONS + 100,)]
    assert pg.safe_psql("SELECT count(*), sum(i) FROM parts") == [(5000, 12_502_500)]
    union = " UNION ALL ".join(f"SELECT i FROM t{number}" for number in range(0, RELATIONS, 10))
    assert pg.safe_psql(f"SELECT count(*), sum(i) FROM ({union}) x") == [
        (RELATIONS // 10, sum(range(0, RELATIONS, 10)))
    ]
    # They go in one transaction, and are gone for good.
    pg.safe_psql(
        f"DO $$ BEGIN FOR n IN 0..{RELATIONS - 1} LOOP EXECUTE format('DROP TABLE t%s', n);"
        " END LOOP; END $$"
    )
    pg.stop()
    pg.start()
    assert pg.safe_psql(query) == [(100,)]
    verify_pages(pg)


def test_large_tables_and_values(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A table far above shared_buffers, values out of line and packed, wide rows, large objects.

    Pages that are evicted while a transaction writes, and values in pieces, are where a page could
    come back older than it went.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    assert pg.safe_psql("SHOW shared_buffers") == [("1MB",)]
    pg.safe_psql("CREATE TABLE big (i int PRIMARY KEY, t text)")
    with contextlib.closing(pg.connect(autocommit=False)) as connection:
        cursor = connection.cursor()
        cursor.execute(
            f"INSERT INTO big SELECT g, repeat('x', 100) FROM generate_series(1, {BIG_ROWS}) g"
        )
        # Pages of this transaction have been evicted by now.
        cursor.execute("UPDATE big SET t = t || i WHERE i % 50 = 0")
        cursor.execute("SELECT count(*), count(DISTINCT t) FROM big")
        assert cursor.fetchone() == (BIG_ROWS, BIG_ROWS // 50 + 1)
        connection.commit()
    columns = ", ".join(f"c{number} int DEFAULT {number}" for number in range(1500))
    pg.safe_psql(f"CREATE TABLE wide ({columns})")
    for _ in range(20):
        pg.safe_psql("INSERT INTO wide DEFAULT VALUES")
    pg.safe_psql("CREATE TABLE values (i int PRIMARY KEY, packed text, outside text)")
    pg.safe_psql("ALTER TABLE values ALTER outside SET STORAGE external")
    value = "(SELECT string_agg(md5(g::text || v), '') FROM generate_series(1, 1000) v)"
    pg.safe_psql(
        f"INSERT INTO values SELECT g, repeat('z', 1000000), {value} FROM generate_series(1, 100) g"
    )
    pg.safe_psql("INSERT INTO values SELECT 1000, '', repeat(md5('large'), 500000)")
    pg.safe_psql("UPDATE values SET outside = outside || i WHERE i % 2 = 0")
    pg.safe_psql("DELETE FROM values WHERE i % 7 = 0")
    pg.safe_psql("SELECT lo_from_bytea(4711, convert_to(repeat('large object ', 100000), 'UTF8'))")
    queries = (
        "SELECT count(*), count(DISTINCT t), sum(length(t)) FROM big",
        "SELECT count(*), sum(c0 + c700 + c1499) FROM wide",
        "SELECT count(*), sum(length(packed)), md5(string_agg(md5(outside), '' ORDER BY i))"
        " FROM values",
        "SELECT md5(lo_get(4711))",
    )
    expected = [pg.safe_psql(query) for query in queries]
    pg.kill()
    pg.start()
    assert [pg.safe_psql(query) for query in queries] == expected
    assert pg.safe_psql(f"SELECT t FROM big WHERE i = {BIG_ROWS}") == [("x" * 100 + str(BIG_ROWS),)]
    verify_pages(pg)
