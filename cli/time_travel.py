"""`--at`: a time in the place of an LSN."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from control_plane.local_env import LocalEnv
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

from .context import parse_lsn, say
from .progress import progress

_Function = Callable[..., Any]


class _TimeType(click.ParamType[Any]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value.strip())
            return moment if moment.tzinfo else moment.astimezone()
        except (ValueError, OverflowError) as e:
            self.fail(
                f"'{value}' is no time: expected one like '2026-11-22 10:00:00+00' ({e})",
                param,
                ctx,
            )


def at_option(what: str) -> Callable[[_Function], _Function]:
    """--at; `what` says what is done at that time."""
    return click.option(
        "--at",
        type=_TimeType(),
        metavar="TIME",
        help=f"{what}, e.g. '2026-11-22 10:00:00+00'; without a zone in local time.",
    )


def chosen_lsn(
    env: LocalEnv,
    branch: tuple[TenantId, TimelineId],
    lsn: str | None,
    at: datetime | None,
    option: str,
    failure: str,
) -> Lsn | None:
    """The LSN of the `option`, or that of --at, which is then printed; None without both.

    Raises ControlPlaneError(failure) for a malformed LSN, and where a time leads to none.
    """
    if at is None:
        return parse_lsn(lsn, failure)
    if lsn is not None:
        raise click.UsageError(f"{option} and --at exclude each other")
    from control_plane.time_travel import find_moment

    with progress("waiting for the pageserver"):
        moment = find_moment(env, *branch, at)
    say(f"The state at {at} is at Lsn {moment.lsn}, its newest commit of {moment.commit_time}")
    return moment.lsn
