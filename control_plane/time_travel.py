"""From a time to an LSN of a branch, with everything that stands in the way said in full."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from control_plane import http_client
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from control_plane.pageserver_http import TIMEOUT, PageserverHttp
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.timestamp import timestamp_of

_POLL = 0.02
# A pageserver that gets no WAL for this long although there is some is not catching up.
_STALLED_AFTER = 10.0


@dataclass(frozen=True, slots=True)
class Moment:
    """The state of a branch at a time: its LSN, and when the newest transaction in it ended."""

    lsn: Lsn
    commit_time: datetime


def find_moment(
    env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId, at: datetime
) -> Moment:
    """The state of a timeline at a time; all commits acknowledged by then are included.

    A time behind the last commit means the newest state. Waits while the pageserver catches up with
    what the safekeepers have committed. Raises ControlPlaneError, also for a time that is in the
    future, before the history that is kept, or before the branch point.
    """
    now = datetime.now(UTC).astimezone(at.tzinfo)
    if at > now:
        raise ControlPlaneError(f"{at} is in the future: it is {now}")
    pageserver = PageserverHttp(env)
    committed = _committed_lsn(env, tenant_id, timeline_id)

    def ask() -> dict[str, Any]:
        return pageserver.lsn_by_timestamp(tenant_id, timeline_id, timestamp_of(at))

    answer = _ask_until_known(ask, committed)
    kind, text = answer["kind"], answer["commit_time"]
    branch = _branch_text(env, tenant_id, timeline_id)
    if kind == "nodata":
        raise ControlPlaneError(
            f"{branch} has no commits yet, so no time leads anywhere: its one state is the newest"
        )
    commit_time = datetime.fromisoformat(text).astimezone(at.tzinfo)
    if kind != "past":
        return Moment(Lsn.parse(answer["lsn"]), commit_time)
    ancestor = answer["ancestor_timeline_id"]
    if ancestor is None:
        raise ControlPlaneError(
            f"{at} is before the history of {branch}: the oldest time that can be had is"
            f" {commit_time}"
        )
    origin = _branch_text(env, tenant_id, TimelineId.parse(ancestor))
    raise ControlPlaneError(
        f"{at} is before the point where {branch} was branched off: the oldest time that can be had"
        f" of it is {commit_time}, what was before is in the history of its ancestor, {origin}"
    )


def _ask_until_known(ask: Callable[[], dict[str, Any]], committed: Lsn) -> dict[str, Any]:
    """The answer for sure: without it, a later commit that is known, or all WAL looked at."""
    answer = ask()
    received, deadline = Lsn(0), time.monotonic() + _STALLED_AFTER
    while answer["kind"] in ("future", "nodata"):
        reached = Lsn.parse(answer["received_lsn"])
        if reached >= committed:
            break
        if reached > received:
            received, deadline = reached, time.monotonic() + _STALLED_AFTER
        elif time.monotonic() > deadline:
            raise ControlPlaneError(
                f"the pageserver has WAL up to {reached} only and gets no more, the safekeepers"
                f" have committed up to {committed}: see its log, or name an LSN instead of a time"
            )
        time.sleep(_POLL)
        answer = ask()
    return answer


def _committed_lsn(env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId) -> Lsn:
    """Up to where the safekeepers know WAL of the timeline to be committed; 0: none of it."""
    answered = not env.safekeepers
    committed = Lsn(0)
    for conf in env.safekeepers:
        address = ("127.0.0.1", conf.http_port)
        path = f"/v1/timeline/{tenant_id}/{timeline_id}"
        try:
            answer = http_client.request(address, "GET", path, timeout=TIMEOUT)
        except http_client.UnreachableError:
            continue
        answered = True
        if answer.ok:  # else nothing was ever written to the timeline
            committed = max(committed, Lsn.parse(answer.document["commit_lsn"]))
    if not answered:
        raise ControlPlaneError(
            "no safekeeper answers, so the newest commits are not known: are they running?"
            " ('zenith start')"
        )
    return committed


def _branch_text(env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId) -> str:
    name = env.branch_name(tenant_id, timeline_id)
    return f"timeline {timeline_id}" if name is None else f"branch '{name}'"
