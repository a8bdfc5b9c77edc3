"""The state of a branch at a time, or now: with all that was acknowledged by then."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from control_plane import http_client
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv, SafekeeperConf
from control_plane.pageserver_http import PageserverHttp
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import INVALID_LSN, Lsn
from zenith_utils.timestamp import timestamp_of

_POLL = 0.02
# Kinds of answers that WAL still to come may change.
_UNSURE = ("future", "nodata")
# A pageserver that gets no WAL for this long although there is some is not catching up. Nobody
# waits that long for a branch of what is there now.
_STALLED_AFTER = 10.0
_STALLED_NOW_AFTER = 1.0
# One that has not said by then what it has counts as one that may have everything.
_TIMEOUT = 5.0


class NewestUnknownError(ControlPlaneError):
    """Commits may have been acknowledged that the pageserver does not have."""


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
    what the safekeepers have acknowledged. Raises ControlPlaneError, also for a time that is in the
    future, before the history that is kept, or before the branch point.
    """
    now = datetime.now(UTC).astimezone(at.tzinfo)
    if at > now:
        raise ControlPlaneError(f"{at} is in the future: it is {now}")
    answer = _ask_until_known(env, tenant_id, timeline_id, at, _STALLED_AFTER)
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


def wait_for_newest(env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId) -> None:
    """Wait until the pageserver has all commits of a timeline acknowledged until now.

    Raises NewestUnknownError; ControlPlaneError if the pageserver cannot be asked.
    """
    # Without safekeepers it is the pageserver that acknowledges.
    if env.safekeepers:
        _ask_until_known(env, tenant_id, timeline_id, datetime.now(UTC), _STALLED_NOW_AFTER)


def _ask_until_known(
    env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId, at: datetime, stalled_after: float
) -> dict[str, Any]:
    """Where a timeline stood at a time, for sure: a later commit is known, or all WAL looked at."""
    pageserver = PageserverHttp(env)

    def ask() -> dict[str, Any]:
        return pageserver.lsn_by_timestamp(tenant_id, timeline_id, timestamp_of(at))

    answer = ask()
    if answer["kind"] not in _UNSURE:
        return answer
    acknowledged = _acknowledged_lsn(env, tenant_id, timeline_id)
    received, deadline = Lsn(0), time.monotonic() + stalled_after
    while answer["kind"] in _UNSURE:
        reached = Lsn.parse(answer["received_lsn"])
        if reached >= acknowledged:
            break
        if reached > received:
            received, deadline = reached, time.monotonic() + stalled_after
        elif time.monotonic() > deadline:
            raise NewestUnknownError(
                f"the pageserver has WAL up to {reached} only and gets no more, the safekeepers"
                f" have acknowledged up to {acknowledged}: see its log; if the branch's compute was"
                " killed, start one, which tells them what is committed; or name an LSN"
            )
        time.sleep(_POLL)
        answer = ask()
    return answer


@dataclass(frozen=True, slots=True)
class _Log:
    """What one safekeeper has of a timeline; as it stands here, nothing."""

    epoch: int = 0
    """Term in which its end was written."""
    epoch_lsn: Lsn = INVALID_LSN
    """Where WAL of that term begins."""
    flush_lsn: Lsn = INVALID_LSN
    established: int = 0


def _acknowledged_lsn(env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId) -> Lsn:
    """Where all WAL lies below that was acknowledged to Postgres until now; 0: none was.

    Safekeepers hear later what is committed, and tell later still. But what was acknowledged is on
    the disks of a majority: what older terms acknowledged lies below the beginning of the newest,
    what the newest did is on the disks of a majority in that term. Raises NewestUnknownError if too
    few answer to know.
    """
    if not env.safekeepers:
        return INVALID_LSN
    size = len(env.safekeepers)
    with ThreadPoolExecutor(size) as pool:
        asked = pool.map(lambda conf: _ask_log(conf, tenant_id, timeline_id), env.safekeepers)
        answers = zip(env.safekeepers, asked, strict=True)
        found = [(conf.instance, log) for conf, log in answers if log is not None]
    instances, logs = {instance for instance, _ in found}, [log for _, log in found]
    _check_majority(len(logs), size, "")
    established = max(log.established for log in logs)
    # Where a generation still matters its majorities may have been others than today's.
    earlier = [g for g in env.earlier_generations if g.number >= established]
    for generation in earlier:
        answered = sum(member.instance in instances for member in generation.members)
        _check_majority(answered, len(generation.members), f" of generation {generation.number}")
    epoch = max(log.epoch for log in logs)
    newest = [log for log in logs if log.epoch == epoch]
    ends = sorted((log.flush_lsn for log in newest), reverse=True)
    # Whoever does not answer may have everything.
    copies = 1 if earlier else size // 2 + 1 - (size - len(logs))
    begin = max(log.epoch_lsn for log in newest)
    return max(begin, ends[copies - 1]) if copies <= len(ends) else begin


def _check_majority(answered: int, size: int, whose: str) -> None:
    if answered < size // 2 + 1:
        who = f"only {answered} of the {size} safekeepers{whose} answer"
        raise NewestUnknownError(
            f"{who if answered else f'no safekeeper{whose} answers'}, so the newest commits are not"
            " known: are they running? ('zenith start')"
        )


def _ask_log(conf: SafekeeperConf, tenant_id: TenantId, timeline_id: TimelineId) -> _Log | None:
    """None if the safekeeper does not answer, or cannot vouch for what it has."""
    address = ("127.0.0.1", conf.http_port)
    try:
        path = f"/v1/timeline/{tenant_id}/{timeline_id}"
        answer = http_client.request(address, "GET", path, timeout=_TIMEOUT)
        if not answer.ok:
            present = http_client.request(address, "GET", "/v1/timeline", timeout=_TIMEOUT)
            ids = (str(tenant_id), str(timeline_id))
            absent = present.ok and ids not in [
                (item["tenant_id"], item["timeline_id"]) for item in present.document
            ]
            return _Log() if absent else None
    except http_client.UnreachableError:
        return None
    status = answer.document
    if status["recovering"]:
        return None
    epoch, flush_lsn = status["acceptor_state"]["epoch"], Lsn.parse(status["flush_lsn"])
    begins = (e["lsn"] for e in status["acceptor_state"]["term_history"] if e["term"] == epoch)
    return _Log(epoch, Lsn(max(begins, default=0)), flush_lsn, status["established"])


def _branch_text(env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId) -> str:
    name = env.branch_name(tenant_id, timeline_id)
    return f"timeline {timeline_id}" if name is None else f"branch '{name}'"
