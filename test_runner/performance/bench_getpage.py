"""Latency and throughput of GetPage over TCP, against pageservers of its own.

Pages that are an image, and pages that are an image and ten records (read without the page cache):
alone, below 50 L0 deltas without them, on a branch of the tenth generation, and while the
pageserver takes in WAL as fast as it can, flushes small layers and compacts.

Run from the repository: ``PYTHONPATH=.:test_runner .venv/bin/python
test_runner/performance/bench_getpage.py``. Prints one line per measurement. The client is plain
Python in a process of its own and its time is part of the numbers; the CPU seconds of the
pageserver alone are given too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
from batch_unit.pageserver_support import (
    PageClient,
    Pageserver,
    Postgres,
    materialise,
    scratch_directory,
    settings_for,
    wait_until,
)
from fixtures.utils import stat_fields
from performance.store_workload import MIB, load_average, percentiles, times_us

from postgres_ffi.distrib import find_distrib
from postgres_ffi.relfile import RelTag
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

PG_ATTRIBUTE = RelTag(1663, 5, 1249, 0)
L0_DELTAS = 50
GENERATIONS = 10
ROWS = 100_000
MIB_OF_WAL_PER_ROW = 190 / MIB
# Few bytes of L0 deltas stay as they are then, however many deltas that is.
NO_COMPACTION = "compaction_threshold=1000"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is done."""

    reads: int
    record_reads: int
    batches: int
    ingest_mib: int


FULL = Sizes(reads=5000, record_reads=2000, batches=300, ingest_mib=800)
QUICK = Sizes(reads=500, record_reads=200, batches=30, ingest_mib=60)


def report(name: str, value: float, unit: str) -> None:
    print(f"{name:<62} {value:12.1f} {unit}", flush=True)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = stat_fields(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / TICKS


def report_times(name: str, times: list[float]) -> None:
    p50, p99 = percentiles(times)
    report(f"{name} p50", p50, "us")
    report(f"{name} p99", p99, "us")


def latency(
    name: str, server: Pageserver, action: Callable[[int], object], blocks: int, rounds: int
) -> None:
    """Of a read of random blocks, by one client."""
    rng = random.Random(1)
    wanted = [rng.randrange(blocks) for _ in range(rounds)]
    action(0)
    begin = cpu_seconds(server.pid)
    report_times(name, times_us(action, wanted))
    report(f"{name} CPU", (cpu_seconds(server.pid) - begin) / rounds * 1e6, "us")


def throughput(name: str, client: PageClient, rel: RelTag, count: int, lsn: int, n: int) -> None:
    """Pages per second with batches of 64, four of them on the way."""
    request = struct.pack(">BBQIIIBI", 10, 0, lsn, *rel, 0)
    requests = [
        request[:-4] + struct.pack(">II", blkno, min(64, count - blkno))
        for blkno in range(0, count, 64)
    ]
    expected = 0
    start = time.perf_counter()
    for sent in range(n + 4):
        if sent < n:
            client.conn.send_copy_data(requests[sent % len(requests)])
        if sent >= 4:
            reply = client.conn.recv_copy_data(timeout=30)
            assert reply is not None and reply[0] == 110
            expected += (len(reply) - 5) // 8192
    report(name, expected / (time.perf_counter() - start), "pages/s")


@contextlib.contextmanager
def running(path: Path, *overrides: str) -> Iterator[tuple[Pageserver, TenantId, TimelineId]]:
    server = Pageserver(path / "ps", *overrides)
    server.start()
    try:
        tenant = server.create_tenant()
        yield server, tenant, server.create_timeline(tenant)
    finally:
        server.stop(signal.SIGKILL)


@contextlib.contextmanager
def page_client(server: Pageserver, tenant: TenantId, timeline: TimelineId) -> Iterator[PageClient]:
    client = PageClient(server, tenant, timeline)
    try:
        yield client
    finally:
        client.close()


def bench_images(path: Path, sizes: Sizes) -> None:
    """A timeline as it was created."""
    with running(path) as (server, tenant, timeline):
        lsn = server.last_record_lsn(tenant, timeline)
        with page_client(server, tenant, timeline) as client:
            count = client.nblocks(PG_ATTRIBUTE, lsn)
            latency(
                "image page",
                server,
                lambda blkno: client.page(PG_ATTRIBUTE, blkno, lsn),
                count,
                sizes.reads,
            )
            latency(
                "relation size", server, lambda _: client.nblocks(PG_ATTRIBUTE, lsn), 1, sizes.reads
            )
            name = "image pages in batches of 64"
            throughput(name, client, PG_ATTRIBUTE, count, lsn, sizes.batches)
        start = time.perf_counter()
        size = len(server.basebackup(tenant, timeline))
        report("base backup", (time.perf_counter() - start) * 1000, "ms")
        report("base backup", size / 1e6, "MB")


def operations(server: Pageserver) -> dict[str, float]:
    """How often the store has done what, in the life of the process."""
    text = requests.get(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10).text
    counts: dict[str, float] = defaultdict(float)
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if name == "pageserver_storage_time_count":
            counts[re.findall(r'operation="([^"]*)"', labels)[0]] += float(value)
    return dict(counts)


class Scene:
    """A pageserver, a compute that streams to it, and a table with ten records on each page."""

    def __init__(
        self, server: Pageserver, tenant: TenantId, timeline: TimelineId, postgres: Postgres
    ) -> None:
        self.server = server
        self.tenant = tenant
        self.timeline = timeline
        self.postgres = postgres
        self.image_blocks, self.blocks = 0, 0
        self.table = PG_ATTRIBUTE

    def make_table(self) -> None:
        """The table, in durable layers."""
        execute = self.postgres.execute
        execute("create table t (a int, b int) with (fillfactor = 50)")
        with contextlib.closing(self.postgres.connect()) as connection:
            rows = io.StringIO("".join(f"{a}\t0\n" for a in range(ROWS)))
            connection.cursor().copy_from(rows, "t")
        self.blocks, per_page = execute(
            "select pg_relation_size('t') / 8192,"
            " (select count(*) from t where (ctid::text::point)[0] = 0)"
        )[0]
        for _ in range(10):
            # One row of every page: a record for each page.
            execute(f"update t set b = b + 1 where a % {per_page} = 0")
        self.table = RelTag(1663, 5, execute("select pg_relation_filenode('t')")[0][0], 0)
        execute("create table other (a int, b int, c text)")
        self.checkpoint()

    def wait_caught_up(self) -> None:
        """Until the pageserver has all WAL."""
        end = self.wal_end()
        wait_until(lambda: self.position() >= end, "the WAL", deadline=300)

    def wal_end(self) -> Lsn:
        """Where the compute's WAL ends."""
        return Lsn.parse(self.postgres.execute("select pg_current_wal_flush_lsn()")[0][0])

    def position(self, timeline: TimelineId | None = None) -> Lsn:
        """Where the pageserver is."""
        return self.server.last_record_lsn(self.tenant, timeline or self.timeline)

    def checkpoint(self) -> None:
        """Everything is in a layer file then."""
        self.wait_caught_up()
        self.server.query(f"checkpoint {self.tenant} {self.timeline}")

    def l0_deltas(self) -> int:
        """How many there are."""
        timelines = self.server.workdir / "tenants" / str(self.tenant) / "timelines"
        return len(list((timelines / str(self.timeline)).glob(f"{'0' * 36}-{'F' * 36}__*-*")))

    def receive(self) -> None:
        """The pageserver begins to take WAL from the compute."""
        conninfo = self.postgres.conninfo()
        self.server.query(f"callmemaybe {self.tenant} {self.timeline} {conninfo}")

    def measure(self, what: str, timeline: TimelineId, sizes: Sizes) -> None:
        """Reads of images and of pages with records at the last record."""
        lsn = self.position(timeline)
        with page_client(self.server, self.tenant, timeline) as client:
            blocks = client.nblocks(PG_ATTRIBUTE, lsn)
            for kind, rel, count, rounds in (
                ("image page", PG_ATTRIBUTE, blocks, sizes.reads),
                ("page with 10 records", self.table, self.blocks, sizes.record_reads),
            ):
                latency(
                    f"{kind}{what}",
                    self.server,
                    lambda blkno, rel=rel: client.page(rel, blkno, lsn),  # type: ignore[misc]
                    count,
                    rounds,
                )
            name = f"pages with 10 records{what}, batches of 64"
            throughput(name, client, self.table, self.blocks, lsn, sizes.batches)


@contextlib.contextmanager
def scene(path: Path, *overrides: str) -> Iterator[Scene]:
    distrib = find_distrib()
    with running(path, "page_cache_size=0", *overrides) as (server, tenant, timeline):
        with page_client(server, tenant, timeline) as client:
            archive = server.basebackup(tenant, timeline)
            materialise(archive, path / "data", client, distrib)
        settings = settings_for(tenant, timeline, autovacuum="off", max_wal_size="4GB")
        postgres = Postgres(distrib, path / "data", settings)
        postgres.start()
        try:
            made = Scene(server, tenant, timeline, postgres)
            made.receive()
            made.make_table()
            yield made
        finally:
            postgres.stop(signal.SIGQUIT)


def bench_layers(path: Path, sizes: Sizes) -> None:
    """Pages with records; then below many layers; then on a branch of many generations."""
    with scene(path, NO_COMPACTION) as made:
        made.measure("", made.timeline, sizes)
        for number in range(L0_DELTAS):
            made.postgres.execute(f"insert into other select {number}, 0, 'x'")
            made.checkpoint()
        deltas = made.l0_deltas()
        assert deltas >= L0_DELTAS, f"{deltas} L0 deltas, the others were merged"
        made.measure(f", {L0_DELTAS} L0 deltas", made.timeline, sizes)
        branch = made.timeline
        for _ in range(GENERATIONS):
            branch = made.server.create_timeline(made.tenant, ancestor=branch)
        made.measure(f", generation {GENERATIONS}", branch, sizes)


def bench_ingest(path: Path, sizes: Sizes) -> None:
    """Reads while WAL that a compute has made before comes in, with flushes and compaction."""
    overrides = (
        f"checkpoint_distance={16 * MIB}",
        "compaction_threshold=3",
        "compaction_period='100 ms'",
        f"gc_horizon={64 * MIB}",
        "gc_period='1 s'",
        "pitr_interval='0 s'",
    )
    with scene(path, *overrides) as made:
        made.server.stop()
        rows = int(sizes.ingest_mib / MIB_OF_WAL_PER_ROW / 3)
        made.postgres.execute(
            f"insert into other select i, 0, repeat('x', 60) from generate_series(1, {rows}) i"
        )
        made.postgres.execute("create index on other (a)")
        made.postgres.execute("update other set b = 1")
        made.server.start()
        end = made.wal_end()
        size = (end - made.position()) / 1e6
        measure_during_ingest(made, end, size)


def measure_during_ingest(made: Scene, end: Lsn, size: float) -> None:
    """Both kinds of pages in turn, at the last record, until the WAL has been ingested."""
    rng = random.Random(1)
    times: dict[RelTag, list[float]] = {PG_ATTRIBUTE: [], made.table: []}
    server = made.server
    with page_client(server, made.tenant, made.timeline) as client:
        blocks = {made.table: made.blocks}
        blocks[PG_ATTRIBUTE] = client.nblocks(PG_ATTRIBUTE, 1, latest=True)
        for rel in times:
            client.page(rel, 0, 1, latest=True)
        begin, begin_cpu = time.perf_counter(), cpu_seconds(server.pid)
        made.receive()
        while made.position() < end:
            for rel, of_rel in times.items():
                wanted = [rng.randrange(blocks[rel]) for _ in range(100)]
                of_rel += times_us(lambda n, rel=rel: client.page(rel, n, 1, latest=True), wanted)  # type: ignore[misc]
        took, cpu = time.perf_counter() - begin, cpu_seconds(server.pid) - begin_cpu
    report("WAL ingested during the reads", size, "MB")
    report("WAL ingested during the reads", size / took, "MB/s")
    report("pageserver's CPUs during the reads", cpu / took, "")
    for name, rel in (("image page", PG_ATTRIBUTE), ("page with 10 records", made.table)):
        report_times(f"{name} during ingest and compaction", times[rel])
    for operation, count in operations(server).items():
        report(f"{operation}, since the start of the pageserver", count, "times")


def main() -> None:
    """All measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the reads and of the WAL")
    parser.add_argument(
        "--only", choices=("images", "layers", "ingest"), help="one group of measurements"
    )
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    benches = {"images": bench_images, "layers": bench_layers, "ingest": bench_ingest}
    for name, bench in benches.items():
        if options.only in (None, name):
            with scratch_directory() as path:
                print(f"{name}: {load_average()}")
                bench(path, sizes)


if __name__ == "__main__":
    main()
