"""The top of the command: subcommands, version, and how errors leave the process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from control_plane.errors import ControlPlaneError
from zenith_utils.os_user import OsUserError

from .context import CliContext, render_error, write_failure
from .groups import COMPLETE_VARIABLE, LazyCommand, LazyGroup

_COMMANDS = {
    "demo": LazyCommand("demo", "See it work: load data, make a mistake, go back before it."),
    "init": LazyCommand("environment", "Make a new environment with a tenant and its branch main."),
    "start": LazyCommand("environment", "Start the pageserver and every safekeeper."),
    "stop": LazyCommand("environment", "Stop all computes, the pageserver and the safekeepers."),
    "status": LazyCommand("status", "Show the whole environment on one screen, warnings first."),
    "doctor": LazyCommand("doctor", "Check this machine and the environment for what is wrong."),
    "pg": LazyCommand("nodes", "Create, start, stop and list Postgres nodes."),
    "psql": LazyCommand("psql", "Open psql on the running node of a branch."),
    "timeline": LazyCommand("timelines", "Create, branch and list timelines."),
    "tenant": LazyCommand("tenants", "Create, configure and list tenants."),
    "pageserver": LazyCommand("servers", "Start, stop and watch the pageserver."),
    "safekeeper": LazyCommand("safekeepers", "Start, stop, watch and replace the safekeepers."),
    "storage": LazyCommand("storage", "Look into the pageserver's files."),
    "token": LazyCommand("tokens", "Make a token for a pageserver with authentication."),
    "completion": LazyCommand("completion", "Print a script that completes commands in a shell."),
}


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from zenith_utils.version import version_text

    click.echo(version_text("zenith"))
    ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try `zenith demo` first: it builds an environment, branches it and travels in time.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """PostgreSQL with storage separated from compute.

    \b
    zenith init                                   make an environment in ./.zenith
    zenith start                                  start its pageserver and safekeepers
    zenith pg start main                          start Postgres on branch main
    zenith psql                                   open psql on it
    zenith timeline branch --branch-name fix      branch main, at once, whatever its size
    zenith pg start fix --branch-name fix         a second Postgres, on the branch
    zenith pg start past --lsn 0/2000028          open main as it was at an LSN
    zenith pg start then --at '2026-11-22 10:00'  open main as it was at a time
    zenith status                                 see all of it, and what is wrong
    zenith stop                                   stop everything; nothing is lost

    The environment is that of ZENITH_REPO_DIR, else ./.zenith.
    """
    ctx.obj = CliContext()


def main() -> int:
    """Run the command line; returns the exit status."""
    # As an interrupt it lets every step clean up after itself.
    signal.signal(signal.SIGTERM, _interrupt)
    _open_closed_streams()
    try:
        status = cli.main(prog_name="zenith", standalone_mode=False, complete_var=COMPLETE_VARIABLE)
        sys.stdout.flush()
        failure = write_failure()
        if failure is not None:
            click.echo(f"the answer could not be written: {failure.strerror}", err=True)
        return status if isinstance(status, int) and status else int(failure is not None)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        return 2
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of a help text has gone. Python would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ControlPlaneError, OsUserError, OSError) as e:
        click.echo(render_error(e), err=True)
        return 1


def _open_closed_streams() -> None:
    """What the caller has closed (`>&-`) takes everything and gives nothing."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
