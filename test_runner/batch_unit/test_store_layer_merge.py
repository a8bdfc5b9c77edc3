"""Merges of deltas and images of parts, as files, against plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from batch_unit.layer_folder import TENANT, TIMELINE, Entry, LayerFolder, key, never

from pageserver.layered_repository.errors import CorruptLayerError, TimelineStopped
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.image_writer import BATCH_KEYS, write_image
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_merge import merge_layers
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.partitioning import Part


class Folder(LayerFolder):
    """A directory of L0 deltas, and what merges write."""

    def l0(self, entries: Sequence[Entry], start_lsn: int, end_lsn: int) -> LayerFile:
        """A finished L0 delta."""
        return self.layer(LayerName.l0_delta(start_lsn, end_lsn), entries)

    def merge(
        self, layers: Sequence[LayerFile], target: int, stop: Callable[[], bool] = never
    ) -> list[LayerFile]:
        """The merged layers, opened."""
        merged = merge_layers(
            layers,
            self.new_writer,
            target_size=target,
            start_lsn=min(layer.start_lsn for layer in layers),
            end_lsn=max(layer.end_lsn for layer in layers),
            stop=stop,
        )
        for file, name in merged:
            assert file.size == Path(file.path).stat().st_size
            LayerFile(file.path, name, TENANT, TIMELINE).verify()
        return [LayerFile(file.path, name, TENANT, TIMELINE) for file, name in merged]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def check_rectangles(merged: list[LayerFile], expected: list[Entry], lsns: tuple[int, int]) -> None:
    """The files hold every value once, and each all of its rectangle."""
    assert [entry for layer in merged for entry in layer.entries()] == expected
    for layer in merged:
        assert not layer.is_image
        assert not layer.name.is_l0
        assert list(layer.entries()) == [
            entry
            for entry in expected
            if layer.key_start <= entry[0] < layer.key_end
            and layer.start_lsn <= entry[1] < layer.end_lsn
        ]
    for (start, end), pieces in groupby(merged, lambda x: (x.key_start, x.key_end)):
        borders = [(x.start_lsn, x.end_lsn) for x in pieces]
        assert (borders[0][0], borders[-1][1]) == lsns
        assert all(a[1] == b[0] for a, b in pairwise(borders))
        assert len(borders) == 1 or int.from_bytes(end, "big") - int.from_bytes(start, "big") == 1
    assert all(a.key_end <= b.key_start or a.key_start == b.key_start for a, b in pairwise(merged))


@pytest.mark.parametrize("seed", range(60))
def test_a_merge_keeps_everything(folder: Folder, seed: int) -> None:
    rng = random.Random(seed)
    inputs, target = rng.randint(1, 12), rng.randint(300, 6000)
    keys = [key(rng.choice([0, 5, 5, 2**144 - 2, rng.randrange(60)])) for _ in range(12)]
    layers: list[LayerFile] = []
    values: dict[tuple[bytes, int], tuple[int, bytes]] = {}
    for i in range(inputs):
        entries = {}
        # Ranges that overlap: what lies in both is in both, whole.
        first, last = i * 10 + 1, i * 10 + rng.choice([10, 14])
        entries.update({at: v for at, v in values.items() if first <= at[1] <= last})
        for _ in range(rng.randrange(1, 40)):
            at = rng.choice(keys), rng.randint(max(first, i * 10 + 5), last)
            if at not in values:
                entries[at] = rng.randrange(4), rng.randbytes(rng.choice([0, 7, 100, 300]))
        values.update(entries)
        layers.append(folder.l0([(*at, *v) for at, v in entries.items()], first, last + 1))
    ends = layers[0].start_lsn, max(layer.end_lsn for layer in layers)
    rng.shuffle(layers)
    check_rectangles(
        folder.merge(layers, target), sorted((*k, *v) for k, v in values.items()), ends
    )


def test_a_file_ends_at_the_first_new_key_past_the_target(folder: Folder) -> None:
    layers = [
        folder.l0([(key(i), 10 * n + i % 3, 0, b"x" * 99) for i in range(1000)], 10 * n, 10 * n + 9)
        for n in range(1, 4)
    ]
    merged = folder.merge(layers, 60_000)
    sizes = [sum(len(entry[3]) for entry in layer.entries()) for layer in merged]
    assert all(45_000 < size < 65_000 for size in sizes[:-1])
    assert len(sizes) > 4
    assert [x.key_start for x in merged[1:]] == [x.key_end for x in merged[:-1]]
    # The key ranges are as narrow as can be.
    assert (merged[0].key_start, merged[-1].key_end) == (key(0), key(1000))


def test_a_hot_key_gets_files_of_its_own_cut_by_lsn(folder: Folder) -> None:
    hot, quiet = key(50), [key(i) for i in range(40, 60) if i != 50]
    layers = []
    for n in range(3):
        start = 1 + 1000 * n
        entries = [(k, start + 7, 0, b"q" * 50) for k in quiet]
        entries += [(hot, start + i, 0, b"h" * 100) for i in range(400)]
        layers.append(folder.l0(entries, start, start + 1000))
    merged = folder.merge(layers, 20_000)
    shapes = [(x.key_start, x.key_end) for x in merged]
    pieces = shapes[1:-1]
    assert shapes[0] == (key(40), hot)
    assert pieces == [(hot, key(51))] * len(pieces)
    assert shapes[-1] == (key(51), key(60))
    assert len(pieces) >= 6
    expected = sorted(entry for layer in layers for entry in layer.entries())
    check_rectangles(merged, expected, (1, 3001))


def test_a_whole_key_space_is_not_written_as_l0(folder: Folder) -> None:
    last = key(2**144 - 2)
    layers = [folder.l0([(MIN_KEY, 5, 0, b"a"), (last, 6, 0, b"b")], 1, 10)]
    merged = folder.merge(layers, 1 << 20)
    assert [(x.key_start, x.key_end) for x in merged] == [(MIN_KEY, key(1)), (last, MAX_KEY)]


def test_layers_that_disagree_are_an_error(folder: Folder) -> None:
    layers = [
        folder.l0([(key(1), 5, 0, b"old"), (key(2), 5, 0, b"a")], 1, 10),
        folder.l0([(key(2), 5, 0, b"b")], 4, 10),
    ]
    with pytest.raises(CorruptLayerError, match=r"another value of key 0*2 at LSN 5"):
        folder.merge(layers, 1 << 20)
    assert not any(path.exists() for path in folder.paths)


def test_what_cannot_be_merged_is_refused(folder: Folder) -> None:
    layers = [folder.l0([(key(1), 5, 0, b"a")], 1, 10), folder.l0([(key(1), 15, 0, b"a")], 10, 20)]
    with pytest.raises(ValueError, match="changes from LSN 1 to 15"):
        merge_layers(layers, folder.new_writer, target_size=9, start_lsn=1, end_lsn=21, stop=never)
    ranged = folder.merge(layers, 1 << 20)
    with pytest.raises(ValueError, match="same key range"):
        merge_layers(
            [*ranged, layers[0]],
            folder.new_writer,
            target_size=9,
            start_lsn=1,
            end_lsn=20,
            stop=never,
        )
    assert (
        merge_layers([], folder.new_writer, target_size=9, start_lsn=1, end_lsn=20, stop=never)
        == []
    )


def many(count: int) -> list[Entry]:
    return [(key(i), 5, 0, i.to_bytes(4, "big") * 25) for i in range(count)]


def test_a_merge_that_is_stopped_leaves_nothing(folder: Folder) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    with pytest.raises(TimelineStopped):
        folder.merge([folder.l0(many(3000), 1, 10)], 50_000, stop)
    assert asked == 4
    assert folder.paths
    assert not any(path.exists() for path in folder.paths)


def test_a_corrupt_input_is_found_and_nothing_is_left(folder: Folder) -> None:
    layers = [folder.l0(many(3000), 1, 10), folder.l0([(key(9), 15, 0, b"v")], 10, 20)]
    data = bytearray(Path(layers[0].path).read_bytes())
    data[200_000] ^= 1
    Path(layers[0].path).write_bytes(data)
    with pytest.raises(CorruptLayerError, match="checksum"):
        folder.merge(layers, 50_000)
    assert len(folder.paths) > 2
    assert not any(path.exists() for path in folder.paths)


class FullDisk(Files):
    """A disk without room for more than some files."""

    room = 3

    def fsync(self, fd: int, path: str | Path) -> None:
        """Make the content durable, while there is room."""
        self.room -= 1
        if self.room < 0:
            raise OSError(28, "No space left on device", str(path))
        super().fsync(fd, path)


def test_a_full_disk_leaves_nothing(folder: Folder) -> None:
    folder.files = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        folder.merge([folder.l0(many(3000), 1, 10)], 50_000)
    assert len(folder.paths) == 4
    assert not any(path.exists() for path in folder.paths)


# ---- images


def part(*ranges: tuple[int, int]) -> Part:
    keys = sum(end - start for start, end in ranges)
    return Part(key(10), key(10_000), tuple((key(a), key(b)) for a, b in ranges), keys)


def test_an_image_holds_the_keys_that_exist(folder: Folder) -> None:
    wanted: list[bytes] = []

    def read(keys: Sequence[bytes]) -> list[bytes | None]:
        assert len(keys) <= BATCH_KEYS
        wanted.extend(keys)
        return [None if k[-1] % 3 == 0 else k[-2:] * 100 for k in keys]

    asked: list[int] = []
    name = write_image(
        read, part((20, 900), (5000, 5001)), 77, folder.new_writer(),
        lambda: bool(asked.append(len(wanted))),  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert name == LayerName.image(key(10), key(10_000), 77)
    assert wanted == [key(i) for i in (*range(20, 900), 5000)]
    assert asked == list(range(0, len(wanted), BATCH_KEYS))
    layer = LayerFile(folder.paths[0], name, TENANT, TIMELINE)
    layer.verify()
    assert list(layer.entries()) == [(k, 77, 1, k[-2:] * 100) for k in wanted if k[-1] % 3]


def test_a_part_without_keys_makes_an_empty_image(folder: Folder) -> None:
    for empty in (part(), part((20, 30))):
        name = write_image(lambda keys: [None] * len(keys), empty, 5, folder.new_writer(), never)
        layer = LayerFile(folder.paths[-1], name, TENANT, TIMELINE)
        layer.verify()
        assert list(layer.entries()) == []


def test_an_image_that_fails_leaves_nothing(folder: Folder) -> None:
    def fail(keys: Sequence[bytes]) -> list[bytes | None]:
        raise RuntimeError("redo failed")

    with pytest.raises(RuntimeError, match="redo failed"):
        write_image(fail, part((20, 30)), 5, folder.new_writer(), never)
    with pytest.raises(TimelineStopped):
        write_image(
            lambda keys: [b""] * len(keys), part((20, 30)), 5, folder.new_writer(), lambda: True
        )
    disk = FullDisk()
    disk.room = 0
    folder.files = disk
    with pytest.raises(OSError, match="No space left"):
        write_image(lambda keys: [b""] * len(keys), part((20, 30)), 5, folder.new_writer(), never)
    assert len(folder.paths) == 3
    assert not any(path.exists() for path in folder.paths)
