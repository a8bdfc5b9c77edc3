"""One loaded timeline as the services see it: store, relation mapping, leases, WAL receiver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pageserver.layered_repository.errors import (
    LsnNotReadable,
    TimelineStopped,
    WaitLsnTimeout,
)
from pageserver.layered_repository.timeline import Timeline
from pageserver.leases import LeaseRegistry
from pageserver.metrics import PageserverMetrics
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.walingest import WalIngest
from pageserver.walreceiver import WalReceiver
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.page_checksum import set_checksums
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import PgVersion
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn


class LsnNotReadableError(Exception):
    """Pages at the LSN cannot be had: not arrived in time, or garbage collected."""


class TimelineHandle:
    """A timeline in use. All methods are thread safe."""

    def __init__(
        self,
        tenant_id: TenantId,
        timeline: Timeline,
        version: PgVersion,
        metrics: PageserverMetrics,
        *,
        wait_lsn_timeout: float,
        request_checkpoint: Callable[[TimelineHandle], None],
    ) -> None:
        """`request_checkpoint` has a timeline checkpointed in the background."""
        self.tenant_id = tenant_id
        self.metrics = metrics
        self.timeline_id: TimelineId = timeline.timeline_id
        self.timeline = timeline
        self.datadir = DatadirTimeline(timeline, version)
        self.version = version
        self.leases = LeaseRegistry(self.check_readable)
        self.walreceiver = WalReceiver(self)
        self._wait_lsn_timeout = wait_lsn_timeout
        self._request_checkpoint = request_checkpoint
        self.control_file = parse_control_file(self.datadir.control_file(timeline.last_record_lsn))
        self.system_identifier = self.control_file.system_identifier
        self.data_checksums = self.control_file.data_checksums

    def __str__(self) -> str:
        return f"{self.tenant_id}-{self.timeline_id}"

    def readable_lsn(self, lsn: int, *, latest: bool = False) -> Lsn:
        """The LSN to read at for a request at ``lsn``, after waiting for it.

        With ``latest`` that is the last record; ``lsn`` is what the answer must include at least.
        Raises LsnNotReadableError.
        """
        self.wait_lsn(lsn)
        if latest:
            return Lsn(self.timeline.last_record_lsn)
        self.check_readable(lsn)
        return Lsn(lsn)

    def wait_lsn(self, lsn: int) -> None:
        """Waits until WAL up to ``lsn`` is ingested, at most ``wait_lsn_timeout``.

        Raises LsnNotReadableError.
        """
        if lsn <= self.timeline.last_record_lsn:
            return
        try:
            self.timeline.wait_lsn(lsn, self._wait_lsn_timeout)
        except (WaitLsnTimeout, TimelineStopped) as error:
            raise LsnNotReadableError(str(error)) from error

    def check_readable(self, lsn: int) -> None:
        """Raises LsnNotReadableError if ``lsn`` is below the garbage collection cutoff."""
        try:
            self.timeline.check_lsn_readable(lsn)
        except LsnNotReadable as error:
            raise LsnNotReadableError(str(error)) from error

    def get_page(self, rel: RelTag, blkno: int, lsn: Lsn) -> bytes | bytearray:
        """One page, with its checksum when the cluster has checksums."""
        page = self.datadir.get_rel_page(rel, blkno, lsn)
        if not self.data_checksums:
            return page
        # Redo leaves the checksum to whoever writes the page out, which is us.
        checked = bytearray(page)
        set_checksums(checked, blkno)
        return checked

    def get_pages(
        self, rel: RelTag, blkno: int, count: int, lsn: Lsn
    ) -> Sequence[bytes | bytearray]:
        """``count`` consecutive pages; those past the end of the relation are zeros.

        The parts in order hold the pages; a part may hold several.
        """
        pages = self.datadir.get_rel_pages(rel, blkno, count, lsn)
        if not self.data_checksums:
            return pages
        checked = bytearray().join(pages)
        set_checksums(checked, blkno)
        return (checked,)

    def start_ingest(self) -> WalIngest:
        """Ingestion that continues at the end of the last record. One at a time."""
        return WalIngest(self.datadir)

    def checkpoint_soon(self) -> None:
        """Have what is in memory made durable in the background, if there is anything."""
        if self.timeline.disk_consistent_lsn < self.timeline.last_record_lsn:
            self._request_checkpoint(self)

    def logical_size(self) -> int:
        """Bytes of all relation forks at the last record, as ingestion keeps count."""
        return self.datadir.current_logical_size()

    def count_logical_size(self, lsn: Lsn) -> int:
        """The same at any LSN, counted from the relation sizes."""
        return self.datadir.logical_size(lsn)
