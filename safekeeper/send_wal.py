"""START_REPLICATION: WAL for pageservers, hot standbys and, for recovery, a walproposer."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from postgres_ffi.wal_format import WAL_BLCKSZ
from safekeeper.remote_wal import RemoteWalError
from safekeeper.timeline import Timeline
from safekeeper.wal_reader import WalReader
from zenith_utils.lsn import lsn_text
from zenith_utils.postgres_backend import (
    Connection,
    ConnectionClosed,
    FatalQueryError,
    ProtocolError,
    QueryError,
)
from zenith_utils.safekeeper_messages import MAX_SEND_SIZE, NO_XMIN, HotStandbyFeedback
from zenith_utils.zenith_feedback import FeedbackError, ZenithFeedback, postgres_timestamp

logger = logging.getLogger(__name__)

_XLOG_DATA = struct.Struct(">cQQq")
_KEEPALIVE = struct.Struct(">cQqB")
_HS_FEEDBACK = struct.Struct(">qQQ")
# Of a stock standby: each xmin is followed by its epoch; 0 means that it needs none.
_STANDBY_FEEDBACK = struct.Struct(">qIIII")
_TAG_HS_FEEDBACK: Final = ord("h")
_TAG_FEEDBACK: Final = ord("z")
_TAG_STATUS: Final = ord("r")
_REPLY_REQUESTED: Final = 1
# In a keepalive's last byte, which readers otherwise take as true or false: nobody writes to the
# timeline, so a pageserver that makes what it has durable can be left alone.
_NO_COMPUTE: Final = 2
_IDLE_SECONDS: Final = 1.0
# Between attempts to get WAL out of an object storage that is away.
_STORAGE_PAUSE: Final = 2.0
# A stream sends at most this often while little comes at a time: every commit would cost the commit
# path a thread switch otherwise, and no reader is in that much of a hurry.
_MIN_INTERVAL: Final = 0.002


class StreamDone(Exception):
    """The stream is over because its reader needs nothing more; the text is for the reader."""


class WalSender:
    """One reader's stream."""

    def __init__(
        self,
        conn: Connection,
        timeline: Timeline,
        pageserver: str | None = None,
        *,
        standby: bool = False,
    ) -> None:
        """`pageserver` is the reader if it is one: its connection string without a password.

        A `standby` stays whether or not there is a compute.
        """
        self._conn = conn
        self._timeline = timeline
        self._pageserver = pageserver
        self._standby = standby
        self._reported: ZenithFeedback | None = None
        self._client_gone = threading.Event()
        self._alive_at = 0.0
        self._storage_error = ""
        """What the stream waits for."""

    def stream(self, start_lsn: int) -> None:
        """Send committed WAL from `start_lsn` on, as it comes, until the reader leaves.

        Ends with StreamDone when no compute is connected and the reader has everything on disk.
        """
        with contextlib.closing(self._open_reader(start_lsn)) as reader:
            self._stream(reader, start_lsn)

    def _stream(self, reader: WalReader, start_lsn: int) -> None:
        conn, timeline = self._conn, self._timeline
        conn.send_copy_both_response()
        feedback = threading.Thread(target=self._receive_feedback, name="wal-feedback", daemon=True)
        feedback.start()
        sent = start_lsn
        try:
            while not (self._client_gone.is_set() or conn.stopping):
                commit = timeline.wait_for_commit(sent, _IDLE_SECONDS)
                if commit > sent:
                    started = time.monotonic()
                    try:
                        sent = self._send(reader, sent, commit, lambda: None)
                    except RemoteWalError as e:
                        self._wait_for_storage(sent, e)
                        continue
                    self._storage_error = ""
                    if commit - sent < MAX_SEND_SIZE:
                        self._rest(started)
                    continue
                if self._is_done(commit):
                    raise StreamDone(
                        "failed to run ReplicationConn: end streaming, no compute is connected and "
                        f"the reader has all WAL up to {lsn_text(commit)} on disk"
                    )
                flags = _REPLY_REQUESTED if timeline.has_compute else _REPLY_REQUESTED | _NO_COMPUTE
                self._keep_alive(sent, flags)
        finally:
            timeline.record_hs_feedback(self, None)
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_RD)  # wakes the other thread
            feedback.join()

    def stream_for_recovery(self, start_lsn: int, term: int | None) -> None:
        """Send all WAL from `start_lsn` to the present flush LSN, committed or not, then end.

        With `term` the stream breaks off as soon as this safekeeper is in another term: what is
        not committed may then be replaced by the WAL of another leader.
        """
        conn, timeline = self._conn, self._timeline

        def check_term() -> None:
            # Under the lock, after reading: a truncation since would have come with a new term.
            with timeline.lock:
                now = timeline.acceptor.state.term
            if term is not None and now != term:
                raise FatalQueryError(f"recovery of term {term} ends: this safekeeper is in {now}")

        check_term()
        conn.send_copy_both_response()
        end = timeline.flush_lsn
        sent = start_lsn
        with contextlib.closing(self._open_reader(start_lsn)) as reader:
            while sent < end:
                sent = self._send(reader, sent, end, check_term)
        conn.send_command_complete()

    def _open_reader(self, start_lsn: int) -> WalReader:
        """The timeline's WAL; the other side gets keepalives while it waits for object storage."""
        reader = self._timeline.open_reader(start_lsn)

        def keep_alive() -> None:
            if time.monotonic() - self._alive_at >= _IDLE_SECONDS:
                self._keep_alive(reader.position)

        reader.progress = keep_alive
        return reader

    def _keep_alive(self, lsn: int, flags: int = 0) -> None:
        self._conn.send_copy_data(_KEEPALIVE.pack(b"k", lsn, postgres_timestamp(), flags))
        self._conn.flush()
        self._alive_at = time.monotonic()

    def _wait_for_storage(self, lsn: int, error: RemoteWalError) -> None:
        """Wait before WAL is asked for again that nobody could deliver."""
        if not self._storage_error:
            logger.warning("stream to %s waits at %s: %s", self._conn.peer, lsn_text(lsn), error)
        self._storage_error = str(error)
        self._keep_alive(lsn)
        self._client_gone.wait(_STORAGE_PAUSE)

    def _send(self, reader: WalReader, lsn: int, limit: int, check: Callable[[], None]) -> int:
        """Send one piece of WAL from `lsn`; where it ends. `check` runs before bytes leave.

        It ends at a page boundary or at `limit`, the end of a record. A standby takes it that a
        record's first page is there as soon as its header is (XLogSendPhysical()).
        """
        end = min(limit, lsn + MAX_SEND_SIZE)
        if end < limit:
            end -= end % WAL_BLCKSZ
        self._timeline.check_wal(lsn, end)
        data = reader.read(lsn, end - lsn)
        check()
        header = _XLOG_DATA.pack(b"w", lsn, limit, postgres_timestamp())
        self._conn.send_copy_data(header, data)
        self._conn.flush()
        return lsn + len(data)

    def _rest(self, started: float) -> None:
        pause = _MIN_INTERVAL - (time.monotonic() - started)
        if pause > 0:
            self._client_gone.wait(pause)

    def _is_done(self, commit: int) -> bool:
        """Whether neither a compute nor the reader has any use for the stream."""
        if self._timeline.has_compute or self._standby:
            return False
        reported = self._reported
        return commit == 0 or (reported is not None and reported.ps_flushlsn >= commit)

    # ---- the reader's messages, in a thread of their own

    def _receive_feedback(self) -> None:
        try:
            while (data := self._conn.recv_copy_data()) is not None:
                self._take_feedback(data)
        except (ConnectionClosed, ProtocolError, QueryError, FeedbackError, struct.error) as e:
            logger.info("stream to %s ends: %s", self._conn.peer, e)
        finally:
            self._client_gone.set()
            self._timeline.wake_readers()

    def _take_feedback(self, data: memoryview) -> None:
        tag = data[0] if len(data) else 0
        if tag == _TAG_FEEDBACK:
            self._reported = ZenithFeedback.parse(data[9:])
            self._timeline.record_feedback(self._reported)
            if self._pageserver is not None:
                self._timeline.delivered(
                    self._pageserver, self._reported.ps_flushlsn, self._reported.ps_applylsn
                )
            if self._is_done(self._timeline.commit_lsn):
                self._timeline.wake_readers()
        elif tag == _TAG_HS_FEEDBACK:
            if self._standby:
                report = parse_standby_feedback(data)
            else:
                report = HotStandbyFeedback._make(_HS_FEEDBACK.unpack_from(data, 1))
            self._timeline.record_hs_feedback(self, report)
        elif tag != _TAG_STATUS:
            logger.warning("unexpected message %r from %s", chr(tag), self._conn.peer)


def parse_standby_feedback(message: memoryview) -> HotStandbyFeedback:
    """The feedback message `h` of a stock walreceiver. Raises struct.error."""
    ts, xmin, epoch, catalog_xmin, catalog_epoch = _STANDBY_FEEDBACK.unpack_from(message, 1)
    return HotStandbyFeedback(
        ts,
        epoch << 32 | xmin if xmin else NO_XMIN,
        catalog_epoch << 32 | catalog_xmin if catalog_xmin else NO_XMIN,
    )
