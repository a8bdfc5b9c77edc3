"""Postgres' own regression tests on a Zenith compute, each followed by the page verifier."""

from __future__ import annotations

import re
import subprocess
import uuid
from pathlib import Path

import pytest
from batch_pg_regress.regress_suite import (
    SETTINGS,
    SuiteRun,
    core_suite,
    isolation_suite,
    run_suite,
)
from batch_pg_regress.slru_files import compare_slrus
from fixtures.log_helper import log
from fixtures.oracle import FirstState, Oracle
from fixtures.page_verifier import access_methods, compare_directory, verify_pages
from fixtures.pg_protocol import PgBin, PgProtocol
from fixtures.postgres import Postgres
from fixtures.regress_sources import regress_sources
from fixtures.utils import lsn_from_hex, lsn_to_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

REGRESSION_DB = "regression"

# Layers are written and maintained again and again while the suite runs.
BUSY_STORAGE = (
    "checkpoint_distance=8388608;compaction_period='1 s';gc_horizon=16777216;gc_period='5 s'"
)


def test_pg_regress_storage(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, test_output_dir: str
) -> None:
    """The tests of the core suite that do most to storage.

    Their expected output is Postgres' own word on what its users may rely on.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=SETTINGS)
    suite = core_suite(
        regress_sources(env.paths.pg_distrib_dir), Path(__file__).with_name("storage_schedule")
    )
    port = env.port_distributor.get_port()
    run_suite(pg, suite, Path(test_output_dir) / "regress", pg_bin=pg_bin, stock_port=port)
    verify_storage(pg)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pg_regress(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, test_output_dir: str
) -> None:
    """The core regression suite; what it leaves survives a kill of the compute.

    Zenith claims to be Postgres: this is Postgres' own definition of that.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = BUSY_STORAGE
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=SETTINGS)
    suite = core_suite(regress_sources(env.paths.pg_distrib_dir))
    port = env.port_distributor.get_port()
    run_suite(pg, suite, Path(test_output_dir) / "regress", pg_bin=pg_bin, stock_port=port)
    dump = without_sequence_values(dump_database(pg, pg_bin))
    methods = access_methods(pg)

    # Killed as soon as its files hold everything: they can be compared as after a clean stop.
    pg.safe_psql("ALTER SYSTEM SET autovacuum = off")
    pg.safe_psql("SELECT pg_reload_conf()")
    wait_until(lambda: not autovacuum_workers(pg), what="autovacuum to stop")
    pg.safe_psql("CHECKPOINT")
    pg.kill()
    timeline = timeline_of(pg)
    end = wait_for_pageserver(env, timeline)
    compare_directory(env, Path(pg.pg_data_dir_path()), timeline.hex, end, methods)

    pg.start()
    assert without_sequence_values(dump_database(pg, pg_bin)) == dump
    check_indexes(pg, pg_bin)
    verify_storage(pg)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("last_test", ["create_index", "brin_multi", "foreign_key"])
def test_pg_regress_killed(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, test_output_dir: str, last_test: str
) -> None:
    """A compute killed in the middle of the suite: what Postgres' own recovery makes of the WAL.

    A crash comes in the middle of everything that Postgres can do; storage must then be what stock
    recovery would have made of it.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.safekeeper_options = {"wal_removal": "off"}  # the oracle begins at the start
    env = zenith_env_builder.init_start()
    first = FirstState(env, Path(test_output_dir) / "first_state")
    pg = env.postgres.create_start("main", config_lines=SETTINGS)
    suite = core_suite(regress_sources(env.paths.pg_distrib_dir))
    with SuiteRun(pg, suite, Path(test_output_dir) / "regress") as run:
        run.wait_for_test(last_test)
        pg.kill()

    pg.start()
    check_indexes(pg, pg_bin)
    dump = dump_database(pg, pg_bin)
    methods = access_methods(pg)
    pg.stop()
    timeline = timeline_of(pg)
    end = wait_for_pageserver(env, timeline)
    port = env.port_distributor.get_port()
    with Oracle(first, env.safekeepers[0], end, pg_bin, port) as oracle:
        assert dump_database(oracle, pg_bin) == dump
        oracle.stop()
        compare_directory(env, oracle.pgdata, timeline.hex, end, methods)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_isolation(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, test_output_dir: str
) -> None:
    """The isolation suite: many sessions, locks and snapshots.

    Commits that wait for a quorum take longer than those it was written for: what sessions see of
    one another must not depend on that.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=SETTINGS)
    suite = isolation_suite(regress_sources(env.paths.pg_distrib_dir))
    port = env.port_distributor.get_port()
    run_suite(pg, suite, Path(test_output_dir) / "isolation", pg_bin=pg_bin, stock_port=port)
    verify_storage(pg)


def verify_storage(pg: Postgres) -> None:
    """Stop a compute; its pages, transaction status and multixacts equal those in storage."""
    verify_pages(pg)
    timeline = timeline_of(pg)
    end = wait_for_pageserver(pg.env, timeline)
    compared = compare_slrus(pg.env, Path(pg.pg_data_dir_path()), timeline, lsn_to_hex(end))
    log.info("%d bytes of SLRUs are equal", compared)


def autovacuum_workers(pg: Postgres) -> bool:
    """Whether autovacuum may still write."""
    query = "SELECT FROM pg_stat_activity WHERE backend_type LIKE 'autovacuum %'"
    return bool(pg.safe_psql(query))


def timeline_of(pg: Postgres) -> uuid.UUID:
    """The timeline that a compute writes."""
    return uuid.UUID(str(pg.spec()["timeline_id"]))


def wait_for_pageserver(env: ZenithEnv, timeline: uuid.UUID) -> int:
    """Wait until the pageserver has all WAL of a compute that no longer runs; its last LSN."""
    status = env.safekeepers[0].http_client().timeline_status
    client = env.pageserver.http_client()

    def end_of_wal() -> int | None:
        flushed = status(env.initial_tenant.hex, timeline.hex).flush_lsn
        detail = client.timeline_detail(env.initial_tenant, timeline)
        lsn: str = detail["local"]["last_record_lsn"]
        return lsn_from_hex(lsn) if lsn == flushed else None

    end = wait_until(end_of_wal, what="the pageserver to have all WAL of the safekeeper")
    assert end is not None
    return end


def check_indexes(pg: Postgres, pg_bin: PgBin) -> None:
    """pg_amcheck of the whole regression database, every heap tuple looked up in its indexes."""
    _run_client(pg, pg_bin, "pg_amcheck", "--install-missing", "--heapallindexed", REGRESSION_DB)


def dump_database(pg: PgProtocol, pg_bin: PgBin) -> list[str]:
    """pg_dump of the regression database, without unlogged contents, which no crash survives."""
    text = _run_client(pg, pg_bin, "pg_dump", "--no-unlogged-table-data", REGRESSION_DB)
    # Each dump has a random key for psql's \restrict.
    return [
        line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))
    ]


def without_sequence_values(dump: list[str]) -> list[str]:
    """A dump to compare across a crash: WAL logs sequence values ahead, some are skipped."""
    return [re.sub(r"^(SELECT pg_catalog\.setval\('[^']*'), .*", r"\1", line) for line in dump]


def _run_client(server: PgProtocol, pg_bin: PgBin, program: str, *arguments: str) -> str:
    command = [f"{pg_bin.pg_bin_path}/{program}", f"--host={server.host}", f"--port={server.port}"]
    done = subprocess.run(
        [*command, f"--username={server.username}", *arguments],
        env={**pg_bin.env, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        log.error("%s", done.stderr)
    assert done.returncode == 0, f"{program} failed: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout
