"""Where a hot standby begins: the places in WAL, what its first WAL says, its feedback."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from batch_unit.ffi_support import make_server
from batch_unit.workspace import temporary_workspace

from compute_tools import standby_feed, standby_start
from compute_tools.standby_datadir import begin_replay
from compute_tools.standby_start import (
    StandbyStart,
    StandbyStartError,
    find_standby_start,
    last_place,
)
from postgres_ffi.control_file import DBState, parse_control_file
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.distrib import find_distrib
from postgres_ffi.record_reader import RecordFormatError
from postgres_ffi.standby_records import RunningXacts, parse_running_xacts
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, segment_start, wal_file_name
from postgres_ffi.xlog_records import XLOG_CHECKPOINT_ONLINE, XLOG_CHECKPOINT_SHUTDOWN, XLOG_NOOP
from safekeeper.send_wal import parse_standby_feedback
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqConnectionLost, PqError
from zenith_utils.safekeeper_messages import NO_XMIN, HotStandbyFeedback

BEGIN, END = b"zenith snapshot {", b"zenith snapshot }"


def record(lsn: int, rmid: int, info: int, data: bytes) -> DecodedRecord:
    return DecodedRecord(lsn, lsn + 64, 0, 0, 0, rmid, info, 0, (), data, b"")


def mark(lsn: int, text: bytes) -> DecodedRecord:
    return record(lsn, Rmgr.XLOG, XLOG_NOOP, text)


def running(lsn: int, oldest: int, *others: int, overflow: bool = False) -> DecodedRecord:
    xids = oldest, *others
    data = struct.pack("<2i?3x3I", len(xids), 0, overflow, max(xids) + 5, oldest, max(xids) + 4)
    return record(lsn, Rmgr.STANDBY, 0x10, data + struct.pack(f"<{len(xids)}I", *xids))


def shutdown(lsn: int) -> DecodedRecord:
    return record(lsn, Rmgr.XLOG, XLOG_CHECKPOINT_SHUTDOWN, bytes(88))


def test_places() -> None:
    """A shutdown checkpoint; the first mark of a pair with just one snapshot between."""
    assert last_place([shutdown(80), running(160, 700)], {}) == StandbyStart(Lsn(80), None)
    whole = [mark(80, BEGIN), running(160, 700), mark(240, END)]
    assert last_place(whole, {700: 320}) == StandbyStart(Lsn(80), 700)
    assert last_place(whole, {}) == StandbyStart(Lsn(80), 700, unsettled=True)
    overflowed = [mark(80, BEGIN), running(160, 700, overflow=True), mark(240, END)]
    assert last_place(overflowed, {700: 320}) == StandbyStart(Lsn(80), 700, overflowed=True)


@pytest.mark.parametrize(
    ("snapshots", "ended", "lsn", "oldest"),
    [
        # Before the record by which the transaction ends; another one runs there, too.
        ([], {700: 720, 698: 760, 600: 640}, 720, 698),
        ([], {700: 800, 698: 760}, 800, 700),
        ([], {700: 808, 698: 760}, 800, 700),
        # Of those that are listed the first to end, whatever its number.
        ([], {700: 720, 701: 640, 698: 600}, 640, 700),
        # The first snapshot behind the place is believed: what it lists has to end behind it, too.
        ([running(740, 699, 700)], {700: 720, 701: 880, 699: 640}, 640, 699),
        ([running(740, 699, 700)], {700: 720, 701: 880, 699: 760}, 720, 699),
        ([running(600, 699), running(740, 699, 700)], {700: 720, 699: 560}, 560, 699),
        ([running(700, 699), running(710, 699)], {700: 720, 699: 640}, 720, 700),
    ],
)
def test_ended_before_the_place(
    snapshots: list[DecodedRecord], ended: dict[int, int], lsn: int, oldest: int
) -> None:
    """Transactions that a snapshot lists behind their ends have them replayed."""
    whole = [mark(800, BEGIN), running(840, 700, 701), mark(880, END)]
    found = last_place([*snapshots, *whole], ended)
    assert found is not None
    assert (found.lsn, found.oldest_running_xid) == (lsn, oldest)
    assert found.unsettled == (701 not in ended)


def test_many_places() -> None:
    """A branch that writes little has tens of thousands in a segment."""
    records = []
    for lsn in range(80, 80 + 50_000 * 240, 240):
        records += [mark(lsn, BEGIN), running(lsn + 80, 700), mark(lsn + 160, END)]
    ended = {xid: 80 + xid * 240 for xid in range(1000, 50_000)}
    assert last_place(records, ended) == StandbyStart(Lsn(49_999 * 240 + 80), 700, unsettled=True)


def test_numbers_begin_anew() -> None:
    """The oldest of some transactions is not the one with the least number."""
    snapshot = record(840, Rmgr.STANDBY, 0x10, struct.pack("<2i?3x4I", 1, 0, False, 5, 4, 3, 4))
    whole = [mark(800, BEGIN), snapshot, mark(880, END)]
    found = last_place(whole, {4: 720, 0xFFFF_FFF0: 760})
    assert found is not None
    assert (found.lsn, found.oldest_running_xid) == (720, 0xFFFF_FFF0)


@pytest.mark.parametrize(
    "records",
    [
        [running(80, 700)],
        [mark(80, BEGIN), mark(160, END)],
        [mark(80, BEGIN), running(160, 700)],
        [running(80, 700), mark(160, END)],
        [mark(80, BEGIN), running(160, 700), running(240, 701), mark(320, END)],
        [mark(80, b"somebody else's"), running(160, 700), mark(240, END)],
    ],
)
def test_no_places(records: list[DecodedRecord]) -> None:
    """Locks may have been written before, or belong to another snapshot."""
    assert last_place(records, {}) is None


def test_crash_between_marks() -> None:
    """What follows a shutdown checkpoint belongs to another life of the server."""
    crashed = [mark(80, BEGIN), shutdown(160), running(240, 700), mark(320, END)]
    assert last_place(crashed, {}) == StandbyStart(Lsn(160), None)


def test_running_xacts() -> None:
    """Every length is checked."""
    data = running(0, 700).main_data
    assert parse_running_xacts(data) == RunningXacts(False, 705, 700, 704, (700,))
    for bad in (data[:-1], data + b"\0", b"", struct.pack("<2i", -1, 2) + data[8:]):
        with pytest.raises(RecordFormatError):
            parse_running_xacts(bad)


def test_standby_feedback() -> None:
    """The epoch comes second on the wire and counts first; 0 is none."""
    message = memoryview(struct.pack(">cqIIII", b"h", 5, 700, 3, 0, 0))
    assert parse_standby_feedback(message) == HotStandbyFeedback(5, (3 << 32) + 700, NO_XMIN)
    with pytest.raises(struct.error):
        parse_standby_feedback(message[:-1])


def test_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The safekeeper followed changes when it is silent, or behind for a whole interval."""
    addresses = ("a", 1), ("b", 2), ("c", 3)
    spec = SimpleNamespace(safekeepers=addresses, port=3, tenant_id="t", timeline_id="l")
    known: dict[tuple[str, int], int] = {}
    monkeypatch.setattr(standby_feed, "progress", lambda *_, **__: dict(known))
    monkeypatch.setattr(standby_feed, "waits_at", lambda _: None)
    changes: list[str] = []
    feed = standby_feed.StandbyFeed(
        spec,  # type: ignore[arg-type]
        lambda: changes.append(feed.conninfo()),
    )
    assert "host='a,b,c' port='1,2,3'" in feed.conninfo()
    feed.check()  # nobody answers: nothing would be won
    known |= dict.fromkeys(addresses, 100)
    feed.check()
    known[addresses[1]] = 200
    feed.check()  # the first may be there soon
    assert not changes
    known[addresses[0]] = 199
    feed.check()
    assert len(changes) == 1
    assert "host='b,a,c' port='2,1,3'" in changes[0]
    del known[addresses[1]]
    feed.check()
    assert len(changes) == 2
    assert "host='a,b,c'" in changes[1]


def test_feed_leads_to_wal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby goes to who has the WAL it needs; if nobody has it for long enough, it is lost."""
    one, two, three = addresses = ("a", 1), ("b", 2), ("c", 3)
    spec = SimpleNamespace(safekeepers=addresses, port=3, tenant_id="t", timeline_id="l")
    holders = {one: True, two: True, three: True}
    waits: list[Lsn | None] = [None]

    def has_wal(address: tuple[str, int], *_: object) -> bool:
        if address not in holders:
            raise PqConnectionLost("away")
        return holders[address]

    monkeypatch.setattr(standby_feed, "progress", lambda *_, **__: dict.fromkeys(addresses, 100))
    monkeypatch.setattr(standby_feed, "has_wal", has_wal)
    monkeypatch.setattr(standby_feed, "waits_at", lambda _: waits[0])
    changes: list[str] = []
    feed = standby_feed.StandbyFeed(
        spec,  # type: ignore[arg-type]
        lambda: changes.append(feed.conninfo()),
    )
    holders[one] = False
    feed.begin_at(Lsn(80))
    assert "host='b,a,c'" in feed.conninfo()
    holders[two] = False
    feed.check()
    assert not changes  # it streams
    waits[0] = Lsn(80)
    feed.check()
    assert len(changes) == 1
    assert "host='c,b,a'" in feed.conninfo()

    # Most have to say that it is gone, again and again for the same LSN.
    del holders[three], holders[two]
    for _ in range(5):
        feed.check()
    assert not feed.lost
    holders[two] = False
    for lsn in (80, 88):
        waits[0] = Lsn(lsn)
        feed.check()
    holders[three] = True
    feed.check()
    del holders[three]
    feed.check()
    assert not feed.lost
    feed.check()
    assert "the WAL at 0/58" in feed.lost
    assert "start it again" in feed.lost
    assert len(changes) == 1


class Connection:
    """A safekeeper's."""

    messages: ClassVar[list[bytes | Exception]] = []

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_copy_both(self, sql: str, *, timeout: float) -> None:
        """Take the command."""
        del timeout
        assert sql.startswith("START_REPLICATION")

    def recv_copy_data(self, *, timeout: float) -> memoryview:
        """The next of the messages."""
        del timeout
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return memoryview(message)


def prepare(monkeypatch: pytest.MonkeyPatch, end: int, scan: Callable[..., object]) -> None:
    """The one safekeeper has WAL up to `end`, in which `scan` finds the records of interest."""
    monkeypatch.setattr(standby_start, "connect_safekeeper", lambda *_: Connection())
    monkeypatch.setattr(standby_start, "flush_lsn", lambda _: end)
    monkeypatch.setattr(standby_start, "progress", lambda *_: {("a", 1): end})
    monkeypatch.setattr(standby_start, "scan", scan)


def find(*messages: bytes | Exception) -> StandbyStart:
    """Where to begin, as that safekeeper's messages tell; all of them are asked for."""
    Connection.messages[:] = messages
    spec = SimpleNamespace(safekeepers=(("a", 1),), timeline_id="l")
    found = find_standby_start(spec, find_distrib().version)  # type: ignore[arg-type]
    assert not Connection.messages
    return found


def test_looking_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalives come at the end of committed WAL, and while WAL is fetched from elsewhere.

    What cannot be read is told, unless it is that there is no more.
    """
    begin = 3 * WAL_SEGMENT_SIZE
    fetching, idle = (struct.pack(">cQqB", b"k", begin, 0, flags) for flags in (0, 1))

    def wal(lsn: int) -> bytes:
        return struct.pack(">cQQq", b"w", lsn, begin + 16, 0) + bytes(8)

    prepare(monkeypatch, begin + 16, lambda *_: [shutdown(begin)])
    assert find(fetching, wal(begin), fetching, wal(begin + 8)).committed_lsn == begin + 16
    assert find(wal(begin), idle).committed_lsn == begin + 8
    with pytest.raises(StandbyStartError, match="no safekeeper has WAL of timeline l with a place"):
        find(idle, idle, idle)
    with pytest.raises(StandbyStartError, match="a:1: no place to begin in the WAL it has"):
        find(idle, PqError("FATAL", "58P01", "gone"))
    with pytest.raises(StandbyStartError, match="a:1: FATAL: damaged"):
        find(idle, PqError("FATAL", "XX000", "damaged"))
    with pytest.raises(StandbyStartError, match="a:1: FATAL: gone"):
        find(PqError("FATAL", "58P01", "gone"))


def test_looking_further_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that runs, or ended before the last segment: one more tells mostly."""
    begin = 3 * WAL_SEGMENT_SIZE
    whole = [mark(begin + 80, BEGIN), running(begin + 160, 700), mark(begin + 240, END)]
    ends = {begin: {701: begin + 400}, begin - WAL_SEGMENT_SIZE: {700: begin - 80}}

    def wal(lsn: int) -> bytes:
        return struct.pack(">cQQq", b"w", lsn, lsn + 8, 0) + bytes(8)

    asked: list[int] = []

    def scan(decoder: WalDecoder, _: object, __: object, ended: dict[int, int]) -> object:
        asked.append(decoder.position)
        ended |= ends[decoder.position]
        return whole

    prepare(monkeypatch, begin + 500, scan)
    before = begin - WAL_SEGMENT_SIZE
    assert find(wal(begin), wal(before)).lsn == begin - 80
    assert asked == [begin, before]
    # It runs; or nobody can tell.
    ends[before] = {}
    assert find(wal(begin), wal(before)).lsn == begin + 80
    assert find(wal(begin), PqError("FATAL", "58P01", "gone")).lsn == begin + 80
    asked.clear()
    ends[begin] = {700: begin + 400}
    assert find(wal(begin)).lsn == begin + 80
    assert asked == [begin]


def test_much_wal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all transactions that end in it only the last ones are kept in memory."""
    step = WAL_SEGMENT_SIZE // 2
    end = 10 * WAL_SEGMENT_SIZE

    def scan(_: object, data: memoryview, __: object, ended: dict[int, int]) -> list[object]:
        lsn = int.from_bytes(data[:8], "big")
        ended |= {lsn // step: lsn}
        return []

    monkeypatch.setattr(standby_start, "scan", scan)
    Connection.messages[:] = [
        struct.pack(">cQQq", b"w", lsn, end, 0) + lsn.to_bytes(8, "big") + bytes(step - 8)
        for lsn in range(0, end, step)
    ]
    ended: dict[int, int] = {}
    records, committed = standby_start._read(
        Connection(),  # type: ignore[arg-type]
        0,
        find_distrib().version,
        ended,
    )
    assert (records, committed) == ([], end)
    assert list(ended) == [18, 19]


def test_begin_replay() -> None:
    """Local WAL ends where replay begins; the checkpoint ahead can be read, but not followed."""
    with temporary_workspace() as workspace:
        server = make_server(workspace / "data")
        control = server.control()
        start = control.checkpoint_lsn
        begin_replay(Path(server.datadir), StandbyStart(Lsn(start), 700, committed_lsn=start + 800))
        standby = parse_control_file((Path(server.datadir) / "global/pg_control").read_bytes())
        assert standby.state is DBState.SHUTDOWNED_IN_RECOVERY
        assert standby.field("min_recovery_point") == start + 800
        assert standby.checkpoint.redo == start
        assert standby.checkpoint.oldest_active_xid == 700

        pg_wal = Path(server.datadir) / "pg_wal"
        segment = segment_start(start)
        here = (pg_wal / wal_file_name(1, segment // WAL_SEGMENT_SIZE)).read_bytes()
        assert len(here) == WAL_SEGMENT_SIZE
        assert not any(here[start - segment :])

        ahead = standby.checkpoint_lsn
        data = (pg_wal / wal_file_name(1, ahead // WAL_SEGMENT_SIZE)).read_bytes()
        assert len(data) == WAL_SEGMENT_SIZE
        magic = control.version.xlog_page_magic
        decoder = WalDecoder(segment_start(ahead), magic)
        decoder.feed(data[:4096])
        checkpoint = decoder.next_record()
        assert checkpoint is not None
        assert (checkpoint.start_lsn, checkpoint.rmgr_info) == (ahead, XLOG_CHECKPOINT_ONLINE)
        with pytest.raises(WalDecodeError, match="predecessor"):
            follower = WalDecoder(segment_start(ahead), magic, prev_lsn=ahead - 120)
            follower.feed(data[:4096])
            follower.next_record()
