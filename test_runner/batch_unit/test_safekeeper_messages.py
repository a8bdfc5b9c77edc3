"""Codecs of the proposer-acceptor protocol and of the control file."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safekeeper import control_file
from safekeeper.consensus import ControlState, PeerInfo, ServerInfo
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    PROTOCOL_VERSION,
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    MessageError,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    VoteResponse,
    parse_acceptor_message,
    parse_append_request,
    parse_proposer_message,
)
from zenith_utils.zenith_feedback import ZenithFeedback

u64 = st.integers(0, (1 << 64) - 1)
ids = st.binary(min_size=16, max_size=16)
histories = st.lists(st.tuples(u64, u64), max_size=5).map(
    lambda entries: tuple(
        TermLsn(term, lsn)
        for term, lsn in zip(
            sorted({t for t, _ in entries}), sorted(lsn for _, lsn in entries), strict=False
        )
    )
)
proposer_messages = st.one_of(
    st.builds(
        ProposerGreeting,
        st.integers(0, (1 << 32) - 1),
        ids,
        u64,
        ids.map(TimelineId),
        ids.map(TenantId),
        st.just(1),
        st.just(16 << 20),
        ids,
        u64,
    ),
    st.builds(VoteRequest, u64, ids, u64),
    st.builds(ProposerElected, u64, u64, histories, u64, u64),
)
acceptor_messages = st.one_of(
    st.builds(AcceptorGreeting, u64, ids, st.booleans()),
    st.builds(VoteResponse, u64, st.booleans(), u64, u64, histories, u64, u64, st.booleans()),
    st.builds(
        AppendResponse,
        u64,
        u64,
        u64,
        st.builds(HotStandbyFeedback, st.integers(-(1 << 63), (1 << 63) - 1), u64, u64),
        st.builds(ZenithFeedback, u64, u64, u64, u64),
    ),
)


@given(proposer_messages)
def test_proposer_round_trip(message: ProposerGreeting | VoteRequest | ProposerElected) -> None:
    assert parse_proposer_message(message.encode()) == message


@given(acceptor_messages)
def test_acceptor_round_trip(message: AcceptorGreeting | VoteResponse | AppendResponse) -> None:
    assert parse_acceptor_message(message.encode()) == message


@given(u64, st.integers(0, (1 << 63)), st.binary(max_size=100))
def test_append_round_trip(term: int, begin: int, wal: bytes) -> None:
    request = AppendRequest(term, 1, begin, begin + len(wal), 3, 4, bytes(16))
    assert parse_append_request(memoryview(request.encode_header() + wal)) == request


def test_sizes_on_the_wire() -> None:
    history = (TermLsn(1, 2), TermLsn(3, 4))
    greeting = ProposerGreeting(0, bytes(16), 0, TimelineId(bytes(16)), TenantId(bytes(16)), 1, 1)
    assert len(greeting.encode()) == 104
    assert len(VoteRequest(1).encode()) == 40
    assert len(ProposerElected(3, 0, history).encode()) == 44 + 32
    assert len(AppendRequest(1, 2, 3, 3, 4, 5, bytes(16)).encode_header()) == 72
    assert len(AcceptorGreeting(1).encode()) == 40
    assert len(VoteResponse(3, True, 0, 0, history).encode()) == 68 + 32
    assert AppendResponse(7).encode()[:16] == b"a" + bytes(7) + b"\7" + bytes(7)


def test_short_vote_requests() -> None:
    assert parse_proposer_message(struct.pack("<QQ", ord("v"), 5)) == VoteRequest(5)
    assert parse_proposer_message(VoteRequest(5, b"p" * 16, 7).encode()[:32]) == VoteRequest(
        5, b"p" * 16
    )


def test_greeting_of_an_older_protocol_is_understood_enough_to_refuse_it() -> None:
    old = ProposerGreeting(
        0, bytes(16), 0, TimelineId(bytes(16)), TenantId(bytes(16)), 1, 1, protocol_version=1
    )
    assert parse_proposer_message(old.encode()[:80]) == old
    new = replace(old, protocol_version=PROTOCOL_VERSION)
    with pytest.raises(MessageError, match="ProposerGreeting has 80 bytes, not 104"):
        parse_proposer_message(new.encode()[:80])


@given(st.one_of(proposer_messages, acceptor_messages), st.data())
def test_damaged_messages_do_no_harm(message: object, data: st.DataObject) -> None:
    raw = bytearray(message.encode())  # type: ignore[attr-defined]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = raw[: data.draw(st.integers(0, len(raw)))]
    for parse in (parse_proposer_message, parse_acceptor_message):
        for damaged in (raw, cut):
            with contextlib.suppress(MessageError):
                parse(damaged)


def test_lengths_that_lie() -> None:
    oversized = AppendRequest(1, 1, 0, 131073, 0, 0, bytes(16)).encode_header() + bytes(131073)
    with pytest.raises(MessageError, match="longer than MAX_SEND_SIZE"):
        parse_append_request(oversized)
    backwards = AppendRequest(1, 1, 9, 8, 0, 0, bytes(16)).encode_header()
    with pytest.raises(MessageError):
        parse_append_request(backwards)
    with pytest.raises(MessageError, match="term history of 4294967295 entries"):
        parse_proposer_message(struct.pack("<QQQI", ord("e"), 1, 2, 0xFFFFFFFF))
    descending = ProposerElected(2, 0, (TermLsn(2, 10), TermLsn(1, 20)))
    with pytest.raises(MessageError, match="out of order"):
        parse_proposer_message(descending.encode())


STATE = ControlState(
    TenantId(b"T" * 16),
    TimelineId(b"L" * 16),
    7,
    (TermLsn(1, 100), TermLsn(7, 200)),
    ServerInfo(150018, 1 << 63, 16 << 20),
    b"P" * 16,
    300,
    0,
    250,
    0,
    ((5, PeerInfo(1, 2, 3, 4)),),
    9,
    8,
    True,
)


def test_control_file_round_trip(tmp_path: Path) -> None:
    control_file.store(tmp_path, STATE, sync=True)
    path = tmp_path / control_file.CONTROL_FILE_NAME
    assert control_file.load(path) == STATE
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    dump = json.loads(json.dumps(control_file.to_json(STATE)))
    assert dump["acceptor_state"]["term_history"][1] == {"term": 7, "lsn": 200}
    assert (dump["generation"], dump["established"], dump["recovering"]) == (9, 8, True)
    assert dump["peers"] == [[5, {"s3_wal_lsn": 1, "term": 2, "flush_lsn": 3, "commit_lsn": 4}]]


def test_control_file_of_version_4() -> None:
    """It ends before the generation, which is 0 then."""
    body = bytearray(control_file.encode(STATE)[: -4 - 17])
    struct.pack_into("<I", body, 4, 4)
    older = control_file.decode(bytes(body) + struct.pack("<I", crc32c(body)))
    assert older == replace(STATE, generation=0, established=0, recovering=False)


def test_every_flipped_bit_of_the_control_file_is_found() -> None:
    data = bytearray(control_file.encode(STATE))
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        with pytest.raises(control_file.ControlFileError):
            control_file.decode(bytes(data))
        data[position] ^= 1 << position % 8
    assert control_file.decode(bytes(data)) == STATE


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, 1, "bad control file magic"), (4, 3, "unsupported safekeeper control file version 3")],
)
def test_control_file_of_another_kind(offset: int, value: int, message: str) -> None:
    data = bytearray(control_file.encode(STATE)[:-4])
    struct.pack_into("<I", data, offset, value)
    with pytest.raises(control_file.ControlFileError, match=message):
        control_file.decode(bytes(data) + struct.pack("<I", crc32c(data)))


def test_control_file_with_a_good_checksum_and_bad_content() -> None:
    body = control_file.encode(STATE)[:-4]
    rng = random.Random(0)
    for _ in range(500):
        cut = bytearray(body[: rng.randint(8, len(body) - 1)])
        with pytest.raises(control_file.ControlFileError):
            control_file.decode(bytes(cut) + struct.pack("<I", crc32c(cut)))
