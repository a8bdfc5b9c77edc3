"""`zenith tenant …`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from control_plane.pageserver_http import PageserverHttp, Setting
from zenith_utils.ids import TenantId

from .completion import tenants as complete_tenants
from .context import TENANT_ID, TIMELINE_ID, CliContext, pass_context, say
from .progress import progress
from .tables import json_option, say_json

_SETTINGS = (
    "checkpoint_distance, compaction_period, compaction_threshold, compaction_target_size, "
    "image_creation_threshold, gc_horizon, gc_period, pitr_interval, compression"
)


class _SettingType(click.ParamType[Any]):
    """``key:value``. A number is a number; no value stands for the default."""

    name = "key:value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        key, colon, text = (part.strip() for part in value.partition(":"))
        if not key or not colon:
            self.fail(f"'{value}' is not of the form key:value", param, ctx)
        setting: Setting = text or None
        if text.isascii() and text.isdigit():
            setting = int(text)
        return key, setting


_Function = Callable[..., Any]


def _config_option(help_text: str) -> Callable[[_Function], _Function]:
    return click.option("-c", "settings", type=_SettingType(), multiple=True, help=help_text)


@click.group()
def tenant() -> None:
    """Create, configure and list tenants.

    A tenant has timelines, branches and settings of its own. `zenith init` makes the first one,
    which commands without --tenant-id are about.

    \b
    zenith tenant list
    zenith tenant config -c 'pitr_interval:7 days'
    """


@tenant.command("list")
@json_option
@pass_context
def tenant_list(ctx: CliContext, as_json: bool) -> None:
    """List the tenants of the pageserver, with their states.

    \b
    zenith tenant list
    zenith tenant list --json
    """
    infos = PageserverHttp(ctx.env).tenant_list()
    if as_json:
        default = str(ctx.env.default_tenant_id)
        say_json(
            [
                {"tenant_id": i["id"], "state": i["state"], "default": i["id"] == default}
                for i in infos
            ]
        )
        return
    for info in infos:
        say(f"{info['id']} {info['state']}")


@tenant.command("create")
@click.option("--tenant-id", type=TENANT_ID, help="Id of the new tenant; default: random.")
@click.option("--timeline-id", type=TIMELINE_ID, hidden=True)
@_config_option("Setting of the tenant's own, see `zenith tenant config`; may be repeated.")
@pass_context
def tenant_create(
    ctx: CliContext,
    tenant_id: TenantId | None,
    timeline_id: TenantId | None,
    settings: tuple[tuple[str, Setting], ...],
) -> None:
    """Create a tenant; give it a first branch with `zenith timeline create`.

    \b
    zenith tenant create --tenant-id 9ef87a5bf0d92544f6fafeeb3239695c
    zenith timeline create --tenant-id 9ef87a5bf0d92544f6fafeeb3239695c --branch-name main
    zenith tenant create -c 'pitr_interval:7 days' -c gc_horizon:1073741824
    """
    tenant_id = tenant_id or TenantId.generate()
    with progress("creating the tenant"):
        created = PageserverHttp(ctx.env).tenant_create(tenant_id, dict(settings))
    say(f"tenant {created} successfully created on the pageserver")


@tenant.command("config", epilog=f"Settings: {_SETTINGS}.")
@click.argument(
    "tenant_id",
    metavar="[TENANT]",
    type=TENANT_ID,
    required=False,
    shell_complete=complete_tenants,
)
@_config_option("Setting to change; without a value the default holds again. May be repeated.")
@json_option
@pass_context
def tenant_config(
    ctx: CliContext,
    tenant_id: TenantId | None,
    settings: tuple[tuple[str, Setting], ...],
    as_json: bool,
) -> None:
    """Change settings of a tenant, at once and for good, and show all of them.

    Those that differ from the pageserver's are marked. TENANT: default_tenant_id of the config.

    \b
    zenith tenant config
    zenith tenant config 9ef87a5bf0d92544f6fafeeb3239695c -c 'gc_period:20 s'
    zenith tenant config 9ef87a5bf0d92544f6fafeeb3239695c -c gc_period:
    """
    tenant_id = ctx.tenant(tenant_id)
    pageserver = PageserverHttp(ctx.env)
    if settings:
        config = pageserver.tenant_configure(tenant_id, dict(settings))
    else:
        config = pageserver.tenant_config(tenant_id)
    if as_json:
        keys = ("effective", "overrides")
        say_json({"tenant_id": str(tenant_id), **{key: config[key] for key in keys}})
        return
    for key, value in config["effective"].items():
        mark = " (of this tenant)" if key in config["overrides"] else ""
        say(f"{key}: {value}{mark}")
