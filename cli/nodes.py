"""`zenith pg …`: the compute nodes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from control_plane.compute import Compute, ComputeControlPlane, node_name
from control_plane.errors import ControlPlaneError
from control_plane.local_env import DEFAULT_BRANCH, LocalEnv
from control_plane.pageserver_http import PageserverHttp
from zenith_utils.ids import TenantId, TimelineId

from .completion import branches as complete_branches
from .completion import nodes as complete_nodes
from .context import (
    TIMELINE_ID,
    CliContext,
    pass_context,
    render_error,
    say,
    tenant_option,
)
from .progress import progress
from .tables import json_option, say_json, warn
from .time_travel import at_option, chosen_lsn

_PORT = click.IntRange(1, 65535)
_LSN_HELP = "Open the branch read-only, exactly as it was at this LSN."
_AT_HELP = "Open the branch read-only, exactly as it was at this time"
_STANDBY_HELP = "Read-only and following: what the branch's read-write node commits shows soon."
_BAD_LSN = "Failed to parse Lsn from the request"


@click.group()
def pg() -> None:
    """Create, start, stop and list Postgres nodes.

    A node is a Postgres on a branch. It holds nothing that is not in storage: stop it, destroy it,
    start another one on the same branch, and the data is there.

    \b
    zenith pg start main
    zenith psql main
    zenith pg list
    """


@pg.command("create")
@click.argument("node", required=False)
@tenant_option
@click.option(
    "--branch-name",
    default=DEFAULT_BRANCH,
    show_default=True,
    shell_complete=complete_branches,
    help="Branch it opens.",
)
@click.option("--lsn", metavar="LSN", help=_LSN_HELP)
@at_option(_AT_HELP)
@click.option("--hot-standby", is_flag=True, help=_STANDBY_HELP)
@click.option("--port", type=_PORT, help="Port; default: the next free one from 55432.")
@click.option("--config-only", is_flag=True, hidden=True)
@pass_context
def pg_create(
    ctx: CliContext,
    node: str | None,
    tenant_id: TenantId | None,
    branch_name: str,
    lsn: str | None,
    at: datetime | None,
    hot_standby: bool,
    port: int | None,
    config_only: bool,
) -> None:
    """Create a node for a branch; start it with `zenith pg start`.

    NODE is its name, default: the branch's with `_node`, and `_` for what it must not hold.
    Settings of Postgres go into its postgresql.conf, below pgdatadirs in the environment, before
    the start.

    \b
    zenith pg create main
    zenith pg create test --branch-name fix --port 6000
    zenith pg create morning --at '2026-11-22 10:00:00'
    zenith pg create replica --hot-standby

    A hot standby is fed by the safekeepers. A branch may have several, once a read-write node has
    run on it. While that one is stopped they answer queries and wait for its return.
    """
    _refuse_standby_at_lsn(hot_standby, lsn, at)
    tenant_id = ctx.tenant(tenant_id)
    timeline_id = ctx.env.branch_timeline(branch_name, tenant_id)
    ComputeControlPlane(ctx.env).create(
        tenant_id,
        node or f"{node_name(branch_name)}_node",
        timeline_id,
        chosen_lsn(ctx.env, (tenant_id, timeline_id), lsn, at, "--lsn", _BAD_LSN),
        port,
        hot_standby=hot_standby,
    )


@pg.command("start")
@click.argument("node", required=False, shell_complete=complete_nodes)
@tenant_option
@click.option(
    "--branch-name",
    shell_complete=complete_branches,
    help="Branch of a new node; default: main.",
)
@click.option("--timeline-id", type=TIMELINE_ID, hidden=True)
@click.option("--lsn", metavar="LSN", help=_LSN_HELP)
@at_option(_AT_HELP)
@click.option("--hot-standby", is_flag=True, help=_STANDBY_HELP)
@click.option("--port", type=_PORT, help="Port of a new node; default: the next free one.")
@pass_context
def pg_start(
    ctx: CliContext,
    node: str | None,
    tenant_id: TenantId | None,
    branch_name: str | None,
    timeline_id: TimelineId | None,
    lsn: str | None,
    at: datetime | None,
    hot_standby: bool,
    port: int | None,
) -> None:
    """Start a node; one that does not exist is created first.

    The options are those of a new node: an existing one starts as it was created.

    \b
    zenith pg start main
    zenith pg start test --branch-name fix
    zenith pg start past --branch-name main --lsn 0/2000028
    zenith pg start yesterday --branch-name main --at '2026-11-21 10:00:00+00'
    zenith pg start replica --branch-name main --hot-standby
    """
    _refuse_standby_at_lsn(hot_standby, lsn, at)
    tenant_id = ctx.tenant(tenant_id)
    if node is None:
        raise ControlPlaneError("No node name was provided to start")
    plane = ComputeControlPlane(ctx.env)
    compute = plane.get(tenant_id, node)
    if compute is not None:
        say(f"Starting existing postgres {node}...")
        _tell_ignored(compute, branch_name, lsn, at, hot_standby, port)
    else:
        branch_timeline = ctx.env.branch_timeline(branch_name or DEFAULT_BRANCH, tenant_id)
        branch = tenant_id, branch_timeline
        at_lsn = chosen_lsn(ctx.env, branch, lsn, at, "--lsn", _BAD_LSN)
        say(f"Starting new postgres {node} on timeline {branch_timeline} ...")
        compute = plane.create(
            tenant_id, node, branch_timeline, at_lsn, port, hot_standby=hot_standby
        )
    with progress(f"starting postgres {node}"):
        compute.start(say)


@pg.command("stop")
@click.argument("node", required=False, shell_complete=complete_nodes)
@tenant_option
@click.option("--destroy", is_flag=True, help="Stop at once and delete the node.")
@pass_context
def pg_stop(ctx: CliContext, node: str | None, tenant_id: TenantId | None, destroy: bool) -> None:
    """Stop a node. Its data is in storage: no data is lost with a destroyed node.

    \b
    zenith pg stop main
    zenith pg stop test --destroy
    """
    tenant_id = ctx.tenant(tenant_id)
    if node is None:
        raise ControlPlaneError("No node name was provided to stop")
    compute = ComputeControlPlane(ctx.env).get(tenant_id, node)
    if compute is None:
        raise ControlPlaneError(f"postgres {node} is not found: see 'zenith pg list'")
    with progress(f"stopping postgres {node}"):
        compute.stop(say, destroy=destroy)


@pg.command("list")
@tenant_option
@json_option
@pass_context
def pg_list(ctx: CliContext, tenant_id: TenantId | None, as_json: bool) -> None:
    """List the nodes of a tenant. LSN is how far the pageserver has the WAL of the branch.

    \b
    running   takes connections      starting, stopping   on its way
    stopped   start it again         crashed              start it again: no commit is lost

    A node that follows its branch shows as (hot standby) behind that.
    Why a node has crashed is told on the standard error.

    \b
    zenith pg list
    zenith pg list --json | jq -r '.[] | select(.status == "running").port'
    """
    tenant_id = ctx.tenant(tenant_id)
    lsns = _last_record_lsns(ctx.env, tenant_id)
    nodes = ComputeControlPlane(ctx.env).nodes(tenant_id, _report)
    if as_json:
        say_json([_document(node, lsns.get(str(node.timeline_id))) for node in nodes])
        return
    say("NODE\tADDRESS\tTIMELINE\tBRANCH NAME\tLSN\t\tSTATUS")
    for node in nodes:
        branch = ctx.env.branch_name(tenant_id, node.timeline_id) or "?"
        lsn = lsns.get(str(node.timeline_id), "?")
        address = f"127.0.0.1:{node.port}"
        status = node.status() + (" (hot standby)" if node.hot_standby else "")
        say(f"{node.name}\t{address}\t{node.timeline_id}\t{branch}\t{lsn}\t\t{status}")
        reason = node.why_crashed()
        if reason:
            warn(f"{node.name}: {reason.splitlines()[0]}")


def _document(node: Compute, last_record_lsn: str | None) -> dict[str, Any]:
    """A node as --json shows it."""
    return {
        "node": node.name,
        "tenant_id": str(node.tenant_id),
        "timeline_id": str(node.timeline_id),
        "branch": node.env.branch_name(node.tenant_id, node.timeline_id),
        "host": "127.0.0.1",
        "port": node.port,
        "kind": node.kind,
        "at_lsn": None if node.lsn is None else str(node.lsn),
        "last_record_lsn": last_record_lsn,
        "status": node.status(),
        "reason": node.why_crashed() or None,
    }


def _tell_ignored(
    node: Compute,
    branch_name: str | None,
    lsn: str | None,
    at: datetime | None,
    hot_standby: bool,
    port: int | None,
) -> None:
    """Say which options mean nothing, because the node is there already and differs from them."""
    env = node.env
    branch = env.branch_name(node.tenant_id, node.timeline_id)
    different = {
        "--branch-name": branch_name not in (None, branch),
        "--lsn": lsn not in (None, str(node.lsn)),
        "--at": at is not None,
        "--hot-standby": hot_standby and not node.hot_standby,
        "--port": port not in (None, node.port),
    }
    ignored = [option for option, differs in different.items() if differs]
    if ignored:
        warn(
            f"{', '.join(ignored)} ignored: {node.name} exists, and starts as it was created. "
            f"For another one choose another name, or first: zenith pg stop {node.name} --destroy"
        )


def _refuse_standby_at_lsn(hot_standby: bool, lsn: str | None, at: datetime | None) -> None:
    if hot_standby and (lsn is not None or at is not None):
        raise click.UsageError(
            "--hot-standby follows the branch, --lsn and --at stay at one state: choose one"
        )


def _report(error: ControlPlaneError) -> None:
    warn(render_error(error))


def _last_record_lsns(env: LocalEnv, tenant_id: TenantId) -> dict[str, str]:
    try:
        infos = PageserverHttp(env).timeline_list(tenant_id)
    except ControlPlaneError as e:
        warn(f"Failed to load timeline info: {e}")
        return {}
    return {i["timeline_id"]: i["local"]["last_record_lsn"] for i in infos if i.get("local")}
