"""The read path against a model of the history, and its steps against a walk in plain Python.

Random stores: branches, layers in memory, deltas over all keys and over some, images, deleted
ranges, and what interrupted compactions leave behind.
"""

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageserver.layered_repository import reader
from pageserver.layered_repository.errors import KeyNotFound, LayerGoneError, MissingBaseError
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.page_cache import PageCache, TimelineCache
from pageserver.layered_repository.reader import ReadView, ReconstructInput
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline

IMAGE, RECORD, INIT_RECORD = 1, 2, 3
TENANT, TIMELINE = b"a" * 16, b"b" * 16
KEYS = [bytes([0] * 17 + [i]) for i in range(8)]
BORDERS = [MIN_KEY, *KEYS[1:], MAX_KEY]

Value = tuple[int, int, bytes]  # LSN, flags, data


def redo(base: bytes | None, records: Sequence[Value]) -> bytes:
    return (base or b"") + b"".join(data for _, _, data in records)


@dataclass
class History:
    """What happened on a timeline, whatever layers it is kept in."""

    ancestor: "History | None"
    start_lsn: int
    last_lsn: int = 0
    values: dict[bytes, list[Value]] = field(default_factory=dict)
    deleted: list[tuple[bytes, bytes, int]] = field(default_factory=list)

    def chain(self, key: bytes, lsn: int) -> list[Value]:
        """What the value of a key is made of, from what initialises it on; [] if there is none."""
        chain: list[Value] = []
        if self.ancestor is not None:
            chain = self.ancestor.chain(key, min(lsn, self.start_lsn))
        gone = max(
            (t for low, high, t in self.deleted if low <= key < high and t <= lsn), default=0
        )
        if gone:
            chain = []
        for value in self.values.get(key, []):
            if gone < value[0] <= lsn:
                chain = [value] if value[1] & 1 else [*chain, value]
        return chain

    def value(self, key: bytes, lsn: int) -> bytes | None:
        """The value of a key."""
        chain = self.chain(key, lsn)
        return redo(None, chain) if chain else None

    def state(self, start: bytes, end: bytes, lsn: int) -> list[tuple[bytes, bytes]]:
        """The keys of a range at an LSN with their values: what an image holds."""
        found = ((key, self.value(key, lsn)) for key in KEYS if start <= key < end)
        return [(key, value) for key, value in found if value is not None]

    def changes(self, name: LayerName) -> list[tuple[bytes, int, int, bytes]]:
        """What a delta of that name holds."""
        return [
            (key, lsn, flags, data)
            for key in KEYS
            for lsn, flags, data in self.values.get(key, [])
            if name.key_start <= key < name.key_end and name.start_lsn <= lsn < name.end_lsn
        ]


@dataclass
class FakeTimeline:
    """What the reader needs of a timeline; it notes what had to be reconstructed."""

    view: ReadView
    ancestor: "FakeTimeline | None"
    ancestor_lsn: int
    last_record_lsn: int
    page_cache: PageCache
    rebuilt: TimelineCache = field(init=False)
    settings: StoreSettings = field(default_factory=StoreSettings)
    timeline_id: str = "test"
    needed: list[ReconstructInput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rebuilt = TimelineCache(self.page_cache)

    def reconstruct(self, needed: Sequence[ReconstructInput]) -> list[bytes]:
        """Append records to the base."""
        self.needed += needed
        return [redo(item.base, item.records) for item in needed]

    def wait_lsn(self, lsn: int, timeout: float) -> None:
        """The WAL arrives at once."""
        self.last_record_lsn = lsn

    @property
    def timeline(self) -> Timeline:
        """Itself, for the type checker."""
        return cast(Timeline, self)


# ---- random stores


def ranges() -> st.SearchStrategy[tuple[bytes, bytes]]:
    return (
        st.tuples(st.sampled_from(BORDERS), st.sampled_from(BORDERS))
        .filter(lambda pair: pair[0] != pair[1])
        .map(lambda pair: (min(pair), max(pair)))
    )


WHOLE = st.just((MIN_KEY, MAX_KEY))


def draw_history(draw: st.DrawFn, ancestor: History | None) -> History:
    start = draw(st.integers(1, ancestor.last_lsn)) if ancestor else 0
    history = History(ancestor, start, start)
    events = draw(st.lists(st.integers(0, 19), min_size=1 if ancestor is None else 0, max_size=30))
    for event in events:
        history.last_lsn += draw(st.integers(1, 2))
        lsn = history.last_lsn
        if event < 2:
            history.deleted.append((*draw(ranges()), lsn))
            continue
        for key in draw(st.sets(st.sampled_from(KEYS), min_size=1, max_size=3)):
            known = history.value(key, lsn) is not None
            flags = draw(st.sampled_from((IMAGE, RECORD, INIT_RECORD)[0 if known else 2 :]))
            history.values.setdefault(key, []).append((lsn, flags, b"%d." % lsn))
    history.last_lsn += 1
    return history


def write_layer(directory: Path, history: History, name: LayerName) -> LayerFile:
    path = directory / f"{name}-{uuid.uuid4().hex}"
    writer = LayerWriter(path, TENANT, TIMELINE)
    if name.is_image:
        for key, data in history.state(name.key_start, name.key_end, name.start_lsn):
            writer.add(key, name.start_lsn, IMAGE, data)
    else:
        for change in history.changes(name):
            writer.add(*change)
    writer.finish(name)
    return LayerFile(path, name, TENANT, TIMELINE)


def draw_files(draw: st.DrawFn, history: History, last_lsn: int) -> set[LayerName]:
    """Layers that hold all up to an LSN, with images and overlapping leftovers."""
    lsns = st.integers(history.start_lsn + 1, last_lsn)
    cuts = sorted({history.start_lsn, last_lsn, *draw(st.lists(lsns, max_size=5))})
    names = set()
    for start, end in pairwise(cuts):
        borders = [MIN_KEY, *sorted(draw(st.sets(st.sampled_from(KEYS[1:]), max_size=2))), MAX_KEY]
        for key_start, key_end in pairwise(borders):
            names.add(LayerName.delta(key_start, key_end, start + 1, end + 1))
    for key_start, key_end in draw(st.lists(ranges() | WHOLE, max_size=4)):
        start, end = sorted(draw(st.tuples(lsns, lsns)))
        names.add(LayerName.delta(key_start, key_end, start, end + 1))
    for key_start, key_end in draw(st.lists(ranges(), max_size=4)):
        names.add(LayerName.image(key_start, key_end, draw(lsns)))
    for key_start, key_end, lsn in history.deleted:
        if lsn <= last_lsn:
            names.add(LayerName.image(key_start, key_end, lsn))
    return {name for name in names if name.is_image or history.changes(name)}


def fill_memory(history: History, start_lsn: int, end_lsn: int) -> InMemoryLayer:
    layer = InMemoryLayer(start_lsn)
    changes = [
        (lsn, key, flags, data)
        for key, values in history.values.items()
        for lsn, flags, data in values
    ]
    changes += [(lsn, key_start, -1, key_end) for key_start, key_end, lsn in history.deleted]
    for lsn, key, flags, data in sorted(changes):
        if not start_lsn <= lsn < end_lsn:
            continue
        if flags < 0:
            layer.delete_range(key, data, lsn)
        else:
            layer.put(key, lsn, flags, data)
    return layer


@st.composite
def stores(draw: st.DrawFn) -> list[tuple[History, list[LayerName], list[int]]]:
    """Histories, oldest branch first, each with its files and where its memory layers begin."""
    found: list[tuple[History, list[LayerName], list[int]]] = []
    for _ in range(draw(st.integers(1, 4))):
        ancestor = draw(st.sampled_from(found))[0] if found else None
        history = draw_history(draw, ancestor)
        lsns = st.integers(history.start_lsn, history.last_lsn)
        durable, *cuts = sorted({draw(lsns), *draw(st.lists(lsns, max_size=2))})
        names = draw_files(draw, history, durable) if durable > history.start_lsn else set()
        found.append((history, sorted(names, key=str), [durable + 1, *(c + 1 for c in cuts)]))
    return found


def build(
    directory: Path, store: list[tuple[History, list[LayerName], list[int]]], cache_size: int
) -> list[tuple[History, FakeTimeline]]:
    built: list[tuple[History, FakeTimeline]] = []
    for history, names, starts in store:
        layers = LayerMap(write_layer(directory, history, name) for name in names)
        memory = []
        for start, end in zip(starts, [*starts[1:], history.last_lsn + 1], strict=True):
            memory.append(fill_memory(history, start, end))
            memory[-1].publish(end - 1)
            if end <= history.last_lsn:
                memory[-1].freeze(end, 0)
        ancestor = next((t for h, t in built if h is history.ancestor), None)
        view = ReadView(memory[-1], tuple(reversed(memory[:-1])), layers)
        cache = PageCache(cache_size)
        built.append(
            (history, FakeTimeline(view, ancestor, history.start_lsn, history.last_lsn, cache))
        )
    return built


# ---- the walk in plain Python


def walk(timeline: FakeTimeline, key: bytes, lsn: int) -> list[Value]:
    """The newest values of a key down to an image or an initialising one, by the definition."""
    found: list[Value] = []
    current: FakeTimeline | None = timeline
    upper = lsn
    while current is not None:
        if upper > current.ancestor_lsn and _walk_here(current.view, key, upper, found):
            break
        upper, current = min(upper, current.ancestor_lsn), current.ancestor
    return found[::-1]


def _walk_here(view: ReadView, key: bytes, upper: int, found: list[Value]) -> bool:
    """Whether nothing older counts."""
    for layer in (view.open, *view.frozen):
        deleted = [t for a, b, t in layer.tombstones() if a <= key < b and t <= upper]
        floor = max(deleted, default=0) + 1
        if _take(_values(layer, key), floor, upper, found) or deleted:
            return True
        upper = min(upper, layer.start_lsn - 1)
    layers = [x for x in view.layers if x.key_start <= key < x.key_end]
    while upper:
        below = [x for x in layers if x.start_lsn <= upper]
        image = max((x.start_lsn for x in below if x.is_image), default=0)
        deltas = [x for x in below if not x.is_image and x.end_lsn > image + 1]
        if not deltas or image == upper:
            images = [x for x in below if x.is_image and x.start_lsn == image]
            for layer_file in images[:1]:
                _take(_values(layer_file, key), image, image, found)
            return bool(images)
        delta = max(deltas, key=lambda x: x.end_lsn)
        floor = max(delta.start_lsn, image + 1)
        if _take(_values(delta, key), floor, upper, found):
            return True
        upper = floor - 1
    return False


def _values(layer: LayerFile | InMemoryLayer, key: bytes) -> list[Value]:
    """The values of a key in one layer, newest first."""
    if isinstance(layer, LayerFile):
        return [(lsn, flags, data) for k, lsn, flags, data in layer.entries() if k == key][::-1]
    end = layer.end_lsn or 1 << 62
    return [v for v in HISTORY_OF[id(layer)].get(key, []) if layer.start_lsn <= v[0] < end][::-1]


def _take(values: list[Value], floor: int, upper: int, found: list[Value]) -> bool:
    for value in values:
        if floor <= value[0] <= upper:
            found.append(value)
            if value[1] & 1:
                return True
    return False


HISTORY_OF: dict[int, dict[bytes, list[Value]]] = {}


@pytest.fixture(autouse=True)
def forget_histories() -> Iterator[None]:
    yield
    HISTORY_OF.clear()


# ---- the properties


@settings(derandomize=True, deadline=None, max_examples=60)
@given(stores(), st.sampled_from([0, 2000, 1 << 20]))
def test_reads_equal_the_history(
    store: list[tuple[History, list[LayerName], list[int]]], cache_size: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for history, fake in build(Path(directory), store, cache_size):
            timeline = fake.timeline
            for lsn in range(1, history.last_lsn + 1):
                expected = [history.value(key, lsn) for key in KEYS]
                assert reader.get_vectored(timeline, KEYS, lsn) == expected
                assert reader.get_vectored(timeline, KEYS[::-2], lsn) == expected[::-2]
                for key, value in zip(KEYS, expected, strict=True):
                    if value is None:
                        with pytest.raises(KeyNotFound):
                            reader.get(timeline, key, lsn)
                    else:
                        assert reader.get(timeline, key, lsn) == value
                for start in (0, 3):
                    assert reader.scan_keys(timeline, KEYS[start], KEYS[7], lsn) == [
                        KEYS[i] for i in range(start, 7) if expected[i] is not None
                    ]
            assert fake.page_cache.size <= cache_size


@settings(derandomize=True, deadline=None, max_examples=40)
@given(stores())
def test_the_walk_finds_what_a_plain_one_finds(
    store: list[tuple[History, list[LayerName], list[int]]],
) -> None:
    """Nothing more either: what lies below an initialising value is not read."""
    with tempfile.TemporaryDirectory() as directory:
        for history, fake in build(Path(directory), store, 0):
            for layer in (fake.view.open, *fake.view.frozen):
                HISTORY_OF[id(layer)] = history.values
            for lsn in range(1, history.last_lsn + 1, 3):
                fake.needed.clear()
                reader.get_vectored(fake.timeline, KEYS, lsn)
                made = {item.key: item for item in fake.needed}
                for key in KEYS:
                    values = walk(fake, key, lsn)
                    if not values or (len(values) == 1 and values[0][1] == IMAGE):
                        assert key not in made
                        continue
                    base = values.pop(0)[2] if values[0][1] == IMAGE else None
                    assert made.pop(key) == ReconstructInput(key, values[-1][0], base, values)
                assert not made


def simple_store(directory: Path, *names: LayerName) -> tuple[History, FakeTimeline]:
    """A few keys, some of them with records."""
    history = History(None, 0, 40)
    for i, key in enumerate(KEYS[:4]):
        history.values[key] = [(8, IMAGE, b"first"), (16 + i, RECORD, b"+"), (30, RECORD, b"!")]
    store = [(history, list(names), [41])]
    return build(directory, store, 1 << 20)[0]


def test_records_without_a_base_are_an_error(tmp_path: Path) -> None:
    _, fake = simple_store(tmp_path, LayerName.l0_delta(9, 41))
    with pytest.raises(MissingBaseError, match=r"got 2 WAL records"):
        reader.get(fake.timeline, KEYS[0], 40)
    with pytest.raises(MissingBaseError, match=r"got 2 WAL records"):
        reader.get_vectored(fake.timeline, KEYS, 40)


def test_a_cached_version_is_not_seen_beyond_an_image_without_the_key(tmp_path: Path) -> None:
    _, fake = simple_store(tmp_path, LayerName.l0_delta(1, 41))
    assert reader.get(fake.timeline, KEYS[0], 20) == b"first+"
    empty = write_layer(tmp_path, History(None, 0), LayerName.image(KEYS[0], KEYS[1], 24))
    view = fake.view
    fake.view = ReadView(view.open, (), view.layers.with_changes([empty]))
    assert reader.get(fake.timeline, KEYS[0], 23) == b"first+"
    with pytest.raises(KeyNotFound):
        reader.get(fake.timeline, KEYS[0], 29)
    # The record at 30 has nothing to be applied to: better an error than the version before.
    with pytest.raises(MissingBaseError):
        reader.get(fake.timeline, KEYS[0], 40)


def test_a_cached_version_counts_where_an_image_of_its_lsn_was_made_since(tmp_path: Path) -> None:
    history, fake = simple_store(tmp_path, LayerName.l0_delta(1, 31))
    expected = [history.value(key, 40) for key in KEYS]
    assert reader.get_vectored(fake.timeline, KEYS, 40) == expected
    image = write_layer(tmp_path, history, LayerName.image(MIN_KEY, MAX_KEY, 30))
    fake.view = ReadView(fake.view.open, (), fake.view.layers.with_changes([image]))
    assert reader.get_vectored(fake.timeline, KEYS, 40) == expected
    assert [reader.get(fake.timeline, key, 40) for key in KEYS[:4]] == expected[:4]


def test_a_layer_within_another_ones_lsns_is_not_read_again(tmp_path: Path) -> None:
    inner = LayerName.delta(MIN_KEY, KEYS[7], 18, 20)
    names = (LayerName.image(MIN_KEY, KEYS[7], 8), LayerName.l0_delta(16, 41), inner)
    history, fake = simple_store(tmp_path, *names)
    expected = [history.value(key, 40) for key in KEYS]
    assert reader.get_vectored(fake.timeline, KEYS, 40) == expected


def test_reads_for_images_leave_the_page_cache_alone(tmp_path: Path) -> None:
    history, fake = simple_store(tmp_path, LayerName.l0_delta(1, 41))
    expected = [history.value(key, 40) for key in KEYS]
    assert reader.get_vectored(fake.timeline, KEYS, 40, cache=False) == expected
    assert len(fake.page_cache) == 0
    assert reader.get_vectored(fake.timeline, KEYS, 40) == expected
    assert len(fake.page_cache) == 4
    # It is used, however.
    fake.needed.clear()
    assert reader.get_vectored(fake.timeline, KEYS, 40, cache=False) == expected
    assert fake.needed == []


def test_very_many_keys_in_any_order(tmp_path: Path) -> None:
    name = LayerName.l0_delta(1, 9)
    keys = [number.to_bytes(18, "big") for number in range(5000)]
    writer = LayerWriter(tmp_path / str(name), TENANT, TIMELINE)
    for key in keys[::2]:
        writer.add(key, 8, IMAGE, key[-2:])
    writer.finish(name)
    layers = LayerMap([LayerFile(tmp_path / str(name), name, TENANT, TIMELINE)])
    view = ReadView(InMemoryLayer(9), (), layers)
    fake = FakeTimeline(view, None, 0, 8, PageCache(0))
    expected = [None if i & 1 else key[-2:] for i, key in enumerate(keys)]
    assert reader.get_vectored(fake.timeline, keys, 8) == expected
    assert reader.get_vectored(fake.timeline, keys[::-1], 8) == expected[::-1]
    assert reader.get_vectored(fake.timeline, keys[:9] * 2, 8) == expected[:9] * 2
    assert reader.get_vectored(fake.timeline, [], 8) == []
    with pytest.raises(ValueError, match="18 bytes"):
        reader.get_vectored(fake.timeline, [b"short"], 8)


def test_one_key_in_very_many_l0_deltas(tmp_path: Path) -> None:
    """Each of 100 deltas has a value of a key of its own, every third one of a common key."""
    common, absent = MIN_KEY, bytes([7] * 18)
    own = [bytes([1] * 17 + [i]) for i in range(100)]
    layers = []
    for i, key in enumerate(own):
        name = LayerName.l0_delta(8 * i + 8, 8 * i + 16)
        writer = LayerWriter(tmp_path / str(name), TENANT, TIMELINE)
        if i % 3 == 0:
            writer.add(common, name.start_lsn, IMAGE, b"%d" % i)
        writer.add(key, name.start_lsn, IMAGE, b"own")
        writer.finish(name)
        layers.append(LayerFile(tmp_path / str(name), name, TENANT, TIMELINE))
    view = ReadView(InMemoryLayer(808), (), LayerMap(layers))
    fake = FakeTimeline(view, None, 0, 807, PageCache(0)).timeline

    def check() -> None:
        for i, key in enumerate(own):
            lsn = 8 * i + 8
            assert reader.get(fake, common, lsn) == b"%d" % (i - i % 3)
            assert reader.get(fake, key, lsn) == reader.get(fake, key, 807) == b"own"
            for wanted, before in ((key, lsn - 1), (absent, lsn)):
                with pytest.raises(KeyNotFound):
                    reader.get(fake, wanted, before)

    check()
    assert all(layer.was_used() for layer in layers)
    for layer in layers[::2]:
        layer.evict()
    check()


# ---- layers that are deleted while somebody reads


class MovingTimeline(FakeTimeline):
    """A timeline whose layers are replaced as soon as a reader has taken its view."""

    views: list[ReadView]

    def __getattribute__(self, name: str) -> object:
        if name == "view":
            views: list[ReadView] = object.__getattribute__(self, "views")
            return views.pop(0) if len(views) > 1 else views[0]
        return object.__getattribute__(self, name)


def remove(layer: LayerFile) -> None:
    layer.gone = True
    Path(layer.path).unlink()


def moving(directory: Path) -> tuple[History, MovingTimeline, ReadView, ReadView]:
    """A timeline with a view of deleted files and a current one with what replaced them."""
    history, fake = simple_store(directory, LayerName.l0_delta(1, 17), LayerName.l0_delta(17, 41))
    merged = write_layer(directory, history, LayerName.delta(MIN_KEY, KEYS[7], 1, 41))
    stale, old = fake.view, list(fake.view.layers)
    current = ReadView(stale.open, (), stale.layers.with_changes([merged], old))
    remove(next(layer for layer in old if layer.start_lsn == 1))
    timeline = MovingTimeline(current, None, 0, 40, fake.page_cache)
    return history, timeline, stale, current


def test_a_read_starts_again_when_its_layers_were_replaced(tmp_path: Path) -> None:
    history, fake, stale, current = moving(tmp_path)
    expected = [history.value(key, 40) for key in KEYS]
    # The newer L0 is still there, so values were found before the older one turned out to be gone.
    fake.views = [stale, current]
    assert reader.get(fake.timeline, KEYS[1], 40) == expected[1]
    fake.views = [stale, ReadView(stale.open, (), stale.layers), current]
    assert reader.get_vectored(fake.timeline, KEYS, 40) == expected
    for item in fake.needed:
        assert [lsn for lsn, _, _ in item.records] in [[16 + i, 30] for i in range(4)]


def test_a_scan_starts_again_when_its_layers_were_replaced(tmp_path: Path) -> None:
    _, fake, stale, current = moving(tmp_path)
    fake.views = [stale, current]
    assert reader.scan_keys(fake.timeline, MIN_KEY, MAX_KEY, 40) == KEYS[:4]


def test_a_file_missing_in_the_current_view_is_an_error(tmp_path: Path) -> None:
    _, fake, stale, _ = moving(tmp_path)
    fake.views = [stale]
    for read in (
        lambda: reader.get(fake.timeline, KEYS[0], 40),
        lambda: reader.get_vectored(fake.timeline, KEYS, 40),
        lambda: reader.scan_keys(fake.timeline, MIN_KEY, MAX_KEY, 40),
    ):
        with pytest.raises(LayerGoneError):
            read()


def test_an_ancestor_is_waited_for(tmp_path: Path) -> None:
    history, parent = simple_store(tmp_path, LayerName.l0_delta(1, 41))
    parent.last_record_lsn = 8
    view = ReadView(InMemoryLayer(31), (), LayerMap())
    child = FakeTimeline(view, parent, 30, 30, PageCache(0))
    assert reader.get(child.timeline, KEYS[0], 50) == history.value(KEYS[0], 30)
    assert parent.last_record_lsn == 30
