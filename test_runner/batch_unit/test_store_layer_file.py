"""Layer files in use: lookups, the cursor, the bound on open files, the writer's system calls."""

import errno
import gc
import io
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_unit.store_format_support import (
    LAST_LSN,
    TENANT,
    TIMELINE,
    Entry,
    decode,
    key,
    reopened,
    write_layer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import Buffer

from pageserver.layered_repository import dump_layer
from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.errors import LayerGoneError
from pageserver.layered_repository.files import FILES, Files
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_scan import LayerScan
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.metadata import TimelineMetadata, write_metadata
from pageserver.layered_repository.read_batch import ReadBatch

numbers = st.integers(0, 40) | st.sampled_from([1 << 64, (1 << 144) - 2, 0xFFFFFFFF])
lsns = st.integers(1, 60) | st.sampled_from([1 << 31, 1 << 33, LAST_LSN])
sizes = st.sampled_from([0, 1, 30, 100, 4000, 8191, 8192, 8193, 40_000])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.dictionaries(st.tuples(numbers, lsns), st.tuples(st.booleans(), sizes), min_size=1),
    st.integers(0, 3),
    st.data(),
)
def test_lookup(
    tmp_path_factory: pytest.TempPathFactory,
    content: dict[tuple[int, int], tuple[bool, int]],
    spread: int,
    data: st.DataObject,
) -> None:
    unique: dict[tuple[bytes, int], Entry] = {}
    for (number, lsn), (will_init, size) in content.items():
        value = random.Random(number ^ lsn).randbytes(size)
        for copy in range(spread * 30 + 1):
            copied = key(number + copy if number < 41 else number)
            unique[copied, lsn] = (copied, lsn, 6 | will_init, value)
    entries = [unique[place] for place in sorted(unique)]
    compress = data.draw(st.booleans(), "compress")
    layer = write_layer(tmp_path_factory.mktemp("layer"), entries, compress=compress)

    all_keys = sorted({entry[0] for entry in entries} | {key(7), key(1 << 80)})
    upper = data.draw(lsns, "upper")
    floor = data.draw(st.integers(0, 60), "floor")
    batch = ReadBatch(all_keys)
    layer.read(batch, 0, len(all_keys), upper, floor)
    for i, wanted in enumerate(all_keys):
        expected: list[tuple[int, int, bytes]] = []
        for found, lsn, flags, value in reversed(entries):
            if found == wanted and floor <= lsn <= upper:
                expected.insert(0, (lsn, flags, value))
                if flags & 1:
                    break
        assert batch.values(i) == expected
    start, end = data.draw(st.tuples(numbers, numbers), "range")
    assert layer.keys(key(start), key(end), upper, floor) == sorted(
        {e[0] for e in entries if key(start) <= e[0] < key(end) and floor <= e[1] <= upper}
    )


def test_one_key_over_many_leaves(tmp_path: Path) -> None:
    entries = [(key(1), 8, 1, b"other")]
    entries += [(key(2), 8 * i, 1 if i in (1, 400) else 2, b"%d" % i) for i in range(1, 1000)]
    entries += [(key(3), 8, 1, b"other")]
    layer = write_layer(tmp_path, entries)
    for upper in (8, 1016, 1024, 3192, 3200, 3208, 5000, 9000, (1 << 32) + 7176):
        batch = ReadBatch([key(2)])
        layer.read(batch, 0, 1, upper, 0)
        first = 400 if upper >= 3200 else 1
        newest = min(upper // 8, 999)
        assert [lsn // 8 for lsn, _, _ in batch.values(0)] == list(range(first, newest + 1))


@pytest.mark.parametrize("compress", [False, True])
def test_scan_says_how_large_the_run_of_a_key_is(tmp_path: Path, compress: bool) -> None:
    source = random.Random(8)
    entries = [(key(1), 8 * i, 2, source.randbytes(50)) for i in range(1, 11)]
    entries += [(key(2), 8 * i, 2, source.randbytes(1000)) for i in range(1, 2001)]
    entries += [(key(3), 8, 2, source.randbytes(70))]
    scan = LayerScan(write_layer(tmp_path, entries, compress=compress))
    assert scan.key_run_size == 0
    sizes = {}
    for found, lsn, _, _ in scan:
        sizes[found, lsn] = scan.key_run_size
    assert sizes[key(1), 8] == 500
    assert sizes[key(1), 80] == 50
    # The run of a key over many leaves is known to a leaf, which is 128 kB here.
    assert 2_000_000 <= sizes[key(2), 8] <= 2_000_000 + 140_000
    assert 1_000_000 <= sizes[key(2), 8008] <= 1_000_000 + 140_000
    assert sizes[key(3), 8] == 70
    assert (scan.entry_count, scan.key_count) == (len(entries), 3)


# ---- open files


def open_descriptors(directory: Path) -> int:
    """How many files of a directory this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += link.readlink().is_relative_to(directory)
        except FileNotFoundError:
            continue  # The descriptor of the listing itself, or another thread's.
    return found


def test_descriptor_cache_closes_what_was_not_used(tmp_path: Path) -> None:
    cache = DescriptorCache(3)
    layers = []
    for i in range(5):
        name = LayerName.image(key(i), key(i + 1), 8)
        layers.append(write_layer(tmp_path, [(key(i), 8, 1, b"v")], name, descriptors=cache))
    for layer in layers[:3]:
        layer.open()
    assert [layer.is_open for layer in layers] == [True, True, True, False, False]
    layers[3].open()  # The hand passes all of them once and closes the first.
    assert [layer.is_open for layer in layers] == [False, True, True, True, False]
    layers[1].open()
    layers[4].open()
    assert [layer.is_open for layer in layers] == [False, True, False, True, True]
    assert len(cache) == 3
    assert open_descriptors(tmp_path) == 3
    assert list(layers[2].entries()) == [(key(2), 8, 1, b"v")]
    assert len(cache) == 3
    assert cache.memory > 0
    del layer
    layers.clear()
    gc.collect()
    assert (len(cache), cache.memory, open_descriptors(tmp_path)) == (0, 0, 0)


def test_descriptor_cache_bounds_memory(tmp_path: Path) -> None:
    entries = [(key(i), 8, 1, b"") for i in range(20_000)]
    layers = []
    cache = DescriptorCache(100, memory_limit=100_000)
    for i in range(4):
        name = LayerName.l0_delta(8, 16 + i)
        layers.append(write_layer(tmp_path, entries, name, descriptors=cache))
        layers[-1].open()
        assert layers[-1].is_open
        assert cache.memory <= 100_000
    assert 1 <= sum(layer.is_open for layer in layers) == len(cache) < 4
    alone = DescriptorCache(100, memory_limit=10)
    layer = LayerFile(layers[0].path, layers[0].name, TENANT, TIMELINE, descriptors=alone)
    assert layer.may_contain(key(5))
    assert layer.is_open


def test_eviction_while_others_read(tmp_path: Path) -> None:
    cache = DescriptorCache(2)
    layers = []
    for i in range(8):
        entries = [(key(n), 8, 1, b"%d %d" % (i, n)) for n in range(300)]
        name = LayerName.delta(key(0), key(1000), 8, 16 + i)
        layers.append(write_layer(tmp_path, entries, name, compress=i % 2 == 0, descriptors=cache))
    problems: list[object] = []

    def read(seed: int) -> None:
        source = random.Random(seed)
        try:
            for _ in range(400):
                number = source.randrange(8)
                first = source.randrange(250)
                batch = ReadBatch([key(n) for n in range(first, first + 40)])
                layers[number].read(batch, 0, 40, 100, 0)
                for n in range(40):
                    if batch.image(n) != b"%d %d" % (number, first + n):
                        problems.append((number, first + n, batch.image(n)))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(cache) == sum(layer.is_open for layer in layers) <= 2
    assert open_descriptors(tmp_path) == len(cache)


def test_removed_files(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, [(key(1), 8, 1, b"v")])
    kept = reopened(layer).open()
    late = reopened(layer)
    with pytest.raises(FileNotFoundError):
        (tmp_path / "none").open()
    layer.open()
    late.gone = layer.gone = True
    FILES.unlink(layer.path)
    # Who has it open reads on, whoever comes now is told.
    assert list(layer.entries()) == [(key(1), 8, 1, b"v")]
    assert list(LayerScan(kept)) == [(key(1), 8, 1, b"v")]
    for attempt in (late.open, late.verify, lambda: late.may_contain(key(1))):
        with pytest.raises(LayerGoneError, match=str(layer.path)):
            attempt()
    layer.evict()
    with pytest.raises(LayerGoneError):
        layer.read(ReadBatch([key(1)]), 0, 1, 8, 0)
    late.gone = False
    with pytest.raises(FileNotFoundError):
        late.open()


def test_size_is_known_without_opening(tmp_path: Path) -> None:
    layer = write_layer(tmp_path, [(key(1), 8, 1, b"v")])
    assert layer.size == Path(layer.path).stat().st_size
    assert not layer.is_open
    told = LayerFile(layer.path, layer.name, TENANT, TIMELINE, size=77)
    assert told.size == 77
    told.open()
    assert told.size == layer.size


# ---- writing


def test_entries_must_ascend_and_lie_in_the_ranges(tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "x", TENANT, TIMELINE)
    writer.add(key(2), 16, 1, b"")
    for wrong in ((key(1), 24), (key(2), 16), (key(2), 8)):
        with pytest.raises(ValueError, match="ascend"):
            writer.add(*wrong, 1, b"")
    writer.add(key(2), 24, 1, b"")
    for name in (
        LayerName.delta(key(3), key(4), 8, 100),
        LayerName.delta(key(1), key(2), 8, 100),
        LayerName.image(key(2), key(3), 24),
        LayerName.delta(key(2), key(3), 16, 24),
    ):
        with pytest.raises(ValueError, match="outside"):
            writer.finish(name)
    writer.abort()
    assert not (tmp_path / "x").exists()


class RecordingFiles(Files):
    """Does what Files does, writes it down, and fails at one step if it is told to."""

    __slots__ = ("calls", "fail_at")

    def __init__(self, fail_at: int = -1) -> None:
        self.calls: list[tuple[str, str, int, bytes]] = []
        self.fail_at = fail_at

    def _note(self, call: str, path: str | Path, offset: int = 0, data: bytes = b"") -> None:
        self.calls.append((call, Path(path).name, offset, data))
        if len(self.calls) - 1 == self.fail_at:
            raise OSError(errno.ENOSPC, "no room", str(path))

    def create(self, path: str | Path) -> int:
        """See Files."""
        self._note("create", path)
        return super().create(path)

    def write(self, fd: int, path: str | Path, data: Buffer, offset: int) -> None:
        """See Files."""
        self._note("write", path, offset, bytes(data))
        super().write(fd, path, data, offset)

    def fsync(self, fd: int, path: str | Path) -> None:
        """See Files."""
        self._note("fsync", path)
        super().fsync(fd, path)

    def close(self, fd: int) -> None:
        """See Files."""
        super().close(fd)
        self._note("close", "")

    def rename(self, source: str | Path, target: str | Path) -> None:
        """See Files."""
        self._note("rename", source)
        super().rename(source, target)

    def unlink(self, path: str | Path) -> None:
        """See Files."""
        self._note("unlink", path)
        super().unlink(path)

    def fsync_dir(self, path: str | Path) -> None:
        """See Files."""
        self._note("fsync_dir", path)
        super().fsync_dir(path)


def write_frozen_layer(path: Path, files: Files, compress: bool) -> None:
    """A flush of a layer with small values, two big ones and enough to fill the buffer."""
    layer = InMemoryLayer(8)
    source = random.Random(4)
    for i in range(3000):
        layer.put(key(i * 7 % 3000), 8 + i, 1, source.randbytes(300_000 if i % 1500 == 9 else 600))
    layer.publish(5000)
    layer.freeze(5001, 0)
    writer = LayerWriter(path / "temp", TENANT, TIMELINE, files=files, compress=compress)
    try:
        assert writer.add_layer(layer) == 3000
        assert writer.key_count == 3000
        assert writer.file_size > 2_000_000
        writer.finish(LayerName.l0_delta(8, 5001))
    except BaseException:
        writer.abort()
        raise


@pytest.mark.parametrize("compress", [False, True])
def test_writer_goes_through_files(tmp_path: Path, compress: bool) -> None:
    files = RecordingFiles()
    write_frozen_layer(tmp_path, files, compress)
    content = (tmp_path / "temp").read_bytes()
    assert len(decode(content).entries) == 3000
    steps = [call[0] for call in files.calls]
    writes = steps.count("write")
    assert writes > 6
    assert steps == ["create", *["write"] * writes, "fsync", "close"]
    assert {call[1] for call in files.calls[:-1]} == {"temp"}
    end = 0
    for _, _, offset, data in files.calls[1:writes]:
        assert offset == end
        assert content[max(offset, 256) : offset + len(data)] == data[256 if not offset else 0 :]
        end += len(data)
    assert end == len(content)
    # Nothing looks like a layer before all the rest is written.
    assert files.calls[1][3][:256] == bytes(256)
    assert files.calls[writes][2:] == (0, content[:256])
    (tmp_path / "temp").unlink()
    write_frozen_layer(tmp_path, FILES, compress)
    assert (tmp_path / "temp").read_bytes() == content


def every_failure(work: Callable[[RecordingFiles], None]) -> int:
    """Let every step of some work fail in turn; the number of steps."""
    counted = RecordingFiles()
    work(counted)
    for step in range(len(counted.calls)):
        with pytest.raises(OSError, match="no room"):
            work(RecordingFiles(step))
    return len(counted.calls)


def test_writer_reports_every_failure(tmp_path: Path) -> None:
    def work(files: RecordingFiles) -> None:
        try:
            write_frozen_layer(tmp_path, files, False)
        except OSError:
            assert list(tmp_path.iterdir()) == []
            raise
        (tmp_path / "temp").unlink()

    assert every_failure(work) > 8
    gc.collect()
    assert open_descriptors(tmp_path) == 0


def test_metadata_is_replaced_durably(tmp_path: Path) -> None:
    path = tmp_path / "metadata"
    old, new = (TimelineMetadata(lsn, 0, None, 0, 8, 8) for lsn in (8, 16))
    write_metadata(path, old)
    files = RecordingFiles()
    write_metadata(path, new, files)
    steps = [call[0] for call in files.calls]
    assert steps == ["create", "write", "fsync", "close", "rename", "fsync_dir"]
    assert path.read_bytes() == new.encode() == files.calls[1][3]

    def work(files: RecordingFiles) -> None:
        write_metadata(path, old)
        try:
            write_metadata(path, new, files)
        except OSError:
            renamed = files.calls[-1][0] == "fsync_dir"
            assert path.read_bytes() == (new if renamed else old).encode()
            assert [entry.name for entry in tmp_path.iterdir()] == ["metadata"]
            raise

    every_failure(work)


def test_dump(tmp_path: Path) -> None:
    entries = [(key(1), 8, 1, b"abc"), (key(1), 0x1_0000_0010, 4, b"d")]
    layer = write_layer(tmp_path, entries)
    out = io.StringIO()
    dump_layer.dump(Path(layer.path), out, values=True)
    lines = out.getvalue().splitlines()
    assert lines[0] == f"delta layer of tenant {TENANT.hex()} timeline {TIMELINE.hex()}"
    assert "2 entries of 1 keys" in out.getvalue()
    assert "filter of 1 lines" in out.getvalue()
    assert lines[-2].endswith("1 0/8 kind 0 will_init 3 bytes 616263")
    assert lines[-1].endswith("1 1/10 kind 2 1 bytes 64")

    name = LayerName.image(key(1), key(9), 8)
    packed = write_layer(tmp_path, [(key(1), 8, 1, bytes(3000))], name, compress=True)
    out = io.StringIO()
    dump_layer.dump(Path(packed.path), out)
    assert "zstd in 1 of 1 blocks of up to 8192 bytes" in out.getvalue()
    assert "no filter" in out.getvalue()


def test_images_added_together_are_those_added_one_by_one(tmp_path: Path) -> None:
    source = random.Random(5)
    values = [source.choice([None, b"", source.randbytes(8192), bytes(9000)]) for _ in range(300)]
    keys = [key(number) for number in range(300)]
    name = LayerName.image(key(0), key(300), 80)
    one = LayerWriter(tmp_path / "one", TENANT, TIMELINE, compress=True)
    for k, value in zip(keys, values, strict=True):
        if value is not None:
            one.add(k, 80, 1, value)
    one.finish(name)
    many = LayerWriter(tmp_path / "many", TENANT, TIMELINE, compress=True)
    many.add_images(keys[:100], 80, values[:100])
    many.add_images([], 80, [])
    many.add_images(keys[100:], 80, values[100:])
    many.finish(name)
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()


def test_images_that_cannot_be_added(tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "layer", TENANT, TIMELINE)
    with pytest.raises(ValueError, match="2 keys and 1 values"):
        writer.add_images([key(1), key(2)], 80, [b"x"])
    with pytest.raises(ValueError, match="18 bytes"):
        writer.add_images([b"short"], 80, [b"x"])
    with pytest.raises(TypeError):
        writer.add_images([key(1)], 80, ["text"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="ascend"):
        writer.add_images([key(2), key(1)], 80, [b"x", b"y"])
    writer.abort()
    assert list(tmp_path.iterdir()) == []
