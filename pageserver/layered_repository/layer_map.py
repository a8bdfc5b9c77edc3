"""Which layer holds the newest values of a key at or below an LSN.

Pure: no I/O, no locks. A map never changes; `with_changes` makes a new one that shares what stays
the same, so a reader works on the map it took however long it needs.

Deltas over all keys (L0) are kept in one stack. The key space of the others is cut at every border
of a layer into segments; each has the stack of the layers that cover it. A search is a bisection
for the segment and two in stacks.

Two layers may overlap in LSN (what an interrupted compaction leaves behind): every delta holds all
changes of the keys in its key range that fall into its LSN range, so either answers for the
overlap, and the search never hands out an LSN twice.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY


class LayerRange(Protocol):
    """What the map needs to know of a layer; see LayerName."""

    @property
    def key_start(self) -> bytes:
        """First key of the range."""

    @property
    def key_end(self) -> bytes:
        """End of the key range, exclusive."""

    @property
    def start_lsn(self) -> int:
        """First LSN; of an image layer its LSN."""

    @property
    def end_lsn(self) -> int:
        """End of the LSN range, exclusive."""

    @property
    def is_image(self) -> bool:
        """Whether it holds the state at one LSN instead of changes."""


L = TypeVar("L", bound=LayerRange)


class _Stack(Generic[L]):
    """The layers of one segment, searchable by LSN."""

    __slots__ = ("delta_starts", "deltas", "image_lsns", "images", "layers")

    def __init__(self, layers: Iterable[L]) -> None:
        self.layers: tuple[L, ...] = tuple(layers)
        self.images = sorted((x for x in self.layers if x.is_image), key=lambda x: x.start_lsn)
        self.image_lsns = [image.start_lsn for image in self.images]
        deltas = sorted((x for x in self.layers if not x.is_image), key=lambda x: x.start_lsn)
        self.delta_starts = [delta.start_lsn for delta in deltas]
        # deltas[i]: of those that start no later than the i-th, the one that reaches furthest.
        self.deltas: list[L] = []
        for delta in deltas:
            if self.deltas and self.deltas[-1].end_lsn > delta.end_lsn:
                delta = self.deltas[-1]
            self.deltas.append(delta)

    def newest_delta(self, upper: int) -> L | None:
        """The delta that holds the greatest LSNs at or below `upper`."""
        index = bisect_right(self.delta_starts, upper)
        return self.deltas[index - 1] if index else None

    def newest_image(self, upper: int) -> L | None:
        """The image with the greatest LSN at or below `upper`."""
        index = bisect_right(self.image_lsns, upper)
        return self.images[index - 1] if index else None


class LayerMap(Generic[L]):
    """The layers of one timeline."""

    __slots__ = ("_borders", "_l0", "_layers", "_segments")

    def __init__(self, layers: Iterable[L] = ()) -> None:
        self._layers: frozenset[L] = frozenset()
        self._l0: _Stack[L] = _Stack(())
        self._borders: list[bytes] = [b""]
        self._segments: list[_Stack[L]] = [self._l0]
        new = self.with_changes(layers)
        self._layers, self._l0 = new._layers, new._l0
        self._borders, self._segments = new._borders, new._segments

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[L]:
        return iter(self._layers)

    @property
    def l0_deltas(self) -> tuple[L, ...]:
        """The deltas over all keys, in no particular order."""
        return self._l0.layers

    def with_changes(self, add: Iterable[L] = (), remove: Iterable[L] = ()) -> LayerMap[L]:
        """A map with layers added and others removed, in one step for its readers."""
        added = [layer for layer in add if layer not in self._layers]
        removed = frozenset(remove)
        new: LayerMap[L] = LayerMap.__new__(LayerMap)
        new._layers = self._layers.difference(removed).union(added)
        new._l0 = self._l0
        if any(map(_is_l0, added)) or any(map(_is_l0, removed)):
            kept = (layer for layer in self._l0.layers if layer not in removed)
            new._l0 = _Stack((*kept, *filter(_is_l0, added)))
        ranged = [layer for layer in added if not _is_l0(layer)]
        gone = [layer for layer in removed if not _is_l0(layer)]
        new._borders, new._segments = self._borders, self._segments
        if ranged or gone:
            new._borders, new._segments = list(self._borders), list(self._segments)
            new._cut(ranged)
            new._restack(ranged, gone)
        if gone:
            new._join({border for layer in gone for border in (layer.key_start, layer.key_end)})
        return new

    def _cut(self, layers: list[L]) -> None:
        """Put borders where the layers begin and end."""
        known = set(self._borders)
        fresh = {border for layer in layers for border in (layer.key_start, layer.key_end)} - known
        if not fresh:
            return
        old_borders, old_segments = self._borders, self._segments
        self._borders = sorted(known | fresh)
        self._segments = [
            old_segments[bisect_right(old_borders, border) - 1] for border in self._borders
        ]

    def _restack(self, added: list[L], removed: list[L]) -> None:
        """Rebuild the stacks of the segments that the layers cover."""
        contents: dict[int, dict[L, None]] = {}
        for layer in (*added, *removed):
            first = bisect_right(self._borders, layer.key_start) - 1
            for index in range(first, bisect_left(self._borders, layer.key_end)):
                if index not in contents:
                    contents[index] = dict.fromkeys(self._segments[index].layers)
        for layer in added:
            first = bisect_right(self._borders, layer.key_start) - 1
            for index in range(first, bisect_left(self._borders, layer.key_end)):
                contents[index][layer] = None
        for layer in removed:
            for content in contents.values():
                content.pop(layer, None)
        for index, content in contents.items():
            self._segments[index] = _Stack(content)

    def _join(self, candidates: set[bytes]) -> None:
        """Drop those of the borders that no layer needs any more."""
        borders, segments = self._borders[:1], self._segments[:1]
        for border, segment in zip(self._borders[1:], self._segments[1:], strict=True):
            if border not in candidates or set(segment.layers) != set(segments[-1].layers):
                borders.append(border)
                segments.append(segment)
        self._borders, self._segments = borders, segments

    def segment(self, key: bytes) -> int:
        """The number of the segment that holds the key."""
        return bisect_right(self._borders, key) - 1

    def segment_end(self, segment: int) -> bytes | None:
        """The first key after the segment, None for the last one."""
        return self._borders[segment + 1] if segment + 1 < len(self._borders) else None

    def search(self, segment: int, upper: int) -> tuple[L, int] | None:
        """The layer to read next for the keys of a segment, with the lowest LSN to read there.

        In [floor, upper] no other layer has to be read; go on at floor - 1. After an image the
        search is over: it holds every key that exists.
        """
        stack = self._segments[segment]
        image = stack.newest_image(upper)
        delta = stack.newest_delta(upper)
        l0 = self._l0.newest_delta(upper)
        if delta is None or (l0 is not None and l0.end_lsn > delta.end_lsn):
            delta = l0
        if image is None:
            return None if delta is None else (delta, delta.start_lsn)
        if delta is None or delta.end_lsn <= image.start_lsn + 1:
            return image, image.start_lsn
        if image.start_lsn == upper:
            return image, image.start_lsn
        return delta, max(delta.start_lsn, image.start_lsn + 1)


def _is_l0(layer: LayerRange) -> bool:
    return not layer.is_image and layer.key_start == MIN_KEY and layer.key_end == MAX_KEY
