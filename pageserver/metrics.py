"""The pageserver's metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable

from zenith_utils.metrics import IntegerFamily, Metrics

_QUERY_BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0)


class PageserverMetrics(Metrics):
    """Everything that is measured in one pageserver."""

    def __init__(self) -> None:
        super().__init__("pageserver")
        self.smgr_query_time = self.histogram(
            "smgr_query_time",
            "Time spent on a page or relation size request, in seconds",
            ("smgr_query_type", "tenant_id", "timeline_id"),
            _QUERY_BUCKETS,
        )
        self.count_page_connections: Callable[[], int] = lambda: 0
        """Number of clients of the page service, asked at every scrape."""
        self._wal_receivers = 0
        self._lock = threading.Lock()
        self.add_source(self._connections)

    def wal_receiver_connected(self, change: int) -> None:
        """A WAL receiver has connected (1) or disconnected (-1)."""
        with self._lock:
            self._wal_receivers += change

    def _connections(self) -> list[IntegerFamily]:
        family = IntegerFamily(
            "pageserver_live_connections_count",
            "Number of live network connections",
            ("pageserver_connection_kind",),
        )
        family.add(self.count_page_connections(), "page_service")
        family.add(self._wal_receivers, "wal_receiver")
        return [family]
