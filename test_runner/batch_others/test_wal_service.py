"""The WAL service in everyday use: many timelines, restarts under load, safekeepers away."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import asyncpg
import pytest
import requests
from fixtures.postgres import Postgres
from fixtures.safekeeper_wal import Timeline
from fixtures.storage import ACKNOWLEDGED, FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnvBuilder


def rows(pg: Postgres) -> list[tuple[Any, ...]]:
    """What `grow` has written."""
    return pg.safe_psql("SELECT count(*), sum(key) FROM t")


def grow(pg: Postgres, count: int = 1000) -> None:
    """Insert rows 1 to `count` once more."""
    pg.safe_psql("CREATE TABLE IF NOT EXISTS t (key int, value text)")
    pg.safe_psql(f"INSERT INTO t SELECT g, 'payload' FROM generate_series(1, {count}) g")


def test_many_timelines(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Branches at once on the same safekeepers: each has its own WAL, and metrics tell how far.

    All branches share the safekeepers, so their WAL runs together in time; a record or an LSN of
    one that got into another would be damage that no quorum heals.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    branches = [f"branch{number}" for number in range(3)]
    for name in branches:
        env.zenith_cli.create_branch(name, "main")
    # As long as nobody has written to a timeline, no safekeeper knows of it.
    assert not any(s.http_client().get_metrics().flush_lsn_inexact for s in env.safekeepers)
    nodes = [env.postgres.create_start(name) for name in branches]
    storage = [Branch.of(node) for node in nodes]
    for number, node in enumerate(nodes):
        grow(node, 1000 * (number + 1))
    lsns = [lsn_from_hex(node.safe_psql(FLUSH_LSN)[0][0]) for node in nodes]
    keys = [(branch.tenant.hex, branch.timeline.hex) for branch in storage]

    def lsns_are_shown(number: int) -> bool:
        metrics = env.safekeepers[number].http_client().get_metrics()
        assert set(metrics.flush_lsn_inexact) == set(metrics.commit_lsn_inexact) == set(keys)
        for key in keys:
            assert metrics.commit_lsn_inexact[key] <= metrics.flush_lsn_inexact[key]
        return all(
            metrics.commit_lsn_inexact[key] >= lsn for key, lsn in zip(keys, lsns, strict=True)
        )

    for number in range(3):
        wait_until(lambda n=number: lsns_are_shown(n), what="the metrics to show all commits")  # type: ignore[misc]
    # One goes, another one comes back: all timelines with it.
    for number in range(3):
        env.safekeepers[number].stop()
        for node in nodes:
            grow(node, 10)
        env.safekeepers[number].start()
    lsns = [lsn_from_hex(node.safe_psql(FLUSH_LSN)[0][0]) for node in nodes]
    for number in range(3):
        wait_until(lambda n=number: lsns_are_shown(n), what="it to catch up with all timelines")  # type: ignore[misc]
    for number, node in enumerate(nodes):
        node.kill()
        node.start()
        count = 1000 * (number + 1)
        assert rows(node) == [(count + 30, count * (count + 1) // 2 + 3 * 55)]


ACCOUNTS = 100
INITIAL = 5000


@dataclass
class Bank:
    """Workers move money between accounts, and each remembers how often it was told of success."""

    pg: Postgres
    stopping: bool = False
    moved: list[int] = field(default_factory=list)

    async def worker(self, number: int) -> None:
        """Transfers on one connection; no error is acceptable."""
        connection = await self.pg.connect_async()
        rng = random.Random(number)
        try:
            while not self.stopping:
                await self._transfer(connection, rng)
                self.moved[number] += 1
                # The rest of the machine shall get on as well.
                await asyncio.sleep(0.01)
        finally:
            await connection.close()

    async def _transfer(self, connection: Any, rng: random.Random) -> None:
        source, target = rng.sample(range(ACCOUNTS), 2)
        amount = rng.randint(1, 100)
        while True:
            try:
                async with connection.transaction(isolation="repeatable_read"):
                    balance = await connection.fetchval(
                        f"SELECT amount FROM bank WHERE uid = {source} FOR UPDATE"
                    )
                    if balance < amount:
                        return
                    await connection.execute(
                        f"UPDATE bank SET amount = amount - {amount} WHERE uid = {source}"
                    )
                    await connection.execute(
                        f"UPDATE bank SET amount = amount + {amount} WHERE uid = {target}"
                    )
                    await connection.execute(
                        f"INSERT INTO transfers VALUES ({source}, {target}, {amount})"
                    )
                return
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
                continue

    async def run(self, workers: int) -> None:
        """All workers until told to stop."""
        self.moved = [0] * workers
        await asyncio.gather(*(self.worker(number) for number in range(workers)))

    def wait_for_all(self) -> None:
        """Until each worker has got on."""
        before = list(self.moved)
        wait_until(
            lambda: all(now > then for now, then in zip(self.moved, before, strict=True)),
            timeout=60,
            what="every worker to get on",
        )


@contextmanager
def bank_at_work(pg: Postgres, workers: int) -> Iterator[Bank]:
    """Workers meanwhile; in the end none may have met an error."""
    bank = Bank(pg, moved=[0] * workers)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(bank.run(workers))
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield bank
    finally:
        bank.stopping = True
        thread.join(60)
    assert not thread.is_alive(), "a transfer hangs"
    assert not failed, failed


def check_bank(pg: Postgres) -> None:
    """The sum is what it was, and each balance what its transfers make it."""
    assert pg.safe_psql("SELECT sum(amount) FROM bank") == [(ACCOUNTS * INITIAL,)]
    wrong = (
        f"SELECT uid FROM bank WHERE amount <> {INITIAL}"
        " + (SELECT coalesce(sum(amount), 0) FROM transfers WHERE target = uid)"
        " - (SELECT coalesce(sum(amount), 0) FROM transfers WHERE source = uid)"
    )
    assert pg.safe_psql(wrong) == []


def test_restarts_under_load(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Safekeepers are restarted one by one under bank transfers; then a majority goes for a while.

    An update of the safekeepers, one after the other, must be something that nobody sees: not one
    client may get an error, and no money may appear or vanish.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE bank (uid int PRIMARY KEY, amount int)")
    pg.safe_psql("CREATE TABLE transfers (source int, target int, amount int)")
    pg.safe_psql(f"INSERT INTO bank SELECT g, {INITIAL} FROM generate_series(0, {ACCOUNTS - 1}) g")
    with bank_at_work(pg, 5) as bank:
        bank.wait_for_all()
        for number in range(3):
            safekeeper = env.safekeepers[number]
            safekeeper.stop(immediate=number != 1)
            bank.wait_for_all()
            safekeeper.start()
            bank.wait_for_all()
        for safekeeper in env.safekeepers[:2]:
            safekeeper.stop()
        query = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_until(lambda: pg.safe_psql(query)[0][0], what="commits to wait for the quorum")
        env.safekeepers[1].start()
        bank.wait_for_all()
        env.safekeepers[0].start()
        bank.wait_for_all()
    check_bank(pg)
    pg.kill()
    pg.start()
    check_bank(pg)


def test_one_is_away_when_computes_start(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Computes start and restart with two of three; the status of the timeline tells of each start.

    A safekeeper may be down for days. Computes must start all the same, and the epoch is how an
    operator sees that a safekeeper has accepted the newest compute.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    first, second, away = env.safekeepers
    away.stop()
    pg = env.postgres.create_start("main")
    grow(pg)
    branch = Branch.of(pg)
    ids = branch.tenant.hex, branch.timeline.hex
    before = [s.http_client().timeline_status(*ids) for s in (first, second)]
    pg.stop()
    pg.start()
    grow(pg)
    lsn = lsn_from_hex(pg.safe_psql(ACKNOWLEDGED)[0][0])
    after = [s.http_client().timeline_status(*ids) for s in (first, second)]
    assert before[0].acceptor_epoch == before[1].acceptor_epoch
    assert after[0].acceptor_epoch == after[1].acceptor_epoch > before[0].acceptor_epoch
    assert all(lsn_from_hex(status.flush_lsn) >= lsn for status in after)

    # It has missed the whole life of the timeline; now another one goes.
    away.start()
    Timeline(away, branch.tenant, branch.timeline).wait_committed(lsn)
    wait_until(
        lambda: away.http_client().timeline_status(*ids).acceptor_epoch == after[0].acceptor_epoch,
        what="the one that was away to be in the newest epoch",
    )
    first.stop()
    grow(pg)
    pg.kill()
    pg.start()
    assert rows(pg) == [(3000, 3 * 500_500)]
    unknown = uuid.uuid4().hex
    with pytest.raises(requests.HTTPError):
        away.http_client().timeline_status(branch.tenant.hex, unknown)
