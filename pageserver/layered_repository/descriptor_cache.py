"""Bound on the layer files that are open at the same time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Final, Protocol

from pageserver.layered_repository.block_cache import BlockCache

DEFAULT_MEMORY_LIMIT: Final = 256 << 20


class Evictable(Protocol):
    """An open layer file, as the cache sees it."""

    def was_used(self) -> bool:
        """Whether it was used since the last question."""

    def evict(self) -> None:
        """Close it as soon as no reader is in it; it opens again at its next use."""


class DescriptorCache:
    """The open layer files of all timelines of a pageserver; safe for any number of threads.

    At most `limit` are kept open, and their indexes and key filters take at most `memory_limit`
    bytes. The clock algorithm chooses what to close: a file stays if it was used since the hand
    last passed it. Readers that are in a file when it is closed keep its descriptor until they are
    done. The cache does not keep layers alive.
    """

    def __init__(
        self,
        limit: int,
        *,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        blocks: BlockCache | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"at least one layer file must be open, not {limit}")
        self.limit = limit
        self.memory_limit = memory_limit
        self.blocks = blocks
        """Where reads keep the blocks of these files, None: nowhere."""
        self._memory = 0
        # In the order of the clock, the hand at the first one; with the bytes each one takes.
        # The lock is reentrant: the end of a layer may be noticed while this thread holds it.
        self._open: dict[weakref.ref[Evictable], int] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def memory(self) -> int:
        """Bytes that the indexes and filters of the open layers take."""
        return self._memory

    def admit(self, layer: Evictable, memory: int) -> None:
        """Register a layer that was just opened; others are closed if it is one too many."""
        with self._lock:
            self._open[weakref.ref(layer, self._forget)] = memory
            self._memory += memory
            # Every layer is asked twice at most: after the first round none counts as used.
            for _ in range(2 * len(self._open)):
                if len(self._open) <= self.limit and self._memory <= self.memory_limit:
                    break
                self._turn(layer)

    def close(self, layers: Iterable[Evictable]) -> None:
        """Close layers that nobody is going to read."""
        with self._lock:
            for layer in layers:
                self._memory -= self._open.pop(weakref.ref(layer), 0)
                layer.evict()

    def close_all(self) -> None:
        """Close all layers."""
        with self._lock:
            self.close([layer for reference in self._open if (layer := reference()) is not None])

    def _turn(self, admitted: Evictable) -> None:
        """Move the hand by one layer."""
        reference = next(iter(self._open))
        memory = self._open.pop(reference, None)
        if memory is None:
            return
        layer = reference()
        if layer is not None and (layer is admitted or layer.was_used()):
            self._open[reference] = memory
            return
        self._memory -= memory
        if layer is not None:
            layer.evict()

    def _forget(self, reference: weakref.ref[Evictable]) -> None:
        with self._lock:
            self._memory -= self._open.pop(reference, 0)
