"""WAL that was acknowledged reaches the pageserver's disk, whatever dies and with no compute there.

Then everybody rests: no stream, no calls.
"""

from __future__ import annotations

import re
import time
import uuid

import pytest
import requests
from fixtures.postgres import Postgres
from fixtures.storage import ACKNOWLEDGED
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import Safekeeper, ZenithEnv, ZenithEnvBuilder

ROWS = 5000


def write_rows(pg: Postgres, first: int) -> int:
    """Insert ROWS rows from `first` on; the LSN up to which commits were acknowledged."""
    pg.safe_psql("CREATE TABLE IF NOT EXISTS t (i int PRIMARY KEY)")
    pg.safe_psql(f"INSERT INTO t SELECT generate_series({first}, {first + ROWS - 1})")
    return lsn_from_hex(pg.safe_psql(ACKNOWLEDGED)[0][0])


def main_timeline(env: ZenithEnv) -> uuid.UUID:
    """Id of the branch main."""
    return uuid.UUID(dict(env.zenith_cli.list_timelines())["main"])


def position(env: ZenithEnv, timeline: uuid.UUID, name: str) -> int:
    """An LSN of the pageserver's description of a timeline."""
    detail = env.pageserver.http_client().timeline_detail(env.initial_tenant, timeline)
    return lsn_from_hex(detail["local"][name])


def metric(safekeeper: Safekeeper, name: str) -> int:
    """A number of a safekeeper's metrics page."""
    text = requests.get(f"http://localhost:{safekeeper.port.http}/metrics", timeout=10).text
    match = re.search(rf"^safekeeper_{name} (\d+)$", text, re.MULTILINE)
    assert match is not None, name
    return int(match[1])


def persisted_commit_lsn(env: ZenithEnv, safekeeper: Safekeeper, timeline: uuid.UUID) -> int:
    """The commit LSN that a safekeeper will know after a crash."""
    path = f"v1/timeline/{env.initial_tenant.hex}/{timeline.hex}"
    status = requests.get(f"http://localhost:{safekeeper.port.http}/{path}", timeout=10)
    return lsn_from_hex(status.json()["commit_lsn"])


def wait_known(env: ZenithEnv, timeline: uuid.UUID, lsn: int) -> None:
    """Until every safekeeper has been told that WAL up to `lsn` is committed.

    The compute tells them right after the acknowledgement; without it only its next start can.
    """
    key = env.initial_tenant.hex, timeline.hex
    for safekeeper in env.safekeepers:
        wait_until(
            lambda s=safekeeper: s.http_client().get_metrics().commit_lsn_inexact[key] >= lsn,  # type: ignore[misc]
            what=f"safekeeper {safekeeper.id} to know the commit LSN",
        )


def wait_delivered(env: ZenithEnv, timeline: uuid.UUID, lsn: int) -> None:
    """Until the pageserver has WAL up to `lsn` on disk and nobody does anything about it."""
    wait_until(
        lambda: position(env, timeline, "last_record_lsn") >= lsn, what="the WAL to be ingested"
    )
    wait_until(
        lambda: position(env, timeline, "disk_consistent_lsn") >= lsn, what="it to be durable"
    )
    for safekeeper in env.safekeepers:
        for name in ("callmemaybe_subscriptions", "pageserver_streams"):
            wait_until(
                lambda s=safekeeper, n=name: metric(s, n) == 0,  # type: ignore[misc]
                what=f"safekeeper {safekeeper.id} to have no {name}",
            )
    receivers = r'^pageserver_live_connections_count{pageserver_connection_kind="wal_receiver"} 0$'
    wait_until(
        lambda: re.search(receivers, env.pageserver.http_client().get_metrics(), re.MULTILINE),
        what="the pageserver to have no stream",
    )


def check_rest(env: ZenithEnv) -> None:
    """After delivery nobody is called any more."""
    calls = [metric(safekeeper, "callmemaybe_calls") for safekeeper in env.safekeepers]
    time.sleep(2.5)  # some periods of calls, to see that none is made
    assert [metric(s, "callmemaybe_calls") for s in env.safekeepers] == calls


@pytest.mark.parametrize("lost", ["received", "never_received"])
def test_pageserver_killed(zenith_env_builder: ZenithEnvBuilder, lost: str) -> None:
    """A pageserver that was killed catches up although the compute was stopped before.

    Else a branch that was put to rest would lack its last commits until somebody happens to
    start it.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    lsn = write_rows(pg, 0)
    if lost == "received":
        wait_until(
            lambda: position(env, timeline, "last_record_lsn") >= lsn, what="the WAL to be ingested"
        )
        assert position(env, timeline, "disk_consistent_lsn") < lsn
        env.pageserver.kill()
        pg.stop()
    else:
        env.pageserver.kill()
        lsn = write_rows(pg, ROWS)
        wait_known(env, timeline, lsn)
        pg.kill()
    env.pageserver.start()
    wait_delivered(env, timeline, lsn)
    # It is on disk now.
    env.pageserver.kill()
    env.pageserver.start()
    assert position(env, timeline, "last_record_lsn") >= lsn
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(ROWS if lost == "received" else 2 * ROWS,)]
    pg.stop()
    wait_delivered(env, timeline, lsn)
    check_rest(env)


def test_everything_killed(zenith_env_builder: ZenithEnvBuilder) -> None:
    """With the daemons alone back, branches and read-only nodes at an acknowledged LSN work.

    After a power cut people look at their data first, by branches and nodes in the past: it
    must be there before any writer is.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    lsn = write_rows(pg, 0)
    text = f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
    for safekeeper in env.safekeepers:
        wait_until(
            lambda s=safekeeper: persisted_commit_lsn(env, s, timeline) >= lsn,  # type: ignore[misc]
            what="the commit LSN to be persisted",
        )
    env.pageserver.kill()
    for safekeeper in env.safekeepers:
        safekeeper.kill()
    pg.kill_supervisor()

    # One safekeeper is enough for the rest; the others come later.
    env.pageserver.start()
    env.safekeepers[1].start()
    env.zenith_cli.create_branch("branch", "main", ancestor_start_lsn=text)
    for number in (0, 2):
        env.safekeepers[number].start()
    branch = env.postgres.create_start("branch")
    assert branch.safe_psql("SELECT count(*), sum(i) FROM t") == [(ROWS, ROWS * (ROWS - 1) // 2)]
    branch.safe_psql("INSERT INTO t VALUES (-1)")
    past = env.postgres.create_start("main", node_name="past", lsn=text)
    assert past.safe_psql("SELECT count(*) FROM t") == [(ROWS,)]
    branch.stop()
    wait_delivered(env, timeline, lsn)


def test_commit_without_safekeepers(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A commit that waits for the flush returns when the pageserver has it on disk.

    Without safekeepers the pageserver's disk is all there is: a session that asks for safety
    must get it there.
    """
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    pg.safe_psql("CREATE TABLE t (i int)")
    with pg.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = on")
        cursor.execute("INSERT INTO t VALUES (1)")
        cursor.execute(ACKNOWLEDGED)
        lsn = lsn_from_hex(cursor.fetchone()[0])
    env.pageserver.kill()
    pg.kill_supervisor()
    env.pageserver.start()
    assert position(env, timeline, "last_record_lsn") >= lsn
    pg.running = False
    pg.start()
    assert pg.safe_psql("SELECT i FROM t") == [(1,)]
