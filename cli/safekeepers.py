"""`zenith safekeeper …`: starting, stopping and watching them, and changes of who they are."""

from __future__ import annotations

from typing import Any

import click

from control_plane import daemons, safekeeper_changes
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from control_plane.safekeeper_changes import Change
from control_plane.settling import settle

from .completion import safekeepers as complete_safekeepers
from .context import CliContext, pass_context, render_error, say, stop_mode_option
from .environment import start_safekeeper
from .progress import progress
from .servers import show_status, stop_daemon
from .tables import json_option, say_json, warn

_ID = click.IntRange(0, (1 << 63) - 1)
_PORT = click.IntRange(1, 65535)
_accept_loss = click.option(
    "--accept-loss",
    is_flag=True,
    help="Also if branches that have not followed an earlier change could lose commits.",
)

_id_argument = click.argument(
    "node_id", metavar="[ID]", type=_ID, default=1, shell_complete=complete_safekeepers
)


@click.group()
def safekeeper() -> None:
    """Start, stop, watch, add, remove and replace the safekeepers.

    A commit is acknowledged when a majority of them has its WAL on disk. Three survive the loss of
    one. One that is lost for good is replaced by a new, empty one, which is brought up from the
    others by the next compute:

    \b
    zenith safekeeper list
    zenith safekeeper replace 2
    zenith pg stop main; zenith pg start main     # each node that runs
    """


@safekeeper.command("start")
@_id_argument
@pass_context
def safekeeper_start(ctx: CliContext, node_id: int) -> None:
    """Start a safekeeper; ID is 1 where none is given.

    \b
    zenith safekeeper start 2
    """
    _start(ctx.env, node_id)


@safekeeper.command("stop")
@_id_argument
@stop_mode_option
@pass_context
def safekeeper_stop(ctx: CliContext, node_id: int, mode: str) -> None:
    """Stop a safekeeper. Commits go on as long as a majority runs.

    One that was removed and still runs is stopped, too.

    \b
    zenith safekeeper stop 2
    zenith safekeeper stop 2 -m immediate
    """
    removed = daemons.removed_safekeepers(ctx.env).get(node_id)
    stop_daemon(removed or daemons.safekeeper(ctx.env, node_id), mode)


@safekeeper.command("restart")
@_id_argument
@stop_mode_option
@pass_context
def safekeeper_restart(ctx: CliContext, node_id: int, mode: str) -> None:
    """Stop a safekeeper, then start it: with its options of now in the config, for example.

    \b
    zenith safekeeper restart 2
    """
    stop_daemon(daemons.safekeeper(ctx.env, node_id), mode)
    _start(ctx.env, node_id)


def _start(env: LocalEnv, node_id: int) -> None:
    env.safekeeper(node_id)
    try:
        start_safekeeper(env, node_id)
    except ControlPlaneError as e:
        raise ControlPlaneError(f"safekeeper start failed: {e}") from e.__cause__


@safekeeper.command("status")
@_id_argument
@json_option
@pass_context
def safekeeper_status(ctx: CliContext, node_id: int, as_json: bool) -> int:
    """Say whether a safekeeper runs; exit status 1 when it does not.

    \b
    zenith safekeeper status 2 || zenith safekeeper start 2
    """
    return show_status(daemons.safekeeper(ctx.env, node_id), as_json)


@safekeeper.command("list")
@json_option
@pass_context
def safekeeper_list(ctx: CliContext, as_json: bool) -> None:
    """List the safekeepers: ids, ports, instances of their disks, whether they run.

    The generation grows with each change of the safekeepers. Earlier ones are listed as long as
    new computes may need majorities of them, too.

    \b
    zenith safekeeper list
    zenith safekeeper list --json
    """
    env = ctx.env
    if as_json:
        say_json(_document(env))
        return
    say(f"generation {env.safekeeper_generation}")
    say("ID\tPG PORT\tHTTP PORT\tINSTANCE\t\t\t\tSTATUS")
    for conf in env.safekeepers:
        status = "running" if daemons.safekeeper(env, conf.id).is_running() else "not running"
        instance = conf.instance or "not started yet".ljust(32)
        say(f"{conf.id}\t{conf.pg_port}\t{conf.http_port}\t\t{instance}\t{status}")
    for generation in env.earlier_generations:
        ids = ", ".join(str(member.id) for member in generation.members)
        say(f"earlier generation {generation.number}: safekeepers {ids}")


def _document(env: LocalEnv) -> dict[str, Any]:
    """The safekeepers as --json shows them."""
    return {
        "generation": env.safekeeper_generation,
        "safekeepers": [
            {
                "id": conf.id,
                "pg_port": conf.pg_port,
                "http_port": conf.http_port,
                "instance": conf.instance or None,
                "running": daemons.safekeeper(env, conf.id).is_running(),
            }
            for conf in env.safekeepers
        ],
        "earlier_generations": [
            {"number": g.number, "safekeepers": [member.id for member in g.members]}
            for g in env.earlier_generations
        ],
    }


@safekeeper.command("add")
@click.option("--id", "node_id", type=_ID, help="Id; default: one above the highest.")
@click.option("--pg-port", type=_PORT, help="Port of the WAL service; default: the next free one.")
@click.option("--http-port", type=_PORT, help="Port of the HTTP API; default: the next free one.")
@pass_context
def safekeeper_add(
    ctx: CliContext, node_id: int | None, pg_port: int | None, http_port: int | None
) -> None:
    """Add a new, empty safekeeper and start it.

    It is brought up from the others and counts: at once for branches without a running compute,
    else from its restart on. With an even number of safekeepers no more of them may fail than
    with one less.

    \b
    zenith safekeeper add
    zenith safekeeper add --id 7 --pg-port 5470 --http-port 7690
    """
    with progress("adding a safekeeper"):
        change = safekeeper_changes.add(ctx.env, node_id, pg_port, http_port)
    _carry_out(ctx.env, change)


@safekeeper.command("remove")
@click.argument("node_id", metavar="ID", type=_ID, shell_complete=complete_safekeepers)
@_accept_loss
@pass_context
def safekeeper_remove(ctx: CliContext, node_id: int, accept_loss: bool) -> None:
    """Take a safekeeper out of the configuration and stop it.

    Its directory stays. It can be deleted when a compute was started on each branch since.

    \b
    zenith safekeeper remove 4
    """
    with progress(f"removing safekeeper {node_id}"):
        change = safekeeper_changes.remove(ctx.env, node_id, accept_loss=accept_loss)
    _carry_out(ctx.env, change)


@safekeeper.command("replace")
@click.argument("old_id", metavar="OLD_ID", type=_ID, shell_complete=complete_safekeepers)
@click.option("--id", "node_id", type=_ID, help="Id of the new one; default: the next free one.")
@click.option("--pg-port", type=_PORT, help="Port of the WAL service; default: the next free one.")
@click.option("--http-port", type=_PORT, help="Port of the HTTP API; default: the next free one.")
@_accept_loss
@pass_context
def safekeeper_replace(
    ctx: CliContext,
    old_id: int,
    node_id: int | None,
    pg_port: int | None,
    http_port: int | None,
    accept_loss: bool,
) -> None:
    """Replace a safekeeper by a new, empty one: remove and add in one change.

    For one whose disk or machine is lost. The new one is brought up from the others: at once for
    branches without a running compute, else by its restart. Replace the next one when that has
    happened: a change that could lose something is refused.

    \b
    zenith safekeeper replace 2
    zenith safekeeper replace 2 --id 4 --pg-port 5457 --http-port 7679
    """
    with progress(f"replacing safekeeper {old_id}"):
        change = safekeeper_changes.replace(
            ctx.env, old_id, node_id, pg_port, http_port, accept_loss=accept_loss
        )
    _carry_out(ctx.env, change)


def _carry_out(env: LocalEnv, change: Change) -> None:
    """Start and stop what a change, which is saved, has brought and removed.

    Nothing is put off by one that does not stop: that is raised at the end, as ControlPlaneError.
    """
    say(f"safekeepers of generation {env.safekeeper_generation}: {_ids(env)}")
    for trouble in change.troubles:
        warn(render_error(trouble))
    failure = None
    for daemon in change.removed:
        try:
            stop_daemon(daemon, "fast")
        except ControlPlaneError as e:
            failure = e
    if change.added is not None:
        start_safekeeper(env, change.added)
    with progress("bringing branches to the new generation"):
        settle(env, say)
    if change.running_nodes:
        say("these nodes go on with the safekeepers of before: stop and start each of them")
        for node in change.running_nodes:
            name = node.name
            if node.tenant_id != env.default_tenant_id:
                name += f" --tenant-id {node.tenant_id}"
            say(f"    zenith pg stop {name}; zenith pg start {name}")
    if failure is not None:
        raise failure


def _ids(env: LocalEnv) -> str:
    return ", ".join(str(conf.id) for conf in env.safekeepers)
