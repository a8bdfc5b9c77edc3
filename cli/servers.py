"""`zenith pageserver …`, and what the commands of all servers share."""

from __future__ import annotations

import click

from compute_tools.spec import address_text
from control_plane import daemons
from control_plane.daemons import Daemon, ServerProcess
from control_plane.errors import ControlPlaneError

from .context import CliContext, override_option, pass_context, say, stop_mode_option
from .environment import start_pageserver
from .progress import progress
from .tables import json_option, say_json


@click.group()
def pageserver() -> None:
    """Start, stop and watch the pageserver.

    Computes go on without it for a while: commits until they are too far ahead of it, reads as far
    as their pages are there already.

    \b
    zenith pageserver status
    zenith pageserver restart
    """


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
    """Stop the pageserver.

    \b
    zenith pageserver stop
    zenith pageserver stop -m immediate
    """
    stop_daemon(daemons.pageserver(ctx.env), mode)


@pageserver.command("restart")
@override_option
@pass_context
def pageserver_restart(ctx: CliContext, overrides: tuple[str, ...]) -> None:
    """Stop the pageserver gracefully, then start it; overrides hold for this run only.

    \b
    zenith pageserver restart
    """
    stop_daemon(daemons.pageserver(ctx.env), "fast")
    start_pageserver(ctx.env, overrides)


@pageserver.command("status")
@json_option
@pass_context
def pageserver_status(ctx: CliContext, as_json: bool) -> int:
    """Say whether the pageserver runs; exit status 1 when it does not.

    \b
    zenith pageserver status || zenith pageserver start
    """
    return show_status(daemons.pageserver(ctx.env), as_json)


def stop_daemon(daemon: ServerProcess, mode: str) -> None:
    """Stop a daemon; raises ControlPlaneError."""
    try:
        with progress(f"stopping the {daemon.kind}"):
            daemon.stop(say, immediate=mode == "immediate")
    except ControlPlaneError as e:
        raise ControlPlaneError(f"{daemon.kind} stop failed: {e}") from e.__cause__


def show_status(daemon: Daemon, as_json: bool) -> int:
    """Say whether a daemon runs; the command's exit status."""
    running = daemon.is_running()
    if as_json:
        say_json(
            {
                "running": running,
                "pid": daemon.running_pid(),
                "pg_address": address_text(*daemon.pg_address),
                "http_address": address_text(*daemon.http_address),
                "log": str(daemon.log_file),
            }
        )
        return 0 if running else 1
    say(f"{daemon.title} is {'running' if running else 'not running'} at '{daemon.shown_address}'")
    return 0 if running else 1
