"""Verification of a repository on disk: a whole one has no problem, each kind of damage is told."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from batch_unit import store_support as support
from batch_unit.store_support import BRANCH, IMAGE, MAIN, RECORD, TENANT, key

from pageserver.layered_repository.layer_map_checks import (
    check_ancestor,
    check_layer,
    check_metadata,
    check_unlisted,
    overlapping_groups,
)
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.metadata import (
    TimelineMetadata,
    read_metadata,
    write_metadata,
)
from pageserver.layered_repository.timeline_dir import TimelineDir
from pageserver.layered_repository.verify_repository import (
    MAX_ALIKE,
    Finding,
    Progress,
    VerifyError,
    main,
    verify,
)
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TimelineId
from zenith_utils.pid_file import PidFile
from zenith_utils.zstd import ZstdUnavailable, version

CHILD = TimelineId(b"c" * 16)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a pageserver: a root, a branch, and a branch of that.

    With L0 and merged deltas, images, tombstones, collected garbage, compressed where that works.
    """
    try:
        version()
        compress = True
    except ZstdUnavailable:
        compress = False
    workdir: Path = tmp_path_factory.mktemp("verify") / "work"
    tenant = workdir / "tenants" / str(TENANT)
    tenant.mkdir(parents=True)
    limits = {"compaction_threshold": 3, "image_creation_threshold": 2, "image_part_keys": 3}
    with support.opened(tenant, compress_layers=compress, **limits) as repository:
        main = support.new_timeline(repository)
        support.put_layers(main, range(24, 80, 8), *range(0, 10, 2))
        branch = repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=48)
        support.put_layers(branch, (56, 64), 1, 2)
        support.delete_range(branch, 72, 4, 6)
        branch.checkpoint()
        repository.branch_timeline(CHILD, ancestor_id=BRANCH)
        support.delete_range(main, 80, 8, 10)
        support.put(main, 88, (9, IMAGE, b"back"))
        main.checkpoint()
        main.compact(support.every_key(main), force=True)
        support.put_layers(main, (96, 104), 1)
        main.compact(support.every_key(main), force=True)
        repository.gc(MAIN, choose_cutoff=lambda timeline: 96)
        main.compact(support.every_key(main), force=True)
        repository.gc(MAIN, choose_cutoff=lambda timeline: 96)
        support.put_layers(main, (112,), 3, 9)
        support.put_layers(branch, (80,), 1)
        kinds = support.layers(main)
        assert kinds["l0"] and kinds["delta"] and kinds["image"]
        images = [layer for layer in branch.view.layers if layer.is_image]
        assert [image.describe()["entries"] for image in images] == [0]
    return workdir


@pytest.fixture
def workdir(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "work"))


def timeline_path(workdir: Path, timeline_id: TimelineId) -> Path:
    return workdir / "tenants" / str(TENANT) / "timelines" / str(timeline_id)


def layers_of(workdir: Path, timeline_id: TimelineId) -> list[tuple[Path, LayerName]]:
    found = []
    for path in sorted(timeline_path(workdir, timeline_id).iterdir()):
        name = LayerName.parse(path.name)
        if name is not None:
            found.append((path, name))
    return found


def problems(path: Path) -> list[Finding]:
    return [finding for finding in verify(path) if finding.is_problem]


def the_problem(path: Path) -> Finding:
    found = problems(path)
    assert len(found) == 1, found
    return found[0]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_whole_repository(original: Path) -> None:
    states: list[Progress] = []
    assert list(verify(original, progress=states.append)) == []
    sizes = [
        path.stat().st_size for t in (MAIN, BRANCH, CHILD) for path, _ in layers_of(original, t)
    ]
    last = states[-1]
    assert (last.timelines, last.files, last.files_total) == (3, len(sizes), len(sizes))
    assert last.bytes == last.bytes_total == sum(sizes)
    assert last.values > 10


@pytest.mark.parametrize("level", [".", "tenants/{tenant}", "tenants/{tenant}/timelines/{branch}"])
def test_parts_of_it(workdir: Path, level: str) -> None:
    path = workdir / level.format(tenant=TENANT, branch=BRANCH)
    assert list(verify(path)) == []
    damaged, _ = layers_of(workdir, BRANCH)[0]
    flip(damaged, 300)
    assert {finding.path for finding in problems(path)} == {damaged}
    if "timelines" in level:
        # The rest is none of its business.
        (timeline_path(workdir, CHILD) / "metadata").unlink()
        assert {finding.path for finding in problems(path)} == {damaged}


def test_a_timeline_taken_out(workdir: Path, tmp_path: Path) -> None:
    moved = timeline_path(workdir, MAIN).rename(tmp_path / "copy-of-main")
    assert list(verify(moved)) == []
    moved = timeline_path(workdir, BRANCH).rename(tmp_path / "copy-of-branch")
    assert [(f.path.name, f.is_problem) for f in verify(moved)] == [
        ("metadata", False),
        ("copy-of-branch", False),
    ]


def test_a_flipped_bit_in_every_layer(workdir: Path) -> None:
    for timeline_id in (MAIN, BRANCH):
        for path, name in layers_of(workdir, timeline_id):
            size = path.stat().st_size
            content = path.read_bytes()
            for offset in {10, 60, 254, *range(256, size, max((size - 256) // 4, 1)), size - 1}:
                flip(path, min(offset, size - 1))
                found = problems(workdir)
                assert [finding.path for finding in found] == [path], (name, offset)
                assert found[0].offset is not None or "format version" in found[0].message
                path.write_bytes(content)


def test_a_cut_file(workdir: Path) -> None:
    path, _ = layers_of(workdir, MAIN)[-1]
    os.truncate(path, path.stat().st_size - 1)
    assert the_problem(workdir).path == path
    os.truncate(path, 0)
    assert the_problem(workdir).path == path


def test_metadata(workdir: Path) -> None:
    path = timeline_path(workdir, MAIN) / "metadata"
    content = path.read_bytes()
    flip(path, 20)
    found = problems(workdir)
    assert [(f.path, f.offset, f.message) for f in found] == [
        (path, 0, "checksum mismatch"),
        (
            timeline_path(workdir, BRANCH) / "metadata",
            None,
            f"the metadata of its ancestor {MAIN} cannot be read",
        ),
    ]
    path.unlink()
    assert [f.message for f in problems(workdir) if f.path == path] == ["the file is missing"]
    other = bytearray(content)
    other[6:8] = struct.pack(">H", 9)
    other[:4] = struct.pack(">I", crc32c(bytes(other[4:])))
    path.write_bytes(other)
    assert [f.message for f in problems(workdir) if f.path == path] == [
        "format version 9, this program reads 3"
    ]


def test_another_format_version(workdir: Path) -> None:
    path, _ = layers_of(workdir, MAIN)[0]
    data = bytearray(path.read_bytes())
    data[8:10] = struct.pack("<H", 7)
    data[252:256] = struct.pack("<I", crc32c(bytes(data[:252])))
    path.write_bytes(data)
    found = the_problem(workdir)
    assert (found.path, found.message) == (path, "format version 7, this program reads 3")


def test_a_layer_of_another_timeline(workdir: Path) -> None:
    source, _ = layers_of(workdir, MAIN)[0]
    target, _ = layers_of(workdir, BRANCH)[0]
    shutil.copy(source, target)
    support.list_all_layers(directory_of(target.parent, BRANCH))
    found = the_problem(workdir)
    assert (found.path, "belongs to a layer of" in found.message) == (target, True), found


def test_damage_does_not_end_it(workdir: Path) -> None:
    damaged = [layers_of(workdir, timeline_id)[0][0] for timeline_id in (MAIN, BRANCH)]
    for path in damaged:
        flip(path, 300)
    (timeline_path(workdir, CHILD) / "metadata").unlink()
    assert {finding.path for finding in problems(workdir)} == {
        *damaged,
        timeline_path(workdir, CHILD) / "metadata",
    }


def test_missing_ancestor(workdir: Path) -> None:
    shutil.rmtree(timeline_path(workdir, MAIN))
    found = the_problem(workdir)
    assert found.path == timeline_path(workdir, BRANCH) / "metadata"
    assert found.message == f"its ancestor {MAIN} is missing"


def directory_of(path: Path, timeline_id: TimelineId = MAIN) -> TimelineDir:
    return TimelineDir(path, TENANT, timeline_id)


def write(
    directory: Path,
    name: LayerName,
    *entries: tuple[int, int, int, bytes],
    listed: bool = True,
) -> Path:
    """Add a layer file to a timeline, its entries by number of the key."""
    path = directory / str(name)
    writer = LayerWriter(path, TENANT.raw, MAIN.raw)
    for number, lsn, flags, data in entries:
        writer.add(key(number), lsn, flags, data)
    writer.finish(name)
    if listed:
        support.list_all_layers(directory_of(directory))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A timeline with an import and three L0 deltas of a record each."""
    with support.opened(tmp_path / str(TENANT)) as repository:
        timeline = support.new_timeline(repository)
        support.put_layers(timeline, (24, 32, 40), 1, 2)
        path = timeline.directory.path
    yield path


def test_overlaps_that_agree(small: Path) -> None:
    """What an interrupted compaction leaves."""
    entries = [(n, lsn, RECORD, b"+%d" % lsn) for n in (1, 2) for lsn in (24, 32)]
    write(small, LayerName.delta(key(1), key(3), 17, 33), *entries)
    assert list(verify(small)) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ((1, 32, RECORD, b"other"), "its value of key {key} at LSN 0/20 differs from that in "),
        ((1, 32, IMAGE, b"+32"), "its value of key {key} at LSN 0/20 differs from that in "),
        (None, "it lacks the value of key {key} at LSN 0/20 that "),
    ],
)
def test_overlaps_that_disagree(
    small: Path, changed: tuple[int, int, int, bytes] | None, message: str
) -> None:
    entries = [(1, 24, RECORD, b"+24"), changed, (2, 24, RECORD, b"+24"), (2, 32, RECORD, b"+32")]
    name = LayerName.delta(key(1), key(3), 17, 33)
    path = write(small, name, *(entry for entry in entries if entry is not None))
    found = the_problem(small)
    l0 = small / str(LayerName.l0_delta(25, 33))
    assert {found.path} | {path for path in (path, l0) if str(path) in found.message} == {path, l0}
    assert found.message.startswith(message.format(key=key(1).hex().upper()))


def test_images_that_disagree(small: Path) -> None:
    import_entries = [(i, 16, IMAGE, b"i%d" % i) for i in range(10)]
    write(small, LayerName.image(key(0), key(12), 16), *import_entries)
    assert list(verify(small)) == []
    write(small, LayerName.image(key(0), key(11), 16), *import_entries[:-1])
    assert "lacks the value" in the_problem(small).message


def test_every_missing_layer_is_told(workdir: Path) -> None:
    for timeline_id in (MAIN, BRANCH):
        for path, _ in layers_of(workdir, timeline_id):
            content = path.read_bytes()
            path.unlink()
            for names_only in (False, True):
                found = [x for x in verify(workdir, names_only=names_only) if x.is_problem]
                assert [(x.path, x.message) for x in found] == [
                    (path, "missing: the timeline's list of layers names it")
                ]
            path.write_bytes(content)


def test_a_missing_or_damaged_list(workdir: Path) -> None:
    directory = timeline_path(workdir, MAIN)
    path = next(directory.glob("layers-*"))
    content = path.read_bytes()
    for offset in range(0, len(content), 7):
        flip(path, offset)
        found = the_problem(workdir)
        assert (found.path, found.offset is not None) == (path, True), offset
        path.write_bytes(content)
    path.unlink()
    found = the_problem(workdir)
    assert found.path == path
    assert found.message.startswith("missing: without it nobody knows which layers")
    notes = [x.message for x in verify(workdir) if not x.is_problem]
    assert "its values were not checked, as files of it are damaged" in notes


def test_layers_that_are_not_listed_are_notes(small: Path) -> None:
    name = LayerName.delta(key(1), key(3), 17, 33)
    path = write(small, name, (1, 24, RECORD, b"whatever"), listed=False)
    flip(path, 200)
    other = small / "layers-00000000000000FF"
    other.write_bytes(b"x")
    found = list(verify(small))
    assert {(x.path, x.message, x.is_problem) for x in found} == {
        (path, "not in the list of layers: the next start removes it", False),
        (other, "a list of layers that does not count: the next start removes it", False),
    }


def test_a_base_that_nobody_has(small: Path) -> None:
    """Records of keys that no layer of the list says anything else of."""
    for path, name in [(x, LayerName.parse(x.name)) for x in small.iterdir()]:
        if name is not None and name.is_image:
            path.unlink()
    support.list_all_layers(directory_of(small))
    found = problems(small)
    assert {finding.path for finding in found} == {small}
    # Two keys in three deltas.
    assert len(found) == 6
    assert all("the layer that had it is missing" in finding.message for finding in found)
    assert f"Base image for {key(1).hex().upper()} at 0/18 not found" in found[0].message


def test_a_root_without_keys(tmp_path: Path) -> None:
    """All its keys were deleted: garbage collection leaves no image, nor anything else."""
    with support.opened(tmp_path / str(TENANT), image_creation_threshold=1) as repository:
        timeline = support.new_timeline(repository)
        support.delete_range(timeline, 24, 0, 100)
        timeline.checkpoint()
        for _ in range(3):
            repository.gc(MAIN, choose_cutoff=lambda timeline: 24)
        assert list(timeline.view.layers) == []
        support.put(timeline, 32, (1, IMAGE, b"new"))
        timeline.checkpoint()
    assert list(verify(tmp_path / str(TENANT))) == []
    # Not even a layer is left that tells whose files they are.
    path = timeline.directory.path
    for layer in path.glob("*__*"):
        layer.unlink()
    support.list_all_layers(directory_of(path))
    assert list(verify(path.rename(tmp_path / "copy"))) == []


def test_many_findings_of_a_kind(tmp_path: Path) -> None:
    with support.opened(tmp_path / str(TENANT)) as repository:
        timeline = support.new_timeline(repository)
        support.put_layers(timeline, (24,), *range(50, 90))  # records without a base
        path = timeline.directory.path
    found = problems(path)
    assert len(found) == MAX_ALIKE + 1
    assert found[-1].message == f"there are more problems like the {MAX_ALIKE} before"


def test_notes(workdir: Path) -> None:
    directory = timeline_path(workdir, MAIN)
    consistent = read_metadata(directory / "metadata").disk_consistent_lsn
    name = LayerName.l0_delta(consistent + 1, consistent + 9)
    beyond = write(directory, name, (1, consistent + 8, IMAGE, b"x"), listed=False)
    left = {
        directory / "layer-5.___temp": "temporary, left by a crash: the next start removes it",
        directory / f"{beyond.name}.0.old": "set aside, as its flush never finished: "
        "a later start removes it",
        directory / "notes.txt": "not a file of the store",
        directory.parent.parent / "ephemeral-3": "values of an open layer, useless after a crash",
    }
    for path in left:
        path.write_bytes(b"x")
    for place in (f"timelines/{CHILD}.___temp", f"../{CHILD}.___temp"):
        temp = (directory.parent.parent / place).resolve()
        temp.mkdir()
        left[temp] = "temporary, left by a crash: the next start removes it"
    left[beyond] = "beyond disk_consistent_lsn 0/70: the next start sets it aside, "
    left[beyond] += "its WAL comes again"
    found = list(verify(workdir))
    assert not any(finding.is_problem for finding in found)
    assert {finding.path: finding.message for finding in found} == left


def test_reads_wait_for_an_ancestor_that_lost_its_memory(tmp_path: Path) -> None:
    with support.opened(tmp_path / str(TENANT)) as repository:
        main = support.new_timeline(repository)
        support.put(main, 24, (1, RECORD, b"+"))  # never on disk
        repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    found = list(verify(tmp_path / str(TENANT)))
    assert not any(finding.is_problem for finding in found)
    assert "beyond what is on disk of its ancestor" in found[0].message
    assert "reads were not tried" in found[-1].message


def test_a_branch_that_begins_out_of_reach(workdir: Path) -> None:
    path = timeline_path(workdir, CHILD) / "metadata"
    metadata = read_metadata(path)
    write_metadata(path, replace(metadata, ancestor_lsn=40))
    found = problems(workdir)
    assert [finding.path for finding in found] == [path]
    assert "it begins at 0/28, before its ancestor" in found[0].message


def test_a_running_pageserver(workdir: Path) -> None:
    pid_file = PidFile(workdir / "pageserver.pid")
    pid_file.write()
    directory = timeline_path(workdir, MAIN)
    try:
        for path in (workdir, directory.parent.parent, directory):
            with pytest.raises(VerifyError, match=rf"process {os.getpid()}.*--online"):
                list(verify(path))
            assert list(verify(path, online=True)) == []
        damaged, _ = layers_of(workdir, MAIN)[0]
        flip(damaged, 300)
        (directory / "layer-5.___temp").touch()
        assert [finding.path for finding in verify(workdir, online=True)] == [damaged]
    finally:
        pid_file.close()
    assert len(list(verify(workdir))) > 1


def test_names_only(workdir: Path) -> None:
    flip(layers_of(workdir, MAIN)[0][0], 300)
    assert list(verify(workdir, names_only=True)) == []
    shutil.rmtree(timeline_path(workdir, MAIN))
    assert len(list(verify(workdir, names_only=True))) == 1


def test_nothing_is_changed(original: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in original.rglob("*")}

    before = state()
    list(verify(original))
    assert state() == before


def test_command(workdir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(workdir)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("3 timelines, ")
    assert out.endswith(" values read: 0 problems, 0 notes\n")
    assert err == ""
    path, _ = layers_of(workdir, MAIN)[0]
    flip(path, 300)
    assert main([str(workdir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"problem: {path} at offset ")
    assert lines[-1].endswith("1 problem, 3 notes")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "neither the working directory" in capsys.readouterr().err


# ---- the pure checks

ROOT = TimelineMetadata(80, 72, None, 0, 40, 16)


def test_metadata_checks() -> None:
    assert check_metadata(ROOT) == []
    child = TimelineMetadata(48, 0, MAIN, 48, 40, 16)
    assert check_metadata(child) == []
    for wrong in (
        replace(ROOT, disk_consistent_lsn=81),
        replace(ROOT, prev_record_lsn=88),
        replace(ROOT, latest_gc_cutoff_lsn=8),
        replace(ROOT, ancestor_lsn=8),
        replace(child, ancestor_lsn=0),
        replace(child, ancestor_lsn=56),
    ):
        assert len(check_metadata(wrong)) == 1, wrong
    assert check_ancestor(child, ROOT) == []
    assert check_ancestor(replace(child, ancestor_lsn=8), ROOT)[0].is_problem
    assert not check_ancestor(replace(child, ancestor_lsn=88), ROOT)[0].is_problem


def test_layer_checks() -> None:
    assert check_layer(LayerName.l0_delta(73, 81), ROOT) is None
    for wrong, metadata in (
        (LayerName.l0_delta(73, 89), ROOT),
        (LayerName.l0_delta(41, 57), replace(ROOT, ancestor_lsn=48)),
    ):
        remark = check_layer(wrong, metadata)
        assert remark is not None and remark.is_problem
    beyond = check_unlisted(LayerName.l0_delta(73, 89), ROOT)
    assert "sets it aside" in beyond.message and not beyond.is_problem
    old = check_unlisted(LayerName.l0_delta(73, 81), ROOT)
    assert "removes it" in old.message and not old.is_problem


def test_overlapping_groups() -> None:
    a = LayerName.delta(key(0), key(5), 1, 10)
    b = LayerName.delta(key(4), key(9), 9, 20)
    touching = LayerName.delta(key(5), key(6), 1, 9)
    other = LayerName.delta(key(20), key(30), 1, 20)
    c = LayerName.delta(key(8), key(10), 19, 30)
    image = LayerName.image(key(0), key(9), 5)
    same_lsn = LayerName.image(key(8), key(10), 5)
    assert overlapping_groups([c, touching, other, b, image, a]) == [[a, b, c]]
    assert overlapping_groups([a, image, same_lsn]) == [[image, same_lsn]]
    assert overlapping_groups([]) == []
