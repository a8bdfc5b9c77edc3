"""The directory of a timeline: its metadata file and its layer files.

A layer file gets its name only when all of it is on disk, and the directory entry is durable before
anything depends on it. Whatever a crash leaves behind is therefore a temporary file, a layer beyond
disk_consistent_lsn (neither is ever read), or a layer that others have replaced (harmless: both
say the same).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.files import FILES, Files
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.metadata import (
    METADATA_FILE,
    TimelineMetadata,
    read_metadata,
    write_metadata,
)
from zenith_utils.durable import TEMP_SUFFIX
from zenith_utils.ids import TenantId, TimelineId

_FLAGS_IMAGE: Final = 1
_SET_ASIDE_SUFFIX: Final = ".0.old"
_OLD_SUFFIX: Final = ".old"

log = logging.getLogger(__name__)

_temp_numbers = count()


@dataclass(frozen=True, slots=True)
class FinishedLayer:
    """A file that is complete and durable under its temporary path, and the name it is to get."""

    path: str
    size: int
    name: LayerName

    @classmethod
    def of(cls, writer: LayerWriter, name: LayerName) -> FinishedLayer:
        """What a writer wrote, when it is finished."""
        return cls(writer.path, Path(writer.path).stat().st_size, name)


@dataclass(frozen=True, slots=True)
class TimelineDir:
    """Where the files of one timeline are, and how they get there. Methods raise OSError."""

    path: Path
    tenant_id: TenantId
    timeline_id: TimelineId
    files: Files = FILES
    descriptors: DescriptorCache | None = None

    # ---- the directory

    def exists(self) -> bool:
        """Whether the timeline is on disk."""
        return self.path.exists()

    def create(self, metadata: TimelineMetadata) -> None:
        """Make the directory of a new timeline, durably and as a whole."""
        self._create(metadata, None)

    def create_with_image(
        self, metadata: TimelineMetadata, lsn: int, items: Iterable[tuple[bytes, bytes]]
    ) -> LayerFile:
        """The same with an image layer of (key, data) pairs in key order at `lsn`."""
        finished = self._create(metadata, (lsn, items))
        assert finished is not None
        return self.layer(finished.name, finished.size)

    def _create(
        self,
        metadata: TimelineMetadata,
        image: tuple[int, Iterable[tuple[bytes, bytes]]] | None,
    ) -> FinishedLayer | None:
        """Files, then their names, then the name of the directory become durable."""
        temp = self._temp_path()
        # What is here was left by attempts to make or to delete the timeline that failed.
        if temp.exists():
            self._clear(temp)
        self.remove()
        self.files.mkdir(temp)
        finished = None
        try:
            if image is not None:
                finished = self._write_image(temp, *image)
            # Its fsync of the directory comes after the rename of the image.
            write_metadata(temp / METADATA_FILE, metadata, self.files)
            self.files.rename(temp, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.rmtree(temp)
            raise
        self.files.fsync_dir(self.path.parent)
        return finished

    def remove(self) -> None:
        """Delete the timeline's files; after a crash all of them are there or none counts."""
        temp = self._temp_path()
        if self.path.exists():
            self.files.rename(self.path, temp)
            self._clear(temp)

    def _clear(self, temp: Path) -> None:
        # Its new name first: else a crash could leave the timeline with a part of its files.
        try:
            self.files.fsync_dir(self.path.parent)
        except BaseException:
            if not self.path.exists():
                with contextlib.suppress(OSError):
                    self.files.rename(temp, self.path)
            raise
        self.files.rmtree(temp)

    def _temp_path(self) -> Path:
        return self.path.with_name(self.path.name + TEMP_SUFFIX)

    # ---- metadata

    def write_metadata(self, metadata: TimelineMetadata) -> None:
        """Replace the metadata durably."""
        write_metadata(self.path / METADATA_FILE, metadata, self.files)

    def read_metadata(self) -> TimelineMetadata:
        """Raises CorruptMetadataError and FormatVersionError too."""
        return read_metadata(self.path / METADATA_FILE)

    # ---- layers

    def layer(self, name: LayerName, size: int | None = None) -> LayerFile:
        """The layer of that name; the file is opened and checked at its first use."""
        return LayerFile(
            self.path / str(name),
            name,
            self.tenant_id.raw,
            self.timeline_id.raw,
            descriptors=self.descriptors,
            size=size,
        )

    def new_writer(self, *, compress: bool = False, directory: Path | None = None) -> LayerWriter:
        """A new layer file under a temporary name. `finish` it, then `install`; or `abort`."""
        temp = (directory or self.path) / f"layer-{next(_temp_numbers)}{TEMP_SUFFIX}"
        return LayerWriter(
            temp,
            self.tenant_id.raw,
            self.timeline_id.raw,
            files=self.files,
            compress=compress,
        )

    def install(self, finished: Sequence[FinishedLayer]) -> list[LayerFile]:
        """Give finished files their names, durably. If that fails none of them stays."""
        if not finished:
            return []
        try:
            # Their content was made durable by `finish`; so a name never leads to half a layer.
            for file in finished:
                self.files.rename(file.path, self.path / str(file.name))
            self.files.fsync_dir(self.path)
        except BaseException:
            for file in finished:
                self._discard(self.path / str(file.name))
            self.discard(finished)
            raise
        return [self.layer(file.name, file.size) for file in finished]

    def discard(self, finished: Iterable[FinishedLayer]) -> None:
        """Drop finished files that are not to be installed."""
        for file in finished:
            self._discard(file.path)

    def _discard(self, path: str | Path) -> None:
        # What stays behind is removed at the next start, or replaced by the next attempt.
        with contextlib.suppress(OSError):
            self.files.unlink(path)

    def unlink(self, layer: LayerFile) -> None:
        """Remove the file of a layer that no new reader will find any more."""
        # First: a reader whose view still has it must know why the file is missing.
        layer.gone = True
        self.files.unlink(layer.path)

    def sync(self) -> None:
        """Make deletions durable."""
        self.files.fsync_dir(self.path)

    def write_frozen(self, layer: InMemoryLayer) -> list[LayerFile]:
        """Write a frozen layer, durably: an L0 delta, and for each range of keys it deletes an
        image layer without keys. Nothing for a layer that changes nothing.
        """
        finished: list[FinishedLayer] = []
        try:
            delta = self.new_writer()
            try:
                if delta.add_layer(layer):
                    name = LayerName.l0_delta(layer.start_lsn, layer.end_lsn)
                    delta.finish(name)
                    finished.append(FinishedLayer.of(delta, name))
                else:
                    delta.abort()
            except BaseException:
                delta.abort()
                raise
            for start, end, lsn in sorted(set(layer.tombstones())):
                finished.append(self._write_tombstone(LayerName.image(start, end, lsn)))
        except BaseException:
            self.discard(finished)
            raise
        return self.install(finished)

    def _write_tombstone(self, name: LayerName) -> FinishedLayer:
        writer = self.new_writer()
        try:
            writer.finish(name)
        except BaseException:
            writer.abort()
            raise
        return FinishedLayer.of(writer, name)

    def _write_image(
        self, directory: Path, lsn: int, items: Iterable[tuple[bytes, bytes]]
    ) -> FinishedLayer:
        writer = self.new_writer(directory=directory)
        try:
            for key, data in items:
                writer.add(key, lsn, _FLAGS_IMAGE, data)
            if writer.last_key is None or writer.first_key is None:
                raise ValueError("an image layer needs at least one key")
            name = LayerName.image(writer.first_key, next_key(writer.last_key), lsn)
            writer.finish(name)
        except BaseException:
            writer.abort()
            raise
        finished = FinishedLayer.of(writer, name)
        self.files.rename(finished.path, directory / str(name))
        return finished

    # ---- start

    def load_layers(self, disk_consistent_lsn: int) -> list[LayerFile]:
        """The layers that count; none is opened.

        Removes temporary files. A layer beyond disk_consistent_lsn was written by a flush that
        never finished, its WAL will come again: it is set aside as `<name>.0.old`, in case somebody
        wants to know, until the next start that sets layers aside or finds it outdated.
        """
        # If the last process was killed it may not have synced what it did last. Nobody may rely on
        # the metadata, nor may a layer be deleted for another one's sake, before that is durable.
        for directory in (self.path.parent, self.path):
            self.files.fsync_dir(directory)
        names: list[str] = []
        sizes: dict[str, int] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                names.append(entry.name)
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        layers: list[LayerFile] = []
        beyond: list[str] = []
        outdated: list[str] = []
        kept_aside: list[str] = []
        for text in sorted(names):
            name = LayerName.parse(text)
            if name is not None:
                if name.end_lsn > disk_consistent_lsn + 1:
                    beyond.append(text)
                else:
                    layers.append(self.layer(name, sizes[text]))
            elif text.endswith(TEMP_SUFFIX):
                outdated.append(text)
            elif text.endswith(_OLD_SUFFIX):
                aside = LayerName.parse(text.split(".")[0])
                old = aside is None or aside.end_lsn <= disk_consistent_lsn + 1
                (outdated if old else kept_aside).append(text)
            elif text != METADATA_FILE:
                log.warning("%s: not a file of this program, ignored", self.path / text)
        if beyond:
            outdated += kept_aside
        for text in outdated:
            self.files.unlink(self.path / text)
        for text in beyond:
            self._set_aside(text)
        if beyond or outdated:
            self.files.fsync_dir(self.path)
        return layers

    def _set_aside(self, text: str) -> None:
        target = self.path / (text + _SET_ASIDE_SUFFIX)
        self.files.rename(self.path / text, target)
        log.info(
            "%s: newer than disk_consistent_lsn, set aside as %s", self.path / text, target.name
        )


def next_key(key: bytes) -> bytes:
    """The key after `key`; ValueError for the last one."""
    if key == b"\xff" * len(key):
        raise ValueError("there is no key after the last one")
    return (int.from_bytes(key, "big") + 1).to_bytes(len(key), "big")
