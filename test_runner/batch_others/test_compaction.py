"""Compaction under a living Postgres: every state stays what it was, files stay few."""

from __future__ import annotations

import contextlib
import re
import threading

from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnvBuilder

# As much work as possible: a layer for every 256 KB of WAL.
BUSY = (
    "checkpoint_distance=262144;compaction_period='20 ms';compaction_threshold=3;"
    "image_creation_threshold=2;compaction_target_size=1048576;gc_period='50 ms'"
)
SUMS = "SELECT count(*), sum(abalance), sum(touched) FROM accounts"


def write(pg: Postgres, rounds: int) -> list[tuple[str, tuple[object, ...]]]:
    """Transactions on a table and its index; the sums after some of them, with their LSNs."""
    states = []
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        for number in range(rounds):
            cur.execute(
                "UPDATE accounts SET abalance = abalance + %s, touched = touched + 1"
                " WHERE id %% 97 = %s",
                (number, number % 97),
            )
            if number % 20 == 19:
                cur.execute("DELETE FROM accounts WHERE id %% 1000 = %s", (number,))
                cur.execute("VACUUM accounts")
                cur.execute(SUMS)
                row = cur.fetchone()
                cur.execute(FLUSH_LSN)
                states.append((cur.fetchone()[0], row))
    return states


def accounts(pg: Postgres, rows: int = 20000) -> None:
    """The table that is worked on."""
    pg.safe_psql("CREATE TABLE accounts (id int PRIMARY KEY, abalance int, touched int, f text)")
    pg.safe_psql(
        f"INSERT INTO accounts SELECT i, 0, 0, repeat('f', 80) FROM generate_series(1, {rows}) i"
    )


def test_every_state_survives(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Merged and imaged while it is written, history is what it was; then restarted, then read.

    Compaction rewrites all that there is: a version that it leaves out, or a deletion that it
    revives, is history falsified for good.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = f"{BUSY};gc_horizon=0"
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    accounts(pg)
    states = write(pg, 120)
    branch = Branch.of(pg)
    branch.wait_for(pg)
    branch.checkpoint()
    kinds = {kind(name) for name in branch.layers()}
    assert {"delta", "image"} <= kinds, branch.layers()
    env.pageserver.kill()
    env.pageserver.start()
    for number, (lsn, row) in enumerate(states[::2]):
        node = env.postgres.create_start("main", node_name=f"at{number}", lsn=lsn)
        assert node.safe_psql(SUMS) == [row]
        node.stop()
    assert pg.safe_psql(SUMS) == [states[-1][1]]
    verify_pages(pg)


def test_files_stay_few(zenith_env_builder: ZenithEnvBuilder) -> None:
    """With history bounded so is the number of layers, and the space they take.

    A store that only grows fills its disk, and each file more slows every read down.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = f"{BUSY};gc_horizon=1048576;pitr_interval='0 s'"
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    accounts(pg, 5000)
    branch = Branch.of(pg)
    pg.stop()
    pg.start()
    sizes = []
    for _ in range(4):
        write(pg, 80)
        branch.wait_for(pg)
        # The rest is due when the timeline has come to rest.
        branch.checkpoint()
        wait_until(
            lambda: sum(kind(name) != "image" for name in branch.layers()) < 12,
            what=f"few deltas in {list(branch.layers())}",
        )
        sizes.append(branch.size())
    assert sizes[-1] < 2 * sizes[0] + (8 << 20), sizes
    verify_pages(pg)


def test_readers_do_not_notice(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Cold reads and branches while layers come and go under them.

    Files are replaced while they are read: a reader caught in between would see an error, or a
    page of the wrong time.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = (
        f"{BUSY};gc_horizon=262144;pitr_interval='0 s';max_file_descriptors=5;page_cache_size=64"
    )
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    accounts(pg)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            write(pg, 20)

    writer = threading.Thread(target=work)
    writer.start()
    try:
        for number in range(6):
            env.zenith_cli.create_branch(f"branch{number}", "main")
            node = env.postgres.create_start(f"branch{number}")
            node.safe_psql("SET enable_seqscan = off; SELECT sum(id) FROM accounts WHERE id > 0")
            found = node.safe_psql(SUMS)
            node.safe_psql("UPDATE accounts SET touched = touched")
            assert node.safe_psql(SUMS) == found
            node.stop()
    finally:
        stop.set()
        writer.join()
    verify_pages(pg)
    log = (env.repo_dir / "pageserver.log").read_text()
    errors = re.findall(r".* (?:ERROR|CRITICAL) .*", log)
    assert not errors, errors[:5]


def test_metrics_of_the_work(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Layers are counted and the work on them is timed, for each timeline.

    They are how an operator tells a store that keeps up from one that falls behind.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = f"{BUSY};gc_horizon=0"
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    accounts(pg)
    write(pg, 20)
    branch = Branch.of(pg)
    branch.wait_for(pg)
    branch.checkpoint()
    branch.do_gc(0)
    metrics = env.pageserver.http_client().get_metrics()
    labels = f'tenant_id="{branch.tenant.hex}",timeline_id="{branch.timeline.hex}"'
    for operation in ("layer flush", "compact", "create images", "gc"):
        line = f'pageserver_storage_time_count{{operation="{operation}",{labels}}} '
        assert any(x.startswith(line) and float(x.split()[-1]) > 0 for x in metrics.splitlines())
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[:1] != "#")

    def counted() -> bool:
        """Whether the metric tells what is there: compaction goes on."""
        text = env.pageserver.http_client().get_metrics()
        (number,) = re.findall(r"^pageserver_ondisk_layers (\d+)$", text, re.MULTILINE)
        return int(number) >= len(branch.layers()) - 2

    wait_until(counted, what="the metric to tell of the layers")
    assert 0 < int(values["pageserver_open_layer_files"]) <= 100
    assert int(values["pageserver_wal_records_replayed"]) > 0
    assert float(values[f"pageserver_getpage_reconstruct_time_count{{{labels}}}"]) > 0


def kind(name: str) -> str:
    """Of a layer file: delta, image."""
    return "delta" if "-" in name.partition("__")[2] else "image"
