"""`postgres --sync-safekeepers`: the quorum agrees on the end of the WAL, whoever is away."""

from __future__ import annotations

import re
import subprocess
import uuid
from pathlib import Path

import pytest
from fixtures.pg_protocol import PgBin
from fixtures.ports import PortDistributor
from fixtures.proposer_postgres import ProposerPostgres
from fixtures.utils import lsn_from_hex, lsn_to_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder
from fixtures.zenith_fixtures import pg_distrib_dir

START = 0x16B9188
RECORD = 64


def proposer(
    env: ZenithEnv, pg_bin: PgBin, directory: Path, wal_acceptors: str | None = None
) -> ProposerPostgres:
    """A directory with a configuration only, of a timeline that nobody has heard of."""
    pg = ProposerPostgres(
        directory, pg_bin, uuid.uuid4(), uuid.uuid4(), "127.0.0.1", env.port_distributor.get_port()
    )
    pg.create_dir_config(wal_acceptors or env.get_safekeeper_connstrs())
    return pg


def append(env: ZenithEnv, pg: ProposerPostgres, number: int, begin: int, **other: object) -> int:
    """Write one record of 64 bytes to a safekeeper's log; the LSN of its end."""
    request = {
        "lm_prefix": "prefix",
        "lm_message": "message",
        "set_commit_lsn": True,
        "term": 2,
        "begin_lsn": begin,
        "epoch_start_lsn": begin,
        "truncate_lsn": begin,
        "send_proposer_elected": True,
        **other,
    }
    answer = env.safekeepers[number].append_logical_message(pg.tenant_id, pg.timeline_id, request)
    end = answer["inserted_wal"]["end_lsn"]
    assert isinstance(end, int)
    return end


def sync(pg: ProposerPostgres, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it as a start of a compute does, with nothing but PGDATA in the environment."""
    return subprocess.run(
        [f"{pg.pg_bin.pg_bin_path}/postgres", "--sync-safekeepers", *arguments],
        env={"PGDATA": pg.pg_data_dir_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_asserted_example(
    zenith_env_builder: ZenithEnvBuilder, zenith_pg_bin: PgBin, tmp_path: Path
) -> None:
    """One record everywhere, committed nowhere: its end is what the quorum agrees on."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = proposer(env, zenith_pg_bin, tmp_path / "pgdata")
    assert pg.sync_safekeepers() == "0/0"
    ends = {append(env, pg, number, START) for number in range(3)}
    assert ends == {START + RECORD}
    assert pg.sync_safekeepers() == lsn_to_hex(START + RECORD) == "0/16B91C8"
    # And again: nothing was written by it.
    done = sync(pg)
    assert (done.returncode, done.stdout) == (0, "0/16B91C8\n")
    for safekeeper in env.safekeepers:
        status = safekeeper.http_client().timeline_status(pg.tenant_id.hex, pg.timeline_id.hex)
        assert lsn_from_hex(str(status.flush_lsn)) == START + RECORD


def test_logs_differ(
    zenith_env_builder: ZenithEnvBuilder, zenith_pg_bin: PgBin, tmp_path: Path
) -> None:
    """The longest log of the newest term wins; all that are there have it afterwards."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = proposer(env, zenith_pg_bin, tmp_path / "pgdata")
    for number in range(3):
        append(env, pg, number, START)
    end = append(env, pg, 1, START + RECORD, send_proposer_elected=False, set_commit_lsn=False)
    env.safekeepers[2].stop(immediate=True)
    assert sync(pg).stdout == f"{lsn_to_hex(end)}\n"
    # A minority that is away is no hindrance, and one that has lost nothing adds nothing.
    env.safekeepers[2].start()
    env.safekeepers[1].stop(immediate=True)
    assert sync(pg).stdout == f"{lsn_to_hex(end)}\n"
    status = env.safekeepers[2].http_client().timeline_status(pg.tenant_id.hex, pg.timeline_id.hex)
    assert lsn_from_hex(str(status.flush_lsn)) == end


def test_majority_is_away(
    zenith_env_builder: ZenithEnvBuilder, zenith_pg_bin: PgBin, tmp_path: Path
) -> None:
    """Without a majority it says so by its deadline, and prints no LSN."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = proposer(env, zenith_pg_bin, tmp_path / "pgdata")
    for number in range(3):
        append(env, pg, number, START)
    for number in (0, 2):
        env.safekeepers[number].stop(immediate=True)
    done = sync(pg, "--timeout=3")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sync-safekeepers: no majority of the safekeepers (localhost:")
    assert "within 3 s" in last
    env.safekeepers[0].start()
    assert sync(pg).stdout == f"{lsn_to_hex(START + RECORD)}\n"


def test_pageserver_becomes_known(
    zenith_env_builder: ZenithEnvBuilder, zenith_pg_bin: PgBin, tmp_path: Path
) -> None:
    """Safekeepers that lack their pageserver's address get it, and WAL arrives there."""
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) i")
    timeline = uuid.UUID(main.safe_psql("SHOW zenith.zenith_timeline")[0][0])
    env.pageserver.kill()
    main.safe_psql("INSERT INTO t VALUES (0)")
    main.stop()
    for safekeeper in env.safekeepers:
        safekeeper.stop(immediate=True)
        (file,) = safekeeper.data_dir.rglob("safekeeper.delivery")
        file.unlink()
        safekeeper.start()
    env.pageserver.start()
    client = env.pageserver.http_client()

    def arrived() -> int:
        detail = client.timeline_detail(env.initial_tenant, timeline)
        return lsn_from_hex(detail["local"]["last_record_lsn"])

    before = arrived()
    pg = ProposerPostgres(
        main.pg_data_dir_path(), zenith_pg_bin, timeline, env.initial_tenant, "127.0.0.1", 1
    )
    lsn = lsn_from_hex(pg.sync_safekeepers())
    assert before < lsn
    wait_until(lambda: arrived() >= lsn, what="WAL at the pageserver")


@pytest.fixture
def lone(
    zenith_pg_bin: PgBin, port_distributor: PortDistributor, tmp_path: Path
) -> ProposerPostgres:
    """A configuration that names a safekeeper that is not there."""
    port = port_distributor.get_port()
    pg = ProposerPostgres(
        tmp_path / "pgdata", zenith_pg_bin, uuid.uuid4(), uuid.uuid4(), "127.0.0.1", port
    )
    pg.create_dir_config(f"127.0.0.1:{port}")
    return pg


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wal_acceptors = ''", "does not set wal_acceptors"),
        ("wal_acceptors = 'localhost:99999'", "wal_acceptors in .*99999"),
        ("wal_acceptors = 'localhost:5454,localhost:5454'", "names a safekeeper twice"),
        ("zenith.zenith_tenant = 'xyz'", "zenith.zenith_tenant in .*xyz"),
        ("zenith.zenith_timeline = ''", "does not set zenith.zenith_timeline"),
        ("wal_acceptors = 'unfinished", "syntax error in .*unfinished"),
        ("!garbage!", "syntax error in .*!garbage!"),
        ("port = 5432 5433", "syntax error in .*5432 5433"),
    ],
)
def test_garbage_in_configuration(lone: ProposerPostgres, line: str, message: str) -> None:
    """It names file and setting, and does not guess."""
    with Path(lone.config_file_path()).open("a") as conf:
        conf.write(f"{line}\n")
    done = sync(lone)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"sync-safekeepers: .*{message}.*\n", done.stderr), done.stderr
    assert lone.config_file_path() in done.stderr


def test_other_modes(lone: ProposerPostgres, tmp_path: Path) -> None:
    """The version is the distribution's to a byte; what there is no directory for is said."""
    program = f"{lone.pg_bin.pg_bin_path}/postgres"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], env={}, capture_output=True, text=True, check=False
        )

    distribs = Path(pg_distrib_dir) / "bin" / "postgres"
    for option in ("-V", "--version", "--help"):
        output = subprocess.run([distribs, option], capture_output=True, text=True, check=True)
        assert run(option).stdout == output.stdout
    done = run("--wal-redo")
    assert done.returncode == 1 and "--wal-redo" in done.stderr
    done = run("--sync-safekeepers")
    assert done.returncode == 2 and "PGDATA is not set" in done.stderr
    done = run("--sync-safekeepers", "-D", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot read {tmp_path}/none/postgresql.conf: No such file" in done.stderr
    done = run("--sync-safekeepers", "--help")
    assert done.returncode == 0 and "PGDATA" in done.stdout
