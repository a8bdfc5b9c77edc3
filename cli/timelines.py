"""`zenith timeline …`."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import Any

import click

from control_plane.errors import ControlPlaneError
from control_plane.local_env import DEFAULT_BRANCH, LocalEnv
from control_plane.pageserver_http import PageserverHttp
from zenith_utils.ids import TenantId, TimelineId

from .completion import branches as complete_branches
from .context import CliContext, pass_context, say, tenant_option
from .progress import progress
from .tables import json_option, say_json
from .time_travel import at_option, chosen_lsn

_PLACES = (("L", "local"), ("R", "remote"))


@click.group(invoke_without_command=True)
@click.pass_context
def timeline(ctx: click.Context) -> None:
    """Create, branch and list timelines.

    A branch is a name for a timeline. It costs nothing to make, whatever the size of the database.

    \b
    zenith timeline branch --branch-name fix
    zenith timeline list
    """
    if ctx.invoked_subcommand is None:
        raise ControlPlaneError("no tenant subcommand provided")


@timeline.command("create")
@tenant_option
@click.option("--branch-name", help="Name of the new branch.")
@pass_context
def timeline_create(ctx: CliContext, tenant_id: TenantId | None, branch_name: str | None) -> None:
    """Create a timeline of its own: a new, empty database cluster.

    \b
    zenith timeline create --branch-name empty
    """
    tenant_id = ctx.tenant(tenant_id)
    name = _required(branch_name)
    ctx.env.check_branch_is_free(name, tenant_id)
    with progress("creating the timeline"):
        info = PageserverHttp(ctx.env).timeline_create(tenant_id)
    ctx.env.add_branch(name, tenant_id, TimelineId.parse(info["timeline_id"]))
    say(_created(info, tenant_id))


@timeline.command("branch")
@tenant_option
@click.option("--branch-name", help="Name of the new branch.")
@click.option(
    "--ancestor-branch-name",
    default=DEFAULT_BRANCH,
    show_default=True,
    shell_complete=complete_branches,
    help="Branch to begin on.",
)
@click.option("--ancestor-start-lsn", metavar="LSN", help="Where to branch; default: the newest.")
@at_option("Branch at the state of this time")
@pass_context
def timeline_branch(
    ctx: CliContext,
    tenant_id: TenantId | None,
    branch_name: str | None,
    ancestor_branch_name: str,
    ancestor_start_lsn: str | None,
    at: datetime | None,
) -> None:
    """Branch a timeline at its newest state, or at a past LSN or time. Copies nothing.

    The newest state has all commits that were acknowledged before the command began. Should that
    not be known, since too few safekeepers answer or the pageserver gets no WAL, a warning says so.

    \b
    zenith timeline branch --branch-name fix
    zenith timeline branch --branch-name before --ancestor-start-lsn 0/2000028
    zenith timeline branch --branch-name morning --at '2026-11-22 10:00:00+00'
    zenith pg start fix --branch-name fix
    """
    tenant_id = ctx.tenant(tenant_id)
    name = _required(branch_name)
    ctx.env.check_branch_is_free(name, tenant_id)
    ancestor = ctx.env.branch_timeline(ancestor_branch_name, tenant_id)
    lsn = chosen_lsn(
        ctx.env,
        (tenant_id, ancestor),
        ancestor_start_lsn,
        at,
        "--ancestor-start-lsn",
        "Failed to parse ancestor start Lsn from the request",
    )
    if lsn is None:
        _wait_for_newest(ctx.env, tenant_id, ancestor)
    with progress("waiting for the pageserver"):
        info = PageserverHttp(ctx.env).timeline_create(
            tenant_id, ancestor_timeline_id=ancestor, ancestor_start_lsn=lsn
        )
    ctx.env.add_branch(name, tenant_id, TimelineId.parse(info["timeline_id"]))
    say(f"{_created(info, tenant_id)}. Ancestor timeline: '{ancestor_branch_name}'")


def _wait_for_newest(env: LocalEnv, tenant_id: TenantId, timeline_id: TimelineId) -> None:
    """Wait for what a branch of the newest state should have; a warning if it may lack some."""
    from control_plane.time_travel import wait_for_newest

    try:
        with progress("waiting for the pageserver"):
            wait_for_newest(env, tenant_id, timeline_id)
    except ControlPlaneError as e:
        # Also if the pageserver did not answer: it may when it is asked for the branch.
        click.echo(f"Warning: the newest commits may be missing in the branch: {e}", err=True)


@timeline.command("list")
@tenant_option
@json_option
@pass_context
def timeline_list(ctx: CliContext, tenant_id: TenantId | None, as_json: bool) -> None:
    """Draw the tree of a tenant's timelines: where each branch begins, and its id.

    (L) is one that is on the pageserver's disk, (R) one in remote storage, (L+R) in both.

    \b
    zenith timeline list
    zenith timeline list --json | jq -r '.[].branch'
    """
    tenant_id = ctx.tenant(tenant_id)
    infos = PageserverHttp(ctx.env).timeline_list(tenant_id)
    if as_json:
        say_json([_document(ctx.env, tenant_id, info) for info in infos])
        return
    for line in draw_tree(ctx.env, tenant_id, infos):
        say(line)


def _document(env: LocalEnv, tenant_id: TenantId, info: dict[str, Any]) -> dict[str, Any]:
    """A timeline as --json shows it."""
    local = info["local"] or {}
    ancestor = local.get("ancestor_timeline_id")
    return {
        "branch": env.branch_name(tenant_id, TimelineId.parse(info["timeline_id"])),
        "tenant_id": str(tenant_id),
        "timeline_id": info["timeline_id"],
        "ancestor_branch": ancestor and env.branch_name(tenant_id, TimelineId.parse(ancestor)),
        "ancestor_timeline_id": ancestor,
        "ancestor_lsn": local.get("ancestor_lsn"),
        "last_record_lsn": local.get("last_record_lsn"),
        "disk_consistent_lsn": local.get("disk_consistent_lsn"),
        "logical_size": local.get("current_logical_size"),
        "local": bool(info["local"]),
        "remote": bool(info["remote"]),
    }


def draw_tree(env: LocalEnv, tenant_id: TenantId, infos: list[dict[str, Any]]) -> list[str]:
    """The tree of TimelineInfo objects: roots by name, children by timeline id."""
    by_id = {info["timeline_id"]: info for info in infos}
    children: dict[str, list[str]] = defaultdict(list)
    roots = []
    for timeline_id in sorted(by_id):
        ancestor = (by_id[timeline_id]["local"] or {}).get("ancestor_timeline_id")
        if ancestor is None:
            roots.append(timeline_id)
        elif ancestor in by_id:
            children[ancestor].append(timeline_id)
        else:
            raise ControlPlaneError("missing timeline info in the HashMap") from ControlPlaneError(
                f"ancestor {ancestor} of timeline {timeline_id} is not on the pageserver"
            )

    def label(timeline_id: str) -> str:
        name = env.branch_name(tenant_id, TimelineId.parse(timeline_id)) or "_no_name_"
        return f"{name} [{timeline_id}]"

    lines: list[str] = []
    # A timeline, and for each level from the root down to it: was it the last child there?
    todo: list[tuple[str, tuple[bool, ...]]]
    todo = [(root, ()) for root in sorted(roots, key=label, reverse=True)]
    while todo:
        timeline_id, levels = todo.pop()
        info = by_id[timeline_id]
        places = "+".join(place for place, key in _PLACES if info[key])
        prefix = f"({places or 'L'}) "
        if not levels:
            lines.append(prefix + label(timeline_id))
        else:
            padding = "".join("   " if last else "┃  " for last in levels[:-1])
            lsn = (info["local"] or {}).get("ancestor_lsn") or "Unknown Lsn"
            branch = "┗━" if levels[-1] else "┣━"
            lines.append(f"{prefix}{padding}{branch} @{lsn}: {label(timeline_id)}")
        below = children[timeline_id]
        for i in reversed(range(len(below))):
            todo.append((below[i], (*levels, i == len(below) - 1)))
    return lines


def _created(info: dict[str, Any], tenant_id: TenantId) -> str:
    lsn = info["local"]["last_record_lsn"]
    return f"Created timeline '{info['timeline_id']}' at Lsn {lsn} for tenant: {tenant_id}"


def _required(branch_name: str | None) -> str:
    if branch_name is None:
        raise ControlPlaneError("No branch name provided")
    return branch_name
