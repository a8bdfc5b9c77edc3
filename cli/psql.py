"""`zenith psql`: the distribution's psql on the running node of a branch."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from itertools import chain, count

import click

from control_plane.compute import SUPERUSER, Compute, ComputeControlPlane, node_name
from control_plane.errors import ControlPlaneError
from control_plane.local_env import DEFAULT_BRANCH, LocalEnv
from zenith_utils.ids import TenantId

from .completion import branches_and_nodes
from .context import CliContext, pass_context, tenant_option

_RUNNING = "running"
_ARGUMENTS = "zenith.psql_arguments"


class _PsqlCommand(click.Command):
    """What stands behind `--` is psql's, also where the name of the branch is left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        behind: list[str] = []
        if "--" in args:
            at = args.index("--")
            args, behind = args[:at], args[at + 1 :]
        ctx.meta[_ARGUMENTS] = behind
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- PSQL ARGUMENTS]"]


@click.command(cls=_PsqlCommand)
@click.argument("name", metavar="[BRANCH|NODE]", required=False, shell_complete=branches_and_nodes)
@tenant_option
@click.option("-d", "--dbname", default="postgres", show_default=True, help="Database.")
@click.option("-U", "--username", default=SUPERUSER, show_default=True, help="Role.")
@click.option("-c", "--command", "commands", multiple=True, help="SQL to run; may be repeated.")
@pass_context
def psql(
    ctx: CliContext,
    name: str | None,
    tenant_id: TenantId | None,
    dbname: str,
    username: str,
    commands: tuple[str, ...],
) -> None:
    """Open psql on the running node of a branch; default: main.

    A name is that of a running node, else of a branch: then it is the branch's read-write node.
    What stands behind -- goes to psql as it is.

    \b
    zenith psql
    zenith psql fix -c 'SELECT count(*) FROM orders'
    zenith psql replica -d app -- --csv -f report.sql
    """
    tenant_id = ctx.tenant(tenant_id)
    node = find_node(ctx.env, tenant_id, name or DEFAULT_BRANCH)
    program = ctx.env.pg_distrib_dir / "bin" / "psql"
    if not os.access(program, os.X_OK):
        raise ControlPlaneError(
            f"there is no psql at {program}: install PostgreSQL's client programs, "
            "on Debian the package postgresql-client-15"
        )
    arguments = ["-h", "127.0.0.1", "-p", str(node.port), "-U", username, "-d", dbname]
    for command in commands:
        arguments += ["-c", command]
    arguments += click.get_current_context().meta[_ARGUMENTS]
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores it, and what is ignored stays so in the program that takes its place.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(program, [str(program), *arguments])


def find_node(env: LocalEnv, tenant_id: TenantId, name: str) -> Compute:
    """The running node of this name, else the running read-write one of the branch.

    Raises ControlPlaneError, which names the command that starts it, or those there are.
    """
    plane = ComputeControlPlane(env)
    nodes = plane.nodes(tenant_id, lambda _: None)
    named = next((node for node in nodes if node.name == name), None)
    if named is not None and named.status() == _RUNNING:
        return named
    if tenant_id not in env.branches.get(name, {}):
        if named is not None:
            raise ControlPlaneError(
                f"postgres {name} is not running ({named.status()}): zenith pg start {name}"
            )
        if (env.pgdata_dirs(tenant_id) / name).is_dir():
            plane.get(tenant_id, name)  # says what is wrong with it
    timeline_id = env.branch_timeline(name, tenant_id)
    on_branch = [node for node in nodes if node.timeline_id == timeline_id]
    running = [node for node in on_branch if node.status() == _RUNNING]
    writable = [node for node in running if not node.read_only]
    if len(writable) == 1:
        return writable[0]
    if writable:
        names = ", ".join(node.name for node in writable)
        raise ControlPlaneError(
            f"several nodes run on branch '{name}': {names}. Say which: "
            f"zenith psql {writable[0].name}"
        )
    taken = {node.name for node in nodes}
    raise ControlPlaneError(_none_runs(name, on_branch, running, taken))


def _none_runs(
    branch: str, on_branch: list[Compute], running: list[Compute], taken: set[str]
) -> str:
    text = f"no read-write node runs on branch '{branch}'. Start one: "
    stopped = next((node.name for node in on_branch if not node.read_only), None)
    if stopped is not None:
        text += f"zenith pg start {stopped}"
    else:
        name = node_name(branch)
        names = chain((name, f"{name}_node"), (f"{name}_{i}" for i in count(2)))
        free = next(name for name in names if name not in taken)
        text += f"zenith pg start {free} --branch-name {shlex.quote(branch)}"
    if running:
        others = ", ".join(f"zenith psql {node.name}" for node in running)
        text += f". Read-only ones run: {others}"
    return text
