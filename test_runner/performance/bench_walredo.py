"""Speed of WAL redo: one page at a time, and in pipelined batches.

Run as a script. Records come from a small workload on a server of its own, so chains are real:
heap updates, btree insertions, and page images as CREATE INDEX logs them, 32 in one record.
"""

import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from pageserver.walredo import RedoRequest, WalRedoPool
from pgxn.build import build_module
from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.relfile import MAIN_FORKNUM, RelTag
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecoder
from zenith_utils.os_user import give, popen_kwargs

BATCH = 64
LENGTHS = (1, 5, 20, 100)
SETTINGS = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "wal_keep_size": "4GB"}
WORKLOAD = (
    "CREATE TABLE t (id int, n int, filler char(80)) WITH (fillfactor = 50);\n\n"
    "INSERT INTO t SELECT g, 0, '' FROM generate_series(1, 4000) g;\n\n"
    + "UPDATE t SET n = n + 1;\n\n"
    * 3
    + "CREATE TABLE keys (id int PRIMARY KEY);\n\n"
    "INSERT INTO keys SELECT g * 7919 % 200003 FROM generate_series(1, 60000) g;\n\n"
    "CREATE INDEX images ON keys USING spgist ((md5(id::text)));\n\n"
)

Chain = list[tuple[int, bytes]]


def record_wal(distrib: PgDistrib, root: Path) -> tuple[bytes, dict[tuple[RelTag, int], Chain]]:
    """Run the workload; the control file and the records of each page since it was made."""
    data = root / "data"

    def run(program: str, *arguments: str, text: str = "") -> None:
        command = [str(distrib.bin_dir / program), *arguments]
        subprocess.run(
            command,
            input=text,
            text=True,
            check=True,
            capture_output=True,
            cwd="/",
            **popen_kwargs(),
        )

    run("initdb", "-N", "-D", str(data))
    control_file = (data / "global/pg_control").read_bytes()
    (start,) = struct.unpack_from("<Q", control_file, 32)
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    run("postgres", "--single", "-j", *options, "-D", str(data), "postgres", text=WORKLOAD)
    (end,) = struct.unpack_from("<Q", (data / "global/pg_control").read_bytes(), 32)

    chains: dict[tuple[RelTag, int], Chain] = {}
    decoder = WalDecoder(start)
    for segno in range(start >> 24, (end >> 24) + 1):
        segment = (data / "pg_wal" / f"00000001{segno >> 8:08X}{segno & 0xFF:08X}").read_bytes()
        decoder.feed(segment[max(start - (segno << 24), 0) :])
        while (record := decoder.next_record()) is not None and record.start_lsn < end:
            for block in record.blocks:
                if block.will_init or block.apply_image:
                    chains[block.rel, block.blkno] = []
                if (block.rel, block.blkno) in chains:
                    chains[block.rel, block.blkno].append((record.end_lsn, record.raw))
            if record.end_lsn >= end:
                break
    return control_file, chains


def requests_of(
    pool: WalRedoPool, chains: dict[tuple[RelTag, int], Chain], rmid: Rmgr, length: int
) -> list[RedoRequest]:
    """Requests of so many records each, on base images made by redo of the records before."""
    found = []
    for (rel, blkno), chain in chains.items():
        split = len(chain) - length
        usable = rel.forknum == MAIN_FORKNUM and split > 0
        if not usable or any(raw[17] != rmid for _, raw in chain[split:]):
            continue
        (base,) = pool.redo([RedoRequest(*rel, blkno, None, chain[:split])])
        found.append(RedoRequest(*rel, blkno, base, chain[split:]))
        if len(found) == BATCH:
            break
    return found


def image_requests(chains: dict[tuple[RelTag, int], Chain]) -> list[RedoRequest]:
    """Pages whose only record is one with the images of many pages."""
    return [
        RedoRequest(*rel, blkno, None, chain)
        for (rel, blkno), chain in chains.items()
        if len(chain) == 1 and chain[0][1][17] == Rmgr.XLOG and len(chain[0][1]) > 50_000
    ][:BATCH]


def measure(pool: WalRedoPool, requests: list[RedoRequest]) -> tuple[float, float, float]:
    """(p50, p99) of one page in microseconds, and pages per second in batches."""
    singles = []
    for i in range(max(2000, len(requests))):
        request = [requests[i % len(requests)]]
        started = time.perf_counter()
        pool.redo(request)
        singles.append((time.perf_counter() - started) * 1e6)
    batch = (requests * (BATCH // len(requests) + 1))[:BATCH]
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(5):
            pool.redo(batch)
        best = min(best, (time.perf_counter() - started) / 5)
    quantiles = statistics.quantiles(singles, n=100)
    return quantiles[49], quantiles[98], BATCH / best


def main() -> None:
    """Print one line per kind of chain."""
    distrib = find_distrib()
    root = Path(tempfile.mkdtemp(prefix="bench-walredo-"))
    root.chmod(0o755)
    give(root)
    try:
        control_file, chains = record_wal(distrib, root)
        pool = WalRedoPool(
            distrib, build_module(distrib, "walredo"), root / "redo", control_file=control_file
        )
        started = time.perf_counter()
        pool.redo([RedoRequest(1663, 1, 1, 0, 0, None, [])])
        print(f"start to first answer: {(time.perf_counter() - started) * 1e3:.0f} ms")
        print(f"{'chain':<18}{'p50 us':>8}{'p99 us':>8}{'pages/s in batches of ' + str(BATCH):>30}")
        cases = [
            (r.name.lower(), n, requests_of(pool, chains, r, n))
            for r in (Rmgr.HEAP, Rmgr.BTREE)
            for n in LENGTHS
        ]
        cases.append(("one image of 32", 1, image_requests(chains)))
        for name, length, requests in cases:
            if requests:
                p50, p99, rate = measure(pool, requests)
                print(f"{f'{name} x {length}':<18}{p50:>8.1f}{p99:>8.1f}{rate:>30,.0f}")
        pool.close()
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
