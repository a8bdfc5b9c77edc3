"""WAL ingestion: turns the WAL stream of a timeline into values of its store."""

import struct
from collections.abc import Callable

from typing_extensions import Buffer

from pageserver import _ingest, keys
from pageserver._ingest import IngestLoop
from pageserver.datadir_modification import CurrentState, DatadirModification
from pageserver.failpoints import AFTER_INGEST
from pageserver.layered_repository.timeline import TimelineWriter
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.size_table import SizeTable
from pageserver.walingest_context import IngestContext, IngestError
from pageserver.walingest_slru import ingest_clog, ingest_multixact
from pageserver.walingest_storage import (
    ingest_dbase,
    ingest_relmap,
    ingest_smgr,
    ingest_tblspc,
)
from pageserver.walingest_xact import ingest_xact
from pageserver.walingest_xlog import ingest_replorigin, ingest_xlog
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecoder
from zenith_utils.lsn import Lsn, lsn_text

__all__ = ["IngestError", "WalIngest"]

_BATCH_SIZE = 1 << 20  # bytes of WAL that become visible together

_HANDLERS: dict[int, Callable[[DecodedRecord, DatadirModification, IngestContext], None]] = {
    Rmgr.XLOG: ingest_xlog,
    Rmgr.XACT: ingest_xact,
    Rmgr.SMGR: ingest_smgr,
    Rmgr.CLOG: ingest_clog,
    Rmgr.DBASE: ingest_dbase,
    Rmgr.TBLSPC: ingest_tblspc,
    Rmgr.MULTIXACT: ingest_multixact,
    Rmgr.RELMAP: ingest_relmap,
    Rmgr.REPLORIGIN: ingest_replorigin,
}


class WalIngest:
    """Ingests the WAL of one timeline from `start_lsn` on; used by one thread at a time.

    The object knows the newest state of the timeline, so there must be only one that ingests, and
    after an error it is done with: a new one starts again at the end of the last good record.
    """

    def __init__(self, datadir: DatadirTimeline, *, system_identifier: int | None = None) -> None:
        """`system_identifier` is that of the WAL, None for the cluster's own."""
        timeline = datadir.timeline
        self.datadir = datadir
        self.start_lsn = timeline.last_record_lsn
        self._failed = False
        self._prev_lsn: int = timeline.prev_record_lsn
        control = parse_control_file(datadir.control_file(self.start_lsn))
        decoder = WalDecoder(
            self.start_lsn,
            datadir.version.xlog_page_magic,
            control.wal_segment_size,
            prev_lsn=self._prev_lsn,
            system_identifier=system_identifier or control.system_identifier,
        )
        self._decoder = decoder
        sizes = SizeTable()
        self._loop = IngestLoop(
            decoder,
            sizes,
            keys.COUNTERS_KEY,
            *datadir.counters(self.start_lsn),
            keys.COMMIT_TIME_KEY,
            *datadir.commit_time(self.start_lsn),
        )
        self._state = CurrentState(datadir, sizes)
        self._context = IngestContext(datadir, datadir.version, self._publish_before_record)
        self._writer: TimelineWriter | None = None

    @property
    def position(self) -> Lsn:
        """End of the last complete record, or of the segment that a switch has ended."""
        return Lsn(self._decoder.position)

    @property
    def received_lsn(self) -> Lsn:
        """Where the WAL given so far ends: the next piece has to start here."""
        return Lsn(self._decoder.received_lsn)

    @property
    def records(self) -> int:
        """Number of records ingested by this object."""
        return self._loop.records

    def ingest(self, data: Buffer) -> Lsn:
        """Ingest WAL that continues at `received_lsn`; returns the timeline's last_record_lsn.

        A record becomes visible as a whole, and no later than the next one. Raises WalDecodeError
        for WAL that is damaged and IngestError for a record that cannot be ingested; what comes
        before it stays ingested, nothing of it or after it does.
        """
        if self._failed:
            raise IngestError(
                f"ingestion of timeline {self.datadir.timeline.timeline_id} has failed before:"
                " start it anew"
            )
        view = memoryview(data).cast("B")
        with self.datadir.timeline.writer() as writer:
            self._writer = writer
            self._loop.use_layer(writer.open_layer)
            try:
                for start in range(0, len(view), _BATCH_SIZE):
                    self._ingest_batch(view[start : start + _BATCH_SIZE])
            except BaseException:
                self._failed = True
                raise
            finally:
                self._writer = None
        return Lsn(self.datadir.timeline.last_record_lsn)

    def _ingest_batch(self, data: memoryview) -> None:
        self._loop.stepwise = AFTER_INGEST.active
        try:
            status = self._loop.run(data)
            while status != _ingest.NEED_INPUT:
                self._serve(status)
                status = self._loop.run()
        except BaseException:
            if not self._loop.dirty:
                self._publish_before_record()
            raise
        self._publish(max(self._loop.done_lsn, self._decoder.position))

    def _serve(self, status: int) -> None:
        """Do what the loop has stopped for."""
        if status == _ingest.NEED_SIZE:
            self._state.load_size(*self._loop.needed())
        elif status == _ingest.NEED_DATABASE:
            self._add_database()
        elif status == _ingest.NEED_HANDLER:
            self._handle()
        elif status == _ingest.BAD_WAL:
            self._loop.raise_bad_wal()
        elif status == _ingest.RECORD_DONE:
            self._after_record()
        else:
            raise self._error(self._loop.bad_record_reason())

    def _add_database(self) -> None:
        """A relation is created in a database without a directory there, in a new tablespace."""
        _, spcnode, dbnode, _, _ = self._loop.needed()
        mod = DatadirModification(self._state, self._loop)
        mod.add_database(spcnode, dbnode)
        mod.commit()

    def _handle(self) -> None:
        record = self._loop.current_record()
        mod = DatadirModification(self._state, self._loop)
        try:
            _HANDLERS[record.rmid](record, mod, self._context)
        except (IngestError, ValueError, struct.error) as error:
            raise self._error(str(error)) from error
        mod.commit()
        self._loop.finish_handled()
        if self._loop.stepwise:
            self._after_record()

    def _after_record(self) -> None:
        """At the failpoint the record is visible."""
        self._publish_before_record()
        AFTER_INGEST.hit()
        self._loop.stepwise = AFTER_INGEST.active

    def _error(self, reason: str) -> IngestError:
        record = self._loop.current_record()
        return IngestError(
            f"cannot ingest WAL record at {lsn_text(record.start_lsn)} (resource manager"
            f" {record.rmid}, info {record.info:02X}): {reason}"
        )

    def _publish_before_record(self) -> int:
        """Make the records before the one in hand visible; returns the LSN of their end."""
        if self._loop.records:
            self._publish(self._loop.done_lsn)
        return self.datadir.timeline.last_record_lsn

    def _publish(self, lsn: int) -> None:
        """End the batch at `lsn`. Behind a switch that is the start of the next segment."""
        assert self._writer is not None
        if lsn > self.datadir.timeline.last_record_lsn:
            prev_lsn = self._loop.done_start or self._prev_lsn
            grown = self._loop.take_block_delta()
            self.datadir.publish(self._writer, lsn, prev_lsn, grown)
            self._loop.use_layer(self._writer.open_layer)
