"""What compaction has to do: which L0 deltas to merge, which parts need a new image, what to split.

Pure: no I/O, no clocks, no locks.

**Garbage.** An image of a part at the GC cutoff lets GC delete what lies below it: deltas whose
changes are all at or below the cutoff, and older images. Of a delta that reaches beyond the cutoff,
or that holds a retained point, only a part of the LSN range is garbage. It goes by a **split**:
what is still needed is written to new deltas, the rest is not. What an image is worth is the size
of what goes, less the size of the new image. What a split is worth is the size of what goes, and
its price is the writing of what stays. All has to be estimated from what is known without reading
layers: the sizes of their files, how many keys an image has, and which keys live.

- While WAL comes in, the cutoff moves, and a delta that reaches beyond it will soon be wholly
  below: it is split in quiet times only. Retained points stay where they are, so what is between
  them is not waited for.
- The bytes of a delta are spread evenly over its LSN range. If they are not, a split may gain
  nothing, but only once: no garbage is left in the LSN ranges of the new deltas, so they are not
  due before the cutoff or the retained points have moved.
- A file goes when *all* of its key range is covered. Its size, or what a split that would be due
  then drops of it, is charged to those parts that still have to get an image for that, in
  proportion to the live keys of its range in each: where in its range a file has its bytes is not
  known. A part that gets an image is no longer charged for anything; its share goes to the parts
  that remain, and the last one is charged with all of it. So garbage that straddles parts is
  collected in the end, and no part is due for ever because of it.
- What retained points below the cutoff hold does not go, and what images cover already goes by
  itself: nobody is charged for either.
- The new image will have the bytes of today's images for the keys that still live, file by file:
  of an image with k keys of which n live, n/k of the size. An image of which all keys live is
  therefore charged with exactly what it will take up again, whatever its pages compress to: without
  changes the gain is zero, and a new round finds nothing to do. The bytes of dead keys are gain.
- Live keys in excess of those of today's image are new; they are taken to have the average size of
  the keys in all images, also in newer ones. They are what deltas turn into when a table is loaded,
  which gains nothing.
- L0 deltas cover all keys and so wait for their merge.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Generic, TypeVar

from pageserver.layered_repository.gc_plan import (
    ImageCoverage,
    SizedLayer,
    lowest_cover,
    lowest_read,
    unneeded_ranges,
)
from pageserver.layered_repository.layer_map import LayerRange
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.layer_split import MAX_PIECES
from pageserver.layered_repository.partitioning import Part, Partitioning

PAGE_IN_LAYER: Final = 8192 + 64  # a page with its share of block header and index
_FILE_OVERHEAD: Final = 400  # bytes of a file beside its values, about
MIN_GARBAGE: Final = 1 << 20  # bytes; less is not worth an image, nor any splits
MAX_MERGED: Final = 64  # L0 deltas in one merge: bounds its memory and the room it takes on disk
_BUSY_SHARE: Final = 1.0
_QUIET_SHARE: Final = 0.1

L = TypeVar("L", bound=SizedLayer)


def l0_to_compact(
    layer_map: Iterable[L],
    *,
    threshold: int,
    cutoff: int,
    force: bool,
    quiet: bool = True,
) -> list[L]:
    """The L0 deltas to merge next, oldest first; empty if there is nothing to do.

    All of them if there are `threshold`, or by `force`. With fewer, in a `quiet` timeline, all of
    them if they take more than a tenth of what the other layers take, and 1 MiB, for they are not
    compressed; else those that begin at or below the GC cutoff, so that garbage in them can go,
    unless a split of them would not pay. While WAL comes in they wait for the threshold: merged one
    by one they would make stacks of small deltas.

    The result is one run without a gap in LSN that other deltas reach into: its merge claims to
    hold every change between its first and its last LSN. It has at most 64 layers; what is left is
    for the next call.
    """
    layers = list(layer_map)
    due = sorted(filter(_is_l0, layers), key=lambda layer: (layer.start_lsn, layer.end_lsn))
    if not force and len(due) < threshold:
        size = sum(layer.size for layer in due)
        others_size = sum(layer.size for layer in layers) - size
        if not quiet:
            due = []
        elif size <= max(_QUIET_SHARE * others_size, MIN_GARBAGE):
            due = [layer for layer in due if _below(layer, cutoff, _QUIET_SHARE)]
    chosen = set(due)
    others = [x for x in layers if not x.is_image and x not in chosen]
    run: list[L] = []
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

    That is more than the bytes of the new image (`quiet`: a tenth of them), and more than 1 MiB of
    all these parts, in whole layers and in what splits would drop that are due then. `points` are
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
    share = _QUIET_SHARE if quiet else _BUSY_SHARE
    for layer in layers:
        if _is_l0(layer) or not _in_reach(layer, cutoff, quiet):
            continue
        if not layer.is_image:
            freed = _freed_of_delta(layer, estimate.coverage, retained, cutoff, share)
        else:
            freed = layer.size if lowest_read(layer, retained, cutoff) == cutoff else 0
        if freed:
            estimate.charge(layer, freed, cutoff)
    return estimate.parts_worth(share)


def _freed_of_delta(
    layer: L, coverage: ImageCoverage[L], retained: Sequence[int], cutoff: int, share: float
) -> int:
    """The bytes of a delta that images of all its keys at the cutoff set free."""
    start = max(layer.start_lsn, retained[-1] + 1) if retained else layer.start_lsn
    end = min(layer.end_lsn, cutoff + 1)
    if start >= end:
        return 0
    ranges = unneeded_ranges(layer, coverage, retained, cutoff)
    others = [(first, stop) for first, stop in ranges if stop <= start]
    without, with_images = (
        dropped if dropped == layer.size or _pays(dropped, layer.size, share) else 0
        for dropped in (_bytes_in(layer, ranges), _bytes_in(layer, [*others, (start, end)]))
    )
    return with_images - without


@dataclass(frozen=True, slots=True)
class Split(Generic[L]):
    """A delta, and the LSN ranges [start, end) of it that are still needed, ascending."""

    layer: L
    keep: tuple[tuple[int, int], ...]


def splits_due(
    layer_map: Iterable[L], *, cutoff: int, points: Iterable[int], quiet: bool
) -> list[Split[L]]:
    """The deltas to be written anew without garbage inside them.

    Those of which more bytes can go than stay (`quiet`: a tenth of these, and also of deltas that
    reach beyond the cutoff), if that is more than 1 MiB in all. `points` are the LSNs retained
    below the cutoff. A delta of which all can go is none of them: it is left to GC. There are at
    most 16 new deltas of one; if it has more ranges of garbage the largest ones go.
    """
    layers = list(layer_map)
    coverage = ImageCoverage(layers)
    retained = sorted({point for point in points if point < cutoff})
    share = _QUIET_SHARE if quiet else _BUSY_SHARE
    splits = []
    freed = 0
    for layer in layers:
        if layer.is_image or _is_l0(layer) or not _in_reach(layer, cutoff, quiet):
            continue
        ranges = unneeded_ranges(layer, coverage, retained, cutoff)
        ranges.sort(key=lambda x: x[0] - x[1])
        ranges = sorted(ranges[: MAX_PIECES - 1])
        keep = tuple(_between(ranges, layer.start_lsn, layer.end_lsn))
        dropped = _bytes_in(layer, ranges)
        if keep and _pays(dropped, layer.size, share):
            splits.append(Split(layer, keep))
            freed += dropped
    return splits if freed > MIN_GARBAGE else []


def _below(layer: SizedLayer, cutoff: int, share: float) -> bool:
    """Whether so much of a delta is at or below the cutoff that it is worth a split."""
    end = min(layer.end_lsn, cutoff + 1)
    return layer.start_lsn < end and _pays(
        _bytes_in(layer, [(layer.start_lsn, end)]), layer.size, share
    )


def _in_reach(layer: LayerRange, cutoff: int, quiet: bool) -> bool:
    """Whether garbage in the layer is to go now.

    While WAL comes in, the cutoff moves on: what reaches beyond it will soon go without a split.
    """
    return layer.start_lsn <= cutoff if quiet else lowest_cover(layer) <= cutoff


def _pays(dropped: int, size: int, share: float) -> bool:
    """Whether a split that drops so many bytes of a file is worth the writing of the others."""
    return dropped > share * (size - dropped)


def _bytes_in(layer: SizedLayer, ranges: Iterable[tuple[int, int]]) -> int:
    """The bytes that a delta has in LSN ranges within its own."""
    lsns = sum(end - start for start, end in ranges)
    return layer.size * lsns // (layer.end_lsn - layer.start_lsn)


def _between(ranges: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What ascending ranges leave of [start, end)."""
    for first, stop in ranges:
        if start < first:
            yield start, first
        start = stop
    if start < end:
        yield start, end


class _GarbageEstimate(Generic[L]):
    """The bytes of a new image of each part at the partitioning's LSN, and those it sets free."""

    def __init__(
        self, layers: Sequence[L], partitioning: Partitioning, image_keys: Callable[[L], int] | None
    ) -> None:
        self._parts = partitioning.parts
        self.coverage = _coverage(layers, partitioning)
        self._newest_lsns = self.coverage.newest_lsns(partitioning.lsn)
        starts = [part.start for part in self._parts]
        self._part_of = [bisect_right(starts, x) - 1 for x in self.coverage.borders[:-1]]
        self._live = _live_keys(self.coverage.borders, self._parts)
        self._freed = [0.0] * len(self._parts)
        self._image_sizes = [0.0] * len(self._parts)
        self._add_image_sizes(layers, self.coverage.newest(partitioning.lsn), image_keys)

    def _add_image_sizes(
        self,
        layers: Sequence[L],
        newest: Sequence[L | None],
        image_keys: Callable[[L], int] | None,
    ) -> None:
        sums = [0, *accumulate(self._live)]
        keys: dict[L, tuple[int, int]] = {}  # in the image, and in its range now
        for image in set(newest):
            if image is not None:
                span = self.coverage.segments(image.key_start, image.key_end)
                live = sums[span.stop] - sums[span.start]
                in_image = max(live, image.size // PAGE_IN_LAYER)
                keys[image] = in_image if image_keys is None else image_keys(image), live
        known = {image: in_image for image, (in_image, _) in keys.items()}
        if image_keys is not None:
            known.update((layer, image_keys(layer)) for layer in layers if layer.is_image)
        total = sum(known.values())
        sizes = sum(max(image.size - _FILE_OVERHEAD, 0) for image in known)
        average = sizes / total if total else PAGE_IN_LAYER
        key_sizes: dict[L | None, float] = {None: average}
        for image, (in_image, live) in keys.items():
            alive = min(in_image, live)
            size = alive * image.size / in_image if alive else 0.0
            key_sizes[image] = (size + (live - alive) * average) / live if live else 0.0
        for part, live, below in zip(self._part_of, self._live, newest, strict=True):
            self._image_sizes[part] += live * key_sizes[below]

    def charge(self, layer: L, freed: int, cutoff: int) -> None:
        """Divide bytes of a layer among the parts without whose images at the cutoff they stay."""
        weights: dict[int, int] = {}
        lowest = min(lowest_cover(layer), cutoff)
        for segment in self.coverage.segments(layer.key_start, layer.key_end):
            if self._newest_lsns[segment] < lowest:
                part = self._part_of[segment]
                weights[part] = weights.get(part, 1) + self._live[segment]
        total = sum(weights.values())
        for part, weight in weights.items():
            self._freed[part] += freed * weight / total

    def parts_worth(self, share: float) -> list[Part]:
        """The parts where an image gains more than this share of its size, if that is enough."""
        gains = [freed - size for freed, size in zip(self._freed, self._image_sizes, strict=True)]
        worth = [i for i, size in enumerate(self._image_sizes) if gains[i] > share * size]
        enough = sum(gains[i] for i in worth) > MIN_GARBAGE
        return [self._parts[i] for i in worth] if enough else []


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
