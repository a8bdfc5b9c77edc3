"""One stream of WAL from a sender into ingestion, with reports of progress."""

from __future__ import annotations

import logging
import select
import struct
import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from pageserver.commit_waiters import PROBE_PERIOD, CommitWaiters
from pageserver.wal_source import SourceError, WalSource
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqConnection, PqConnectionLost
from zenith_utils.pq_framing import ProtocolError
from zenith_utils.zenith_feedback import ZenithFeedback, postgres_timestamp

if TYPE_CHECKING:
    from pageserver.timelines import TimelineHandle

log = logging.getLogger(__name__)

# Without a message for this long the sender is asked for a sign of life, then given up.
PING_AFTER = 10.0
DEAD_AFTER = 30.0
# A sender that answers a report of ours at once with a request for another one is shutting down
# and waits for its WAL to be durable here; senders that are merely idle ask much later.
SHUTDOWN_PING = 1.0
# With nothing new for this long, look whether another safekeeper has more.
LAG_PROBE = 5.0
MAX_LAG_PROBE = 60.0
FEEDBACK_PERIOD = 1.0
# How soon a compute whose commits wait for it learns that WAL is durable.
FLUSH_POLL = 0.02

# In the last byte of a safekeeper's keepalive, beside the request for a reply: nobody writes.
NO_COMPUTE = 2

_WAL_HEADER = struct.Struct(">BQQq")  # 'w', start, end of WAL, time
_KEEPALIVE = struct.Struct(">BQqB")  # 'k', end of WAL, time, reply requested
_STANDBY_STATUS = struct.Struct(">BQQQqB")  # 'r', write, flush, apply, time, reply requested
_ZENITH_STATUS = struct.Struct(">BQ")  # 'z', length; ZenithFeedback follows


class StreamEnd(Enum):
    """Why a stream is over."""

    ENDED = "the sender ended the stream"
    SWITCH = "another source is ahead"
    STOPPED = "stopped"


class WalStream:
    """One replication stream, from START_REPLICATION to its end."""

    def __init__(
        self,
        handle: TimelineHandle,
        source: WalSource,
        connection: PqConnection,
        others_ahead: Callable[[WalSource, int], bool],
    ) -> None:
        self._handle = handle
        self._source = source
        self._conn = connection
        self._others_ahead = others_ahead
        self._ingest = handle.start_ingest()
        self.received = Lsn(self._ingest.start_lsn)
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        now = time.monotonic()
        self._last_message = self._last_progress = self._last_status = now
        self._probe_after = LAG_PROBE
        self._sender_stopping = False
        self._flush_awaited = 0
        """Commits on the compute wait until WAL up to here is durable; 0: none."""
        self._waiters = None if source.is_safekeeper else CommitWaiters(source)

    def run(self, stopping: Callable[[], bool]) -> StreamEnd:
        """Receives until the stream ends. Raises PqError, SourceError, decode errors."""
        try:
            return self._run(stopping)
        finally:
            if self._waiters is not None:
                self._waiters.close()

    def _run(self, stopping: Callable[[], bool]) -> StreamEnd:
        conn = self._conn
        log.info("%s: streaming WAL from %s at %s", self._handle, self._source, self.received)
        conn.start_copy_both(f"START_REPLICATION PHYSICAL {self.received}", timeout=DEAD_AFTER)
        self._send_status()
        reply = False
        while not stopping():
            if reply and not conn.has_buffered_input():
                # Before the compute is asked who waits: it may be all that they wait for.
                self._send_status()
                reply = False
            if self._serve_waiters():
                reply = True
                continue
            if not conn.has_buffered_input() and not self._poll.poll(self._patience() * 1000):
                if self._idle():
                    return StreamEnd.SWITCH
                continue
            try:
                message = conn.recv_copy_data()
            except PqConnectionLost as error:
                # A server that shuts down ends the command without ending the copy.
                if self._sender_stopping or isinstance(error.__cause__, ProtocolError):
                    return StreamEnd.ENDED
                raise
            if message is None:
                return StreamEnd.ENDED
            reply |= self._on_message(message)
        return StreamEnd.STOPPED

    def _on_message(self, message: memoryview) -> bool:
        """Handles one message; True if the sender is to be told where we are."""
        self._last_message = time.monotonic()
        kind = message[0] if message else 0
        if kind == ord("w"):
            self._on_wal(message)
            return True
        if kind == ord("k") and len(message) == _KEEPALIVE.size:
            return self._on_keepalive(message[17])
        raise SourceError(f"unexpected replication message {bytes(message[:1])!r}")

    def _on_wal(self, message: memoryview) -> None:
        if len(message) < _WAL_HEADER.size:
            raise SourceError(f"WAL message of {len(message)} bytes")
        start = _WAL_HEADER.unpack_from(message)[1]
        if start != self.received:
            raise SourceError(f"WAL at {Lsn(start)} was sent instead of {self.received}")
        data = message[_WAL_HEADER.size :]
        self._ingest.ingest(data)
        self.received = Lsn(start + len(data))
        self._last_progress = self._last_message
        self._probe_after = LAG_PROBE
        self._sender_stopping = False
        if self._waiters is not None:
            self._waiters.wal_arrived(self._last_message)

    def _on_keepalive(self, flags: int) -> bool:
        if not flags:
            return False
        if self._source.is_safekeeper:
            if flags & NO_COMPUTE:
                # It has no more WAL, or would send that; once all is durable here it can rest.
                self._handle.checkpoint_soon()
            return True
        since_status = self._last_message - self._last_status
        if since_status < SHUTDOWN_PING:
            # The compute's directory does not outlive a clean stop: make its WAL durable here.
            self._sender_stopping = True
            self._handle.timeline.checkpoint()
        return True

    def _patience(self) -> float:
        """Seconds to wait for a message before looking after other things."""
        if self._flush_awaited:
            return FLUSH_POLL
        if self._waiters is not None and self._waiters.watching:
            return PROBE_PERIOD
        return FEEDBACK_PERIOD

    def _serve_waiters(self) -> bool:
        """Have what commits on the compute wait for made durable; True when that is to be told."""
        if self._waiters is None:
            return False
        timeline = self._handle.timeline
        if self._flush_awaited:
            if timeline.disk_consistent_lsn < self._flush_awaited:
                return False
            self._flush_awaited = 0
            return True
        now = time.monotonic()
        if self._waiters.due(now):
            lsn = timeline.last_record_lsn
            if self._waiters.present(now, unflushed=timeline.disk_consistent_lsn < lsn):
                timeline.freeze()
                self._flush_awaited = lsn
        return False

    def _idle(self) -> bool:
        """Housekeeping while nothing arrives; True to change to another source."""
        now = time.monotonic()
        silence = now - self._last_message
        if silence > DEAD_AFTER:
            raise SourceError(f"no message for {silence:.0f} s")
        report_due = now - self._last_status > FEEDBACK_PERIOD
        if not self._source.is_safekeeper:
            if report_due and (silence > PING_AFTER or not self._flush_reported()):
                self._send_status(ping=silence > PING_AFTER)
            return False
        if report_due:
            self._send_status()
        if now - self._last_progress < self._probe_after:
            return False
        self._probe_after = min(self._probe_after * 2, MAX_LAG_PROBE)
        self._last_progress = now
        return self._others_ahead(self._source, self.received)

    def _flush_reported(self) -> bool:
        return self._reported_flush == self._flush_position()

    def _flush_position(self) -> int:
        """How far the WAL is durable here.

        With everything up to the last record flushed and no part of another one received, that
        is all that was received: the sender's end may differ from the record's by a page header.
        """
        timeline = self._handle.timeline
        durable = timeline.disk_consistent_lsn
        if durable >= timeline.last_record_lsn and self.received - durable < 64:
            return max(durable, self._complete_position())
        return durable

    def _complete_position(self) -> int:
        return self.received if self.received == self._ingest.position else 0

    def _send_status(self, *, ping: bool = False) -> None:
        flush = self._flush_position()
        now = postgres_timestamp()
        if self._source.is_safekeeper:
            feedback = ZenithFeedback(
                current_timeline_size=self._handle.logical_size() or 0,
                ps_writelsn=self.received,
                ps_flushlsn=flush,
                ps_applylsn=0,
                ps_replytime=now,
            ).encode()
            self._conn.send_copy_data(_ZENITH_STATUS.pack(ord("z"), len(feedback)), feedback)
        else:
            self._conn.send_copy_data(
                _STANDBY_STATUS.pack(ord("r"), self.received, flush, 0, now, ping)
            )
        self._reported_flush = flush
        self._last_status = time.monotonic()
