"""The limits of backpressure, and the file through which Postgres sees them."""

import logging
import multiprocessing
from pathlib import Path

import pytest

from compute_tools.feedback_file import (
    NO_LIMIT,
    FeedbackFile,
    FeedbackFileError,
    create,
)
from compute_tools.walproposer.backpressure import Backpressure, LagLimits, lowest_limit
from compute_tools.walproposer.core import Identity, Proposer
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import NO_FEEDBACK
from zenith_utils.zenith_feedback import ZenithFeedback

FEEDBACK = ZenithFeedback(
    current_timeline_size=1 << 40,
    ps_writelsn=1000,
    ps_flushlsn=600,
    ps_applylsn=300,
    ps_replytime=-7,
)


@pytest.mark.parametrize(
    ("limits", "lsn", "setting"),
    [
        (LagLimits(), NO_LIMIT, ""),
        (LagLimits(write_lag=100), 1100, "max_replication_write_lag"),
        (LagLimits(flush_lag=100), 700, "max_replication_flush_lag"),
        (LagLimits(apply_lag=100), 400, "max_replication_apply_lag"),
        (LagLimits(100, 800, 1000), 1100, "max_replication_write_lag"),
        (LagLimits(500, 800, 1000), 1300, "max_replication_apply_lag"),
    ],
)
def test_the_lowest_limit_counts(limits: LagLimits, lsn: int, setting: str) -> None:
    limit = lowest_limit(FEEDBACK, limits, start_lsn=5000)
    assert (limit.lsn, limit.setting) == (lsn, setting)


def test_nothing_uploaded_is_no_limit() -> None:
    feedback = ZenithFeedback(1, 1000, 600, 0, 5)
    assert lowest_limit(feedback, LagLimits(apply_lag=1), 5000).lsn == NO_LIMIT


def test_limit_beyond_all_lsns_is_none() -> None:
    feedback = ZenithFeedback(1, (1 << 64) - 5, 600, 0, 5)
    assert lowest_limit(feedback, LagLimits(write_lag=10), 5000).lsn == NO_LIMIT


def test_before_the_first_report_the_start_counts() -> None:
    limits = LagLimits(100, 50, 10)
    assert lowest_limit(NO_FEEDBACK, limits, start_lsn=5000).lsn == 5050
    assert lowest_limit(NO_FEEDBACK, limits, start_lsn=0).lsn == NO_LIMIT


def test_log_says_once_that_commits_wait(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backpressure = Backpressure(None)
    backpressure.set_limits(LagLimits(write_lag=2 << 20))
    assert backpressure.update(FEEDBACK) == 1000 + (2 << 20)
    backpressure.tick(0.0, 2000)
    assert caplog.messages == []
    for now in (1.0, 2.0, 3.0):
        backpressure.tick(now, 4 << 20)
    (message,) = caplog.messages
    assert "commits wait until the pageserver catches up" in message
    assert "max_replication_write_lag is 2MB" in message
    # A moment without waiting is not the end of it.
    backpressure.tick(4.0, 2000)
    backpressure.tick(5.0, 4 << 20)
    assert len(caplog.messages) == 1
    backpressure.tick(6.0, 2000)
    backpressure.tick(8.5, 2000)
    assert caplog.messages[1:] == ["commits no longer wait for the pageserver, as they did for 4 s"]
    backpressure.tick(9.0, 4 << 20)
    assert len(caplog.messages) == 3


def test_newest_report_of_the_furthest_pageserver_counts() -> None:
    """A safekeeper that the pageserver has left goes on repeating what it heard last."""
    identity = Identity(TenantId(bytes(16)), TimelineId(bytes(16)), bytes(16))
    proposer = Proposer(identity, 3)
    old, new = ZenithFeedback(1, 100, 10, 0, 5), ZenithFeedback(1, 100, 90, 0, 6)
    for first, second in ((old, new), (new, old)):
        proposer.peers[0].feedback, proposer.peers[2].feedback = first, second
        assert proposer.feedback == new
    proposer.peers[1].feedback = ZenithFeedback(1, 101, 20, 0, 4)
    assert proposer.feedback.ps_writelsn == 101


# ---- the file ----------------------------------------------------------------------------------


def test_file_shows_the_newest_report(tmp_path: Path) -> None:
    path = tmp_path / "feedback"
    create(path)
    reader = FeedbackFile(path)
    assert reader.read() is None
    writer = FeedbackFile(path)
    writer.write(FEEDBACK, 5)
    assert reader.read() == (FEEDBACK, 5)
    writer.write(NO_FEEDBACK, NO_LIMIT)
    assert reader.read() == (NO_FEEDBACK, NO_LIMIT)
    # Another life of the compute begins with an empty one; who reads the old one keeps it.
    create(path)
    assert FeedbackFile(path).read() is None
    assert reader.read() == (NO_FEEDBACK, NO_LIMIT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["feedback"]


def test_writer_that_died_in_a_write_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "feedback"
    create(path)
    file = FeedbackFile(path)
    file.write(FEEDBACK, 5)
    content = bytearray(path.read_bytes())
    # Generation 1 is in the second slot; the next one was being written into the first.
    content[64:90] = b"\xff" * 26
    path.write_bytes(content)
    assert FeedbackFile(path).read() == (FEEDBACK, 5)
    FeedbackFile(path).write(NO_FEEDBACK, 6)
    assert FeedbackFile(path).read() == (NO_FEEDBACK, 6)


@pytest.mark.parametrize("content", [b"", b"ZNFEEDB1", bytes(4096), b"ZNFEEDB1" + bytes(8192)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "feedback"
    path.write_bytes(content)
    with pytest.raises(FeedbackFileError, match="is not a file of pageserver feedback"):
        FeedbackFile(path)


def _write_many(path: Path, count: int) -> None:
    file = FeedbackFile(path)
    for i in range(1, count + 1):
        file.write(ZenithFeedback(i, i, i, i, i), i)


def test_reports_are_read_whole(tmp_path: Path) -> None:
    path, count = tmp_path / "feedback", 100_000
    create(path)
    reader = FeedbackFile(path)
    process = multiprocessing.get_context("spawn").Process(target=_write_many, args=(path, count))
    process.start()
    last = 0
    while last < count:
        assert process.is_alive() or process.exitcode == 0
        report = reader.read()
        if report is None:
            continue
        feedback, limit = report
        assert feedback == ZenithFeedback(limit, limit, limit, limit, limit)
        assert limit >= last
        last = limit
    process.join()
