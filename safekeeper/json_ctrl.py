"""JSON_CTRL: one WAL record appended as a proposer would, as told by a JSON object.

For tests of the WAL service: with it they make logs of any terms on any safekeepers without a
compute. It goes through the acceptor's rules like everything else, so it can break no promise, but
whoever uses it on a timeline in use takes the place of its compute.

The request is an object with all of
- ``lm_prefix``, ``lm_message`` (strings): content of the logical message that is the record;
- ``term``: the term to append in; ``send_proposer_elected`` (bool): be announced as its leader
  first, with the acceptor's own history below ``epoch_start_lsn`` and the switch to ``term`` there;
- ``begin_lsn``: where the record goes, the end of the log; ``set_commit_lsn`` (bool): say that it
  is committed; ``truncate_lsn``: the horizon to say;
and ``prev_lsn`` if its xl_prev has to link it to a record that is not on this safekeeper. LSNs are
plain integers, in the answer, too.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from typing import Any, Final

from postgres_ffi.startup_wal import PageHeaders, wal_record
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecoder
from postgres_ffi.wal_format import (
    WAL_BLCKSZ,
    WAL_SEGMENT_SIZE,
    maxalign,
    normalize_lsn,
    page_header_size,
)
from safekeeper import control_file
from safekeeper.consensus import ConsensusError, Session
from safekeeper.timeline import Timeline
from safekeeper.wal_files import SegmentReader
from safekeeper.wal_storage import wal_magic
from zenith_utils.lsn import lsn_text
from zenith_utils.postgres_connection import QueryError
from zenith_utils.safekeeper_messages import (
    AppendRequest,
    AppendResponse,
    MessageError,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    check_history,
    history_up_to,
)
from zenith_utils.zenith_feedback import POSTGRES_EPOCH_MICROS

_TLI: Final = 1
_NOBODY: Final = bytes(16)
_U64_END: Final = 1 << 64
# Of main data whose length is one byte.
_MAX_MAIN_DATA: Final = 255
_XLOG_LOGICAL_MESSAGE: Final = 0
# xl_logical_message (replication/message.h): database, transactional and padding, sizes.
_LOGICAL_MESSAGE = struct.Struct("<IB3xQQ")


@dataclass(frozen=True, slots=True)
class AppendLogicalMessage:
    """A request; the module's documentation tells the fields."""

    lm_prefix: str
    lm_message: str
    set_commit_lsn: bool
    send_proposer_elected: bool
    term: int
    epoch_start_lsn: int
    begin_lsn: int
    truncate_lsn: int
    prev_lsn: int = 0


_TYPES: Final[dict[str, type]] = {
    "lm_prefix": str,
    "lm_message": str,
    "set_commit_lsn": bool,
    "send_proposer_elected": bool,
    "term": int,
    "epoch_start_lsn": int,
    "begin_lsn": int,
    "truncate_lsn": int,
    "prev_lsn": int,
}
_OPTIONAL: Final = frozenset({"prev_lsn"})


def parse_request(text: str) -> AppendLogicalMessage:
    """Read a request. Raises QueryError, which names what is wrong."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise QueryError(f"JSON_CTRL: malformed JSON: {e}") from e
    if not isinstance(fields, dict):
        raise QueryError("JSON_CTRL: expected a JSON object")
    unknown = sorted(set(fields) - set(_TYPES))
    if unknown:
        raise QueryError(f"JSON_CTRL: unknown field {unknown[0]!r} (known: {', '.join(_TYPES)})")
    missing = [name for name in _TYPES if name not in fields and name not in _OPTIONAL]
    if missing:
        raise QueryError(f"JSON_CTRL: missing field {missing[0]!r}")
    for name, value in fields.items():
        # A bool is an int in Python.
        if type(value) is not _TYPES[name]:
            raise QueryError(f"JSON_CTRL: {name} must be of type {_TYPES[name].__name__}")
        if type(value) is int and not 0 <= value < _U64_END:
            raise QueryError(f"JSON_CTRL: {name} {value} does not fit 64 unsigned bits")
    return AppendLogicalMessage(**fields)


def append_logical_message(timeline: Timeline, request: AppendLogicalMessage) -> dict[str, Any]:
    """Carry out a request; the answer, as a JSON object.

    Raises QueryError if the request or the acceptor's rules do not allow it, TimelineFailedError,
    WalStorageError, OSError.
    """
    session = Session()
    try:
        _check_place(request)
        _announce(timeline, session, request)
        end_lsn, response = _append(timeline, session, request)
    except (ConsensusError, MessageError) as e:
        raise QueryError(f"JSON_CTRL: {e}") from e
    return {
        "state": control_file.to_json(timeline.acceptor.state),
        "inserted_wal": {
            "begin_lsn": request.begin_lsn,
            "end_lsn": end_lsn,
            "append_response": _response_json(response),
        },
    }


def _check_place(request: AppendLogicalMessage) -> None:
    lsn = request.begin_lsn
    in_header = 0 < lsn % WAL_BLCKSZ < page_header_size(lsn - lsn % WAL_BLCKSZ)
    if lsn < WAL_SEGMENT_SIZE or lsn != maxalign(lsn) or in_header:
        raise QueryError(f"JSON_CTRL: no WAL record can begin at begin_lsn {lsn_text(lsn)}")
    if request.prev_lsn >= lsn:
        raise QueryError(
            f"JSON_CTRL: prev_lsn {lsn_text(request.prev_lsn)} is not below begin_lsn "
            f"{lsn_text(lsn)}"
        )
    epoch_start = request.epoch_start_lsn
    if request.send_proposer_elected and not 0 < epoch_start <= lsn:
        raise QueryError(
            f"JSON_CTRL: epoch_start_lsn {lsn_text(epoch_start)} is not between 0/1 and begin_lsn "
            f"{lsn_text(lsn)}"
        )


def _announce(timeline: Timeline, session: Session, request: AppendLogicalMessage) -> None:
    """Greet, and become the one who appends in the request's term."""
    greeting = ProposerGreeting(
        0, _NOBODY, 0, timeline.id.timeline_id, timeline.id.tenant_id, _TLI, WAL_SEGMENT_SIZE
    )
    timeline.process(session, greeting)
    state = timeline.acceptor.state
    if request.term == state.term and timeline.has_compute:
        # Two logs of one term would differ: no leader of any later term could tell.
        raise QueryError(
            f"JSON_CTRL: a compute is connected to timeline {timeline.id} and may lead term "
            f"{request.term}: stop it, or use a higher term"
        )
    if request.send_proposer_elected:
        start = request.epoch_start_lsn
        history = (
            *history_up_to(state.term_history, start - 1),
            TermLsn(request.term, start),
        )
        if request.term >= state.term:
            check_history(history)
    else:
        # Go on as the leader that was announced, at the end of its log.
        start, history = timeline.flush_lsn, state.term_history
        if not history or history[-1].term != request.term:
            return
    timeline.process(session, ProposerElected(request.term, start, history))


def _append(
    timeline: Timeline, session: Session, request: AppendLogicalMessage
) -> tuple[int, AppendResponse]:
    """Append the record durably; where it ends, and the acceptor's answer."""
    with timeline.lock:
        timeline.check_usable()
        state = timeline.acceptor.state
        begin_lsn = request.begin_lsn
        data = logical_message(
            begin_lsn,
            request.prev_lsn or _record_before(timeline, begin_lsn),
            request.lm_prefix,
            request.lm_message,
            magic=wal_magic(state.server.pg_version),
            system_id=state.server.system_id,
        )
        end_lsn = begin_lsn + len(data)
        header = AppendRequest(
            request.term,
            request.epoch_start_lsn,
            begin_lsn,
            end_lsn,
            end_lsn if request.set_commit_lsn else state.commit_lsn,
            request.truncate_lsn,
            _NOBODY,
        )
        started = time.perf_counter()
        refusal = timeline.append(session, memoryview(header.encode_header() + data))
        if refusal is not None:
            assert isinstance(refusal, AppendResponse)
            return end_lsn, refusal
        written = time.perf_counter()
        try:
            timeline.wal_end.flush()
        except OSError as e:
            timeline.append_failed(e, flushing=True)
        flushed = time.perf_counter()
        log = timeline.acceptor.log
        must_persist = log.flushed(timeline.wal_end.flush_lsn)
        timeline.appended(len(data), written - started, flushed - written, must_persist)
        response = AppendResponse(
            log.term, log.flush_lsn, log.saved_commit_lsn, timeline.hs_feedback, timeline.feedback
        )
    timeline.wake_readers()
    return end_lsn, response


def _record_before(timeline: Timeline, lsn: int) -> int:
    """Start of the record that ends at `lsn`, the end of the log; 0 if there is none.

    Raises WalStorageError if WAL that has to be read is not here any more.
    """
    history = timeline.acceptor.state.term_history
    if not history or timeline.flush_lsn != lsn:
        return 0
    first = history[0].lsn
    magic = wal_magic(timeline.acceptor.state.server.pg_version)
    begin, found = lsn, 0
    # It may have begun in an earlier segment.
    while begin > first and not found:
        begin = max((begin - 1) // WAL_SEGMENT_SIZE * WAL_SEGMENT_SIZE, first)
        decoder = WalDecoder(begin, magic, join_mid_record=True)
        reader = SegmentReader(timeline.directory)
        try:
            while decoder.received_lsn < lsn:
                position = decoder.received_lsn
                decoder.scan(reader.read(position, lsn - position))
        finally:
            reader.close()
        found = decoder.last_record_start
    return found


def logical_message(
    lsn: int, prev_lsn: int, prefix: str, message: str, *, magic: int, system_id: int
) -> bytes:
    """WAL from `lsn` on that holds one record, a non-transactional logical message, and padding.

    Page headers are part of it where pages begin. `prev_lsn` is its xl_prev. Raises QueryError if
    the texts are too long.
    """
    prefix_bytes, message_bytes = prefix.encode() + b"\0", message.encode()
    if prefix_bytes.index(0) != len(prefix_bytes) - 1:
        raise QueryError("JSON_CTRL: lm_prefix must not contain a NUL character")
    main_data = (
        _LOGICAL_MESSAGE.pack(0, 0, len(prefix_bytes), len(message_bytes))
        + prefix_bytes
        + message_bytes
    )
    if len(main_data) > _MAX_MAIN_DATA:
        raise QueryError(
            f"JSON_CTRL: lm_prefix and lm_message are {len(main_data) - _MAX_MAIN_DATA} bytes "
            "too long for one record"
        )
    record = wal_record(Rmgr.LOGICALMSG, _XLOG_LOGICAL_MESSAGE, prev_lsn, main_data)
    return _with_page_headers(lsn, record, PageHeaders(magic, _TLI, system_id, WAL_SEGMENT_SIZE))


def _with_page_headers(lsn: int, record: bytes, pages: PageHeaders) -> bytes:
    wal = b""
    rest = record
    while rest:
        position = lsn + len(wal)
        if position % WAL_BLCKSZ == 0:
            wal += pages.header(position, len(rest) if len(rest) < len(record) else 0)
            position = normalize_lsn(position)
        room = WAL_BLCKSZ - position % WAL_BLCKSZ
        wal += rest[:room]
        rest = rest[room:]
    return wal + bytes(maxalign(len(wal)) - len(wal))


def _response_json(response: AppendResponse) -> dict[str, Any]:
    feedback = response.feedback
    seconds, micros = divmod(feedback.ps_replytime + POSTGRES_EPOCH_MICROS, 1_000_000)
    return {
        "term": response.term,
        "flush_lsn": response.flush_lsn,
        "commit_lsn": response.commit_lsn,
        "hs_feedback": response.hs_feedback._asdict(),
        "zenith_feedback": {
            "current_timeline_size": feedback.current_timeline_size,
            "ps_writelsn": feedback.ps_writelsn,
            "ps_flushlsn": feedback.ps_flushlsn,
            "ps_applylsn": feedback.ps_applylsn,
            "ps_replytime": {"secs_since_epoch": seconds, "nanos_since_epoch": micros * 1000},
        },
    }
