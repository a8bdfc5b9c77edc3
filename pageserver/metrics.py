"""The pageserver's metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pageserver.layered_repository.io_stats import IoStats
from zenith_utils.metrics import DURATION_BUCKETS, IntegerFamily, Metrics

if TYPE_CHECKING:
    from pageserver.layered_repository.block_cache import BlockCache
    from pageserver.layered_repository.resources import StoreResources
    from pageserver.layered_repository.timeline import Timeline
    from pageserver.reconstruct import PageRedo
    from pageserver.timelines import TimelineHandle
    from pageserver.walredo import RedoRequest
    from zenith_utils.ids import TenantId, TimelineId

_QUERY_BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0)
_WORK_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_IO_BUCKETS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
# In the order of the arguments of IoStats.
_IO_OPERATIONS = ("open", "read", "write", "fsync")
_TIMELINE = ("tenant_id", "timeline_id")


class PageserverMetrics(Metrics):
    """Everything that is measured in one pageserver. Times are in seconds."""

    def __init__(self) -> None:
        super().__init__("pageserver")
        self.smgr_query_time = self.histogram(
            "smgr_query_time",
            "Time spent on a page or relation size request, in seconds",
            ("smgr_query_type", *_TIMELINE),
            _QUERY_BUCKETS,
        )
        self.getpage_reconstruct_time = self.histogram(
            "getpage_reconstruct_time",
            "Time to find or rebuild the pages of one request, in seconds",
            _TIMELINE,
            _QUERY_BUCKETS,
        )
        self._storage_time = self.histogram(
            "storage_time",
            "Time spent on the layer files of a timeline, in seconds",
            ("operation", *_TIMELINE),
            _WORK_BUCKETS,
        )
        self._wal_redo_time = self.histogram(
            "wal_redo_time", "Time of one call of WAL redo, in seconds", (), DURATION_BUCKETS
        )
        self.wal_redo_wait_time = self.histogram(
            "wal_redo_wait_time",
            "Time that calls of WAL redo which had to wait for a process did so, in seconds",
            (),
            DURATION_BUCKETS,
        )
        self._wal_records_replayed = self.counter(
            "wal_records_replayed", "Number of WAL records applied to pages"
        )
        self._io_time = self.histogram(
            "io_time",
            "Time of a system call on a layer file, in seconds",
            ("operation", *_TIMELINE),
            _IO_BUCKETS,
        )
        self._io_stats: dict[tuple[TenantId, TimelineId], IoStats] = {}
        self.add_source(self._io_sizes)
        self._add_remote_storage()
        self.count_page_connections: Callable[[], int] = lambda: 0
        """Number of clients of the page service, asked at every scrape."""
        self._wal_receivers = 0
        self._lock = threading.Lock()
        self.add_source(self._connections)

    def wal_receiver_connected(self, change: int) -> None:
        """A WAL receiver has connected (1) or disconnected (-1)."""
        with self._lock:
            self._wal_receivers += change

    @contextmanager
    def storage_time(self, operation: str, timeline: Timeline) -> Iterator[None]:
        """Measures the time of a block that works on a timeline's layers."""
        started = time.perf_counter()
        try:
            yield
        finally:
            tenant_id, timeline_id = timeline.directory.tenant_id, timeline.timeline_id
            labels = self._storage_time.labels(operation, str(tenant_id), str(timeline_id))
            labels.observe(time.perf_counter() - started)

    def io_stats(self, tenant_id: TenantId, timeline_id: TimelineId) -> IoStats:
        """What counts the input and output of a timeline's layer files."""
        stats = self._io_stats.get((tenant_id, timeline_id))
        if stats is None:
            labels = str(tenant_id), str(timeline_id)
            cells = (self._io_time.labels(name, *labels) for name in _IO_OPERATIONS)
            stats = self._io_stats.setdefault((tenant_id, timeline_id), IoStats(*cells))
        return stats

    def _io_sizes(self) -> list[IntegerFamily]:
        family = IntegerFamily(
            "pageserver_io_size",
            "Bytes read from and written to layer files",
            ("operation", *_TIMELINE),
            kind="counter",
        )
        for ids, stats in list(self._io_stats.items()):
            labels = [str(part) for part in ids]
            family.add(stats.bytes_read, "read", *labels)
            family.add(stats.bytes_written, "write", *labels)
        return [family]

    def _add_remote_storage(self) -> None:
        """What there is to say while nothing is uploaded, so that dashboards find the names."""
        self.gauge(
            "remote_storage_remaining_sync_items", "Number of uploads and downloads that wait"
        )
        self.counter(
            "remote_storage_fatal_task_failures", "Number of uploads and downloads given up"
        )
        times = self.histogram(
            "remote_storage_image_sync_time",
            "Time of an upload or download, in seconds",
            ("operation_kind", "status"),
            _WORK_BUCKETS,
        )
        for operation in ("upload", "download"):
            for status in ("success", "failure"):
                times.labels(operation, status)

    def measured_redo(self, redo: PageRedo) -> PageRedo:
        """``redo`` with its calls measured."""
        return _MeasuredRedo(
            redo, self._wal_redo_time.labels().observe, self._wal_records_replayed.inc
        )

    def watch_store(
        self, resources: StoreResources, timelines: Callable[[], Iterable[TimelineHandle]]
    ) -> None:
        """Show the state of the store; `timelines` gives the loaded ones."""
        self.add_source(lambda: _store_families(resources, timelines()))

    def _connections(self) -> list[IntegerFamily]:
        family = IntegerFamily(
            "pageserver_live_connections_count",
            "Number of live network connections",
            ("pageserver_connection_kind",),
        )
        family.add(self.count_page_connections(), "page_service")
        family.add(self._wal_receivers, "wal_receiver")
        return [family]


class _MeasuredRedo:
    def __init__(
        self, redo: PageRedo, observe: Callable[[float], None], count: Callable[..., None]
    ) -> None:
        self._redo = redo
        self._observe = observe
        self._count = count

    def redo(self, requests: Sequence[RedoRequest]) -> list[bytes]:
        started = time.perf_counter()
        pages = self._redo.redo(requests)
        self._observe(time.perf_counter() - started)
        self._count(by=sum(len(request.records) for request in requests))
        return pages


def _store_families(
    resources: StoreResources, timelines: Iterable[TimelineHandle]
) -> list[IntegerFamily]:
    cache, descriptors = resources.page_cache, resources.descriptors
    layers = sum(len(handle.timeline.view.layers) for handle in timelines)
    families = [
        _family("ondisk_layers", "Number of layer files of the loaded timelines", layers),
        _family("open_layers_bytes", "Memory of layers not on disk yet", resources.memory.total),
        _family("open_layer_files", "Number of layer files that are open", len(descriptors)),
        _family("layer_index_bytes", "Memory of the indexes of open files", descriptors.memory),
        _family("page_cache_bytes", "Memory of the cache of rebuilt pages", cache.size),
        _family("page_cache_hits", "Number of pages found in the cache", cache.hits, "counter"),
        _family("page_cache_misses", "Number of pages not found there", cache.misses, "counter"),
    ]
    if descriptors.blocks is not None:
        families += _block_cache_families(descriptors.blocks)
    return families


def _block_cache_families(blocks: BlockCache) -> list[IntegerFamily]:
    return [
        _family("block_cache_bytes", "Memory of the cache of blocks of layer files", blocks.size),
        _family("block_cache_hits", "Number of blocks found in the cache", blocks.hits, "counter"),
        _family("block_cache_misses", "Number of blocks not found there", blocks.misses, "counter"),
    ]


def _family(name: str, help_text: str, value: int, kind: str = "gauge") -> IntegerFamily:
    family = IntegerFamily(f"pageserver_{name}", help_text, kind=kind)
    family.add(value)
    return family
