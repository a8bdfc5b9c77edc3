"""Where in the WAL a hot standby begins: found in the very WAL that it is going to replay.

It has to learn which transactions run there and which access exclusive locks they hold. Two kinds
of places tell:

- a shutdown checkpoint, such as every start of a read-write node writes: only prepared
  transactions are left there, and the base backup has those;
- a snapshot that the zenith library wrote between two marks (pgxn/zenith/standby_snapshot.c):
  locks first, then the running transactions.

From there on everything comes as records. Only committed WAL is looked at.

A transaction whose commit waits for its acknowledgement still counts as running in a snapshot,
behind its commit record. A standby that begins there would learn from nobody that it has ended: to
its queries a transaction newer than the newest one it has seen end lies in the future. So replay
begins before such records.
"""

from __future__ import annotations

import logging
import struct
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from compute_tools._standby_scan import scan
from compute_tools.spec import ComputeSpec, address_text
from compute_tools.standby_feed import WAL_IS_GONE, connect_safekeeper, flush_lsn, progress
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.slru import xid_precedes
from postgres_ffi.standby_records import RunningXacts, parse_running_xacts
from postgres_ffi.versions import PgVersion, Rmgr
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, segment_start
from postgres_ffi.xlog_records import XLOG_CHECKPOINT_SHUTDOWN
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqConnection, PqError

log = logging.getLogger(__name__)

_SNAPSHOT_BEGINS = b"zenith snapshot {"
_SNAPSHOT_ENDS = b"zenith snapshot }"
_XLOG_DATA = struct.Struct(">cQQq")
_TAG_XLOG_DATA = ord("w")
_REPLY_REQUESTED = 1  # a bit in a keepalive's last byte
_READ_TIMEOUT = 10.0
# Of a segment that comes out of object storage.
_FETCH_TIMEOUT = 30.0
# How far back a place is looked for: the last segment alone, then with so many before it.
_SEGMENTS_BACK = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class StandbyStartError(Exception):
    """No place to begin was found; the message says why."""


@dataclass(frozen=True, slots=True)
class StandbyStart:
    """A place where replay can begin: `lsn` is the start of a record.

    `oldest_running_xid` is None if only prepared transactions are left there. With `overflowed`
    subtransactions are missing in the snapshot: the standby opens when they have ended. With
    `unsettled` there are transactions that run there, or have ended in WAL that was not looked at.
    `committed_lsn` is what was known to be committed when the place was looked for.
    """

    lsn: Lsn
    oldest_running_xid: int | None
    overflowed: bool = False
    unsettled: bool = False
    committed_lsn: int = 0


def find_standby_start(spec: ComputeSpec, version: PgVersion) -> StandbyStart:
    """The last place in the committed WAL where a standby can begin; raises StandbyStartError.

    Asks the safekeeper that has most WAL, then the others.
    """
    reasons: list[str] = []
    known = progress(spec, reasons)
    for address in sorted(known, key=lambda address: known[address], reverse=True):
        try:
            found = _search(address, spec, version)
        except (PqError, OSError, TimeoutError, WalDecodeError, ValueError) as e:
            reasons.append(f"{address_text(*address)}: {e}")
            continue
        if found is not None:
            log.info("replay begins at %s, found on %s", found.lsn, address_text(*address))
            return found
        reasons.append(f"{address_text(*address)}: no place to begin in the WAL it has")
    raise StandbyStartError(
        f"cannot start a hot standby: no safekeeper has WAL of timeline {spec.timeline_id} with a "
        "place to begin; start a read-write node of the branch first, which makes one "
        f"({'; '.join(reasons)})"
    )


def last_place(records: Iterable[DecodedRecord], ended: Mapping[int, int]) -> StandbyStart | None:
    """The last place where a standby can begin among records in WAL order, None if there is none.

    With a whole snapshot if one has that. A snapshot counts if it is the only one between its
    marks: then its locks are there, too. `ended` has the start LSNs of the records, in the same
    WAL, by which transactions end.
    """
    begin: int | None = None
    between = 0
    snapshots: list[_Snapshot] = []
    last: _Place | None = None
    whole: _Place | None = None
    for record in records:
        if record.rmid == Rmgr.STANDBY:
            snapshots.append(_Snapshot(record.start_lsn, parse_running_xacts(record.main_data)))
            between += 1
        elif record.rmgr_info == XLOG_CHECKPOINT_SHUTDOWN:
            # What comes belongs to another life of the server.
            begin, snapshots = None, []
            last = whole = _Place(record.start_lsn, snapshots, 0)
        elif record.main_data == _SNAPSHOT_BEGINS:
            begin, between = record.start_lsn, 0
        elif record.main_data == _SNAPSHOT_ENDS:
            if begin is not None and between == 1:
                last = _Place(begin, snapshots, len(snapshots))
                if not snapshots[-1].running.subxid_overflow:
                    whole = last
            begin = None
    chosen = whole or last
    return None if chosen is None else _start(chosen, ended)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A record that tells which transactions run, and where it starts."""

    lsn: int
    running: RunningXacts


@dataclass(frozen=True, slots=True)
class _Place:
    """A shutdown checkpoint, or the first mark before the last of the first `count` snapshots."""

    lsn: int
    snapshots: list[_Snapshot]
    count: int


def _start(place: _Place, ended: Mapping[int, int]) -> StandbyStart:
    """Not behind a place, and before the ends of all that are listed as running.

    The locks come before the last snapshot, which has been replayed when queries are let in. Until
    then the first one is believed.
    """
    if not place.count:
        return StandbyStart(Lsn(place.lsn), None)
    snapshots = place.snapshots[: place.count]
    last = snapshots[-1].running
    lsn = place.lsn
    while True:
        first = snapshots[bisect_right(snapshots, lsn, key=lambda snapshot: snapshot.lsn)]
        ends_before = [at for xid in first.running.xids if (at := ended.get(xid, lsn)) < lsn]
        if not ends_before:
            break
        lsn = min(ends_before)
    oldest = first.running.oldest_running_xid
    for xid, at in ended.items():
        if lsn <= at < first.lsn and xid_precedes(xid, oldest):
            oldest = xid
    return StandbyStart(
        Lsn(lsn),
        oldest,
        overflowed=last.subxid_overflow,
        unsettled=not ended.keys() >= {*first.running.xids, *last.xids},
    )


def _search(address: tuple[str, int], spec: ComputeSpec, version: PgVersion) -> StandbyStart | None:
    """The last place with a whole snapshot, as far back as there is WAL; else the last of all.

    Commits wait for less than a segment, mostly: before an unsettled place one more is looked at.
    """
    with connect_safekeeper(address, spec) as conn:
        last = segment_start(flush_lsn(conn))
    best: StandbyStart | None = None
    for back in _SEGMENTS_BACK:
        begin = last - back * WAL_SEGMENT_SIZE
        if begin < 0:
            break
        try:
            with connect_safekeeper(address, spec) as conn:
                ended: dict[int, int] = {}
                records, committed_lsn = _read(conn, begin, version, ended)
        except (PqError, TimeoutError) as e:
            is_gone = isinstance(e, PqError) and e.sqlstate == WAL_IS_GONE
            if best is None and not (back and is_gone):
                raise
            break
        found = last_place(records, ended)
        if found is not None:
            best = replace(found, committed_lsn=committed_lsn)
            if not found.overflowed and (back or not found.unsettled):
                break
    return best


def _read(
    conn: PqConnection, begin: int, version: PgVersion, ended: dict[int, int]
) -> tuple[list[DecodedRecord], int]:
    """The records of interest from the segment start `begin` to the commit LSN, which comes second.

    `ended` gets the transactions that end, with the start LSN of the record that says so: those of
    the last two segments, as there may be millions. To queries the others end with what follows.
    Where the timeline begins in this segment, so does what the safekeeper sends.
    """
    conn.start_copy_both(f"START_REPLICATION {Lsn(begin)} TIMELINE 1", timeout=_READ_TIMEOUT)
    decoder: WalDecoder | None = None
    records: list[DecodedRecord] = []
    position = begin
    deadline = time.monotonic() + _FETCH_TIMEOUT
    while True:
        message = conn.recv_copy_data(timeout=_READ_TIMEOUT)
        if message is None:
            return records, position
        if message[0] != _TAG_XLOG_DATA:
            if message[-1] & _REPLY_REQUESTED:
                return records, position  # nothing more is committed
            # It waits for WAL to come out of an object storage.
            if time.monotonic() > deadline:
                raise TimeoutError(f"no WAL at {Lsn(position)} within {_FETCH_TIMEOUT:.0f} s")
            continue
        _, lsn, commit_lsn, _ = _XLOG_DATA.unpack_from(message)
        data = message[_XLOG_DATA.size :]
        if decoder is None:
            magic = version.xlog_page_magic
            decoder = WalDecoder(lsn, magic, WAL_SEGMENT_SIZE, join_mid_record=True)
        records += scan(decoder, data, version, ended)
        position = lsn + len(data)
        if segment_start(position) > segment_start(lsn):
            horizon = segment_start(position) - WAL_SEGMENT_SIZE
            for xid in [xid for xid, at in ended.items() if at < horizon]:
                del ended[xid]
        if position >= commit_lsn:
            return records, position
        deadline = time.monotonic() + _FETCH_TIMEOUT
