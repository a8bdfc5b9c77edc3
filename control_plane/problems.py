"""What is wrong with an environment, told from its overview: first what keeps it from its work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from control_plane import membership
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from control_plane.overview import BranchStatus, Overview
from zenith_utils.size import format_size

LAG = 100 * 1024 * 1024
"""Bytes behind from which on it is worth a word; commits wait from 500 MB on."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One line; `down` if something that should run does not."""

    text: str
    down: bool


def problems_of(env: LocalEnv, seen: Overview) -> list[Problem]:
    """All there is to warn of; what is down comes first."""
    found = [*_daemons(env, seen), *_nodes(seen)]
    for branch in seen.branches:
        found += _lags(branch)
    found += [Problem(text, down=False) for text in seen.troubles]
    return sorted(found, key=lambda problem: not problem.down)


def _daemons(env: LocalEnv, seen: Overview) -> Iterator[Problem]:
    if all(server.state == "stopped" for server in seen.daemons):
        yield Problem("nothing runs: zenith start", down=True)
        return
    for server in seen.daemons:
        if server.state == "silent":
            yield Problem(
                f"{server.name} does not answer, process {server.pid} lives: {server.trouble}",
                down=True,
            )
        elif server.state == "stopped":
            yield Problem(_stopped(env, server.name, server.safekeeper_id), down=True)
    yield from _quorum(seen)


def _stopped(env: LocalEnv, name: str, safekeeper_id: int | None) -> str:
    if safekeeper_id is not None:
        try:
            membership.check_disk(env, safekeeper_id)
        except ControlPlaneError:
            return f"{name} has lost its disk: zenith safekeeper replace {safekeeper_id}"
        return f"{name} is down: zenith safekeeper start {safekeeper_id}"
    return f"{name} is down: zenith {name} start"


def _quorum(seen: Overview) -> Iterator[Problem]:
    safekeepers = [server for server in seen.daemons if server.safekeeper_id is not None]
    up = sum(server.state == "running" for server in safekeepers)
    needed = len(safekeepers) // 2 + 1
    if not safekeepers or up == len(safekeepers):
        return
    if up < needed:
        text = f"commits wait: {needed} of {len(safekeepers)} safekeepers are needed, {up} run"
    elif up == needed:
        text = f"commits go on with {up} of {len(safekeepers)} safekeepers: no more may fail"
    else:
        return
    yield Problem(text, down=True)


def _nodes(seen: Overview) -> Iterator[Problem]:
    for node in seen.nodes:
        if node.status == "crashed":
            reason = node.reason.splitlines()[0] if node.reason else "it takes no connections"
            yield Problem(
                f"postgres {node.name} has crashed ({reason}): zenith pg start {node.name}",
                down=True,
            )
        if node.lag is not None and node.lag >= LAG:
            text = f"hot standby {node.name} is {format_size(node.lag)} behind branch {node.branch}"
            yield Problem(text, down=False)


def _lags(branch: BranchStatus) -> Iterator[Problem]:
    name = branch.branch or branch.timeline_id
    if branch.pageserver_lag >= LAG:
        behind = format_size(branch.pageserver_lag)
        yield Problem(f"the pageserver is {behind} behind on branch {name}", down=False)
    for position in branch.safekeepers:
        lag = branch.safekeeper_lag(position)
        if lag >= LAG:
            who = f"safekeeper {position.safekeeper_id}"
            yield Problem(f"{who} is {format_size(lag)} behind on branch {name}", down=False)
