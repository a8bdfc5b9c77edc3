"""Asking pageservers to connect: a safekeeper knows them only through the computes' messages.

A subscription is a timeline with its pageserver's connection string, which may hold the token that
lets us in. A pageserver itself knows and names that string without it. While no stream of the
timeline runs, the pageserver is asked every period to start one. One connection carries the calls
for many timelines, so a pageserver that is down costs one attempt per period and no more.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from zenith_utils.conninfo import ConninfoError, redact, without_password
from zenith_utils.ids import TenantTimelineId
from zenith_utils.lsn import Lsn, LsnParseError
from zenith_utils.pq_client import PqConnection, PqConnectionLost, PqError, connect_conninfo

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT: Final = 5.0
_PARALLEL_CALLS: Final = 4
# Calls of one connection, which goes on to the next timeline when it has been answered: a timeline
# that is new here waits for no more than these.
_BATCH: Final = 64
# A pageserver that answers and refuses a timeline is asked again later and later, up to this.
_MAX_PAUSE: Final = 30.0

Refusals = dict[TenantTimelineId, str]
Call = Callable[[str, Sequence[TenantTimelineId], tuple[str, int]], Refusals]
Report = Callable[[TenantTimelineId, str, int, int], None]
"""Called with a timeline, its pageserver, and the LSNs of Timeline.delivered()."""


def call_pageserver(
    connstr: str,
    timeline_ids: Sequence[TenantTimelineId],
    listen: tuple[str, int],
    report: Report | None = None,
) -> Refusals:
    """Ask the pageserver at `connstr` to stream the timelines from us.

    It streams from one safekeeper only: the others learn here how far it is, for `report`.
    Returns its errors by timeline. Raises PqConnectionLost when it cannot be reached or leaves,
    PqError when it refuses the connection, ConninfoError.
    """
    host, port = listen
    pageserver = without_password(connstr)
    refusals: Refusals = {}
    with connect_conninfo(connstr, timeout=_CONNECT_TIMEOUT) as conn:
        for timeline_id in timeline_ids:
            tenant, timeline = timeline_id
            back = (
                f"host={host} port={port} options='-c ztimelineid={timeline} ztenantid={tenant} "
                f"pageserver_connstr={pageserver}'"
            )
            try:
                conn.simple_query(
                    f"callmemaybe {tenant} {timeline} {back}", timeout=_CONNECT_TIMEOUT
                )
                if report is not None:
                    report(timeline_id, pageserver, *_position(conn, timeline_id))
            except PqConnectionLost:
                raise
            except (PqError, LsnParseError) as e:
                refusals[timeline_id] = str(e)
    return refusals


def _position(conn: PqConnection, timeline_id: TenantTimelineId) -> tuple[int, int]:
    """Up to where a pageserver has WAL: on its disk, and in its remote storage."""
    tenant, timeline = timeline_id
    rows = conn.simple_query(f"wal_position {tenant} {timeline}", timeout=_CONNECT_TIMEOUT)
    disk, remote = ((field or b"").decode(errors="replace") for field in rows[0])
    return Lsn.parse(disk), Lsn.parse(remote)


@dataclass(slots=True)
class _Subscription:
    connstr: str
    streams: int = 0
    due: float = 0.0
    pause: float = 0.0
    """Seconds to the next call after a refusal, 0 after any other answer."""

    @property
    def pageserver(self) -> str:
        """The pageserver, by its connection string without a password."""
        return without_password(self.connstr)


@dataclass(slots=True)
class _Pageserver:
    waiting: dict[TenantTimelineId, _Subscription] = field(default_factory=dict)
    """Subscriptions without a stream: those to be called."""
    calling: bool = False
    error: str = ""
    """Why it could not be reached last time."""


class CallMeMaybe:
    """Keeps the subscriptions and calls from threads of its own."""

    def __init__(
        self, listen: tuple[str, int], period: float, call: Call = call_pageserver
    ) -> None:
        """`listen` is our WAL service's address, `period` in seconds."""
        self._listen = listen
        self._period = period
        self._call = call
        self._subscriptions: dict[TenantTimelineId, _Subscription] = {}
        self._pageservers: dict[str, _Pageserver] = {}
        self._changed = threading.Condition()
        self._calls = 0
        self._stopping = False
        self._pool = ThreadPoolExecutor(_PARALLEL_CALLS, thread_name_prefix="callmemaybe")
        self._thread = threading.Thread(target=self._run, name="callmemaybe", daemon=True)

    @property
    def subscriptions(self) -> int:
        """Number of timelines whose pageserver has a stream or is called."""
        return len(self._subscriptions)

    @property
    def calls(self) -> int:
        """Number of calls begun so far, one per timeline and attempt."""
        return self._calls

    def start(self) -> None:
        """Start calling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; calls in progress end on their own."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def subscribe(self, timeline_id: TenantTimelineId, connstr: str) -> None:
        """Call this pageserver, at once and then periodically; replaces an earlier one."""
        with self._changed:
            known = self._remove(timeline_id)
            same = known is not None and known.pageserver == without_password(connstr)
            streams = known.streams if known is not None and same else 0
            subscription = _Subscription(connstr, streams)
            self._subscriptions[timeline_id] = subscription
            self._schedule(timeline_id, subscription)
        logger.info("timeline %s: calling pageserver %s", timeline_id, redact(connstr))

    def unsubscribe(
        self, timeline_id: TenantTimelineId, pageserver: str, *, unless: Callable[[], bool]
    ) -> None:
        """Stop calling, unless the timeline has moved to another pageserver meanwhile.

        A compute connects first and subscribes then, so `unless` it is connected now its
        subscription is still to come.
        """
        with self._changed:
            known = self._subscriptions.get(timeline_id)
            if known is not None and known.pageserver == pageserver and not unless():
                self._remove(timeline_id)

    def stream_started(self, timeline_id: TenantTimelineId, pageserver: str) -> None:
        """The pageserver has connected: no calls while it stays."""
        with self._changed:
            known = self._subscriptions.get(timeline_id)
            if known is not None and known.pageserver == pageserver:
                known.streams += 1
                self._unschedule(timeline_id, known.connstr)

    def stream_ended(self, timeline_id: TenantTimelineId, pageserver: str) -> None:
        """The pageserver has left: call it again."""
        with self._changed:
            known = self._subscriptions.get(timeline_id)
            if known is not None and known.pageserver == pageserver:
                known.streams = max(0, known.streams - 1)
                known.due = time.monotonic() + self._period
                self._schedule(timeline_id, known)

    # ---- with the lock

    def _remove(self, timeline_id: TenantTimelineId) -> _Subscription | None:
        known = self._subscriptions.pop(timeline_id, None)
        if known is not None:
            self._unschedule(timeline_id, known.connstr)
        return known

    def _schedule(self, timeline_id: TenantTimelineId, subscription: _Subscription) -> None:
        if subscription.streams == 0:
            pageserver = self._pageservers.setdefault(subscription.connstr, _Pageserver())
            pageserver.waiting[timeline_id] = subscription
            self._changed.notify_all()

    def _unschedule(self, timeline_id: TenantTimelineId, connstr: str) -> None:
        pageserver = self._pageservers.get(connstr)
        if pageserver is not None:
            pageserver.waiting.pop(timeline_id, None)
            if not pageserver.waiting and not pageserver.calling:
                del self._pageservers[connstr]

    def _next_batch(self, pageserver: _Pageserver) -> list[tuple[TenantTimelineId, _Subscription]]:
        """The subscriptions to be called next, those that have waited longest."""
        return heapq.nsmallest(_BATCH, pageserver.waiting.items(), key=lambda item: item[1].due)

    # ---- the threads

    def _run(self) -> None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                wait: float | None = None
                for connstr, pageserver in self._pageservers.items():
                    if pageserver.calling:
                        continue
                    batch = self._next_batch(pageserver)
                    due = [item for item in batch if item[1].due <= now]
                    if due:
                        pageserver.calling = True
                        # Now, not at its end: a timeline may be given up while it is called.
                        self._calls += len(due)
                        self._pool.submit(self._call_once, connstr, pageserver, due)
                    elif batch:
                        left = batch[0][1].due - now
                        wait = left if wait is None else min(wait, left)
                self._changed.wait(wait)

    def _call_once(
        self,
        connstr: str,
        pageserver: _Pageserver,
        batch: Sequence[tuple[TenantTimelineId, _Subscription]],
    ) -> None:
        error = ""
        refusals: Refusals = {}
        try:
            timeline_ids = [timeline_id for timeline_id, _ in batch]
            refusals = self._call(connstr, timeline_ids, self._listen)
        except (PqError, ConninfoError, OSError) as e:
            error = redact(str(e)) or type(e).__name__
        except Exception as e:
            logger.exception("calling pageserver %s failed", redact(connstr))
            error = repr(e)
        with self._changed:
            self._report(connstr, pageserver, error)
            now = time.monotonic()
            if error:
                # Nobody there: none of its timelines needs another attempt before a period is over.
                for subscription in pageserver.waiting.values():
                    subscription.due = max(subscription.due, now + self._period)
            for timeline_id, subscription in batch:
                refusal = refusals.get(timeline_id)
                self._set_due(timeline_id, subscription, refusal, now)
            pageserver.calling = False
            if not pageserver.waiting:
                del self._pageservers[connstr]
            self._changed.notify_all()

    def _set_due(
        self,
        timeline_id: TenantTimelineId,
        subscription: _Subscription,
        refusal: str | None,
        now: float,
    ) -> None:
        if refusal is None:
            subscription.pause = 0.0
            subscription.due = now + self._period
            return
        if not subscription.pause:
            logger.warning(
                "timeline %s: pageserver %s refuses callmemaybe: %s",
                timeline_id, redact(subscription.connstr), redact(refusal),
            )  # fmt: skip
        subscription.pause = min(max(subscription.pause * 2, self._period), _MAX_PAUSE)
        subscription.due = now + subscription.pause

    def _report(self, connstr: str, pageserver: _Pageserver, error: str) -> None:
        """Log that a pageserver cannot be reached, or can again; once, not at every attempt."""
        if error == pageserver.error:
            return
        if error:
            logger.warning("callmemaybe to %s failed: %s", redact(connstr), error)
        else:
            logger.info("callmemaybe to %s succeeds again", redact(connstr))
        pageserver.error = error
