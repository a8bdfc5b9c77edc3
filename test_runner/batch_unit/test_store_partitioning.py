"""Cutting the key space into parts."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.partitioning import KeyRange, Part, partition


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def ranges(*numbers: tuple[int, int]) -> list[KeyRange]:
    return [(key(first), key(end)) for first, end in numbers]


def numbers(part: Part) -> list[int]:
    return [
        number
        for start, end in part.ranges
        for number in range(int.from_bytes(start, "big"), int.from_bytes(end, "big"))
    ]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), max_size=12),
    st.integers(1, 25),
)
def test_parts_tile_the_key_space_and_hold_every_key_once(
    spans: list[tuple[int, int]], max_keys: int
) -> None:
    given_keys = {n for first, count in spans for n in range(first, first + count)}
    live = ranges(*((first, first + count) for first, count in spans))
    partitioning = partition(live, 77, max_keys=max_keys)
    parts = partitioning.parts
    assert partitioning.lsn == 77
    assert parts[0].start == MIN_KEY
    assert parts[-1].end == MAX_KEY
    assert all(a.end == b.start for a, b in pairwise(parts))
    assert [n for part in parts for n in numbers(part)] == sorted(given_keys)
    for part in parts:
        assert part.keys == len(numbers(part)) <= max_keys
        assert part.start < part.end
        assert all(part.start <= a < b <= part.end for a, b in part.ranges)
        assert part.keys or len(parts) == 1


def test_borders_behind_a_growing_table_stay() -> None:
    def borders(small: int, large: int) -> list[bytes]:
        live = ranges((10, 10 + small), (1000, 1000 + large), (5000, 5900), (7000, 7010))
        return [part.start for part in partition(live, 1, max_keys=100).parts]

    before = borders(30, 350)
    # The tables before and within the large ones grow; borders are only added.
    assert set(before) < set(borders(45, 990))
    assert before[:5] == [MIN_KEY, key(1000), key(1100), key(1200), key(1300)]
    assert borders(45, 350) == before


def test_no_keys_at_all_are_one_empty_part() -> None:
    assert partition([], 5).parts == (Part(MIN_KEY, MAX_KEY, (), 0),)


@pytest.mark.parametrize(
    "bad", [(key(5), key(5)), (key(6), key(5)), (b"", key(5)), (key(5), b"\xff" * 19)]
)
def test_what_is_no_range_is_refused(bad: KeyRange) -> None:
    with pytest.raises(ValueError, match="range of keys"):
        partition([bad], 1)
    with pytest.raises(ValueError, match="at least one key"):
        partition([], 1, max_keys=0)
