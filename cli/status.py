"""`zenith status`: the whole environment on one screen, warnings first."""

from __future__ import annotations

from typing import Any

import click

from control_plane.local_env import LocalEnv
from control_plane.overview import BranchStatus, NodeStatus, Overview, collect
from control_plane.problems import Problem, problems_of
from zenith_utils.size import format_size
from zenith_utils.version import version_text

from .context import CliContext, pass_context, say
from .progress import progress
from .tables import json_option, say_json, say_list, say_styled, say_table

DOWN = 3
"""Exit status: something that should run does not. That of systemctl and of init scripts."""


@click.command()
@json_option
@pass_context
def status(ctx: CliContext, as_json: bool) -> int:
    """Show the whole environment on one screen, warnings first.

    Daemons, tenants, branches with their sizes and how far pageserver and safekeepers have them,
    and computes. Exit status 0: all that should run does; 3: something does not, a daemon or a
    node that has crashed. A node that was stopped is at rest, and lag is no failure.

    \b
    zenith status
    zenith status --json | jq .warnings
    watch zenith status
    """
    with progress("asking the daemons"):
        seen = collect(ctx.env)
    problems = problems_of(ctx.env, seen)
    if as_json:
        say_json(_document(ctx.env, seen, problems))
    else:
        _show(ctx.env, seen, problems)
    return DOWN if any(problem.down for problem in problems) else 0


def _show(env: LocalEnv, seen: Overview, problems: list[Problem]) -> None:
    say(f"{version_text('zenith')}, environment {env.repo_dir}")
    say_list("Down:", [p.text for p in problems if p.down], "bad")
    say_list("Warnings:", [p.text for p in problems if not p.down], "warning")
    if not problems:
        say_styled("All is well.", "good")
    say("")
    say_table(
        "Daemons",
        ("NAME", "STATE", "PID", "WAL/SQL", "HTTP"),
        [
            (d.name, d.state, "-" if d.pid is None else str(d.pid), d.pg_address, d.http_address)
            for d in seen.daemons
        ],
    )
    if seen.tenants:
        say("")
        default = str(env.default_tenant_id)
        rows = [(i, s, "default" if i == default else "") for i, s in seen.tenants]
        say_table("Tenants", ("TENANT", "STATE", ""), rows)
    several = len(seen.tenants) > 1
    if seen.branches:
        say("")
        _show_branches(seen, several)
    if any(branch.safekeepers for branch in seen.branches):
        say("")
        _show_positions(seen, several)
    if seen.nodes:
        say("")
        columns = ("NODE", "BRANCH", "KIND", "ADDRESS", "STATUS", "BEHIND")
        rows_of_nodes = [_of_tenant(several, n.tenant_id, _node_row(n)) for n in seen.nodes]
        say_table("Computes", _of_tenant(several, "TENANT", columns), rows_of_nodes)


def _show_branches(seen: Overview, several: bool) -> None:
    columns = ("BRANCH", "FROM", "AT", "SIZE", "PAGESERVER HAS", "BEHIND")
    rows = [
        _of_tenant(
            several,
            branch.tenant_id,
            (
                _branch_name(branch),
                branch.ancestor or "-",
                branch.ancestor_lsn or "-",
                "-" if branch.size is None else format_size(branch.size),
                _text(branch.last_record_lsn),
                "-" if branch.commit_lsn is None else format_size(branch.pageserver_lag),
            ),
        )
        for branch in seen.branches
    ]
    say_table("Branches", _of_tenant(several, "TENANT", columns), rows)


def _show_positions(seen: Overview, several: bool) -> None:
    """A line for each branch with WAL on the safekeepers, a column for each safekeeper."""
    states = {d.safekeeper_id: d.state for d in seen.daemons if d.safekeeper_id is not None}
    rows = []
    for branch in seen.branches:
        if not branch.safekeepers:
            continue
        cells = []
        for position in branch.safekeepers:
            lag = branch.safekeeper_lag(position)
            state = states[position.safekeeper_id]
            missing = "nothing" if state == "running" else state
            text = missing if position.flush_lsn is None else str(position.flush_lsn)
            cells.append(f"{text} (-{format_size(lag)})" if lag else text)
        row = (_branch_name(branch), _text(branch.commit_lsn), *cells)
        rows.append(_of_tenant(several, branch.tenant_id, row))
    columns = ("BRANCH", "COMMITTED", *(f"SAFEKEEPER {i} HAS" for i in states))
    say_table("WAL on the safekeepers", _of_tenant(several, "TENANT", columns), rows)


def _node_row(node: NodeStatus) -> tuple[str, ...]:
    behind = "-" if node.lag is None else format_size(node.lag)
    return (node.name, node.branch or "?", node.kind, node.address, node.status, behind)


def _of_tenant(several: bool, tenant: str, row: tuple[str, ...]) -> tuple[str, ...]:
    """A row, with its tenant in front where there are several."""
    return (tenant, *row) if several else row


def _branch_name(branch: BranchStatus) -> str:
    return branch.branch or f"[{branch.timeline_id}]"


def _text(lsn: object) -> str:
    return "-" if lsn is None else str(lsn)


def _json_text(lsn: object) -> str | None:
    return None if lsn is None else str(lsn)


def _document(env: LocalEnv, seen: Overview, problems: list[Problem]) -> dict[str, Any]:
    return {
        "repo_dir": str(env.repo_dir),
        "version": version_text("zenith"),
        "healthy": not any(problem.down for problem in problems),
        "warnings": [{"text": p.text, "down": p.down} for p in problems],
        "daemons": [
            {
                "name": d.name,
                "state": d.state,
                "pid": d.pid,
                "pg_address": d.pg_address,
                "http_address": d.http_address,
            }
            for d in seen.daemons
        ],
        "tenants": [
            {"tenant_id": i, "state": s, "default": i == str(env.default_tenant_id)}
            for i, s in seen.tenants
        ],
        "branches": [_branch_document(branch) for branch in seen.branches],
        "computes": [
            {
                "node": n.name,
                "tenant_id": n.tenant_id,
                "branch": n.branch,
                "kind": n.kind,
                "address": n.address,
                "status": n.status,
                "reason": n.reason or None,
                "lag": n.lag,
            }
            for n in seen.nodes
        ],
    }


def _branch_document(branch: BranchStatus) -> dict[str, Any]:
    return {
        "branch": branch.branch,
        "tenant_id": branch.tenant_id,
        "timeline_id": branch.timeline_id,
        "ancestor": branch.ancestor,
        "ancestor_lsn": branch.ancestor_lsn,
        "logical_size": branch.size,
        "last_record_lsn": _json_text(branch.last_record_lsn),
        "commit_lsn": _json_text(branch.commit_lsn),
        "pageserver_lag": branch.pageserver_lag,
        "safekeepers": [
            {
                "id": position.safekeeper_id,
                "flush_lsn": _json_text(position.flush_lsn),
                "commit_lsn": _json_text(position.commit_lsn),
                "lag": branch.safekeeper_lag(position),
            }
            for position in branch.safekeepers
        ],
    }
