"""The zenith library: what the pageserver reports, in SQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.lazyfiles_support import Postgres, library_node, stopped_cluster

from compute_tools.feedback_file import NO_LIMIT, FeedbackFile, create
from zenith_utils.lsn import lsn_text
from zenith_utils.os_user import give
from zenith_utils.safekeeper_messages import NO_FEEDBACK
from zenith_utils.zenith_feedback import ZenithFeedback

# What the script of the extension defines, for a server that is not led to it.
FUNCTIONS = (
    "CREATE FUNCTION lsns(OUT a pg_lsn, OUT b pg_lsn, OUT c pg_lsn) LANGUAGE C"
    " AS '{library}', 'zenith_backpressure_lsns'",
    "CREATE FUNCTION limit_lsn() RETURNS pg_lsn LANGUAGE C"
    " AS '{library}', 'zenith_backpressure_limit_lsn'",
    "CREATE FUNCTION size() RETURNS bigint LANGUAGE C AS '{library}', 'zenith_cluster_size'",
)
QUERY = "SELECT a::text, b::text, c::text, limit_lsn()::text, size() FROM lsns()"


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    with stopped_cluster() as datadir:
        yield datadir


@pytest.fixture
def node(template: Path) -> Iterator[Postgres]:
    """A stopped server that preloads the library, with an empty feedback file beside its data."""
    with library_node(template) as node:
        create(feedback_path(node))
        node.settings = {**node.settings, "zenith.feedback_file": str(feedback_path(node))}
        yield node


def feedback_path(node: Postgres) -> Path:
    return node.datadir.with_name("feedback")


def test_reports_are_seen_at_once(node: Postgres) -> None:
    node.start()
    library = node.settings["shared_preload_libraries"]
    node.sql(*(function.format(library=library) for function in FUNCTIONS))
    assert node.sql(QUERY) == [(None, None, None, None, None)]
    file = FeedbackFile(feedback_path(node))
    for size, received, flushed, uploaded, limit in (
        (8192, 0x100000010, 0x20, 0, NO_LIMIT),
        ((1 << 62) + 1, 0x30, 0x20, 0x10, 0x40),
        (0, 1, 2, 3, 0xFFFFFFFF00000000),
    ):
        file.write(ZenithFeedback(size, received, flushed, uploaded, 5), limit)
        texts = [None if lsn in (0, NO_LIMIT) else lsn_text(lsn) for lsn in
                 (received, flushed, uploaded, limit)]  # fmt: skip
        assert node.sql(QUERY) == [(*texts, size)]
    # No report, but a limit: that of a compute whose pageserver has not said anything yet.
    file.write(NO_FEEDBACK, 0x50)
    assert node.sql(QUERY) == [(None, None, None, "0/50", None)]


def test_size_limit_needs_lazyfiles_and_a_size(node: Postgres) -> None:
    """Without anybody who says how large the cluster is, nothing is refused."""
    node.settings = {**node.settings, "zenith.max_cluster_size": "1MB"}
    node.start()
    FeedbackFile(feedback_path(node)).write(ZenithFeedback(5 << 20, 1, 1, 0, 0), NO_LIMIT)
    node.sql("CREATE TABLE t AS SELECT generate_series(1, 1000)")


def test_start_without_its_file_fails(node: Postgres) -> None:
    path = feedback_path(node)
    path.unlink()
    with pytest.raises(RuntimeError, match="could not open feedback file"):
        node.start()
    for content, message in ((b"", "has 0 bytes instead of 4096"), (bytes(4096), "is not a feedb")):
        path.write_bytes(content)
        give(path)
        with pytest.raises(RuntimeError, match=message):
            node.start()


def test_server_without_a_file_knows_nothing(node: Postgres) -> None:
    node.settings = {**node.settings, "zenith.feedback_file": ""}
    node.start()
    library = node.settings["shared_preload_libraries"]
    node.sql(*(function.format(library=library) for function in FUNCTIONS))
    assert node.sql(QUERY) == [(None, None, None, None, None)]
