"""How far a timeline's WAL has been ingested, and the readers that wait for more of it."""

from __future__ import annotations

import threading
import time

from zenith_utils.lsn import Lsn


class RecordPosition:
    """The LSNs of the last record. Reading takes no lock; one thread at a time advances."""

    __slots__ = ("_changed", "_stopped", "_waiting", "current")

    current: tuple[Lsn, Lsn]
    """(last_record_lsn, prev_record_lsn) of one moment."""

    def __init__(self, last_lsn: int, prev_lsn: int) -> None:
        self.current = (Lsn(last_lsn), Lsn(prev_lsn))
        self._changed = threading.Condition()
        self._waiting = 0
        self._stopped = False

    @property
    def waiting(self) -> int:
        """Number of threads that wait."""
        return self._waiting

    def advance(self, lsn: int, prev_lsn: int) -> None:
        """Publish a new position and wake the waiters."""
        self.current = (Lsn(lsn), Lsn(prev_lsn))
        # A waiter counts itself before it looks at the position: it is seen here, or it sees this.
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def wait(self, lsn: int, timeout: float) -> bool:
        """Wait until the last record ends at `lsn` or later; False after `timeout` or `stop`."""
        if self.current[0] >= lsn:
            return True
        deadline = time.monotonic() + timeout
        with self._changed:
            self._waiting += 1
            try:
                while self.current[0] < lsn and not self._stopped:
                    if not self._changed.wait(deadline - time.monotonic()):
                        break
            finally:
                self._waiting -= 1
        return self.current[0] >= lsn

    def stop(self) -> None:
        """Nothing more will come: end all waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
