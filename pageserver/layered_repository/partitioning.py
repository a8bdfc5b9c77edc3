"""The key space cut into parts of about equal numbers of live keys: the unit of image layers.

Parts tile the whole key space, so the images made for them do too: keys that were deleted vanish
with the next image of their part, and whatever lies below can be covered completely by images.

A range that does not fit into the part before it begins a part, and a range of more than a part is
cut at multiples of the part's size from its own beginning. So when a table grows, the borders
inside it and those from the next large table on stay where the images have theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from pageserver.layered_repository.layer_name import KEY_SIZE, MAX_KEY, MIN_KEY

MAX_PART_KEYS: Final = 16384  # 128 MiB of pages

KeyRange = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Part:
    """The keys [start, end); all that live lie in `ranges`, which ascend and have `keys` keys."""

    start: bytes
    end: bytes
    ranges: tuple[KeyRange, ...]
    keys: int


@dataclass(frozen=True, slots=True)
class Partitioning:
    """Parts in key order that tile the key space, with the keys that live at `lsn`.

    An image made from a part holds the state at exactly this LSN: at any other one its ranges may
    lack keys.
    """

    lsn: int
    parts: tuple[Part, ...]


def partition(
    ranges: Iterable[KeyRange], lsn: int, *, max_keys: int = MAX_PART_KEYS
) -> Partitioning:
    """Cut the key space so that no part has more than `max_keys` of the keys that live at `lsn`.

    `ranges` are [start, end) of 18-byte keys, in any order, that hold every live key. Raises
    ValueError for a range that is none, and unless `max_keys` is at least 1.
    """
    if max_keys < 1:
        raise ValueError(f"a part has at least one key, not {max_keys}")
    groups: list[list[tuple[int, int]]] = []
    room = 0
    for first, end in _merged(ranges):
        if end - first > room:
            groups.append([])
            room = max_keys
        while end - first > room:
            groups[-1].append((first, first + room))
            groups.append([])
            first += room
            room = max_keys
        groups[-1].append((first, end))
        room -= end - first
    borders = [MIN_KEY, *(_key(group[0][0]) for group in groups[1:]), MAX_KEY]
    parts = (
        Part(
            borders[i],
            borders[i + 1],
            tuple((_key(first), _key(end)) for first, end in group),
            sum(end - first for first, end in group),
        )
        for i, group in enumerate(groups or [[]])
    )
    return Partitioning(lsn, tuple(parts))


def _merged(ranges: Iterable[KeyRange]) -> Iterator[tuple[int, int]]:
    """The ranges as numbers, ascending, those that touch or overlap made one."""
    pending: tuple[int, int] | None = None
    for start, end in sorted(ranges):
        if len(start) != KEY_SIZE or len(end) != KEY_SIZE or start >= end:
            raise ValueError(f"{start.hex()} to {end.hex()} is not a range of keys")
        first, stop = int.from_bytes(start, "big"), int.from_bytes(end, "big")
        if pending is None:
            pending = first, stop
        elif first <= pending[1]:
            pending = pending[0], max(pending[1], stop)
        else:
            yield pending
            pending = first, stop
    if pending is not None:
        yield pending


def _key(number: int) -> bytes:
    return number.to_bytes(KEY_SIZE, "big")
