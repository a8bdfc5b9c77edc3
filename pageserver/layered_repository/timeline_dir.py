"""The directory of a timeline: its metadata file and its layer files.

A layer file gets its name only when all of it is on disk, and the directory entry is durable before
the metadata says so. Whatever a crash leaves behind is therefore either a temporary file or a layer
beyond disk_consistent_lsn, and neither is ever read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
from zenith_utils.durable import TEMP_SUFFIX, fsync_dir, is_temp_file
from zenith_utils.ids import TenantId, TimelineId

_FLAGS_IMAGE: Final = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TimelineDir:
    """Where the files of one timeline are, and how they get there."""

    path: Path
    tenant_id: TenantId
    timeline_id: TimelineId

    def exists(self) -> bool:
        """Whether the timeline is on disk."""
        return self.path.exists()

    def create(self, metadata: TimelineMetadata) -> None:
        """Make the directory of a new timeline, durably and as a whole. Raises OSError."""
        temp = self._new_temp_dir()
        try:
            write_metadata(temp / METADATA_FILE, metadata)
            self._put_in_place(temp)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise

    def create_with_image(
        self, metadata: TimelineMetadata, lsn: int, items: Iterable[tuple[bytes, bytes]]
    ) -> LayerFile:
        """The same with an image layer of (key, data) pairs in key order at `lsn`."""
        temp = self._new_temp_dir()
        try:
            name = self._write_image(temp, lsn, items)
            write_metadata(temp / METADATA_FILE, metadata)
            self._put_in_place(temp)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        return self.layer(name)

    def _new_temp_dir(self) -> Path:
        temp = self.path.with_name(self.path.name + TEMP_SUFFIX)
        if temp.exists():
            shutil.rmtree(temp)
        temp.mkdir(parents=True)
        return temp

    def _put_in_place(self, temp: Path) -> None:
        """Files, then their names, then the name of the directory become durable."""
        fsync_dir(temp)
        temp.rename(self.path)
        fsync_dir(self.path.parent)

    def remove(self) -> None:
        """Delete the timeline's files; after a crash all of them are there or none counts."""
        temp = self.path.with_name(self.path.name + TEMP_SUFFIX)
        if self.path.exists():
            self.path.rename(temp)
            fsync_dir(self.path.parent)
            shutil.rmtree(temp)

    def write_metadata(self, metadata: TimelineMetadata) -> None:
        """Replace the metadata durably. Raises OSError."""
        write_metadata(self.path / METADATA_FILE, metadata)

    def read_metadata(self) -> TimelineMetadata:
        """Raises OSError, CorruptMetadataError."""
        return read_metadata(self.path / METADATA_FILE)

    def layer(self, name: LayerName) -> LayerFile:
        """The layer of that name; the file is opened and checked at its first use."""
        return LayerFile(self.path / str(name), name, self.tenant_id.raw, self.timeline_id.raw)

    def write_delta(self, layer: InMemoryLayer) -> LayerFile | None:
        """Write a frozen layer as an L0 delta, durably; None if it holds no value.

        Raises OSError; the directory is then as it was.
        """
        name = LayerName.l0_delta(layer.start_lsn, layer.end_lsn)
        temp = self.path / (str(name) + TEMP_SUFFIX)
        writer = LayerWriter(temp, self.tenant_id.raw, self.timeline_id.raw)
        try:
            if writer.add_layer(layer) == 0:
                writer.abort()
                return None
            writer.finish(name)
        except BaseException:
            writer.abort()
            raise
        temp.rename(self.path / str(name))
        fsync_dir(self.path)
        return self.layer(name)

    def _write_image(
        self, directory: Path, lsn: int, items: Iterable[tuple[bytes, bytes]]
    ) -> LayerName:
        temp = directory / f"image{TEMP_SUFFIX}"
        writer = LayerWriter(temp, self.tenant_id.raw, self.timeline_id.raw)
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
        temp.rename(directory / str(name))
        return name

    def load_layers(self, disk_consistent_lsn: int) -> list[LayerFile]:
        """The layers that count.

        Removes temporary files. A layer beyond disk_consistent_lsn was written by a flush that
        never finished, its WAL will come again: it is set aside as `<name>.<n>.old`.
        """
        layers = []
        changed = False
        for path in sorted(self.path.iterdir()):
            if is_temp_file(path):
                path.unlink()
                changed = True
                continue
            name = LayerName.parse(path.name)
            if name is None:
                if path.name != METADATA_FILE and path.suffix != ".old":
                    log.warning("%s: not a file of this program, ignored", path)
            elif name.end_lsn > disk_consistent_lsn + 1:
                _set_aside(path)
                changed = True
            else:
                layers.append(self.layer(name))
        if changed:
            fsync_dir(self.path)
        return layers


def _set_aside(path: Path) -> None:
    number = 0
    while (target := path.with_name(f"{path.name}.{number}.old")).exists():
        number += 1
    path.rename(target)
    log.info("%s: newer than disk_consistent_lsn, set aside as %s", path, target.name)


def next_key(key: bytes) -> bytes:
    """The key after `key`; ValueError for the last one."""
    if key == b"\xff" * len(key):
        raise ValueError("there is no key after the last one")
    return (int.from_bytes(key, "big") + 1).to_bytes(len(key), "big")
