"""Benchmark of WAL ingestion: real WAL of a stock server into the open layer of a timeline.

Run from the repository: ``PYTHONPATH=.:test_runner .venv/bin/python
test_runner/performance/bench_ingest.py``. For each workload it prints MB/s of WAL for decoding
alone (with CRC), for ingestion, and for ingestion until all is in a durable layer file.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from batch_unit.ingest_support import SETTINGS, Cluster, read_wal
from batch_unit.workspace import temporary_workspace

from pageserver.import_datadir import import_datadir
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.walingest import WalIngest
from postgres_ffi.control_file import ControlFile, parse_control_file
from postgres_ffi.distrib import find_distrib
from postgres_ffi.versions import VERSIONS
from postgres_ffi.wal_decoder import WalDecoder
from zenith_utils.ids import TenantId, TimelineId

PIECE = 128 << 10  # what a walsender puts into one message

INDEXED = """
create table t (a int, b int, c text);
create index on t (a);
create index on t (b);
create index on t (c);
insert into t select g, (random() * 1e6)::int, md5(g::text) from generate_series(1, 300000) g;
"""
COPY = "copy big from program 'seq 1 4000000'"


def no_redo(needed: Sequence[ReconstructInput]) -> list[bytes]:
    raise AssertionError(f"nothing is read back here, got {needed[0].key.hex()}")


def pgbench(cluster: Cluster, transactions: int) -> None:
    connection = ("-h", cluster.datadir, "-U", "postgres")
    cluster.run("pgbench", *connection, "-i", "-q", "-s", "5", "postgres")
    cluster.run("pgbench", *connection, "-n", "-c", "4", "-t", transactions // 4, "postgres")


@contextlib.contextmanager
def recorded(name: str, transactions: int) -> Iterator[tuple[Path, bytes]]:
    """(data directory before, WAL) of a workload with full_page_writes off, as a compute has."""
    with temporary_workspace() as root:
        cluster = Cluster(find_distrib(), root / "data")
        cluster.run("initdb", "-A", "trust", "-U", "postgres", "-N", "-D", cluster.datadir)
        with (cluster.datadir / "postgresql.conf").open("a") as conf:
            conf.write(SETTINGS + "full_page_writes = off\n")
        shutil.copytree(cluster.datadir, root / "before")
        with cluster.running():
            if name == "TPC-B":
                pgbench(cluster, transactions)
            elif name == "COPY":
                cluster.execute("create table big (a int);\n" + COPY)
            else:
                cluster.execute(INDEXED)
        start = control_file(root / "before").checkpoint_lsn
        yield root / "before", read_wal(cluster, start)


def control_file(datadir: Path) -> ControlFile:
    return parse_control_file((datadir / "global/pg_control").read_bytes())


def pieces(wal: bytes) -> Iterator[memoryview]:
    view = memoryview(wal)
    for start in range(0, len(wal), PIECE):
        yield view[start : start + PIECE]


def measure(name: str, before: Path, wal: bytes, directory: Path) -> None:
    control = control_file(before)
    size = len(wal) / 1e6

    decoder = WalDecoder(control.checkpoint_lsn)
    begin = time.perf_counter()
    count = sum(decoder.scan(piece) for piece in pieces(wal))
    decoding = time.perf_counter() - begin

    settings = StoreSettings(checkpoint_distance=1 << 40, max_open_layer_size=1 << 40)
    repository = Repository(directory / name, TenantId.generate(), settings, no_redo)
    begin = time.perf_counter()
    timeline = import_datadir(repository, TimelineId.generate(), before, control.system_identifier)
    importing = time.perf_counter() - begin
    ingest = WalIngest(DatadirTimeline(timeline, VERSIONS[15]))
    rest = wal[ingest.start_lsn - control.checkpoint_lsn :]
    begin, begin_cpu = time.perf_counter(), time.thread_time()
    for piece in pieces(rest):
        ingest.ingest(piece)
    ingesting, cpu = time.perf_counter() - begin, time.thread_time() - begin_cpu
    timeline.checkpoint()
    total = time.perf_counter() - begin
    repository.shutdown(flush=False)
    print(
        f"{name:<10} {size:7.1f} MB {count:9} records: decode {size / decoding:7.0f} MB/s,"
        f" ingest {size / ingesting:6.0f} MB/s ({count / ingesting / 1e6:.2f} M records/s),"
        f" {size / cpu:.0f} MB per CPU second, to durable layer {size / total:6.0f} MB/s;"
        f" import of initdb {importing * 1e3:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transactions", type=int, default=60000, help="of pgbench")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for name in ("TPC-B", "COPY", "3 indexes"):
        with recorded(name, arguments.transactions) as (before, wal):
            for round_number in range(arguments.rounds):
                directory = before.parent / f"repository{round_number}"
                directory.mkdir()
                measure(name, before, wal, directory)


if __name__ == "__main__":
    main()
