"""Random faults of everything for a while under concurrent writes; nothing acknowledged is lost.

ZENITH_FAULTS_SEED chooses the faults, ZENITH_FAULTS_SECONDS how long they go on.
"""

from __future__ import annotations

import os
import random

import pytest
from fixtures.history_client import HistoryClients
from fixtures.log_helper import log
from fixtures.nemesis import Nemesis, schedule
from fixtures.page_verifier import verify_pages
from fixtures.safekeeper_wal import Timeline, assert_same_wal
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex
from fixtures.zenith_env import ZenithEnvBuilder

CLIENTS = 6
# Of a client, after everything has been healed: a start of the compute lies in it.
BACK = 180.0


@pytest.mark.parametrize(
    ("seed", "seconds"),
    [
        pytest.param(1, 60, id="short"),
        pytest.param(None, 600, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_random_faults(
    zenith_env_builder: ZenithEnvBuilder, seed: int | None, seconds: int
) -> None:
    """Faults at random under load, healed; then each client's log is held against what is there.

    Those who break a system find combinations that nobody has thought of; a seed makes them
    repeatable.
    """
    chosen = os.environ.get("ZENITH_FAULTS_SEED")
    seed = int(chosen) if chosen else seed or random.SystemRandom().randrange(1 << 32)
    seconds = int(os.environ.get("ZENITH_FAULTS_SECONDS") or seconds)
    faults = schedule(seed, seconds)
    try:
        run(zenith_env_builder, seed, seconds)
    except BaseException as e:
        e.add_note("\n".join([f"the faults of seed {seed}:", *map(str, faults)]))
        raise


def run(builder: ZenithEnvBuilder, seed: int, seconds: int) -> None:
    """Faults, healing, and the checks."""
    builder.num_safekeepers = 3
    builder.safekeepers_sync = True
    builder.proxied = True
    env = builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["checkpoint_timeout=30s"])
    branch = Branch.of(pg)
    timelines = [Timeline(s, branch.tenant, branch.timeline) for s in env.safekeepers]
    clients = HistoryClients(pg, CLIENTS, seed)
    nemesis = Nemesis(env, pg)
    nemesis.run(schedule(seed, seconds), seconds)
    clients.wait_progress(BACK)
    clients.stop()
    nemesis.finish()
    log.info(
        "seed %d: %d commits acknowledged over %d connections, the compute was started %d times",
        seed, clients.acknowledged, sum(c.connections for c in clients.clients), nemesis.starts,
    )  # fmt: skip
    clients.check()
    # What only this compute knows is gone with it.
    pg.kill()
    pg.start()
    clients.check()
    lsn = lsn_from_hex(pg.safe_psql(FLUSH_LSN)[0][0])
    for timeline in timelines:
        timeline.wait_committed(lsn)
    assert assert_same_wal(timelines) > 0
    verify_pages(pg)
