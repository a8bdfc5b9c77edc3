"""A value store of the tests: its redo appends a record to the value."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from typing_extensions import Buffer

from pageserver.layered_repository.files import Files
from pageserver.layered_repository.layer_list import ListedLayer
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.reader import ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.resources import StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.timeline_dir import TimelineDir
from zenith_utils.ids import TenantId, TimelineId

IMAGE, RECORD, INIT_RECORD = 1, 2, 3
TENANT = TenantId(b"t" * 16)
MAIN = TimelineId(b"m" * 16)
BRANCH = TimelineId(b"b" * 16)
IMPORT_LSN = 16
KEY_COUNT = 10
"""Keys 0 to 9 are there from the import on."""


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def append(needed: Sequence[ReconstructInput]) -> list[bytes]:
    return [(item.base or b"") + b"".join(data for _, _, data in item.records) for item in needed]


def open_repository(
    path: Path, resources: StoreResources | None = None, **settings: float
) -> Repository:
    limits = StoreSettings(**settings)  # type: ignore[arg-type]
    return Repository(path, TENANT, limits, append, resources=resources)


def with_files(files: Files, *, page_cache_size: int = 64 << 20) -> StoreResources:
    """Resources whose file operations go through `files`."""
    own = StoreResources.own(StoreSettings(page_cache_size=page_cache_size))
    return StoreResources(own.page_cache, own.descriptors, own.memory, files)


@contextlib.contextmanager
def opened(path: Path, **settings: float) -> Iterator[Repository]:
    """A repository that is shut down, without a flush, at the end of the block."""
    repository = open_repository(path, None, **settings)
    try:
        yield repository
    finally:
        repository.shutdown(flush=False)


def new_timeline(repository: Repository, timeline_id: TimelineId = MAIN) -> Timeline:
    """Keys 0 to 9 with values i0 to i9 at IMPORT_LSN."""
    timeline = repository.create_timeline(timeline_id, initdb_lsn=IMPORT_LSN)
    items = [(key(i), b"i%d" % i) for i in range(KEY_COUNT)]
    timeline.import_image_layer(IMPORT_LSN, items, prev_lsn=8)
    return timeline


def put(timeline: Timeline, lsn: int, *values: tuple[int, int, bytes]) -> None:
    """A batch of one record: (key number, flags, data)."""
    with timeline.writer() as writer:
        for number, flags, data in values:
            writer.put(key(number), lsn, flags, data)
        writer.advance(lsn, lsn - 8)


def delete_range(timeline: Timeline, lsn: int, start: int, end: int) -> None:
    """A batch that deletes a range of keys."""
    with timeline.writer() as writer:
        writer.delete_range(key(start), key(end), lsn)
        writer.advance(lsn, lsn - 8)


def put_layers(timeline: Timeline, lsns: Sequence[int], *numbers: int) -> None:
    """An L0 delta for each LSN, with a record `+<lsn>` of each key."""
    for lsn in lsns:
        put(timeline, lsn, *((number, RECORD, b"+%d" % lsn) for number in numbers))
        timeline.checkpoint()


def every_key(timeline: Timeline) -> Callable[[int], list[tuple[bytes, bytes]]]:
    """The keyspace of a timeline for compaction: each key that exists is a range."""

    def keyspace(lsn: int) -> list[tuple[bytes, bytes]]:
        found = timeline.scan_keys(MIN_KEY, MAX_KEY, lsn)
        return [(k, key(int.from_bytes(k, "big") + 1)) for k in found]

    return keyspace


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


@contextlib.contextmanager
def running(*targets: Callable[[], object]) -> Iterator[list[threading.Thread]]:
    """Threads that are joined at the end of the block."""
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()


def files(timeline: Timeline) -> list[str]:
    return sorted(path.name for path in timeline.directory.path.iterdir())


def list_all_layers(directory: TimelineDir) -> None:
    """Let the layer files count that were put into a timeline's directory; nobody runs on it."""
    metadata = directory.read_metadata()
    found = [
        ListedLayer(name, path.stat().st_size)
        for path in directory.path.iterdir()
        if (name := LayerName.parse(path.name)) is not None
    ]
    directory.replace_metadata(metadata, found, metadata.layer_list + 1)
    directory.discard_list(metadata.layer_list)


def layers(timeline: Timeline) -> dict[str, list[tuple[int, int]]]:
    """The LSN ranges of the timeline's layers by kind: l0, delta, image."""
    found: dict[str, list[tuple[int, int]]] = {"l0": [], "delta": [], "image": []}
    for layer in timeline.view.layers:
        kind = "image" if layer.is_image else "l0" if layer.name.is_l0 else "delta"
        found[kind].append((layer.start_lsn, layer.end_lsn))
    return {kind: sorted(ranges) for kind, ranges in found.items()}


class CrashFiles(Files):
    """Copies the store after every change of the file system, as a crash there would leave it.

    What a crash may lose, as it was not synced, is not simulated.
    """

    def __init__(self, path: Path, copies: Path) -> None:
        self._path = path
        self._copies = copies
        self.states: list[Path] = []
        self.steps: list[str] = []
        self.on = False

    def _step(self, step: str) -> None:
        if self.on:
            state = self._copies / f"{len(self.states):03}"
            shutil.copytree(self._path, state)
            self.states.append(state)
            self.steps.append(step)

    def create(self, path: str | Path) -> int:
        """Open a file for writing."""
        fd = super().create(path)
        self._step(f"create {Path(path).name}")
        return fd

    def write(self, fd: int, path: str | Path, data: Buffer, offset: int) -> None:
        """Write to it."""
        super().write(fd, path, data, offset)
        self._step(f"write {Path(path).name}")

    def rename(self, source: str | Path, target: str | Path) -> None:
        """Rename a file."""
        super().rename(source, target)
        self._step(f"rename {Path(target).name}")

    def unlink(self, path: str | Path) -> None:
        """Remove a file."""
        super().unlink(path)
        self._step(f"unlink {Path(path).name}")


class FullDisk(Files):
    """Fails writes of layers while `full` is set."""

    def __init__(self) -> None:
        self.full = threading.Event()
        self.failed = threading.Event()

    def write(self, fd: int, path: str | Path, data: Buffer, offset: int) -> None:
        """Write to it."""
        if self.full.is_set():
            self.failed.set()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super().write(fd, path, data, offset)
