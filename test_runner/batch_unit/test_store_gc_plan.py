"""The GC plan against every read that must go on giving the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.gc_plan import (
    GcPlan,
    GcResult,
    ImageCoverage,
    plan_gc,
    unneeded_ranges,
)
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName

LAST_LSN = 24
KEYS = [bytes([0] * 17 + [10 * i + 5]) for i in range(5)]
BORDERS = [MIN_KEY, *(bytes([0] * 17 + [10 * i]) for i in range(1, 5)), MAX_KEY]
ANCESTOR = "ancestor"

State = tuple[int | str, ...]  # what a value is made of, newest first
Put = dict[tuple[bytes, int], bool]  # (key, LSN) -> whether it initialises the value


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer and what is in it."""

    key_start: bytes
    key_end: bytes
    start_lsn: int
    end_lsn: int
    is_image: bool
    size: int = 10_000
    changes: Put = field(default_factory=dict, repr=False)
    states: dict[bytes, State] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> LayerName:
        """There are no two files of one name."""
        return LayerName(self.key_start, self.key_end, self.start_lsn, self.end_lsn, self.is_image)


def image(start: int, end: int, lsn: int, size: int = 10_000) -> Layer:
    return Layer(BORDERS[start], BORDERS[end], lsn, lsn + 1, True, size)


def delta(start: int, end: int, start_lsn: int, end_lsn: int) -> Layer:
    return Layer(BORDERS[start], BORDERS[end], start_lsn, end_lsn, False)


@dataclass
class World:
    """What happened: puts, deletions of ranges, and what an ancestor holds below."""

    puts: Put
    deletions: list[tuple[int, int, int]]  # borders, LSN
    has_ancestor: bool

    def state(self, key: bytes, lsn: int) -> State:
        """The truth, from the history alone."""
        found: list[int | str] = []
        for at in range(lsn, 0, -1):
            if any(at == t and BORDERS[a] <= key < BORDERS[b] for a, b, t in self.deletions):
                return tuple(found)
            initialises = self.puts.get((key, at))
            if initialises is not None:
                found.append(at)
                if initialises:
                    return tuple(found)
        return (*found, ANCESTOR) if self.has_ancestor else tuple(found)

    def delta(self, start: int, end: int, start_lsn: int, end_lsn: int) -> Layer:
        """The layer with all changes of a rectangle."""
        layer = delta(start, end, start_lsn, end_lsn)
        for (key, lsn), initialises in self.puts.items():
            if layer.key_start <= key < layer.key_end and start_lsn <= lsn < end_lsn:
                layer.changes[key, lsn] = initialises
        return layer

    def image(self, start: int, end: int, lsn: int) -> Layer:
        """The layer with the state of a range."""
        states = {key: self.state(key, lsn) for key in KEYS}
        states = {
            key: state
            for key, state in states.items()
            if state and BORDERS[start] <= key < BORDERS[end]
        }
        # Some of the images that hold something are as small as empty ones.
        size = 300 if not states or lsn % 2 else 10_000
        return Layer(BORDERS[start], BORDERS[end], lsn, lsn + 1, True, size, states=states)

    def read(self, layers: LayerMap[Layer], key: bytes, lsn: int) -> State:
        """What the read path finds."""
        found: list[int | str] = []
        at = lsn
        while at > 0 and (hit := layers.search(key, at)) is not None:
            layer, floor = hit
            if layer.is_image:
                return (*found, *layer.states.get(key, ()))
            for here in range(at, floor - 1, -1):
                initialises = layer.changes.get((key, here))
                if initialises is not None:
                    found.append(here)
                    if initialises:
                        return tuple(found)
            at = floor - 1
        return (*found, ANCESTOR) if self.has_ancestor else tuple(found)


lsns = st.integers(1, LAST_LSN)


@st.composite
def cuts(draw: st.DrawFn, last: int) -> list[tuple[int, int]]:
    inner = draw(st.sets(st.integers(1, last - 1), max_size=3)) if last > 1 else set()
    borders = [0, *sorted(inner), last]
    return list(pairwise(borders))


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(st.integers(0, len(BORDERS) - 2))
    return start, draw(st.integers(start + 1, len(BORDERS) - 1))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[Layer]]:
    """A history, with layers that hold all of it, some of it more than once."""
    puts = draw(st.dictionaries(st.tuples(st.sampled_from(KEYS), lsns), st.booleans()))
    deletions = [(*span, lsn) for span, lsn in draw(st.lists(st.tuples(spans(), lsns), max_size=3))]
    world = World(puts, deletions, draw(st.booleans()))
    whole = len(BORDERS) - 1
    layers = [world.image(*deletion) for deletion in deletions]
    for start, end in draw(cuts(LAST_LSN)):
        tiles = draw(st.sampled_from([[(0, whole)], draw(cuts(whole))]))
        layers += [world.delta(*tile, start + 1, end + 1) for tile in tiles]
    for lsn in draw(st.lists(lsns, max_size=4)):
        tiles = draw(cuts(whole))
        left_out = draw(st.sampled_from([None, None, *tiles]))
        layers += [world.image(*tile, lsn) for tile in tiles if tile != left_out]
    for span, first, length in draw(
        st.lists(st.tuples(spans(), lsns, st.integers(1, 12)), max_size=3)
    ):
        layers.append(world.delta(*span, first, min(first + length, LAST_LSN + 1)))
    return world, list({layer.name: layer for layer in layers}.values())


def needed(
    layer: Layer, layers: Iterable[Layer], reads: Iterable[int], cutoff: int, durable: int
) -> bool:
    """Whether the layer reaches beyond the cutoff or a read may need it, key by key."""
    last = layer.end_lsn if layer.is_image else layer.end_lsn - 1
    images = [x for x in layers if x.is_image and x.start_lsn <= durable]
    return last > cutoff or any(
        lsn >= layer.start_lsn
        and any(
            layer.key_start <= start < layer.key_end
            and not any(x.key_start <= start < x.key_end and last <= x.start_lsn <= lsn
                        for x in images)
            for start in BORDERS[:-1]
        )
        for lsn in reads
    )  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    worlds(),
    lsns,
    st.sets(lsns, max_size=3),
    st.integers(LAST_LSN // 2, LAST_LSN),
    st.randoms(use_true_random=False),
)
def test_reads_do_not_change_and_nothing_superfluous_stays(
    drawn: tuple[World, list[Layer]], cutoff: int, points: set[int], durable: int, random: object
) -> None:
    world, layers = drawn
    plan = plan_gc(
        LayerMap(layers),
        cutoff=cutoff,
        points=points,
        has_ancestor=world.has_ancestor,
        disk_consistent_lsn=durable,
        is_empty=lambda layer: not layer.states,
    )
    reads = sorted({*range(cutoff, LAST_LSN + 1), *points})
    for layer in layers:
        assert (layer in plan.remove) != needed(layer, layers, reads, cutoff, durable)
    assert not set(plan.tombstones) & set(plan.remove)

    some = [layer for layer in plan.remove if random.random() < 0.5]  # type: ignore[attr-defined]
    for gone in (some, plan.remove, plan.remove + plan.tombstones, plan.tombstones):
        left = LayerMap(layers).with_changes(remove=gone)
        for key in KEYS:
            for lsn in reads:
                assert world.read(left, key, lsn) == world.state(key, lsn)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(worlds(), lsns, st.sets(lsns, max_size=4), st.randoms(use_true_random=False))
def test_splits_drop_what_gc_would_let_go_and_reads_do_not_change(
    drawn: tuple[World, list[Layer]], cutoff: int, points: set[int], random: object
) -> None:
    world, layers = drawn
    coverage = ImageCoverage(layers)
    retained = sorted(point for point in points if point < cutoff)
    pieces: list[Layer] = []
    split: list[Layer] = []
    for layer in [x for x in layers if not x.is_image]:
        start, end = BORDERS.index(layer.key_start), BORDERS.index(layer.key_end)
        ranges = unneeded_ranges(layer, coverage, retained, cutoff)
        unneeded = {lsn for first, stop in ranges for lsn in range(first, stop)}
        assert len(unneeded) == sum(stop - first for first, stop in ranges)
        for lsn in range(layer.start_lsn, layer.end_lsn):
            alone = delta(start, end, lsn, lsn + 1)
            plan = plan_gc(
                [*(x for x in layers if x.is_image), alone],
                cutoff=cutoff,
                points=points,
                has_ancestor=True,
                disk_consistent_lsn=LAST_LSN,
            )
            assert (lsn in unneeded) == (alone in plan.remove)
        if ranges:
            split.append(layer)
            at = layer.start_lsn
            for first, stop in [*ranges, (layer.end_lsn, 0)]:
                if at < first:
                    pieces.append(world.delta(start, end, at, first))
                at = stop
    # After a crash some of the deltas may be back.
    some = [layer for layer in split if random.random() < 0.5]  # type: ignore[attr-defined]
    known = {layer.name for layer in layers}
    new = [layer for layer in pieces if layer.name not in known]
    for gone in (split, some):
        left = LayerMap(layers).with_changes(add=new, remove=gone)
        for key in KEYS:
            for lsn in {*range(cutoff, LAST_LSN + 1), *points}:
                assert world.read(left, key, lsn) == world.state(key, lsn)


def run(layers: list[Layer], cutoff: int, points: list[int], **options: bool) -> GcPlan[Layer]:
    return plan_gc(
        layers,
        cutoff=cutoff,
        points=points,
        has_ancestor=options.get("has_ancestor", False),
        disk_consistent_lsn=100,
        is_empty=lambda layer: layer.size < 1000,
    )


def test_counters_say_why_layers_stay() -> None:
    old, new = image(0, 5, 5), image(0, 5, 20)
    layers = [old, new, delta(1, 2, 6, 11), delta(1, 2, 18, 26), delta(1, 2, 21, 25)]
    assert run(layers, 20, []).counters == GcResult(5, 3, 0, 0, 2)
    assert run(layers, 20, [10]).counters == GcResult(5, 3, 2, 0, 0)
    assert run(layers, 20, [5]).counters == GcResult(5, 3, 1, 0, 1)
    # 24 is the last change in [21, 25): an image there would do, none does.
    assert run(layers, 24, []).counters == GcResult(5, 1, 0, 2, 2)
    assert set(run(layers, 24, []).remove) == {old, layers[2]}


def test_a_point_keeps_only_what_is_read_there() -> None:
    first, second, third = image(0, 5, 5), image(0, 5, 10), image(0, 5, 30)
    between = delta(0, 5, 6, 10)
    layers = [first, between, second, delta(0, 3, 11, 15), third]
    assert set(run(layers, 30, [12]).remove) == {first, between}


def test_images_beyond_disk_consistent_lsn_do_not_count() -> None:
    layers = [image(0, 5, 5), image(0, 5, 20)]
    plan = plan_gc(layers, cutoff=30, points=[], has_ancestor=False, disk_consistent_lsn=19)
    assert plan.remove == []


def test_a_tombstone_goes_a_round_after_what_it_hides() -> None:
    tombstone = image(1, 2, 20, size=300)
    hidden = delta(1, 2, 10, 15)
    first = run([hidden, tombstone], 30, [])
    assert (first.remove, first.tombstones) == ([hidden], [])
    assert run([tombstone], 30, []).tombstones == [tombstone]
    assert run([tombstone], 30, [], has_ancestor=True).tombstones == []
    # A change at its own LSN came before the deletion.
    assert run([tombstone, delta(0, 5, 20, 22)], 30, []).tombstones == []
    assert run([tombstone, delta(0, 5, 21, 22)], 30, []).tombstones == [tombstone]
