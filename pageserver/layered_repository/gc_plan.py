"""Which layers no read needs any more.

Pure: no I/O, no locks. Reads happen at LSNs from the cutoff on and at the points that are retained
below it (where branches begin, leases, reads in progress). A read of a key at `r` needs the newest
image at or below `r` that covers the key, and of the deltas what is newer than this image. So a
layer is of no use at `r` if images that are newer than everything in it, but not newer than `r`,
cover its key range; it may go if that holds for every `r` at or above its first LSN. The lowest
such `r` decides: the images that cover the layer there do so at every higher one.

No layer that some read needs satisfies this, whatever else exists. So it does not matter in which
order the layers go, nor if only some of them do, nor if layers overlap.

The same rule says which LSN ranges of a delta are of no use although all of it is: it could be cut
into deltas of which some may go. Between one read and the next it is of no use up to the lowest of
the images that its keys are read from. Compaction splits deltas there; see `unneeded_ranges`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, Protocol, TypeVar

from pageserver.layered_repository.layer_map import LayerRange

_NO_IMAGE: Final = -1
_EMPTY_IMAGE_LIMIT: Final = 4096  # a file that is larger holds something


class SizedLayer(LayerRange, Protocol):
    """A layer with the size of its file."""

    @property
    def size(self) -> int:
        """Bytes of the file."""


L = TypeVar("L", bound=SizedLayer)


@dataclass(frozen=True, slots=True)
class GcResult:
    """How many layers there were, and for how many of them the first reason to stay was which.

    layers_needed_by_cutoff: they reach beyond the cutoff. layers_needed_by_branches: a retained
    point below the cutoff needs them. layers_not_updated: images do not cover them yet.
    """

    layers_total: int
    layers_needed_by_cutoff: int
    layers_needed_by_branches: int
    layers_not_updated: int
    layers_removed: int


@dataclass(frozen=True, slots=True)
class GcPlan(Generic[L]):
    """What to delete.

    All of it goes in one step of the list of layers. `remove` could as well go one by one, in any
    order; `tombstones` (empty images that hide nothing) not before what they hid is gone for good.
    """

    remove: list[L]
    tombstones: list[L]
    counters: GcResult


class ImageCoverage(Generic[L]):
    """Where in the key space which images are the newest.

    The key space is cut at the borders of all layers, and at further ones, into segments; `borders`
    are their first keys and the end of the last.
    """

    __slots__ = ("_images", "_index", "_newest_lsns", "borders")

    def __init__(self, layers: Iterable[L], borders: Iterable[bytes] = ()) -> None:
        known = set(borders)
        self._images: list[L] = []
        for layer in layers:
            known.add(layer.key_start)
            known.add(layer.key_end)
            if layer.is_image:
                self._images.append(layer)
        self._images.sort(key=lambda image: image.start_lsn)
        self.borders = sorted(known)
        self._index = {border: i for i, border in enumerate(self.borders)}
        self._newest_lsns: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return max(len(self.borders) - 1, 0)

    def segments(self, key_start: bytes, key_end: bytes) -> range:
        """The segments of a range between two of the borders."""
        return range(self._index[key_start], self._index[key_end])

    def newest(self, upper: int) -> list[L | None]:
        """Of each segment the newest image at or below `upper`."""
        newest: list[L | None] = [None] * len(self)
        for image in self._images:
            if image.start_lsn > upper:
                break
            span = self.segments(image.key_start, image.key_end)
            newest[span.start : span.stop] = [image] * len(span)
        return newest

    def newest_lsns(self, upper: int) -> list[int]:
        """Of each segment the LSN of the newest image at or below `upper`, -1 without one."""
        known = self._newest_lsns.get(upper)
        if known is None:
            known = [
                _NO_IMAGE if image is None else image.start_lsn for image in self.newest(upper)
            ]
            self._newest_lsns[upper] = known
        return known

    def covers(self, layer: L, upper: int) -> bool:
        """Whether images at or below `upper` make the layer superfluous for reads at `upper`."""
        span = self.segments(layer.key_start, layer.key_end)
        return min(self.newest_lsns(upper)[span.start : span.stop]) >= lowest_cover(layer)


def unneeded_ranges(
    layer: L, coverage: ImageCoverage[L], retained: Sequence[int], cutoff: int
) -> list[tuple[int, int]]:
    """The LSN ranges [start, end) of a delta that `plan_gc` would let go as layers of their own.

    They ascend; `retained` are the points below the cutoff, ascending. Whoever drops what is in
    them makes the cutoff durable first, as for the deletion of layers.
    """
    span = coverage.segments(layer.key_start, layer.key_end)
    ranges: list[tuple[int, int]] = []
    start = layer.start_lsn
    for read in (*retained[bisect_left(retained, start) :], cutoff):
        if start >= layer.end_lsn:
            break
        end = min(min(coverage.newest_lsns(read)[span.start : span.stop]) + 1, layer.end_lsn)
        if start < end:
            ranges.append((start, end))
        start = max(start, read + 1)
    return ranges


def lowest_cover(layer: LayerRange) -> int:
    """The LSN from which on an image holds everything that the layer says.

    For a delta that of its last possible change, for an image the one after its own.
    """
    return layer.end_lsn if layer.is_image else layer.end_lsn - 1


def plan_gc(
    layer_map: Iterable[L],
    *,
    cutoff: int,
    points: Iterable[int],
    has_ancestor: bool,
    disk_consistent_lsn: int,
    is_empty: Callable[[L], bool] | None = None,
) -> GcPlan[L]:
    """Choose the layers that reads at or above `cutoff`, and at `points` below it, do not need.

    `is_empty` says whether an image has no entries (it may do I/O, and is asked about few, small
    files); without it tombstones that hide nothing stay until a newer image covers them. Images
    beyond `disk_consistent_lsn` do not count: after a crash they would be set aside.
    """
    layers = sorted(layer_map, key=_age)
    coverage = ImageCoverage(layers)
    retained = sorted({point for point in points if point < cutoff})
    fates: dict[L, _Fate] = {}
    for layer in layers:
        fates[layer] = _fate(layer, coverage, cutoff, retained, disk_consistent_lsn)
    remove = [layer for layer, fate in fates.items() if fate is _Fate.GO]
    tombstones: list[L] = []
    if is_empty is not None and not has_ancestor:
        hiding_nothing = _small_images_at_the_bottom(coverage, layers)
        tombstones = [x for x in hiding_nothing if fates[x] is not _Fate.GO and is_empty(x)]
        fates.update((layer, _Fate.GO) for layer in tombstones)
    counts = Counter(fates.values())
    counters = GcResult(
        layers_total=len(layers),
        layers_needed_by_cutoff=counts[_Fate.NEEDED_BY_CUTOFF],
        layers_needed_by_branches=counts[_Fate.NEEDED_BY_BRANCHES],
        layers_not_updated=counts[_Fate.NOT_UPDATED],
        layers_removed=counts[_Fate.GO],
    )
    return GcPlan(remove, tombstones, counters)


class _Fate(Enum):
    GO = 0
    NEEDED_BY_CUTOFF = 1
    NEEDED_BY_BRANCHES = 2
    NOT_UPDATED = 3


def _fate(
    layer: L,
    coverage: ImageCoverage[L],
    cutoff: int,
    retained: Sequence[int],
    disk_consistent_lsn: int,
) -> _Fate:
    if lowest_cover(layer) > cutoff:
        return _Fate.NEEDED_BY_CUTOFF
    point = lowest_read(layer, retained, cutoff)
    if coverage.covers(layer, min(point, disk_consistent_lsn)):
        return _Fate.GO
    return _Fate.NEEDED_BY_BRANCHES if point < cutoff else _Fate.NOT_UPDATED


def lowest_read(layer: LayerRange, retained: Sequence[int], cutoff: int) -> int:
    """The lowest LSN to be read at that may need the layer; `retained`: points below the cutoff."""
    at = bisect_left(retained, layer.start_lsn)
    return retained[at] if at < len(retained) else cutoff


def _small_images_at_the_bottom(coverage: ImageCoverage[L], layers: Sequence[L]) -> list[L]:
    """Images with nothing below them, small enough to be empty.

    All layers count that exist now, also those about to go: a tombstone goes a round later than
    what it hid.
    """
    lowest = [0] * len(coverage)
    # An image hides deltas from their first LSN at its own LSN or below, and older images.
    for layer in sorted(layers, key=_first_hidden_from, reverse=True):
        span = coverage.segments(layer.key_start, layer.key_end)
        lowest[span.start : span.stop] = [_first_hidden_from(layer)] * len(span)
    found = []
    for layer in layers:
        if layer.is_image and layer.size <= _EMPTY_IMAGE_LIMIT:
            span = coverage.segments(layer.key_start, layer.key_end)
            if min(lowest[span.start : span.stop]) > layer.start_lsn:
                found.append(layer)
    return found


def _first_hidden_from(layer: LayerRange) -> int:
    return layer.start_lsn + 1 if layer.is_image else layer.start_lsn


def _age(layer: LayerRange) -> tuple[int, int, bytes, bytes]:
    return layer.start_lsn, layer.end_lsn, layer.key_start, layer.key_end
