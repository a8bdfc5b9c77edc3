"""Hand-made WAL and a timeline to ingest it into."""

import contextlib
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pageserver import keys
from pageserver.directories import (
    encode_databases,
    encode_numbers,
    encode_origins,
    encode_tablespaces,
)
from pageserver.layered_repository.reader import Reconstruct
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.reconstruct import make_reconstruct
from pageserver.walingest import WalIngest
from pageserver.walredo import RedoRequest
from postgres_ffi.control_file import ControlFile
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import RelTag
from postgres_ffi.slru import SlruKind
from postgres_ffi.versions import VERSIONS, Rmgr
from postgres_ffi.wal_format import (
    WAL_BLCKSZ,
    WAL_SEGMENT_SIZE,
    XLP_FIRST_IS_CONTRECORD,
    XLP_LONG_HEADER,
    WalPageHeader,
    maxalign,
)
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantId, TimelineId

VERSION = VERSIONS[15]
START_LSN = 0x2000028
SYSTEM_ID = 7
NEXT_XID = 1000
REL = RelTag(1663, 5, 16384, 0)
FSM, VM, INIT = REL._replace(forknum=1), REL._replace(forknum=2), REL._replace(forknum=3)

Parameters = dict[str, int | bool]


@dataclass(frozen=True, slots=True)
class Block:
    """A block reference to write; `hole` is (offset, length) of the image's hole."""

    rel: RelTag
    blkno: int
    data: bytes = b""
    will_init: bool = False
    image: bytes | None = None
    hole: tuple[int, int] = (0, 0)
    apply: bool = True
    compression: int = 0

    def header(self, number: int) -> bytes:
        """XLogRecordBlockHeader and what follows it."""
        flags = self.rel.forknum | (0x20 if self.data else 0) | (0x40 if self.will_init else 0)
        flags |= 0x10 if self.image is not None else 0
        out = struct.pack("<BBH", number, flags, len(self.data))
        if self.image is not None:
            info = (1 if self.hole[1] else 0) | (2 if self.apply else 0) | self.compression
            out += struct.pack("<HHB", len(self.image), self.hole[0], info)
            if self.compression and self.hole[1]:
                out += struct.pack("<H", self.hole[1])
        return out + struct.pack("<IIII", *self.rel[:3], self.blkno)


@dataclass(slots=True)
class WalWriter:
    """Lays records out on pages as Postgres does; `data` begins at `start`."""

    start: int
    lsn: int = 0
    prev: int = 0
    data: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.lsn = self.start

    def add(
        self,
        rmid: int,
        info: int = 0,
        main_data: bytes = b"",
        blocks: Sequence[Block] = (),
        *,
        xid: int = 0,
        origin: int = 0,
    ) -> int:
        """Write a record; returns the LSN of its values (its end)."""
        body = b"".join(block.header(number) for number, block in enumerate(blocks))
        if origin:
            body += struct.pack("<BH", 253, origin)
        if main_data:
            body += struct.pack("<BI", 254, len(main_data))
        body += b"".join((block.image or b"") + block.data for block in blocks) + main_data
        header = struct.pack("<IIQBBxx", 24 + len(body), xid, self.prev, info, rmid)
        return self._record(header + struct.pack("<I", crc32c(header, crc32c(body))) + body)

    def _record(self, raw: bytes) -> int:
        self._raw(bytes(maxalign(self.lsn) - self.lsn))
        self._start_page(0)
        self.prev = self.lsn
        while raw:
            self._start_page(len(raw))
            room = WAL_BLCKSZ - self.lsn % WAL_BLCKSZ
            self._raw(raw[:room])
            raw = raw[room:]
        return maxalign(self.lsn)

    def _start_page(self, remaining: int) -> None:
        if self.lsn % WAL_BLCKSZ:
            return
        info = XLP_FIRST_IS_CONTRECORD if remaining else 0
        if self.lsn % WAL_SEGMENT_SIZE == 0:
            info |= XLP_LONG_HEADER
        magic = VERSION.xlog_page_magic
        page = WalPageHeader(
            magic, info, 1, self.lsn, remaining, SYSTEM_ID, WAL_SEGMENT_SIZE, WAL_BLCKSZ
        )
        self._raw(page.pack())

    def fill_segment(self) -> None:
        """The zeros behind XLOG_SWITCH."""
        self._raw(bytes(-self.lsn % WAL_SEGMENT_SIZE))

    def _raw(self, data: bytes) -> None:
        self.data += data
        self.lsn += len(data)

    def take(self) -> bytes:
        """What was written since the last call, up to the next place for a record."""
        self._raw(bytes(maxalign(self.lsn) - self.lsn))
        data = bytes(self.data)
        self.data.clear()
        return data


class RecordingRedo:
    """Stands for redo: a page is a log of what was done to it, readable and comparable."""

    def __init__(self) -> None:
        self.requests: list[RedoRequest] = []

    def redo(self, requests: Sequence[RedoRequest]) -> list[bytes]:
        """What `WalRedoPool.redo` does."""
        self.requests += requests
        return [self.page(request) for request in requests]

    @staticmethod
    def page(request: RedoRequest) -> bytes:
        """Zeros become `0`, any other base stays; then each record's end LSN."""
        text = b"0"
        if request.base not in (None, ZERO_PAGE):
            text = bytes(request.base or b"").rstrip(b"\0")
        for lsn, _ in request.records:
            text += b" %X" % lsn
        return text.ljust(8192, b"\0")


@dataclass(slots=True)
class Bench:
    """An almost empty cluster whose WAL is written by hand."""

    repository: Repository
    datadir: DatadirTimeline
    redo: RecordingRedo
    wal: WalWriter
    ingest: WalIngest

    @property
    def timeline(self) -> Timeline:
        """The timeline under it."""
        return self.datadir.timeline

    def run(self) -> int:
        """Ingest what was written; returns last_record_lsn."""
        return self.ingest.ingest(self.wal.take())

    def add(self, *args: object, **kwargs: object) -> int:
        """Write a record and ingest it; returns its LSN."""
        lsn = self.wal.add(*args, **kwargs)  # type: ignore[arg-type]
        assert self.run() == lsn
        return lsn

    def reopen(self) -> None:
        """Start ingestion anew at the end of the last good record."""
        self.ingest = WalIngest(self.datadir)
        self.wal = WalWriter(self.ingest.start_lsn, prev=self.timeline.prev_record_lsn)


def empty_cluster() -> list[tuple[bytes, bytes]]:
    """Keys and values of a cluster with one database, an empty table and one clog page."""
    control = ControlFile(VERSION, bytes(VERSION.control_file.size)).with_fields(
        {
            "system_identifier": SYSTEM_ID,
            "control_version": VERSION.control_version,
            "catalog_version": VERSION.catalog_version,
            "wal_segment_size": WAL_SEGMENT_SIZE,
        }
    )
    items = {
        keys.DATABASE_DIRECTORY_KEY: encode_databases({(1663, 5): False, (1664, 0): False}),
        keys.rel_size_key(REL): keys.encode_size(0),
        keys.slru_directory_key(SlruKind.CLOG): encode_numbers({0}),
        keys.slru_block_key(SlruKind.CLOG, 0, 0): b"",
        keys.slru_size_key(SlruKind.CLOG, 0): keys.encode_size(1),
        keys.slru_directory_key(SlruKind.MULTIXACT_MEMBERS): encode_numbers(()),
        keys.slru_directory_key(SlruKind.MULTIXACT_OFFSETS): encode_numbers(()),
        keys.TWOPHASE_DIRECTORY_KEY: encode_numbers(()),
        keys.CONTROL_FILE_KEY: control.file_bytes(),
        keys.CHECKPOINT_KEY: bytes(VERSION.checkpoint.size),
        keys.COUNTERS_KEY: keys.encode_counters(NEXT_XID, 1, 0),
        keys.ORIGINS_KEY: encode_origins({}),
        keys.TABLESPACES_KEY: encode_tablespaces({}),
    }
    return sorted(items.items())


@contextlib.contextmanager
def make_bench(reconstruct: Reconstruct | None = None) -> Iterator[Bench]:
    """A bench in a temporary directory."""
    redo = RecordingRedo()
    with tempfile.TemporaryDirectory(prefix="zenith-ingest-") as path:
        repository = Repository(
            Path(path), TenantId.generate(), StoreSettings(), reconstruct or make_reconstruct(redo)
        )
        timeline = repository.create_timeline(TimelineId.generate(), initdb_lsn=START_LSN)
        timeline.import_image_layer(START_LSN, empty_cluster(), prev_lsn=0)
        datadir = DatadirTimeline(timeline, VERSION)
        try:
            yield Bench(repository, datadir, redo, WalWriter(START_LSN), WalIngest(datadir))
        finally:
            repository.shutdown(flush=False)


def commit_data(
    *, xinfo: int = 0, subxacts: Sequence[int] = (), rels: Sequence[RelTag] = (), tail: bytes = b""
) -> bytes:
    """Main data of a commit or abort whose info has XLOG_XACT_HAS_INFO."""
    xinfo |= (2 if subxacts else 0) | (4 if rels else 0)
    data = struct.pack("<qI", 0, xinfo)
    if subxacts:
        data += struct.pack(f"<i{len(subxacts)}I", len(subxacts), *subxacts)
    if rels:
        data += struct.pack("<i", len(rels)) + b"".join(struct.pack("<III", *r[:3]) for r in rels)
    return data + tail


def smgr_create(rel: RelTag) -> tuple[int, int, bytes]:
    """Arguments of `add` that create a fork."""
    return Rmgr.SMGR, 0x10, struct.pack("<IIIi", *rel)
