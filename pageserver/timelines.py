"""One loaded timeline as the services see it: store, relation mapping, leases, WAL receiver."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pageserver.layered_repository.errors import (
    LsnNotReadable,
    TimelineStopped,
    WaitLsnTimeout,
)
from pageserver.layered_repository.gc_plan import GcResult
from pageserver.layered_repository.read_pins import ReadPin
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.timeline import Timeline
from pageserver.lease_file import LeaseFile
from pageserver.leases import Lease, LeaseGoneError, LeaseRegistry
from pageserver.metrics import PageserverMetrics
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.time_travel import cutoff_by_time
from pageserver.walingest import WalIngest
from pageserver.walreceiver import WalReceiver
from postgres_ffi.control_file import ControlFile, parse_control_file
from postgres_ffi.page_checksum import set_checksums
from postgres_ffi.relfile import RelTag
from postgres_ffi.versions import PgVersion
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

if TYPE_CHECKING:
    from pageserver.layered_repository.compactor import CompactionResult


class LsnNotReadableError(Exception):
    """Pages at the LSN cannot be had: not arrived in time, or garbage collected."""


class LsnNotArrivedError(LsnNotReadableError):
    """Not yet."""


class Reading:
    """A `with` block that reads at one LSN, given at its begin; no garbage collection disturbs it.

    Entering raises LsnNotReadableError.
    """

    __slots__ = ("_handle", "_latest", "_lsn", "_pin", "_points")

    _points: MutableMapping[Any, int]

    def __init__(self, handle: TimelineHandle, lsn: int, *, latest: bool) -> None:
        self._handle = handle
        self._lsn = lsn
        self._latest = latest
        self._pin: ReadPin | None = None

    def __enter__(self) -> Lsn:
        timeline = self._handle.timeline
        while True:
            lsn = timeline.last_record_lsn if self._latest else Lsn(self._lsn)
            pin = timeline.pin(lsn)
            try:
                pin.__enter__()
            except LsnNotReadable as error:
                if self._latest and timeline.last_record_lsn != lsn:
                    continue  # everything before the last record has just been collected
                if not self._enter_leased(lsn):
                    raise LsnNotReadableError(str(error)) from error
            else:
                self._pin = pin
            return lsn

    def _enter_leased(self, lsn: Lsn) -> bool:
        """What is leased can be read below the cutoff, too."""
        owner = self._handle.owner(lsn)
        pins: Any = owner.timeline.pins
        self._points = pins
        # Kept first, checked then, see ReadPin: the lease may end before we do.
        self._points[self] = lsn
        if owner.leases.is_leased(lsn):
            return True
        del self._points[self]
        return False

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pin is None:
            del self._points[self]
        else:
            self._pin.__exit__(exc_type, exc, traceback)


class TimelineHandle:
    """A timeline in use. All methods are thread safe."""

    def __init__(
        self,
        tenant_id: TenantId,
        timeline: Timeline,
        version: PgVersion,
        metrics: PageserverMetrics,
        *,
        repository: Repository,
        ancestor: TimelineHandle | None,
        lease_file: LeaseFile,
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
        self._repository = repository
        self.ancestor = ancestor
        self.leases = LeaseRegistry(self.check_readable, timeline.pins, file=lease_file)
        """Those on the timeline's own history, also of branches that reach back into it."""
        self.walreceiver = WalReceiver(self)
        self._wait_lsn_timeout = wait_lsn_timeout
        self._request_checkpoint = request_checkpoint
        # A branch's own would have to be read in its ancestor, and wait for WAL that comes only
        # when somebody has called for both. What is used of it is the same for both.
        self.control_file: ControlFile = (
            parse_control_file(self.datadir.control_file(timeline.last_record_lsn))
            if ancestor is None
            else ancestor.control_file
        )
        self.system_identifier = self.control_file.system_identifier
        self.data_checksums = self.control_file.data_checksums

    def __str__(self) -> str:
        return f"{self.tenant_id}-{self.timeline_id}"

    def reading(self, lsn: int, *, latest: bool = False) -> Reading:
        """Waits for ``lsn``; the result is entered to read there.

        With ``latest`` that is at the last record; ``lsn`` is what must be included at least.
        Raises LsnNotReadableError.
        """
        self.wait_lsn(lsn)
        return Reading(self, lsn, latest=latest)

    def wait_lsn(self, lsn: int) -> None:
        """Waits until WAL up to ``lsn`` is ingested, at most ``wait_lsn_timeout``.

        Raises LsnNotArrivedError.
        """
        if lsn <= self.timeline.last_record_lsn:
            return
        try:
            self.timeline.wait_lsn(lsn, self._wait_lsn_timeout)
        except (WaitLsnTimeout, TimelineStopped) as error:
            raise LsnNotArrivedError(str(error)) from error

    def check_readable(self, lsn: int) -> None:
        """Raises LsnNotReadableError if ``lsn`` is below the garbage collection cutoff.

        What is leased can still be read there.
        """
        try:
            self.timeline.check_lsn_readable(lsn)
        except LsnNotReadable as error:
            raise LsnNotReadableError(str(error)) from error

    def acquire_lease(self, lsn: Lsn, ttl: float) -> Lease:
        """A promise that ``lsn`` stays readable for ``ttl`` seconds; waits for the LSN.

        Raises LsnNotReadableError, OSError.
        """
        self.wait_lsn(lsn)
        self.check_readable(lsn)
        return self.owner(lsn).leases.acquire(lsn, ttl)

    def renew_lease(self, lease_id: str, ttl: float, lsn: Lsn | None) -> Lease:
        """Extends a lease, see LeaseRegistry.renew.

        Raises LeaseGoneError, LsnNotReadableError, OSError.
        """
        if lsn is not None:
            leases = self.owner(lsn).leases
            if not leases.holds(lease_id):
                self.wait_lsn(lsn)
            return leases.renew(lease_id, ttl, lsn)
        holder = self._holder(lease_id)
        if holder is None:
            raise LeaseGoneError(f"lease {lease_id} is unknown or has expired")
        return holder.leases.renew(lease_id, ttl)

    def release_lease(self, lease_id: str) -> None:
        """Ends a lease, if there is one."""
        holder = self._holder(lease_id)
        if holder is not None:
            holder.leases.release(lease_id)

    def owner(self, lsn: int) -> TimelineHandle:
        """The timeline whose history `lsn` is part of: below the branch point the ancestor's."""
        owner = self
        while lsn < owner.timeline.ancestor_lsn and owner.ancestor is not None:
            owner = owner.ancestor
        return owner

    def _holder(self, lease_id: str) -> TimelineHandle | None:
        holder: TimelineHandle | None = self
        while holder is not None and not holder.leases.holds(lease_id):
            holder = holder.ancestor
        return holder

    def get_page(self, rel: RelTag, blkno: int, lsn: Lsn) -> bytes | bytearray:
        """One page, with its checksum when the cluster has checksums."""
        started = time.perf_counter()
        page = self.datadir.get_rel_page(rel, blkno, lsn)
        self._observe_reconstruct(time.perf_counter() - started)
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
        started = time.perf_counter()
        pages = self.datadir.get_rel_pages(rel, blkno, count, lsn)
        self._observe_reconstruct(time.perf_counter() - started)
        if not self.data_checksums:
            return pages
        checked = bytearray().join(pages)
        set_checksums(checked, blkno)
        return (checked,)

    @cached_property
    def _observe_reconstruct(self) -> Callable[[float], None]:
        labels = str(self.tenant_id), str(self.timeline_id)
        return self.metrics.getpage_reconstruct_time.labels(*labels).observe

    def start_ingest(self) -> WalIngest:
        """Ingestion that continues at the end of the last record. One at a time."""
        return WalIngest(self.datadir)

    def checkpoint_soon(self) -> None:
        """Have what is in memory made durable in the background, if there is anything."""
        if self.timeline.disk_consistent_lsn < self.timeline.last_record_lsn:
            self._request_checkpoint(self)

    def compact(self, *, force: bool = False) -> CompactionResult:
        """One round of compaction; see Timeline.compact."""
        return self.timeline.compact(self.datadir.collect_keyspace, force=force)

    def horizon_lsn(self, horizon: int) -> Lsn:
        """The LSN ``horizon`` bytes of WAL behind the last record; 0 if there is not so much."""
        return Lsn(max(self.timeline.last_record_lsn - horizon, 0) & ~7)

    def collect_garbage(self, horizon: int, pitr_interval: float) -> GcResult:
        """Removes layers that only older history needs.

        Stays readable: what ``horizon`` bytes of WAL and ``pitr_interval`` seconds (0: any) go back
        to, what is leased, and where branches begin. Raises store errors, OSError.
        """
        wanted = self.horizon_lsn(horizon)
        if pitr_interval:
            wanted = min(wanted, cutoff_by_time(self.datadir, pitr_interval, time.time()))
        return self._collect_garbage(wanted)

    def collect_all_garbage(self, horizon: int) -> GcResult:
        """The same without a time limit, and of everything: also of what is in memory.

        Layers are rewritten where that sets garbage free.
        """
        wanted = self.horizon_lsn(horizon)
        self.timeline.checkpoint()
        self._publish_cutoff(wanted)
        self.compact(force=True)
        return self._collect_garbage(wanted)

    def _collect_garbage(self, wanted: Lsn) -> GcResult:
        return self._repository.gc(
            self.timeline_id, choose_cutoff=lambda _: self._publish_cutoff(wanted)
        )

    def _publish_cutoff(self, wanted: Lsn) -> Lsn:
        """Moves the cutoff to `wanted`, never back; what it is then."""
        self.leases.publish_cutoff(wanted, self.timeline.publish_gc_cutoff)
        return Lsn(self.timeline.latest_gc_cutoff_lsn)

    def logical_size(self) -> int | None:
        """Bytes of all relation forks at the last record; see DatadirTimeline."""
        return self.datadir.current_logical_size()
