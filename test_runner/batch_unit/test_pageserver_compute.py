"""Stock Postgres servers on base backups, and their WAL on its way back."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from batch_unit.pageserver_support import (
    Pageserver,
    Postgres,
    Root,
    materialise,
    parse_manifest,
    running,
    scratch_directory,
    settings_for,
    tar_files,
    wait_until,
)

from postgres_ffi.control_file import parse_control_file
from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.relfile import RelTag

pytestmark = pytest.mark.timeout(120)
NOBODY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def distrib() -> PgDistrib:
    return find_distrib()


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with running() as root:
        yield root


def test_stock_postgres_runs_on_a_basebackup(root: Root, distrib: PgDistrib, scratch: Path) -> None:
    archive = root.server.basebackup(root.tenant, root.timeline)
    with root.pages() as client:
        materialise(archive, scratch / "data", client, distrib)
    postgres = Postgres(distrib, scratch / "data", {})
    postgres.start()
    try:
        assert postgres.execute("select count(*) from pg_class")[0][0] > 300
        result = postgres.tool(
            "pg_amcheck", "--install-missing", "-d", "postgres", "--heapallindexed"
        )
        assert result.returncode == 0, result.stdout + result.stderr
        postgres.execute("create table t as select generate_series(1, 1000) a", "checkpoint")
        postgres.stop()
        postgres.start()
        assert postgres.execute("select sum(a) from t") == [(500500,)]
    finally:
        postgres.stop(signal.SIGQUIT)


def check_checksums(distrib: PgDistrib, datadir: Path) -> None:
    result = subprocess.run(
        [str(distrib.bin_dir / "pg_checksums"), "--check", "-D", str(datadir)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Bad checksums:  0" in result.stdout


def test_pages_carry_their_checksums(distrib: PgDistrib, scratch: Path) -> None:
    with running("initdb_options=['--data-checksums']") as root:
        postgres = compute(root, distrib, scratch / "one")
        try:
            callmemaybe(root, postgres)
            postgres.execute(
                "create table t as select generate_series(1, 1000) a", "update t set a = a + 1"
            )
            postgres.stop()
        finally:
            postgres.stop(signal.SIGQUIT)
        # Pages as imported and, of the new table and changed catalogs, pages that redo made.
        archive = root.server.basebackup(root.tenant, root.timeline)
        with root.pages() as client:
            manifest = materialise(archive, scratch / "two", client, distrib)
        assert manifest.checksums
        check_checksums(distrib, scratch / "two")


def compute(root: Root, distrib: PgDistrib, datadir: Path) -> Postgres:
    archive = root.server.basebackup(root.tenant, root.timeline)
    with root.pages() as client:
        materialise(archive, datadir, client, distrib)
    settings = settings_for(
        root.tenant,
        root.timeline,
        synchronous_standby_names="pageserver",
        synchronous_commit="remote_write",
        max_prepared_transactions="5",
    )
    postgres = Postgres(distrib, datadir, settings)
    postgres.start()
    return postgres


def callmemaybe(root: Root, postgres: Postgres) -> None:
    root.server.query(f"callmemaybe {root.tenant} {root.timeline} {postgres.conninfo()}")


def test_acknowledged_commits_survive(distrib: PgDistrib, scratch: Path) -> None:
    with running() as root:
        server = root.server
        postgres = compute(root, distrib, scratch / "one")
        try:
            callmemaybe(root, postgres)
            postgres.execute("create table t(a int primary key, b text)")
            assert {"id": str(root.tenant), "state": "Active"} in server.http("GET", "tenant")
            for a in range(20):
                postgres.execute(f"insert into t values ({a}, repeat('x', 500))")
            # The pageserver loses what it has in memory, the compute still has the WAL.
            server.stop(signal.SIGKILL)
            server.start()
            callmemaybe(root, postgres)
            for a in range(20, 40):
                postgres.execute(f"insert into t values ({a}, 'y')")
            postgres.execute("create unlogged table u as select 1 as x")
            relation = postgres.execute("select pg_relation_filenode('u')")[0][0]
            postgres.execute(
                "create tablespace ts location ''", "create table v(a int) tablespace ts"
            )
            postgres.execute(
                "begin", "insert into t values (50, 'prepared')", "prepare transaction 'p'"
            )
            postgres.execute(
                "select pg_replication_origin_create('origin')",
                "select pg_replication_origin_advance('origin', '1/234')",
            )
            postgres.execute("begin", "insert into t values (100, 'z')")
            # A clean stop waits until everything is durable in storage.
            postgres.stop()
        finally:
            postgres.stop(signal.SIGQUIT)
        local = server.local(root.tenant, root.timeline)
        assert local["disk_consistent_lsn"] == local["last_record_lsn"]
        wait_until(partial(logged, server, "the sender ended the stream"), "the end")
        server.stop(signal.SIGKILL)
        server.start()

        archive = server.basebackup(root.tenant, root.timeline)
        files = tar_files(archive)
        assert files[f"base/5/{relation}"] == b""
        assert (
            RelTag(1663, 5, relation, 0)
            not in parse_manifest(files["zenith.manifest"] or b"").sizes
        )
        with root.pages() as client:
            materialise(archive, scratch / "two", client, distrib)
        control = parse_control_file(files["global/pg_control"] or b"")
        assert control.field("max_prepared_xacts") == 5
        second = Postgres(distrib, scratch / "two", {"max_prepared_transactions": "5"})
        second.start()
        try:
            assert second.execute("select gid from pg_prepared_xacts") == [("p",)]
            origins = "select external_id, remote_lsn::text from pg_replication_origin_status"
            assert second.execute(origins) == [("origin", "1/234")]
            assert second.execute("select count(*), max(a) from t") == [(40, 39)]
            assert second.execute("select count(*) from u") == [(0,)]
            second.execute("commit prepared 'p'")
            assert second.execute("select count(*), max(a) from t") == [(41, 50)]
            second.execute("insert into v values (1)", "insert into u values (1)")
            result = second.tool(
                "pg_amcheck", "--install-missing", "-d", "postgres", "--heapallindexed"
            )
            assert result.returncode == 0, result.stdout + result.stderr
        finally:
            second.stop(signal.SIGQUIT)


def test_commits_that_wait_for_the_flush(distrib: PgDistrib, scratch: Path) -> None:
    """They return, and what they wrote has survived; others cause no flush."""
    with running() as root:
        server = root.server
        postgres = compute(root, distrib, scratch / "one")
        try:
            for _ in range(3):
                callmemaybe(root, postgres)
            postgres.execute("create table t(a int primary key)", "create table u(a int)")

            def ten_without_a_flush() -> bool:
                before = server.local(root.tenant, root.timeline)["disk_consistent_lsn"]
                for _ in range(10):
                    # Each takes longer than the pageserver waits before it asks who waits.
                    postgres.execute("select pg_sleep(0.1)", "insert into u values (1)")
                local = server.local(root.tenant, root.timeline)
                return bool(local["disk_consistent_lsn"] == before)

            # One that a busy machine holds up is taken for one that waits for the flush.
            wait_until(ten_without_a_flush, "commits that cause no flush")
            assert logged(server, "streaming WAL from compute")
            # Next to a client that never lets the stream come to rest.
            stopping = threading.Event()
            busy = threading.Thread(target=insert_until, args=(postgres, stopping))
            busy.start()
            try:
                for a in range(3):
                    postgres.execute("set synchronous_commit = on", f"insert into t values ({a})")
            finally:
                stopping.set()
                busy.join()
            postgres.execute("set synchronous_commit = on", "insert into t values (3)")
            server.stop(signal.SIGKILL)
        finally:
            postgres.stop(signal.SIGKILL)
        assert server.log().count("WAL can be had from") == 1
        server.start()
        archive = server.basebackup(root.tenant, root.timeline)
        with root.pages() as client:
            materialise(archive, scratch / "two", client, distrib)
        second = Postgres(distrib, scratch / "two", {})
        second.start()
        try:
            assert second.execute("select a from t order by a") == [(0,), (1,), (2,), (3,)]
        finally:
            second.stop(signal.SIGQUIT)


def insert_until(postgres: Postgres, stopping: threading.Event) -> None:
    with contextlib.closing(postgres.connect()) as connection, connection.cursor() as cursor:
        while not stopping.is_set():
            cursor.execute("insert into u values (1)")


def test_a_crashed_compute_leaves_its_wal(distrib: PgDistrib, scratch: Path) -> None:
    """What was received from a compute is made durable when that is gone."""
    with running() as root:
        server = root.server
        postgres = compute(root, distrib, scratch / "one")
        try:
            callmemaybe(root, postgres)
            postgres.execute("create table t(a int)", "insert into t values (1)")
        finally:
            postgres.stop(signal.SIGKILL)

        def durable() -> bool:
            local = server.local(root.tenant, root.timeline)
            return bool(local["disk_consistent_lsn"] == local["last_record_lsn"] != str(root.lsn))

        wait_until(durable, "the flush")


def logged(server: Pageserver, text: str) -> bool:
    return text in server.log()


def test_wal_of_another_timeline_is_refused(distrib: PgDistrib, scratch: Path) -> None:
    with running() as root:
        server = root.server
        postgres = compute(root, distrib, scratch / "one")
        try:
            branch = server.create_timeline(root.tenant, ancestor=root.timeline)
            other = server.create_timeline(root.tenant)
            for timeline, text in (
                (branch, "its zenith.zenith_timeline is"),
                (other, "this is the WAL of another cluster"),
            ):
                server.query(f"callmemaybe {root.tenant} {timeline} {postgres.conninfo()}")
                wait_until(partial(logged, server, text), "the refusal")
            dashed = "-".join((NOBODY[:8], NOBODY[8:]))
            server.query(
                f"callmemaybe {root.tenant} {branch} host=127.0.0.1 port=1"
                f" options='-c ztimelineid={dashed} ztenantid={root.tenant}'"
            )
            assert server.local(root.tenant, branch)["last_record_lsn"] == str(root.lsn)
        finally:
            postgres.stop(signal.SIGQUIT)
