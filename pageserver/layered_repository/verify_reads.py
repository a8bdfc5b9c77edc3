"""What only the values of a timeline's layers show to be wrong, when each file is whole.

- Layers that overlap must agree: each holds everything in its keys and LSNs, so what one has the
  other has too, with the same value.
- A value that can be asked for must lead down to one that needs nothing older. If it does not, a
  layer is missing. Read is what any read may begin with: every key as it was at the GC cutoff and
  at each branch point below, and above it every key of every delta at the last LSN of the delta;
  records that a newer value within the same delta covers are not. Redo is not done.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from pageserver.layered_repository.errors import MissingBaseError
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.timeline import Timeline
from zenith_utils.lsn import lsn_text

_BATCH_KEYS: Final = 1024

_Entry = tuple[bytes, int, int, int, bytes]


def disagreements(group: Sequence[LayerFile]) -> Iterator[tuple[LayerFile, str]]:
    """Where layers of one group of overlapping_groups() differ: a layer, and what it lacks or has.

    Reads all of them. Raises what LayerFile.entries() does.
    """
    entries = heapq.merge(*(_numbered(i, layer) for i, layer in enumerate(group)))
    for key, of_key in groupby(entries, key=lambda entry: entry[0]):
        here = [i for i, layer in enumerate(group) if layer.key_start <= key < layer.key_end]
        for lsn, versions in groupby(of_key, key=lambda entry: entry[1]):
            expected = [i for i in here if group[i].start_lsn <= lsn < group[i].end_lsn]
            if len(expected) > 1:
                yield from _compare(group, key, lsn, expected, list(versions))


def _numbered(number: int, layer: LayerFile) -> Iterator[_Entry]:
    for key, lsn, flags, data in layer.entries():
        yield key, lsn, number, flags, data


def _compare(
    group: Sequence[LayerFile], key: bytes, lsn: int, expected: list[int], versions: list[_Entry]
) -> Iterator[tuple[LayerFile, str]]:
    what = f"of key {key.hex().upper()} at LSN {lsn_text(lsn)}"
    _, _, first, flags, data = versions[0]
    for _, _, other, other_flags, other_data in versions[1:]:
        if (flags, data) != (other_flags, other_data):
            yield group[other], f"its value {what} differs from that in {group[first].path}"
    having = {version[2] for version in versions}
    for number in expected:
        if number not in having:
            yield group[number], f"it lacks the value {what} that {group[first].path} has"


def unreadable(
    timeline: Timeline, points: Iterable[int], count: Callable[[int], None]
) -> Iterator[str]:
    """What reads of the timeline find missing; see above.

    `points` are the LSNs where its branches begin; `count` is told of values as they were read. No
    ancestor may wait for its WAL. Raises what Timeline.get_vectored() does for broken files.
    """
    last = timeline.last_record_lsn
    cutoff = min(timeline.latest_gc_cutoff_lsn, last)
    for lsn in sorted({cutoff, *(point for point in points if point < cutoff)}):
        # At or below its branch point it has no history of its own.
        if lsn > timeline.ancestor_lsn:
            yield from _unreadable_at(
                timeline, timeline.scan_keys(MIN_KEY, MAX_KEY, lsn), lsn, count
            )
    for layer in timeline.view.layers:
        lsn = layer.end_lsn - 1
        if not layer.is_image and lsn > cutoff:
            keys = layer.keys(layer.key_start, layer.key_end, lsn, cutoff + 1)
            yield from _unreadable_at(timeline, keys, lsn, count)


def _unreadable_at(
    timeline: Timeline, keys: Sequence[bytes], lsn: int, count: Callable[[int], None]
) -> Iterator[str]:
    for start in range(0, len(keys), _BATCH_KEYS):
        batch = keys[start : start + _BATCH_KEYS]
        try:
            timeline.get_vectored(batch, lsn, cache=False)
        except MissingBaseError:
            for key in batch:
                try:
                    timeline.get_vectored([key], lsn, cache=False)
                except MissingBaseError as error:
                    yield f"{error}: the layer that had it is missing"
        count(len(batch))
