"""Messages between a proposer (the compute's walproposer) and an acceptor (a safekeeper).

Each message is the payload of one CopyData of a ``START_WAL_PUSH`` session. All integers are
little-endian, only the feedback inside an AppendResponse is big-endian. The first 8 bytes are the
tag: an ASCII code in the lowest byte of a u64. Decoders take any buffer and raise MessageError
for whatever a correct peer cannot have sent; they never read outside the buffer, and check counts
against the size of the message before they make anything of them.

| Message | Layout (after the tag) |
|---|---|
| ProposerGreeting | u32 protocol version, u32 server version, 16 proposer's id, |
|  | u64 system identifier, 16 timeline, 16 tenant, u32 tli, u32 segment size, |
|  | 16 instance, u64 established |
| VoteRequest | u64 term, 16 proposer's id, u64 generation |
| ProposerElected | u64 term, u64 start of the stream, u32 n, n x (u64 term, u64 LSN), |
|  | u64 generation, u64 recovered LSN |
| AppendRequest | u64 term, u64 epoch start, u64 begin, u64 end, u64 commit LSN, u64 horizon, |
|  | 16 proposer's id, WAL [begin, end) |
| AcceptorGreeting | u64 term, 16 instance, u64 1 if it is recovering |
| VoteResponse | u64 term, u64 1 if the vote is given, u64 flush LSN, u64 horizon, u32 n, |
|  | n x (u64 term, u64 LSN), u64 generation, u64 established, u64 1 if it is recovering |
| AppendResponse | u64 term, u64 flush LSN, u64 commit LSN, i64 timestamp, u64 xmin, |
|  | u64 catalog xmin, the pageserver's feedback |

Of a greeting of another protocol version only the part before the instance is read: enough to
refuse it with a clear error.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

from typing_extensions import Buffer

from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.zenith_feedback import FeedbackError, ZenithFeedback

PROTOCOL_VERSION: Final = 2
MAX_SEND_SIZE: Final = 131072
"""Most WAL bytes in one AppendRequest, and in one XLogData of a stream."""
NO_XMIN: Final = 0xFFFF_FFFF_FFFF_FFFF
"""Hot-standby xmin of an acceptor none of whose standbys holds back a horizon."""
MAX_HISTORY: Final = 1 << 20

TAG_GREETING: Final = ord("g")
TAG_VOTE: Final = ord("v")
TAG_ELECTED: Final = ord("e")
TAG_APPEND: Final = ord("a")

_TAG = struct.Struct("<Q")
_PROPOSER_GREETING = struct.Struct("<QII16sQ16s16sII")
_GREETING_TAIL = struct.Struct("<16sQ")
_VOTE_REQUEST = struct.Struct("<QQ")
_VOTE_REQUEST_ID = struct.Struct("<QQ16s")
_VOTE_REQUEST_GENERATION = struct.Struct("<QQ16sQ")
_ELECTED = struct.Struct("<QQQI")
_ELECTED_TAIL = struct.Struct("<QQ")
_APPEND_REQUEST = struct.Struct("<QQQQQQQ16s")
_ACCEPTOR_GREETING = struct.Struct("<QQ16sQ")
_VOTE_RESPONSE = struct.Struct("<QQQQQI")
_VOTE_RESPONSE_TAIL = struct.Struct("<QQQ")
_APPEND_RESPONSE = struct.Struct("<QQQQ")
_HS_FEEDBACK = struct.Struct("<qQQ")
_TERM_LSN = struct.Struct("<QQ")

APPEND_HEADER_SIZE: Final = _APPEND_REQUEST.size


class MessageError(ValueError):
    """Bytes that are no valid message of the protocol."""


class TermLsn(NamedTuple):
    """A term switch: from `lsn` on, until the next switch, WAL was written in `term`."""

    term: int
    lsn: int


TermHistory = tuple[TermLsn, ...]
"""Term switches, oldest first: terms strictly ascending, LSNs never descending."""


def history_up_to(history: TermHistory, lsn: int) -> TermHistory:
    """The switches that happened at or before `lsn`."""
    end = len(history)
    while end and history[end - 1].lsn > lsn:
        end -= 1
    return history[:end]


def last_term(history: TermHistory, lsn: int) -> int:
    """Epoch of a log that ends at `lsn`: the term of the last switch at or before it; 0 if none."""
    cut = history_up_to(history, lsn)
    return cut[-1].term if cut else 0


@dataclass(frozen=True, slots=True)
class ProposerGreeting:
    """First message of a session; later ones tell news, and ask whether all is as it was.

    `system_id` is 0 while the proposer does not know it, `instance` zeros if it talks to any;
    `established` is the highest generation that it knows to be established.
    """

    pg_version: int
    proposer_id: bytes
    system_id: int
    timeline_id: TimelineId
    tenant_id: TenantId
    tli: int
    wal_seg_size: int
    instance: bytes = bytes(16)
    established: int = 0
    protocol_version: int = PROTOCOL_VERSION

    def encode(self) -> bytes:
        """The 104 bytes of the message."""
        head = _PROPOSER_GREETING.pack(
            TAG_GREETING,
            self.protocol_version,
            self.pg_version,
            self.proposer_id,
            self.system_id,
            self.timeline_id.raw,
            self.tenant_id.raw,
            self.tli,
            self.wal_seg_size,
        )
        return head + _GREETING_TAIL.pack(self.instance, self.established)


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Asks for a vote in `term`, for the leader of a generation of safekeepers."""

    term: int
    proposer_id: bytes = bytes(16)
    generation: int = 0

    def encode(self) -> bytes:
        """The 40 bytes of the message."""
        return _VOTE_REQUEST_GENERATION.pack(TAG_VOTE, self.term, self.proposer_id, self.generation)


@dataclass(frozen=True, slots=True)
class ProposerElected:
    """Announces the leader of `term`, its history, and where its stream to this acceptor starts.

    An acceptor that is recovering is an ordinary one again when its log reaches `recovered_lsn`;
    0 tells one that is not.
    """

    term: int
    start_streaming_at: int
    term_history: TermHistory
    generation: int = 0
    recovered_lsn: int = 0

    def encode(self) -> bytes:
        """The 44 + 16 n bytes of the message."""
        head = _ELECTED.pack(
            TAG_ELECTED, self.term, self.start_streaming_at, len(self.term_history)
        )
        tail = _ELECTED_TAIL.pack(self.generation, self.recovered_lsn)
        return head + _encode_history(self.term_history) + tail


class AppendRequest(NamedTuple):
    """Header of a message that carries the WAL bytes [begin_lsn, end_lsn) behind it.

    Equal LSNs make a heartbeat, which tells commit_lsn and truncate_lsn only.
    """

    term: int
    epoch_start_lsn: int
    begin_lsn: int
    end_lsn: int
    commit_lsn: int
    truncate_lsn: int
    proposer_uuid: bytes

    def encode_header(self) -> bytes:
        """The 72 bytes before the WAL."""
        return _APPEND_REQUEST.pack(TAG_APPEND, *self)


@dataclass(frozen=True, slots=True)
class AcceptorGreeting:
    """Answer to a greeting."""

    term: int
    instance: bytes = bytes(16)
    recovering: bool = False

    def encode(self) -> bytes:
        """The 40 bytes of the message."""
        return _ACCEPTOR_GREETING.pack(TAG_GREETING, self.term, self.instance, self.recovering)


@dataclass(frozen=True, slots=True)
class VoteResponse:
    """Answer to a vote request. The history is cut to switches at or before `flush_lsn`.

    `generation` and `established` are the highest ones that the acceptor has followed a leader of,
    and knows to be established.
    """

    term: int
    vote_given: bool
    flush_lsn: int
    truncate_lsn: int
    term_history: TermHistory
    generation: int = 0
    established: int = 0
    recovering: bool = False

    def encode(self) -> bytes:
        """The 68 + 16 n bytes of the message."""
        head = _VOTE_RESPONSE.pack(
            TAG_VOTE,
            self.term,
            self.vote_given,
            self.flush_lsn,
            self.truncate_lsn,
            len(self.term_history),
        )
        tail = _VOTE_RESPONSE_TAIL.pack(self.generation, self.established, self.recovering)
        return head + _encode_history(self.term_history) + tail


class HotStandbyFeedback(NamedTuple):
    """Aggregated feedback of standbys: ts in microseconds since 2000-01-01, oldest xmins."""

    ts: int = 0
    xmin: int = NO_XMIN
    catalog_xmin: int = NO_XMIN


NO_HOT_STANDBY_FEEDBACK: Final = HotStandbyFeedback()
NO_FEEDBACK: Final = ZenithFeedback()


class AppendResponse(NamedTuple):
    """Answer to a batch of AppendRequests; all LSNs 0 in a refusal by a higher term."""

    term: int
    flush_lsn: int = 0
    commit_lsn: int = 0
    hs_feedback: HotStandbyFeedback = NO_HOT_STANDBY_FEEDBACK
    feedback: ZenithFeedback = NO_FEEDBACK

    def encode(self) -> bytes:
        """The 56 bytes of the message and the feedback behind them."""
        head = _APPEND_RESPONSE.pack(TAG_APPEND, self.term, self.flush_lsn, self.commit_lsn)
        return head + encode_feedbacks(self.hs_feedback, self.feedback)


def encode_feedbacks(hs_feedback: HotStandbyFeedback, feedback: ZenithFeedback) -> bytes:
    """The second part of an AppendResponse, behind the LSNs."""
    return _HS_FEEDBACK.pack(*hs_feedback) + feedback.encode()


ProposerMessage = ProposerGreeting | VoteRequest | ProposerElected | AppendRequest
AcceptorMessage = AcceptorGreeting | VoteResponse | AppendResponse


def parse_append_request(data: Buffer) -> AppendRequest:
    """Header of an AppendRequest; its WAL is ``data[APPEND_HEADER_SIZE:]``, of the checked size."""
    view = data if isinstance(data, memoryview) else memoryview(data)
    try:
        fields = _APPEND_REQUEST.unpack_from(view)
    except struct.error as e:
        raise MessageError(f"AppendRequest of {len(view)} bytes is cut short") from e
    tag = fields[0]
    request = AppendRequest._make(fields[1:])
    size = request.end_lsn - request.begin_lsn
    if size > MAX_SEND_SIZE:
        raise MessageError(f"AppendRequest is longer than MAX_SEND_SIZE ({MAX_SEND_SIZE})")
    if tag != TAG_APPEND or size != len(view) - APPEND_HEADER_SIZE:
        raise MessageError(f"AppendRequest for {size} bytes of WAL has {len(view)} bytes in all")
    return request


def parse_proposer_message(data: Buffer) -> ProposerMessage:
    """Decode what a proposer sent. Raises MessageError."""
    view = memoryview(data)
    tag = message_tag(view)
    try:
        if tag == TAG_APPEND:
            return parse_append_request(view)
        if tag == TAG_GREETING:
            return _parse_greeting(view)
        if tag == TAG_VOTE:
            return _parse_vote_request(view)
        if tag == TAG_ELECTED:
            _, term, start, count = _ELECTED.unpack_from(view)
            history, tail = _parse_history(view, _ELECTED.size, count, _ELECTED_TAIL)
            return ProposerElected(term, start, history, *tail)
    except struct.error as e:
        raise MessageError(f"message {chr(tag)!r} of {len(view)} bytes is cut short") from e
    raise MessageError(f"unknown proposer message tag {tag}")


def parse_acceptor_message(data: Buffer) -> AcceptorMessage:
    """Decode what an acceptor sent. Raises MessageError."""
    view = memoryview(data)
    tag = message_tag(view)
    try:
        if tag == TAG_APPEND:
            _, term, flush, commit = _APPEND_RESPONSE.unpack_from(view)
            hs = HotStandbyFeedback._make(_HS_FEEDBACK.unpack_from(view, _APPEND_RESPONSE.size))
            feedback_at = _APPEND_RESPONSE.size + _HS_FEEDBACK.size
            feedback = _parse_feedback(bytes(view[feedback_at:]))
            return AppendResponse(term, flush, commit, hs, feedback)
        if tag == TAG_VOTE:
            _, term, given, flush, truncate, count = _VOTE_RESPONSE.unpack_from(view)
            history, tail = _parse_history(view, _VOTE_RESPONSE.size, count, _VOTE_RESPONSE_TAIL)
            generation, established, recovering = tail
            return VoteResponse(
                term,
                _flag("vote_given", given),
                flush,
                truncate,
                history,
                generation,
                established,
                _flag("recovering", recovering),
            )
        if tag == TAG_GREETING:
            _expect_size(view, _ACCEPTOR_GREETING.size, "AcceptorGreeting")
            _, term, instance, recovering = _ACCEPTOR_GREETING.unpack_from(view)
            return AcceptorGreeting(term, instance, _flag("recovering", recovering))
    except struct.error as e:
        raise MessageError(f"message {chr(tag)!r} of {len(view)} bytes is cut short") from e
    raise MessageError(f"unknown acceptor message tag {tag}")


def message_tag(data: Buffer) -> int:
    """Tag of a message: its first 8 bytes. Raises MessageError."""
    try:
        tag: int = _TAG.unpack_from(data)[0]
    except struct.error as e:
        raise MessageError("message without a tag") from e
    return tag


def _parse_greeting(view: memoryview) -> ProposerGreeting:
    _, version, pg_version, proposer, system_id, timeline, tenant, tli, seg_size = (
        _PROPOSER_GREETING.unpack_from(view)
    )
    instance, established = bytes(16), 0
    if version == PROTOCOL_VERSION:
        _expect_size(view, _PROPOSER_GREETING.size + _GREETING_TAIL.size, "ProposerGreeting")
        instance, established = _GREETING_TAIL.unpack_from(view, _PROPOSER_GREETING.size)
    return ProposerGreeting(
        pg_version,
        proposer,
        system_id,
        TimelineId(timeline),
        TenantId(tenant),
        tli,
        seg_size,
        instance,
        established,
        version,
    )


def _parse_vote_request(view: memoryview) -> VoteRequest:
    """Only the term is required; what is missing behind it is zero."""
    if len(view) >= _VOTE_REQUEST_GENERATION.size:
        _, term, proposer, generation = _VOTE_REQUEST_GENERATION.unpack_from(view)
        return VoteRequest(term, proposer, generation)
    if len(view) >= _VOTE_REQUEST_ID.size:
        _, term, proposer = _VOTE_REQUEST_ID.unpack_from(view)
        return VoteRequest(term, proposer)
    return VoteRequest(_VOTE_REQUEST.unpack_from(view)[1])


def _encode_history(history: Sequence[TermLsn]) -> bytes:
    return b"".join(_TERM_LSN.pack(*entry) for entry in history)


def _parse_history(
    view: memoryview, offset: int, count: int, tail: struct.Struct
) -> tuple[TermHistory, tuple[int, ...]]:
    """The history of `count` entries at `offset`, and the fields behind it."""
    end = offset + count * _TERM_LSN.size
    if count > MAX_HISTORY or len(view) != end + tail.size:
        raise MessageError(f"term history of {count} entries in a message of {len(view)} bytes")
    history = tuple(TermLsn._make(entry) for entry in _TERM_LSN.iter_unpack(view[offset:end]))
    check_history(history)
    return history, tail.unpack_from(view, end)


def check_history(history: TermHistory) -> None:
    """Raise MessageError unless terms ascend strictly and LSNs do not descend."""
    for older, newer in pairwise(history):
        if older.term >= newer.term or older.lsn > newer.lsn:
            raise MessageError(f"term history is out of order: {older} before {newer}")


def _flag(name: str, value: int) -> bool:
    if value > 1:
        raise MessageError(f"{name} is {value}, neither 0 nor 1")
    return bool(value)


def _expect_size(view: memoryview, size: int, name: str) -> None:
    if len(view) != size:
        raise MessageError(f"{name} has {len(view)} bytes, not {size}")


@lru_cache(maxsize=64)
def _parse_feedback(data: bytes) -> ZenithFeedback:
    try:
        return ZenithFeedback.parse(data)
    except FeedbackError as e:
        raise MessageError(f"AppendResponse: {e}") from e
