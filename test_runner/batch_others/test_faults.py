"""Processes are killed one after another under load; nothing acknowledged is missing after it."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psycopg2
import pytest
from fixtures.log_helper import log
from fixtures.nemesis import start_patiently
from fixtures.page_verifier import verify_pages
from fixtures.pg_protocol import PgBin
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder

TRANSFER = """
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + %(delta)s WHERE aid = %(aid)s;
UPDATE pgbench_tellers SET tbalance = tbalance + %(delta)s WHERE tid = %(tid)s;
UPDATE pgbench_branches SET bbalance = bbalance + %(delta)s WHERE bid = %(bid)s;
INSERT INTO journal (client, seq, delta) VALUES (%(client)s, %(seq)s, %(delta)s);
COMMIT;
"""


@dataclass
class Client(threading.Thread):
    """One client: transfers money for ever, and remembers what was acknowledged."""

    pg: Postgres
    number: int
    scale: int
    stopping: threading.Event
    attempted: int = 0
    acknowledged: list[int] = field(default_factory=list)
    failures: int = 0
    unexpected: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        """Until told to stop; a lost connection is made anew."""
        rng = random.Random(self.number)
        connection: Any = None
        try:
            while not self.stopping.is_set():
                try:
                    connection = connection or self.pg.connect()
                    self._transfer(connection, rng)
                except psycopg2.Error:
                    self.failures += 1
                    connection = None
                    self.stopping.wait(0.05)
        except BaseException as e:
            self.unexpected.append(e)

    def _transfer(self, connection: Any, rng: random.Random) -> None:
        self.attempted += 1
        seq = self.attempted
        with connection.cursor() as cur:
            cur.execute(
                TRANSFER,
                {
                    "delta": rng.randint(-5000, 5000),
                    "aid": rng.randint(1, 100000 * self.scale),
                    "tid": rng.randint(1, 10 * self.scale),
                    "bid": rng.randint(1, self.scale),
                    "client": self.number,
                    "seq": seq,
                },
            )
        self.acknowledged.append(seq)


def check_journal(pg: Postgres, clients: list[Client]) -> None:
    """Every acknowledged transaction is there, once; none from nowhere; the sums agree."""
    rows = pg.safe_psql("SELECT client, seq FROM journal")
    assert len(set(rows)) == len(rows), "a transaction is there twice"
    present = set(rows)
    for client in clients:
        assert not client.unexpected, client.unexpected
        missing = [s for s in client.acknowledged if (client.number, s) not in present]
        assert not missing, (
            f"acknowledged transactions of client {client.number} are lost: {missing}"
        )
        nowhere = [s for c, s in present if c == client.number and s > client.attempted]
        assert not nowhere
    assert pg.safe_psql(
        "SELECT (SELECT sum(delta) FROM journal) = (SELECT sum(abalance) FROM pgbench_accounts), "
        "(SELECT sum(delta) FROM journal) = (SELECT sum(tbalance) FROM pgbench_tellers), "
        "(SELECT sum(delta) FROM journal) = (SELECT sum(bbalance) FROM pgbench_branches)"
    ) == [(True, True, True)]


@pytest.mark.parametrize(
    ("scale", "seconds"),
    [pytest.param(1, 12, id="short"), pytest.param(20, 60, id="long", marks=pytest.mark.slow)],
)
def test_kill_everything_in_turn(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, scale: int, seconds: int
) -> None:
    """A safekeeper, the pageserver, then the compute are killed and restarted under 8 clients.

    It is the promise in one sentence: whatever dies, what was acknowledged is there, once, and
    indexes and tables agree.
    """
    zenith_env_builder.num_safekeepers = 3
    zenith_env_builder.safekeepers_sync = True
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["shared_buffers=128MB"])
    pg_bin.run_capture(
        ["pgbench", "-i", f"-s{scale}", "-h127.0.0.1", f"-p{pg.port}", "-Uzenith_admin", "postgres"]
    )
    pg.safe_psql("CREATE TABLE journal (client int, seq int, delta int, PRIMARY KEY (client, seq))")
    pg.safe_psql("CREATE EXTENSION amcheck")
    stopping = threading.Event()
    clients = [Client(pg, number, scale, stopping) for number in range(8)]
    for client in clients:
        client.start()
    try:
        pause = seconds / 4
        time.sleep(pause)  # the load itself, not a wait for anything
        env.safekeepers[1].kill()
        time.sleep(pause / 2)
        start_patiently(env.safekeepers[1].start)
        env.pageserver.kill()
        time.sleep(pause / 2)
        start_patiently(env.pageserver.start)
        time.sleep(pause)
        pg.kill()
        pg.start()
        time.sleep(pause)
    finally:
        stopping.set()
        for client in clients:
            client.join()
    total = sum(len(client.acknowledged) for client in clients)
    log.info(
        "%d transactions acknowledged, %d failed", total, sum(client.failures for client in clients)
    )
    assert total > 0
    check_journal(pg, clients)
    pg_bin.run_capture(
        [
            "pg_amcheck",
            "--heapallindexed",
            "-h127.0.0.1",
            f"-p{pg.port}",
            "-Uzenith_admin",
            "postgres",
        ]
    )
    pg.kill()
    pg.start()
    check_journal(pg, clients)
    verify_pages(pg)
