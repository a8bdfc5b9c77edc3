"""A workload on a stock server: its data directory before and after, and the WAL in between."""

import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pageserver.walredo import RedoRequest
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.distrib import PgDistrib
from postgres_ffi.relfile import MAIN_FORKNUM, RELSEG_SIZE, RelTag, relpath
from postgres_ffi.versions import VERSIONS, Rmgr
from postgres_ffi.wal_decoder import WalDecoder
from zenith_utils.os_user import popen_kwargs

PAGE_SIZE = 8192
SEGMENT_SIZE = 16 << 20
POSTGRES_DB = 5
XLOG_SMGR_TRUNCATE = 0x20

SETUP = """
CREATE TABLE heap (id int PRIMARY KEY, v text, n int) WITH (fillfactor = 70);
INSERT INTO heap SELECT g, repeat('x', g % 50), g % 100 FROM generate_series(1, 3000) g;
CREATE INDEX heap_hash ON heap USING hash (n);
CREATE TABLE docs (id int, words int[]);
CREATE INDEX docs_gin ON docs USING gin (words) WITH (fastupdate = on);
INSERT INTO docs SELECT g, ARRAY[g % 7, g % 131, g] FROM generate_series(1, 500) g;
CREATE TABLE shapes (id int, p point, t text);
CREATE INDEX shapes_gist ON shapes USING gist (p);
CREATE INDEX shapes_spgist ON shapes USING spgist (p);
CREATE INDEX shapes_sptext ON shapes USING spgist (t);
INSERT INTO shapes SELECT g, point(g % 97, g % 89), md5(g::text) FROM generate_series(1, 500) g;
CREATE TABLE log (at int, v text);
CREATE INDEX log_brin ON log USING brin (at) WITH (pages_per_range = 2, autosummarize = off);
INSERT INTO log SELECT g, repeat('y', 100) FROM generate_series(1, 1000) g;
CREATE TABLE big (id int, v text);
ALTER TABLE big ALTER v SET STORAGE external;
CREATE TABLE shrinks (id int);
INSERT INTO shrinks SELECT generate_series(1, 5000);
CREATE SEQUENCE seq;
SELECT nextval('seq');
"""

WORKLOAD = """
INSERT INTO heap SELECT g, repeat('z', g % 70), g % 100 FROM generate_series(3001, 6000) g;
UPDATE heap SET v = v || 'u' WHERE id % 3 = 0;
UPDATE heap SET n = n + 1 WHERE id % 7 = 0;
DELETE FROM heap WHERE id % 5 = 0;
BEGIN; SELECT count(*) FROM (SELECT 1 FROM heap WHERE id < 300 FOR SHARE) s;
 SAVEPOINT a; UPDATE heap SET v = 'multi' WHERE id < 200; SAVEPOINT b;
 SELECT count(*) FROM (SELECT 1 FROM heap WHERE id < 200 FOR UPDATE) s; COMMIT;
BEGIN; DELETE FROM heap WHERE id BETWEEN 400 AND 500; ROLLBACK;
INSERT INTO heap VALUES (1, 'c', 1) ON CONFLICT (id) DO UPDATE SET v = excluded.v;
VACUUM heap;
INSERT INTO heap SELECT g, 'again', g % 100 FROM generate_series(7001, 8000) g;
CREATE INDEX heap_v ON heap (v, n);
DELETE FROM heap WHERE id > 6000;
VACUUM (FREEZE) heap;
INSERT INTO docs SELECT g, ARRAY[g % 7, g % 131, g, g * 3] FROM generate_series(501, 3000) g;
DELETE FROM docs WHERE id % 4 = 0;
VACUUM docs;
INSERT INTO docs SELECT g, ARRAY[5, g] FROM generate_series(3001, 3500) g;
INSERT INTO shapes SELECT g, point(g % 101, g % 103), md5(g::text)
 FROM generate_series(501, 3000) g;
DELETE FROM shapes WHERE id % 2 = 0;
VACUUM shapes;
INSERT INTO shapes SELECT g, point(3, g % 5), repeat('k', g % 30) || g
 FROM generate_series(3001, 3800) g;
INSERT INTO log SELECT g, repeat('y', 100) FROM generate_series(1001, 3000) g;
SELECT brin_summarize_new_values('log_brin');
UPDATE log SET at = at + 100000 WHERE at % 50 = 0;
SELECT brin_desummarize_range('log_brin', 2);
INSERT INTO big SELECT g, repeat(md5(g::text), 400) FROM generate_series(1, 40) g;
UPDATE big SET v = v || 'more' WHERE id % 2 = 0;
DELETE FROM shrinks WHERE id > 500;
VACUUM shrinks;
SELECT count(nextval('seq')) FROM generate_series(1, 100);
CREATE TABLE still (id int, v text);
INSERT INTO still SELECT g, repeat('s', 50) FROM generate_series(1, 4000) g;
VACUUM (FREEZE) still;
CREATE TABLE filled (id int);
COPY filled FROM PROGRAM 'seq 1 2000';
CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY, w int[]);
CREATE INDEX scratch_gin ON scratch USING gin (w);
CREATE INDEX scratch_hash ON scratch USING hash (id);
COPY heap TO '/dev/null';
"""

RELATIONS_QUERY = """
SELECT pg_relation_filenode(c.oid)::text || ' ' || c.relname || ' ' || coalesce(a.amname, 'seq')
 FROM pg_class c LEFT JOIN pg_am a ON a.oid = c.relam WHERE pg_relation_filenode(c.oid) IS NOT NULL;
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """How the recorded cluster is set up."""

    initdb: tuple[str, ...]
    settings: str
    wal_log_hints: bool = False


VARIANTS = {
    # as on a compute: no page images but those that records need, so redo starts from the base
    "no_images": Variant((), "full_page_writes = off"),
    "checksums": Variant(("-k",), "wal_compression = lz4"),
    "hints": Variant((), "wal_compression = pglz\nwal_log_hints = on", wal_log_hints=True),
}

Chain = list[tuple[int, bytes]]


@dataclass
class Recording:
    """A cluster before and after a workload, and the WAL in between."""

    distrib: PgDistrib
    variant: Variant
    before: Path
    after: Path
    control_file: bytes
    kinds: dict[tuple[int, int], tuple[str, str]]  # (dbnode, relnode) -> (name, access method)
    records: list[DecodedRecord] = field(default_factory=list)
    chains: dict[tuple[RelTag, int], Chain] = field(default_factory=lambda: defaultdict(list))

    def page(self, root: Path, rel: RelTag, blkno: int) -> bytes | None:
        """A page of one of the two directories; None if the file or the page does not exist."""
        path = root / relpath(rel, VERSIONS[self.distrib.major], blkno // RELSEG_SIZE)
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(blkno % RELSEG_SIZE * PAGE_SIZE)
            return file.read(PAGE_SIZE) or None

    def request(self, rel: RelTag, blkno: int) -> RedoRequest:
        """What rebuilds the page of the end from the one of the beginning."""
        return redo_request(rel, blkno, self.page(self.before, rel, blkno), self.chains[rel, blkno])

    def kind(self, rel: RelTag) -> tuple[str, str]:
        """Name and access method of the relation at the end."""
        return self.kinds.get((rel.dbnode, rel.relnode), ("?", "?"))

    def pages_of(self, name: str, forknum: int) -> list[tuple[RelTag, int]]:
        """The changed pages of a relation."""
        return sorted(
            key for key in self.chains if key[0].forknum == forknum and self.kind(key[0])[0] == name
        )


def redo_request(
    rel: RelTag, blkno: int, base: bytes | None, records: Sequence[tuple[int, bytes]]
) -> RedoRequest:
    return RedoRequest(rel.spcnode, rel.dbnode, rel.relnode, rel.forknum, blkno, base, records)


def run_sql(distrib: PgDistrib, data: Path, sql: str) -> str:
    """Statements (one per line that ends with a semicolon) in a server of their own."""
    result = subprocess.run(
        [str(distrib.bin_dir / "postgres"), "--single", "-j", "-D", str(data), "postgres"],
        input=sql.replace(";\n", ";\n\n"),
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
        **popen_kwargs(),
    )
    errors = [line for line in result.stderr.splitlines() if "ERROR" in line or "FATAL" in line]
    assert not errors, errors
    return result.stdout


def record(distrib: PgDistrib, variant: Variant, root: Path) -> Recording:
    data = root / "data"
    subprocess.run(
        [str(distrib.bin_dir / "initdb"), "-N", "-A", "trust", "-D", str(data), *variant.initdb],
        check=True,
        capture_output=True,
        cwd="/",
        **popen_kwargs(),
    )
    with (data / "postgresql.conf").open("a") as conf:
        conf.write(
            "fsync = off\nautovacuum = off\nmax_wal_size = 4GB\nwal_keep_size = 4GB\n"
            "checkpoint_timeout = 1d\nlog_min_messages = error\n" + variant.settings + "\n"
        )
    run_sql(distrib, data, SETUP)
    before = root / "before"
    shutil.copytree(data, before, ignore=shutil.ignore_patterns("pg_wal", "postmaster.*"))
    control_file = (data / "global/pg_control").read_bytes()
    run_sql(distrib, data, WORKLOAD)

    recording = Recording(distrib, variant, before, data, control_file, {})
    read_wal(recording)
    output = run_sql(distrib, data, RELATIONS_QUERY)
    for line in output.splitlines():
        if '= "' in line:
            node, name, am = line.split('"')[1].split()
            for dbnode in (0, POSTGRES_DB):
                recording.kinds[dbnode, int(node)] = (name, am)
    return recording


def checkpoint_lsn(control_file: bytes) -> int:
    (lsn,) = struct.unpack_from("<Q", control_file, 32)
    assert isinstance(lsn, int)
    return lsn


def read_wal(recording: Recording) -> None:
    """Decode the WAL from the checkpoint before the workload to the one at its end."""
    start = checkpoint_lsn(recording.control_file)
    end = checkpoint_lsn((recording.after / "global/pg_control").read_bytes())
    decoder = WalDecoder(start)
    for segno in range(start // SEGMENT_SIZE, end // SEGMENT_SIZE + 1):
        name = f"00000001{segno >> 8:08X}{segno & 0xFF:08X}"
        segment = (recording.after / "pg_wal" / name).read_bytes()
        decoder.feed(segment[max(start - segno * SEGMENT_SIZE, 0) :])
        while (record := decoder.next_record()) is not None:
            take_record(recording, record)
            if record.start_lsn == end:
                return
    raise AssertionError(f"no checkpoint at {end:X}")


def take_record(recording: Recording, record: DecodedRecord) -> None:
    recording.records.append(record)
    seen = set()
    for block in record.blocks:
        key = (block.rel, block.blkno)
        if key not in seen:
            seen.add(key)
            recording.chains[key].append((record.end_lsn, record.raw))
    if record.rmid == Rmgr.SMGR and record.rmgr_info == XLOG_SMGR_TRUNCATE:
        blkno, spcnode, dbnode, relnode, _ = struct.unpack("<5I", record.main_data)
        for rel, block_number in list(recording.chains):
            if rel[:3] != (spcnode, dbnode, relnode):
                continue
            if rel.forknum != MAIN_FORKNUM or block_number >= blkno:
                del recording.chains[rel, block_number]
