"""`zenith completion`: scripts for shells, and what completes the values of options.

The names come from the files of the environment alone: no daemon is asked, so that it is quick,
and whatever is wrong with the environment, completion says nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from control_plane.local_env import LocalEnv, repo_dir_from_environment
from zenith_utils.ids import TenantId

from .groups import COMPLETE_VARIABLE

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]
_Candidates = Iterable[tuple[str, str]]
"""Values, each with a word about it."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands in a shell.

    Completed are commands and options, and the names of branches and nodes, the ids of tenants and
    of safekeepers as the environment has them. It takes bash 4.4 or newer.

    \b
    zenith completion bash >> ~/.bashrc
    zenith completion zsh >> ~/.zshrc
    zenith completion fish > ~/.config/fish/completions/zenith.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    top = ctx.find_root().command
    sys.stdout.write(found(top, {}, "zenith", COMPLETE_VARIABLE).source())


def _completer(candidates: Callable[[LocalEnv, dict[str, Any]], _Candidates]) -> _Completer:
    """A completer that is silent where the environment cannot be read."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        try:
            env = LocalEnv.load(repo_dir_from_environment())
            found = sorted(candidates(env, ctx.params))
        except Exception:
            # Whatever it is: a message in the middle of a command line helps nobody.
            return []
        return [CompletionItem(v, help=about) for v, about in found if v.startswith(incomplete)]

    return complete


def _tenant(env: LocalEnv, params: dict[str, Any]) -> TenantId | None:
    """The tenant of the command line so far."""
    given = params.get("tenant_id")
    return given if isinstance(given, TenantId) else env.default_tenant_id


def _branches(env: LocalEnv, params: dict[str, Any]) -> _Candidates:
    tenant_id = _tenant(env, params)
    return [
        (name, f"timeline {timelines[tenant_id]}")
        for name, timelines in env.branches.items()
        if tenant_id is not None and tenant_id in timelines
    ]


def _nodes(env: LocalEnv, params: dict[str, Any]) -> _Candidates:
    tenant_id = _tenant(env, params)
    if tenant_id is None:
        return []
    paths = env.pgdata_dirs(tenant_id).glob("*/postgresql.conf")
    return [(path.parent.name, "node") for path in paths]


def _branches_and_nodes(env: LocalEnv, params: dict[str, Any]) -> _Candidates:
    return (dict(_branches(env, params)) | dict(_nodes(env, params))).items()


def _tenants(env: LocalEnv, _: dict[str, Any]) -> _Candidates:
    known = {path.name for path in (env.repo_dir / "tenants").glob("*") if path.is_dir()}
    known |= {str(tenant) for timelines in env.branches.values() for tenant in timelines}
    return [(t, "default tenant" if t == str(env.default_tenant_id) else "") for t in known]


def _timelines(env: LocalEnv, params: dict[str, Any]) -> _Candidates:
    tenant_id = _tenant(env, params)
    return [
        (str(timelines[tenant_id]), f"branch {name}")
        for name, timelines in env.branches.items()
        if tenant_id is not None and tenant_id in timelines
    ]


def _safekeepers(env: LocalEnv, _: dict[str, Any]) -> _Candidates:
    return [(str(conf.id), f"port {conf.pg_port}") for conf in env.safekeepers]


branches = _completer(_branches)
nodes = _completer(_nodes)
branches_and_nodes = _completer(_branches_and_nodes)
tenants = _completer(_tenants)
timelines = _completer(_timelines)
safekeepers = _completer(_safekeepers)
