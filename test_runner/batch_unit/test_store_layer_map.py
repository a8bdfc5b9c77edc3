"""The layer map against a search through all layers."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName

KEYS = sorted(
    [
        MIN_KEY,
        *(bytes([0] * 17 + [i]) for i in range(1, 9)),
        bytes([0] * 7 + [1] + [0] * 10),
        bytes([0] * 15 + [1, 0, 0]),
        bytes([0] * 16 + [1, 0]),
        bytes([0] * 16 + [1, 1]),
        b"\x80" + bytes(17),
        b"\xff" * 17 + b"\xfe",
        MAX_KEY,
    ]
)
TOP_LSN = 82


@st.composite
def layer_names(draw: st.DrawFn) -> LayerName:
    first = draw(st.integers(0, len(KEYS) - 2))
    key_start, key_end = KEYS[first], KEYS[draw(st.integers(first + 1, len(KEYS) - 1))]
    if draw(st.booleans()):
        return LayerName.image(key_start, key_end, draw(st.integers(1, 60)))
    start = draw(st.integers(1, 50))
    end = start + draw(st.integers(1, 30))
    if draw(st.booleans()):
        key_start, key_end = MIN_KEY, MAX_KEY
    return LayerName.delta(key_start, key_end, start, end)


@st.composite
def maps(draw: st.DrawFn) -> tuple[LayerMap[LayerName], set[LayerName]]:
    """A map with a history, and the layers that it must hold."""
    layers: LayerMap[LayerName] = LayerMap()
    left: set[LayerName] = set()
    for names in draw(st.lists(st.lists(layer_names(), max_size=12), max_size=3)):
        removed = draw(st.sets(st.sampled_from(sorted(left, key=str)))) if left else set()
        layers = layers.with_changes(names, removed)
        left = (left - removed) | set(names)
    return layers, left


def expected_search(layers: set[LayerName], key: bytes, upper: int) -> tuple[bool, int, int] | None:
    """(image or delta, highest LSN it answers for, floor) by the definition."""
    covering = [x for x in layers if x.key_start <= key < x.key_end and x.start_lsn <= upper]
    image = max((x.start_lsn for x in covering if x.is_image), default=0)
    top = max((min(x.end_lsn - 1, upper) for x in covering if not x.is_image), default=0)
    if top <= image:
        return (True, image, image) if image else None
    return (False, top, image + 1)


def check_search(layers: LayerMap[LayerName], left: set[LayerName], key: bytes, upper: int) -> None:
    hit = layers.search(key, upper)
    expected = expected_search(left, key, upper)
    if hit is None or expected is None:
        assert hit is None
        assert expected is None
        return
    layer, floor = hit
    is_image, top, lowest = expected
    assert layer in left
    assert layer.is_image == is_image
    assert layer.key_start <= key < layer.key_end
    assert min(layer.end_lsn - 1, upper) == top
    assert floor == max(lowest, layer.start_lsn)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(maps())
def test_search_finds_the_newest_layer(built: tuple[LayerMap[LayerName], set[LayerName]]) -> None:
    layers, left = built
    assert len(layers) == len(left)
    assert sorted(layers, key=str) == sorted(left, key=str)
    assert list(layers.l0_deltas) == sorted(
        (name for name in left if name.is_l0), key=lambda name: (name.start_lsn, name.end_lsn)
    )
    borders = {x for name in left if not name.is_l0 for x in (name.key_start, name.key_end)}
    for key in KEYS[:-1]:
        assert layers.next_border(key) == min((b for b in borders if b > key), default=None)
        for upper in range(1, TOP_LSN, 3):
            check_search(layers, left, key, upper)


def covered(layers: set[LayerName], start: bytes, end: bytes, low: int, high: int) -> bool:
    """Whether every key between two borders is in an image of the LSN range."""
    images = [x for x in layers if x.is_image and low <= x.start_lsn <= high]
    return all(
        any(image.key_start <= key < image.key_end for image in images)
        for key in KEYS
        if start <= key < end
    )


@settings(derandomize=True, deadline=None, max_examples=200)
@given(maps(), st.integers(0, len(KEYS) - 1), st.integers(0, len(KEYS) - 1), st.data())
def test_layers_of_a_key_range(
    built: tuple[LayerMap[LayerName], set[LayerName]], first: int, last: int, data: st.DataObject
) -> None:
    layers, left = built
    start, end = KEYS[first], KEYS[last]
    overlapping = [x for x in left if max(x.key_start, start) < min(x.key_end, end)]
    found = (layers.images(start, end), layers.deltas(start, end))
    for names, is_image in zip(found, (True, False), strict=True):
        assert sorted(names, key=str) == sorted(
            (x for x in overlapping if x.is_image == is_image), key=str
        )
    for low in range(1, TOP_LSN, 20):
        high = low + data.draw(st.integers(0, 60))
        expected = covered(left, start, end, low, high)
        assert layers.covering_images(start, end, low, high) == expected


def test_a_map_never_changes() -> None:
    image = LayerName.image(KEYS[0], KEYS[5], 10)
    old: LayerMap[LayerName] = LayerMap([image])
    new = old.with_changes(add=[LayerName.image(KEYS[2], KEYS[3], 20)], remove=[image])
    assert old.search(KEYS[2], 30) == (image, 10)
    assert new.search(KEYS[1], 30) is None
    assert len(old) == len(new) == 1
    with pytest.raises(TypeError, match="never changes"):
        old.__init__([])  # type: ignore[misc]


def test_borders_of_removed_layers_go() -> None:
    wide = LayerName.image(KEYS[0], KEYS[10], 10)
    narrow = [LayerName.delta(KEYS[i], KEYS[i + 1], 11, 20) for i in range(10)]
    layers = LayerMap([wide, *narrow]).with_changes(remove=narrow)
    assert layers.next_border(KEYS[0]) == KEYS[10]


class File:
    """A layer that equals only itself, as layer files do."""

    def __init__(self, name: LayerName) -> None:
        self.key_start, self.key_end = name.key_start, name.key_end
        self.start_lsn, self.end_lsn = name.start_lsn, name.end_lsn
        self.is_image = name.is_image


@pytest.mark.parametrize(
    "name", [LayerName.l0_delta(1, 9), LayerName.image(KEYS[1], KEYS[2], 5)], ids=str
)
def test_a_rewritten_file_takes_the_place_of_the_old_one(name: LayerName) -> None:
    old, new = File(name), File(name)
    layers = LayerMap([old])
    for changed in (layers.with_changes([new]), layers.with_changes([new], [old])):
        assert list(changed) == [new]
        assert changed.search(KEYS[1], 9) == (new, name.start_lsn)
        assert list(changed.with_changes(remove=[old])) == [new]
        assert len(changed.with_changes(remove=[new])) == 0
        assert new in changed
        assert old not in changed


@pytest.mark.parametrize("cut", [lambda i: (0, i + 1), lambda i: (i, i + 1), lambda i: (i, 2000)])
def test_many_layers(cut: Callable[[int], tuple[int, int]]) -> None:
    """Shapes that would be deep or slow in a tree without balance."""
    files = []
    for i in range(2000):
        key_start, key_end = (number.to_bytes(18, "big") for number in cut(i))
        files.append(LayerName.delta(key_start, key_end, 8 * i + 1, 8 * i + 9))
    layers = LayerMap(files)
    for i in range(0, 2000, 97):
        assert layers.search(i.to_bytes(18, "big"), 8 * i + 4) == (files[i], 8 * i + 1)
    layers = layers.with_changes(remove=files[:1990])
    assert sorted(layers, key=str) == sorted(files[1990:], key=str)


def test_an_image_without_entries_covers_like_any_other() -> None:
    """Nothing but the name counts; images of several LSNs may cover a range together."""
    parts = [LayerName.image(KEYS[i], KEYS[i + 1], 20 + i) for i in range(6)]
    layers = LayerMap(parts)
    assert layers.covering_images(KEYS[0], KEYS[6], 20, 25)
    assert not layers.covering_images(KEYS[0], KEYS[6], 21, 25)
    assert not layers.covering_images(KEYS[0], KEYS[6], 20, 24)
    assert not layers.covering_images(KEYS[0], KEYS[7], 20, 25)
    assert layers.covering_images(KEYS[3], KEYS[3], 90, 90)


def test_names() -> None:
    names = [
        LayerName.image(KEYS[1], KEYS[2], 0x16B9188),
        LayerName.delta(KEYS[1], KEYS[2], 8, 0x16B9189),
        LayerName.l0_delta(1, 2),
    ]
    assert [LayerName.parse(str(name)) for name in names] == names
    assert str(names[0]) == f"{'0' * 35}1-{'0' * 35}2__00000000016B9188"
    assert [name.is_l0 for name in names] == [False, False, True]
    for text in ("metadata", str(names[0]) + ".0.old", str(names[1]).lower(), f"{names[2]}-1"):
        assert LayerName.parse(text) is None
