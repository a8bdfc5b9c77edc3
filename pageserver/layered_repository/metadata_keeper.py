"""The metadata of a timeline in memory and on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.timeline_dir import TimelineDir


class MetadataKeeper:
    """Flush and garbage collection change it from threads of their own, each other fields."""

    __slots__ = ("_created", "_directory", "_lock", "current")

    current: TimelineMetadata
    """What is on disk, or will be when the timeline gets there."""

    def __init__(self, directory: TimelineDir, metadata: TimelineMetadata) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._created = directory.exists()
        self.current = metadata

    def update(self, change: Callable[[TimelineMetadata], TimelineMetadata]) -> None:
        """Change it, durably if the timeline is on disk. Raises OSError: nothing changed then."""
        with self._lock:
            new = change(self.current)
            if new != self.current and self._created:
                self._directory.write_metadata(new)
            self.current = new

    def create(self) -> None:
        """Put the timeline on disk, unless it is there. Raises OSError."""
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
            self.current = create()
            self._created = True
