"""A stock server's WAL with nearly every kind of record, and its files to compare with."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import psycopg2.extensions

from postgres_ffi.control_file import ControlFile, parse_control_file
from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.versions import VERSIONS, PgVersion
from postgres_ffi.wal_decoder import WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, wal_file_name
from zenith_utils.os_user import give, popen_kwargs

SETTINGS = """
listen_addresses = ''
fsync = off
autovacuum = off
max_wal_size = 4GB
wal_keep_size = 4GB
checkpoint_timeout = 1d
max_prepared_transactions = 20
allow_in_place_tablespaces = on
bgwriter_lru_maxpages = 0
log_min_messages = warning
"""

STRUCTURES = """
create table ix (id serial primary key, k int, p point, a int[], tx text, r int4range);
insert into ix (k, p, a, tx, r) select g % 1000, point(g % 97, g % 89), array[g % 7, g % 131],
  md5(g::text), int4range(g, g + 10) from generate_series(1, 4000) g;
create index on ix using hash (k);
create index on ix using gin (a);
create index on ix using gist (p);
create index on ix using spgist (tx);
create index on ix using brin (id) with (pages_per_range = 4);
create index on ix (tx);
vacuum analyze ix;
update ix set k = k + 1, p = point(k % 50, 1) where id % 3 = 0;
delete from ix where id % 5 = 0 or id > 3000;
vacuum ix;
insert into ix (k, p, a, tx, r) select g % 1000, point(g % 97, g % 89), array[g % 7, g % 11],
  md5(g::text), int4range(g, g + 10) from generate_series(4001, 5000) g;
create unlogged table ul (id serial primary key, t text);
insert into ul (t) select md5(g::text) from generate_series(1, 1000) g;
create unlogged table ul2 (a int);
insert into ul2 select generate_series(1, 100);
alter table ul2 set logged;
create temp table tt as select generate_series(1, 1000) a;
create sequence sq;
select count(nextval('sq')) from generate_series(1, 100);
create table toast_t as select g, (select string_agg(md5((g * i)::text), '')
  from generate_series(1, 400) i) t from generate_series(1, 20) g;
create materialized view mv as select count(*) from ix;
refresh materialized view mv;
cluster ix using ix_pkey;
vacuum full pg_class;
vacuum full pg_database;
reindex index pg_class_oid_index;
create table parted (a int, b text) partition by range (a);
create table parted1 partition of parted for values from (0) to (1000);
insert into parted select g, g::text from generate_series(1, 900) g;
create table cic (a int);
insert into cic select generate_series(1, 1000);
create index concurrently cic_i on cic (a);
select lo_from_bytea(0, decode(repeat('ab', 30000), 'hex'));
select pg_logical_emit_message(false, 'test', 'hello');
select pg_create_restore_point('here');
"""

VISIBILITY = """
create table big (a int, b text) with (fillfactor = 60);
insert into big select g, repeat('x', 60) from generate_series(1, 20000) g;
vacuum freeze big;
update big set b = 'u' where a % 211 = 0;
delete from big where a % 307 = 0;
begin; select count(*) from (select 1 from big where a % 401 = 0 for update) s; commit;
vacuum big;
update big set b = repeat('moved', 100) where a % 503 = 0;
vacuum freeze big;
copy big from program 'seq 30001 30200 | sed s/$/\\\\tc/' with (format text);
insert into big values (50000, 'i');
vacuum freeze big;
delete from big where a > 12000;
vacuum freeze big;
insert into big select g, repeat('y', 60) from generate_series(60000, 64000) g;
create table cut as select g a from generate_series(1, 10000) g;
vacuum freeze cut;
begin; truncate cut; insert into cut values (1); commit;
create table doomed as select g a from generate_series(1, 1000) g;
vacuum doomed;
drop table doomed;
begin; create table never (a int); insert into never values (1); rollback;
"""

DATABASES = """
create database d_wal strategy wal_log;
create database d_copy strategy file_copy;
create database d_gone strategy file_copy;
create database d_gone2 strategy wal_log;
drop database d_gone;
drop database d_gone2;
create tablespace ts location '';
create tablespace ts_gone location '';
create table in_ts (a int) tablespace ts;
insert into in_ts select generate_series(1, 1000);
alter table cut set tablespace ts;
create database d_ts tablespace ts;
alter database d_copy set tablespace ts;
create table in_gone (a int) tablespace ts_gone;
alter table in_gone set tablespace pg_default;
drop tablespace ts_gone;
alter database d_wal set work_mem = '5MB';
"""

PREPARED = """
begin; create table p1 (a int primary key); insert into p1 select generate_series(1, 1000);
  savepoint a; insert into p1 values (5000); release a; prepare transaction 'p1';
begin; insert into sub values (900001, 1); savepoint s1; insert into sub values (900002, 2);
  rollback to s1; savepoint s2; insert into sub values (900003, 3); prepare transaction 'p2';
begin; create table p3 (a int); insert into p3 select generate_series(1, 2000);
  prepare transaction 'p3';
begin; create table p4 (a int); insert into p4 values (1); prepare transaction 'p4';
begin; drop table dropped_by_2pc; prepare transaction 'p5';
commit prepared 'p1';
rollback prepared 'p4';
commit prepared 'p5';
"""

ORIGINS = """
select pg_replication_origin_create('o1');
select pg_replication_origin_session_setup('o1');
begin; select pg_replication_origin_xact_setup('AA/BB00', now()); insert into cic values (1);
  commit;
select pg_replication_origin_session_reset();
select pg_replication_origin_create('o2');
select pg_replication_origin_advance('o2', 'CC/DD');
select pg_replication_origin_create('o3');
select pg_replication_origin_advance('o3', '1/0');
select pg_replication_origin_drop('o3');
"""

# every subtransaction has an id of its own: 1000 new multixacts with the holder of the row locks
MULTIXACTS = """
do $$ begin for i in 1..1000 loop
  begin perform 1 from mx where a = i for key share; exception when others then raise; end;
end loop; end $$;
"""

# 40000 transaction ids: more than a page of the commit log
XIDS = """
do $$ begin for i in 1..40000 loop
  begin insert into sub values (i, i); if i % 3 = 0 then raise exception 'x'; end if;
  exception when raise_exception then null; end;
end loop; end $$;
"""


@dataclass(frozen=True, slots=True)
class Jump:
    """Arguments of pg_resetwal that move the counters, and the SLRU files this takes."""

    reset: tuple[str, ...]
    segments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """How the recorded cluster is set up."""

    initdb: tuple[str, ...] = ()
    settings: str = ""
    jumps: tuple[Jump, ...] = ()


VARIANTS = {
    # counters close to the end of their SLRU segments, so that truncation has something to drop
    "plain": Variant(
        jumps=(
            Jump(
                ("-x", "1040000", "-m", "65000,64990", "-O", "52000"),
                ("pg_xact/0000", "pg_multixact/offsets/0000", "pg_multixact/members/0000"),
            ),
        )
    ),
    # all counters close to 2^32 (less than 2^31 at a time), page images of every sort
    "wraparound": Variant(
        initdb=("-k",),
        settings="wal_compression = pglz\nwal_log_hints = on",
        jumps=(
            Jump(
                ("-x", "1450000000", "-m", "1450000000,1449999990"),
                ("pg_xact/0566", "pg_multixact/offsets/566D"),
            ),
            Jump(
                ("-x", "2900000000", "-m", "2900000000,2899999990"),
                ("pg_xact/0ACD", "pg_multixact/offsets/ACDA"),
            ),
            Jump(
                ("-x", "4294950000", "-m", "4294967000,4294966990", "-O", "4294966500"),
                ("pg_xact/0FFF", "pg_multixact/offsets/FFFF", "pg_multixact/members/14078"),
            ),
        ),
    ),
    # as a compute runs
    "compute": Variant(settings="full_page_writes = off\nwal_level = logical"),
}


@dataclass(frozen=True, slots=True)
class Recording:
    """A cluster before its first start and after a workload, and all WAL in between."""

    distrib: PgDistrib
    version: PgVersion
    variant: Variant
    before: Path
    after: Path
    wal: bytes
    start_lsn: int

    def control(self, root: Path) -> ControlFile:
        """pg_control of one of the two directories."""
        return parse_control_file((root / "global/pg_control").read_bytes())


class Cluster:
    """A stock server in a directory of its own, reached through a socket there."""

    def __init__(self, distrib: PgDistrib, datadir: Path) -> None:
        self.distrib = distrib
        self.datadir = datadir

    def run(self, program: str, *arguments: object) -> str:
        """Run one of Postgres' programs; fails with what it wrote."""
        result = subprocess.run(
            [str(self.distrib.bin_dir / program), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            **popen_kwargs(),
        )
        assert result.returncode == 0, f"{program}: {result.stderr}{result.stdout}"
        return result.stdout

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        log = self.datadir.parent / f"{self.datadir.name}.log"
        sockets = f"-c unix_socket_directories={self.datadir}"
        self.run("pg_ctl", "-w", "-D", self.datadir, "-l", log, "-o", sockets, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server."""
        self.run("pg_ctl", "-w", "-D", self.datadir, "-m", mode, "stop")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The server runs inside and is stopped cleanly at the end."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def connect(self, dbname: str = "postgres") -> psycopg2.extensions.connection:
        """A connection in autocommit mode."""
        connection = psycopg2.connect(host=str(self.datadir), user="postgres", dbname=dbname)
        connection.autocommit = True
        return connection

    def execute(self, script: str, dbname: str = "postgres") -> None:
        """Run statements one by one on a connection of their own."""
        with contextlib.closing(self.connect(dbname)) as connection:
            cursor = connection.cursor()
            for statement in statements(script):
                cursor.execute(statement)


def statements(script: str) -> list[str]:
    """The statements of a script; a `do` block is one."""
    if script.lstrip().startswith("do $$"):
        return [script]
    return [part for part in script.split(";\n") if part.strip()]


def make_cluster(root: Path, variant: Variant) -> Cluster:
    """A fresh cluster, its counters moved as the variant says."""
    cluster = Cluster(find_distrib(), root / "data")
    cluster.run(
        "initdb", "-A", "trust", "-U", "postgres", "-N", "-D", cluster.datadir, *variant.initdb
    )
    for step, jump in enumerate(variant.jumps):
        if step:  # nothing may carry an id that the new counters put in the future
            with cluster.running():
                freeze_everything(cluster, "template0", "template1", "postgres")
        for name in jump.segments:
            pad(cluster.datadir / name)
        cluster.run("pg_resetwal", "-D", cluster.datadir, *jump.reset)
    with (cluster.datadir / "postgresql.conf").open("a") as conf:
        conf.write(SETTINGS + variant.settings + "\n")
    return cluster


def pad(path: Path) -> None:
    """Make an SLRU segment whole: 32 pages."""
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content.ljust(32 * 8192, b"\0"))
    give(path)


def record(root: Path, variant: Variant) -> Recording:
    """Make a cluster, run the workload with a crash in the middle, stop it, collect its WAL."""
    cluster = make_cluster(root, variant)
    before = root / "before"
    shutil.copytree(cluster.datadir, before)
    cluster.start()
    cluster.execute(STRUCTURES)
    cluster.execute(VISIBILITY)
    cluster.execute("create table sub (i int, v int);\ncreate table dropped_by_2pc (a int)")
    cluster.execute(XIDS)
    cluster.execute("checkpoint")
    cluster.execute("insert into sub values (0, 0)")
    cluster.stop("immediate")
    with cluster.running():
        cluster.execute(DATABASES)
        cluster.execute(PREPARED)
        cluster.execute(ORIGINS)
        lock_rows(cluster)
        cluster.execute("select pg_switch_wal();\ninsert into cic values (2)")
        cluster.execute("update mx set b = b + 1 where a < 200;\ncommit prepared 'p3'")
        cluster.execute("rollback prepared 'p2'")
        freeze_everything(cluster, "template0", "template1", "d_wal", "d_copy", "d_ts", "postgres")
        cluster.execute("begin; insert into cic values (3); prepare transaction 'p6'")
        cluster.execute("create table last as select generate_series(1, 100)")
    control = parse_control_file((before / "global/pg_control").read_bytes())
    start = control.checkpoint_lsn
    version = VERSIONS[cluster.distrib.major]
    return Recording(
        cluster.distrib, version, variant, before, cluster.datadir, read_wal(cluster, start), start
    )


def lock_rows(cluster: Cluster) -> None:
    """Make multixacts of two and of three members."""
    cluster.execute(
        "create table mx (a int primary key, b int);\n"
        "insert into mx select g, g from generate_series(1, 1000) g"
    )
    with (
        contextlib.closing(cluster.connect()) as first,
        contextlib.closing(cluster.connect()) as second,
    ):
        first.autocommit = second.autocommit = False
        first.cursor().execute("select count(*) from (select 1 from mx for key share) s")
        second.cursor().execute(MULTIXACTS)
        cluster.execute(MULTIXACTS)
        first.commit()
        second.commit()


def freeze_everything(cluster: Cluster, *databases: str) -> None:
    """Move the horizons, so that the commit log and the multixacts are truncated."""
    cluster.execute("update pg_database set datallowconn = true where datname = 'template0'")
    for dbname in databases:
        cluster.execute("vacuum freeze", dbname)
    cluster.execute("update pg_database set datallowconn = false where datname = 'template0'")
    cluster.execute("vacuum freeze pg_database;\ncheckpoint")


def read_wal(cluster: Cluster, start: int) -> bytes:
    """All WAL from the record at `start` to the end of the last checkpoint's record."""
    control = parse_control_file((cluster.datadir / "global/pg_control").read_bytes())
    last = control.checkpoint_lsn
    segments = [
        (cluster.datadir / "pg_wal" / wal_file_name(1, segno)).read_bytes()
        for segno in range(start // WAL_SEGMENT_SIZE, last // WAL_SEGMENT_SIZE + 1)
    ]
    first = start // WAL_SEGMENT_SIZE * WAL_SEGMENT_SIZE
    tail = WalDecoder(last)
    tail.feed(b"".join(segments)[last - first : last - first + 8192])
    end = tail.next_record()
    assert end is not None
    return b"".join(segments)[start - first : end.end_lsn - first]
