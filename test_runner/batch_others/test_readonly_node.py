"""Read-only nodes at an LSN: where there can be one, and where there cannot."""

from __future__ import annotations

import uuid

import psycopg2
import pytest
from fixtures.storage import Branch
from fixtures.utils import lsn_from_hex, lsn_to_hex
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder


def refusal(env: ZenithEnv, branch: str, lsn: str) -> str:
    """What is said of a node that cannot be; it is gone afterwards."""
    port = str(env.port_distributor.get_port())
    create = ["pg", "create", "refused", "--branch-name", branch, "--lsn", lsn, "--port", port]
    done = env.zenith_cli.raw_cli(create, check_return_code=False)
    if done.returncode == 0:
        done = env.zenith_cli.raw_cli(["pg", "start", "refused"], check_return_code=False)
        env.zenith_cli.raw_cli(["pg", "stop", "refused", "--destroy"])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def first_lsn(env: ZenithEnv, timeline: uuid.UUID) -> str:
    """Where a timeline's history begins: the LSN of its cluster's making."""
    detail = env.pageserver.http_client().timeline_detail(env.initial_tenant, timeline)
    found: str = detail["local"]["initdb_lsn"]
    return found


def test_bounds(zenith_env_builder: ZenithEnvBuilder) -> None:
    """From the first state of the cluster to the newest there are nodes; else the reason is given.

    Who looks for the moment of an accident tries LSNs. One that is too old or too new must be
    refused with the reason, and never answered with the state of some other LSN.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = "wait_lsn_timeout='1 s';pitr_interval='0 s'"
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    storage = Branch.of(main)
    begin = first_lsn(env, storage.timeline)
    main.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    middle = storage.wait_for(main)
    env.zenith_cli.create_branch("branch", "main", ancestor_start_lsn=middle)
    main.safe_psql("INSERT INTO t SELECT generate_series(1001, 1500)")
    newest = storage.wait_for(main)

    node = env.postgres.create_start("main", node_name="first", lsn=begin)
    assert node.safe_psql("SELECT count(*) FROM pg_tables WHERE tablename = 't'") == [(0,)]
    node.stop()
    node = env.postgres.create_start("main", node_name="newest", lsn=newest)
    assert node.safe_psql("SELECT count(*) FROM t") == [(1500,)]
    main.safe_psql("DELETE FROM t WHERE i > 10")
    # A restart does not move it.
    node.stop()
    node.start()
    assert node.safe_psql("SELECT count(*), max(i) FROM t") == [(1500, 1500)]
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        node.safe_psql("CREATE TABLE refused ()")
    node.stop()
    # A branch has its ancestor's past, up to where it begins.
    node = env.postgres.create_start("branch", node_name="of_branch", lsn=middle)
    assert node.safe_psql("SELECT count(*) FROM t") == [(1000,)]
    node.stop()

    before = lsn_to_hex(lsn_from_hex(begin) - 8)
    assert "invalid basebackup lsn" in refusal(env, "main", "0/42")
    assert "invalid basebackup lsn" in refusal(env, "main", before)
    assert "Timed out while waiting for WAL record at LSN F/0" in refusal(env, "main", "F/0")
    assert "Failed to parse Lsn from the request" in refusal(env, "main", "yesterday")
    assert "Found no timeline id for branch name 'nowhere'" in refusal(env, "nowhere", newest)
    storage.wait_for(main)
    storage.do_gc(0)
    assert "invalid basebackup lsn" in refusal(env, "main", newest)
    assert main.safe_psql("SELECT count(*) FROM t") == [(10,)]
