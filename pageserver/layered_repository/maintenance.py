"""The common ground of compaction and garbage collection: both take layers of a timeline away."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pageserver.layered_repository.errors import TimelineStopped
from pageserver.layered_repository.layer_file import LayerFile

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline


class Maintenance:
    """Lets one of them work on a timeline at a time, until the timeline stops.

    Flushing goes on beside it.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._lock = threading.Lock()
        self._unsynced = False
        self._undeleted: list[LayerFile] = []
        """Files that could not be deleted: the next start would find them."""
        self._entry_counts: weakref.WeakKeyDictionary[LayerFile, int] = weakref.WeakKeyDictionary()
        self.stopping = False
        """Whether work is to end at its next step."""

    @contextmanager
    def turn(self, *, wait: bool) -> Iterator[bool]:
        """The right to replace layers; False if somebody else has it and `wait` is not wanted.

        Raises TimelineStopped.
        """
        if not self._lock.acquire(blocking=wait):
            yield False
            return
        try:
            self.check_not_stopping()
            yield True
        finally:
            self._lock.release()

    def check_not_stopping(self) -> None:
        """Raise TimelineStopped when it is time to end."""
        if self.stopping:
            raise TimelineStopped(f"timeline {self._timeline.timeline_id} is being shut down")

    def replace_layers(self, add: Sequence[LayerFile], remove: Sequence[LayerFile]) -> None:
        """Show readers the layers `add`, which are durable, in place of others; delete those.

        Readers come first: none that starts later looks for a file that is gone. A crash before the
        deletions are durable brings files back that say nothing new. Raises the first OSError of
        the deletions after trying them all; the layers do not count any more in any case, and
        `sync_removals` tries again.
        """
        self._timeline.layer_set.replace(add, remove)
        names = {layer.name for layer in add}
        self._undeleted = [layer for layer in self._undeleted if layer.name not in names]
        self._delete(remove)

    def _delete(self, layers: Sequence[LayerFile]) -> None:
        errors: list[OSError] = []
        for layer in layers:
            self._unsynced = True
            try:
                self._timeline.directory.unlink(layer)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._undeleted.append(layer)
                errors.append(error)
        if errors:
            raise errors[0]

    def count_entries(self, layer: LayerFile) -> int:
        """How many entries a layer file has: for an image, keys. Raises CorruptLayerError, OSError.

        Opens the file the first time only.
        """
        count = self._entry_counts.get(layer)
        if count is None:
            count = self._entry_counts[layer] = layer.describe()["entries"]
        return count

    def sync_removals(self) -> None:
        """Make sure that what was deleted does not come back after a crash. Raises OSError."""
        undeleted, self._undeleted = self._undeleted, []
        self._delete(undeleted)
        if self._unsynced:
            self._timeline.directory.sync()
            self._unsynced = False

    def stop(self) -> None:
        """Have work end soon, and none begin."""
        self.stopping = True

    def join(self) -> None:
        """Wait until it has ended."""
        with self._lock:
            pass
