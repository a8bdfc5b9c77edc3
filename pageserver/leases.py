"""LSN leases: promises that pages at an LSN stay readable while somebody uses them.

A running compute reads the blocks it does not have yet at one fixed LSN, and holds a lease on
it. Garbage collection keeps the state at every leased LSN, whatever it removes around it: a compute
that runs for months does not keep the history of months. A lease expires by itself: its holder
renews it in time. Leases outlive a restart of the pageserver, after which they last for their whole
time to live once more.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from pageserver.lease_file import LeaseFile, LeaseFileError, StoredLease
from postgres_ffi.wal_format import normalize_lsn
from zenith_utils.lsn import Lsn

log = logging.getLogger(__name__)

MAX_TTL = 24 * 3600.0


class LeaseGoneError(Exception):
    """The lease does not exist (any more) and cannot be made anew."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One promise for ``ttl`` seconds.

    ``point`` is where its holder reads: no record ends between the LSN and the next start of a
    record. ``expires_at`` is in seconds of the registry's clock.
    """

    lease_id: str
    lsn: Lsn
    point: int
    ttl: float
    expires_at: float


class LeaseRegistry:
    """The leases of one timeline. All methods are thread safe.

    ``check_readable(lsn)`` raises if pages at ``lsn`` are gone; it is called under the lock that
    :meth:`publish_cutoff` holds too, so a lease is either kept by a garbage collection or refused.
    ``points`` is where collections look for LSNs to keep, by any key. ``file`` keeps the leases
    over restarts: a lease is durable before it is promised; without it they are in memory only.
    ``clock`` returns monotonic seconds.
    """

    def __init__(
        self,
        check_readable: Callable[[Lsn], None],
        points: MutableMapping[Any, int],
        *,
        file: LeaseFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._check_readable = check_readable
        self._points = points
        self._clock = clock
        self._file = file
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        self._unknown_until = 0.0
        """Until then there may be leases we do not know of, on any LSN."""
        if file is not None:
            self._load(file)

    def acquire(self, lsn: Lsn, ttl: float) -> Lease:
        """A new lease for ``ttl`` seconds. Raises what ``check_readable`` raises, OSError."""
        with self._lock:
            self._expire()
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
                return self._put(lease_id, known.lsn, ttl)
            assert lsn is not None
            return self._store(lease_id, lsn, ttl)

    def release(self, lease_id: str) -> bool:
        """Ends a lease; False if there was none."""
        with self._lock:
            self._expire()
            if lease_id not in self._leases:
                return False
            self._drop(lease_id)
            self._save(self._leases)
            return True

    def holds(self, lease_id: str) -> bool:
        """Whether there is such a lease."""
        with self._lock:
            self._expire()
            return lease_id in self._leases

    def is_leased(self, lsn: int) -> bool:
        """Whether the state at ``lsn`` is promised to somebody."""
        point = normalize_lsn(lsn)
        with self._lock:
            self._expire()
            return any(lease.point == point for lease in self._leases.values())

    def lsns(self) -> frozenset[Lsn]:
        """The leased LSNs."""
        with self._lock:
            self._expire()
            return frozenset(lease.lsn for lease in self._leases.values())

    def publish_cutoff(self, cutoff: Lsn, publish: Callable[[Lsn], None]) -> None:
        """Calls ``publish(cutoff)`` while no lease can be taken.

        A collection that follows keeps the leases of this moment. Nothing is published as long as
        there may be leases that are not known.
        """
        with self._lock:
            self._expire()
            if self._clock() >= self._unknown_until:
                publish(cutoff)

    def _store(self, lease_id: str, lsn: Lsn, ttl: float) -> Lease:
        self._check_readable(lsn)
        return self._put(lease_id, lsn, ttl)

    def _put(self, lease_id: str, lsn: Lsn, ttl: float) -> Lease:
        known = self._leases.get(lease_id)
        lease = self._new(lease_id, lsn, ttl)
        if known is None or (known.lsn, known.ttl) != (lsn, ttl):
            # If this fails nothing is promised, and what was promised before still is.
            self._save({**self._leases, lease_id: lease})
        self._hold(lease)
        return lease

    def _new(self, lease_id: str, lsn: Lsn, ttl: float) -> Lease:
        return Lease(lease_id, lsn, normalize_lsn(lsn), ttl, self._clock() + ttl)

    def _hold(self, lease: Lease) -> None:
        self._leases[lease.lease_id] = lease
        self._points["lease", lease.lease_id] = lease.point

    def _drop(self, lease_id: str) -> None:
        del self._leases[lease_id]
        del self._points["lease", lease_id]

    def _expire(self) -> None:
        """Forget what has expired; the file may keep it until it is written the next time."""
        now = self._clock()
        for lease_id in [key for key, lease in self._leases.items() if lease.expires_at <= now]:
            self._drop(lease_id)

    def _save(self, leases: Mapping[str, Lease]) -> None:
        if self._file is not None:
            self._file.save(StoredLease(x.lease_id, x.lsn, x.ttl) for x in leases.values())

    def _load(self, file: LeaseFile) -> None:
        try:
            for stored in file.load():
                self._hold(self._new(stored.lease_id, stored.lsn, stored.ttl))
        except (LeaseFileError, OSError) as error:
            # Whoever holds a lease renews it; nothing is collected until all must have done so.
            self._unknown_until = self._clock() + MAX_TTL
            log.error("%s cannot be read, no garbage collection for a day: %s", file, error)
