"""What compaction has to do: which L0 deltas to merge, which parts need a new image.

Pure: no I/O, no clocks, no locks.

**Garbage.** An image of a part at the GC cutoff lets GC delete what lies below it: deltas whose
changes are all at or below the cutoff, and older images. What that is worth is the size of the
files that go, less the size of the new image. Both have to be estimated from what is known without
reading layers: the sizes of their files, how many keys an image has, and which keys live.

- A file goes when *all* of its key range is covered. Its size is charged to those parts that still
  have to get an image for that, in proportion to the live keys of its range in each: where in its
  range a file has its bytes is not known. A part that gets an image is no longer charged for
  anything; its share goes to the parts that remain, and the last one is charged with all of it. So
  garbage that straddles parts is collected in the end, and no part is due for ever because of it.
- What retained points below the cutoff hold does not go, and what images cover already goes by
  itself: nobody is charged for either.
- The new image will have the bytes of today's images for the keys that still live, file by file:
  of an image with k keys of which n live, n/k of the size. An image of which all keys live is
  therefore charged with exactly what it will take up again, whatever its pages compress to: without
  changes the gain is zero, and a new round finds nothing to do. The bytes of dead keys are gain.
- Live keys in excess of those of today's image are new; they are taken to have the average size.
  They are what deltas turn into when a table is loaded, which gains nothing.
- L0 deltas cover all keys and so wait for their merge.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Final, Generic, TypeVar

from pageserver.layered_repository.gc_plan import (
    ImageCoverage,
    SizedLayer,
    lowest_cover,
    lowest_read,
)
from pageserver.layered_repository.layer_map import LayerRange
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.partitioning import Part, Partitioning

PAGE_IN_LAYER: Final = 8192 + 64  # a page with its share of block header and index
MIN_GARBAGE: Final = 1 << 20  # bytes; less is not worth an image
MAX_MERGED: Final = 64  # L0 deltas in one merge: bounds its memory and the room it takes on disk
_BUSY_SHARE: Final = 1.0
_QUIET_SHARE: Final = 0.1

L = TypeVar("L", bound=SizedLayer)
R = TypeVar("R", bound=LayerRange)


def l0_to_compact(
    layer_map: Iterable[R],
    *,
    threshold: int,
    cutoff: int,
    force: bool,
    quiet: bool = True,
) -> list[R]:
    """The L0 deltas to merge next, oldest first; empty if there is nothing to do.

    All of them if there are `threshold`, or by `force`; with fewer, in a `quiet` timeline, those
    wholly at or below the GC cutoff, so that garbage in them can go. While WAL comes in these wait
    for the threshold: merged one by one they would make stacks of small deltas.

    The result is one run without a gap in LSN that other deltas reach into: its merge claims to
    hold every change between its first and its last LSN. It has at most 64 layers; what is left is
    for the next call.
    """
    layers = list(layer_map)
    due = sorted(filter(_is_l0, layers), key=lambda layer: (layer.start_lsn, layer.end_lsn))
    if not force and len(due) < threshold:
        due = [layer for layer in due if quiet and layer.end_lsn <= cutoff + 1]
    chosen = set(due)
    others = [x for x in layers if not x.is_image and x not in chosen]
    run: list[R] = []
    end_lsn = 0
    for layer in due[:MAX_MERGED]:
        gap = range(end_lsn, layer.start_lsn) if run else range(0)
        if gap and any(x.start_lsn < gap.stop and x.end_lsn > gap.start for x in others):
            break
        run.append(layer)
        end_lsn = max(end_lsn, layer.end_lsn)
    return run


def images_due(layer_map: Iterable[L], partitioning: Partitioning, *, threshold: int) -> list[Part]:
    """The parts for which reads go through too many deltas.

    Somewhere in such a part `threshold` ranged deltas lie over the newest image, all of them at or
    below the partitioning's LSN: an image there puts them all behind itself, so the part is not due
    again before there are new ones.
    """
    layers = list(layer_map)
    coverage = _coverage(layers, partitioning)
    newest = coverage.newest_lsns(partitioning.lsn)
    depths = [0] * len(coverage)
    for layer in layers:
        if layer.is_image or _is_l0(layer) or lowest_cover(layer) > partitioning.lsn:
            continue
        for segment in coverage.segments(layer.key_start, layer.key_end):
            if newest[segment] < lowest_cover(layer):
                depths[segment] += 1
    due = []
    for part in partitioning.parts:
        span = coverage.segments(part.start, part.end)
        if max(depths[span.start : span.stop]) >= threshold:
            due.append(part)
    return due


def garbage_images_due(
    layer_map: Iterable[L],
    partitioning: Partitioning,
    *,
    cutoff: int,
    points: Iterable[int],
    quiet: bool,
    image_keys: Callable[[L], int] | None = None,
) -> list[Part]:
    """The parts of which an image at the GC cutoff sets enough free.

    That is more than the bytes of the new image (`quiet`: a tenth of them) and 1 MiB. `points` are
    the LSNs retained below the cutoff. `image_keys` gives the number of keys of an image; without
    it keys that have died show only where an image is too large for whole pages of those that live.

    The images have to be made of these parts, at the cutoff. Raises ValueError unless that is the
    LSN of the partitioning: keys that lived there and were deleted since would be missing in them.
    """
    if partitioning.lsn != cutoff:
        raise ValueError(
            f"a partitioning at LSN {partitioning.lsn:X} is of no use for images at {cutoff:X}"
        )
    layers = list(layer_map)
    estimate = _GarbageEstimate(layers, partitioning, image_keys)
    retained = sorted({point for point in points if point < cutoff})
    for layer in layers:
        freed_by_image = lowest_cover(layer) <= cutoff and not _is_l0(layer)
        if freed_by_image and lowest_read(layer, retained, cutoff) == cutoff:
            estimate.charge(layer)
    return estimate.parts_worth(_QUIET_SHARE if quiet else _BUSY_SHARE)


class _GarbageEstimate(Generic[L]):
    """The bytes of a new image of each part at the partitioning's LSN, and those it sets free."""

    def __init__(
        self, layers: Sequence[L], partitioning: Partitioning, image_keys: Callable[[L], int] | None
    ) -> None:
        self._parts = partitioning.parts
        self._coverage = _coverage(layers, partitioning)
        self._newest_lsns = self._coverage.newest_lsns(partitioning.lsn)
        starts = [part.start for part in self._parts]
        self._part_of = [bisect_right(starts, x) - 1 for x in self._coverage.borders[:-1]]
        self._live = _live_keys(self._coverage.borders, self._parts)
        self._freed = [0.0] * len(self._parts)
        self._image_sizes = [0.0] * len(self._parts)
        self._add_image_sizes(self._coverage.newest(partitioning.lsn), image_keys)

    def _add_image_sizes(
        self, newest: Sequence[L | None], image_keys: Callable[[L], int] | None
    ) -> None:
        sums = [0, *accumulate(self._live)]
        keys: dict[L, tuple[int, int]] = {}  # in the image, and in its range now
        for image in set(newest):
            if image is not None:
                span = self._coverage.segments(image.key_start, image.key_end)
                live = sums[span.stop] - sums[span.start]
                in_image = max(live, image.size // PAGE_IN_LAYER)
                keys[image] = in_image if image_keys is None else image_keys(image), live
        total = sum(in_image for in_image, _ in keys.values())
        average = sum(image.size for image in keys) / total if total else PAGE_IN_LAYER
        key_sizes: dict[L | None, float] = {None: average}
        for image, (in_image, live) in keys.items():
            known = min(in_image, live)
            size = known * image.size / in_image if known else 0.0
            key_sizes[image] = (size + (live - known) * average) / live if live else 0.0
        for part, live, below in zip(self._part_of, self._live, newest, strict=True):
            self._image_sizes[part] += live * key_sizes[below]

    def charge(self, layer: L) -> None:
        """Divide the size of a layer among the parts without which it cannot go."""
        weights: dict[int, int] = {}
        lowest = lowest_cover(layer)
        for segment in self._coverage.segments(layer.key_start, layer.key_end):
            if self._newest_lsns[segment] < lowest:
                part = self._part_of[segment]
                weights[part] = weights.get(part, 1) + self._live[segment]
        total = sum(weights.values())
        for part, weight in weights.items():
            self._freed[part] += layer.size * weight / total

    def parts_worth(self, share: float) -> list[Part]:
        """The parts where an image gains more than this share of its own size."""
        return [
            part
            for part, freed, size in zip(self._parts, self._freed, self._image_sizes, strict=True)
            if freed - size > max(share * size, MIN_GARBAGE)
        ]


def _live_keys(borders: Sequence[bytes], parts: Iterable[Part]) -> list[int]:
    """How many keys live between each border and the next."""
    counts = [0] * (len(borders) - 1)
    for part in parts:
        for start, end in part.ranges:
            segment = bisect_right(borders, start) - 1
            while start < end:
                stop = min(end, borders[segment + 1])
                counts[segment] += int.from_bytes(stop, "big") - int.from_bytes(start, "big")
                start = stop
                segment += 1
    return counts


def _coverage(layers: Iterable[L], partitioning: Partitioning) -> ImageCoverage[L]:
    return ImageCoverage(layers, (MIN_KEY, MAX_KEY, *(part.start for part in partitioning.parts)))


def _is_l0(layer: LayerRange) -> bool:
    return not layer.is_image and layer.key_start == MIN_KEY and layer.key_end == MAX_KEY
