"""The layer map against a search through all layers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName

KEYS = [bytes([0] * 17 + [i]) for i in range(12)]


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


def expected_search(layers: set[LayerName], key: bytes, upper: int) -> tuple[bool, int, int] | None:
    """(image or delta, highest LSN it answers for, floor) by the definition."""
    covering = [x for x in layers if x.key_start <= key < x.key_end and x.start_lsn <= upper]
    image = max((x.start_lsn for x in covering if x.is_image), default=0)
    top = max((min(x.end_lsn - 1, upper) for x in covering if not x.is_image), default=0)
    if top <= image:
        return (True, image, image) if image else None
    return (False, top, image + 1)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(layer_names(), max_size=25), st.data())
def test_search_finds_the_newest_layer(names: list[LayerName], data: st.DataObject) -> None:
    removed = data.draw(st.sets(st.sampled_from(names))) if names else set()
    layers: LayerMap[LayerName] = LayerMap(names[: len(names) // 2])
    before = set(layers)
    layers = layers.with_changes(add=names[len(names) // 2 :])
    layers = layers.with_changes(remove=removed)
    left = set(names) - removed
    assert set(layers) == left
    assert before == set(names[: len(names) // 2])
    for key in KEYS:
        segment = layers.segment(key)
        end = layers.segment_end(segment)
        assert end is None or key < end
        for upper in range(1, 82, 3):
            hit = layers.search(segment, upper)
            expected = expected_search(left, key, upper)
            if hit is None or expected is None:
                assert hit is None
                assert expected is None
                continue
            layer, floor = hit
            is_image, top, lowest = expected
            assert layer in left
            assert layer.is_image == is_image
            assert layer.key_start <= key < layer.key_end
            assert min(layer.end_lsn - 1, upper) == top
            assert floor == max(lowest, layer.start_lsn)


def test_a_map_never_changes() -> None:
    image = LayerName.image(KEYS[0], KEYS[5], 10)
    old: LayerMap[LayerName] = LayerMap([image])
    new = old.with_changes(add=[LayerName.image(KEYS[2], KEYS[3], 20)], remove=[image])
    assert old.search(old.segment(KEYS[2]), 30) == (image, 10)
    assert new.search(new.segment(KEYS[1]), 30) is None
    assert len(old) == len(new) == 1


def test_borders_of_removed_layers_go() -> None:
    wide = LayerName.image(KEYS[0], KEYS[10], 10)
    narrow = [LayerName.delta(KEYS[i], KEYS[i + 1], 11, 20) for i in range(10)]
    layers = LayerMap([wide, *narrow]).with_changes(remove=narrow)
    assert layers.segment_end(layers.segment(KEYS[0])) == KEYS[10]


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
