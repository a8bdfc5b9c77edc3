"""Metrics of the safekeeper.

Every commit is observed three times, so observing must cost next to nothing: see HistogramCell.
"""

from __future__ import annotations

from collections.abc import Iterable

from safekeeper.callmemaybe import CallMeMaybe
from zenith_utils.histogram import HistogramCell
from zenith_utils.ids import TenantTimelineId
from zenith_utils.metrics import IntegerFamily, IntegerMetric, Metrics

_LABELS = ("tenant_id", "timeline_id")
_BYTES = tuple(float(1 << power) for power in range(6, 24, 2))


class TimelineMetrics:
    """The metrics of one timeline; one that is loaded again goes on counting."""

    def __init__(
        self,
        write_bytes: HistogramCell,
        write_seconds: HistogramCell,
        flush_seconds: HistogramCell,
        persist_seconds: HistogramCell,
    ) -> None:
        self.positions = (0, 0)
        """(commit LSN, flush LSN), replaced as a whole: no scrape sees commit above flush."""
        self._write_bytes = write_bytes
        self._write_seconds = write_seconds
        self._flush_seconds = flush_seconds
        self._persist_seconds = persist_seconds

    def observe_write(self, size: int, seconds: float) -> None:
        """WAL bytes written before a flush, and how long that took."""
        self._write_bytes.observe(size)
        self._write_seconds.observe(seconds)

    def observe_flush(self, seconds: float) -> None:
        """Duration of a flush."""
        self._flush_seconds.observe(seconds)

    def observe_persist(self, seconds: float) -> None:
        """Duration of a control file write."""
        self._persist_seconds.observe(seconds)


class SafekeeperMetrics:
    """All metrics of a safekeeper process."""

    def __init__(self) -> None:
        self.metrics = Metrics("safekeeper")
        self._timelines: dict[TenantTimelineId, TimelineMetrics] = {}
        self.metrics.add_source(self._lsns)
        histogram = self.metrics.histogram
        self._histograms = (
            histogram("write_wal_bytes", "Bytes of WAL per flush", _LABELS, _BYTES),
            histogram("write_wal_seconds", "Seconds writing WAL per flush", _LABELS),
            histogram("flush_wal_seconds", "Seconds per flush of WAL", _LABELS),
            histogram(
                "persist_control_file_seconds", "Seconds per write of the control file", _LABELS
            ),
        )

    def timeline(self, timeline_id: TenantTimelineId) -> TimelineMetrics:
        """The metrics of a timeline."""
        metrics = self._timelines.get(timeline_id)
        if metrics is None:
            labels = [str(part) for part in timeline_id]
            cells = (histogram.labels(*labels) for histogram in self._histograms)
            metrics = self._timelines.setdefault(timeline_id, TimelineMetrics(*cells))
        return metrics

    def watch_delivery(self, callmemaybe: CallMeMaybe) -> IntegerMetric:
        """Show what the delivery of WAL to pageservers costs; the gauge of open streams."""

        def families() -> Iterable[IntegerFamily]:
            waiting = IntegerFamily(
                "safekeeper_callmemaybe_subscriptions",
                "Timelines whose pageserver streams WAL or is asked to",
            )
            waiting.add(callmemaybe.subscriptions)
            calls = IntegerFamily(
                "safekeeper_callmemaybe_calls", "Calls to pageservers", kind="counter"
            )
            calls.add(callmemaybe.calls)
            return waiting, calls

        self.metrics.add_source(families)
        return self.metrics.gauge("pageserver_streams", "Open streams of WAL to pageservers")

    def _lsns(self) -> Iterable[IntegerFamily]:
        commit = IntegerFamily("safekeeper_commit_lsn", "Committed and durable here", _LABELS)
        flush = IntegerFamily("safekeeper_flush_lsn", "Durable here", _LABELS)
        for (tenant, timeline), metrics in list(self._timelines.items()):
            commit_lsn, flush_lsn = metrics.positions
            commit.add(commit_lsn, str(tenant), str(timeline))
            flush.add(flush_lsn, str(tenant), str(timeline))
        return commit, flush
