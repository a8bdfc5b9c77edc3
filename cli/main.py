"""The top of the command: subcommands, version, and how errors leave the process."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from control_plane.errors import ControlPlaneError
from zenith_utils.os_user import OsUserError

from .context import CliContext, render_error

# Subcommand -> module. A command imports only what it needs: start-up time is felt in scripts.
_COMMANDS = {
    "demo": "demo",
    "init": "environment",
    "start": "environment",
    "stop": "environment",
    "tenant": "tenants",
    "timeline": "timelines",
    "pageserver": "servers",
    "safekeeper": "safekeepers",
    "pg": "nodes",
    "storage": "storage",
    "token": "tokens",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(
            importlib.import_module(f".{module}", __package__), cmd_name
        )
        return command


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        text = version("zenith")
    except PackageNotFoundError:
        text = "from a source tree"
    click.echo(f"zenith {text}")
    ctx.exit()


@click.group(
    cls=_LazyGroup,
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
    psql -h 127.0.0.1 -p 55432 -U zenith_admin postgres
    zenith timeline branch --branch-name fix      branch main, at once, whatever its size
    zenith pg start fix --branch-name fix         a second Postgres, on the branch
    zenith pg start past --lsn 0/2000028          open main as it was at an LSN
    zenith pg start then --at '2026-11-22 10:00'  open main as it was at a time
    zenith stop                                   stop everything; nothing is lost

    The environment is that of ZENITH_REPO_DIR, else ./.zenith.
    """
    ctx.obj = CliContext()


def main() -> int:
    """Run the command line; returns the exit status."""
    # As an interrupt it lets every step clean up after itself.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = cli.main(prog_name="zenith", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
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


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
