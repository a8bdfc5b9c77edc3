"""Zenith's storage and Postgres' own recovery make the same of the same WAL."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

from fixtures.oracle import FirstState, Oracle, dump_all
from fixtures.page_verifier import access_methods, compare_directory
from fixtures.pg_protocol import PgBin
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnvBuilder

GENERATION = """
CREATE TABLE g{n} (id int PRIMARY KEY, t text, a int[]);
INSERT INTO g{n} SELECT i, md5(i::text), ARRAY[i % 10] FROM generate_series(1, 5000) i;
CREATE INDEX ON g{n} USING gin (a);
CREATE INDEX ON g{n} USING hash (t);
UPDATE g{n} SET t = t || 'u' WHERE id % 3 = 0;
DELETE FROM g{n} WHERE id > 4000;
VACUUM g{n};
CREATE SEQUENCE s{n};
SELECT nextval('s{n}') FROM generate_series(1, 100);
CREATE DATABASE d{n} STRATEGY {strategy};
"""


def test_oracle(zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, test_output_dir: str) -> None:
    """Several generations of computes, each killed: same dump, same pages as stock recovery.

    Our storage is a second implementation of recovery: Postgres' own, on the very same WAL, is
    the judge of it.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    first = FirstState(env, Path(test_output_dir) / "first_state")
    pg = env.postgres.create_start("main", config_lines=["max_prepared_transactions=10"])
    for n in range(4):
        for statement in GENERATION.format(n=n, strategy="wal_log" if n % 2 else "file_copy").split(
            ";"
        ):
            if statement.strip():
                pg.safe_psql(statement)
        with contextlib.closing(pg.connect(autocommit=False)) as conn, conn.cursor() as cur:
            cur.execute(
                f"INSERT INTO g{n} SELECT i, 'lost', '{{}}' FROM generate_series(5001, 6000) i"
            )
            pg.kill()
        pg.start()
    methods = access_methods(pg)
    pg.kill()

    tenant, timeline = env.initial_tenant.hex, first.timeline
    client = env.safekeepers[0].http_client()
    pageserver = env.pageserver.http_client()

    def end_of_all() -> int:
        """Where WAL ends; 0 while the two differ: its last piece may still be on its way."""
        end = lsn_from_hex(client.timeline_status(tenant, timeline).flush_lsn)
        detail = pageserver.timeline_detail(env.initial_tenant, uuid.UUID(timeline))
        return end if lsn_from_hex(detail["local"]["last_record_lsn"]) == end else 0

    end = wait_until(end_of_all, what="the pageserver to have all WAL of the safekeeper")
    pg.start()
    dump = dump_all(pg, pg_bin)
    pg.stop()

    port = env.port_distributor.get_port()
    with Oracle(first, env.safekeepers[0], end, pg_bin, port) as oracle:
        # First the pages: whoever reads a table, like the dump, may prune it.
        oracle.stop()
        report = compare_directory(env, oracle.pgdata, timeline, end, methods)
        oracle.start()
        assert dump_all(oracle, pg_bin) == dump
        assert sum(sum(counts.values()) for counts in report["pages"].values()) > 3000
