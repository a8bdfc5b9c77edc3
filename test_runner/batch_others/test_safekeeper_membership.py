"""Safekeepers that are lost, damaged or wiped, and others that take their place."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_others import test_wal_retention as retention
from fixtures.postgres import Postgres
from fixtures.safekeeper_wal import Timeline, assert_same_wal
from fixtures.storage import Branch
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import Safekeeper, SafekeeperPort, ZenithEnv, ZenithEnvBuilder

SEGMENT_SIZE = 16 << 20
ROWS = 1000


@pytest.fixture
def env(zenith_env_builder: ZenithEnvBuilder) -> ZenithEnv:
    zenith_env_builder.num_safekeepers = 3
    zenith_env_builder.safekeepers_sync = True
    return zenith_env_builder.init_start()


def write(pg: Postgres, batch: int) -> None:
    """Commit a batch of rows."""
    pg.safe_psql("CREATE TABLE IF NOT EXISTS t (batch int, i int)")
    pg.safe_psql(f"INSERT INTO t SELECT {batch}, i FROM generate_series(1, {ROWS}) i")


def check(pg: Postgres, batches: int) -> None:
    """Every batch that was acknowledged is there, whole."""
    rows = pg.safe_psql("SELECT batch, count(*) FROM t GROUP BY 1 ORDER BY 1")
    assert rows == [(batch, ROWS) for batch in range(1, batches + 1)]


def config(env: ZenithEnv) -> dict[str, Any]:
    return tomllib.loads((env.repo_dir / "config").read_text())


def follow_config(env: ZenithEnv) -> None:
    """Let the fixture know the safekeepers that the configuration has now."""
    known = {safekeeper.id: safekeeper for safekeeper in env.safekeepers}
    env.safekeepers = []
    for conf in config(env)["safekeepers"]:
        port = SafekeeperPort(pg=conf["pg_port"], http=conf["http_port"])
        safekeeper = known.get(conf["id"])
        if safekeeper is None or safekeeper.port != port:
            safekeeper = Safekeeper(env=env, port=port, id=conf["id"], running=True)
        env.safekeepers.append(safekeeper)


def replace(env: ZenithEnv, *arguments: str) -> str:
    """Replace a safekeeper by one on ports of this test; what the command says."""
    get_port = env.port_distributor.get_port
    options = ["--pg-port", str(get_port()), "--http-port", str(get_port())]
    done = env.zenith_cli.raw_cli(["safekeeper", "replace", *arguments, *options])
    follow_config(env)
    return done.stdout


def refusal(env: ZenithEnv, *arguments: str) -> str:
    """What a command that must fail says."""
    done = env.zenith_cli.raw_cli(list(arguments), check_return_code=False)
    assert done.returncode == 1, done.stdout
    return done.stderr


def status(safekeeper: Safekeeper, timeline: tuple[str, str]) -> dict[str, Any]:
    """The timeline on a safekeeper."""
    return Timeline(safekeeper, *map(uuid.UUID, timeline)).status()


def timeline_of(env: ZenithEnv) -> tuple[str, str]:
    return env.initial_tenant.hex, uuid.UUID(dict(env.zenith_cli.list_timelines())["main"]).hex


def timeline_dir(safekeeper: Safekeeper, timeline: tuple[str, str]) -> Path:
    return safekeeper.data_dir / timeline[0] / timeline[1]


def wait_equal(env: ZenithEnv, timeline: tuple[str, str]) -> None:
    """Until all are full members with the same WAL."""

    def equal() -> bool:
        states = [status(safekeeper, timeline) for safekeeper in env.safekeepers]
        return (
            not any(s["recovering"] for s in states)
            and len({(s["flush_lsn"], s["acceptor_state"]["term"]) for s in states}) == 1
        )

    wait_until(equal, what="all safekeepers to have the same WAL")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def restart(pg: Postgres) -> None:
    pg.stop()
    pg.start()


def test_replace_one_after_the_other(env: ZenithEnv) -> None:
    """A dead one is replaced by an empty one; then another old one dies for good.

    Machines are lost one by one over years: after each replacement there must be as much safety
    as before it.
    """
    pg = env.postgres.create_start("main")
    write(pg, 1)
    Branch.of(pg).wait_for(pg)
    env.zenith_cli.create_branch("idle", "main")
    idle = env.postgres.create_start("idle")
    write(idle, 2)
    idle.stop()
    env.safekeepers[1].kill()
    shutil.rmtree(env.safekeepers[1].data_dir)
    write(pg, 2)
    said = replace(env, "2")
    assert "branch idle now has safekeepers of generation 1" in said
    assert "zenith pg stop main_pg_node; zenith pg start main_pg_node" in said
    assert [conf["id"] for conf in config(env)["safekeepers"]] == [1, 3, 4]
    # The running compute goes on with a majority of the ones before.
    write(pg, 3)
    conf = (Path(pg.pg_data_dir_path()) / "postgresql.conf").read_text()
    assert f"localhost:{env.safekeepers[-1].port.pg}" in conf
    # Nobody was brought to the new generation yet: one more would be one too many.
    said = refusal(env, "safekeeper", "remove", "1")
    assert "Not established in a later generation yet: main." in said
    restart(pg)
    write(pg, 4)
    timeline = timeline_of(env)
    wait_equal(env, timeline)
    check(pg, 4)
    wait_until(
        lambda: all(status(s, timeline)["established"] == 1 for s in env.safekeepers),
        what="the generation to be established",
    )
    env.safekeepers[0].kill()
    write(pg, 5)
    pg.kill()
    pg.start()
    check(pg, 5)
    replace(env, "1", "--id", "9")
    restart(pg)
    write(pg, 6)
    wait_equal(env, timeline)
    check(pg, 6)
    idle.start()
    check(idle, 2)
    listed = env.zenith_cli.raw_cli(["safekeeper", "list"]).stdout
    assert "generation 2" in listed
    assert config(env)["safekeepers"][0]["instance"] in listed


def test_nothing_is_written_between_replacements_and_a_failure(
    zenith_env_builder: ZenithEnvBuilder,
) -> None:
    """A branch at rest, whose WAL everybody has: new safekeepers are as good as the ones before.

    Most branches are at rest: a replacement must give them their safety back without anybody
    writing to them.
    """
    env = retention.start(zenith_env_builder)
    pg = env.postgres.create_start("main")
    write(pg, 1)
    pg.stop()
    timeline = retention.main_timeline(env)
    end = lsn_from_hex(retention.status(env.safekeepers[0], timeline)["flush_lsn"])
    retention.make_durable(env, timeline, end)
    for safekeeper in env.safekeepers:
        retention.wait_held(safekeeper, timeline, "safekeepers")
    for generation, position in ((1, 2), (2, 0)):
        lost = env.safekeepers[position]
        lost.stop()
        said = replace(env, str(lost.id))
        assert f"branch main now has safekeepers of generation {generation}" in said
    env.safekeepers[1].stop()
    pg.start()
    write(pg, 2)
    check(pg, 2)


def test_stale_configuration_is_refused(env: ZenithEnv) -> None:
    """A compute with the list of before a change gets no votes, and says what to do.

    Two majorities of different lists need not overlap: a compute with the old one could commit
    what the new one never sees.
    """
    pg = env.postgres.create_start("main")
    write(pg, 1)
    # Not what the configuration ever had, so the node does not follow it.
    old = ",".join(f"localhost:{safekeeper.port.pg}" for safekeeper in env.safekeepers[:2])
    replace(env, "3")
    restart(pg)
    write(pg, 2)
    wait_equal(env, timeline_of(env))
    pg.stop()
    pg.adjust_for_wal_acceptors(old)
    said = refusal(env, "pg", "start", "main_pg_node")
    assert "a newer configuration of safekeepers exists" in said
    pg.adjust_for_wal_acceptors(env.get_safekeeper_connstrs())
    pg.start()
    check(pg, 2)


def test_senseless_changes_are_refused(env: ZenithEnv) -> None:
    """What makes no sense is refused, and the configuration stays as it was.

    A slip in such a command could leave a branch without a majority.
    """
    before = config(env)
    taken = str(env.safekeepers[0].port.pg)
    for arguments, message in (
        (["remove", "7"], "could not find safekeeper '7'"),
        (["replace", "7"], "could not find safekeeper '7'"),
        (["add", "--id", "2"], "there is a safekeeper 2 already"),
        (["add", "--pg-port", taken], "belongs to another server of this environment"),
        (["replace", "2", "--id", "2"], "safekeeper 2 is running"),
    ):
        assert message in refusal(env, "safekeeper", *arguments)
    env.safekeepers[1].stop()
    assert "still has its disk" in refusal(env, "safekeeper", "replace", "2", "--id", "2")
    assert config(env) == before
    for number in "23":
        env.zenith_cli.raw_cli(["safekeeper", "remove", number], check_return_code=False)
    assert [conf["id"] for conf in config(env)["safekeepers"]] == [1, 3]
    follow_config(env)


def test_wiped_disk_does_not_vote(env: ZenithEnv) -> None:
    """With one safekeeper wiped and another down there is no election, and nothing is lost.

    One that has forgotten its promises would vote for anybody: with its vote, acknowledged
    commits could be outvoted.
    """
    pg = env.postgres.create_start("main")
    write(pg, 1)
    env.safekeepers[2].kill()
    write(pg, 2)
    pg.stop()
    wiped = env.safekeepers[1]
    wiped.stop()
    shutil.rmtree(wiped.data_dir)
    wiped.data_dir.mkdir()
    # The others start all the same.
    env.safekeepers[0].stop()
    assert "safekeeper '2' start failed" in refusal(env, "start")
    assert env.zenith_cli.raw_cli(["safekeeper", "status", "3"]).returncode == 0
    env.safekeepers[2].kill()
    said = refusal(env, "safekeeper", "start", "2")
    assert "safekeeper 2 has lost its disk" in said
    assert "zenith safekeeper replace 2" in said
    # Started behind the back of the command, it is told apart all the same.
    env.safekeepers[0].kill()
    with started(wiped), starting(pg) as log:
        wait_until(
            lambda: "is not the one the configuration knows" in log.read_text(),
            what="the compute to say that the disk is another one",
        )
        env.safekeepers[2].start()
        wait_until(lambda: ": ready" in log.read_text(), what="one vote")
        env.safekeepers[0].start()
    check(pg, 2)
    replace(env, "2", "--id", "2")
    restart(pg)
    wait_equal(env, timeline_of(env))
    check(pg, 2)


@contextlib.contextmanager
def started(safekeeper: Safekeeper) -> Iterator[None]:
    """A safekeeper that the command does not start, as it listens in the configuration."""
    program = safekeeper.env.paths.zenith_bin / "safekeeper"
    process = subprocess.Popen(
        [
            *(program, "-D", safekeeper.data_dir, "--id", str(safekeeper.id)),
            *("--listen-pg", f"127.0.0.1:{safekeeper.port.pg}"),
            *("--listen-http", f"127.0.0.1:{safekeeper.port.http}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def starting(pg: Postgres) -> Iterator[Path]:
    """The node is being started meanwhile, and has started at the end; its log."""
    log = pg.state_dir() / "compute.log"
    log.write_text("")
    thread = threading.Thread(target=pg.start)
    thread.start()
    try:
        yield log
    finally:
        thread.join()
    assert pg.running


def test_damage_is_repaired_from_peers(env: ZenithEnv) -> None:
    """A bit flips in WAL that was committed long ago, then one in another's control file.

    Bits rot on one disk at a time: the others have the same WAL, and nobody should have to be
    woken for it.
    """
    pg = env.postgres.create_start("main")
    timeline = timeline_of(env)
    write(pg, 1)
    wait_equal(env, timeline)
    first, second = env.safekeepers[0], env.safekeepers[1]
    begin = status(first, timeline)["acceptor_state"]["term_history"][0]["lsn"]
    segment = min(timeline_dir(first, timeline).glob("0000*"))
    # Behind what it knows to be committed, damage may be taken for a torn write.
    Timeline(first, *map(uuid.UUID, timeline)).wait_committed(begin + 8192)
    first.kill()
    flip(segment, begin % SEGMENT_SIZE + 4096)
    first.start()
    write(pg, 2)
    wait_repaired(first, timeline, segment)
    wait_equal(env, timeline)
    control = timeline_dir(second, timeline) / "safekeeper.control"
    second.kill()
    flip(control, 70)
    second.start()
    write(pg, 3)
    wait_repaired(second, timeline, control)
    wait_equal(env, timeline)
    tenant_id, timeline_id = map(uuid.UUID, timeline)
    logs = [Timeline(s, tenant_id, timeline_id) for s in env.safekeepers]
    end = logs[0].flush_lsn
    for log in logs:
        log.wait_committed(end)
    assert assert_same_wal(logs) > 0
    restart(pg)
    check(pg, 3)


def wait_repaired(safekeeper: Safekeeper, timeline: tuple[str, str], damaged: Path) -> None:
    """Until the log says that the timeline is whole again, and what of it was damaged."""
    log = safekeeper.data_dir / "safekeeper.log"
    wait_until(lambda: "is whole again" in log.read_text(), what="the repair")
    assert str(damaged) in log.read_text()
    wait_until(
        lambda: not list(timeline_dir(safekeeper, timeline).glob("damaged-*")),
        what="what was put aside to be removed",
    )


def test_two_of_three_damaged_stay_down(env: ZenithEnv) -> None:
    """With a damaged majority no compute starts, the reason is said, and what there was is kept.

    Going on with the one that is left could drop commits; what is put aside may still be saved.
    """
    pg = env.postgres.create_start("main")
    timeline = timeline_of(env)
    write(pg, 1)
    wait_equal(env, timeline)
    pg.stop()
    saved = []
    for safekeeper in env.safekeepers[:2]:
        safekeeper.kill()
        control = timeline_dir(safekeeper, timeline) / "safekeeper.control"
        saved.append((control, control.read_bytes()))
        flip(control, 70)
        safekeeper.start()
    said = refusal(env, "pg", "start", "main_pg_node")
    assert "no majority of the safekeepers can ever vote for this compute" in said
    assert said.count("was lost or damaged") == 2
    # Nothing is lost: what is put aside is all that there was.
    for (control, content), safekeeper in zip(saved, env.safekeepers, strict=False):
        safekeeper.kill()
        (aside,) = control.parent.glob("damaged-*")
        for path in aside.glob("0000*"):
            path.rename(control.parent / path.name)
        control.write_bytes(content)
        safekeeper.start()
    pg.start()
    check(pg, 1)


def test_lost_safekeepers_are_not_begun_again(env: ZenithEnv) -> None:
    """With all of them gone a compute does not go on from what the pageserver happens to have.

    It may lack the last acknowledged commits: only a person can decide to go on without them.
    """
    pg = env.postgres.create_start("main")
    write(pg, 1)
    # What it has by now is all that there will be.
    Branch.of(pg).wait_for(pg)
    pg.stop()
    for safekeeper in env.safekeepers:
        safekeeper.stop()
        shutil.rmtree(safekeeper.data_dir)
        safekeeper.data_dir.mkdir()
    path = env.repo_dir / "config"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("instance")]
    path.write_text("\n".join(lines) + "\n")
    for safekeeper in env.safekeepers:
        safekeeper.start()
    said = refusal(env, "pg", "start", "main_pg_node")
    assert "the safekeepers have no WAL of timeline" in said
    assert "zenith timeline branch --branch-name NEW" in said
    env.zenith_cli.create_branch("saved", "main")
    check(env.postgres.create_start("saved"), 1)
