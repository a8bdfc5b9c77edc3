"""Asking pageservers to connect: a safekeeper knows them only through the computes' messages.

A subscription is a timeline with its pageserver's connection string, which may hold the token that
lets us in. A pageserver itself knows and names that string without it. While no stream of the
timeline runs, the pageserver is asked every period to start one. One connection carries the calls
for many timelines, so a pageserver that is down costs one attempt per period and no more.

A call that gets no answer breaks the connection, and those behind it are not made. These go first
in the next one, a period later; the timeline whose call it was pauses like one that was refused,
and then has its turn behind all others, so that no call of theirs is lost to it again.
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
from zenith_utils.pq_client import PqConnection, PqError, connect_conninfo

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT: Final = 5.0
_PARALLEL_CALLS: Final = 4
# Calls of one connection, which goes on to the next timeline when it has been answered: a timeline
# that is new here waits for no more than these.
_BATCH: Final = 64
# A pageserver that refuses a timeline, or does not answer, is asked again later and later, up to
# this.
_MAX_PAUSE: Final = 30.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of the calls of one connection, which were made in the order given."""

    answered: int
    """Number of timelines at the begin that were answered, whatever the answer."""
    refusals: dict[TenantTimelineId, str] = field(default_factory=dict)
    """The errors of those that were refused."""
    broken: str = ""
    """Why the call of the next timeline was the last one of the connection; "" if none was left."""


Call = Callable[[str, Sequence[TenantTimelineId], tuple[str, int]], Answers]
Report = Callable[[TenantTimelineId, str, int, int], None]
"""Called with a timeline, its pageserver, and the LSNs of Timeline.delivered()."""


def call_pageserver(
    connstr: str,
    timeline_ids: Sequence[TenantTimelineId],
    listen: tuple[str, int],
    report: Report | None = None,
) -> Answers:
    """Ask the pageserver at `connstr` to stream the timelines from us, one after the other.

    It streams from one safekeeper only: the others learn here how far it is, for `report`.
    Raises PqConnectionLost when it cannot be reached, PqError when it refuses the connection,
    ConninfoError, and what `report` raises.
    """
    host, port = listen
    pageserver = without_password(connstr)
    refusals: dict[TenantTimelineId, str] = {}
    with connect_conninfo(connstr, timeout=_CONNECT_TIMEOUT) as conn:
        for number, timeline_id in enumerate(timeline_ids):
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
            except PqError as e:
                if e.severity in ("FATAL", "PANIC"):
                    return Answers(number, refusals, str(e))
                refusals[timeline_id] = str(e)
            except LsnParseError as e:
                refusals[timeline_id] = str(e)
    return Answers(len(timeline_ids), refusals)


def _position(conn: PqConnection, timeline_id: TenantTimelineId) -> tuple[int, int]:
    """Up to where a pageserver has WAL: on its disk, and in its remote storage."""
    tenant, timeline = timeline_id
    rows = conn.simple_query(f"wal_position {tenant} {timeline}", timeout=_CONNECT_TIMEOUT)
    if [len(row) for row in rows] != [2]:
        raise PqError("ERROR", "08P01", f"wal_position is answered with {rows!r}")
    disk, remote = ((field or b"").decode(errors="replace") for field in rows[0])
    return Lsn.parse(disk), Lsn.parse(remote)


@dataclass(slots=True)
class _Subscription:
    connstr: str
    streams: int = 0
    due: float = 0.0
    pause: float = 0.0
    """Seconds to the next call after a refusal or none at all, 0 after any other answer."""
    hung: bool = False
    """Whether the last call broke the connection."""

    @property
    def pageserver(self) -> str:
        """The pageserver, by its connection string without a password."""
        return without_password(self.connstr)


@dataclass(slots=True)
class _Pageserver:
    waiting: dict[TenantTimelineId, _Subscription] = field(default_factory=dict)
    """Subscriptions without a stream: those to be called."""
    calling: bool = False
    resume: float = 0.0
    """No connection before, as the last one failed or broke."""
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
            if streams == 0:
                self._pageservers[connstr].resume = 0.0
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
        """The subscriptions to be called next, those that have waited longest.

        One that has broken a connection comes last, and never two of them: so it costs nobody else
        a call, and each of them gets its turn.
        """

        def due(item: tuple[TenantTimelineId, _Subscription]) -> float:
            return item[1].due

        waiting = pageserver.waiting.items()
        hung = min((item for item in waiting if item[1].hung), key=due, default=None)
        sound = (item for item in waiting if not item[1].hung)
        if hung is None:
            return heapq.nsmallest(_BATCH, sound, key=due)
        return [*heapq.nsmallest(_BATCH - 1, sound, key=due), hung]

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
                    due = [item for item in batch if max(item[1].due, pageserver.resume) <= now]
                    if due:
                        pageserver.calling = True
                        # Now, not at its end: a timeline may be given up while it is called.
                        self._calls += len(due)
                        self._pool.submit(self._call_once, connstr, pageserver, due)
                    elif batch:
                        first = min(subscription.due for _, subscription in batch)
                        left = max(first, pageserver.resume) - now
                        wait = left if wait is None else min(wait, left)
                self._changed.wait(wait)

    def _call_once(
        self,
        connstr: str,
        pageserver: _Pageserver,
        batch: Sequence[tuple[TenantTimelineId, _Subscription]],
    ) -> None:
        error = ""
        answers = Answers(0)
        try:
            timeline_ids = [timeline_id for timeline_id, _ in batch]
            answers = self._call(connstr, timeline_ids, self._listen)
        except (PqError, ConninfoError, OSError) as e:
            error = redact(str(e)) or type(e).__name__
        except Exception as e:
            logger.exception("calling pageserver %s failed", redact(connstr))
            error = repr(e)
        with self._changed:
            self._report(connstr, pageserver, error)
            now = time.monotonic()
            if error or answers.broken:
                # Those that were not reached have waited longest then, and stay due.
                pageserver.resume = now + self._period
            for timeline_id, subscription in batch[: answers.answered]:
                subscription.hung = False
                self._set_due(timeline_id, subscription, answers.refusals.get(timeline_id), now)
            if answers.broken:
                timeline_id, subscription = batch[answers.answered]
                subscription.hung = True
                self._set_due(timeline_id, subscription, answers.broken, now)
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
                "timeline %s: pageserver %s %s callmemaybe: %s",
                timeline_id, redact(subscription.connstr),
                "does not answer" if subscription.hung else "refuses", redact(refusal),
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
