"""Receives the WAL of a timeline and feeds it to ingestion.

``callmemaybe`` names where WAL can be had: a safekeeper, or the compute itself in a cluster
without safekeepers. One thread per timeline connects to the source that is furthest ahead,
streams from the end of the last ingested record and reports progress. It reconnects, with
growing pauses, until the sender itself ends the stream; then it rests until the next
``callmemaybe``. Nothing about sources is kept on disk.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING

from pageserver.wal_source import SourceError, WalSource, identify
from pageserver.wal_stream import StreamEnd, WalStream
from zenith_utils.lsn import INVALID_LSN, Lsn
from zenith_utils.pq_client import PqConnection, PqConnectionLost, PqError

if TYPE_CHECKING:
    from pageserver.timelines import TimelineHandle

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
PROBE_TIMEOUT = 1.0
# SQLSTATE of a server that is starting up or shutting down.
CANNOT_CONNECT_NOW = "57P03"
MIN_PAUSE = 0.1
MAX_PAUSE = 3.0


class WalReceiver:
    """The WAL receiver of one timeline. Its thread runs while there are sources to try."""

    def __init__(self, handle: TimelineHandle) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._sources: dict[str, WalSource] = {}
        self._thread: threading.Thread | None = None
        self._connection: PqConnection | None = None
        self._source: WalSource | None = None
        self._stream: WalStream | None = None
        self._received = INVALID_LSN
        self._stopping = False
        self._wake = threading.Event()
        self._last_error = ""
        self._ended = ""
        """Conninfo of a compute that seems to have shut down; the next failure confirms it."""

    def callmemaybe(self, conninfo: str) -> None:
        """Adds a source and starts receiving; returns at once.

        A string that cannot be used is logged: the caller cannot do anything about it.
        """
        try:
            source = WalSource.parse(conninfo)
            self._check_names(source)
        except SourceError as error:
            log.error("%s: callmemaybe ignored: %s", self._handle, error)
            return
        with self._lock:
            if self._stopping:
                return
            if source.conninfo not in self._sources:
                log.info("%s: WAL can be had from %s", self._handle, source)
            if not source.is_safekeeper:
                # One compute writes to a timeline: the newest one, the others are gone.
                self._sources = {k: s for k, s in self._sources.items() if s.is_safekeeper}
            self._sources[source.conninfo] = source
            self._ended = ""
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"walreceiver {self._handle.timeline_id}", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Ends receiving for good and waits for the thread; what was received is ingested."""
        with self._lock:
            self._stopping = True
            thread = self._thread
            if self._connection is not None:
                _interrupt(self._connection)
        self._wake.set()
        if thread is not None:
            thread.join()

    @property
    def source(self) -> WalSource | None:
        """Whom WAL comes from; None if there is no connection, and all that came is ingested."""
        return self._source

    @property
    def received_lsn(self) -> Lsn:
        """Where the WAL ends that the newest stream has brought and that is ingested, or 0.

        What lies between the last record and here is no complete record.
        """
        stream = self._stream
        return self._received if stream is None else stream.received

    def _check_names(self, source: WalSource) -> None:
        for kind, named, own in (
            ("timeline", source.timeline_option, self._handle.timeline_id),
            # A tenant must not get at the WAL of another one under the name of its own timeline.
            ("tenant", source.tenant_option, self._handle.tenant_id),
        ):
            if named is not None and named.replace("-", "") != str(own):
                raise SourceError(f"{source} was offered with {kind} {named}")

    def _run(self) -> None:
        pause = MIN_PAUSE
        while True:
            with self._lock:
                if self._stopping or not self._sources:
                    self._thread = None
                    return
                sources = list(self._sources.values())
            self._wake.clear()
            progressed, urgent = self._attempt(sources)
            if progressed:
                pause = MIN_PAUSE
            if urgent:
                continue
            # A new callmemaybe says that a source is alive, so it ends the pause.
            self._wake.wait(pause)
            pause = min(pause * 2, MAX_PAUSE)

    def _attempt(self, sources: list[WalSource]) -> tuple[bool, bool]:
        """One connection from start to end: (anything received, no pause before the next)."""
        before = self._handle.timeline.last_record_lsn
        found = self._connect_furthest(sources)
        if found is None:
            return False, False
        source, connection = found
        urgent = False
        try:
            stream = WalStream(self._handle, source, connection, self._others_ahead)
            self._stream = stream
            end = stream.run(lambda: self._stopping)
            log.info("%s: %s: %s at %s", self._handle, source, end.value, stream.received)
            self._last_error = ""
            urgent = end is StreamEnd.SWITCH
            if end is StreamEnd.ENDED and source.is_safekeeper:
                self._forget(source)
            elif end is StreamEnd.ENDED:
                self._ended = source.conninfo
        except PqConnectionLost as error:
            self._report(f"{source}: {error}", logging.WARNING)
        except PqError as error:
            if source.is_safekeeper:
                # It has nothing more to send, says so, and calls again when that changes.
                log.info("%s: %s ended the stream: %s", self._handle, source, error)
                self._forget(source)
            else:
                self._report(f"{source}: {error}")
        except Exception as error:
            # Bad WAL or a wrong sender: the timeline goes on serving what it has.
            self._report(f"{source}: {type(error).__name__}: {error}", error=error)
            self._wake.clear()
        finally:
            with self._lock:
                self._connection = self._source = None
            self._received, self._stream = self.received_lsn, None
            connection.close()
            self._handle.metrics.wal_receiver_connected(-1)
            if not source.is_safekeeper:
                # A compute that has crashed does not keep its WAL to send it again.
                self._handle.checkpoint_soon()
        return self._handle.timeline.last_record_lsn > before, urgent

    def _report(
        self, text: str, level: int = logging.ERROR, *, error: BaseException | None = None
    ) -> None:
        """Logs a failure once, not at every retry."""
        if text != self._last_error and not self._stopping:
            log.log(level, "%s: WAL receiver: %s", self._handle, text, exc_info=error)
            self._last_error = text

    def _forget(self, source: WalSource) -> None:
        with self._lock:
            if self._sources.get(source.conninfo) is source:
                del self._sources[source.conninfo]

    def _connect_furthest(self, sources: list[WalSource]) -> tuple[WalSource, PqConnection] | None:
        """Connects to the source with the highest WAL position; None if none can be used."""
        best: tuple[int, WalSource, PqConnection] | None = None
        failures = []
        level = logging.INFO
        timeout = CONNECT_TIMEOUT if len(sources) == 1 else PROBE_TIMEOUT
        for source in sources:
            try:
                position, connection = self._probe(source, timeout)
            except (PqError, SourceError, ValueError, OverflowError) as error:
                # ValueError, OverflowError: what resolving an absurd host or port raises.
                if source.conninfo == self._ended:
                    self._forget(source)
                else:
                    failures.append(f"{source}: {error}")
                    level = max(level, _severity(error))
                continue
            if best is not None and best[0] >= position:
                connection.close()
                continue
            if best is not None:
                best[2].close()
            best = position, source, connection
        if best is None:
            if failures:
                self._report("; ".join(failures), level)
            return None
        with self._lock:
            self._ended = ""
            self._connection = best[2]
            self._source = best[1]
            if self._stopping:
                _interrupt(best[2])
        self._handle.metrics.wal_receiver_connected(1)
        return best[1], best[2]

    def _others_ahead(self, current: WalSource, position: int) -> bool:
        """Whether another source has WAL beyond ``position``."""
        with self._lock:
            others = [s for s in self._sources.values() if s is not current]
        for source in others:
            try:
                found, connection = self._probe(source, PROBE_TIMEOUT)
            except (PqError, SourceError, ValueError, OverflowError) as error:
                log.debug("%s: %s: %s", self._handle, source, error)
                continue
            connection.close()
            if found > position:
                return True
        return False

    def _probe(self, source: WalSource, timeout: float) -> tuple[Lsn, PqConnection]:
        """Connects; the source's WAL position. What can go wrong is listed where it is called."""
        connection = source.connect(timeout)
        try:
            return identify(connection, source, self._handle, timeout), connection
        except BaseException:
            connection.close()
            raise


def _severity(error: Exception) -> int:
    """The level to log a failure to connect at."""
    if isinstance(error, PqConnectionLost):
        return logging.WARNING
    if isinstance(error, PqError) and error.sqlstate == CANNOT_CONNECT_NOW:
        return logging.INFO
    return logging.ERROR


def _interrupt(connection: PqConnection) -> None:
    """Makes whoever waits on the connection see its end."""
    with contextlib.suppress(OSError):
        connection.sock.shutdown(socket.SHUT_RDWR)
