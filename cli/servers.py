"""`zenith pageserver …`, and what the commands of all servers share."""

from __future__ import annotations

import click

from control_plane import daemons
from control_plane.daemons import Daemon
from control_plane.errors import ControlPlaneError

from .context import CliContext, override_option, pass_context, say, stop_mode_option
from .environment import start_pageserver
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
    stop_daemon(daemons.pageserver(ctx.env), mode)


@pageserver.command("restart")
@override_option
@pass_context
def pageserver_restart(ctx: CliContext, overrides: tuple[str, ...]) -> None:
    """Stop the pageserver gracefully, then start it."""
    stop_daemon(daemons.pageserver(ctx.env), "fast")
    start_pageserver(ctx.env, overrides)


@pageserver.command("status")
@pass_context
def pageserver_status(ctx: CliContext) -> int:
    """Say whether the pageserver runs; exit status 1 when it does not."""
    return show_status(daemons.pageserver(ctx.env))


def stop_daemon(daemon: Daemon, mode: str) -> None:
    """Stop a daemon; raises ControlPlaneError."""
    try:
        with progress(f"stopping the {daemon.kind}"):
            daemon.stop(say, immediate=mode == "immediate")
    except ControlPlaneError as e:
        raise ControlPlaneError(f"{daemon.kind} stop failed: {e}") from e.__cause__


def show_status(daemon: Daemon) -> int:
    """Say whether a daemon runs; the command's exit status."""
    running = daemon.is_running()
    say(f"{daemon.title} is {'running' if running else 'not running'} at '{daemon.shown_address}'")
    return 0 if running else 1
