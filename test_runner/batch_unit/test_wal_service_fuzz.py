"""Damaged and random bytes at every parser of the WAL service: refused, nothing wrong written."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_unit.relay_support import START as RELAY_START
from batch_unit.relay_support import TERM as RELAY_TERM
from batch_unit.relay_support import copy_data, pool_of
from batch_unit.safekeeper_support import WalWriter
from batch_unit.test_safekeeper_push import START, TIMELINE, Client, append, opening, stored

from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from postgres_ffi.wal_format import WAL_BLCKSZ
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.timelines import Timelines
from safekeeper.wal_files import WalStorageError
from safekeeper.wal_storage import InvalidWalError, WalStorage, wal_magic
from zenith_utils.postgres_connection import QueryError
from zenith_utils.pq_framing import ConnectionClosed, ProtocolError
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    MessageError,
    ProposerElected,
    TermLsn,
    VoteRequest,
    VoteResponse,
    parse_acceptor_message,
    parse_append_request,
    parse_proposer_message,
)

HISTORY = (TermLsn(1, 100), TermLsn(7, 200))
MESSAGES = (
    opening()[5:109],
    VoteRequest(7, b"p" * 16, 3).encode(),
    ProposerElected(7, 300, HISTORY, 3, 300).encode(),
    AppendRequest(7, 100, 300, 332, 200, 100, b"p" * 16).encode_header() + bytes(32),
    AcceptorGreeting(7, b"i" * 16, True).encode(),
    VoteResponse(7, True, 300, 100, HISTORY, 3, 2, True).encode(),
    AppendResponse(7, 300, 200).encode(),
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """With a few flipped bits, other lengths, or a piece of something else."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 31, (1 << 64) - 1]))
        elif kind == 2:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            out[at] = rng.randrange(256)
        if not out:
            return b"?"
    return bytes(out)


@pytest.mark.parametrize("parse", [parse_proposer_message, parse_acceptor_message])
def test_parsers_refuse_or_understand(parse: Callable[[bytes], object]) -> None:
    """MessageError or a message that says the same when it is encoded again."""
    rng = random.Random(1)
    understood = 0
    tracemalloc.start()
    for _ in range(15_000):
        data = (
            rng.randbytes(rng.randint(0, 200))
            if rng.random() < 0.1
            else damaged(rng, rng.choice(MESSAGES))
        )
        try:
            message = parse(data)
        except MessageError:
            continue
        understood += 1
        if not isinstance(message, AppendRequest | AppendResponse | VoteRequest):
            again = message.encode()  # type: ignore[attr-defined]
            assert again == data or parse(again) == message
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert understood > 100
    assert peak < 4 << 20  # a count in a message allocates nothing before it has been checked


def test_append_requests_are_of_the_size_they_say() -> None:
    rng = random.Random(2)
    for _ in range(5000):
        data = damaged(rng, MESSAGES[3])
        try:
            request = parse_append_request(data)
        except MessageError:
            continue
        assert request.end_lsn - request.begin_lsn == len(data) - 72


def last_end(wal: WalWriter, lsn: int) -> int:
    """End of the last record at or below."""
    return max((end for end in wal.ends if end <= lsn), default=START)


def test_damaged_sessions(tmp_path: Path) -> None:
    """Whatever arrives, the session ends with an error or at its end, and WAL stays valid."""
    rng = random.Random(3)
    wal = WalWriter(START, 3)
    wal.until(START + 12_000)
    data = bytes(wal.data)
    refused = found = 0
    for attempt in range(60):
        (tmp_path / str(attempt)).mkdir()
        client = Client(Timelines(tmp_path / str(attempt), SafekeeperMetrics(), sync=False))
        appends = [
            append(START + at, data[at : at + 700], commit=last_end(wal, START + at))
            for at in range(0, len(data), 700)
        ]
        intact = opening() + b"".join(appends)
        begin = rng.choice([0, len(opening()), len(opening() + b"".join(appends[:8]))])
        sent = damaged(rng, intact[begin:])
        client.sock.sendall(intact[:begin])
        if begin > len(opening()):
            client.flushed(last_end(wal, START + 8 * 700))
        with contextlib.suppress(OSError):  # it may have been refused already
            client.sock.sendall(sent)
        error = client.end()
        client.sock.close()
        assert error is None or isinstance(error, QueryError | ConnectionClosed | ProtocolError)
        refused += error is not None
        if not any((tmp_path / str(attempt)).glob("*/*/safekeeper.control")):
            continue
        # What was kept is found again, or found to be damaged; it is what was meant.
        try:
            timeline = Timelines(tmp_path / str(attempt), SafekeeperMetrics(), sync=False).get(
                TIMELINE
            )
        except WalStorageError:
            continue
        if timeline.flush_lsn in wal.ends:
            found += 1
            kept = stored(timeline, timeline.flush_lsn - START)
            assert decoded(kept, timeline.flush_lsn) == decoded(data, timeline.flush_lsn)
        else:
            assert begin == 0 or timeline.flush_lsn in (0, START)
    assert found > 10
    assert refused > 30


def test_flipped_bits_of_wal(tmp_path: Path) -> None:
    """A record that was changed under way is refused with everything behind it."""
    rng = random.Random(4)
    with ThreadPoolExecutor(1) as helper:
        storage = WalStorage(tmp_path, sync=False, helper=helper)
        storage.open(0, wal_magic(0))
        for seed in range(150):
            wal = WalWriter(START, seed)
            wal.until(START + 3 * WAL_BLCKSZ)
            data = bytearray(wal.data)
            flipped = rng.randrange(len(data))
            data[flipped] ^= 1 << rng.randrange(8)
            storage.truncate(START, wal_magic(0))
            accepted = 0
            try:
                while accepted < len(data):
                    piece = data[accepted : accepted + rng.choice([64, 900, 8192])]
                    storage.write(START + accepted, memoryview(piece))
                    accepted += len(piece)
            except InvalidWalError:
                pass
            end = storage.flush()
            assert end == START or end in wal.ends
            # Only what no checksum covers and nobody reads, padding, can have been changed.
            if end > START + flipped:
                assert decoded(bytes(data), end) == decoded(bytes(wal.data), end)
        storage.close()


def decoded(data: bytes, end: int) -> list[bytes]:
    """What a reader makes of WAL from START to `end`."""
    decoder = WalDecoder(START, wal_magic(0))
    decoder.feed(data[: end - START])
    out: list[bytes] = []
    try:
        while (record := decoder.next_record()) is not None:
            out.append(bytes(record.main_data))
    except WalDecodeError as e:
        raise AssertionError("WAL that was accepted cannot be read") from e
    return out


def test_random_bytes_of_a_safekeeper() -> None:
    """The walproposer's end of a session takes anything: errors, or messages of the dialogue."""
    rng = random.Random(5)
    answer = copy_data(AppendResponse(RELAY_TERM, RELAY_START + 8).encode())
    for _ in range(1500):
        data = answer * rng.randint(0, 2)
        data += rng.randbytes(rng.randint(1, 60)) if rng.random() < 0.3 else damaged(rng, answer)
        with pool_of(1) as (pool, ends):
            link = pool.link(0)
            ends[0].sendall(data)
            ends[0].close()
            deadline = time.monotonic() + 30
            while not link.closed and time.monotonic() < deadline:
                pool.relay.run(0.1, once=True)
            assert link.closed
            assert len(pool.reasons) == 1
            assert pool.core.commit_lsn == 0  # it is one of three


def test_a_frame_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    timelines = Timelines(tmp_path, SafekeeperMetrics(), sync=False)
    client = Client(timelines)
    client.sock.sendall(opening() + b"d" + struct.pack(">I", (1 << 31) - 1))
    error = client.end()
    client.sock.close()
    assert error is not None
    assert "length" in str(error)
