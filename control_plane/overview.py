"""The state of a whole local environment, collected from its daemons, computes and files."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from compute_tools.spec import address_text
from control_plane import daemons, http_client
from control_plane.compute import SUPERUSER, Compute, ComputeControlPlane
from control_plane.daemons import Daemon
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from control_plane.pageserver_http import PageserverHttp
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn

_TIMEOUT = 3.0
_REQUESTS_AT_ONCE = 8

Key = tuple[str, str]
"""Tenant and timeline, in hex."""


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """A daemon: `state` is running, stopped, or silent: its process lives and does not answer."""

    name: str
    safekeeper_id: int | None
    state: str
    pid: int | None
    pg_address: str
    http_address: str
    trouble: str
    """What its service says instead of an answer; empty if it answers, or does not run."""


@dataclass(frozen=True, slots=True)
class SafekeeperPosition:
    """How far a safekeeper has a branch; both None if it has nothing of it, or is not there."""

    safekeeper_id: int
    flush_lsn: Lsn | None
    commit_lsn: Lsn | None


@dataclass(frozen=True, slots=True)
class BranchStatus:
    """A timeline of the pageserver. `size` in bytes; LSNs are None where they are not known."""

    tenant_id: str
    timeline_id: str
    branch: str | None
    ancestor: str | None
    ancestor_lsn: str | None
    size: int | None
    last_record_lsn: Lsn | None
    safekeepers: tuple[SafekeeperPosition, ...]

    @property
    def commit_lsn(self) -> Lsn | None:
        """The highest commit LSN that a safekeeper tells; None without WAL on any."""
        return max((s.commit_lsn for s in self.safekeepers if s.commit_lsn), default=None)

    @property
    def pageserver_lag(self) -> int:
        """Bytes of committed WAL that the pageserver does not have."""
        return _distance(self.commit_lsn, self.last_record_lsn)

    def safekeeper_lag(self, position: SafekeeperPosition) -> int:
        """Bytes of WAL that a safekeeper lacks against the furthest one."""
        furthest = max((s.flush_lsn for s in self.safekeepers if s.flush_lsn), default=None)
        return _distance(furthest, position.flush_lsn)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A compute. `lag` is how many bytes behind its branch a hot standby is, None if not known."""

    name: str
    tenant_id: str
    branch: str | None
    kind: str
    address: str
    status: str
    reason: str
    lag: int | None


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything there is; `tenants` are pairs of id and state."""

    daemons: tuple[DaemonStatus, ...]
    tenants: tuple[tuple[str, str], ...]
    branches: tuple[BranchStatus, ...]
    nodes: tuple[NodeStatus, ...]
    troubles: tuple[str, ...]
    """What could not be found out, and what runs though it should not."""


def collect(env: LocalEnv) -> Overview:
    """Ask everybody. Whoever does not answer is shown as such: nothing is raised for it."""
    troubles: list[str] = []
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        servers = [daemons.pageserver(env)]
        servers += [daemons.safekeeper(env, conf.id) for conf in env.safekeepers]
        ids = [None, *(conf.id for conf in env.safekeepers)]
        found = tuple(pool.map(_daemon_status, servers, ids))
        troubles += [
            f"safekeeper {node_id} was removed and still runs: zenith safekeeper stop {node_id}"
            for node_id in daemons.removed_safekeepers(env)
        ]
        up = found[0].state == "running"
        tenants, infos = _pageserver(env, troubles) if up else ([], [])
        positions = _safekeeper_positions(env, found, pool, troubles)
        branches = tuple(sorted((_branch(env, i, positions) for i in infos), key=_by_name))
        commit = {(b.tenant_id, b.timeline_id): b.commit_lsn for b in branches}
        computes = list(_computes(env, troubles))
        nodes = tuple(pool.map(lambda node: _node(node, commit), computes))
    return Overview(found, tuple(tenants), branches, nodes, tuple(troubles))


def _daemon_status(daemon: Daemon, safekeeper_id: int | None) -> DaemonStatus:
    pid, trouble, state = daemon.running_pid(), "", "stopped"
    if pid is not None:
        try:
            answer = http_client.request(daemon.http_address, "GET", "/v1/status", timeout=_TIMEOUT)
            trouble = "" if answer.ok else answer.error
        except http_client.UnreachableError as e:
            trouble = str(e)
        state = "silent" if trouble else "running"
    return DaemonStatus(
        name=daemon.title.lower(),
        safekeeper_id=safekeeper_id,
        state=state,
        pid=pid,
        pg_address=address_text(*daemon.pg_address),
        http_address=address_text(*daemon.http_address),
        trouble=trouble,
    )


def _pageserver(
    env: LocalEnv, troubles: list[str]
) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Tenants, and the timelines of all of them."""
    client = PageserverHttp(env)
    tenants: list[tuple[str, str]] = []
    infos: list[dict[str, Any]] = []
    try:
        tenants = sorted((str(t["id"]), str(t["state"])) for t in client.tenant_list())
    except ControlPlaneError as e:
        troubles.append(f"the tenants cannot be listed: {e}")
    for tenant_id, _ in tenants:
        try:
            infos += client.timeline_list(TenantId.parse(tenant_id))
        except (ControlPlaneError, IdParseError) as e:
            troubles.append(f"the timelines of tenant {tenant_id} cannot be listed: {e}")
    return tenants, infos


def _safekeeper_positions(
    env: LocalEnv,
    found: Iterable[DaemonStatus],
    pool: ThreadPoolExecutor,
    troubles: list[str],
) -> dict[Key, dict[int, SafekeeperPosition]]:
    """Positions by timeline and safekeeper, of those that run."""
    positions: dict[Key, dict[int, SafekeeperPosition]] = {}
    for server in found:
        if server.safekeeper_id is None or server.state != "running":
            continue
        address = daemons.safekeeper(env, server.safekeeper_id).http_address
        try:
            listed = _get(address, "/v1/timeline")
            paths = [f"/v1/timeline/{t['tenant_id']}/{t['timeline_id']}" for t in listed]
            # One that is being recovered may answer with an error meanwhile.
            for info in pool.map(lambda path, at=address: _get(at, path), paths):
                known = positions.setdefault((info["tenant_id"], info["timeline_id"]), {})
                known[server.safekeeper_id] = SafekeeperPosition(
                    server.safekeeper_id,
                    Lsn.parse(info["flush_lsn"]),
                    Lsn.parse(info["commit_lsn"]),
                )
        except (ControlPlaneError, KeyError, TypeError, ValueError) as e:
            troubles.append(f"{server.name} does not tell how far it is: {e}")
    return positions


def _get(address: tuple[str, int], path: str) -> Any:
    answer = http_client.request(address, "GET", path, timeout=_TIMEOUT)
    if not answer.ok:
        raise ControlPlaneError(answer.error)
    return answer.document


def _branch(
    env: LocalEnv, info: dict[str, Any], positions: dict[Key, dict[int, SafekeeperPosition]]
) -> BranchStatus:
    tenant_id, timeline_id = info["tenant_id"], info["timeline_id"]
    local = info["local"] or {}
    ancestor = local.get("ancestor_timeline_id")
    known = positions.get((tenant_id, timeline_id), {})
    return BranchStatus(
        tenant_id=tenant_id,
        timeline_id=timeline_id,
        branch=_name(env, tenant_id, timeline_id),
        ancestor=None if ancestor is None else _name(env, tenant_id, ancestor) or ancestor,
        ancestor_lsn=local.get("ancestor_lsn"),
        size=local.get("current_logical_size"),
        last_record_lsn=_lsn(local.get("last_record_lsn")),
        safekeepers=tuple(
            known.get(conf.id, SafekeeperPosition(conf.id, None, None)) for conf in env.safekeepers
        )
        if known
        else (),
    )


def _by_name(branch: BranchStatus) -> tuple[str, bool, str, str]:
    return branch.tenant_id, branch.branch is None, branch.branch or "", branch.timeline_id


def _computes(env: LocalEnv, troubles: list[str]) -> Iterable[Compute]:
    def broken(error: ControlPlaneError) -> None:
        troubles.append(f"{error}: {error.__cause__}")

    plane = ComputeControlPlane(env)
    for directory in sorted((env.repo_dir / "pgdatadirs" / "tenants").glob("*")):
        try:
            yield from plane.nodes(TenantId.parse(directory.name), broken)
        except IdParseError:
            continue


def _node(node: Compute, commit: dict[Key, Lsn | None]) -> NodeStatus:
    status = node.status()
    lag = None
    if node.hot_standby and status == "running":
        furthest = commit.get((str(node.tenant_id), str(node.timeline_id)))
        lag = _standby_lag(node, furthest)
    return NodeStatus(
        name=node.name,
        tenant_id=str(node.tenant_id),
        branch=node.env.branch_name(node.tenant_id, node.timeline_id),
        kind=node.kind,
        address=f"127.0.0.1:{node.port}",
        status=status,
        reason=node.why_crashed(),
        lag=lag,
    )


def _standby_lag(node: Compute, commit_lsn: Lsn | None) -> int | None:
    """How far a hot standby is behind what is committed; None if it does not say."""
    import psycopg2

    if commit_lsn is None:
        return None
    try:
        connection = psycopg2.connect(
            host="127.0.0.1", port=node.port, user=SUPERUSER, dbname="postgres", connect_timeout=2
        )
    except psycopg2.Error:
        return None
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = '2s'; SELECT pg_last_wal_replay_lsn()::text")
            row = cursor.fetchone()
            return None if not row or row[0] is None else _distance(commit_lsn, Lsn.parse(row[0]))
    except psycopg2.Error:
        return None
    finally:
        connection.close()


def _name(env: LocalEnv, tenant_id: str, timeline_id: str) -> str | None:
    return env.branch_name(TenantId.parse(tenant_id), TimelineId.parse(timeline_id))


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else Lsn.parse(text)


def _distance(ahead: Lsn | None, behind: Lsn | None) -> int:
    return 0 if ahead is None or behind is None else max(0, int(ahead) - int(behind))
