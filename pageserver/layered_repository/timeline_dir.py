"""The directory of a timeline: its metadata, the list of its layers, and the layer files.

The metadata names the list, the list names the layers: what they do not lead to does not count. So
one rename, that of the metadata, moves a timeline from one state to the next as a whole:

1. New layer files are written and synced under temporary names, then renamed.
2. The new list is written and synced under a name of its own, the new metadata under a temporary
   one.
3. The directory is synced: all names are durable that the new metadata leads to.
4. The metadata is renamed into place; the directory is synced.
5. Layers and the list that do not count any more are deleted.

A crash before the rename of 4 is durable leaves the old state with everything it leads to, since
nothing of it is touched before 5; after it the new one, of which all was durable by 3. What else is
there then is a leftover: a temporary file, another list, a layer that the state does not lead to.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final

from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.errors import (
    CorruptLayerError,
    CorruptMetadataError,
    MissingFileError,
)
from pageserver.layered_repository.files import FILES, Files, temp_path
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.io_count import CountIo, not_counted
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_list import (
    ListedLayer,
    SizedLayer,
    decode_list,
    encode_list,
    list_name,
    list_number,
)
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
_FIRST_LIST: Final = 1
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
    count_io: CountIo = not_counted
    """Of layer files; asked when there is one."""

    # ---- the directory

    def exists(self) -> bool:
        """Whether the timeline is on disk."""
        return self.path.exists()

    def create(self, metadata: TimelineMetadata) -> None:
        """Make the directory of a new timeline, durably and as a whole."""
        self._create(metadata, None)

    def create_with_image(
        self,
        metadata: TimelineMetadata,
        lsn: int,
        items: Iterable[tuple[bytes, bytes]],
        *,
        compress: bool = False,
    ) -> tuple[TimelineMetadata, LayerFile]:
        """The same with an image layer of (key, data) pairs in key order at `lsn`.

        Returns the metadata with the list that has the layer, and the layer.
        """
        created, finished = self._create(
            metadata, lambda directory: self._write_image(directory, lsn, items, compress=compress)
        )
        assert finished is not None
        return created, self.layer(finished.name, finished.size)

    def _create(
        self,
        metadata: TimelineMetadata,
        write_image: Callable[[Path], FinishedLayer] | None,
    ) -> tuple[TimelineMetadata, FinishedLayer | None]:
        """Files, then their names, then the name of the directory become durable."""
        temp = self._temp_path()
        # What is here was left by attempts to make or to delete the timeline that failed.
        self.remove()
        self.files.mkdir(temp)
        finished = None
        try:
            if write_image is not None:
                finished = write_image(temp)
                metadata, data = self._list_layers(metadata, _FIRST_LIST, [finished])
                self.files.write_file(temp / list_name(_FIRST_LIST), data)
            # Its fsync of the directory comes after the names of the image and the list.
            write_metadata(temp / METADATA_FILE, metadata, self.files)
            self.files.rename(temp, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.rmtree(temp)
            raise
        self.files.fsync_dir(self.path.parent)
        return metadata, finished

    def is_half_removed(self) -> bool:
        """Whether an attempt to make or to remove the timeline failed and left files."""
        return self._temp_path().exists()

    def remove(self) -> None:
        """Delete the timeline's files; after a crash all of them are there or none counts.

        May be tried again after an error.
        """
        temp = self._temp_path()
        if temp.exists():
            self.files.fsync_dir(self.path.parent)
            self.files.rmtree(temp)
        if not self.path.exists():
            return
        self.files.rename(self.path, temp)
        try:
            # Its new name first: else a crash could leave the timeline with a part of its files.
            self.files.fsync_dir(self.path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.rename(temp, self.path)
            raise
        self.files.rmtree(temp)

    def _temp_path(self) -> Path:
        return self.path.with_name(self.path.name + TEMP_SUFFIX)

    # ---- metadata and the list of layers

    def replace_metadata(
        self,
        metadata: TimelineMetadata,
        layers: Iterable[SizedLayer] | None = None,
        number: int = 0,
    ) -> TimelineMetadata:
        """Let other metadata count, durably after a `sync`. If it fails nothing has changed.

        With `layers` their list is written before, with that number, which no list ever had: the
        one that counts must stay as it is. All that the metadata leads to, the names of installed
        layers included, is durable before its name. Returns the metadata that names the list.
        """
        temp = temp_path(self.path / METADATA_FILE)
        written: list[Path] = []
        try:
            if layers is not None:
                metadata, data = self._list_layers(metadata, number, layers)
                self.files.write_file(self.path / list_name(number), data)
                written.append(self.path / list_name(number))
            self.files.write_file(temp, metadata.encode())
            written.append(temp)
            self.files.fsync_dir(self.path)
            self.files.rename(temp, self.path / METADATA_FILE)
        except BaseException:
            for path in written:
                self.files.discard(path)
            raise
        return metadata

    def read_metadata(self) -> TimelineMetadata:
        """Raises CorruptMetadataError and FormatVersionError too."""
        return read_metadata(self.path / METADATA_FILE)

    def _list_layers(
        self, metadata: TimelineMetadata, number: int, layers: Iterable[SizedLayer]
    ) -> tuple[TimelineMetadata, bytes]:
        data, checksum = encode_list(self.tenant_id, self.timeline_id, number, layers)
        return replace(metadata, layer_list=number, layer_list_crc=checksum), data

    def read_list(self, metadata: TimelineMetadata) -> list[ListedLayer]:
        """The layers that count.

        Raises MissingFileError, CorruptMetadataError and FormatVersionError too.
        """
        if not metadata.layer_list:
            return []
        path = self.path / list_name(metadata.layer_list)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise MissingFileError(
                path,
                "without it nobody knows which layers the timeline has: restore it from a backup, "
                f"or detach timeline {self.timeline_id}",
            ) from error
        found, checksum = decode_list(data, path)
        owner = found.tenant_id, found.timeline_id, found.number, checksum
        expected = metadata.layer_list, metadata.layer_list_crc
        if owner != (self.tenant_id, self.timeline_id, *expected):
            raise CorruptMetadataError(
                path,
                0,
                f"list {found.number} of timeline {found.timeline_id} of tenant "
                f"{found.tenant_id}, checksum {checksum:08X}: not the one that the metadata names",
            )
        return found.layers

    def discard_list(self, number: int) -> None:
        """Remove a list that does not count."""
        self.files.discard(self.path / list_name(number))

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
            io=self.count_io(self.tenant_id, self.timeline_id),
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
            io=self.count_io(self.tenant_id, self.timeline_id),
        )

    def install(self, finished: Sequence[FinishedLayer]) -> list[LayerFile]:
        """Give finished files their names. If that fails none of them stays.

        The names are durable, and count, when a list has them. A file of that name that is in no
        list, left by an attempt that failed, is replaced.
        """
        try:
            # Their content was made durable by `finish`; so a name never leads to half a layer.
            for file in finished:
                self.files.rename(file.path, self.path / str(file.name))
        except BaseException:
            for file in finished:
                self.files.discard(self.path / str(file.name))
            self.discard(finished)
            raise
        return [self.layer(file.name, file.size) for file in finished]

    def discard(self, finished: Iterable[FinishedLayer | LayerFile]) -> None:
        """Drop files that are not to be installed, or were and are in no list."""
        for file in finished:
            self.files.discard(file.path)

    def unlink(self, layer: LayerFile) -> None:
        """Remove the file of a layer that no new reader will find any more."""
        # First: a reader whose view still has it must know why the file is missing.
        layer.gone = True
        self.files.unlink(layer.path)

    def sync(self) -> None:
        """Make what is seen in the directory durable."""
        self.files.fsync_dir(self.path)

    def write_frozen(self, layer: InMemoryLayer) -> list[LayerFile]:
        """Write a frozen layer: an L0 delta, and for each range of keys it deletes an image layer
        without keys. Nothing for a layer that changes nothing. They are installed, not listed yet.
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
        self,
        directory: Path,
        lsn: int,
        items: Iterable[tuple[bytes, bytes]],
        *,
        compress: bool,
    ) -> FinishedLayer:
        writer = self.new_writer(compress=compress, directory=directory)
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

    def load_layers(self, metadata: TimelineMetadata) -> list[LayerFile]:
        """The layers that count; none is opened.

        Raises MissingFileError if one is not there, CorruptLayerError if one has not the size that
        it had, and what read_list() raises; nothing is changed then. Else leftovers are removed. A
        layer beyond disk_consistent_lsn is one of them, of a flush that never finished, whose WAL
        will come again: it is set aside as `<name>.0.old`, in case somebody wants to know, until
        the next start that sets layers aside or finds it outdated.
        """
        # If the last process was killed it may not have synced what it did last. Nobody may rely on
        # the metadata, nor may a layer be deleted for another one's sake, before that is durable.
        for directory in (self.path.parent, self.path):
            self.files.fsync_dir(directory)
        listed = self.read_list(metadata)
        with os.scandir(self.path) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        self._check_listed(listed, found)
        leftovers = found.keys() - {str(layer.name) for layer in listed}
        self._tidy(sorted(leftovers), metadata)
        return [self.layer(name, size) for name, size in listed]

    def _check_listed(self, listed: Sequence[ListedLayer], found: dict[str, int]) -> None:
        missing = [layer.name for layer in listed if str(layer.name) not in found]
        if missing:
            raise MissingFileError(
                self.path / str(missing[0]),
                f"{len(missing)} of {len(listed)} layers are not there, without which reads would "
                "give old values: restore them from a backup, or detach timeline "
                f"{self.timeline_id}",
            )
        for name, size in listed:
            if found[str(name)] != size:
                raise CorruptLayerError(
                    self.path / str(name),
                    min(size, found[str(name)]),
                    f"the file has {found[str(name)]} bytes, it had {size}: restore it from a "
                    f"backup, or detach timeline {self.timeline_id}",
                )

    def _tidy(self, names: Sequence[str], metadata: TimelineMetadata) -> None:
        """Remove what the durable metadata does not lead to.

        No file is the only one that has something: each layer at or below disk_consistent_lsn is
        either one that a durable list had given up (others have what it said, or nobody may read
        it), or a new one whose list did not come to count: then those it was made of are in the
        list. Removals that a crash undoes are done again at the next start.
        """
        beyond: list[str] = []
        outdated: list[str] = []
        kept_aside: list[str] = []
        for text in names:
            name = LayerName.parse(text)
            if name is not None:
                (beyond if _is_beyond(name, metadata) else outdated).append(text)
            elif text.endswith(TEMP_SUFFIX):
                outdated.append(text)
            elif text.endswith(_OLD_SUFFIX):
                name = LayerName.parse(text.split(".")[0])
                kept = name is not None and _is_beyond(name, metadata)
                (kept_aside if kept else outdated).append(text)
            elif list_number(text) is not None:
                if list_number(text) != metadata.layer_list:
                    outdated.append(text)
            elif text != METADATA_FILE:
                log.warning("%s: not a file of this program, ignored", self.path / text)
        if beyond:
            outdated += kept_aside
        for text in outdated:
            self.files.unlink(self.path / text)
        for text in beyond:
            self._set_aside(text)

    def _set_aside(self, text: str) -> None:
        target = self.path / (text + _SET_ASIDE_SUFFIX)
        self.files.rename(self.path / text, target)
        log.info(
            "%s: newer than disk_consistent_lsn, set aside as %s", self.path / text, target.name
        )


def _is_beyond(name: LayerName, metadata: TimelineMetadata) -> bool:
    return name.end_lsn > metadata.disk_consistent_lsn + 1


def next_key(key: bytes) -> bytes:
    """The key after `key`; ValueError for the last one."""
    if key == b"\xff" * len(key):
        raise ValueError("there is no key after the last one")
    return (int.from_bytes(key, "big") + 1).to_bytes(len(key), "big")
