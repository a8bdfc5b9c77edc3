"""Metrics of the safekeeper.

Every commit is observed three times, so observing must cost next to nothing: plain numbers, owned
by the timeline's lock, which a scrape turns into what Prometheus wants.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from safekeeper.callmemaybe import CallMeMaybe
from zenith_utils.ids import TenantTimelineId
from zenith_utils.metrics import DURATION_BUCKETS, IntegerFamily, IntegerMetric, Metrics

_LABELS = ("tenant_id", "timeline_id")
_BYTES = tuple(float(1 << power) for power in range(6, 24, 2))


class _Histogram:
    """Counts per bucket; not synchronised, a scrape may be one observation behind."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus has them."""
        result = []
        cumulated = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            cumulated += count
            result.append((bound, float(cumulated)))
        return result


class TimelineMetrics:
    """The metrics of one timeline; one that is loaded again goes on counting."""

    def __init__(self) -> None:
        self.positions = (0, 0)
        """(commit LSN, flush LSN), replaced as a whole: no scrape sees commit above flush."""
        self.write_bytes = _Histogram(_BYTES)
        self.write_seconds = _Histogram(DURATION_BUCKETS)
        self.flush_seconds = _Histogram(DURATION_BUCKETS)
        self.persist_seconds = _Histogram(DURATION_BUCKETS)

    def observe_write(self, size: int, seconds: float) -> None:
        """WAL bytes written before a flush, and how long that took."""
        self.write_bytes.observe(size)
        self.write_seconds.observe(seconds)

    def observe_flush(self, seconds: float) -> None:
        """Duration of a flush."""
        self.flush_seconds.observe(seconds)

    def observe_persist(self, seconds: float) -> None:
        """Duration of a control file write."""
        self.persist_seconds.observe(seconds)


class SafekeeperMetrics(Collector):
    """All metrics of a safekeeper process."""

    def __init__(self) -> None:
        self.metrics = Metrics("safekeeper")
        self._timelines: dict[TenantTimelineId, TimelineMetrics] = {}
        self.metrics.add_source(self._lsns)
        self.metrics.registry.register(self)

    def timeline(self, timeline_id: TenantTimelineId) -> TimelineMetrics:
        """The metrics of a timeline."""
        return self._timelines.setdefault(timeline_id, TimelineMetrics())

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

    def collect(self) -> Iterable[Metric]:
        """The histograms, for prometheus_client's registry."""
        for name, text in (
            ("write_bytes", "Bytes of WAL per flush"),
            ("write_seconds", "Seconds writing WAL per flush"),
            ("flush_seconds", "Seconds per flush of WAL"),
            ("persist_seconds", "Seconds per write of the control file"),
        ):
            verb, _, unit = name.partition("_")
            subject = "control_file" if verb == "persist" else "wal"
            family = HistogramMetricFamily(
                f"safekeeper_{verb}_{subject}_{unit}", text, labels=_LABELS
            )
            for timeline_id, metrics in list(self._timelines.items()):
                histogram: _Histogram = getattr(metrics, name)
                labels = [str(part) for part in timeline_id]
                family.add_metric(labels, histogram.buckets(), histogram.total)
            yield family
