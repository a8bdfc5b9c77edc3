"""LSN leases: promises that pages at an LSN stay readable while somebody uses them.

A running compute reads the blocks it does not have yet at one fixed LSN, and holds a lease on
it. Garbage collection asks for the lowest leased LSN of a timeline. Leases live in memory and
expire by themselves: a holder renews in time, and renews again after the pageserver restarted.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from zenith_utils.lsn import Lsn

MAX_TTL = 24 * 3600.0


class LeaseGoneError(Exception):
    """The lease does not exist (any more) and cannot be made anew."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One promise. ``expires_at`` is in seconds of the registry's clock."""

    lease_id: str
    lsn: Lsn
    expires_at: float


class LeaseRegistry:
    """The leases of one timeline. All methods are thread safe.

    ``clock`` returns monotonic seconds. ``check_readable(lsn)`` raises if pages at ``lsn`` are
    gone; it is called under the lock that :meth:`publish_cutoff` holds too, so a lease is either
    seen by a garbage collection or refused.
    """

    def __init__(
        self,
        check_readable: Callable[[Lsn], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._check_readable = check_readable
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}

    def acquire(self, lsn: Lsn, ttl: float) -> Lease:
        """A new lease for ``ttl`` seconds. Raises what ``check_readable`` raises."""
        with self._lock:
            return self._store(secrets.token_hex(16), lsn, ttl)

    def renew(self, lease_id: str, ttl: float, lsn: Lsn | None = None) -> Lease:
        """Extends a lease to ``ttl`` seconds from now and moves it to ``lsn`` if that is given.

        An unknown or expired lease is made anew when its ``lsn`` is given and still readable;
        otherwise LeaseGoneError. A lease never moves backwards past what is readable.
        """
        with self._lock:
            self._expire()
            known = self._leases.get(lease_id)
            if known is None and lsn is None:
                raise LeaseGoneError(f"lease {lease_id} is unknown or has expired")
            if known is not None and (lsn is None or lsn == known.lsn):
                # Still protected by the lease itself, whatever the cutoff is by now.
                renewed = Lease(lease_id, known.lsn, self._clock() + ttl)
                self._leases[lease_id] = renewed
                return renewed
            assert lsn is not None
            return self._store(lease_id, lsn, ttl)

    def release(self, lease_id: str) -> bool:
        """Ends a lease; False if there was none."""
        with self._lock:
            self._expire()
            return self._leases.pop(lease_id, None) is not None

    def lowest_lsn(self) -> Lsn | None:
        """The lowest leased LSN, None without leases."""
        with self._lock:
            return self._lowest()

    def publish_cutoff(self, wanted: Lsn, publish: Callable[[Lsn], None]) -> Lsn:
        """Calls ``publish(cutoff)`` with the highest cutoff <= ``wanted`` that keeps every lease.

        No lease can be taken between the choice and the publication. Returns the cutoff.
        """
        with self._lock:
            lowest = self._lowest()
            cutoff = wanted if lowest is None else min(wanted, lowest)
            publish(cutoff)
            return cutoff

    def remaining(self, lease: Lease) -> float:
        """Seconds until ``lease`` expires."""
        return max(0.0, lease.expires_at - self._clock())

    def _lowest(self) -> Lsn | None:
        self._expire()
        return min((lease.lsn for lease in self._leases.values()), default=None)

    def _store(self, lease_id: str, lsn: Lsn, ttl: float) -> Lease:
        self._check_readable(lsn)
        lease = Lease(lease_id, lsn, self._clock() + ttl)
        self._leases[lease_id] = lease
        return lease

    def _expire(self) -> None:
        now = self._clock()
        for lease_id in [key for key, lease in self._leases.items() if lease.expires_at <= now]:
            del self._leases[lease_id]
