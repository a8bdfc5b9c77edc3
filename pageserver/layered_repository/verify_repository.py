"""Offline check of a repository: `python -m pageserver.layered_repository.verify_repository PATH`.

PATH is a pageserver's working directory, or the directory of one tenant or of one timeline. Every
byte of every file of the store is read and compared with its checksum; then what the files say of
each other: see layer_map_checks.py for what names and metadata prove, verify_reads.py for what
values do. Nothing is changed.

A pageserver must not run on the directory meanwhile: one that compacts replaces files while they
are listed. Files with their final name never change, though, so `online` checks each of them by
itself and asks no more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.errors import (
    CorruptFileError,
    CorruptMetadataError,
    FormatVersionError,
    MissingFileError,
)
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_list import ListedLayer, list_name
from pageserver.layered_repository.layer_map_checks import (
    Remark,
    check_ancestor,
    check_layer,
    check_metadata,
    check_unlisted,
    overlapping_groups,
)
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.offline import (
    ReadableTimeline,
    TenantFiles,
    TimelineFiles,
    find_tenants,
    open_timeline,
    pageserver_on,
)
from pageserver.layered_repository.verify_reads import disagreements, unreadable
from zenith_utils.ids import TimelineId
from zenith_utils.zstd import ZstdUnavailable

MAX_ALIKE: Final = 10
"""Findings of one kind that are reported of one timeline."""

_PROGRESS_INTERVAL: Final = 0.2


class VerifyError(Exception):
    """The repository cannot be verified; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a file or directory: a problem, or a note."""

    path: Path
    message: str
    offset: int | None = None
    is_problem: bool = True

    def __str__(self) -> str:
        kind = "problem" if self.is_problem else "note"
        at = "" if self.offset is None else f" at offset {self.offset}"
        return f"{kind}: {self.path}{at}: {self.message}"


@dataclass(slots=True)
class Progress:
    """How far a verification has got; sizes in bytes. `values` were read through the layers."""

    timelines: int = 0
    files_total: int = 0
    bytes_total: int = 0
    files: int = 0
    bytes: int = 0
    values: int = 0
    step: str = ""

    def __str__(self) -> str:
        return (
            f"{self.step}: {self.files} of {self.files_total} layers, "
            f"{self.bytes / 1e6:.0f} of {self.bytes_total / 1e6:.0f} MB, {self.values} values read"
        )


@dataclass(slots=True)
class _Tenant:
    """The work on one tenant."""

    files: TenantFiles
    metadata: dict[TimelineId, TimelineMetadata] = field(default_factory=dict)
    damaged: set[TimelineId] = field(default_factory=set)
    listed: dict[TimelineId, list[ListedLayer]] = field(default_factory=dict)
    """The layers that count, there or not, where the list can be read."""


def verify(
    path: Path,
    *,
    online: bool = False,
    names_only: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Finding]:
    """Check everything under `path` and go on after each problem; the findings as they come.

    `online`: only what is safe while a pageserver runs. `names_only`: metadata, names and sizes
    of the layers, none of which is opened. `progress` is called often, with the same object. Raises
    VerifyError.
    """
    if not online:
        _refuse_running(path)
    tenants = [_Tenant(files) for files in find_tenants(path)]
    if not tenants:
        raise VerifyError(
            f"{path}: neither the working directory of a pageserver, nor the directory of a tenant "
            "(with a directory 'timelines') or of a timeline (with a file 'metadata')"
        )
    state = Progress()
    for tenant in tenants:
        for timeline in tenant.files.chosen():
            state.timelines += 1
            state.files_total += len(timeline.layers)
            state.bytes_total += sum(size for _, size in timeline.layers)
    for tenant in tenants:
        for finding in _verify_tenant(tenant, online, names_only, state, progress):
            if not online:
                _refuse_running(path)
            yield finding
    if not online:
        _refuse_running(path)


def _refuse_running(path: Path) -> None:
    pid = pageserver_on(path)
    if pid is not None:
        raise VerifyError(
            f"a pageserver runs on {path} (process {pid}): stop it first, or check its files one "
            "by one while it runs, with --online"
        )


def _verify_tenant(
    tenant: _Tenant,
    online: bool,
    names_only: bool,
    state: Progress,
    progress: Callable[[Progress], None],
) -> Iterator[Finding]:
    for path, message in () if online else tenant.files.leftovers:
        yield Finding(path, message, is_problem=False)
    # Those of the ancestors too, though nothing is reported of timelines that were not asked for.
    for timeline in tenant.files.timelines.values():
        findings = list(_read_metadata(tenant, timeline, online))
        if not online:
            findings += _compare_with_list(tenant, timeline)
        if timeline.chosen:
            yield from findings
    for timeline in tenant.files.chosen():
        state.step = f"timeline {timeline.timeline_id}"
        progress(state)
        if not online:
            yield from _verify_map(tenant, timeline)
        if not names_only:
            yield from _verify_files(tenant, timeline, online, state, progress)
    if online or names_only:
        return
    for timeline in tenant.files.chosen():
        state.step = f"values of timeline {timeline.timeline_id}"
        progress(state)
        yield from _verify_values(tenant, timeline, state, progress)


# ---- the metadata, the list and the names


def _read_metadata(tenant: _Tenant, timeline: TimelineFiles, online: bool) -> Iterator[Finding]:
    path = timeline.metadata_path
    try:
        tenant.metadata[timeline.timeline_id] = timeline.directory(tenant.files).read_metadata()
    except FileNotFoundError:
        if not online:  # else it may have been detached
            yield Finding(path, "the file is missing")
    except (CorruptMetadataError, FormatVersionError, OSError) as error:
        yield _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> Finding:
    match error:
        case CorruptFileError():
            return Finding(path, error.reason, error.offset)
        case FormatVersionError():
            text = f"format version {error.found}, this program reads {error.supported}"
            return Finding(path, text)
        case OSError():
            return Finding(path, f"cannot be read: {error.strerror}")
    return Finding(path, f"cannot be checked: {error}")


def _compare_with_list(tenant: _Tenant, timeline: TimelineFiles) -> Iterator[Finding]:
    """Read the list of layers; what is there besides, and what is not."""
    metadata = tenant.metadata.get(timeline.timeline_id)
    if metadata is None:
        return
    list_path = timeline.path / list_name(metadata.layer_list)
    try:
        listed = timeline.directory(tenant.files).read_list(metadata)
    except MissingFileError as error:
        yield Finding(list_path, f"missing: {error.reason}")
        return
    except (CorruptMetadataError, FormatVersionError, OSError) as error:
        yield _unreadable(list_path, error)
        return
    tenant.listed[timeline.timeline_id] = listed
    for other in timeline.lists:
        if other != list_path.name:
            text = "a list of layers that does not count: the next start removes it"
            yield Finding(timeline.path / other, text, is_problem=False)
    sizes = timeline.sizes
    for layer in listed:
        problem = _check_listed(layer, sizes.get(layer.name))
        if problem is not None:
            tenant.damaged.add(timeline.timeline_id)
            yield Finding(timeline.path / str(layer.name), problem)
    names = {layer.name for layer in listed}
    for name in (name for name in sizes if name not in names):
        remark = check_unlisted(name, metadata)
        yield Finding(timeline.path / str(name), remark.message, is_problem=remark.is_problem)


def _check_listed(layer: ListedLayer, size: int | None) -> str | None:
    if size is None:
        return "missing: the timeline's list of layers names it"
    if size != layer.size:
        return f"the file has {size} bytes, the timeline's list of layers says {layer.size}"
    return None


def _verify_map(tenant: _Tenant, timeline: TimelineFiles) -> Iterator[Finding]:
    for path, message in timeline.leftovers:
        yield Finding(path, message, is_problem=False)
    metadata = tenant.metadata.get(timeline.timeline_id)
    if metadata is None:
        return
    path = timeline.metadata_path
    remarks = check_metadata(metadata)
    remarks += _check_ancestor_of(tenant, metadata)
    yield from (Finding(path, x.message, is_problem=x.is_problem) for x in remarks)
    for layer in tenant.listed.get(timeline.timeline_id, []):
        remark = check_layer(layer.name, metadata)
        if remark is not None:
            tenant.damaged.add(timeline.timeline_id)
            yield Finding(
                timeline.path / str(layer.name), remark.message, is_problem=remark.is_problem
            )


def _check_ancestor_of(tenant: _Tenant, metadata: TimelineMetadata) -> list[Remark]:
    ancestor_id = metadata.ancestor_id
    if ancestor_id is None:
        return []
    if ancestor_id in tenant.metadata:
        return check_ancestor(metadata, tenant.metadata[ancestor_id])
    if ancestor_id in tenant.files.timelines:
        return [Remark(f"the metadata of its ancestor {ancestor_id} cannot be read")]
    if tenant.files.alone:
        text = f"its ancestor {ancestor_id} is not here: what it takes from there is not checked"
        return [Remark(text, is_problem=False)]
    return [Remark(f"its ancestor {ancestor_id} is missing")]


# ---- the layers, each by itself


def _verify_files(
    tenant: _Tenant,
    timeline: TimelineFiles,
    online: bool,
    state: Progress,
    progress: Callable[[Progress], None],
) -> Iterator[Finding]:
    counted = _counted(tenant, timeline)
    for layer in timeline.layer_files(tenant.files):
        finding = _verify_layer(layer, online) if layer.name in counted else None
        state.files += 1
        state.bytes += layer.size
        progress(state)
        if finding is not None:
            tenant.damaged.add(timeline.timeline_id)
            yield finding


def _counted(tenant: _Tenant, timeline: TimelineFiles) -> set[LayerName]:
    """The layers to look into: those that count, as far as they have the right size.

    All there are where no list says more.
    """
    listed = tenant.listed.get(timeline.timeline_id)
    if listed is None:
        return set(timeline.sizes)
    wanted = set(listed)
    return {name for name, size in timeline.layers if ListedLayer(name, size) in wanted}


def _verify_layer(layer: LayerFile, online: bool) -> Finding | None:
    path = Path(layer.path)
    try:
        layer.verify()
    except FileNotFoundError:
        if online:
            return None  # replaced or collected since it was listed
        return Finding(path, "the file vanished while it was verified")
    except (CorruptFileError, FormatVersionError, ZstdUnavailable, OSError) as error:
        return _unreadable(path, error)
    return None


# ---- the values


def _verify_values(
    tenant: _Tenant,
    timeline: TimelineFiles,
    state: Progress,
    progress: Callable[[Progress], None],
) -> Iterator[Finding]:
    listed = tenant.listed.get(timeline.timeline_id)
    if listed is None or timeline.timeline_id in tenant.damaged:
        yield Finding(
            timeline.path,
            "its values were not checked, as files of it are damaged",
            is_problem=False,
        )
        return
    directory = timeline.directory(tenant.files)
    for group in overlapping_groups([directory.layer(name, size) for name, size in listed]):
        yield from _first(
            (Finding(Path(layer.path), text) for layer, text in disagreements(group)),
            timeline.path,
        )
    lineage = _lineage(tenant, timeline.timeline_id)
    if lineage is None:
        yield Finding(
            timeline.path,
            "reads were not tried, as files of an ancestor are damaged, missing or too old",
            is_problem=False,
        )
        return

    def count(values: int) -> None:
        state.values += values
        progress(state)

    points = [
        metadata.ancestor_lsn
        for metadata in tenant.metadata.values()
        if metadata.ancestor_id == timeline.timeline_id
    ]
    descriptors = DescriptorCache(100)
    try:
        texts = unreadable(open_timeline(lineage, tenant.files, descriptors), points, count)
        yield from _first((Finding(timeline.path, text) for text in texts), timeline.path)
    finally:
        # There may be a thousand timelines to come.
        descriptors.close_all()


def _lineage(tenant: _Tenant, timeline_id: TimelineId) -> list[ReadableTimeline] | None:
    """A timeline and its ancestors; None if one cannot be read as far as its branch needs it."""
    lineage: list[ReadableTimeline] = []
    wanted: TimelineId | None = timeline_id
    needed = 0
    while wanted is not None:
        files = tenant.files.timelines.get(wanted)
        metadata = tenant.metadata.get(wanted)
        listed = tenant.listed.get(wanted)
        circular = any(files is known.files for known in lineage)
        if files is None or metadata is None or listed is None or circular:
            return None
        if wanted in tenant.damaged or metadata.disk_consistent_lsn < needed:
            return None
        lineage.append(ReadableTimeline(files, metadata, listed))
        wanted, needed = metadata.ancestor_id, metadata.ancestor_lsn
    return lineage


def _first(findings: Iterable[Finding], path: Path) -> Iterator[Finding]:
    """The first of many findings alike."""
    for number, finding in enumerate(findings):
        if number == MAX_ALIKE:
            yield Finding(path, f"there are more problems like the {MAX_ALIKE} before")
            return
        yield finding


# ---- the command line


def run(
    path: Path,
    *,
    online: bool = False,
    names_only: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Verify and tell; the exit status: 1 if there is a problem. Raises VerifyError."""
    problems = notes = 0
    last = Progress()
    shown = 0.0

    def progress(state: Progress) -> None:
        nonlocal last, shown
        last = state
        if sys.stderr.isatty() and time.monotonic() - shown > _PROGRESS_INTERVAL:
            shown = time.monotonic()
            sys.stderr.write(f"\r\x1b[K{state}")
            sys.stderr.flush()

    def clear() -> None:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    for finding in verify(path, online=online, names_only=names_only, progress=progress):
        problems += finding.is_problem
        notes += not finding.is_problem
        clear()
        say(str(finding))
    clear()
    say(_summary(replace(last), problems, notes, online=online, names_only=names_only))
    return 1 if problems else 0


def _summary(state: Progress, problems: int, notes: int, *, online: bool, names_only: bool) -> str:
    found = f"{_count(problems, 'problem')}, {_count(notes, 'note')}"
    layers = _count(state.files_total, "layer")
    what = f"{_count(state.timelines, 'timeline')}, {layers}, {state.bytes_total / 1e6:.1f} MB"
    if names_only:
        return f"{what}, names and metadata only: {found}"
    if online:
        return f"{what}, each file by itself: {found}"
    return f"{what}, {state.values} values read: {found}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 0 all is well, 1 there is a problem, 2 it cannot be told."""
    parser = argparse.ArgumentParser(
        prog="python -m pageserver.layered_repository.verify_repository",
        description="Check every file of a repository, and that they fit together.",
        epilog="Exit status: 0 all is well, 1 there is a problem, 2 it could not be verified.",
    )
    parser.add_argument(
        "path",
        type=Path,
        help="working directory of a pageserver, or directory of a tenant or of a timeline",
    )
    parser.add_argument(
        "--online",
        action="store_true",
        help="while a pageserver runs: check each file by itself, not how they fit together",
    )
    parser.add_argument(
        "--names-only",
        action="store_true",
        help="check metadata, names and sizes of layers only: quick, however large they are",
    )
    options = parser.parse_args(argv)
    try:
        return run(options.path, online=options.online, names_only=options.names_only)
    except (VerifyError, OSError) as error:
        print(f"cannot verify: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
