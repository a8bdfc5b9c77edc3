"""The list of layers: what a start refuses, what it tidies up, in which order changes come."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from batch_unit.store_support import (
    BRANCH,
    IMAGE,
    MAIN,
    RECORD,
    TENANT,
    delete_range,
    every_key,
    files,
    key,
    layers,
    new_timeline,
    open_repository,
    opened,
    put,
    put_layers,
    with_files,
)

from pageserver.layered_repository import dump_layer
from pageserver.layered_repository.errors import (
    CorruptLayerError,
    CorruptMetadataError,
    FormatVersionError,
    MissingFileError,
    StoreError,
)
from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_list import (
    ListedLayer,
    decode_list,
    encode_list,
    list_name,
    list_number,
)
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.metadata import METADATA_FILE
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.timeline_dir import TimelineDir
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TimelineId

OTHER = TimelineId(b"o" * 16)
LISTED = [
    ListedLayer(LayerName.image(key(1), key(9), 16), 300),
    ListedLayer(LayerName.delta(key(1), key(5), 17, 33), 4000),
    ListedLayer(LayerName.l0_delta(33, 41), 1 << 40),
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A repository at rest: a root, a branch of it and another root; layers of every kind."""
    path = tmp_path / "store"
    with opened(path, compaction_threshold=2, image_creation_threshold=2) as repository:
        new_timeline(repository, OTHER)
        main = new_timeline(repository)
        put_layers(main, (24, 32), 1, 2)
        repository.branch_timeline(BRANCH, ancestor_id=MAIN)
        branch = repository.timeline(BRANCH)
        put_layers(branch, (40, 48), 1, 3)
        delete_range(branch, 56, 5, 7)
        branch.checkpoint()
        for _ in range(2):
            branch.compact(every_key(branch), force=True)
        put_layers(branch, (64,), 1)
        found = layers(branch)
        assert all(found.values()), found
    return path


def directory(store: Path, timeline_id: TimelineId = BRANCH) -> TimelineDir:
    return TimelineDir(store / "timelines" / str(timeline_id), TENANT, timeline_id)


def layer_paths(store: Path, timeline_id: TimelineId = BRANCH) -> list[Path]:
    paths = directory(store, timeline_id).path.iterdir()
    return sorted(path for path in paths if LayerName.parse(path.name) is not None)


def list_path(store: Path) -> Path:
    return next(directory(store).path.glob("layers-*"))


def refused(store: Path, error: type[StoreError], path: Path) -> str:
    """The branch cannot be loaded, the other timelines can, and nothing is touched."""
    before = sorted(x.name for x in directory(store).path.iterdir())
    with opened(store) as repository:
        for _ in range(2):
            with pytest.raises(error) as raised:
                repository.timeline(BRANCH)
        assert repository.timeline(MAIN).get(key(1), 32) == b"i1+24+32"
        assert repository.timeline(OTHER).get(key(1), 16) == b"i1"
        assert repository.gc(MAIN, choose_cutoff=lambda timeline: 32).layers_total > 0
    assert sorted(x.name for x in directory(store).path.iterdir()) == before
    assert str(path) in str(raised.value)
    return str(raised.value)


# ---- what a start refuses


def test_any_layer_that_is_missing_or_cut(store: Path) -> None:
    paths = layer_paths(store)
    assert len(paths) > 2
    for path in paths:
        good = path.read_bytes()
        path.unlink()
        # What could be tidied up is left alone: somebody may be restoring files.
        (directory(store).path / "layer-7.___temp").write_bytes(b"x")
        message = refused(store, MissingFileError, path)
        assert f"1 of {len(paths)} layers are not there" in message
        assert "restore them from a backup" in message
        for content in (good[:-1], good + b"x", b""):
            path.write_bytes(content)
            message = refused(store, CorruptLayerError, path)
            assert f"the file has {len(content)} bytes, it had {len(good)}" in message
        path.write_bytes(good)
    with opened(store) as repository:
        assert repository.timeline(BRANCH).get(key(1), 64) == b"i1+24+32+40+48+64"


def test_any_wrong_bit_in_the_list(store: Path) -> None:
    path = list_path(store)
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptMetadataError, match=path.name):
            decode_list(bytes(damaged), path)
    for offset in range(0, len(good), 11):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 0x20]) + good[offset + 1 :])
        refused(store, CorruptMetadataError, path)
    path.write_bytes(good[:-60])
    refused(store, CorruptMetadataError, path)


def test_a_list_that_is_missing_or_another(store: Path) -> None:
    path = list_path(store)
    good = path.read_bytes()
    path.unlink()
    assert "nobody knows which layers" in refused(store, MissingFileError, path)
    number = list_number(path.name)
    assert number is not None
    listed = directory(store)
    for other in (
        replace(listed, timeline_id=OTHER),
        replace(listed, tenant_id=type(TENANT)(b"u" * 16)),
    ):
        path.write_bytes(encode_list(other.tenant_id, other.timeline_id, number, LISTED)[0])
        refused(store, CorruptMetadataError, path)
    # One that is whole, of this timeline and number: that of a backup, for instance.
    path.write_bytes(encode_list(TENANT, BRANCH, number, LISTED)[0])
    assert "not the one that the metadata names" in refused(store, CorruptMetadataError, path)
    path.write_bytes(encode_list(TENANT, BRANCH, number + 1, LISTED)[0])
    refused(store, CorruptMetadataError, path)
    covered = bytearray(good[12:])
    covered[1] = 9
    path.write_bytes(good[:8] + crc32c(bytes(covered)).to_bytes(4, "big") + covered)
    assert "format version 9" in refused(store, FormatVersionError, path)


def test_a_refused_timeline_can_be_detached(store: Path) -> None:
    layer_paths(store)[0].unlink()
    with opened(store) as repository:
        with pytest.raises(MissingFileError):
            repository.timeline(BRANCH)
        repository.detach_timeline(BRANCH)
        assert not directory(store).path.exists()


# ---- what a start tidies up


def test_what_the_list_does_not_name_goes(store: Path) -> None:
    path = directory(store).path
    before = sorted(x.name for x in path.iterdir())
    metadata = directory(store).read_metadata()
    consistent = metadata.disk_consistent_lsn
    source = layer_paths(store)[0]
    unlisted = [LayerName.image(key(1), key(9), 40), LayerName.l0_delta(57, consistent + 1)]
    for name in unlisted:
        if not (path / str(name)).exists():
            shutil.copy(source, path / str(name))
    beyond = path / str(LayerName.l0_delta(consistent + 1, consistent + 9))
    shutil.copy(source, beyond)
    for text in (list_name(1), list_name(metadata.layer_list + 1), "layer-3.___temp"):
        (path / text).write_bytes(b"x")
    with opened(store) as repository:
        assert repository.timeline(BRANCH).get(key(1), 64) == b"i1+24+32+40+48+64"
        assert files(repository.timeline(BRANCH)) == sorted([*before, f"{beyond.name}.0.old"])


# ---- the order of changes


class Watch(Files):
    """Tells of the renames of metadata and the deletions of layers before they happen."""

    def __init__(self) -> None:
        self.look: Callable[[str, Path], None] = lambda step, path: None

    def rename(self, source: str | Path, target: str | Path) -> None:
        """See Files."""
        self.look("rename", Path(target))
        super().rename(source, target)

    def unlink(self, path: str | Path) -> None:
        """See Files."""
        self.look("unlink", Path(path))
        super().unlink(path)


def test_files_then_the_list_then_readers_then_deletions(tmp_path: Path) -> None:
    watch = Watch()
    repository = open_repository(
        tmp_path, with_files(watch), compaction_threshold=2, image_creation_threshold=1
    )
    timeline = new_timeline(repository)
    steps: list[str] = []

    def on_disk() -> set[str]:
        listed = timeline.directory.read_list(timeline.directory.read_metadata())
        return {str(name) for name, _ in listed}

    def seen() -> set[str]:
        return {str(layer.name) for layer in timeline.view.layers}

    def look(step: str, path: Path) -> None:
        if path.name == METADATA_FILE:
            # Readers still see what was listed before.
            assert seen() == on_disk()
            steps.append("list")
        elif LayerName.parse(path.name) is not None:
            there = {x.name for x in path.parent.iterdir()}
            assert seen() | on_disk() <= there
            if step == "unlink":
                assert path.name not in seen() | on_disk()
            elif path.name in on_disk():
                raise AssertionError(f"{path.name} is replaced")
            steps.append(step)

    watch.look = look
    put(timeline, 24, (1, RECORD, b"+24"))
    delete_range(timeline, 32, 3, 5)
    timeline.checkpoint()
    assert steps == ["rename", "rename", "list"]
    put_layers(timeline, (40, 48), 1)
    steps.clear()
    timeline.compact(every_key(timeline), force=True)
    assert steps[:3] == ["rename", "list", "unlink"]
    steps.clear()
    repository.gc(MAIN, choose_cutoff=lambda timeline: 48)
    assert steps[:2] == ["list", "unlink"]
    assert steps.count("list") == 1
    assert seen() == on_disk()
    repository.shutdown(flush=False)


def test_flush_and_compaction_change_it_one_after_the_other(tmp_path: Path) -> None:
    """Neither loses what the other did."""
    with opened(tmp_path, compaction_threshold=2, image_creation_threshold=1) as repository:
        timeline = new_timeline(repository)

        def keyspace(lsn: int) -> list[tuple[bytes, bytes]]:
            put_layers(timeline, (timeline.last_record_lsn + 8,), 2)
            return [(key(0), key(100))]

        put_layers(timeline, (24, 32), 1)
        for _ in range(5):
            timeline.compact(keyspace, force=True)
        last = timeline.last_record_lsn
        assert last > 56
        value = timeline.get(key(2), last)
    with opened(tmp_path) as second:
        assert second.timeline(MAIN).get(key(2), last) == value


# ---- changes that fail


class LastSyncFails(Files):
    """The sync of the directory after the rename of metadata does not work."""

    def __init__(self) -> None:
        self.on = False
        self.no_lists = False
        self._renamed = False

    def create(self, path: str | Path) -> int:
        """See Files."""
        if self.no_lists and list_number(Path(path).name) is not None:
            raise OSError(28, "No space left on device", str(path))
        return super().create(path)

    def rename(self, source: str | Path, target: str | Path) -> None:
        """See Files."""
        super().rename(source, target)
        self._renamed = self.on and Path(target).name == METADATA_FILE

    def fsync_dir(self, path: str | Path) -> None:
        """See Files."""
        if self._renamed:
            raise OSError(5, "Input/output error", str(path))
        super().fsync_dir(path)

    def works_again(self) -> None:
        """No more errors."""
        self.on = self._renamed = self.no_lists = False


def check_copy(path: Path, check: Callable[[Timeline], None]) -> None:
    """What a crash leaves now can be used."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    with opened(copy) as repository:
        check(repository.timeline(MAIN))
    shutil.rmtree(copy)


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Repository, LastSyncFails]]:
    disk = LastSyncFails()
    repository = open_repository(
        tmp_path / "store",
        with_files(disk),
        compaction_threshold=2,
        image_creation_threshold=1000,
        flush_retry_interval=100.0,
    )
    yield repository, disk
    disk.works_again()
    repository.shutdown(flush=False)


def test_a_flush_of_which_nobody_knows_whether_it_counts(
    failing: tuple[Repository, LastSyncFails],
) -> None:
    repository, disk = failing
    timeline = new_timeline(repository)
    put_layers(timeline, (24,), 1)
    put(timeline, 32, (1, RECORD, b"+32"))
    disk.on = True
    for _ in range(5):
        with pytest.raises(OSError, match="Input/output"):
            timeline.checkpoint()
        assert timeline.disk_consistent_lsn == 24
        assert timeline.get(key(1), 32) == b"i1+24+32"
        check_copy(repository.path, lambda copy: assert_value(copy, b"i1+24+32"))
        # Attempts leave no more behind, however many there are.
        assert len(list(timeline.directory.path.glob("layers-*"))) <= 2
    disk.works_again()
    timeline.checkpoint()
    check_copy(repository.path, lambda copy: assert_value(copy, b"i1+24+32"))
    assert len(files(timeline)) == 2 + 3


def assert_value(timeline: Timeline, value: bytes) -> None:
    assert timeline.get(key(1), timeline.last_record_lsn) == value


def test_a_merge_of_which_nobody_knows_whether_it_counts(
    failing: tuple[Repository, LastSyncFails],
) -> None:
    """Both states stay usable, also when the next attempt writes files of other sizes."""
    repository, disk = failing
    timeline = new_timeline(repository)
    for lsn in (24, 32):
        put(timeline, lsn, (1, IMAGE, b"%d" % lsn * 3000))
        timeline.checkpoint()
    disk.on = True
    with pytest.raises(OSError, match="Input/output"):
        timeline.compact(every_key(timeline), force=True)
    assert layers(timeline)["l0"] == [(17, 25), (25, 33)]
    check_copy(repository.path, lambda copy: assert_value(copy, b"32" * 3000))
    size = max(path.stat().st_size for path in timeline.directory.path.iterdir())
    repository.settings = StoreSettings(
        compaction_threshold=2, image_creation_threshold=1000, compress_layers=False
    )
    disk.works_again()
    disk.no_lists = True
    with pytest.raises(OSError, match="No space left"):
        timeline.compact(every_key(timeline), force=True)
    check_copy(repository.path, lambda copy: assert_value(copy, b"32" * 3000))
    assert not any("temp" in name for name in files(timeline))
    disk.works_again()
    timeline.compact(every_key(timeline), force=True)
    assert layers(timeline)["l0"] == []
    check_copy(repository.path, lambda copy: assert_value(copy, b"32" * 3000))
    assert max(path.stat().st_size for path in timeline.directory.path.iterdir()) >= size


# ---- the file


def test_encoding() -> None:
    data, checksum = encode_list(TENANT, MAIN, 7, reversed(LISTED))
    content, found = decode_list(data, Path("x"))
    assert content == (TENANT, MAIN, 7, sorted(content.layers, key=lambda x: x.name.key_start))
    assert sorted(content.layers, key=str) == sorted(LISTED, key=str)
    assert found == checksum == crc32c(data[12:])
    assert len(data) == 64 + 60 * len(LISTED)
    assert encode_list(TENANT, MAIN, 7, LISTED)[0] == data
    empty, _ = encode_list(TENANT, MAIN, 8, [])
    assert decode_list(empty, Path("x"))[0].layers == []
    for name in ("layers", "layers-7", list_name(7).lower() + "a", "metadata"):
        assert list_number(name) is None
    assert list_number(list_name(1 << 60)) == 1 << 60


def test_dump(store: Path) -> None:
    out = io.StringIO()
    dump_layer.dump(list_path(store), out)
    lines = out.getvalue().splitlines()
    paths = layer_paths(store)
    assert f"timeline {BRANCH}: {len(paths)} layers, " in lines[0]
    assert sorted(lines[1:]) == [f"{path.name} {path.stat().st_size}" for path in paths]
