"""Whether commits on a compute wait until their WAL is durable in the pageserver.

A compute without safekeepers has the pageserver as its synchronous standby. Its sessions wait for
the written position by default, but one with ``synchronous_commit = on`` waits for the flushed one,
which only a flush of the open layer advances. The replication protocol does not tell who waits for
what, so while WAL arrives the compute is asked in SQL.
"""

from __future__ import annotations

import logging
from typing import Final

from pageserver.wal_source import WalSource
from zenith_utils.pq_client import PqConnection, PqError

log = logging.getLogger(__name__)

PROBE_PERIOD: Final = 0.1
# A commit begins to wait a moment after its WAL was sent. With nobody found waiting for this long
# after the last WAL, nobody will be before there is more.
QUIET_AFTER: Final = 2.0

_TIMEOUT: Final = 2.0
# Whoever waits for the written position only has been answered long before.
_MIN_WAIT: Final = "50 ms"
_QUERY: Final = (
    "SELECT 1 FROM pg_catalog.pg_stat_activity WHERE wait_event = 'SyncRep' AND"
    " pg_catalog.clock_timestamp() - coalesce(query_start, backend_start)"
    f" > pg_catalog.interval '{_MIN_WAIT}' LIMIT 1"
)


class CommitWaiters:
    """Asks one compute; used by the thread that receives its WAL. Times are monotonic seconds."""

    def __init__(self, source: WalSource) -> None:
        self._source = source
        self._connection: PqConnection | None = None
        self._next_probe = 0.0
        self._wal_arrived = float("-inf")
        self._failed = False

    @property
    def watching(self) -> bool:
        """Whether somebody may wait."""
        return self._wal_arrived != float("-inf")

    def wal_arrived(self, now: float) -> None:
        """More WAL is here, and may be waited for."""
        if not self.watching:
            self._next_probe = now + PROBE_PERIOD
        self._wal_arrived = now

    def due(self, now: float) -> bool:
        """Whether it is time to call present()."""
        return self.watching and now >= self._next_probe

    def present(self, now: float, *, unflushed: bool) -> bool:
        """Whether a commit waits for durability; without `unflushed` WAL none can.

        If the compute cannot be asked somebody is assumed to wait: too many flushes are the lesser
        evil.
        """
        self._next_probe = now + PROBE_PERIOD
        waiting = unflushed and self._ask()
        if not waiting and now - self._wal_arrived > QUIET_AFTER:
            self.close()
        return waiting

    def close(self) -> None:
        """Stop watching until more WAL arrives, and close the connection."""
        self._wal_arrived = float("-inf")
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self) -> bool:
        try:
            if self._connection is None:
                self._connection = self._source.connect(_TIMEOUT, replication=False)
            rows = self._connection.simple_query(_QUERY, timeout=_TIMEOUT)
        except PqError as error:
            if not self._failed:
                log.warning("%s: cannot ask who waits for commits: %s", self._source, error)
            self._failed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            # Not again at once: the attempt itself may have taken its time.
            self._next_probe += 1.0
            return True
        self._failed = False
        return bool(rows)
