"""`zenith token`: tokens for the pageserver's services."""

from __future__ import annotations

from typing import Any

import click

from control_plane import auth
from zenith_utils.duration import DurationError, parse_duration
from zenith_utils.ids import TenantId

from .completion import tenants as complete_tenants
from .context import TENANT_ID, CliContext, pass_context, say


class _DurationType(click.ParamType[Any]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            seconds = parse_duration(value)
        except DurationError as e:
            self.fail(str(e), param, ctx)
        if seconds <= 0:
            self.fail(f"'{value}' is over at once", param, ctx)
        return seconds


@click.command()
@click.option(
    "--tenant-id",
    type=TENANT_ID,
    shell_complete=complete_tenants,
    help="For this tenant only; default: for everything.",
)
@click.option(
    "--expires-in", type=_DurationType(), help="As in '1 h'; default: valid as long as the key."
)
@pass_context
def token(ctx: CliContext, tenant_id: TenantId | None, expires_in: float | None) -> None:
    """Make a token that the pageserver lets in where authentication is on.

    It is a JSON web token, signed with the environment's private key: whoever has it, may do what
    it says. One without a tenant allows everything.

    \b
    curl -H "Authorization: Bearer $(zenith token)" localhost:9898/v1/tenant
    PGPASSWORD=$(zenith token --expires-in '10 min') psql -h localhost -p 64000 -c 'set x = 1'
    zenith token --tenant-id 9ef87a5bf0d92544f6fafeeb3239695c
    """
    if tenant_id is None:
        say(auth.management_token(ctx.env, expires_in))
    else:
        say(auth.tenant_token(ctx.env, tenant_id, expires_in))
