"""`zenith pageserver …` and `zenith safekeeper …`."""

from __future__ import annotations

import click

from control_plane import daemons
from control_plane.daemons import Daemon
from control_plane.errors import ControlPlaneError

from .context import CliContext, override_option, pass_context, say, stop_mode_option
from .environment import start_pageserver, start_safekeeper
from .progress import progress


@click.group()
def pageserver() -> None:
    """Start, stop and watch the pageserver."""


@pageserver.command("start")
@override_option
@pass_context
def pageserver_start(ctx: CliContext, overrides: tuple[str, ...]) -> None:
    """Start the pageserver; overrides hold for this run only.

    \b
    zenith pageserver start
    zenith pageserver start --pageserver-config-override "wait_lsn_timeout='5 s'"
    """
    start_pageserver(ctx.env, overrides)


@pageserver.command("stop")
@stop_mode_option
@pass_context
def pageserver_stop(ctx: CliContext, mode: str) -> None:
    """Stop the pageserver."""
    _stop(daemons.pageserver(ctx.env), mode)


@pageserver.command("restart")
@override_option
@pass_context
def pageserver_restart(ctx: CliContext, overrides: tuple[str, ...]) -> None:
    """Stop the pageserver gracefully, then start it."""
    _stop(daemons.pageserver(ctx.env), "fast")
    start_pageserver(ctx.env, overrides)


@pageserver.command("status")
@pass_context
def pageserver_status(ctx: CliContext) -> int:
    """Say whether the pageserver runs; exit status 1 when it does not."""
    return _status(daemons.pageserver(ctx.env))


@click.group()
def safekeeper() -> None:
    """Start, stop and watch the safekeepers."""


@safekeeper.command("start")
@click.argument("node_id", metavar="[ID]", type=int, default=1)
@pass_context
def safekeeper_start(ctx: CliContext, node_id: int) -> None:
    """Start a safekeeper."""
    ctx.env.safekeeper(node_id)
    try:
        start_safekeeper(ctx.env, node_id)
    except ControlPlaneError as e:
        raise ControlPlaneError(f"safekeeper start failed: {e}") from e.__cause__


@safekeeper.command("stop")
@click.argument("node_id", metavar="[ID]", type=int, default=1)
@stop_mode_option
@pass_context
def safekeeper_stop(ctx: CliContext, node_id: int, mode: str) -> None:
    """Stop a safekeeper."""
    _stop(daemons.safekeeper(ctx.env, node_id), mode)


@safekeeper.command("restart")
@click.argument("node_id", metavar="[ID]", type=int, default=1)
@stop_mode_option
@pass_context
def safekeeper_restart(ctx: CliContext, node_id: int, mode: str) -> None:
    """Stop a safekeeper, then start it."""
    _stop(daemons.safekeeper(ctx.env, node_id), mode)
    start_safekeeper(ctx.env, node_id)


@safekeeper.command("status")
@click.argument("node_id", metavar="[ID]", type=int, default=1)
@pass_context
def safekeeper_status(ctx: CliContext, node_id: int) -> int:
    """Say whether a safekeeper runs; exit status 1 when it does not."""
    return _status(daemons.safekeeper(ctx.env, node_id))


def _stop(daemon: Daemon, mode: str) -> None:
    try:
        with progress(f"stopping the {daemon.kind}"):
            daemon.stop(say, immediate=mode == "immediate")
    except ControlPlaneError as e:
        raise ControlPlaneError(f"{daemon.kind} stop failed: {e}") from e.__cause__


def _status(daemon: Daemon) -> int:
    running = daemon.is_running()
    say(f"{daemon.title} is {'running' if running else 'not running'} at '{daemon.shown_address}'")
    return 0 if running else 1
