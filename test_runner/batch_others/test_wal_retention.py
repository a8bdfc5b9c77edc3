"""WAL goes from the safekeepers when nobody needs it, and comes back out of object storage."""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from fixtures.postgres import Postgres
from fixtures.safekeeper_wal import SEGMENT, Timeline
from fixtures.utils import child_pids, frozen, lsn_from_hex, wait_until
from fixtures.zenith_env import Safekeeper, ZenithEnv, ZenithEnvBuilder


def start(builder: ZenithEnvBuilder, safekeepers: int = 3, **options: str) -> ZenithEnv:
    """An environment whose safekeepers keep no more WAL than they must, with further options."""
    builder.num_safekeepers = safekeepers
    builder.safekeeper_options = {
        "wal_keep_size": "0",
        "wal_removal_interval": "100ms",
        **options,
    }
    return builder.init_start()


def main_timeline(env: ZenithEnv) -> uuid.UUID:
    """Id of the branch main."""
    return uuid.UUID(dict(env.zenith_cli.list_timelines())["main"])


def on(safekeeper: Safekeeper, timeline: uuid.UUID) -> Timeline:
    """A timeline of the initial tenant on a safekeeper."""
    return Timeline(safekeeper, safekeeper.env.initial_tenant, timeline)


def status(safekeeper: Safekeeper, timeline: uuid.UUID) -> dict[str, Any]:
    """A safekeeper's description of a timeline."""
    return on(safekeeper, timeline).status()


def oldest(safekeeper: Safekeeper, timeline: uuid.UUID) -> int:
    """Where WAL begins on a safekeeper."""
    return lsn_from_hex(status(safekeeper, timeline)["oldest_lsn"])


def wal_begin(safekeeper: Safekeeper, timeline: uuid.UUID) -> int:
    """Where WAL begins on a safekeeper, once it has some: a compute may be up before that."""
    return wait_until(
        lambda: oldest(safekeeper, timeline), what=f"safekeeper {safekeeper.id} to have WAL"
    )


def metric(safekeeper: Safekeeper, name: str) -> int:
    """A number of a safekeeper's metrics page."""
    text = requests.get(f"http://localhost:{safekeeper.port.http}/metrics", timeout=10).text
    match = re.search(rf"^safekeeper_{name}(?:{{.*}})? (\d+)$", text, re.MULTILINE)
    assert match is not None, name
    return int(match[1])


def write(pg: Postgres, count: int) -> int:
    """Fill `count` segments of WAL and insert as many rows; the LSN then."""
    pg.safe_psql("CREATE TABLE IF NOT EXISTS t (i int)")
    for _ in range(count):
        pg.safe_psql("INSERT INTO t SELECT count(*) FROM t")
        pg.safe_psql("SELECT pg_logical_emit_message(true, 'fill', repeat('x', 9000000))")
        pg.safe_psql("SELECT pg_switch_wal()")
    pg.safe_psql("INSERT INTO t SELECT count(*) FROM t")
    return lsn_from_hex(pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0])


def rows(pg: Postgres) -> int:
    """How many rows there are; they are the numbers from 0 on."""
    count, total = pg.safe_psql("SELECT count(*), coalesce(sum(i), 0) FROM t")[0]
    assert total == count * (count - 1) // 2
    return int(count)


def position(env: ZenithEnv, timeline: uuid.UUID, name: str) -> int:
    """An LSN of the pageserver's description of a timeline."""
    detail = env.pageserver.http_client().timeline_detail(env.initial_tenant, timeline)
    return lsn_from_hex(detail["local"][name])


def make_durable(env: ZenithEnv, timeline: uuid.UUID, lsn: int) -> None:
    """Have the pageserver ingest WAL up to an LSN and write it to its disk."""
    wait_until(lambda: position(env, timeline, "last_record_lsn") >= lsn, what="ingestion")
    env.pageserver.safe_psql(f"checkpoint {env.initial_tenant.hex} {timeline.hex}")
    assert position(env, timeline, "disk_consistent_lsn") >= lsn


def wait_removed(safekeeper: Safekeeper, timeline: uuid.UUID, lsn: int) -> None:
    """Until a safekeeper has no segment any more that ends below an LSN.

    It says so before it removes the first one: nobody is to begin to read what goes.
    """
    first = lsn // SEGMENT
    wait_until(
        lambda: (
            oldest(safekeeper, timeline) >= first * SEGMENT
            and min(on(safekeeper, timeline).segments()) >= first
        ),
        what=f"safekeeper {safekeeper.id} to remove WAL",
    )


def wait_stored(safekeeper: Safekeeper, timeline: uuid.UUID, lsn: int) -> None:
    """Until a safekeeper tells that all segments that end below an LSN are in object storage.

    It removes them before it has written that down.
    """
    wait_until(
        lambda: (
            lsn_from_hex(status(safekeeper, timeline)["s3_wal_lsn"]) >= lsn // SEGMENT * SEGMENT
        ),
        what=f"the control file of safekeeper {safekeeper.id} to tell of what is stored",
    )


def wait_held(safekeeper: Safekeeper, timeline: uuid.UUID, holder: str) -> None:
    """Until a safekeeper keeps WAL because of somebody."""
    wait_until(
        lambda: status(safekeeper, timeline)["wal_held_by"] == holder,
        what=f"safekeeper {safekeeper.id} to keep WAL for {holder}",
    )


def test_removed_as_the_pageserver_gets_on(zenith_env_builder: ZenithEnvBuilder) -> None:
    """All safekeepers remove what the pageserver has, and nothing before; restarts work.

    Kept for ever, WAL fills the disks of the safekeepers; removed too early, it is missing
    where it was needed.
    """
    env = start(zenith_env_builder)
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    begin = wal_begin(env.safekeepers[0], timeline)
    lsn = write(pg, 3)
    # The pageserver has it in memory only.
    for safekeeper in env.safekeepers:
        wait_held(safekeeper, timeline, "pageserver")
        assert oldest(safekeeper, timeline) == begin
    make_durable(env, timeline, lsn)
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, lsn)
        wait_until(
            lambda s=safekeeper: metric(s, "wal_segments") == len(on(s, timeline).segments()),  # type: ignore[misc]
            what="the metric to tell what is there",
        )
    assert "wal_keep_size = '0'" in (env.repo_dir / "config").read_text()

    for safekeeper in env.safekeepers:
        safekeeper.kill()
        safekeeper.start()
        assert oldest(safekeeper, timeline) >= lsn // SEGMENT * SEGMENT
    pg.safe_psql("INSERT INTO t SELECT count(*) FROM t")
    pg.stop().start()
    assert rows(pg) == 5


def test_safekeeper_that_was_down_gets_everything(zenith_env_builder: ZenithEnvBuilder) -> None:
    """WAL that a safekeeper lacks is kept by the others until it is back and has it.

    A safekeeper that cannot catch up leaves the others one failure away from standing still.
    """
    env = start(zenith_env_builder)
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    first, second, down = env.safekeepers
    lsn = write(pg, 1)
    make_durable(env, timeline, lsn)
    wait_removed(first, timeline, lsn)
    down.kill()
    end = write(pg, 3)
    make_durable(env, timeline, end)
    # A compute that starts now has none of that WAL.
    pg.stop().start()
    for safekeeper in (first, second):
        wait_held(safekeeper, timeline, "safekeepers")
        assert oldest(safekeeper, timeline) <= lsn
    down.start()
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, end)
    # It counts for the quorum, with all that was committed.
    first.kill()
    pg.safe_psql("INSERT INTO t SELECT count(*) FROM t")
    pg.stop().start()
    assert rows(pg) == 7


def test_pageserver_that_was_away_catches_up(zenith_env_builder: ZenithEnvBuilder) -> None:
    """WAL stays while the pageserver is away, also over restarts of safekeepers.

    What the pageserver has only in memory exists nowhere else: the WAL is its backup.
    """
    env = start(zenith_env_builder)
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    lsn = write(pg, 1)
    make_durable(env, timeline, lsn)
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, lsn)
    # It gets all of it, and dies before any of it is on its disk.
    end = write(pg, 3)
    wait_until(lambda: position(env, timeline, "last_record_lsn") >= end, what="ingestion")
    assert position(env, timeline, "disk_consistent_lsn") < lsn + SEGMENT
    env.pageserver.kill()
    assert end // SEGMENT >= lsn // SEGMENT + 3
    for safekeeper in env.safekeepers:
        safekeeper.kill()
        safekeeper.start()
        wait_held(safekeeper, timeline, "pageserver")
        assert oldest(safekeeper, timeline) <= lsn
    env.pageserver.start()
    make_durable(env, timeline, end)
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, end)
    assert rows(pg) == 6


def make_storage(tmp_path: Path) -> Path:
    """The directory of an object storage, which may go away and come back."""
    storage = tmp_path / "storage"
    storage.mkdir()
    return storage


def copy_pageserver(env: ZenithEnv, copy: Path) -> None:
    """Make a copy of the pageserver's data."""
    env.pageserver.stop()
    shutil.copytree(env.repo_dir / "tenants", copy)
    env.pageserver.start()


def begin_with_copy(env: ZenithEnv, copy: Path) -> tuple[Postgres, uuid.UUID, int]:
    """A node that has written, its timeline and how far; the pageserver has it in a copy, too."""
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    lsn = write(pg, 1)
    make_durable(env, timeline, lsn)
    copy_pageserver(env, copy)
    return pg, timeline, lsn


def put_back(env: ZenithEnv, copy: Path) -> None:
    """Kill the pageserver, and start it with the data of a copy."""
    env.pageserver.kill()
    shutil.rmtree(env.repo_dir / "tenants")
    shutil.move(copy, env.repo_dir / "tenants")
    env.pageserver.start()


def test_old_pageserver_reads_offloaded_wal(
    zenith_env_builder: ZenithEnvBuilder, tmp_path: Path
) -> None:
    """A pageserver that was put back to an old copy of its data gets the WAL since then.

    While the object storage is away it waits.
    """
    storage, away, copy = make_storage(tmp_path), tmp_path / "away", tmp_path / "tenants"
    env = start(zenith_env_builder, wal_offload=storage.as_uri())
    pg, timeline, lsn = begin_with_copy(env, copy)

    end = write(pg, 3)
    make_durable(env, timeline, end)
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, end)
        wait_stored(safekeeper, timeline, end)
    names = [p.name for p in (storage / env.initial_tenant.hex / timeline.hex).iterdir()]
    assert sum(name.endswith(".crc32c") for name in names) * 2 == len(names)
    assert len(names) // 2 >= end // SEGMENT - lsn // SEGMENT

    pg.stop()
    storage.rename(away)
    put_back(env, copy)
    assert position(env, timeline, "last_record_lsn") < end
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(pg.start)
        # The compute's start has the pageserver called, which waits with its safekeeper.
        wait_until(lambda: waiting(env), what="a stream to wait for the object storage")
        assert position(env, timeline, "last_record_lsn") < end // SEGMENT * SEGMENT
        away.rename(storage)
        starting.result()
    assert rows(pg) == 6
    assert sum(metric(s, "fetched_segments") for s in env.safekeepers) >= 3


def waiting(env: ZenithEnv) -> bool:
    """Whether some safekeeper's stream waits for WAL out of the object storage."""
    logs = (s.log_text() for s in env.safekeepers)
    return any(re.search(r"stream to .* waits at .* cannot read file:", log) for log in logs)


def test_safekeeper_recovers_out_of_object_storage(
    zenith_env_builder: ZenithEnvBuilder, tmp_path: Path
) -> None:
    """A safekeeper that comes back gets what its peers have removed meanwhile, and then counts.

    While the object storage is away nothing is committed that depends on it.
    """
    storage, away = make_storage(tmp_path), tmp_path / "away"
    env = start(zenith_env_builder, wal_offload=storage.as_uri())
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    first, second, back = env.safekeepers
    write(pg, 1)
    pg.stop()
    back.kill()
    # To a node whose user has named two of the three, the third one is no reason to keep WAL.
    pg.adjust_for_wal_acceptors(f"localhost:{first.port.pg},localhost:{second.port.pg}")
    pg.start()
    end = write(pg, 3)
    make_durable(env, timeline, end)
    for safekeeper in (first, second):
        wait_removed(safekeeper, timeline, end)
    pg.stop()

    first.kill()
    back.start()
    storage.rename(away)
    pg.adjust_for_wal_acceptors(env.get_safekeeper_connstrs())
    log = pg.state_dir() / "compute.log"
    breaks_off = re.compile(
        rf"recovery of safekeeper localhost:{back.port.pg} breaks off: .*cannot read file:"
    )
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(pg.start)
        wait_until(lambda: breaks_off.search(log.read_text()), what="the recovery to break off")
        assert lsn_from_hex(status(back, timeline)["flush_lsn"]) < end
        assert not starting.done()
        away.rename(storage)
        starting.result()
    assert metric(second, "fetched_segments") >= 3
    assert rows(pg) == 6
    end = write(pg, 1)
    # What it has recovered, and got since, is whole: another compute begins with nothing else.
    second.kill()
    first.start()
    pg.kill()
    pg.start()
    assert rows(pg) == 8
    # It is the WAL that the others had: before it is removed here, each segment is compared.
    second.start()
    pg.safe_psql("INSERT INTO t SELECT count(*) FROM t")
    make_durable(env, timeline, end)
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, end)


def test_replaced_safekeeper_serves_wal_it_never_had(
    zenith_env_builder: ZenithEnvBuilder, tmp_path: Path
) -> None:
    """A pageserver that is far behind gets its WAL through an empty safekeeper of later, too.

    After a replacement nobody should have to know which WAL came before it.
    """
    storage, copy = make_storage(tmp_path), tmp_path / "tenants"
    env = start(zenith_env_builder, wal_offload=storage.as_uri())
    pg, timeline, lsn = begin_with_copy(env, copy)
    end = write(pg, 2)
    make_durable(env, timeline, end)
    first, second, third = env.safekeepers
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, end)
    second.kill()
    shutil.rmtree(second.data_dir)
    # It keeps WAL where the one before kept it.
    env.zenith_cli.raw_cli(["safekeeper", "replace", "2", "--id", "2"])
    pg.stop().start()
    # Its log began inside a segment, which the others store.
    begin = wal_begin(second, timeline)
    assert begin > lsn
    end = write(pg, 2)
    make_durable(env, timeline, end)
    wait_removed(second, timeline, end)
    pg.stop()

    for safekeeper in (first, third):
        safekeeper.kill()
    put_back(env, copy)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(pg.start)
        wait_until(
            lambda: position(env, timeline, "last_record_lsn") >= end,
            what="the pageserver to catch up",
        )
        assert metric(second, "fetched_segments") >= end // SEGMENT - lsn // SEGMENT
        assert not starting.done()
        first.start()
        starting.result()
    assert rows(pg) == 8


@contextlib.contextmanager
def suspended(pg: Postgres) -> Iterator[None]:
    """All processes of a node are stopped (SIGSTOP)."""
    # A postmaster that is stopped starts no more children, but some may be ending.
    pids = [pg.supervisor_pid(), pg.postmaster_pid()]
    with frozen(*pids), frozen(*child_pids(pids[1])):
        yield


def test_hot_standby_whose_wal_is_gone(zenith_env_builder: ZenithEnvBuilder) -> None:
    """It begins anew when it is started; one that runs ends, and says that this is the remedy.

    One that hung on in silence would show ever older data as if it were new.
    """
    env = start(zenith_env_builder, safekeepers=1)
    (safekeeper,) = env.safekeepers
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    write(pg, 1)
    standby = env.postgres.create_start("main", node_name="replica", hot_standby=True)
    assert rows(standby) == 2

    def remove_wal() -> None:
        lsn = write(pg, 2)
        make_durable(env, timeline, lsn)
        wait_removed(safekeeper, timeline, lsn)

    standby.stop()
    remove_wal()
    standby.start()
    assert rows(standby) == 5
    with suspended(standby):
        # Its connection would keep the WAL that it needs.
        safekeeper.kill()
        safekeeper.start()
        remove_wal()
    # Its supervisor looks twice, some seconds apart, when Postgres is not just trying.
    standby.wait_crashed(timeout=120)
    said = env.zenith_cli.raw_cli(["pg", "list"]).stderr
    assert "replica: the WAL at " in said
    assert "has been removed from the safekeepers" in said
    assert "start it again" in said
    standby.start()
    assert rows(standby) == 8
