"""Metrics in the Prometheus text format.

Rendered here and not by prometheus_client: integers (counters, gauges, LSNs) have to be exact and
without an exponent, where that prints floats, which lose the low bits of a 64-bit LSN; its
histograms take a lock and a microsecond per value, and its import a tenth of a daemon's start.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from zenith_utils.histogram import HistogramCell

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
DISK_BLOCK: Final = 512  # unit of ru_inblock and ru_oublock, getrusage(2)

DURATION_BUCKETS: Final = (
    0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30
)  # fmt: skip


class Family(Protocol):
    """A metric with all its label values, as read at one scrape."""

    def render(self) -> str:
        """The lines of this metric."""


@dataclass(slots=True)
class IntegerFamily:
    """A metric whose values are integers, as read at one scrape.

    samples: label values, in the order of `labels`, with the value.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    kind: str = "gauge"
    samples: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def add(self, value: int, *label_values: str) -> None:
        """Add a sample."""
        if len(label_values) != len(self.labels):
            raise ValueError(f"metric {self.name} has the labels {self.labels}")
        self.samples.append((label_values, value))

    def render(self) -> str:
        """The lines of this metric."""
        lines = _head(self.name, self.help, self.kind)
        for values, value in self.samples:
            pairs = _pairs(self.labels, values)
            lines.append(f"{self.name}{{{pairs}}} {value:d}" if pairs else f"{self.name} {value:d}")
        return "\n".join(lines) + "\n"


class IntegerMetric:
    """A counter or gauge that is kept up to date by its owner. Safe to use from any thread."""

    def __init__(self, name: str, help: str, labels: Sequence[str], kind: str) -> None:
        self._family = (name, help, tuple(labels), kind)
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], int] = {}
        if not labels:
            self._values[()] = 0

    def inc(self, *label_values: str, by: int = 1) -> None:
        """Add to a value; negative for gauges going down."""
        with self._lock:
            self._values[label_values] = self._values.get(label_values, 0) + by

    def set(self, value: int, *label_values: str) -> None:
        """Replace a value."""
        with self._lock:
            self._values[label_values] = value

    def remove(self, *label_values: str) -> None:
        """Forget a value, so that it is no longer shown."""
        with self._lock:
            self._values.pop(label_values, None)

    def value(self, *label_values: str) -> int:
        """The value now; 0 if it was never set."""
        with self._lock:
            return self._values.get(label_values, 0)

    def collect(self) -> list[IntegerFamily]:
        """The values for a scrape."""
        family = IntegerFamily(*self._family)
        with self._lock:
            for label_values, value in self._values.items():
                family.add(value, *label_values)
        return [family]


class Histogram:
    """A histogram for each combination of label values; without labels there is just one."""

    def __init__(
        self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> None:
        self.name = name
        self._help = help
        self._labels = tuple(labels)
        self._buckets = tuple(buckets)
        self._cells: dict[tuple[str, ...], HistogramCell] = {}
        if not self._labels:
            self.labels()

    def labels(self, *values: str) -> HistogramCell:
        """The histogram of these label values; keep it where it is hot."""
        cell = self._cells.get(values)
        if cell is None:
            if len(values) != len(self._labels):
                raise ValueError(f"metric {self.name} has the labels {self._labels}")
            cell = self._cells.setdefault(values, HistogramCell(self._buckets))
        return cell

    def render(self) -> str:
        """The lines of this metric."""
        lines = _head(self.name, self._help, "histogram")
        for values, cell in list(self._cells.items()):
            pairs = _pairs(self._labels, values)
            inner = pairs + "," if pairs else ""
            outer = f"{{{pairs}}}" if pairs else ""
            counts, total = cell.snapshot()
            cumulated = 0
            for bound, count in zip((*map(str, cell.bounds), "+Inf"), counts, strict=True):
                cumulated += count
                lines.append(f'{self.name}_bucket{{{inner}le="{bound}"}} {cumulated}')
            lines.append(f"{self.name}_count{outer} {cumulated}")
            lines.append(f"{self.name}_sum{outer} {total!r}")
        return "\n".join(lines) + "\n"


class Metrics:
    """All metrics of a daemon. `prefix` begins their names, as in ``pageserver_maxrss_kb``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._sources: list[Callable[[], Iterable[Family]]] = []
        self._served = self.counter("serve_metrics_count", "Number of times metrics were served")
        self.add_source(self._process_metrics)

    def histogram(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = DURATION_BUCKETS,
    ) -> Histogram:
        """A histogram ``<prefix>_<name>``."""
        histogram = Histogram(f"{self.prefix}_{name}", help, labels, buckets)
        self.add_source(lambda: (histogram,))
        return histogram

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> IntegerMetric:
        """A counter ``<prefix>_<name>``."""
        return self._integer(name, help, labels, "counter")

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> IntegerMetric:
        """A gauge ``<prefix>_<name>``."""
        return self._integer(name, help, labels, "gauge")

    def _integer(self, name: str, help: str, labels: Sequence[str], kind: str) -> IntegerMetric:
        metric = IntegerMetric(f"{self.prefix}_{name}", help, labels, kind)
        self.add_source(metric.collect)
        return metric

    def add_source(self, source: Callable[[], Iterable[Family]]) -> None:
        """Add a function that is called at every scrape; the families keep their order.

        A source that returns several families can read their values under one lock, so that a
        scrape sees them consistent with each other.
        """
        self._sources.append(source)

    def render(self) -> bytes:
        """Everything, in the text format (CONTENT_TYPE)."""
        self._served.inc()
        return "".join(f.render() for source in self._sources for f in source()).encode()

    def _process_metrics(self) -> list[IntegerFamily]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        disk = IntegerFamily(
            f"{self.prefix}_disk_io_bytes",
            "Bytes read from and written to disks by this process",
            ("io_operation",),
        )
        disk.add(usage.ru_inblock * DISK_BLOCK, "read")
        disk.add(usage.ru_oublock * DISK_BLOCK, "write")
        memory = IntegerFamily(
            f"{self.prefix}_maxrss_kb", "Largest resident set size of this process so far, in kB"
        )
        memory.add(usage.ru_maxrss)
        return [disk, memory]


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {_escape_help(help)}", f"# TYPE {name} {kind}"]


def _pairs(labels: Sequence[str], values: Sequence[str]) -> str:
    return ",".join(
        f'{label}="{_escape(text)}"' for label, text in zip(labels, values, strict=True)
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
