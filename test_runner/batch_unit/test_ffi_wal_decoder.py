"""The WAL decoder against a plain reference, on made-up WAL in any chunking and with damage."""

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.page import restore_image
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import (
    MAX_RECORD_LENGTH,
    WAL_BLCKSZ,
    XLP_FIRST_IS_CONTRECORD,
    XLP_FIRST_IS_OVERWRITE_CONTRECORD,
    XLP_LONG_HEADER,
    WalPageHeader,
    maxalign,
    normalize_lsn,
    page_header_size,
    parse_page_header,
)
from zenith_utils.crc32c import crc32c

MAGIC = 0xD110
SEGMENT = 4 * WAL_BLCKSZ  # small, so that records often cross one
START = 0xFFFF_0000  # two segments below 4 GB
XLOG_SWITCH = 0x40
XLOG_OVERWRITE_CONTRECORD = 0xD0


@dataclass(frozen=True)
class Block:
    """A block reference to write; `hole` is (offset, length) of an image's hole."""

    id: int
    rel: RelTag
    blkno: int
    data: bytes = b""
    will_init: bool = False
    same_rel: bool = False
    image: bytes | None = None
    hole: tuple[int, int] = (0, 0)
    apply: bool = True
    compression: int = 0

    def header(self) -> bytes:
        """XLogRecordBlockHeader and what follows it."""
        flags = self.rel.forknum | (0x20 if self.data else 0) | (0x40 if self.will_init else 0)
        flags |= (0x80 if self.same_rel else 0) | (0x10 if self.image is not None else 0)
        out = struct.pack("<BBH", self.id, flags, len(self.data))
        if self.image is not None:
            info = (1 if self.hole[1] else 0) | (2 if self.apply else 0) | self.compression
            out += struct.pack("<HHB", len(self.image), self.hole[0], info)
            if self.compression and self.hole[1]:
                out += struct.pack("<H", self.hole[1])
        if not self.same_rel:
            out += struct.pack("<III", *self.rel[:3])
        return out + struct.pack("<I", self.blkno)


@dataclass(frozen=True)
class Spec:
    """A record to write."""

    rmid: int = Rmgr.HEAP
    info: int = 0
    xid: int = 700
    blocks: Sequence[Block] = ()
    main_data: bytes = b""
    origin: int = 0

    def pack(self, prev: int) -> bytes:
        """The record's bytes with a good CRC."""
        body = b"".join(block.header() for block in self.blocks)
        if self.origin:
            body += struct.pack("<BH", 253, self.origin)
        if len(self.main_data) > 255:
            body += struct.pack("<BI", 254, len(self.main_data))
        elif self.main_data:
            body += struct.pack("<BB", 255, len(self.main_data))
        body += b"".join((block.image or b"") + block.data for block in self.blocks)
        return seal(self.rmid, self.info, self.xid, prev, body + self.main_data)


def seal(rmid: int, info: int, xid: int, prev: int, body: bytes) -> bytes:
    header = struct.pack("<IIQBBxx", 24 + len(body), xid, prev, info, rmid)
    return header + struct.pack("<I", crc32c(header, crc32c(body))) + body


@dataclass
class Writer:
    """Lays records out on pages the way Postgres does; `data` begins at `start`."""

    start: int
    lsn: int = 0
    prev: int = 0
    data: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lsn = self.start

    def header(self, rem_len: int = 0, extra_info: int = 0) -> None:
        """Write the header of the page that starts here."""
        info = extra_info | (XLP_FIRST_IS_CONTRECORD if rem_len else 0)
        if self.lsn % SEGMENT == 0:
            info |= XLP_LONG_HEADER
        header = WalPageHeader(MAGIC, info, 1, self.lsn, rem_len, 42, SEGMENT, WAL_BLCKSZ)
        self.raw(header.pack())

    def raw(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.data += data
        self.lsn += len(data)

    def record(self, raw: bytes) -> int:
        """Write a record at the next possible place; its start."""
        self.raw(bytes(maxalign(self.lsn) - self.lsn))
        if self.lsn % WAL_BLCKSZ == 0:
            self.header()
        start = self.lsn
        while raw:
            if self.lsn % WAL_BLCKSZ == 0:
                self.header(len(raw))
            room = WAL_BLCKSZ - self.lsn % WAL_BLCKSZ
            self.raw(raw[:room])
            raw = raw[room:]
        self.prev = start
        self.starts.append(start)
        return start

    def spec(self, spec: Spec) -> int:
        """Write a record, behind XLOG_SWITCH the rest of the segment, too; its start."""
        start = self.record(spec.pack(self.prev))
        if spec.rmid == Rmgr.XLOG and spec.info == XLOG_SWITCH:
            self.raw(bytes(-self.lsn % SEGMENT))
        return start


def reference(data: bytes, start: int) -> list[tuple[int, int, bytes]]:
    """(start, end, raw) of the complete records in valid WAL, in a few lines of Python."""
    pages = {}
    position = start
    while position < start + len(data):
        end = position - position % WAL_BLCKSZ + WAL_BLCKSZ
        pages[position - position % WAL_BLCKSZ] = (position, data[position - start : end - start])
        position = end

    def read(lsn: int, size: int) -> tuple[int, bytes]:
        out = b""
        while len(out) < size:
            page = lsn - lsn % WAL_BLCKSZ
            lsn = max(lsn, page + page_header_size(page, SEGMENT))
            at, content = pages.get(page, (page, b""))
            piece = content[lsn - at :][: size - len(out)]
            if not piece:
                raise EOFError
            out += piece
            lsn += len(piece)
        return lsn, out

    records = []
    lsn = start
    try:
        while True:
            lsn = normalize_lsn(lsn, SEGMENT)
            _, length = read(lsn, 4)
            end, raw = read(lsn, int.from_bytes(length, "little"))
            end = maxalign(end)
            records.append((lsn, end, raw))
            lsn = end
            if (raw[17], raw[16]) == (Rmgr.XLOG, XLOG_SWITCH):
                lsn += -lsn % SEGMENT
    except EOFError:
        return records


def run(
    data: bytes, start: int, cuts: Sequence[int] = (), **options: bool
) -> tuple[WalDecoder, list[DecodedRecord]]:
    """Feed `data` cut at the offsets `cuts`."""
    decoder = WalDecoder(start, MAGIC, SEGMENT, **options)
    records = []
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in pairwise(bounds):
        decoder.feed(data[begin:end])
        while (record := decoder.next_record()) is not None:
            records.append(record)
    return decoder, records


relations = st.builds(
    RelTag, st.just(1663), st.integers(1, 5), st.integers(1, 2**32 - 1), st.integers(0, 3)
)


@st.composite
def block_lists(draw: st.DrawFn) -> list[Block]:
    blocks: list[Block] = []
    for block_id in sorted(draw(st.sets(st.integers(0, 32), max_size=4))):
        same_rel = bool(blocks) and draw(st.booleans())
        rel = draw(relations)
        if same_rel:
            rel = blocks[-1].rel._replace(forknum=rel.forknum)
        kind = draw(st.sampled_from(["none", "none", "full", "hole", "packed", "packed hole"]))
        offset = draw(st.integers(1, 4000))
        hole = (offset, draw(st.integers(1, 8192 - offset))) if "hole" in kind else (0, 0)
        size = {"none": 0, "full": 8192, "hole": 8192 - hole[1]}.get(kind, 1000)
        blocks.append(
            Block(
                id=block_id,
                rel=rel,
                blkno=draw(st.integers(0, 2**32 - 1)),
                data=draw(st.binary(max_size=60)),
                will_init=draw(st.booleans()),
                same_rel=same_rel,
                image=None if kind == "none" else bytes([block_id + 1]) * size,
                hole=hole,
                apply=draw(st.booleans()),
                compression=draw(st.sampled_from([4, 8, 16])) if "packed" in kind else 0,
            )
        )
    return blocks


specs = st.one_of(
    st.builds(
        Spec,
        rmid=st.sampled_from([*range(1, 22), 128, 255]),
        info=st.integers(0, 255),
        xid=st.integers(0, 2**32 - 1),
        blocks=block_lists(),
        main_data=st.one_of(
            st.binary(max_size=40),
            st.integers(200, 60000).map(lambda n: bytes(range(256)) * (n // 256)),
        ),
        origin=st.integers(0, 65535),
    ),
    st.just(Spec(rmid=Rmgr.XLOG, info=XLOG_SWITCH)),
)
starts = (
    st.integers(0, 2 * SEGMENT // 8)
    .map(lambda n: START + 8 * n)
    .map(lambda lsn: lsn if lsn % WAL_BLCKSZ == 0 else normalize_lsn(lsn, SEGMENT))
)


@settings(max_examples=40, deadline=None)
@given(starts, st.lists(specs, min_size=1, max_size=12), st.data())
def test_any_wal_in_any_chunking(start: int, wanted: list[Spec], draw: st.DataObject) -> None:
    writer = Writer(start)
    for spec in wanted:
        writer.spec(spec)
    data = bytes(writer.data)
    cuts = draw.draw(st.lists(st.integers(0, len(data)), max_size=30))
    decoder, records = run(data, start, cuts)

    assert [(r.start_lsn, r.end_lsn, r.raw) for r in records] == reference(data, start)
    assert [r.start_lsn for r in records] == writer.starts
    for spec, record in zip(wanted, records, strict=True):
        assert (record.rmid, record.info, record.xid) == (spec.rmid, spec.info, spec.xid)
        assert (record.origin, record.main_data) == (spec.origin, spec.main_data)
        for block, decoded in zip(spec.blocks, record.blocks, strict=True):
            assert (decoded.id, decoded.rel, decoded.blkno) == (block.id, block.rel, block.blkno)
            assert (decoded.data, decoded.image) == (block.data, block.image)
            assert decoded.will_init == block.will_init
            assert decoded.apply_image == (block.apply and block.image is not None)
            assert (decoded.hole_offset, decoded.hole_length) == block.hole
            assert decoded.compressed == bool(block.compression)
    assert decoder.position == maxalign(writer.lsn)
    assert decoder.received_lsn == start + len(data)

    assert run(data, start, range(len(data)) if len(data) < 5000 else [1, 2, 3])[1] == records
    scanner = WalDecoder(start, MAGIC, SEGMENT)
    assert sum(scanner.scan(data[i : i + 5000]) for i in range(0, len(data), 5000)) == len(records)
    assert scanner.position == decoder.position


def sample_wal() -> Writer:
    writer = Writer(START)
    rel = RelTag(1663, 5, 16384, 0)
    for i in range(30):
        image = bytes([i + 1]) * 6000
        writer.spec(
            Spec(
                xid=700 + i,
                blocks=[
                    Block(0, rel, i, b"tuple" * 9),
                    Block(1, rel, i + 1, image=image, hole=(3000, 2192), same_rel=True),
                ],
                main_data=b"main" * 5,
            )
        )
        writer.spec(Spec(rmid=Rmgr.XACT, main_data=bytes(8)))
        if i == 20:
            writer.spec(Spec(rmid=Rmgr.XLOG, info=XLOG_SWITCH))
    return writer


@pytest.mark.parametrize("resealed", [False, True])
def test_damage_is_found_and_never_a_crash(resealed: bool) -> None:
    """Random bytes are changed; `resealed`: the record's CRC is made good again, so that the damage
    reaches the parser of the record."""
    rng = random.Random(4711 + resealed)
    failures = 0
    for _ in range(400):
        data = bytearray(WRITER.data)
        offsets = [rng.randrange(len(data)) for _ in range(rng.randint(1, 3))]
        if resealed:  # near the start of records is where their lengths are
            offsets = [
                (rng.choice(WRITER.starts) - START + rng.randrange(60)) % len(data) for _ in offsets
            ]
        for offset in offsets:
            data[offset] ^= rng.randint(1, 255)
            if resealed:
                reseal(data, offset)
        decoder, good, failed = run_until_error(bytes(data), rng.randint(500, 20000))
        failures += failed
        assert decoder.position <= maxalign(WRITER.lsn)
        if not resealed:
            assert [(r.start_lsn, r.end_lsn, r.raw) for r in good] == ORIGINAL[: len(good)]
            assert failed or not any(is_inside_record(START + offset) for offset in offsets)
    assert failures > 200


def run_until_error(data: bytes, chunk: int) -> tuple[WalDecoder, list[DecodedRecord], bool]:
    """Decode up to the end or to an error, after which the decoder must stay failed."""
    decoder, records = WalDecoder(START, MAGIC, SEGMENT), []
    try:
        for i in range(0, len(data), chunk):
            decoder.feed(data[i : i + chunk])
            while (record := decoder.next_record()) is not None:
                records.append(record)
    except WalDecodeError:
        with pytest.raises(WalDecodeError):
            decoder.feed(b"more")
        with pytest.raises(WalDecodeError):
            decoder.next_record()
        with pytest.raises(WalDecodeError):
            decoder.scan(b"")
    return decoder, records, decoder.failed


def is_inside_record(lsn: int) -> bool:
    """Whether the byte at `lsn` belongs to a record that lies on one page."""
    return any(
        start <= lsn < start + len(raw) <= start - start % WAL_BLCKSZ + WAL_BLCKSZ
        for start, _, raw in ORIGINAL
    )


def reseal(data: bytearray, offset: int) -> None:
    """Give the record around `offset` a good CRC again if it lies on one page."""
    start = max(lsn for lsn in WRITER.starts if lsn <= START + max(offset, 40)) - START
    (length,) = struct.unpack_from("<I", data, start)
    room = WAL_BLCKSZ - start % WAL_BLCKSZ
    if 24 <= length <= room:
        crc = crc32c(data[start : start + 20], crc32c(data[start + 24 : start + length]))
        struct.pack_into("<I", data, start + 20, crc)


WRITER = sample_wal()
ORIGINAL = reference(bytes(WRITER.data), START)


def decode_one(body: bytes, rmid: int = Rmgr.HEAP, info: int = 0) -> DecodedRecord | None:
    writer = Writer(START)
    writer.record(seal(rmid, info, 0, 0, body))
    return run(bytes(writer.data), START)[1][0]


REL = struct.pack("<III", 1663, 5, 16384)
BLK = struct.pack("<I", 7)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\x05abc", "do not add up"),
        (b"\xff", "do not add up"),
        (b"\xfe\xff\xff\xff\xff" + b"x", "do not add up"),
        (b"\xfd\x01", "do not add up"),
        (b"\xfc\x01\x02", "do not add up"),
        (b"\x21" + b"\0" * 30, "invalid block id 33"),
        (b"\x00\x00\x00", "do not add up"),
        (b"\x00\x00\x00\x00" + REL, "do not add up"),
        (b"\x00\x80\x00\x00" + BLK, "not there"),
        (b"\x01\x00\x00\x00" + REL + BLK + b"\x01\x80\x00\x00" + BLK, "block id 1 out of order"),
        (b"\x00\x04\x00\x00" + REL + BLK, "invalid fork number 4"),
        (b"\x00\x20\x00\x00" + REL + BLK, "data flag"),
        (b"\x00\x00\x01\x00" + REL + BLK + b"x", "data flag"),
        (b"\x00\x10\x00\x00" + struct.pack("<HHB", 8193, 0, 2) + REL + BLK, "image: length 8193"),
        (b"\x00\x10\x00\x00" + struct.pack("<HHB", 100, 0, 2) + REL + BLK + b"x" * 100, "image"),
        (b"\x00\x10\x00\x00" + struct.pack("<HHB", 100, 0, 3) + REL + BLK + b"x" * 100, "image"),
        (b"\x00\x10\x00\x00" + struct.pack("<HHB", 100, 101, 3) + REL + BLK + b"x" * 100, "image"),
        (
            b"\x00\x10\x00\x00" + struct.pack("<HHBH", 9, 8000, 7, 300) + REL + BLK + b"x" * 9,
            "image",
        ),
        (b"\x00\x10\x00\x00" + struct.pack("<HHB", 8192, 0, 6) + REL + BLK + b"x" * 8192, "image"),
    ],
)
def test_lengths_inside_a_record_are_not_trusted(body: bytes, reason: str) -> None:
    with pytest.raises(WalDecodeError, match=reason):
        decode_one(body)


def test_image_restored_with_its_hole() -> None:
    record = run(bytes(WRITER.data), START)[1][0]
    page = restore_image(record.blocks[1])
    assert page == b"\1" * 3000 + bytes(2192) + b"\1" * 3000
    assert restore_image(record.blocks[0]) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"magic": 0xD10D}, "magic D10D"),
        ({"info": XLP_FIRST_IS_CONTRECORD | 0x10}, "info bits 0011"),
        ({"info": XLP_FIRST_IS_CONTRECORD | XLP_LONG_HEADER}, "info bits"),
        ({"page_lsn": START - SEGMENT}, "claims to be"),
        ({"info": 0}, "does not continue"),
        ({"rem_len": 17}, "with 17 bytes"),
        ({"timeline": 0}, "timeline 0 after timeline 1"),
    ],
)
def test_page_headers_are_checked(change: dict[str, int], reason: str) -> None:
    data = bytearray(WRITER.data)
    good = parse_page_header(data[WAL_BLCKSZ:])
    assert good.info == XLP_FIRST_IS_CONTRECORD
    values = {
        name: getattr(good, name) for name in ("magic", "info", "timeline", "page_lsn", "rem_len")
    }
    data[WAL_BLCKSZ : WAL_BLCKSZ + 24] = WalPageHeader(**(values | change)).pack()[:24]
    with pytest.raises(WalDecodeError, match=reason) as error:
        run(bytes(data), START)
    assert error.value.lsn == START + WAL_BLCKSZ


def test_segment_header_names_the_cluster() -> None:
    decoder = WalDecoder(START, MAGIC, SEGMENT, system_identifier=43)
    with pytest.raises(WalDecodeError, match="database system 42"):
        decoder.scan(WRITER.data)
    decoder = WalDecoder(START, MAGIC, 2 * SEGMENT)
    with pytest.raises(WalDecodeError, match="segment size"):
        decoder.scan(WRITER.data)


def test_chain_of_records_is_checked() -> None:
    writer = Writer(START)
    writer.spec(Spec(main_data=b"one"))
    writer.prev = START + 48  # of a record that never was
    writer.spec(Spec(main_data=b"stale"))
    data = bytes(writer.data)
    with pytest.raises(WalDecodeError, match="as its predecessor"):
        run(data, START)
    assert len(run(data, START, check_prev=False)[1]) == 2
    decoder = WalDecoder(START, MAGIC, SEGMENT, prev_lsn=START - 100)
    with pytest.raises(WalDecodeError, match="as its predecessor"):
        decoder.scan(data)


def test_senseless_length_is_refused_at_once() -> None:
    """No memory is reserved for a length that only claims to be there."""
    for length in (23, MAX_RECORD_LENGTH + 1, 0xFFFFFFFF):
        decoder = WalDecoder(START, MAGIC, SEGMENT)
        writer = Writer(START)
        writer.header()
        decoder.feed(bytes(writer.data) + struct.pack("<I", length))
        with pytest.raises(WalDecodeError, match=f"length {length}"):
            decoder.next_record()


def test_switch_moves_on_to_the_next_segment() -> None:
    writer = Writer(START)
    writer.spec(Spec(main_data=b"before"))
    switch = writer.spec(Spec(rmid=Rmgr.XLOG, info=XLOG_SWITCH))
    assert writer.lsn == START + SEGMENT
    data = bytes(writer.data)
    decoder = WalDecoder(START, MAGIC, SEGMENT)
    decoder.scan(data[:-1])
    assert decoder.position == switch + 24
    decoder.scan(data[-1:])
    assert decoder.position == START + SEGMENT

    after = writer.spec(Spec(main_data=b"after"))
    data = bytes(writer.data)
    # a decoder that starts behind the switch record finds the next one, from any page of the gap
    for start in (switch + 24, START + WAL_BLCKSZ):
        _, records = run(data[start - START :], start, range(0, len(data), 777))
        assert [r.start_lsn for r in records] == [after]
        with pytest.raises(WalDecodeError):
            run(data[start - START :], start, assume_switch=False)
    garbage = bytearray(data)
    garbage[SEGMENT - 1] = 1
    with pytest.raises(WalDecodeError, match="not zero"):
        run(bytes(garbage), START)


def overwritten_wal(confirmed_lsn: int | None) -> tuple[bytes, int]:
    """A record whose tail was lost in a crash, and what Postgres writes over the lost part."""
    writer = Writer(START)
    first = writer.spec(Spec(main_data=b"one"))
    lost = writer.spec(Spec(main_data=bytes(20000)))
    cut = START + 2 * WAL_BLCKSZ
    del writer.data[cut - START :]
    writer.lsn, writer.prev = cut, first
    writer.header(extra_info=XLP_FIRST_IS_OVERWRITE_CONTRECORD)
    body = struct.pack("<Qq", lost if confirmed_lsn is None else confirmed_lsn, 0)
    writer.spec(Spec(rmid=Rmgr.XLOG, info=XLOG_OVERWRITE_CONTRECORD, main_data=body))
    writer.spec(Spec(main_data=b"two"))
    return bytes(writer.data), cut


def test_lost_tail_of_a_record_is_overwritten() -> None:
    data, cut = overwritten_wal(None)
    for step in (len(data), 13):
        decoder, records = run(data, START, range(0, len(data), step))
        assert [r.main_data for r in records if r.rmid == Rmgr.HEAP] == [b"one", b"two"]
        assert records[1].start_lsn == cut + 24
        assert decoder.position == records[-1].end_lsn
    with pytest.raises(WalDecodeError, match="is void"):
        run(overwritten_wal(START)[0], START)


def test_joining_in_the_middle_of_a_record() -> None:
    records = run(bytes(WRITER.data), START)[1]
    page = START + WAL_BLCKSZ
    data = bytes(WRITER.data[WAL_BLCKSZ:])
    with pytest.raises(WalDecodeError, match="that is not there"):
        run(data, page)
    _, joined = run(data, page, range(0, len(data), 1001), join_mid_record=True)
    assert joined == [r for r in records if r.start_lsn >= page]
    assert joined[0].start_lsn > page


def test_start_must_be_a_place_for_a_record() -> None:
    for lsn in (START + 8, START + WAL_BLCKSZ + 16, START + 44):
        with pytest.raises(ValueError, match="no WAL record can start"):
            WalDecoder(lsn, MAGIC, SEGMENT)
    with pytest.raises(ValueError, match="magic 1234"):
        WalDecoder(START, 0x1234)
