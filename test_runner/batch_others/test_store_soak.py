"""A busy Postgres over a store that compacts and forgets as fast as it can, and is killed.

Clients, DDL, branches and read-only nodes at once; in the end every page is what it was in the
compute, every state that can be read agrees with itself, and the files have no flaw.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.log_helper import log
from fixtures.page_verifier import verify_pages
from fixtures.pg_protocol import PgBin
from fixtures.postgres import Postgres
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

GC_HORIZON = 8 << 20
SETTINGS = (
    "checkpoint_distance=2097152;compaction_period='1 s';compaction_threshold=3;"
    f"image_creation_threshold=2;gc_horizon={GC_HORIZON};gc_period='1 s';pitr_interval='0 s'"
)
# What pgbench changes it changes by the same amount in four tables.
SUMS = (
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM"
    " pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta),"
    " 0) FROM pgbench_history)"
)
# More than 128 blocks each: their end is recorded as the end of ranges of keys.
DDL = (
    "CREATE TABLE passing AS SELECT i, repeat('x', 100) AS t FROM generate_series(1, 20000) i",
    "CREATE INDEX ON passing (i)",
    "TRUNCATE passing",
    "INSERT INTO passing SELECT i, repeat('y', 100) FROM generate_series(1, 15000) i",
    "DROP TABLE passing",
    "CREATE DATABASE passing",
    "DROP DATABASE passing",
    "UPDATE kept SET t = md5(t) WHERE i % 10 = 0",
    "VACUUM kept",
)


class Ddl(threading.Thread):
    """Makes and drops tables and databases, and notes where history stood."""

    def __init__(self, pg: Postgres) -> None:
        super().__init__()
        self._pg = pg
        self._end = threading.Event()
        self.lsns: list[str] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        """Until told to end, whole rounds."""
        try:
            with contextlib.closing(self._pg.connect()) as connection, connection.cursor() as cur:
                while not self._end.is_set():
                    for statement in DDL:
                        cur.execute(statement)
                        cur.execute(FLUSH_LSN)
                        self.lsns.append(cur.fetchone()[0])
        except Exception as error:
            self.failure = error

    def stop(self) -> None:
        """End after this round. Raises what went wrong."""
        self._end.set()
        self.join()
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def pgbench(
    pg_bin: PgBin, pg: Postgres, clients: int, seconds: int
) -> Iterator[Callable[[], bool]]:
    """A load of transactions; gives the question whether it still runs. It must end well."""
    command = [
        f"{pg_bin.pg_bin_path}/pgbench",
        *("-n", f"-c{clients}", f"-T{seconds}", "-h127.0.0.1", f"-p{pg.port}", "-Uzenith_admin"),
        "postgres",
    ]
    with Path(pg_bin.log_dir, "pgbench.log").open("w+") as output:
        process = subprocess.Popen(command, env=pg_bin.env, stdout=output, stderr=output)
        try:
            yield lambda: process.poll() is None
            process.wait(seconds + 120)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text
    log.info("%s", text)


def check_node(env: ZenithEnv, branch: str, name: str, lsn: str | None = None) -> None:
    """A node on a branch, or read-only at an LSN, finds sums that agree."""
    node = env.postgres.create_start(branch, node_name=name, lsn=lsn)
    try:
        ((accounts, tellers, branches, history),) = node.safe_psql(SUMS)
        assert accounts == tellers == branches == history, f"{name} at {lsn}"
        assert node.safe_psql("SELECT count(*), count(t) FROM kept") == [(30000, 30000)]
        if lsn is None:
            node.safe_psql("UPDATE pgbench_branches SET bbalance = bbalance + 1")
            node.safe_psql("DROP TABLE kept")
    finally:
        node.stop()


def disturb(env: ZenithEnv, pg: Postgres, number: int) -> None:
    """Branch now, branch in the past, and kill the pageserver, in turn."""
    if number % 3 == 2:
        env.pageserver.kill()
        env.pageserver.start()
        return
    name = f"branch{number}"
    if number % 3 == 1:
        wait_until(lambda: branched_in_the_past(env, pg, name), what=f"{name} in time")
    else:
        env.zenith_cli.create_branch(name, "main")
    check_node(env, name, name)


def branched_in_the_past(env: ZenithEnv, pg: Postgres, name: str) -> bool:
    """Branch a little behind; False if that history was forgotten meanwhile.

    Under full load what is kept is that of a second or two.
    """
    lsn = pg.safe_psql(FLUSH_LSN)[0][0]
    wait_until(lambda: pg.safe_psql(FLUSH_LSN)[0][0] != lsn, what="more WAL")
    try:
        env.zenith_cli.create_branch(name, "main", ancestor_start_lsn=lsn)
    except Exception as error:
        assert "invalid branch start lsn" in str(error)
        assert Branch.of(pg).last_record_lsn() - lsn_from_hex(lsn) >= GC_HORIZON
        return False
    return True


def verify_files(env: ZenithEnv) -> None:
    """The verifier has no complaint about the files of the pageserver, which is stopped."""
    command = [str(env.paths.python), "-m"]
    command += ["pageserver.layered_repository.verify_repository", str(env.repo_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("scale", "clients", "seconds"),
    [
        pytest.param(1, 3, 20, id="short"),
        pytest.param(10, 8, 600, id="long", marks=pytest.mark.slow),
    ],
)
def test_soak(
    zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, scale: int, clients: int, seconds: int
) -> None:
    """pgbench, DDL, branches, nodes in the past and kills at once; small layers, short history.

    Each part of the store is tested alone; what breaks in use breaks where they meet.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = SETTINGS
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum_naptime=5s"])
    pg_bin.run_capture(
        ["pgbench", "-i", f"-s{scale}", "-h127.0.0.1", f"-p{pg.port}", "-Uzenith_admin", "postgres"]
    )
    pg.safe_psql(
        "CREATE TABLE kept AS SELECT i, md5(i::text) AS t FROM generate_series(1, 30000) i"
    )
    branch = Branch.of(pg)
    ddl = Ddl(pg)
    ddl.start()
    sizes = []
    try:
        with pgbench(pg_bin, pg, clients, seconds) as running:
            number = 0
            while running() or number < 4:
                disturb(env, pg, number)
                sizes.append(branch.size())
                number += 1
    finally:
        ddl.stop()
    branch.wait_for(pg)
    newest = branch.last_record_lsn()
    readable = [x for x in ddl.lsns if lsn_from_hex(x) >= newest - GC_HORIZON // 2]
    for number, lsn in enumerate(random.Random(scale).sample(readable, min(3, len(readable)))):
        check_node(env, "main", f"past{number}", lsn)
    databases = pg.safe_psql("SELECT sum(pg_database_size(oid)) FROM pg_database")[0][0]
    verify_pages(pg)
    branch.do_gc(0)
    branch.do_gc(0)
    log.info("sizes %s, at the end %d, databases %d", sizes, branch.size(), databases)
    # The states that branches begin with are kept, each at the price of a copy at most.
    branches = sum(number % 3 != 2 for number in range(len(sizes)))
    assert branch.size() < (branches + 2) * databases + (32 << 20)
    env.pageserver.stop()
    verify_files(env)
    assert not list((Path(env.repo_dir) / "tenants").rglob("*.___temp"))
