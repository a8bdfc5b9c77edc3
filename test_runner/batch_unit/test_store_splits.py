"""Garbage inside deltas: when it is worth a split, what a split leaves, and that rounds end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from batch_unit.store_support import (
    BRANCH,
    IMAGE,
    MAIN,
    every_key,
    key,
    layers,
    new_timeline,
    opened,
    put,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository import compaction_plan
from pageserver.layered_repository.compaction_plan import Split, splits_due
from pageserver.layered_repository.gc_plan import plan_gc
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY
from pageserver.layered_repository.layer_set import LayerSet
from pageserver.layered_repository.layer_split import MAX_PIECES
from pageserver.layered_repository.metadata import read_metadata
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.timeline import Timeline

MIB = 1 << 20


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of `size` bytes; `busy`: the LSNs at which a delta has them, None: everywhere."""

    key_start: bytes
    key_end: bytes
    start_lsn: int
    end_lsn: int
    is_image: bool
    size: int
    busy: frozenset[int] | None = None


def delta(start: int, end: int, start_lsn: int, end_lsn: int, size: int = 100 * MIB) -> Layer:
    return Layer(key(start), key(end), start_lsn, end_lsn, False, size)


def image(lsn: int, start: bytes = MIN_KEY, end: bytes = MAX_KEY) -> Layer:
    return Layer(start, end, lsn, lsn + 1, True, MIB)


def due(
    layer_map: Iterable[Layer], cutoff: int, *points: int, quiet: bool = True
) -> list[Sequence[tuple[int, int]]]:
    """What is kept of each delta to be split."""
    return [x.keep for x in splits_due(layer_map, cutoff=cutoff, points=points, quiet=quiet)]


# ---- the plan


def test_what_is_below_the_image_at_the_cutoff_goes() -> None:
    straddling = delta(0, 9, 101, 201)
    assert due([straddling, image(150)], 150) == [((151, 201),)]
    # An image beyond the cutoff is of no use, one below it is for what it covers.
    assert due([straddling, image(150)], 149) == []
    assert due([straddling, image(150)], 170) == [((151, 201),)]
    assert due([straddling, image(150), image(170)], 170) == [((171, 201),)]
    # All keys have to be covered.
    left, right = image(150, MIN_KEY, key(5)), image(140, key(5), MAX_KEY)
    assert due([straddling, left], 150) == []
    assert due([straddling, left, right], 150) == [((141, 201),)]


def test_what_gc_deletes_whole_and_l0_deltas_are_not_split() -> None:
    assert due([delta(0, 9, 101, 151), image(150)], 150) == []
    assert due([delta(0, 9, 101, 152), image(150)], 150) == [((151, 152),)]
    l0 = Layer(MIN_KEY, MAX_KEY, 101, 201, False, 100 * MIB)
    assert due([l0, image(150)], 150) == []
    assert due([delta(0, 9, 151, 201), image(150)], 150) == []


def test_a_busy_timeline_gains_more_than_it_writes_a_quiet_one_a_tenth() -> None:
    straddling = delta(0, 9, 101, 201)
    assert due([straddling, image(200)], 200, 150, quiet=False) == []
    assert due([straddling, image(200)], 200, 149, quiet=False) == [((101, 150),)]
    # What the cutoff will have passed soon needs no split.
    assert due([straddling, image(199)], 199, quiet=False) == []
    assert due([straddling, image(109)], 109) == []
    assert due([straddling, image(110)], 110) == [((111, 201),)]


def test_little_garbage_is_not_worth_it_unless_there_is_much_of_it() -> None:
    small = [delta(i, i + 9, 101, 201, MIB // 5) for i in range(10)]
    assert due([image(200), *small[:5], delta(0, 9, 1, 202)], 200) == [((201, 202),)]
    assert due([image(150), *small], 150) == []
    assert (
        due([image(150), *small, delta(99, 100, 101, 201, MIB // 4)], 150) == [((151, 201),)] * 11
    )


def test_what_is_retained_below_the_cutoff_stays() -> None:
    straddling = delta(0, 9, 101, 201)
    assert due([straddling, image(100), image(150)], 150, 120) == [((101, 121), (151, 201))]
    assert due([straddling, image(110), image(150)], 150, 120) == [((111, 121), (151, 201))]
    assert due([straddling, image(120), image(150)], 150, 120) == [((151, 201),)]
    assert due([straddling, image(130), image(150)], 150, 120, 140) == [
        ((101, 121), (131, 141), (151, 201))
    ]
    # Points outside of it, or at the cutoff, change nothing.
    assert due([straddling, image(150)], 150, 100, 150, 300) == [((151, 201),)]
    # A point in a delta below the cutoff, where all above the point is garbage.
    assert due([delta(0, 9, 101, 141), image(150)], 150, 120) == [((101, 121),)]


def test_the_pieces_are_bounded_and_where_nothing_goes_there_is_no_cut() -> None:
    layer = delta(0, 9, 1001, 2001)
    points = range(1000, 2000, 10)
    assert due([layer, image(1000), image(1990)], 1990, *points) == []
    # Images give 40 ranges of garbage; the 15 largest of them go first.
    sizes = [i % 8 for i in range(40)]
    images = [image(1000 + 25 * i + 9 + 2 * size) for i, size in enumerate(sizes)]
    retained = [1000 + 25 * i + 9 - 5 for i in range(40)] + [1000 + 25 * i + 24 for i in range(40)]
    (keep,) = due([layer, image(1000), *images], 1999, *retained)
    assert len(keep) == MAX_PIECES
    dropped = [b[0] - a[1] for a, b in pairwise(keep)]
    assert min(dropped) == 5 + 2 * 5 and len(dropped) == 15


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 8), st.integers(1, 5), st.integers(0, 200), st.integers(2, 150),
            st.integers(1, 50 * MIB), st.sets(st.integers(0, 350), min_size=1, max_size=4),
        ),
        min_size=1, max_size=6,
    ),
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 13), st.integers(0, 350)), max_size=8),
    st.lists(st.integers(0, 350), max_size=6),
    st.lists(st.integers(0, 350), min_size=1, max_size=3),
    st.booleans(),
)  # fmt: skip
def test_rounds_come_to_rest_wherever_the_bytes_are(
    deltas: list[tuple[int, int, int, int, int, set[int]]],
    images: list[tuple[int, int, int]],
    points: list[int],
    cutoffs: list[int],
    quiet: bool,
) -> None:
    found = [
        Layer(key(k), key(k + keys), a, a + lsns, False, size, frozenset(busy))
        for k, keys, a, lsns, size, busy in deltas
    ]
    found += [image(lsn, key(k), key(k + keys)) for k, keys, lsn in images]
    for cutoff in sorted(cutoffs):
        layers_now = found
        for _ in range(100):
            plan = plan_gc(layers_now, cutoff=cutoff, points=points, has_ancestor=False,
                           disk_consistent_lsn=1000)  # fmt: skip
            layers_now = [layer for layer in layers_now if layer not in plan.remove]
            splits = splits_due(layers_now, cutoff=cutoff, points=points, quiet=quiet)
            if not splits:
                break
            for split in splits:
                layers_now.remove(split.layer)
                layers_now += pieces_of(split)
        else:
            raise AssertionError("rounds do not end")
        found = layers_now


def pieces_of(split: Split[Layer]) -> Iterator[Layer]:
    """What is written, with the bytes where the layer really has them."""
    layer = split.layer
    assert layer.busy is not None
    for start, end in split.keep:
        there = frozenset(lsn for lsn in layer.busy if start <= lsn < end)
        size = 300 + layer.size * len(there) // len(layer.busy)
        yield Layer(layer.key_start, layer.key_end, start, end, False, size, there)


# ---- a timeline

VALUE = 4000


@pytest.fixture
def little_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes are worth the work."""
    monkeypatch.setattr(compaction_plan, "MIN_GARBAGE", 5000)


@pytest.fixture
def repository(tmp_path: Path, little_garbage: None) -> Iterator[Repository]:
    with opened(tmp_path, page_cache_size=0, compress_layers=False) as repository:
        yield repository


def value(number: int, lsn: int) -> bytes:
    return b"%d.%d" % (number, lsn) + bytes(VALUE)


def overwrite(timeline: Timeline, *lsns: int) -> None:
    """New versions of keys 0 to 3, all of them in one delta over their keys."""
    for lsn in lsns:
        put(timeline, lsn, *((i, IMAGE, value(i, lsn)) for i in range(4)))
    timeline.checkpoint()
    compact(timeline)


def compact(timeline: Timeline) -> int:
    """Rounds until nothing is left to do; how many deltas were split."""
    split = 0
    for _ in range(20):
        result = timeline.compact(every_key(timeline), force=True)
        split += result.deltas_split
        if result.done:
            return split
    raise AssertionError("rounds do not end")


def collect(repository: Repository, cutoff: int) -> None:
    """Garbage collection and compaction until nothing is left to do."""
    timeline = repository.timeline(MAIN)
    while repository.gc(MAIN, choose_cutoff=lambda _: cutoff).layers_removed or compact(timeline):
        pass


def versions_on_disk(timeline: Timeline) -> set[int]:
    """The LSNs of the changes in deltas."""
    deltas = (layer for layer in timeline.view.layers if not layer.is_image)
    return {entry[1] for layer in deltas for entry in layer.entries()}


def check_reads(timeline: Timeline, lsns: Iterable[int]) -> None:
    for lsn in lsns:
        found = timeline.get_vectored([key(i) for i in range(4)], lsn)
        assert found == [value(i, lsn) for i in range(4)]


def test_a_quiet_timeline_ends_near_its_live_data(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    lsns = range(24, 184, 8)
    overwrite(timeline, *lsns)
    assert layers(timeline)["delta"] == [(17, 177)]
    collect(repository, 160)
    assert layers(timeline) == {"l0": [], "delta": [(161, 177)], "image": [(160, 161)]}
    assert versions_on_disk(timeline) == {168, 176}
    check_reads(timeline, (160, 168, 176))
    assert sum(layer.size for layer in timeline.view.layers) < 3 * 4 * (VALUE + 300) + 10_000
    repository.shutdown(flush=False)
    with opened(tmp_path) as second:
        assert layers(second.timeline(MAIN))["delta"] == [(161, 177)]
        check_reads(second.timeline(MAIN), (160, 168, 176))


def test_an_l0_delta_that_reaches_beyond_the_cutoff_is_merged_and_split(
    repository: Repository,
) -> None:
    timeline = new_timeline(repository)
    for lsn in range(24, 184, 8):
        put(timeline, lsn, *((i, IMAGE, value(i, lsn)) for i in range(4)))
    timeline.checkpoint()
    repository.gc(MAIN, choose_cutoff=lambda _: 160)
    for _ in range(10):
        if timeline.compact(every_key(timeline)).done:
            break
    assert layers(timeline) == {"l0": [], "delta": [(161, 177)], "image": [(16, 17), (160, 161)]}
    check_reads(timeline, (160, 168, 176))


def test_branches_and_reads_inside_a_delta_keep_what_they_need(repository: Repository) -> None:
    timeline = new_timeline(repository)
    overwrite(timeline, *range(24, 104, 8))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=96)
    overwrite(timeline, *range(104, 184, 8))
    overwrite(timeline, *range(184, 264, 8))
    with timeline.pin(136):
        collect(repository, 240)
        check_reads(timeline, (136, *range(240, 264, 8)))
        check_reads(branch, (96,))
        kept = versions_on_disk(timeline)
        assert {248, 256} <= kept
        assert not kept & {*range(144, 241, 8)}
        assert layers(timeline)["delta"] == [(17, 97), (97, 137), (241, 257)]
        # The next cutoff takes nothing from what they hold.
        collect(repository, 248)
        assert layers(timeline)["delta"] == [(17, 97), (97, 137), (249, 257)]
        check_reads(timeline, (136, 248, 256))
        check_reads(branch, (96,))
    # The read has ended; nothing else has changed.
    collect(repository, 248)
    assert layers(timeline)["delta"] == [(17, 97), (249, 257)]
    check_reads(branch, (96,))
    repository.detach_timeline(BRANCH)
    collect(repository, 248)
    assert layers(timeline)["delta"] == [(249, 257)]
    check_reads(timeline, (248, 256))


def test_what_a_read_held_is_found_when_it_ends(repository: Repository) -> None:
    """By a background round, which looks only after something has changed."""
    timeline = new_timeline(repository)
    overwrite(timeline, *range(24, 184, 8))
    with timeline.pin(152):
        collect(repository, 160)
        assert layers(timeline)["delta"] == [(17, 177)]
        while not timeline.compact(every_key(timeline)).done:
            pass
    result = timeline.compact(every_key(timeline))
    assert (result.images_written, result.deltas_split) == (1, 1)
    assert layers(timeline)["delta"] == [(161, 177)]


def test_the_cutoff_is_durable_before_anything_is_dropped(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = new_timeline(repository)
    overwrite(timeline, *range(24, 184, 8))
    timeline.publish_gc_cutoff(160)
    on_disk = timeline.directory.path / "metadata"
    assert read_metadata(on_disk).latest_gc_cutoff_lsn < 160
    seen: list[int] = []
    publish = LayerSet.publish

    def look(self: LayerSet, layers: LayerMap[LayerFile], *, flushed: bool) -> None:
        if not set(self.view.layers) <= set(layers):
            seen.append(read_metadata(on_disk).latest_gc_cutoff_lsn)
        publish(self, layers, flushed=flushed)

    monkeypatch.setattr(LayerSet, "publish", look)
    assert compact(timeline) == 1
    assert seen == [160]


def test_a_delta_that_cannot_be_deleted_is_deleted_later(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = new_timeline(repository)
    overwrite(timeline, *range(24, 184, 8))
    repository.gc(MAIN, choose_cutoff=lambda _: 160)
    (broken,) = (layer for layer in timeline.view.layers if not layer.is_image)

    def fail(self: object, layer: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(timeline.directory), "unlink", fail)
        assert compact(timeline) == 1
    # It does not count any more, and goes at the next start.
    assert layers(timeline)["delta"] == [(161, 177)]
    assert Path(broken.path).exists()
    repository.shutdown(flush=False)
    with opened(repository.path) as again:
        timeline = again.timeline(MAIN)
    assert not Path(broken.path).exists()
    assert layers(timeline)["delta"] == [(161, 177)]
