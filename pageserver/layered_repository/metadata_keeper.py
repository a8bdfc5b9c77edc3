"""The durable state of a timeline: its metadata and which layers it has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_set import LayerSet
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.timeline_dir import TimelineDir

Change = Callable[[TimelineMetadata], TimelineMetadata]


def unchanged(metadata: TimelineMetadata) -> TimelineMetadata:
    """No change."""
    return metadata


class MetadataKeeper:
    """The one place where that state changes: flush, compaction and garbage collection do it from
    threads of their own, one after the other here.

    Each change is one step on disk, see timeline_dir.py; after it, and only then, readers see it.
    """

    __slots__ = (
        "_created",
        "_directory",
        "_in_doubt",
        "_layer_set",
        "_lists",
        "_lock",
        "_next_list",
        "current",
    )

    current: TimelineMetadata
    """What is on disk, or will be when the timeline gets there."""

    def __init__(
        self, directory: TimelineDir, metadata: TimelineMetadata, layer_set: LayerSet
    ) -> None:
        self._directory = directory
        self._layer_set = layer_set
        self._lock = threading.Lock()
        self._created = directory.exists()
        self._begin(metadata)

    def _begin(self, metadata: TimelineMetadata) -> None:
        self.current = metadata
        self._lists = {metadata.layer_list}
        """Numbers of the lists that may be on disk."""
        self._next_list = metadata.layer_list + 1
        self._in_doubt = False
        """Whether a crash may leave other metadata than `current`: a replacement failed."""

    def commit(
        self,
        change: Change = unchanged,
        *,
        add: Sequence[LayerFile] = (),
        remove: Sequence[LayerFile] = (),
        flushed: bool = False,
    ) -> None:
        """Change metadata and layers, durably if the timeline is on disk, then for readers.

        `add` are installed. `flushed`: they are the oldest frozen layer. Raises OSError, and what
        TimelineDir.read_metadata does: nothing changed then as far as this process can see, and the
        files of `add` are gone, unless it is in doubt which state a crash would leave.
        """
        with self._lock:
            layers = self._layer_set.changed(add, remove)
            try:
                self._settle()
                metadata = change(self.current)
                if add or remove:
                    metadata = self._write(metadata, layers)
                elif metadata != self.current:
                    metadata = self._write(metadata, None)
            except BaseException:
                if not self._in_doubt:
                    self._directory.discard(add)
                raise
            self.current = metadata
            self._layer_set.publish(layers, flushed=flushed)
            self._forget_lists(metadata.layer_list)

    def settle(self) -> None:
        """Make sure that a crash leaves what is known here, after a change that failed.

        Whoever is about to install files calls it before: the list that may count on disk may have
        names of theirs, with other sizes. Raises what `commit` does.
        """
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        if not self._in_doubt:
            return
        # After this what is seen is durable, whichever state it is.
        self._directory.sync()
        seen = self._directory.read_metadata()
        self._forget_lists(seen.layer_list)
        if seen != self.current:
            self.current = self._write(self.current, self._layer_set.view.layers)
            self._forget_lists(self.current.layer_list)
        self._in_doubt = False

    def _write(
        self, metadata: TimelineMetadata, layers: LayerMap[LayerFile] | None
    ) -> TimelineMetadata:
        """The next state, on disk; `layers` if they are others than in the last. Returns it."""
        if not self._created:
            return metadata
        number = self._next_list
        self._next_list += 1
        metadata = self._directory.replace_metadata(metadata, layers, number)
        self._lists.add(metadata.layer_list)
        # If this fails a crash may leave either state: nothing may go that one of them needs.
        self._in_doubt = True
        self._directory.sync()
        self._in_doubt = False
        return metadata

    def _forget_lists(self, keep: int) -> None:
        """Remove all lists but one."""
        for number in self._lists - {0, keep}:
            self._directory.discard_list(number)
        self._lists = {keep}

    def create(self) -> None:
        """Put the timeline on disk, unless it is there. Raises OSError."""
        if self._created:
            return
        with self._lock:
            if not self._created:
                self._directory.create(self.current)
                self._created = True

    def create_with(self, create: Callable[[], TimelineMetadata]) -> None:
        """Put the timeline on disk by a function that returns the metadata it has then.

        Raises ValueError if it is there, and what the function raises.
        """
        with self._lock:
            if self._created:
                raise ValueError(f"timeline {self._directory.timeline_id} is not empty")
            self._begin(create())
            self._created = True
