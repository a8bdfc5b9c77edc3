"""JSON_CTRL: records appended without a compute, and elections over logs made with it."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from batch_unit.walproposer_support import Safekeeper, WalCluster, wal_cluster
from batch_unit.workspace import temporary_workspace

from postgres_ffi.wal_decoder import WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.consensus import Session
from safekeeper.json_ctrl import append_logical_message, logical_message, parse_request
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.timeline import Timeline
from safekeeper.timelines import Timelines
from safekeeper.wal_files import SegmentReader
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.postgres_connection import QueryError
from zenith_utils.safekeeper_messages import NO_XMIN
from zenith_utils.zenith_feedback import ZenithFeedback

TIMELINE = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
START = 0x16B9188
RECORD = 64
MAGIC = 0xD110


def fields(
    begin: int = START, *, term: int = 2, epoch: int = START, **other: Any
) -> dict[str, Any]:
    return {
        "lm_prefix": "prefix",
        "lm_message": "message",
        "set_commit_lsn": False,
        "send_proposer_elected": True,
        "term": term,
        "begin_lsn": begin,
        "epoch_start_lsn": epoch,
        "truncate_lsn": epoch,
        **other,
    }


@pytest.fixture
def timelines(tmp_path: Path) -> Timelines:
    return Timelines(tmp_path, SafekeeperMetrics(), sync=False)


def append(timeline: Timeline, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return append_logical_message(timeline, parse_request(json.dumps(fields(*args, **kwargs))))


def wal(timeline: Timeline, begin: int, end: int) -> bytes:
    reader = SegmentReader(timeline.directory)
    try:
        return b"".join(data[: end - lsn] for lsn, data in reader.chunks(begin) if lsn < end)
    finally:
        reader.close()


def test_record(timelines: Timelines) -> None:
    """Its bytes, the answer, and that the log is found again after a restart."""
    timeline = timelines.create(TIMELINE)
    timeline.record_feedback(ZenithFeedback(8192, START, START - 8, 5, 1_500_000))
    answer = append(timeline, set_commit_lsn=True)
    end = START + RECORD
    assert answer["inserted_wal"] == {
        "begin_lsn": START,
        "end_lsn": end,
        "append_response": {
            "term": 2,
            "flush_lsn": end,
            "commit_lsn": end,
            "hs_feedback": {"ts": 0, "xmin": NO_XMIN, "catalog_xmin": NO_XMIN},
            "zenith_feedback": {
                "current_timeline_size": 8192,
                "ps_writelsn": START,
                "ps_flushlsn": START - 8,
                "ps_applylsn": 5,
                "ps_replytime": {"secs_since_epoch": 946684801, "nanos_since_epoch": 500_000_000},
            },
        },
    }
    state = answer["state"]
    assert state["acceptor_state"] == {"term": 2, "term_history": [{"term": 2, "lsn": START}]}
    assert (state["commit_lsn"], state["peer_horizon_lsn"]) == (end, START)
    assert state["server"]["wal_seg_size"] == WAL_SEGMENT_SIZE

    decoder = WalDecoder(START, MAGIC)
    data = wal(timeline, START, end)
    decoder.feed(data)
    record = decoder.next_record()
    assert record is not None
    assert (record.rmid, record.info, record.xid, record.prev) == (21, 0, 0, 0)
    assert record.main_data == struct.pack("<IIQQ", 0, 0, 7, 7) + b"prefix\0message"
    assert record.end_lsn == end

    # Not committed: nobody was told, and the next one as well goes behind it.
    answer = append(timeline, end, send_proposer_elected=False)
    assert answer["inserted_wal"]["append_response"]["commit_lsn"] == end
    assert timeline.flush_lsn == end + RECORD
    timeline.close()
    again = Timelines(timeline.directory.parents[1], SafekeeperMetrics(), sync=False).get(TIMELINE)
    assert (again.flush_lsn, again.commit_lsn) == (end + RECORD, end)
    again.close()


def test_records_over_pages_and_segments(timelines: Timelines) -> None:
    """Page headers go between them, and every one points to the one before."""
    timeline = timelines.create(TIMELINE)
    begin = 2 * WAL_SEGMENT_SIZE - 8192 - 24
    end = append(timeline, begin, epoch=begin, prev_lsn=begin - 40)["inserted_wal"]["end_lsn"]
    while end < 2 * WAL_SEGMENT_SIZE + 8192:
        answer = append(timeline, end, send_proposer_elected=False, lm_message="x" * 150)
        end = answer["inserted_wal"]["end_lsn"]
        assert answer["inserted_wal"]["append_response"]["flush_lsn"] == end
    decoder = WalDecoder(begin, MAGIC, prev_lsn=begin - 40)
    assert decoder.scan(wal(timeline, begin, end)) == 80
    assert decoder.position == end
    timeline.close()


def test_begin_at_a_segment(timelines: Timelines) -> None:
    timeline = timelines.create(TIMELINE)
    begin = 3 * WAL_SEGMENT_SIZE
    append(timeline, begin, epoch=begin)
    assert timeline.flush_lsn == begin + 40 + RECORD
    timeline.close()


def test_terms(timelines: Timelines) -> None:
    timeline = timelines.create(TIMELINE)
    # Nobody was elected in this term.
    with pytest.raises(QueryError, match="got AppendRequest before ProposerElected"):
        append(timeline, send_proposer_elected=False)
    append(timeline)
    one, two = START + RECORD, START + 2 * RECORD
    append(timeline, one, send_proposer_elected=False)

    # Of a lower term: refused with the own one, nothing written.
    answer = append(timeline, two, epoch=two, term=1)["inserted_wal"]["append_response"]
    assert (answer["term"], answer["flush_lsn"], answer["commit_lsn"]) == (2, 0, 0)
    assert timeline.flush_lsn == two

    # A leader of a higher term whose log is shorter cuts ours.
    answer = append(timeline, one, epoch=one, term=5, lm_message="another")
    assert answer["state"]["acceptor_state"] == {
        "term": 5,
        "term_history": [{"term": 2, "lsn": START}, {"term": 5, "lsn": one}],
    }
    assert wal(timeline, one, two) == logical_message(
        one, START, "prefix", "another", magic=MAGIC, system_id=0
    )
    assert timeline.acceptor.epoch == 5

    # No gap, no rewriting, no cut below what is committed or was acknowledged to this leader.
    for begin, text in ((two + 8, "creates gap"), (one, "rewrites WAL")):
        with pytest.raises(QueryError, match=text):
            append(timeline, begin, term=5, send_proposer_elected=False)
    with pytest.raises(QueryError, match="refusing to truncate WAL of term 5"):
        append(timeline, one, epoch=one, term=5)
    append(timeline, two, term=5, send_proposer_elected=False, set_commit_lsn=True)
    with pytest.raises(QueryError, match="below commit LSN"):
        append(timeline, one, epoch=one, term=6)
    # Entries of higher terms below where the new one starts.
    with pytest.raises(QueryError, match="out of order"):
        append(timeline, two + RECORD, epoch=two + RECORD, term=5)
    assert timeline.failure is None
    timeline.close()


def test_a_compute_is_not_pushed_aside_in_its_own_term(timelines: Timelines) -> None:
    timeline = timelines.create(TIMELINE)
    append(timeline)
    timeline.compute_connected()
    for elected in (True, False):
        with pytest.raises(QueryError, match="a compute is connected"):
            append(timeline, START + RECORD, send_proposer_elected=elected, epoch=START + RECORD)
    append(timeline, START + RECORD, term=3, epoch=START + RECORD)
    timeline.compute_disconnected()
    timeline.close()


def test_one_leader_at_a_time(timelines: Timelines) -> None:
    timeline = timelines.create(TIMELINE)
    append(timeline)
    other = Session()
    timeline.acceptor.log.begin_stream(other, timeline.flush_lsn)
    append(timeline, START + RECORD, send_proposer_elected=False)
    assert not timeline.acceptor.log.is_streaming(other)
    timeline.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_prefix": 1}, "lm_prefix must be of type str"),
        ({"term": True}, "term must be of type int"),
        ({"term": "2"}, "term must be of type int"),
        ({"set_commit_lsn": 1}, "set_commit_lsn must be of type bool"),
        ({"begin_lsn": -8}, "begin_lsn -8 does not fit"),
        ({"begin_lsn": 1 << 64}, "does not fit 64 unsigned bits"),
        ({"begin_lsn": START + 4}, "no WAL record can begin at begin_lsn"),
        ({"begin_lsn": 0x16BA008, "epoch_start_lsn": 0x16BA008}, "no WAL record can begin"),
        ({"begin_lsn": 0}, "no WAL record can begin"),
        ({"epoch_start_lsn": 0}, "epoch_start_lsn .* is not between"),
        ({"epoch_start_lsn": START + 8}, "epoch_start_lsn .*90 is not between"),
        ({"prev_lsn": START}, "prev_lsn .* is not below"),
        ({"lm_message": "x" * 225}, "1 bytes too long"),
        ({"lm_prefix": "a\0b"}, "NUL character"),
        ({"message": "x"}, "unknown field 'message'"),
        ({"lm_message": None}, "lm_message must be of type str"),
    ],
)
def test_values(timelines: Timelines, change: dict[str, Any], message: str) -> None:
    timeline = timelines.create(TIMELINE)
    with pytest.raises(QueryError, match=message):
        append(timeline, **change)
    # Nothing has happened to the timeline: the same request without the mistake works.
    append(timeline)
    timeline.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed JSON"),
        ("{", "malformed JSON"),
        ("[" * 10_000, "malformed JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "missing field 'lm_prefix'"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse_request(text)


# ---- with processes


@pytest.fixture
def cluster() -> Iterator[WalCluster]:
    with temporary_workspace() as directory, wal_cluster(directory) as cluster:
        for safekeeper in cluster.safekeepers:
            safekeeper.start()
        yield cluster


def control(cluster: WalCluster, safekeeper: Safekeeper, request: dict[str, Any]) -> dict[str, Any]:
    """JSON_CTRL as a stock client sends it."""
    options = f"-c ztimelineid={cluster.timeline} ztenantid={cluster.tenant}"
    conn = psycopg2.connect(
        host="127.0.0.1", port=safekeeper.pg_port, user="x", replication="0", options=options
    )
    with contextlib.closing(conn), conn.cursor() as cursor:
        conn.autocommit = True
        cursor.execute("JSON_CTRL " + json.dumps(request))
        assert [column.name for column in cursor.description or ()] == ["json"]
        ((text,),) = cursor.fetchall()
        answer: dict[str, Any] = json.loads(text)
        return answer


def elected_at(cluster: WalCluster) -> tuple[int, str]:
    """Term, and end of the log, that the next proposer gets."""
    event = cluster.proposer().event("elected")
    assert not event["bootstrap"]
    return event["term"], event["epoch_start_lsn"]


def test_equal_logs_are_synced(cluster: WalCluster) -> None:
    ends = [
        control(cluster, safekeeper, fields(set_commit_lsn=True))["inserted_wal"]["end_lsn"]
        for safekeeper in cluster.safekeepers
    ]
    assert ends == [START + RECORD] * 3
    assert elected_at(cluster) == (3, lsn_text(START + RECORD))
    with pytest.raises(psycopg2.errors.InternalError_, match="missing field 'lm_prefix'"):
        control(cluster, cluster.safekeepers[0], {})


def test_longer_log_of_an_older_term_loses(cluster: WalCluster) -> None:
    """Whoever has the newer term's log is the donor, however much more others have of an older."""
    one, two, three = cluster.safekeepers
    for safekeeper in (one, two, three):
        control(cluster, safekeeper, fields())
    fork = START + RECORD
    # Term 2 went on alone on the first one, term 3 wrote less on the second.
    for number in range(5):
        request = fields(fork + number * RECORD, send_proposer_elected=False)
        control(cluster, one, request)
    control(cluster, two, fields(fork, epoch=fork, term=3, lm_message="MESSAGE"))
    three.kill()
    assert elected_at(cluster) == (4, lsn_text(fork + RECORD))
    states = [cluster.status(safekeeper) for safekeeper in (one, two)]
    for state in states:
        assert state["flush_lsn"] == state["commit_lsn"] == lsn_text(fork + RECORD)
        assert [entry["term"] for entry in state["acceptor_state"]["term_history"]] == [2, 3, 4]
    logs = [(sk.directory / str(cluster.tenant) / str(cluster.timeline)) for sk in (one, two)]
    offset = fork % WAL_SEGMENT_SIZE
    contents = [(log / "000000010000000000000001.partial").read_bytes()[offset:] for log in logs]
    assert contents[0][:RECORD] == contents[1][:RECORD]
    assert b"MESSAGE" in contents[0][:RECORD]
    # Nothing is left of what the first one had beyond.
    assert contents[0][RECORD:].count(0) == len(contents[0]) - RECORD
