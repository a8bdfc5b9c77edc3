"""What every subcommand shares: output, the environment, option values, errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from control_plane.errors import ConfigError, ControlPlaneError
from control_plane.local_env import LocalEnv, repo_dir_from_environment
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn, LsnParseError

from .completion import tenants as complete_tenants
from .progress import hidden


@dataclass(slots=True)
class CliContext:
    """Loads the environment when the first subcommand asks for it."""

    _env: LocalEnv | None = None

    @property
    def env(self) -> LocalEnv:
        """The environment of ZENITH_REPO_DIR; raises ControlPlaneError without one."""
        if self._env is None:
            self._env = LocalEnv.load(repo_dir_from_environment())
        return self._env

    def tenant(self, tenant_id: TenantId | None) -> TenantId:
        """The tenant a command is about: the one given, else the default one."""
        tenant_id = tenant_id or self.env.default_tenant_id
        if tenant_id is None:
            raise ControlPlaneError(
                "No tenant id. Use --tenant-id, or set 'default_tenant_id' in the config file"
            )
        return tenant_id


_P = ParamSpec("_P")
_R = TypeVar("_R")


def pass_context(function: Callable[Concatenate[CliContext, _P], _R]) -> Callable[_P, _R]:
    """Hand a command its CliContext as the first argument."""

    @wraps(function)
    def command(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        context = click.get_current_context().ensure_object(CliContext)
        return function(context, *args, **kwargs)

    return command


_write_failure: OSError | None = None


def say(text: str) -> None:
    """One line of the command's answer; flushed, so that it is seen while a step runs.

    An answer that cannot be written keeps no step from being done: see write_failure().
    """
    global _write_failure
    with hidden():
        try:
            click.echo(text)
            sys.stdout.flush()
        except OSError as e:
            # That the reader has gone (`zenith stop | head -1`) is no failure.
            if not isinstance(e, BrokenPipeError):
                _write_failure = e
            # What is still in the buffer would fail again with each line, and at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_failure() -> OSError | None:
    """Why a part of the answer could not be written, for instance to a file on a full disk."""
    return _write_failure


class _TenantIdType(click.ParamType[Any]):
    name = "hex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, TenantId):
            return value
        try:
            return TenantId.parse(value)
        except IdParseError as e:
            self.fail(str(e), param, ctx)


class _TimelineIdType(click.ParamType[Any]):
    name = "hex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, TimelineId):
            return value
        try:
            return TimelineId.parse(value)
        except IdParseError as e:
            self.fail(str(e), param, ctx)


TENANT_ID = _TenantIdType()
TIMELINE_ID = _TimelineIdType()


def parse_lsn(text: str | None, failure: str) -> Lsn | None:
    """An LSN given on the command line; raises ControlPlaneError(failure) with the cause."""
    if text is None:
        return None
    try:
        return Lsn.parse(text)
    except LsnParseError as e:
        raise ControlPlaneError(failure) from e


_Function = Callable[..., Any]


def tenant_option(function: _Function) -> _Function:
    """--tenant-id, defaulting to the environment's default tenant."""
    return click.option(
        "--tenant-id",
        type=TENANT_ID,
        shell_complete=complete_tenants,
        help="Tenant; default: the config's default_tenant_id.",
    )(function)


def override_option(function: _Function) -> _Function:
    """--pageserver-config-override, repeatable."""
    return click.option(
        "--pageserver-config-override",
        "overrides",
        multiple=True,
        metavar="TOML",
        help="Setting for the pageserver, as in gc_horizon=0; may be repeated.",
    )(function)


def stop_mode_option(function: _Function) -> _Function:
    """-m fast|immediate."""
    return click.option(
        "-m",
        "--stop-mode",
        "mode",
        type=click.Choice(["fast", "immediate"]),
        default="fast",
        show_default=True,
        help="fast: flush and end in order; immediate: end at once.",
    )(function)


def render_error(error: BaseException) -> str:
    """`command failed: …`, or `Error: …` where no command was begun, and the chain of causes."""
    from zenith_utils import errors

    begun = not isinstance(error, ConfigError)
    return errors.render_error(error, "command failed: " if begun else "Error: ")
