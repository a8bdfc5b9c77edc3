"""The layers of a timeline, as they change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.reader import ReadView


class LayerSet:
    """Holds the view that readers take; each change of it is one step for them.

    Freezing, flushing, compaction and garbage collection change it from threads of their own.
    """

    __slots__ = ("_changed", "_stopped", "view", "waiting")

    view: ReadView

    def __init__(self, open_layer: InMemoryLayer, layers: Iterable[LayerFile] = ()) -> None:
        self.view = ReadView(open_layer, (), LayerMap(layers))
        self.waiting = 0
        """Writers that wait for the flush."""
        self._changed = threading.Condition()
        self._stopped = False

    def begin(self, open_layer: InMemoryLayer, layers: Iterable[LayerFile]) -> None:
        """Start over with the first layers of a timeline that was empty."""
        with self._changed:
            self.view = ReadView(open_layer, (), LayerMap(layers))

    def freeze(
        self, last_lsn: int, prev_lsn: int, new_layer: Callable[[int], InMemoryLayer]
    ) -> None:
        """Replace the open layer, which ends at `last_lsn`; by the writer, between batches.

        No I/O. Nothing happens if no record was written to it.
        """
        with self._changed:
            view = self.view
            if last_lsn >= view.open.start_lsn:
                view.open.freeze(last_lsn + 1, prev_lsn)
                frozen = (view.open, *view.frozen)
            elif view.open.max_lsn:
                frozen = view.frozen  # nothing but an aborted batch: forget it
            else:
                return
            self.view = ReadView(new_layer(last_lsn + 1), frozen, view.layers)

    def oldest_frozen(self) -> InMemoryLayer | None:
        """The layer to be flushed next."""
        frozen = self.view.frozen
        return frozen[-1] if frozen else None

    def changed(self, add: Sequence[LayerFile], remove: Sequence[LayerFile]) -> LayerMap[LayerFile]:
        """The layer files with some more and without others; nobody sees it yet.

        Whoever changes them keeps others from it until `publish`.
        """
        layers = self.view.layers
        return layers.with_changes(add=add, remove=remove) if add or remove else layers

    def publish(self, layers: LayerMap[LayerFile], *, flushed: bool) -> None:
        """Show readers these layer files; `flushed`: they have what the oldest frozen layer has."""
        with self._changed:
            view = self.view
            frozen = view.frozen[:-1] if flushed else view.frozen
            self.view = ReadView(view.open, frozen, layers)
            self._changed.notify_all()

    def wait_for_flush(self, max_frozen: Callable[[], int]) -> None:
        """Wait while more frozen layers than that wait for the disk, or until `stop`."""
        with self._changed:
            self.waiting += 1
            try:
                while len(self.view.frozen) > max_frozen() and not self._stopped:
                    self._changed.wait()
            finally:
                self.waiting -= 1

    def stop(self) -> None:
        """Nobody waits for a flush any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
