"""What the benchmarks of the value store share: keys, values, stores, measuring.

Not a benchmark itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import struct
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from pageserver.layered_repository.errors import TimelineStopped
from pageserver.layered_repository.reader import Reconstruct, ReconstructInput
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.resources import StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from zenith_utils.ids import TenantId, TimelineId

T = TypeVar("T")

MIB: Final = 1 << 20
PAGE_SIZE: Final = 8192
FLAGS_IMAGE: Final = 1
FLAGS_RECORD: Final = 2
START_LSN: Final = 0x1000000
FIRST_RELATION: Final = 0x4000

KeyRange = tuple[bytes, bytes]

# ---- keys and values

_TUPLE = struct.Struct("<IIIHHHBBxiii")
_RECORD = struct.Struct("<IIQBBxxIBBHIIII")


def block_key(number: int, relation: int = FIRST_RELATION) -> bytes:
    """A key as those of relation blocks: the number in its last four bytes."""
    return b"\0\0\0\x06\x75\0\0\x34\x05%b\0%b" % (
        relation.to_bytes(4, "big"),
        number.to_bytes(4, "big"),
    )


def page_of(number: int, version: int) -> bytes:
    """8 kB as a heap page has them, some with a hole: row headers, integers and text.

    zstd makes about a third of them.
    """
    rng = random.Random(number << 16 | version)
    count = rng.randrange(30, 62)
    rows = b"".join(
        _TUPLE.pack(version + 700, 0, 0, i, 3, 0x902, 24, 0, number * 61 + i, i, version)
        + rng.randbytes(28).hex().encode().ljust(84)
        for i in range(count)
    )
    pointers = struct.pack(
        f"<{count}I", *(1 | (PAGE_SIZE - (i + 1) * 124) << 1 | 124 << 17 for i in range(count))
    )
    head = struct.pack("<QHHHHHHI", START_LSN + version, 0, 0, 24 + 4 * count, 0, 8192, 8196, 0)
    return (head + pointers).ljust(PAGE_SIZE - len(rows), b"\0") + rows


def record_of(number: int, version: int, size: int) -> bytes:
    """`size` bytes as a WAL record of a row change has them."""
    head = _RECORD.pack(
        size, version + 700, number, 0, 10, number * 2654435761 & 0xFFFFFFFF, 0, 0x20, size - 48,
        1663, 13445, FIRST_RELATION, number,
    )  # fmt: skip
    text = random.Random(number << 16 | version).randbytes((size - len(head)) // 3).hex().encode()
    return head + text.ljust(size - len(head))


class RandomValues:
    """Values of one size, at least 8 bytes, that do not compress and say which they are."""

    _HEAD = struct.Struct(">II")

    def __init__(self, size: int = PAGE_SIZE) -> None:
        self.size = size
        self._pool = random.Random(1).randbytes(8 * MIB)

    def __call__(self, number: int, version: int) -> bytes:
        """The value of a key in a version."""
        start = (number * 7919 + version * 104729) * 64 % (len(self._pool) - self.size)
        return self._HEAD.pack(number, version) + self._pool[start + 8 : start + self.size]


# ---- stores


def no_redo(needed: Sequence[ReconstructInput]) -> list[bytes]:
    """Redo of a benchmark that stores nothing that needs it."""
    raise AssertionError(f"the benchmark stores images only, got {needed[0].records}")


def free_redo(needed: Sequence[ReconstructInput]) -> list[bytes]:
    """Redo that costs nothing: the base, or a page of zeros."""
    return [item.base or bytes(PAGE_SIZE) for item in needed]


@contextlib.contextmanager
def opened(
    directory: Path,
    settings: StoreSettings,
    reconstruct: Reconstruct = no_redo,
    resources: StoreResources | None = None,
) -> Iterator[Repository]:
    """A repository in a new directory below `directory`, which goes with the block."""
    path = Path(tempfile.mkdtemp(prefix="bench-store-", dir=directory))
    repository = Repository(path, TenantId.generate(), settings, reconstruct, resources=resources)
    try:
        yield repository
    finally:
        repository.shutdown(flush=False)
        shutil.rmtree(path)


def new_timeline(
    repository: Repository, items: Iterable[tuple[bytes, bytes]] = ((block_key(0), b"x"),)
) -> Timeline:
    """A timeline with the given keys and values at START_LSN."""
    timeline = repository.create_timeline(TimelineId.generate(), initdb_lsn=START_LSN)
    timeline.import_image_layer(START_LSN, items)
    return timeline


def put_values(
    timeline: Timeline,
    keys: Sequence[bytes],
    values: bytes,
    flags: int = FLAGS_IMAGE,
    *,
    wal: int = 8,
) -> None:
    """One batch: values of one size for the keys, each `wal` bytes of WAL after the one before."""
    first = int(timeline.last_record_lsn) + wal
    lsns = array("Q", range(first, first + wal * len(keys), wal))
    with timeline.writer() as writer:
        writer.open_layer.put_many(b"".join(keys), lsns, flags, values)
        writer.advance(lsns[-1], 0)


class Maintainer:
    """Compacts and collects garbage in a thread, round after round, as a pageserver does.

    `horizon`: bytes of WAL whose history is kept; None: all of it. An exception of the thread is
    raised at the end of the `with` block.
    """

    def __init__(
        self,
        timeline: Timeline,
        keyspace: Callable[[int], Sequence[KeyRange]],
        *,
        horizon: int | None,
        period: float = 0.1,
    ) -> None:
        self._timeline = timeline
        self._keyspace = keyspace
        self._horizon = horizon
        self._period = period
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def round(self) -> bool:
        """Compaction, then garbage collection; whether nothing is left to do."""
        done = self._timeline.compact(self._keyspace).done
        if self._horizon is None:
            return done
        cutoff = (self._timeline.last_record_lsn - self._horizon) & ~7
        return self._timeline.gc(max(cutoff, 0)).layers_removed == 0 and done

    def until_at_rest(self) -> None:
        """Rounds until there is nothing left to do, with everything on disk."""
        self._timeline.checkpoint()
        at_rest = 0
        while at_rest < 2:
            at_rest = at_rest + 1 if self.round() else 0

    def __enter__(self) -> Maintainer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._period):
                self.round()
        except TimelineStopped:
            pass
        except Exception as error:
            self._error = error


# ---- measuring


def times_us(call: Callable[[T], object], arguments: Iterable[T]) -> list[float]:
    """The time of every call in microseconds."""
    times = []
    for argument in arguments:
        begin = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def percentiles(times: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def load_average() -> str:
    """What else the machine is doing, for the reader of the figures."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


def size_on_disk(directory: Path) -> int:
    """Bytes of the files below a directory; those that vanish meanwhile do not count."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                total += path.stat().st_size
    return total


def memory_of(pid: int | str = "self", field: str = "VmRSS") -> int:
    """Bytes of a process: VmRSS, those in memory now; VmHWM, their peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"/proc/{pid}/status has no {field}")
