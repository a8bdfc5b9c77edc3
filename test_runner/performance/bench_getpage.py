"""Latency and throughput of GetPage over TCP, against a pageserver of its own.

Run from the repository: ``PYTHONPATH=.:test_runner .venv/bin/python
test_runner/performance/bench_getpage.py``. Prints one line per measurement. The client is plain
Python in a process of its own and its time is part of the numbers.
"""

from __future__ import annotations

import contextlib
import io
import random
import signal
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from batch_unit.pageserver_support import (
    PageClient,
    Pageserver,
    Postgres,
    materialise,
    scratch_directory,
    settings_for,
    wait_until,
)

from postgres_ffi.distrib import find_distrib
from postgres_ffi.relfile import RelTag
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

PG_ATTRIBUTE = RelTag(1663, 5, 1249, 0)
ROUNDS = 5000
BATCHES = 300


def report(name: str, value: float, unit: str) -> None:
    print(f"{name:<55} {value:12.1f} {unit}")


def percentiles(name: str, action: Callable[[], object], rounds: int = ROUNDS) -> None:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append((time.perf_counter() - start) * 1e6)
    report(f"{name} p50", statistics.median(times), "us")
    report(f"{name} p99", statistics.quantiles(times, n=100)[98], "us")


def throughput(name: str, client: PageClient, rel: RelTag, count: int, lsn: int) -> None:
    """Pages per second with batches of 64, four of them on the way."""
    request = struct.pack(">BBQIIIBI", 10, 0, lsn, *rel, 0)
    requests = [
        request[:-4] + struct.pack(">II", blkno, min(64, count - blkno))
        for blkno in range(0, count, 64)
    ]
    expected = 0
    start = time.perf_counter()
    for sent in range(BATCHES + 4):
        if sent < BATCHES:
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


def bench_images(path: Path) -> None:
    with running(path) as (server, tenant, timeline):
        lsn = server.last_record_lsn(tenant, timeline)
        client = PageClient(server, tenant, timeline)
        count = client.nblocks(PG_ATTRIBUTE, lsn)
        rng = random.Random(1)
        percentiles("image page", lambda: client.page(PG_ATTRIBUTE, rng.randrange(count), lsn))
        percentiles("relation size", lambda: client.nblocks(PG_ATTRIBUTE, lsn))
        throughput("image pages in batches of 64", client, PG_ATTRIBUTE, count, lsn)
        client.close()
        start = time.perf_counter()
        size = len(server.basebackup(tenant, timeline))
        report("base backup", (time.perf_counter() - start) * 1000, "ms")
        report("base backup", size / 1e6, "MB")


def bench_records(path: Path) -> None:
    """Pages that are an image and ten records, read without the page cache."""
    distrib = find_distrib()
    with running(path, "page_cache_size=0") as (server, tenant, timeline):
        client = PageClient(server, tenant, timeline)
        archive = server.basebackup(tenant, timeline)
        materialise(archive, path / "data", client, distrib)
        client.close()
        postgres = Postgres(
            distrib,
            path / "data",
            settings_for(
                tenant,
                timeline,
                autovacuum="off",
                synchronous_standby_names="pageserver",
                synchronous_commit="remote_write",
            ),
        )
        postgres.start()
        try:
            server.query(f"callmemaybe {tenant} {timeline} {postgres.conninfo()}")
            postgres.execute("create table t (a int, b int) with (fillfactor = 50)")
            with contextlib.closing(postgres.connect()) as connection:
                rows = io.StringIO("".join(f"{a}\t0\n" for a in range(100_000)))
                connection.cursor().copy_from(rows, "t")
            blocks, per_page = postgres.execute(
                "select pg_relation_size('t') / 8192,"
                " (select count(*) from t where (ctid::text::point)[0] = 0)"
            )[0]
            for _ in range(10):
                # One row of every page: a record for each page.
                postgres.execute(f"update t set b = b + 1 where a % {per_page} = 0")
            node = postgres.execute("select pg_relation_filenode('t')")[0][0]
            end = Lsn.parse(postgres.execute("select pg_current_wal_flush_lsn()")[0][0])
            wait_until(lambda: server.last_record_lsn(tenant, timeline) >= end, "the WAL")
            server.query(f"checkpoint {tenant} {timeline}")
        finally:
            postgres.stop(signal.SIGQUIT)
        lsn = server.last_record_lsn(tenant, timeline)
        rel = RelTag(1663, 5, node, 0)
        client = PageClient(server, tenant, timeline)
        rng = random.Random(1)
        client.page(rel, 0, lsn)
        percentiles("page with records", lambda: client.page(rel, rng.randrange(blocks), lsn), 2000)
        throughput("pages with records in batches of 64", client, rel, blocks, lsn)
        client.close()


def main() -> None:
    """All measurements."""
    for bench in (bench_images, bench_records):
        with scratch_directory() as path:
            bench(path)


if __name__ == "__main__":
    main()
