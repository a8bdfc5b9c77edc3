"""Splits of deltas by LSN, as files, against plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from batch_unit.layer_folder import TENANT, TIMELINE, Entry, LayerFolder, key, never

from pageserver.layered_repository.errors import CorruptLayerError, TimelineStopped
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_split import MAX_PIECES, split_layer


class Folder(LayerFolder):
    """A directory of deltas, and what splits write."""

    def delta(self, entries: Sequence[Entry], start_lsn: int, end_lsn: int) -> LayerFile:
        """A finished delta of the keys from 0 to 9999."""
        return self.layer(LayerName.delta(key(0), key(10_000), start_lsn, end_lsn), entries)

    def split(
        self,
        layer: LayerFile,
        keep: Sequence[tuple[int, int]],
        stop: Callable[[], bool] = never,
    ) -> list[LayerFile]:
        """The new layers, opened and verified."""
        found = []
        for file, name in split_layer(layer, keep, self.new_writer, stop=stop):
            assert file.size == Path(file.path).stat().st_size
            found.append(LayerFile(file.path, name, TENANT, TIMELINE))
            found[-1].verify()
        return found

    def nothing_left(self) -> bool:
        """Whether files were begun, and all are gone."""
        return bool(self.paths) and not any(path.exists() for path in self.paths)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, compress=True)


def random_ranges(rng: random.Random, start: int, end: int) -> list[tuple[int, int]]:
    """Some ascending ranges, which may touch."""
    cuts = sorted(rng.sample(range(start, end + 1), 2 * rng.randint(1, 5)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
    if rng.random() < 0.5 and len(ranges) > 1:
        ranges[0] = ranges[0][0], ranges[1][0]
    return ranges


@pytest.mark.parametrize("seed", range(60))
def test_each_piece_has_all_changes_of_its_range(folder: Folder, seed: int) -> None:
    rng = random.Random(seed)
    start, end = 5, rng.randint(30, 200)
    values = {
        (key(rng.randrange(40)), rng.randrange(start, end)): (
            rng.randrange(4),
            rng.randbytes(rng.choice([0, 7, 100, 3000])),
        )
        for _ in range(rng.randrange(1, 400))
    }
    entries = sorted((*at, *value) for at, value in values.items())
    layer = folder.delta(entries, start, end)
    keep = random_ranges(rng, start, end)
    pieces = folder.split(layer, keep)
    expected = [[entry for entry in entries if a <= entry[1] < b] for a, b in keep]
    assert [list(piece.entries()) for piece in pieces] == [x for x in expected if x]
    assert [piece.name for piece in pieces] == [
        LayerName.delta(x[0][0], key(int.from_bytes(x[-1][0], "big") + 1), a, b)
        for x, (a, b) in zip(expected, keep, strict=True)
        if x
    ]
    assert len(folder.paths) == len(pieces)


def test_the_ends_of_a_piece_are_exact(folder: Folder) -> None:
    layer = folder.delta([(key(1), lsn, 0, b"%d" % lsn) for lsn in range(10, 30)], 10, 30)
    (one,) = folder.split(layer, [(15, 16)])
    assert [entry[1] for entry in one.entries()] == [15]
    lower, upper = folder.split(layer, [(10, 20), (21, 30)])
    assert [entry[1] for entry in lower.entries()] == list(range(10, 20))
    assert [entry[1] for entry in upper.entries()] == list(range(21, 30))


def test_what_cannot_be_split_is_refused(folder: Folder) -> None:
    layer = folder.delta([(key(1), 15, 0, b"v")], 10, 30)
    for wrong in ([(9, 12)], [(12, 31)], [(12, 12)], [(15, 14)], [(12, 16), (15, 18)]):
        with pytest.raises(ValueError, match="cannot be split into"):
            folder.split(layer, wrong)
    many = [(10 + i, 11 + i) for i in range(MAX_PIECES + 1)]
    with pytest.raises(ValueError, match=f"at most {MAX_PIECES} pieces"):
        folder.split(layer, many)
    (piece,) = folder.split(layer, many[:-1])
    assert (piece.start_lsn, piece.end_lsn) == (15, 16)
    for name in (LayerName.l0_delta(10, 20), LayerName.image(key(0), key(2), 15)):
        other = folder.layer(name, [(key(1), 15, 1, b"v")])
        with pytest.raises(ValueError, match="only a delta over a range of keys"):
            folder.split(other, [(12, 13)])


def many(folder: Folder) -> LayerFile:
    entries = [
        (key(i), 10 + j, 0, i.to_bytes(4, "big") * 250) for i in range(3000) for j in range(3)
    ]
    return folder.delta(entries, 10, 13)


def test_a_split_that_is_stopped_leaves_nothing(folder: Folder) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with pytest.raises(TimelineStopped):
        folder.split(many(folder), [(10, 11), (12, 13)], stop)
    assert asked == 3
    assert folder.nothing_left()


def test_a_corrupt_layer_is_found_also_where_nothing_is_kept(folder: Folder) -> None:
    layer = many(folder)
    path = Path(layer.path)
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptLayerError, match="checksum"):
        folder.split(layer, [(10, 11)])
    assert folder.nothing_left()


class FullDisk(Files):
    """A disk without room for more than some files."""

    room = 1

    def fsync(self, fd: int, path: str | Path) -> None:
        """Make the content durable, while there is room."""
        self.room -= 1
        if self.room < 0:
            raise OSError(28, "No space left on device", str(path))
        super().fsync(fd, path)


def test_a_full_disk_leaves_nothing(folder: Folder) -> None:
    folder.files = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        folder.split(many(folder), [(10, 11), (11, 12), (12, 13)])
    assert len(folder.paths) == 3
    assert folder.nothing_left()
