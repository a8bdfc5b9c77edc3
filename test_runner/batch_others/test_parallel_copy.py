"""Several clients load data with COPY at the same time."""

from __future__ import annotations

import asyncio
import io

import pytest
from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder

CLIENTS = 5
ROWS = 2000
COPIES = 5


async def load(pg: Postgres, client: int, table: str) -> None:
    """COPY the same rows several times, each time in a transaction of its own."""
    lines = (
        f"{i}\tLoaded by client {client}. Long string to consume some space." for i in range(ROWS)
    )
    data = ("\n".join(lines) + "\n").encode()
    connection = await pg.connect_async()
    try:
        for _ in range(COPIES):
            await connection.copy_to_table(table, source=io.BytesIO(data))
    finally:
        await connection.close()


async def load_at_once(pg: Postgres, tables: list[str]) -> None:
    """All clients at the same time."""
    await asyncio.gather(*(load(pg, number, table) for number, table in enumerate(tables)))


@pytest.mark.parametrize("num_safekeepers", [0, 3])
def test_parallel_copy(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """Five clients fill one table and five of their own; every row is there once, now and later.

    Loading in parallel extends relations from several backends at once, with little WAL per page:
    where sizes are tracked beside the pages, rows at the end of a table would go missing.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    tables = [f"own{number}" for number in range(CLIENTS)]
    for table in ("shared", *tables):
        pg.safe_psql(f"CREATE TABLE {table} (i int, t text)")
    asyncio.run(load_at_once(pg, ["shared"] * CLIENTS))
    asyncio.run(load_at_once(pg, tables))

    def check() -> None:
        by_client = "SELECT t, count(*), count(DISTINCT i) FROM shared GROUP BY t"
        rows = pg.safe_psql(by_client)
        assert [(count, distinct) for _, count, distinct in rows] == [
            (ROWS * COPIES, ROWS)
        ] * CLIENTS
        for table in tables:
            assert pg.safe_psql(f"SELECT count(*) FROM {table}") == [(ROWS * COPIES,)]

    check()
    pg.kill()
    pg.start()
    check()
    verify_pages(pg)
