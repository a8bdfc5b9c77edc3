"""START_WAL_PUSH: the session of a proposer that writes WAL to this safekeeper."""

from __future__ import annotations

import logging
from collections.abc import Callable

from safekeeper.consensus import ConsensusError, Session
from safekeeper.timeline import Timeline
from safekeeper.timelines import Timelines
from safekeeper.wal_files import WalStorageError
from zenith_utils.ids import TenantTimelineId
from zenith_utils.postgres_backend import (
    Connection,
    ConnectionClosed,
    CopyFinished,
    FatalQueryError,
)
from zenith_utils.safekeeper_messages import (
    TAG_APPEND,
    AcceptorMessage,
    AppendRequest,
    MessageError,
    ProposerGreeting,
    parse_proposer_message,
)

logger = logging.getLogger(__name__)

# Flush and answer at least this often while requests keep coming faster than they are written.
_MAX_BATCH = 4 << 20
# From this size on a batch asks the socket for more; below it only takes what has been read, which
# saves a system call on the commit path.
_BULK = 32 << 10


class PushSession:
    """One proposer's connection: reads its messages, batches WAL, answers."""

    def __init__(
        self,
        conn: Connection,
        timelines: Timelines,
        timeline_id: TenantTimelineId,
        on_connected: Callable[[Timeline], None],
    ) -> None:
        """`on_connected` is called once the timeline counts this compute as connected.

        An OSError of it ends the session.
        """
        self._on_connected = on_connected
        self._conn = conn
        self._timelines = timelines
        self._timeline_id = timeline_id
        self._session = Session()
        self._commit_lsn = 0
        self._ended = False

    def run(self) -> None:
        """Serve the session until the proposer leaves.

        The timeline is created if it does not exist. Raises FatalQueryError for a breach of the
        protocol or an error of the storage; ConnectionClosed.
        """
        conn = self._conn
        conn.send_copy_both_response()
        try:
            first = conn.recv_copy_data()
            if first is None:
                return
            if not isinstance(parse_proposer_message(first), ProposerGreeting):
                raise ConsensusError("first message of a session must be ProposerGreeting")
            timeline = self._timelines.get_or_create(self._timeline_id)
            timeline.compute_connected()
            try:
                self._on_connected(timeline)
                self._serve(timeline, first)
            finally:
                timeline.compute_disconnected()
                self._timelines.save_progress([timeline])
        except (MessageError, ConsensusError, WalStorageError, OSError) as e:
            raise FatalQueryError(f"failed to run ReceiveWalConn: {e}") from e

    def _serve(self, timeline: Timeline, data: memoryview | None) -> None:
        conn = self._conn
        while data is not None:
            following = None
            if _is_append(data):
                following = self._append_batch(timeline, data)
            else:
                message = parse_proposer_message(data)
                assert not isinstance(message, AppendRequest)
                self._answer(timeline.process(self._session, message))
            if timeline.commit_lsn != self._commit_lsn:
                # After the answer: the proposer's commit waits for that, readers can.
                self._commit_lsn = timeline.commit_lsn
                timeline.wake_readers()
            if following is None and not self._ended:
                following = conn.recv_copy_data()
            data = following

    def _append_batch(self, timeline: Timeline, data: memoryview) -> memoryview | None:
        """Write every AppendRequest that is here already, then flush once and answer once.

        Returns the message behind the batch if that has been received, too.
        """
        following: memoryview | None = data
        size = 0
        with timeline.lock:
            timeline.check_usable()
            while following is not None and _is_append(following):
                size += len(following)
                refusal = timeline.append(self._session, following)
                if refusal is not None:
                    self._answer([refusal])
                    return None
                following = self._next_of_batch(size)
            replies = timeline.flush_appended()
        self._answer(replies)
        return following

    def _next_of_batch(self, size: int) -> memoryview | None:
        """The next message unless it must be waited for or the batch has grown big enough."""
        conn = self._conn
        if size >= _MAX_BATCH or not (size >= _BULK or conn.has_buffered_input()):
            return None
        try:
            return conn.recv_copy_data_available()
        except (ConnectionClosed, CopyFinished):
            # What the proposer sent before it left is flushed like everything else.
            self._ended = True
            return None

    def _answer(self, replies: list[AcceptorMessage]) -> None:
        for reply in replies:
            self._conn.send_copy_data(reply.encode())
        self._conn.flush()


def _is_append(data: memoryview) -> bool:
    """Whether a message claims to be an AppendRequest; decoding it checks the whole tag."""
    return len(data) > 0 and data[0] == TAG_APPEND
