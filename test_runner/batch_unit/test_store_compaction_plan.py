"""What is merged, and which parts get an image: when, and when not again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.compaction_plan import (
    MAX_MERGED,
    PAGE_IN_LAYER,
    garbage_images_due,
    images_due,
    l0_to_compact,
)
from pageserver.layered_repository.gc_plan import plan_gc
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.partitioning import Part, Partitioning, partition

MIB = 1 << 20
PART_KEYS = 1000
PART_SIZE = PART_KEYS * PAGE_IN_LAYER


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of `size` bytes; `keys` are those in an image."""

    key_start: bytes
    key_end: bytes
    start_lsn: int
    end_lsn: int
    is_image: bool
    size: int
    keys: int = 0


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def l0(start_lsn: int, end_lsn: int, size: int = 100) -> Layer:
    return Layer(MIN_KEY, MAX_KEY, start_lsn, end_lsn, False, size)


def delta(start: int, end: int, start_lsn: int, end_lsn: int, size: int = MIB) -> Layer:
    return Layer(key(start), key(end), start_lsn, end_lsn, False, size)


def live(*ranges: tuple[int, int], lsn: int) -> Partitioning:
    return partition([(key(a), key(b)) for a, b in ranges], lsn, max_keys=PART_KEYS)


def image(part: Part, lsn: int, density: float = 1.0) -> Layer:
    """What image creation makes of a part whose pages take `density` of their size."""
    size = 280 + int(part.keys * PAGE_IN_LAYER * density)
    return Layer(part.start, part.end, lsn, lsn + 1, True, size, part.keys)


def images(partitioning: Partitioning, density: float = 1.0) -> list[Layer]:
    return [image(part, partitioning.lsn, density) for part in partitioning.parts]


def starts(parts: Iterable[Part]) -> list[int]:
    return [int.from_bytes(part.start, "big") for part in parts]


# ---- L0


def chosen(layers: Sequence[Layer], threshold: int = 3, cutoff: int = 0, force: bool = False,
           quiet: bool = True) -> list[tuple[int, int]]:  # fmt: skip
    run = l0_to_compact(layers, threshold=threshold, cutoff=cutoff, force=force, quiet=quiet)
    return [(layer.start_lsn, layer.end_lsn) for layer in run]


def test_l0_deltas_are_merged_at_the_threshold_or_on_demand() -> None:
    layers = [l0(20, 30), l0(1, 10), delta(1, 5, 1, 9)]
    assert chosen(layers) == []
    assert chosen(layers, force=True) == [(1, 10), (20, 30)]
    assert chosen([*layers, l0(10, 20)]) == [(1, 10), (10, 20), (20, 30)]
    assert chosen([], force=True) == []


def test_l0_deltas_below_the_cutoff_are_merged_when_all_is_quiet() -> None:
    layers = [l0(1, 10), l0(10, 20)]
    assert chosen(layers, cutoff=19) == [(1, 10), (10, 20)]
    assert chosen(layers, cutoff=9) == [(1, 10)]
    assert chosen(layers, cutoff=19, quiet=False) == []
    # One that reaches beyond the cutoff is worth it if a split of it would be.
    assert chosen(layers, cutoff=10) == [(1, 10), (10, 20)]
    assert chosen([l0(10, 120)], cutoff=19) == []
    assert chosen([l0(10, 120)], cutoff=20) == [(10, 120)]
    assert chosen([l0(10, 120)], cutoff=20, quiet=False) == []


def test_l0_deltas_are_merged_when_all_is_quiet_if_they_take_much() -> None:
    layers = [l0(1, 10, 2 * MIB), l0(10, 20), delta(1, 5, 1, 9, 20 * MIB)]
    assert chosen(layers) == [(1, 10), (10, 20)]
    assert chosen(layers, quiet=False) == []
    assert chosen([*layers, delta(5, 9, 1, 9, 1000)]) == []
    assert chosen([l0(1, 10, MIB), l0(10, 20, 1)]) == [(1, 10), (10, 20)]
    assert chosen([l0(1, 10, MIB - 1), l0(10, 20, 1)]) == []


def test_no_merge_across_a_gap_that_another_delta_fills() -> None:
    # (10, 20) was merged before; a crash brought the file of (1, 10) back.
    layers = [l0(1, 10), l0(20, 30), l0(30, 40)]
    assert chosen(layers) == [(1, 10), (20, 30), (30, 40)]
    for filler in (delta(3, 4, 1, 20), delta(3, 4, 15, 16), delta(3, 4, 19, 35)):
        assert chosen([*layers, filler]) == [(1, 10)]
    for beside in (delta(3, 4, 1, 10), delta(3, 4, 20, 40)):
        assert len(chosen([*layers, beside])) == 3
    # It is not filled if an L0 delta that is merged too reaches across.
    assert len(chosen([*layers, l0(1, 20), delta(3, 4, 15, 16)])) == 4


def test_a_merge_has_bounds() -> None:
    layers = [l0(10 * i, 10 * i + 10) for i in range(1, 2 * MAX_MERGED)]
    assert chosen(layers) == [(10 * i, 10 * i + 10) for i in range(1, MAX_MERGED + 1)]


# ---- images for reads


def due(layers: Iterable[Layer], partitioning: Partitioning) -> list[int]:
    return starts(images_due(layers, partitioning, threshold=3))


def test_an_image_is_due_where_three_deltas_lie_on_the_newest() -> None:
    partitioning = live((0, 3000), lsn=50)
    base = images(live((0, 3000), lsn=5))
    deltas = [delta(100, 1200, 6, 20), delta(0, 400, 20, 30), delta(300, 500, 30, 51)]
    assert due([*base, *deltas], partitioning) == [0]
    # Where they do not lie on each other they are no stack.
    assert due([*base, *deltas[:2], delta(400, 1200, 30, 51)], partitioning) == []
    assert due([*base, *deltas[:2], delta(1100, 1200, 30, 51)], partitioning) == []
    # L0 deltas do not count, nor what an image has put behind itself already.
    assert due([*base, *deltas[:2], l0(30, 40), l0(40, 50)], partitioning) == []
    assert due([*base, *deltas, image(partitioning.parts[0], 20)], partitioning) == []
    # An image of a part of the range only.
    newer = Layer(key(0), key(350), 50, 51, True, 100)
    assert due([*base, *deltas, newer], partitioning) == [0]
    newer = Layer(key(0), key(400), 50, 51, True, 100)
    assert due([*base, *deltas, newer], partitioning) == []


def test_after_the_image_its_part_is_not_due_again() -> None:
    partitioning = live((0, 3000), lsn=50)
    stack = [delta(100, 1200, 10 * i, 10 * i + 15) for i in range(1, 8)]
    parts = images_due(stack, partitioning, threshold=3)
    assert starts(parts) == [0, 1000]
    assert due([*stack, *(image(part, 50) for part in parts)], partitioning) == []


# ---- images for garbage


def collect(
    layers: list[Layer],
    partitioning: Partitioning,
    *,
    points: Sequence[int] = (),
    quiet: bool = False,
    density: float = 1.0,
    image_keys: Callable[[Layer], int] | None = lambda layer: layer.keys,
) -> tuple[list[Layer], list[int]]:
    """Make images until none is due; returns the layers that GC leaves and the parts."""
    cutoff = partitioning.lsn
    made: list[int] = []
    while True:
        parts = garbage_images_due(
            layers, partitioning, cutoff=cutoff, points=points, quiet=quiet, image_keys=image_keys
        )
        if not parts:
            return layers, made
        made += starts(parts)
        assert len(made) == len(set(made)), "a part was due again"
        layers = [*layers, *(image(part, cutoff, density) for part in parts)]
        plan = plan_gc(
            layers, cutoff=cutoff, points=points, has_ancestor=False, disk_consistent_lsn=cutoff
        )
        layers = [layer for layer in layers if layer not in plan.remove]


def bytes_of(layers: Iterable[Layer]) -> int:
    return sum(layer.size for layer in layers)


EXACT: Callable[[Layer], int] = lambda layer: layer.keys  # noqa: E731


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("image_keys", [EXACT, None])
def test_deltas_are_garbage_once_they_outweigh_the_image(
    density: float, image_keys: Callable[[Layer], int] | None
) -> None:
    base = images(live((0, 5000), lsn=10), density)
    partitioning = live((0, 5000), lsn=90)
    size = int(PART_SIZE * density)

    def made(change: Layer, quiet: bool) -> list[int]:
        return collect(
            [*base, change], partitioning, quiet=quiet, density=density, image_keys=image_keys
        )[1]

    assert made(delta(1000, 2000, 20, 91, int(size * 1.1)), False) == [1000]
    assert made(delta(1000, 2000, 20, 91, int(size * 0.9)), False) == []
    assert made(delta(1000, 2000, 20, 91, max(int(size * 0.12), MIB + 9)), True) == [1000]
    assert made(delta(1000, 2000, 20, 91, MIB - 9), True) == []
    # What is beyond the cutoff stays anyway.
    assert made(delta(1000, 2000, 91, 92, size * 9), True) == []
    # Of a delta that reaches beyond it, what a split would drop counts, if one would be due.
    assert made(delta(1000, 2000, 20, 92, size * 9), False) == []
    assert made(delta(1000, 2000, 20, 20 + 71 * 10, int(size * 1.5) * 10), True) == [1000]
    assert made(delta(1000, 2000, 20, 20 + 71 * 11, int(size * 1.5) * 11), True) == []


def test_garbage_inside_a_delta_counts_if_a_split_would_be_due() -> None:
    base = images(live((0, 5000), lsn=10))
    partitioning = live((0, 5000), lsn=90)
    layers = [*base, delta(1000, 2000, 20, 91, 9 * PART_SIZE)]
    assert collect(layers, partitioning, points=[54])[1] == [1000]
    assert collect(layers, partitioning, points=[55])[1] == []
    assert collect(layers, partitioning, points=[55], quiet=True)[1] == [1000]
    # What a split takes without a new image is no reason for one.
    assert collect([*layers, *images(live((0, 5000), lsn=89))], partitioning)[1] == []
    older = images(live((0, 5000), lsn=60))
    assert collect([*layers, *older], partitioning, points=[50, 62])[1] == [1000]
    assert collect([*layers, *older], partitioning, points=[50, 70])[1] == []


def test_without_changes_nothing_is_due_however_the_borders_move() -> None:
    ranges = [(0, 700), (5000, 5900), (7000, 9500)]
    layers = images(live(*ranges, lsn=10), 0.4)
    moved = partition([(key(a), key(b)) for a, b in ranges], 90, max_keys=650)
    assert len(moved.parts) > len(layers)
    for partitioning in (moved, live(*ranges, lsn=90)):
        for keys in (EXACT, None):
            left, made = collect(layers, partitioning, quiet=True, image_keys=keys)
            assert (left, made) == (layers, [])


def test_a_table_that_was_dropped_is_collected() -> None:
    before = images(live((0, 600), (10_000, 141_000), (200_000, 200_300), lsn=10))
    after = live((0, 600), (200_000, 200_300), lsn=90)
    assert len(after.parts) == 1
    for keys in (EXACT, None):
        layers, made = collect(before, after, image_keys=keys)
        assert made == [0]
        assert bytes_of(layers) == 280 + 900 * PAGE_IN_LAYER


def test_a_small_dropped_table_waits_for_quiet_times() -> None:
    before = images(live((0, 600), (700, 1000), (1200, 1300), lsn=10))
    after = live((0, 600), (1200, 1300), lsn=90)
    assert collect(before, after)[1] == []
    assert collect(before, after, quiet=True)[1] == [0]


def test_what_a_tombstone_covers_goes_without_an_image() -> None:
    before = images(live((0, 1000), (10_000, 30_000), (50_000, 51_000), lsn=10))
    after = live((0, 1000), (50_000, 51_000), lsn=90)
    tombstone = Layer(key(10_000), key(30_000), 40, 41, True, 280)
    layers = [*before, tombstone]
    # All but the part that has the last pages of the table and a dead range behind them is covered.
    _, made = collect(layers, after)
    assert made == [0]
    plan = plan_gc(layers, cutoff=90, points=[], has_ancestor=False, disk_consistent_lsn=90)
    assert bytes_of(plan.remove) > 18 * PART_SIZE


def test_what_a_branch_holds_is_not_rewritten() -> None:
    base = images(live((0, 3000), lsn=10))
    partitioning = live((0, 3000), lsn=90)
    layers = [
        *base,
        delta(0, 1000, 20, 31, 9 * PART_SIZE),
        delta(1000, 2000, 50, 61, 3 * PART_SIZE),
    ]
    assert collect(layers, partitioning, points=[40])[1] == [1000]
    assert collect(layers, partitioning, points=[40, 70])[1] == []
    assert collect(layers, partitioning, points=[95])[1] == [0, 1000]
    # The branch holds the old image: the new one comes on top of it.
    layers = [*base, delta(1000, 2000, 50, 61, int(1.5 * PART_SIZE))]
    assert collect(layers, partitioning, points=[40])[1] == []
    assert collect(layers, partitioning)[1] == [1000]


def test_a_loaded_table_is_not_garbage() -> None:
    base = images(live((0, 1000), lsn=10))
    partitioning = live((0, 1000), (5000, 25_000), lsn=90)
    load = [delta(5000 + 500 * i, 5500 + 500 * i, 20, 50, PART_SIZE // 2) for i in range(40)]
    assert collect([*base, *load], partitioning, quiet=True)[1] == []
    rewritten = [delta(5000, 6000, 50, 60, PART_SIZE)]
    assert collect([*base, *load, *rewritten], partitioning, quiet=True)[1] == [5000]


def test_garbage_that_straddles_parts_goes_in_the_end_and_each_part_is_due_once() -> None:
    base = images(live((0, 20_000), lsn=10))
    partitioning = live((0, 20_000), lsn=90)
    wide = [delta(100, 19_900, 20 + i, 21 + i, 21 * PART_SIZE // 4) for i in range(5)]
    layers, made = collect([*base, *wide], partitioning)
    assert sorted(made) == [1000 * i for i in range(20)]
    assert bytes_of(layers) < 20.1 * PART_SIZE
    # Little garbage that straddles much is not worth twenty images.
    assert collect([*base, wide[0]], partitioning)[1] == []


def test_garbage_is_charged_where_its_keys_live_and_to_parts_without_a_new_image() -> None:
    base = images(live((0, 3000), lsn=10))
    layers = [*base, delta(990, 2000, 20, 30, int(1.5 * PART_SIZE))]
    # Most of its keys live in the second part; then the first is all that keeps the file.
    assert collect(layers, live((0, 3000), lsn=90))[1] == [1000, 0]
    # The second part is new, so its image takes room; it pays when it is the only one missing.
    layers = [base[0], delta(0, 2000, 20, 30, int(3.6 * PART_SIZE))]
    left, made = collect(layers, live((0, 2000), lsn=90))
    assert made == [0, 1000]
    assert all(layer.start_lsn == 90 for layer in left)


def test_pages_of_a_new_table_are_not_taken_for_as_small_as_what_was_there() -> None:
    pages = images(live((10_000, 30_000), lsn=10))[1:]
    catalog = image(Part(MIN_KEY, pages[0].key_start, (), 300), 10, density=0.01)
    partitioning = live((0, 300), (5000, 5700), (10_000, 30_000), lsn=90)
    load = delta(5000, 5700, 20, 50, 700 * PAGE_IN_LAYER)
    assert collect([catalog, *pages, load], partitioning)[1] == []


def test_images_need_the_keys_of_their_own_lsn() -> None:
    with pytest.raises(ValueError, match="partitioning at LSN 5A"):
        garbage_images_due([], live((0, 10), lsn=0x5A), cutoff=0x59, points=[], quiet=True)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[list[tuple[int, int]], list[Layer]]]:
    """Rounds of live ranges and new deltas."""
    rounds = []
    lsn = 100
    for _ in range(draw(st.integers(1, 6))):
        cuts = sorted(draw(st.sets(st.integers(0, 400), min_size=2, max_size=8)))
        ranges = [(20 * a, 20 * b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        deltas = []
        for _ in range(draw(st.integers(0, 4))):
            first, count = draw(st.integers(0, 8000)), draw(st.integers(1, 8000))
            start = lsn + draw(st.integers(0, 50))
            size = draw(st.integers(1, 4 * PART_SIZE))
            deltas.append(
                delta(first, first + count, start, start + draw(st.integers(1, 60)), size)
            )
        rounds.append((ranges, deltas))
        lsn += 100
    return rounds


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    histories(),
    st.sampled_from([0.2, 1.0]),
    st.booleans(),
    st.sampled_from([EXACT, None]),
    st.lists(st.integers(0, 700), max_size=2),
)
def test_every_history_comes_to_rest(
    rounds: list[tuple[list[tuple[int, int]], list[Layer]]],
    density: float,
    quiet: bool,
    image_keys: Callable[[Layer], int] | None,
    points: list[int],
) -> None:
    layers: list[Layer] = []
    cutoff = 100
    for ranges, deltas in rounds:
        layers += deltas
        cutoff += 100
        partitioning = live(*ranges, lsn=cutoff)
        layers, _ = collect(
            layers,
            partitioning,
            points=points,
            quiet=quiet,
            density=density,
            image_keys=image_keys,
        )
        later = Partitioning(cutoff + 50, partitioning.parts)
        if image_keys is not None and not any(cutoff < x.end_lsn for x in deltas):
            # The cutoff moves on, but there was nothing.
            layers, made = collect(
                layers, later, points=points, quiet=quiet, density=density, image_keys=EXACT
            )
            assert made == []
