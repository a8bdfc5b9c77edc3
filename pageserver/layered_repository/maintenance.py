"""The common ground of compaction and garbage collection: both take layers of a timeline away."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pageserver.failpoints import BEFORE_DELETE, BEFORE_RENAME
from pageserver.layered_repository.errors import TimelineStopped
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.metadata_keeper import Change, unchanged
from pageserver.layered_repository.timeline_dir import FinishedLayer

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline

log = logging.getLogger(__name__)


class Maintenance:
    """Lets one of them work on a timeline at a time, until the timeline stops.

    Flushing goes on beside it.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._lock = threading.Lock()
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

    def install(self, finished: Sequence[FinishedLayer]) -> list[LayerFile]:
        """Give new files their names, for `replace_layers`. If that fails none of them stays.

        Raises what MetadataKeeper.settle does.
        """
        try:
            if BEFORE_RENAME.active:
                BEFORE_RENAME.hit()
            self._timeline.metadata.settle()
        except BaseException:
            self._timeline.directory.discard(finished)
            raise
        return self._timeline.directory.install(finished)

    def replace_layers(
        self,
        add: Sequence[LayerFile],
        remove: Sequence[LayerFile],
        change: Change = unchanged,
    ) -> None:
        """Put the layers `add`, which are installed, in place of others; delete those.

        The list of layers comes first, then readers: after a crash nobody looks for a file that is
        gone, nor does a reader that starts later. Raises what MetadataKeeper.commit does.
        """
        self._timeline.metadata.commit(change, add=add, remove=remove)
        if remove and BEFORE_DELETE.active:
            BEFORE_DELETE.hit()
        for layer in remove:
            try:
                self._timeline.directory.unlink(layer)
            except OSError as error:
                # It is in no list any more: the next start removes it.
                log.warning("could not delete a layer that is not needed any more: %s", error)
        # Its space comes back when the last descriptor goes; old views may be around for long.
        self._timeline.context.resources.descriptors.close(remove)

    def count_entries(self, layer: LayerFile) -> int:
        """How many entries a layer file has: for an image, keys. Raises CorruptLayerError, OSError.

        Opens the file the first time only.
        """
        count = self._entry_counts.get(layer)
        if count is None:
            count = self._entry_counts[layer] = layer.describe()["entries"]
        return count

    def stop(self) -> None:
        """Have work end soon, and none begin."""
        self.stopping = True

    def join(self) -> None:
        """Wait until it has ended."""
        with self._lock:
            pass
