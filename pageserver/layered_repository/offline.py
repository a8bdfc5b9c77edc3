"""Looking at the files of a repository that nobody runs on: what is there, and reading it.

Nothing is changed, not even what a start would tidy up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.ephemeral_file import EPHEMERAL_PREFIX
from pageserver.layered_repository.errors import StoreError
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_list import ListedLayer, decode_list, list_number
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.memory_budget import MemoryBudget
from pageserver.layered_repository.metadata import METADATA_FILE, TimelineMetadata
from pageserver.layered_repository.page_cache import PageCache
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import TIMELINES_DIR
from pageserver.layered_repository.resources import StoreContext, StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.timeline_dir import TimelineDir
from zenith_utils.durable import TEMP_SUFFIX
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.pid_file import running_pid

TENANTS_DIR: Final = "tenants"
PID_FILE: Final = "pageserver.pid"
_TOMBSTONE_LIMIT: Final = 512  # bytes; an image that is larger has a key
_OLD_SUFFIX: Final = ".old"
_IDS_OFFSET: Final = 16  # of tenant and timeline, 16 bytes each, in the header of a layer file


@dataclass(slots=True)
class TimelineFiles:
    """The files of a timeline. `chosen`: it was asked for, not only needed by one that was."""

    path: Path
    timeline_id: TimelineId
    chosen: bool
    layers: list[tuple[LayerName, int]] = field(default_factory=list)
    """Names and sizes in bytes of the layer files there are, in the order of the names."""
    lists: list[str] = field(default_factory=list)
    """The files that list layers; the metadata names the one that counts."""
    leftovers: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def sizes(self) -> dict[LayerName, int]:
        """The sizes of the layer files by name."""
        return dict(self.layers)

    @property
    def metadata_path(self) -> Path:
        """Its metadata file."""
        return self.path / METADATA_FILE

    def directory(
        self, tenant: TenantFiles, descriptors: DescriptorCache | None = None
    ) -> TimelineDir:
        """The directory as the store sees it, except that it cannot change anything."""
        return TimelineDir(self.path, tenant.tenant_id, self.timeline_id, _READ_ONLY, descriptors)

    def layer_files(
        self, tenant: TenantFiles, descriptors: DescriptorCache | None = None
    ) -> list[LayerFile]:
        """The layers, none of them open."""
        directory = self.directory(tenant, descriptors)
        return [directory.layer(name, size) for name, size in self.layers]


@dataclass(slots=True)
class TenantFiles:
    """The timelines of a tenant that are to be looked at, with their ancestors.

    `alone`: there is but one timeline, which was taken out of its repository.
    """

    path: Path
    tenant_id: TenantId
    timelines: dict[TimelineId, TimelineFiles]
    alone: bool = False
    leftovers: list[tuple[Path, str]] = field(default_factory=list)

    def chosen(self) -> Iterator[TimelineFiles]:
        """Those that were asked for."""
        return (timeline for timeline in self.timelines.values() if timeline.chosen)


def pageserver_on(path: Path) -> int | None:
    """Number of the process of the pageserver that has a directory in use, None if none has.

    `path` is its working directory or, of a tenant or a timeline, one below. Raises OSError.
    """
    path = path.resolve()
    pid = running_pid(path / PID_FILE)
    if pid is None and path.parent.name == TIMELINES_DIR:
        path = path.parent.parent
    if pid is None and path.parent.name == TENANTS_DIR:
        pid = running_pid(path.parent.parent / PID_FILE)
    return pid


def find_tenants(path: Path) -> list[TenantFiles]:
    """What is under a directory: that of a pageserver, a tenant or a timeline.

    None of it where it is neither. Raises OSError if it cannot be listed.
    """
    path = path.resolve()
    if (path / TIMELINES_DIR).is_dir():
        return [_tenant(path, None)]
    if (path / TENANTS_DIR).is_dir():
        return list(_tenants(path / TENANTS_DIR))
    if path.parent.name == TIMELINES_DIR and _timeline_id(path) is not None:
        return [_tenant(path.parent.parent, path)]
    if (path / METADATA_FILE).exists():
        return [_lonely_timeline(path)]
    return []


def _tenants(path: Path) -> Iterator[TenantFiles]:
    for tenant in sorted(path.iterdir()):
        if tenant.name.endswith(TEMP_SUFFIX):
            leftovers = [(tenant, _what_is(tenant.name))]
            yield TenantFiles(tenant, TenantId(bytes(16)), {}, leftovers=leftovers)
        elif (tenant / TIMELINES_DIR).is_dir():
            yield _tenant(tenant, None)


def _tenant(path: Path, only: Path | None) -> TenantFiles:
    try:
        tenant_id = TenantId.parse(path.name)
    except IdParseError:
        tenant_id = TenantId(_ids_in_files(path)[0])
    tenant = TenantFiles(path, tenant_id, {})
    for timeline_path in sorted((path / TIMELINES_DIR).iterdir()):
        timeline_id = _timeline_id(timeline_path)
        if timeline_id is None:
            if only is None:
                tenant.leftovers.append((timeline_path, _what_is(timeline_path.name)))
            continue
        timeline = _timeline(timeline_path, timeline_id, only in (None, timeline_path))
        tenant.timelines[timeline_id] = timeline
    if only is None:
        for file in sorted(path.glob(f"{EPHEMERAL_PREFIX}*")):
            tenant.leftovers.append((file, "values of an open layer, useless after a crash"))
    return tenant


def _lonely_timeline(path: Path) -> TenantFiles:
    tenant_raw, timeline_raw = _ids_in_files(path)
    timeline_id = TimelineId(timeline_raw)
    timeline = _timeline(path, timeline_id, True)
    return TenantFiles(path, TenantId(tenant_raw), {timeline_id: timeline}, alone=True)


def _timeline_id(path: Path) -> TimelineId | None:
    """The timeline a directory is named after, None if it is something else."""
    try:
        return TimelineId.parse(path.name) if path.is_dir() else None
    except IdParseError:
        return None


def _timeline(path: Path, timeline_id: TimelineId, chosen: bool) -> TimelineFiles:
    timeline = TimelineFiles(path, timeline_id, chosen)
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = LayerName.parse(entry.name)
            if name is not None:
                try:
                    size = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue  # a pageserver that runs has removed it
                timeline.layers.append((name, size))
            elif list_number(entry.name) is not None:
                timeline.lists.append(entry.name)
            elif entry.name != METADATA_FILE:
                timeline.leftovers.append((path / entry.name, _what_is(entry.name)))
    return timeline


def _what_is(name: str) -> str:
    if name.endswith(TEMP_SUFFIX):
        return "temporary, left by a crash: the next start removes it"
    if name.endswith(_OLD_SUFFIX):
        return "set aside, as its flush never finished: a later start removes it"
    return "not a file of the store"


def _ids_in_files(path: Path) -> tuple[bytes, bytes]:
    """Tenant and timeline by the header of some file below a directory; zeros without one."""
    for file in path.rglob("*__*"):
        if LayerName.parse(file.name) is not None:
            with file.open("rb") as opened:
                header = opened.read(_IDS_OFFSET + 32)
            if len(header) == _IDS_OFFSET + 32:
                return header[_IDS_OFFSET : _IDS_OFFSET + 16], header[_IDS_OFFSET + 16 :]
    for file in path.rglob("layers-*"):
        # Unlike a layer, one that does not count may be half written.
        with contextlib.suppress(OSError, StoreError):
            content, _ = decode_list(file.read_bytes(), file)
            return content.tenant_id.raw, content.timeline_id.raw
    return bytes(16), bytes(16)


def may_be_tombstone(layer: LayerFile) -> bool:
    """Whether a layer is an image so small that it has next to no keys; not opened for that."""
    return layer.is_image and layer.size <= _TOMBSTONE_LIMIT


# ---- reading


class _ReadOnly(Files):
    """Refuses every change."""

    __slots__ = ()

    def _refuse(self, *_: Any) -> NoReturn:
        raise AssertionError("a repository that is only looked at must not be changed")

    create = write = fsync = rename = unlink = mkdir = rmtree = _refuse  # type: ignore[assignment]
    fsync_dir = write_file_durably = _refuse  # type: ignore[assignment]


_READ_ONLY: Final = _ReadOnly()


@dataclass(frozen=True, slots=True)
class ReadableTimeline:
    """What it takes to read from a timeline; `layers` are those that count."""

    files: TimelineFiles
    metadata: TimelineMetadata
    layers: Sequence[ListedLayer]


def open_timeline(
    lineage: Sequence[ReadableTimeline], tenant: TenantFiles, descriptors: DescriptorCache
) -> Timeline:
    """A timeline to read from, given with its ancestors, of which the last is a root.

    Values that redo would have to make read as empty.
    """
    resources = StoreResources(PageCache(0), descriptors, MemoryBudget(0), _READ_ONLY)
    context = StoreContext(StoreSettings(), _no_redo, resources, tenant.path, lambda _: [])
    timeline: Timeline | None = None
    for readable in reversed(lineage):
        directory = readable.files.directory(tenant, descriptors)
        layers = [directory.layer(name, size) for name, size in readable.layers]
        timeline = Timeline(directory, readable.metadata, context, ancestor=timeline, layers=layers)
    if timeline is None:
        raise ValueError("there is no timeline")
    return timeline


def _no_redo(needed: Sequence[ReconstructInput]) -> list[bytes]:
    return [b""] * len(needed)
