"""START_WAL_PUSH: the session of a proposer that writes WAL to this safekeeper."""

from __future__ import annotations

import logging
from collections.abc import Callable

from safekeeper.consensus import ConsensusError, Session, check_instance
from safekeeper.push_stream import PushStream
from safekeeper.timeline import Timeline
from safekeeper.timelines import Timelines
from safekeeper.wal_files import WalStorageError
from zenith_utils.ids import TenantTimelineId
from zenith_utils.postgres_backend import Connection, FatalQueryError
from zenith_utils.safekeeper_messages import (
    AppendRequest,
    MessageError,
    ProposerGreeting,
    parse_proposer_message,
)

logger = logging.getLogger(__name__)


class PushSession:
    """One proposer's connection, from its greeting to its end."""

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
            greeting = parse_proposer_message(first)
            if not isinstance(greeting, ProposerGreeting):
                raise ConsensusError("first message of a session must be ProposerGreeting")
            # Before a timeline is created for a proposer that means another disk.
            check_instance(greeting, self._timelines.instance)
            timeline = self._timelines.get_or_create(self._timeline_id)
            timeline.compute_connected()
            logger.info("timeline %s: session of proposer %s begins", timeline.id, conn.peer)
            try:
                self._on_connected(timeline)
                self._serve(timeline, first)
            finally:
                timeline.compute_disconnected()
                logger.info("timeline %s: session of proposer %s ends", timeline.id, conn.peer)
                self._timelines.save_progress([timeline])
        except (MessageError, ConsensusError, WalStorageError, OSError) as e:
            raise FatalQueryError(f"failed to run ReceiveWalConn: {e}") from e

    def _serve(self, timeline: Timeline, data: memoryview | bytes | None) -> None:
        stream = PushStream(self._conn, self._session, timeline)
        while data is not None:
            message = parse_proposer_message(data)
            assert not isinstance(message, AppendRequest)
            for reply in timeline.process(self._session, message):
                self._conn.send_copy_data(reply.encode())
            self._conn.flush()
            data = stream.next_message()
