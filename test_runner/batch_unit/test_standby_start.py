"""Where a hot standby begins: the places in WAL, what its first WAL says, its feedback."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_unit.ffi_support import make_server
from batch_unit.workspace import temporary_workspace

from compute_tools import standby_feed
from compute_tools.standby_datadir import begin_replay
from compute_tools.standby_start import StandbyStart, places
from postgres_ffi.control_file import DBState, parse_control_file
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.record_reader import RecordFormatError
from postgres_ffi.standby_records import RunningXacts, parse_running_xacts
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, segment_start, wal_file_name
from postgres_ffi.xlog_records import XLOG_CHECKPOINT_ONLINE, XLOG_CHECKPOINT_SHUTDOWN, XLOG_NOOP
from safekeeper.send_wal import parse_standby_feedback
from zenith_utils.lsn import Lsn
from zenith_utils.safekeeper_messages import NO_XMIN, HotStandbyFeedback

BEGIN, END = b"zenith snapshot {", b"zenith snapshot }"


def record(lsn: int, rmid: int, info: int, data: bytes) -> DecodedRecord:
    return DecodedRecord(lsn, lsn + 64, 0, 0, 0, rmid, info, 0, (), data, b"")


def mark(lsn: int, text: bytes) -> DecodedRecord:
    return record(lsn, Rmgr.XLOG, XLOG_NOOP, text)


def running(lsn: int, oldest: int, *, overflow: bool = False) -> DecodedRecord:
    data = struct.pack("<2i?3x3I", 1, 0, overflow, oldest + 5, oldest, oldest + 4)
    return record(lsn, Rmgr.STANDBY, 0x10, data + struct.pack("<I", oldest))


def shutdown(lsn: int) -> DecodedRecord:
    return record(lsn, Rmgr.XLOG, XLOG_CHECKPOINT_SHUTDOWN, bytes(88))


def test_places() -> None:
    """A shutdown checkpoint; the first mark of a pair with just one snapshot between."""
    assert list(places([shutdown(80), running(160, 700)])) == [StandbyStart(Lsn(80), None)]
    whole = [mark(80, BEGIN), running(160, 700), mark(240, END)]
    assert list(places(whole)) == [StandbyStart(Lsn(80), 700)]
    overflowed = [mark(80, BEGIN), running(160, 700, overflow=True), mark(240, END)]
    assert list(places(overflowed)) == [StandbyStart(Lsn(80), 700, overflowed=True)]


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
    assert list(places(records)) == []


def test_crash_between_marks() -> None:
    """What follows a shutdown checkpoint belongs to another life of the server."""
    crashed = [mark(80, BEGIN), shutdown(160), running(240, 700), mark(320, END)]
    assert list(places(crashed)) == [StandbyStart(Lsn(160), None)]


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
