"""`zenith storage …`: looking into the files of the pageserver."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from control_plane.errors import ControlPlaneError
from zenith_utils.ids import TenantId, TimelineId

from .completion import branches as complete_branches
from .completion import timelines as complete_timelines
from .context import TIMELINE_ID, CliContext, pass_context, say, tenant_option
from .progress import progress

_TENANTS_DIR = "tenants"
_TIMELINES_DIR = "timelines"


@click.group()
def storage() -> None:
    """Look into the pageserver's files.

    \b
    zenith stop
    zenith storage verify                  check every byte of every file
    zenith storage draw -o main.svg        see what there is of branch main
    """


@storage.command("dump")
@click.argument("layer_file", type=click.Path(path_type=Path))
@click.option("--values", is_flag=True, help="Print the bytes of the values too.")
def storage_dump(layer_file: Path, values: bool) -> None:
    """Print what a layer file, or the list of a timeline's layers, holds.

    The whole file is verified first; then come key, LSN, kind and size of each value. A pageserver
    may run meanwhile: the file never changes.

    \b
    zenith storage dump .zenith/tenants/TENANT/timelines/TIMELINE/LAYER_FILE | less
    """
    from pageserver.layered_repository.dump_layer import dump
    from pageserver.layered_repository.errors import StoreError
    from zenith_utils.zstd import ZstdUnavailable

    try:
        dump(layer_file, sys.stdout, values=values)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise ControlPlaneError(f"cannot read {layer_file}: {e.strerror}") from e
    except (ValueError, StoreError, ZstdUnavailable) as e:
        raise ControlPlaneError(str(e)) from e


@storage.command("verify")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--online",
    is_flag=True,
    help="While the pageserver runs: check each file by itself, not how they fit together.",
)
@click.option(
    "--names-only",
    is_flag=True,
    help="Check metadata, names and sizes of layers only: quick, however large they are.",
)
@pass_context
def storage_verify(ctx: CliContext, path: Path | None, online: bool, names_only: bool) -> int:
    """Check the pageserver's files.

    That is all of them or, with PATH, those in one tenant's or one timeline's directory. Every byte
    is compared with its checksum; then whether layers that overlap agree, branches have their
    ancestors, and every value leads down to one it can be made of. Redo is not done. Nothing is
    changed. Exit status 0: all is well; 1: there is a problem; 2: it could not be told.

    \b
    zenith storage verify
    zenith storage verify .zenith/tenants/TENANT/timelines/TIMELINE
    """
    from pageserver.layered_repository.verify_repository import VerifyError, run

    try:
        return run(path or ctx.env.repo_dir, online=online, names_only=names_only, say=say)
    except (VerifyError, OSError) as e:
        click.echo(f"cannot verify: {e}", err=True)
        return 2


@storage.command("draw")
@tenant_option
@click.option(
    "--branch-name",
    "--branch",
    shell_complete=complete_branches,
    help="Branch to draw; default: main.",
)
@click.option(
    "--timeline-id",
    type=TIMELINE_ID,
    shell_complete=complete_timelines,
    help="Timeline to draw instead.",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the layers named in a text file instead, each with its size if that is known.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.svg",
    help="Where the picture goes.",
)
@pass_context
def storage_draw(
    ctx: CliContext,
    tenant_id: TenantId | None,
    branch_name: str | None,
    timeline_id: TimelineId | None,
    names: Path | None,
    output: Path,
) -> None:
    """Draw a timeline's layers as SVG.

    Keys go from left to right, LSNs upwards; point at a layer to see its name. The pageserver may
    run meanwhile.

    \b
    zenith storage draw -o main.svg
    zenith storage draw --branch fix -o fix.svg
    ls -l .zenith/tenants/*/timelines/TIMELINE | awk '/__/ {print $9, $5}' > names
    zenith storage draw --names names -o layers.svg
    """
    if sum(choice is not None for choice in (branch_name, timeline_id, names)) > 1:
        raise click.UsageError("--branch-name, --timeline-id and --names exclude each other")
    from pageserver.key_labels import key_labels
    from pageserver.layered_repository.draw_layers import (
        DrawError,
        picture_of_names,
        picture_of_timeline,
    )
    from pageserver.layered_repository.errors import StoreError

    try:
        if names is not None:
            picture = picture_of_names(names)
        else:
            path, known = _timeline(ctx, tenant_id, branch_name, timeline_id)
            picture = picture_of_timeline(path, known)
    except (DrawError, StoreError) as e:
        raise ControlPlaneError(str(e)) from e
    with progress("drawing"):
        svg = picture.svg(key_labels)
    try:
        output.write_text(svg, encoding="utf-8")
    except OSError as e:
        raise ControlPlaneError(f"cannot write {output}: {e.strerror}") from e
    say(f"{output}: {len(picture.layers)} layers")


def _timeline(
    ctx: CliContext,
    tenant_id: TenantId | None,
    branch_name: str | None,
    timeline_id: TimelineId | None,
) -> tuple[Path, dict[TimelineId, str]]:
    """Directory of the timeline, and the names of the tenant's branches."""
    from control_plane.local_env import DEFAULT_BRANCH

    env = ctx.env
    tenant_id = ctx.tenant(tenant_id)
    if timeline_id is None:
        timeline_id = env.branch_timeline(branch_name or DEFAULT_BRANCH, tenant_id)
    path = env.repo_dir / _TENANTS_DIR / str(tenant_id) / _TIMELINES_DIR / str(timeline_id)
    if not path.is_dir():
        raise ControlPlaneError(f"timeline {timeline_id} of tenant {tenant_id} is not in {path}")
    known = {ids[tenant_id]: name for name, ids in env.branches.items() if tenant_id in ids}
    return path, known
