"""Timelines after a restart, a crash in every step of a flush, damage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.store_support import (
    BRANCH,
    IMAGE,
    MAIN,
    RECORD,
    TENANT,
    CrashFiles,
    delete_range,
    files,
    key,
    list_all_layers,
    new_timeline,
    open_repository,
    opened,
    put,
    with_files,
)

from pageserver.layered_repository.errors import (
    CorruptLayerError,
    CorruptMetadataError,
    StoreError,
    WaitLsnTimeout,
)
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.timeline import Timeline


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with opened(tmp_path, flush_retry_interval=0.01) as repository:
        yield repository


def test_restart_goes_on_at_disk_consistent_lsn(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    timeline.checkpoint()
    put(timeline, 32, (1, RECORD, b"+b"))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(branch, 40, (1, RECORD, b"+c"))
    repository.shutdown(flush=False)

    second = open_repository(tmp_path, wait_lsn_timeout=0.01)
    assert not second.is_loaded(MAIN)
    assert second.read_metadata(BRANCH).ancestor_lsn == 32
    branch = second.timeline(BRANCH)
    timeline = second.timeline(MAIN)
    assert branch.ancestor is timeline
    assert (timeline.last_record, branch.last_record) == ((24, 16), (32, 24))
    assert timeline.get(key(1), 24) == b"i1+a"
    # The branch point's WAL is not back yet: no answer is better than a wrong one.
    with pytest.raises(WaitLsnTimeout):
        branch.get(key(1), 32)
    put(timeline, 32, (1, RECORD, b"+b"))
    assert branch.get(key(1), 32) == b"i1+a+b"
    put(branch, 40, (1, RECORD, b"+d"))
    second.shutdown(flush=True)

    third = open_repository(tmp_path)
    assert third.timeline(BRANCH).get(key(1), 40) == b"i1+a+b+d"
    assert third.timeline(MAIN).last_record == (32, 24)
    assert third.timelines() == sorted([MAIN, BRANCH])
    third.shutdown(flush=True)


def test_a_crash_in_the_import_leaves_nothing(tmp_path: Path) -> None:
    def items() -> Iterator[tuple[bytes, bytes]]:
        yield key(1), b"x"
        during = sorted(path.name for path in (tmp_path / "timelines").iterdir())
        shutil.copytree(tmp_path, tmp_path.with_name("crashed"))
        assert str(MAIN) not in during
        raise ZeroDivisionError

    repository = open_repository(tmp_path)
    timeline = repository.create_timeline(MAIN, initdb_lsn=16)
    with pytest.raises(ZeroDivisionError):
        timeline.import_image_layer(16, items())
    assert list((tmp_path / "timelines").iterdir()) == []
    assert timeline.last_record_lsn == 0
    timeline.import_image_layer(16, [(key(1), b"y")])
    assert timeline.get(key(1), 16) == b"y"
    with pytest.raises(ValueError, match="not empty"):
        timeline.import_image_layer(16, [(key(1), b"y")])
    crashed = open_repository(tmp_path.with_name("crashed"))
    assert crashed.timelines() == []
    assert list((tmp_path.with_name("crashed") / "timelines").iterdir()) == []
    shutil.rmtree(tmp_path.with_name("crashed"))


@pytest.mark.parametrize("compress", [True, False])
def test_the_import_is_compressed_as_set(tmp_path: Path, compress: bool) -> None:
    """A timeline's first image is on disk for as long as anybody reads the state at its LSN.

    And its size is taken for that of the images to come: too large a one would keep garbage.
    """
    values = {key(number): (b"%d " % number) * 1000 for number in range(100)}
    with opened(tmp_path, compress_layers=compress) as repository:
        timeline = repository.create_timeline(MAIN, initdb_lsn=16)
        timeline.import_image_layer(16, sorted(values.items()))
        (layer,) = timeline.view.layers
        assert (layer.size < sum(map(len, values.values())) / 10) == compress
    with opened(tmp_path) as repository:
        timeline = repository.timeline(MAIN)
        assert {name: timeline.get(name, 16) for name in values} == values


def test_a_crash_in_any_step_of_a_flush(tmp_path: Path) -> None:
    crash = CrashFiles(tmp_path / "store", tmp_path / "crashed")
    repository = open_repository(tmp_path / "store", with_files(crash))
    timeline = new_timeline(repository)
    put(timeline, 24, (1, RECORD, b"+a"))
    timeline.checkpoint()
    put(timeline, 32, (1, RECORD, b"+b"))
    delete_range(timeline, 40, 5, 7)
    crash.on = True
    timeline.checkpoint()
    crash.on = False
    repository.shutdown(flush=False)
    renamed = [i for i, step in enumerate(crash.steps) if step.startswith("rename")]
    assert [crash.steps[i] for i in renamed] == [
        f"rename {LayerName.l0_delta(25, 41)}",
        f"rename {LayerName.image(key(5), key(7), 40)}",
        "rename metadata",
    ]
    for number, state in enumerate(crash.states):
        flushed = number >= renamed[2]
        last = 40 if flushed else 24
        with opened(state) as restarted:
            main = restarted.timeline(MAIN)
            assert (main.last_record_lsn, main.disk_consistent_lsn) == (last, last)
            assert main.get(key(1), last) == (b"i1+a+b" if flushed else b"i1+a")
            assert main.get_vectored([key(6)], last) == [None if flushed else b"i6"]
            assert not any("temp" in name for name in files(main))
            set_aside = sum(name.endswith(".old") for name in files(main))
            assert set_aside == (0 if flushed else sum(number >= i for i in renamed[:2]))
            put(main, 48, (1, RECORD, b"+c"))
            main.checkpoint()
        with opened(state) as again:
            main = again.timeline(MAIN)
            assert main.get(key(1), 1000) == (b"i1+a+b+c" if flushed else b"i1+a+c")
            # What was set aside is outdated now: the WAL it came from is on disk again.
            assert not any(name.endswith(".old") for name in files(main))


def test_set_aside_files_do_not_pile_up(repository: Repository, tmp_path: Path) -> None:
    """A timeline whose flush ends in a crash each time keeps those of the last one."""
    timeline = new_timeline(repository)
    repository.shutdown(flush=True)
    for last in (33, 41, 41, 49):
        for name in (LayerName.l0_delta(17, last), LayerName.image(key(1), key(2), last - 1)):
            writer = LayerWriter(
                timeline.directory.path / str(name), TENANT.raw, timeline.timeline_id.raw
            )
            if not name.is_image:
                writer.add(key(1), last - 1, IMAGE, b"x")
            writer.finish(name)
        with opened(tmp_path) as second:
            found = files(second.timeline(MAIN))
            aside = [name for name in found if name.endswith(".old")]
            assert len(found) == 3 + 2
            assert [f"{last:016X}" in name or f"{last - 1:016X}" in name for name in aside] == [
                True,
                True,
            ]
        with opened(tmp_path) as third:
            assert files(third.timeline(MAIN)) == found


def test_leftovers_of_the_last_process_are_removed(repository: Repository, tmp_path: Path) -> None:
    timeline = new_timeline(repository)
    repository.shutdown(flush=True)
    expected = files(timeline)
    (tmp_path / "ephemeral-7").write_bytes(b"x")
    (timeline.directory.path / "layer-3.___temp").write_bytes(b"x")
    (tmp_path / "timelines" / f"{BRANCH}.___temp").mkdir()
    with opened(tmp_path) as second:
        assert files(second.timeline(MAIN)) == expected
        assert second.timelines() == [MAIN]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["timelines", str(MAIN), *expected]
    )


def test_damage_of_one_timeline_leaves_the_others(repository: Repository, tmp_path: Path) -> None:
    new_timeline(repository)
    other = new_timeline(repository, BRANCH)
    put(other, 24, (1, RECORD, b"+a"))
    repository.shutdown(flush=True)
    layer = next(p for p in other.directory.path.iterdir() if p.name.endswith("-0000000000000019"))
    damaged = bytearray(layer.read_bytes())
    damaged[260] ^= 4
    layer.write_bytes(damaged)
    with opened(tmp_path) as second:
        with pytest.raises(CorruptLayerError, match=rf"{layer.name}: corrupt at offset 256"):
            second.timeline(BRANCH).get(key(1), 24)
        assert second.timeline(BRANCH).get(key(1), 23) == b"i1"
        assert second.timeline(MAIN).get(key(1), 16) == b"i1"

    metadata = other.directory.path / "metadata"
    good = metadata.read_bytes()
    assert len(good) == 512
    for place in range(512):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        metadata.write_bytes(damaged)
        with pytest.raises(CorruptMetadataError, match=str(metadata)):
            open_repository(tmp_path).timeline(BRANCH)
    metadata.unlink()
    with pytest.raises(FileNotFoundError):
        open_repository(tmp_path).timeline(BRANCH)
    assert open_repository(tmp_path).timeline(MAIN).get(key(1), 16) == b"i1"


def test_unreadable_metadata_may_be_that_of_a_branch(
    repository: Repository, tmp_path: Path
) -> None:
    """Nothing is deleted that such a timeline may need, until it is restored or detached."""
    timeline = new_timeline(repository)
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(timeline, 24)
    repository.shutdown(flush=True)
    metadata = branch.directory.path / "metadata"
    good = metadata.read_bytes()
    metadata.write_bytes(bytes(512))
    with opened(tmp_path) as second:
        for _ in range(2):
            with pytest.raises(StoreError, match=f"metadata of timeline {BRANCH} cannot be read"):
                second.gc(MAIN, choose_cutoff=lambda timeline: 24)
        with pytest.raises(StoreError, match=f"may be the ancestor of {BRANCH}"):
            second.detach_timeline(MAIN)
        metadata.write_bytes(good)
        assert second.gc(MAIN, choose_cutoff=lambda timeline: 24).layers_removed == 0
    metadata.write_bytes(bytes(512))
    with opened(tmp_path) as third:
        third.detach_timeline(BRANCH)
        third.detach_timeline(MAIN)
        assert third.timelines() == []


def test_compacted_layers_are_read(repository: Repository, tmp_path: Path) -> None:
    """Image layers and deltas of key ranges, as compaction leaves them, beside the L0 deltas."""
    timeline = new_timeline(repository)
    for lsn in range(24, 72, 8):
        put(timeline, lsn, (1, RECORD, b"+%d" % lsn), (7, RECORD, b"+%d" % lsn))
    branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    put(branch, 72, (1, RECORD, b"+72"), (3, RECORD, b"+72"))
    repository.shutdown(flush=True)

    def add_layer(owner: Timeline, name: LayerName, *entries: tuple[int, int, int, bytes]) -> None:
        path = owner.directory.path / str(name)
        writer = LayerWriter(path, TENANT.raw, owner.timeline_id.raw)
        for number, lsn, flags, data in entries:
            writer.add(key(number), lsn, flags, data)
        writer.finish(name)

    # An image within the LSN range of the L0 delta, without key 4: it was deleted.
    image = LayerName.image(key(0), key(5), 48)
    add_layer(timeline, image, (1, 48, IMAGE, b"at48"), (2, 48, IMAGE, b"at48"))
    # A delta with the same changes of one key as the L0 delta.
    delta = LayerName.delta(key(7), key(8), 17, 65)
    add_layer(timeline, delta, *((7, lsn, RECORD, b"+%d" % lsn) for lsn in range(24, 72, 8)))
    # In the branch too: what the image leaves out is not looked for in the ancestor.
    add_layer(branch, LayerName.image(key(2), key(4), 72), (3, 72, IMAGE, b"at72"))
    list_all_layers(timeline.directory)
    list_all_layers(branch.directory)

    second = open_repository(tmp_path, page_cache_size=0)
    timeline = second.timeline(MAIN)
    assert timeline.get(key(1), 40) == b"i1+24+32+40"
    assert timeline.get(key(1), 48) == b"at48"
    assert timeline.get(key(1), 56) == b"at48+56"
    assert timeline.get(key(7), 64) == b"i7+24+32+40+48+56+64"
    assert timeline.get_vectored([key(4), key(2), key(6)], 64) == [None, b"at48", b"i6"]
    assert timeline.get(key(4), 47) == b"i4"
    assert timeline.scan_keys(key(0), key(100), 64) == [key(i) for i in (1, 2, 5, 6, 7, 8, 9)]
    assert timeline.scan_keys(key(0), key(100), 47) == [key(i) for i in range(10)]
    branch = second.timeline(BRANCH)
    assert branch.get_vectored([key(i) for i in (1, 2, 3, 4)], 72) == [
        b"at48+56+64+72",
        None,
        b"at72",
        None,
    ]
    assert branch.scan_keys(key(0), key(100), 72) == [key(i) for i in (1, 3, 5, 6, 7, 8, 9)]
    second.shutdown(flush=True)
