"""Postgres' own benchmark, as people run it first on a new database, with its sums checked."""

from __future__ import annotations

import pytest
from fixtures.pg_protocol import PgBin
from fixtures.postgres import Postgres
from fixtures.zenith_env import ZenithEnvBuilder

CLIENTS = 4
TRANSACTIONS = 200  # of each client

# Tables whose balances must add up to that of the history, by the script that has run.
FULL = ("pgbench_accounts abalance", "pgbench_tellers tbalance", "pgbench_branches bbalance")
SIMPLE = ("pgbench_accounts abalance",)


def run(pg: Postgres, pg_bin: PgBin, *options: str) -> None:
    """Run pgbench on the node. Raises CalledProcessError."""
    where = ("-h127.0.0.1", f"-p{pg.port}", "-Uzenith_admin", "postgres")
    pg_bin.run_capture(["pgbench", *options, *where])


def sums(pg: Postgres, tables: tuple[str, ...]) -> set[int]:
    """What the history adds up to, and the balances of these tables."""
    columns = [f"(SELECT sum({t.split()[1]}) FROM {t.split()[0]})" for t in tables]
    ((history, *balances),) = pg.safe_psql(
        f"SELECT (SELECT coalesce(sum(delta), 0) FROM pgbench_history), {', '.join(columns)}"
    )
    return {history, *balances}


@pytest.mark.parametrize("num_safekeepers", [0, 3])
def test_pgbench(zenith_env_builder: ZenithEnvBuilder, pg_bin: PgBin, num_safekeepers: int) -> None:
    """Initialisation in every way, TPC-B, simple updates, selects; money is neither made nor lost.

    It is the first thing that people run to see whether a database works, and its balances show
    each update that is lost or done twice, also on a compute that has storage alone to go by.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    # Data from the client, with foreign keys; then data made by the server.
    run(pg, pg_bin, "-i", "-s1", "-I", "dtgvpf")
    run(pg, pg_bin, "-i", "-s1", "-I", "dtGvp")
    assert pg.safe_psql("SELECT count(*) FROM pgbench_accounts") == [(100_000,)]
    clients = (f"-c{CLIENTS}", "-j2", f"-t{TRANSACTIONS}", "-n")
    run(pg, pg_bin, *clients)
    run(pg, pg_bin, *clients, "-M", "prepared")
    run(pg, pg_bin, "-S", *clients)
    count = "SELECT count(*) FROM pgbench_history"
    assert pg.safe_psql(count) == [(2 * CLIENTS * TRANSACTIONS,)]
    assert len(sums(pg, FULL)) == 1
    # Leaves tellers and branches alone.
    run(pg, pg_bin, "-N", *clients)
    for killed in (False, True):
        if killed:
            pg.kill()
            pg.start()
        assert pg.safe_psql(count) == [(3 * CLIENTS * TRANSACTIONS,)]
        assert len(sums(pg, SIMPLE)) == 1
