"""All history is collected again and again while clients write; nothing of the present goes."""

from __future__ import annotations

import asyncio
import contextlib
import random

from fixtures.page_verifier import verify_pages
from fixtures.pg_protocol import PgProtocol
from fixtures.postgres import Postgres
from fixtures.storage import Branch
from fixtures.zenith_env import ZenithEnvBuilder

CLIENTS = 5
ROWS = 20_000
# At least.
UPDATES = 4_000
ROUNDS = 3
# Layers are small and many, and nothing is collected but by the test.
SETTINGS = "checkpoint_distance=1048576;gc_period='1 h';pitr_interval='0 s'"


class Work:
    """What the clients have done, and how often garbage was collected meanwhile."""

    def __init__(self) -> None:
        self.updates = 0
        self.rounds = 0

    @property
    def enough(self) -> bool:
        """Whether all may stop."""
        return self.updates >= UPDATES and self.rounds >= ROUNDS


async def update(pg: Postgres, seed: int, work: Work) -> None:
    """Count up random rows until that is enough."""
    rng = random.Random(seed)
    connection = await pg.connect_async()
    try:
        while not work.enough:
            row = rng.randrange(ROWS)
            await connection.execute(f"UPDATE foo SET counter = counter + 1 WHERE id = {row}")
            work.updates += 1
    finally:
        await connection.close()


async def collect(pageserver: PgProtocol, branch: Branch, work: Work) -> None:
    """`do_gc` with horizon 0 until that is enough."""
    connection = await pageserver.connect_async()
    try:
        while not work.enough:
            await connection.execute(f"do_gc {branch.tenant.hex} {branch.timeline.hex} 0")
            work.rounds += 1
    finally:
        await connection.close()


async def update_and_collect(pg: Postgres, branch: Branch) -> int:
    """All at once; the number of updates."""
    work = Work()
    clients = [update(pg, seed, work) for seed in range(CLIENTS)]
    await asyncio.gather(*clients, collect(pg.env.pageserver, branch, work))
    return work.updates


def test_gc_aggressive(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Clients update, a loop collects everything older than the moment; no update is lost.

    Where garbage collection and the arrival of WAL race, a layer that is needed could be taken for
    garbage: that would be silent loss of what was committed.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = SETTINGS
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE foo (id int PRIMARY KEY, counter int, t text) WITH (fillfactor=50)")
    pg.safe_psql(
        "INSERT INTO foo SELECT g, 0, 'long string to consume some space' || g"
        f" FROM generate_series(0, {ROWS - 1}) g"
    )
    branch = Branch.of(pg)
    updates = asyncio.run(update_and_collect(pg, branch))
    sums = "SELECT count(*), sum(counter) FROM foo"
    assert pg.safe_psql(sums) == [(ROWS, updates)]
    # From storage alone, by way of the table and of the index.
    branch.wait_for(pg)
    branch.do_gc(0)
    pg.kill()
    pg.start()
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(sums)
        assert cursor.fetchall() == [(ROWS, updates)]
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(f"{sums} WHERE id >= 0")
        assert cursor.fetchall() == [(ROWS, updates)]
    verify_pages(pg)
