"""A server that pg_ctl starts, whose WAL goes to safekeepers, without a pageserver."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from fixtures.pg_protocol import PgBin, VanillaPostgres
from fixtures.ports import PortDistributor
from fixtures.proposer_postgres import ProposerPostgres, SafekeeperEnv
from fixtures.utils import lsn_from_hex, wait_until


@pytest.fixture
def safekeeper_env(
    test_output_dir: str, port_distributor: PortDistributor, zenith_pg_bin: PgBin
) -> Iterator[SafekeeperEnv]:
    """Three safekeepers, not started."""
    directory = Path(test_output_dir) / "repo"
    with SafekeeperEnv(directory, port_distributor, zenith_pg_bin, num_safekeepers=3) as env:
        yield env


def test_commits_survive(safekeeper_env: SafekeeperEnv) -> None:
    """Writes wait for a majority of the safekeepers, and are there after kills of everything."""
    env = safekeeper_env.init()
    pg = env.postgres
    assert pg is not None
    for name, value in (
        ("synchronous_standby_names", "walproposer"),
        ("wal_acceptors", env.get_safekeeper_connstrs()),
        ("zenith.page_server_connstring", ""),
        ("fsync", "on"),
    ):
        assert pg.safe_psql(f"SHOW {name}") == [(value,)]
    pg.safe_psql("CREATE TABLE t (i int)")
    pg.safe_psql("INSERT INTO t SELECT generate_series(1, 100)")
    committed = lsn_from_hex(pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0])

    # One safekeeper does not matter; the server and the others are killed and start again.
    env.kill_safekeeper(1)
    pg.safe_psql("INSERT INTO t VALUES (101)")
    pg.kill()
    for number in (2, 3):
        env.kill_safekeeper(number)
        env.start_safekeeper(number)
    assert lsn_from_hex(pg.sync_safekeepers()) > committed
    pg.start()
    assert pg.safe_psql("SELECT sum(i) FROM t") == [(5151,)]
    pg.safe_psql("INSERT INTO t VALUES (102)")

    # A clean stop brings the shutdown checkpoint to the quorum, so the next start adds to it.
    pg.stop("fast")
    env.start_safekeeper(1)
    end = lsn_from_hex(pg.sync_safekeepers())
    pg.start()
    assert pg.safe_psql("SELECT sum(i) FROM t") == [(5253,)]
    pg.safe_psql("DELETE FROM t")
    assert lsn_from_hex(pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0]) > end


def test_no_commit_without_majority(safekeeper_env: SafekeeperEnv) -> None:
    """Without a majority nothing is acknowledged, and no server starts."""
    env = safekeeper_env.init()
    pg = env.postgres
    assert pg is not None
    pg.safe_psql("CREATE TABLE t (i int)")
    env.kill_safekeeper(1)
    env.kill_safekeeper(2)
    with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        ((pid,),) = cursor.fetchall()
        waiting = f"SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = {pid}"

        def terminate() -> None:
            wait_until(lambda: pg.safe_psql(waiting) == [(True,)], what="the commit to wait")
            pg.safe_psql(f"SELECT pg_terminate_backend({pid})")

        thread = threading.Thread(target=terminate)
        thread.start()
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("INSERT INTO t VALUES (1)")
        thread.join()
    pg.stop()
    assert not pg.is_running()


def test_one_directory_writes(safekeeper_env: SafekeeperEnv) -> None:
    """A copy of the directory takes the timeline over; the other is fenced, and stays out."""
    env = safekeeper_env.init()
    first = env.postgres
    assert first is not None
    first.safe_psql("CREATE TABLE t (i int)")
    first.stop()
    second = ProposerPostgres(
        env.repo_dir / "copy",
        env.pg_bin,
        env.timeline_id,
        env.tenant_id,
        "127.0.0.1",
        env.port_distributor.get_port(),
    )
    subprocess.run(["cp", "-a", first.pgdata_dir, second.pgdata_dir], check=True)
    second.create_dir_config(env.get_safekeeper_connstrs())
    first.start()
    first.safe_psql("INSERT INTO t VALUES (1)")
    with pytest.raises(RuntimeError, match=r"lacks WAL of timeline .* another server has written"):
        second.start()
    # A start that was refused had asked for votes: the first is fenced, and may come back.
    wait_until(lambda: not first.is_running(), what="the first server to be ended")
    assert "a newer compute took over this timeline" in first.log_text()
    first.start()
    assert first.safe_psql("SELECT i FROM t") == [(1,)]

    # Of a running server there is no second one in the directory.
    with pytest.raises(RuntimeError, match=r"another server \(PID \d+\) is running"):
        first.start()
    first.safe_psql("INSERT INTO t VALUES (2)")


def test_ordinary_server(
    zenith_pg_bin: PgBin, test_output_dir: str, port_distributor: PortDistributor
) -> None:
    """A cluster whose configuration has nothing of Zenith's is started as it is."""
    directory = Path(test_output_dir) / "vanilla"
    with VanillaPostgres(directory, zenith_pg_bin, port_distributor.get_port()) as pg:
        pg.start()
        assert pg.safe_psql("SHOW config_file") == [(str(directory / "postgresql.conf"),)]
        assert pg.safe_psql("SHOW shared_preload_libraries") == [("",)]
        pg.stop()
        # With a setting of Zenith's, and no safekeepers.
        pg.configure("max_replication_write_lag = 15MB\nshared_preload_libraries = 'zenith'")
        pg.start()
        assert pg.safe_psql("SHOW max_replication_write_lag") == [("15MB",)]
        pg.safe_psql("CREATE TABLE t (i int)")
