"""The read path: newest layer to oldest, then the ancestor at the branch point, then redo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pageserver.layered_repository.errors import KeyNotFound, MissingBaseError, StoreError
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.read_batch import ReadBatch
from zenith_utils.lsn import lsn_text

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline

_WILL_INIT: Final = 1
_FLAGS_IMAGE: Final = 1


@dataclass(frozen=True, slots=True)
class ReadView:
    """All layers of a timeline at one moment; readers keep the view they started with."""

    open: InMemoryLayer
    frozen: tuple[InMemoryLayer, ...]  # newest first
    layers: LayerMap[LayerFile]


@dataclass(frozen=True, slots=True)
class ReconstructInput:
    """What a value is made of: `records` (lsn, flags, data), oldest first, applied to `base`.

    `base` is None if the oldest record initialises the value. `lsn` is that of the newest record.
    """

    key: bytes
    lsn: int
    base: bytes | None
    records: list[tuple[int, int, bytes]]


Reconstruct = Callable[[Sequence[ReconstructInput]], list[bytes]]


def get(timeline: Timeline, key: bytes, lsn: int) -> bytes:
    """The value of a key; see Timeline.get."""
    batch = ReadBatch([key])
    cached = timeline.cached(key, lsn)
    if cached is not None:
        batch.set_floor(0, cached[0])
    collect(timeline, batch, lsn)
    value = batch.image(0)
    if value is not None:
        return value
    needed = _reconstruct_input(batch, 0, cached, lsn)
    if needed is None:
        raise KeyNotFound(
            f"could not find data for key {key.hex().upper()} of timeline {timeline.timeline_id} "
            f"for request at LSN {lsn_text(lsn)}"
        )
    if not needed.records and needed.base is not None:
        return needed.base
    return _reconstruct(timeline, [needed])[0]


def get_vectored(timeline: Timeline, keys: Sequence[bytes], lsn: int) -> list[bytes | None]:
    """The values of many keys; see Timeline.get_vectored."""
    ordered = sorted(set(keys))
    batch = ReadBatch(ordered)
    cached = [timeline.cached(key, lsn) for key in ordered]
    for i, version in enumerate(cached):
        if version is not None:
            batch.set_floor(i, version[0])
    collect(timeline, batch, lsn)
    values: dict[bytes, bytes] = {}
    needed: list[ReconstructInput] = []
    for i, key in enumerate(ordered):
        value = batch.image(i)
        if value is None:
            item = _reconstruct_input(batch, i, cached[i], lsn)
            if item is None:
                continue
            if item.records or item.base is None:
                needed.append(item)
                continue
            value = item.base
        values[key] = value
    if needed:
        for item, value in zip(needed, _reconstruct(timeline, needed), strict=True):
            values[item.key] = value
    return [values.get(key) for key in keys]


def _reconstruct_input(
    batch: ReadBatch, i: int, cached: tuple[int, bytes] | None, lsn: int
) -> ReconstructInput | None:
    """What is needed to make the value of query `i`; None if there is no such key."""
    key = batch.key(i)
    records = batch.values(i)
    if not records:
        return None if cached is None else ReconstructInput(key, cached[0], cached[1], [])
    oldest_flags = records[0][1]
    base = None
    if oldest_flags == _FLAGS_IMAGE:
        base = records.pop(0)[2]
    elif not oldest_flags & _WILL_INIT:
        if cached is None:
            raise MissingBaseError(
                f"Base image for {key.hex().upper()} at {lsn_text(lsn)} not found, "
                f"but got {len(records)} WAL records"
            )
        base = cached[1]
    return ReconstructInput(key, records[-1][0], base, records)


def _reconstruct(timeline: Timeline, needed: list[ReconstructInput]) -> list[bytes]:
    values = timeline.reconstruct(needed)
    if len(values) != len(needed):
        raise StoreError(f"{len(values)} values were reconstructed instead of {len(needed)}")
    for item, value in zip(needed, values, strict=True):
        timeline.cache(item.key, item.lsn, value)
    return values


def collect(timeline: Timeline, batch: ReadBatch, lsn: int) -> None:
    """Find the values of all queries of a batch (keys ascending) at or below an LSN."""
    upper = lsn
    count = batch.count
    while True:
        if upper > timeline.ancestor_lsn:
            _collect_here(timeline.view, batch, count, upper)
        if not batch.pending or timeline.ancestor is None:
            return
        upper = min(upper, timeline.ancestor_lsn)
        timeline = timeline.ancestor
        if timeline.last_record_lsn < upper:
            # The ancestor was restarted and has not got its WAL back yet.
            timeline.wait_lsn(upper, timeline.settings.wait_lsn_timeout)


def _collect_here(view: ReadView, batch: ReadBatch, count: int, upper: int) -> None:
    view.open.read(batch, 0, count, upper, 0)
    upper = min(upper, view.open.start_lsn - 1)
    for layer in view.frozen:
        batch.close_at(0, count, upper)
        if not batch.pending:
            return
        layer.read(batch, 0, count, upper, 0)
        upper = min(upper, layer.start_lsn - 1)
    batch.close_at(0, count, upper)
    first = 0
    while batch.pending and first < count:
        segment = view.layers.segment(batch.key(first))
        end = view.layers.segment_end(segment)
        last = count if end is None else batch.lower_bound(first, end)
        _collect_segment(view.layers, segment, batch, first, last, upper)
        first = last


def _collect_segment(
    layers: LayerMap[LayerFile], segment: int, batch: ReadBatch, first: int, last: int, upper: int
) -> None:
    while upper and batch.any_pending(first, last):
        hit = layers.search(segment, upper)
        if hit is None:
            return
        layer, floor = hit
        layer.read(batch, first, last, upper, floor)
        if layer.is_image:
            # It holds every key of its range that exists: nothing older counts.
            batch.close(first, last)
            return
        upper = floor - 1
        batch.close_at(first, last, upper)


def scan_keys(timeline: Timeline, start: bytes, end: bytes, lsn: int) -> list[bytes]:
    """The keys in [start, end) that have a value; see Timeline.scan_keys."""
    found: set[bytes] = set()
    ranges = [(start, end)]
    upper = lsn
    while ranges:
        if upper > timeline.ancestor_lsn:
            ranges = _scan_here(timeline.view, ranges, upper, found)
        if timeline.ancestor is None:
            break
        upper = min(upper, timeline.ancestor_lsn)
        timeline = timeline.ancestor
        if timeline.last_record_lsn < upper:
            timeline.wait_lsn(upper, timeline.settings.wait_lsn_timeout)
    return sorted(found)


def _scan_here(
    view: ReadView, ranges: list[tuple[bytes, bytes]], upper: int, found: set[bytes]
) -> list[tuple[bytes, bytes]]:
    """Add the keys of one timeline; returns the ranges whose keys may be in the ancestor too."""
    left = []
    for start, end in ranges:
        for memory_layer in (view.open, *view.frozen):
            found.update(memory_layer.keys(start, end, upper))
        while start < end:
            segment = view.layers.segment(start)
            segment_end = view.layers.segment_end(segment)
            stop = end if segment_end is None else min(end, segment_end)
            at = upper
            while (hit := view.layers.search(segment, at) if at else None) is not None:
                layer, floor = hit
                found.update(layer.keys(start, stop, at, floor))
                if layer.is_image:
                    break
                at = floor - 1
            else:
                left.append((start, stop))
            start = stop
    return left
