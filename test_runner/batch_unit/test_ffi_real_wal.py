"""WAL and files of a real server: records against pg_waldump, pg_control, page checksums."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
from batch_unit.ffi_support import Server, decode, execute, make_server
from batch_unit.workspace import temporary_workspace

from compute_tools._standby_scan import scan
from postgres_ffi import xact_records as xact
from postgres_ffi import xlog_records as xlog
from postgres_ffi.control_file import DBState
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.heap_records import VISIBILITYMAP_VALID_BITS, vm_clears
from postgres_ffi.page import is_new
from postgres_ffi.page_checksum import checksum_page, set_checksums
from postgres_ffi.record_reader import RelFileNode
from postgres_ffi.relfile import RelTag, parse_relpath, relpath
from postgres_ffi.relmap import parse_relmap
from postgres_ffi.standby_records import XLOG_RUNNING_XACTS
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, end_of_bytes, wal_file_name
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import give

CHECKPOINT_RECORD_SIZE = 114

RMGR_NAMES = (
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
)


class WalDumpRecord(NamedTuple):
    """A line of pg_waldump; `blocks` are (id, fork, block, with image)."""

    rmgr: str
    length: int
    xid: int
    start: int
    prev: int
    desc: str
    blocks: tuple[tuple[int, RelTag, int, bool], ...]


@dataclass(frozen=True)
class Sample:
    """A stopped server, all its WAL from segment 1 on and what pg_waldump says about it."""

    server: Server
    wal: bytes
    dump: list[WalDumpRecord]
    records: list[DecodedRecord]
    table: RelTag

    def of(self, rmgr: Rmgr, *infos: int, mask: int = 0xF0) -> list[DecodedRecord]:
        """All records of a kind; the workload must have written some."""
        found = [r for r in self.records if r.rmid == rmgr and r.info & mask in infos]
        assert found, f"the workload wrote no {rmgr.name} record with info {infos}"
        return found


@pytest.fixture(scope="module")
def workspace() -> Iterator[Path]:
    with temporary_workspace() as path:
        yield path


@pytest.fixture(scope="module")
def sample(workspace: Path) -> Sample:
    server = make_server(workspace / "sample")
    with server.running():
        table = workload(server)
    wal = read_wal(server.datadir)
    control = server.control()
    end = end_of_bytes(control.checkpoint_lsn, CHECKPOINT_RECORD_SIZE)
    dump = server.run(
        "pg_waldump", "-p", server.datadir / "pg_wal", "-s", Lsn(WAL_SEGMENT_SIZE), "-e", Lsn(end)
    )
    decoder = WalDecoder(WAL_SEGMENT_SIZE, prev_lsn=0, system_identifier=control.system_identifier)
    records = decode(decoder, wal, 1 << 20)
    return Sample(server, wal, list(parse_dump(dump)), records, table)


def workload(server: Server) -> RelTag:
    """Make one record of every kind that the tests look at; a table updated after its vacuum."""
    execute(
        server,
        "create table t (id int primary key, v text)",
        "insert into t select i, repeat(md5(i::text), 3) from generate_series(1, 3000) i",
        "create table big (v text)",
        "alter table big alter v set storage external",
        "insert into big select repeat(md5(i::text), 400) from generate_series(1, 100) i",
        "create index on t using gin (string_to_array(v, '0'))",
        "create index on t using hash (v)",
        "create index on t using brin (v)",
        "create sequence s",
        "select nextval('s')",
        "select pg_switch_wal()",
        "create unlogged table u (v int)",
        # each block with an exception handler is a subtransaction: a commit record of 140 kB
        """do $$ begin for i in 1..35000 loop
           begin insert into u values (i); exception when others then null; end;
           end loop; end $$""",
        "create table gone (id serial, v text)",
        "insert into gone select i, 'x' from generate_series(1, 100) i",
        "drop table gone",
        "delete from big where ctid > '(0,0)'",
        "vacuum big",
        "select pg_logical_emit_message(false, 'a', repeat('x', 40000))",
        "set wal_compression = 'pglz'",
        "checkpoint",
        "update t set v = v || 'y' where id < 500",
        "set wal_compression = 'lz4'",
        "update t set v = v || 'z' where id between 1500 and 2000",
        "vacuum full pg_class",
        "create tablespace place location ''",
        "create table elsewhere (v int) tablespace place",
        "create database copied template template0 strategy file_copy",
        "create database logged template template0 strategy wal_log",
        "drop database copied",
        "drop table elsewhere",
        "drop tablespace place",
    )
    execute(
        server,
        "begin",
        "insert into t values (-1)",
        "savepoint a",
        "update t set v = '' where id = -1",
        "prepare transaction 'kept'",
    )
    execute(server, "begin", "create table p (v int)", "prepare transaction 'committed'")
    execute(server, "begin", "drop table u", "prepare transaction 'rolled back'")
    execute(server, "commit prepared 'committed'", "rollback prepared 'rolled back'")
    execute(
        server, "begin", "create table never (v int)", "insert into never values (1)", "rollback"
    )
    # a key share lock and an update in a subtransaction make a multixact
    execute(
        server,
        "begin",
        "select * from t where id = 77 for key share",
        "savepoint a",
        "update t set v = 'm' where id = 77",
        "commit",
    )
    execute(
        server,
        "select pg_replication_origin_create('o')",
        "select pg_replication_origin_advance('o', '0/AA')",
        "select pg_replication_origin_session_setup('o')",
        "begin",
        "select pg_replication_origin_xact_setup('0/ABCD', '2024-01-01')",
        "insert into t values (-2)",
        "commit",
        "select pg_replication_origin_session_reset()",
        "select pg_replication_origin_drop('o')",
    )
    execute(server, "vacuum (freeze) t", "checkpoint")
    execute(server, "update t set v = 'q' where id = 1000")
    ((path,),) = execute(server, "select pg_relation_filepath('t')")
    parsed = parse_relpath(str(path), server.distrib.version)
    assert parsed is not None
    return parsed[0]


def read_wal(datadir: Path) -> bytes:
    """All segments from number 1 on, without those that are recycled ahead of the end."""
    segments = []
    segno = 1
    while (path := datadir / "pg_wal" / wal_file_name(1, segno)).exists():
        segments.append(path.read_bytes())
        segno += 1
    return b"".join(segments)


DUMP_LINE = re.compile(
    r"rmgr: (\S+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: (\S+), prev (\S+), desc: (.*)"
)
DUMP_BLOCK = re.compile(
    r", blkref #(\d+): rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)( FPW)?(?=,|$)"
)


def parse_dump(text: str) -> Iterator[WalDumpRecord]:
    forks = {"": 0, "fsm": 1, "vm": 2, "init": 3}
    for line in text.splitlines():
        match = DUMP_LINE.match(line)
        assert match is not None, line
        rmgr, length, xid, start, prev, desc = match.groups()
        blocks = tuple(
            (int(i), RelTag(int(spc), int(db), int(rel), forks[fork]), int(blk), bool(fpw))
            for i, spc, db, rel, fork, blk, fpw in DUMP_BLOCK.findall(desc)
        )
        desc = DUMP_BLOCK.sub("", desc)
        yield WalDumpRecord(
            rmgr, int(length), int(xid), Lsn.parse(start), Lsn.parse(prev), desc, blocks
        )


def as_dumped(record: DecodedRecord) -> tuple[object, ...]:
    return (
        RMGR_NAMES[record.rmid],
        len(record.raw),
        record.xid,
        record.start_lsn,
        record.prev,
        tuple((b.id, b.rel, b.blkno, b.image is not None) for b in record.blocks),
    )


# ---- the decoder


def test_every_record_is_the_one_pg_waldump_sees(sample: Sample) -> None:
    assert len(sample.dump) > 5000
    assert {r.rmgr for r in sample.dump} >= {"MultiXact", "RelMap", "CLOG", "Hash", "Gin", "BRIN"}
    for record, line in zip(sample.records, sample.dump, strict=True):
        expected = (line.rmgr, line.length, line.xid, line.start, line.prev, line.blocks)
        assert as_dumped(record) == expected
    assert max(line.length for line in sample.dump) > 100_000
    assert any(b.compressed for r in sample.records for b in r.blocks)


@pytest.mark.parametrize("chunk", [1000, 8192, 1 << 24])
def test_chunking_changes_nothing(sample: Sample, chunk: int) -> None:
    assert decode(WalDecoder(WAL_SEGMENT_SIZE), sample.wal, chunk) == sample.records


def test_start_at_any_record_bytewise(sample: Sample) -> None:
    biggest = max(range(len(sample.records)), key=lambda i: len(sample.records[i].raw))
    part = sample.records[biggest - 30 : biggest + 30]
    start = part[0].start_lsn
    wal = sample.wal[start - WAL_SEGMENT_SIZE : part[-1].end_lsn - WAL_SEGMENT_SIZE]
    assert decode(WalDecoder(start, prev_lsn=part[0].prev), wal, 1) == part


def test_scan_stops_at_the_end_of_wal(sample: Sample) -> None:
    decoder = WalDecoder(WAL_SEGMENT_SIZE, assume_switch=False)
    with pytest.raises(WalDecodeError):
        decoder.scan(sample.wal)
    assert decoder.position == sample.records[-1].end_lsn
    assert decoder.last_record_start == sample.server.control().checkpoint_lsn


def test_scan_for_standbys(sample: Sample) -> None:
    """Finds the few records where a standby may begin, and where each transaction has ended."""
    version = sample.server.distrib.version
    ended: dict[int, int] = {}
    decoder = WalDecoder(WAL_SEGMENT_SIZE)
    wal = sample.wal[: sample.records[-1].end_lsn - WAL_SEGMENT_SIZE]
    pieces = (wal[i : i + 100_000] for i in range(0, len(wal), 100_000))
    found = [record for piece in pieces for record in scan(decoder, piece, version, ended)]
    places = {
        (Rmgr.XLOG, xlog.XLOG_CHECKPOINT_SHUTDOWN),
        (Rmgr.XLOG, xlog.XLOG_NOOP),
        (Rmgr.STANDBY, XLOG_RUNNING_XACTS),
    }
    assert found == [r for r in sample.records if (r.rmid, r.rmgr_info) in places]
    ends = {}
    for record in sample.of(Rmgr.XACT, xact.XLOG_XACT_COMMIT, xact.XLOG_XACT_ABORT, mask=0x70):
        ends[record.xid] = record.start_lsn
    operations = xact.XLOG_XACT_COMMIT_PREPARED, xact.XLOG_XACT_ABORT_PREPARED
    for record in sample.of(Rmgr.XACT, *operations, mask=0x70):
        end = xact.parse_xact_end(record.main_data, record.info, version)
        ends[end.twophase_xid] = record.start_lsn
    assert ended == ends
    assert 0 not in ended


# ---- records


def relation_path(sample: Sample, node: RelFileNode) -> str:
    return relpath(node.fork(0), sample.server.distrib.version)


def described(sample: Sample) -> Iterator[tuple[str, str]]:
    """(what pg_waldump writes, the same from the parsed record) of the records with parsers."""
    for record, line in zip(sample.records, sample.dump, strict=True):
        describe = DESCRIBERS.get((record.rmid, record.rmgr_info))
        if describe is not None:
            yield line.desc, describe(sample, record.main_data)


def describe_parameters(_: Sample, data: bytes) -> str:
    p = xlog.parse_parameter_change(data)
    return (
        f"PARAMETER_CHANGE max_connections={p.max_connections}"
        f" max_worker_processes={p.max_worker_processes} max_wal_senders={p.max_wal_senders}"
        f" max_prepared_xacts={p.max_prepared_xacts} max_locks_per_xact={p.max_locks_per_xact}"
        f" wal_level=logical wal_log_hints={'on' if p.wal_log_hints else 'off'}"
        f" track_commit_timestamp={'on' if p.track_commit_timestamp else 'off'}"
    )


def describe_multixact(_: Sample, data: bytes) -> str:
    statuses = ("keysh", "sh", "fornokeyupd", "forupd", "nokeyupd", "upd")
    m = xlog.parse_multixact_create(data)
    members = " ".join(f"{xid} ({statuses[status]})" for xid, status in m.members)
    return f"CREATE_ID {m.mid} offset {m.moff} nmembers {len(m.members)}: {members} "


def describe_smgr_create(sample: Sample, data: bytes) -> str:
    return f"CREATE {relpath(xlog.parse_smgr_create(data), sample.server.distrib.version)}"


def describe_smgr_truncate(sample: Sample, data: bytes) -> str:
    t = xlog.parse_smgr_truncate(data)
    return f"TRUNCATE {relation_path(sample, t.relation)} to {t.blkno} blocks flags {t.flags}"


def describe_file_copy(_: Sample, data: bytes) -> str:
    d = xlog.parse_dbase_create_file_copy(data)
    source, target = f"{d.source_spcnode}/{d.source_dbnode}", f"{d.spcnode}/{d.dbnode}"
    return f"CREATE_FILE_COPY copy dir {source} to {target}"


def describe_wal_log(_: Sample, data: bytes) -> str:
    d = xlog.parse_dbase_create_wal_log(data)
    return f"CREATE_WAL_LOG create dir {d.spcnode}/{d.dbnode}"


def describe_drop(_: Sample, data: bytes) -> str:
    d = xlog.parse_dbase_drop(data)
    return "DROP dir" + "".join(f" {spcnode}/{d.dbnode}" for spcnode in d.spcnodes)


def describe_relmap(_: Sample, data: bytes) -> str:
    r = xlog.parse_relmap_update(data)
    assert parse_relmap(r.data)
    return f"UPDATE database {r.dbnode} tablespace {r.spcnode} size {len(r.data)}"


def describe_tblspc_create(_: Sample, data: bytes) -> str:
    t = xlog.parse_tblspc_create(data)
    return f'CREATE {t.spcnode} "{t.location}"'


def describe_zero_page(sample: Sample, data: bytes) -> str:
    return f"ZEROPAGE page {xlog.parse_zero_page(data, sample.server.distrib.version)}"


def describe_origin(_: Sample, data: bytes) -> str:
    o = xlog.parse_replorigin_set(data)
    return f"SET set {o.node_id}; lsn {Lsn(o.remote_lsn)}; force: {int(o.force)}"


DESCRIBERS: dict[tuple[int, int], Callable[[Sample, bytes], str]] = {
    (Rmgr.XLOG, xlog.XLOG_NEXTOID): lambda _, data: f"NEXTOID {xlog.parse_next_oid(data)}",
    (Rmgr.XLOG, xlog.XLOG_PARAMETER_CHANGE): describe_parameters,
    (Rmgr.SMGR, xlog.XLOG_SMGR_CREATE): describe_smgr_create,
    (Rmgr.SMGR, xlog.XLOG_SMGR_TRUNCATE): describe_smgr_truncate,
    (Rmgr.DBASE, xlog.XLOG_DBASE_CREATE_FILE_COPY): describe_file_copy,
    (Rmgr.DBASE, xlog.XLOG_DBASE_CREATE_WAL_LOG): describe_wal_log,
    (Rmgr.DBASE, xlog.XLOG_DBASE_DROP): describe_drop,
    (Rmgr.TBLSPC, xlog.XLOG_TBLSPC_CREATE): describe_tblspc_create,
    (Rmgr.TBLSPC, xlog.XLOG_TBLSPC_DROP): lambda _, data: f"DROP {xlog.parse_tblspc_drop(data)}",
    (Rmgr.CLOG, xlog.CLOG_ZEROPAGE): describe_zero_page,
    (Rmgr.MULTIXACT, xlog.XLOG_MULTIXACT_CREATE_ID): describe_multixact,
    (Rmgr.RELMAP, xlog.XLOG_RELMAP_UPDATE): describe_relmap,
    (Rmgr.REPLORIGIN, xlog.XLOG_REPLORIGIN_SET): describe_origin,
    (Rmgr.REPLORIGIN, xlog.XLOG_REPLORIGIN_DROP): lambda _, data: (
        f"DROP drop {xlog.parse_replorigin_drop(data)}"
    ),
}


def test_parsed_records_say_what_pg_waldump_says(sample: Sample) -> None:
    for key in DESCRIBERS:
        sample.of(Rmgr(key[0]), key[1])
    for expected, actual in described(sample):
        assert actual == expected


def test_transaction_ends_say_what_pg_waldump_says(sample: Sample) -> None:
    seen: set[tuple[bool, bool]] = set()
    for record, line in zip(sample.records, sample.dump, strict=True):
        if record.rmid != Rmgr.XACT or not line.desc.startswith(("COMMIT", "ABORT")):
            continue
        end = xact.parse_xact_end(record.main_data, record.info, sample.server.distrib.version)
        seen.add((end.committed, end.prepared))
        assert line.desc.startswith("COMMIT") == end.committed
        assert f"_PREPARED {end.twophase_xid}:" in line.desc or not end.prepared
        rels = re.search(r"; rels:((?: [^ ;]+)+)", line.desc)
        assert [relation_path(sample, node) for node in end.relations] == (
            rels[1].split() if rels else []
        )
        subxacts = re.search(r"; subxacts:((?: \d+)+)", line.desc)
        assert list(end.subxacts) == ([int(x) for x in subxacts[1].split()] if subxacts else [])
        origin = re.search(r"; origin: node (\d+), lsn (\S+),", line.desc)
        assert (record.origin, end.origin_lsn) == (
            (int(origin[1]), Lsn.parse(origin[2])) if origin else (0, 0)
        )
    assert seen == {(True, False), (True, True), (False, False), (False, True)}


def test_prepared_transactions(sample: Sample) -> None:
    version = sample.server.distrib.version
    prepared = {
        p.gid: (p, r)
        for r in sample.of(Rmgr.XACT, xact.XLOG_XACT_PREPARE, mask=xact.XLOG_XACT_OPMASK)
        for p in [xact.parse_xact_prepare(r.main_data, version)]
    }
    assert prepared.keys() == {"kept", "committed", "rolled back"}
    kept, record = prepared["kept"]
    assert kept.xid == record.xid and len(kept.subxacts) == 1 and not kept.commit_relations
    assert len(prepared["committed"][0].abort_relations) == 1
    assert len(prepared["rolled back"][0].commit_relations) == 1
    (file,) = (sample.server.datadir / "pg_twophase").iterdir()
    assert int(file.name, 16) == kept.xid
    assert file.read_bytes()[:-4] == record.main_data


def test_visibility_map_clears(sample: Sample) -> None:
    """The last update of the table hits a page that VACUUM had marked all-visible."""
    clears = [
        clear
        for record in sample.records[-40:]
        for clear in vm_clears(record)
        if clear.rel == sample.table
    ]
    assert clears and all(clear.flags == VISIBILITYMAP_VALID_BITS for clear in clears)
    (old,) = [
        r
        for r in sample.records[-40:]
        if r.blocks and r.blocks[0].rel == sample.table and r.rmid == Rmgr.HEAP
    ]
    assert clears[0].heap_blkno == old.blocks[-1].blkno


# ---- files


def test_page_checksums_are_those_of_the_server(sample: Sample) -> None:
    checked = 0
    for path in (sample.server.datadir / "base" / str(sample.table.dbnode)).iterdir():
        if parse_relpath(f"base/{sample.table.dbnode}/{path.name}", sample.server.distrib.version):
            content = path.read_bytes()
            blanked = bytearray(content)
            for blkno in range(len(content) // 8192):
                page = content[blkno * 8192 : (blkno + 1) * 8192]
                if not is_new(page):
                    assert checksum_page(page, blkno) == int.from_bytes(page[8:10], "little")
                    blanked[blkno * 8192 + 8 : blkno * 8192 + 10] = b"\0\0"
                    checked += 1
            set_checksums(blanked, 0)
            assert blanked == content, path
    assert checked > 500


def test_control_file_against_pg_controldata(sample: Sample) -> None:
    lines = sample.server.run("pg_controldata", "-D", sample.server.datadir).splitlines()
    expected = dict(re.split(r": *", line, maxsplit=1) for line in lines)
    control = sample.server.control()
    checkpoint = control.checkpoint
    assert control.state == DBState.SHUTDOWNED
    assert str(control.system_identifier) == expected["Database system identifier"]
    assert str(Lsn(control.checkpoint_lsn)) == expected["Latest checkpoint location"]
    assert str(Lsn(checkpoint.redo)) == expected["Latest checkpoint's REDO location"]
    epoch, xid = checkpoint.next_xid >> 32, checkpoint.next_xid & 0xFFFFFFFF
    assert f"{epoch}:{xid}" == expected["Latest checkpoint's NextXID"]
    assert str(checkpoint.next_oid) == expected["Latest checkpoint's NextOID"]
    assert str(checkpoint.next_multi) == expected["Latest checkpoint's NextMultiXactId"]
    assert str(checkpoint.oldest_multi_db) == expected["Latest checkpoint's oldestMulti's DB"]
    assert str(control.field("max_connections")) == expected["max_connections setting"]
    assert str(control.field("max_prepared_xacts")) == expected["max_prepared_xacts setting"]
    assert str(control.field("block_size")) == expected["Database block size"]
    assert control.data_checksums and control.wal_segment_size == WAL_SEGMENT_SIZE
    record = sample.records[-1]
    assert record.main_data == control.checkpoint_bytes


def test_control_file_rewritten_by_us(sample: Sample, workspace: Path) -> None:
    control = sample.server.control()
    parameters = xlog.parse_parameter_change(
        sample.of(Rmgr.XLOG, xlog.XLOG_PARAMETER_CHANGE)[-1].main_data
    )
    changed = control.with_fields(
        replace(parameters, max_connections=77, track_commit_timestamp=True).control_fields()
    ).with_checkpoint(0x1_2345_6788, replace(control.checkpoint, next_oid=4711))
    (workspace / "control" / "global").mkdir(parents=True)
    (workspace / "control/global/pg_control").write_bytes(changed.file_bytes())
    give(workspace / "control", recursive=True)
    output = sample.server.run("pg_controldata", "-D", workspace / "control")
    assert "CRC" not in output
    assert re.search(r"Latest checkpoint location: +1/23456788\n", output)
    assert re.search(r"NextOID: +4711\n", output)
    assert re.search(r"max_connections setting: +77\n", output)
    assert re.search(r"track_commit_timestamp setting: +on\n", output)
