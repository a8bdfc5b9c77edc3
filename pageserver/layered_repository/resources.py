"""What the repositories of a pageserver share, and the timelines of a repository."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pageserver.layered_repository.block_cache import BlockCache
from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.files import FILES, Files
from pageserver.layered_repository.io_count import CountIo, not_counted
from pageserver.layered_repository.memory_budget import MemoryBudget
from pageserver.layered_repository.page_cache import PageCache
from pageserver.layered_repository.reader import Reconstruct
from pageserver.layered_repository.settings import StoreSettings
from zenith_utils.ids import TimelineId

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline

Measure = Callable[[str, "Timeline"], AbstractContextManager[object]]
"""Measures a `with` block: the name of an operation and the timeline that it works on."""

DEFAULT_MAX_FILE_DESCRIPTORS: Final = 100
DEFAULT_MEMORY_LIMIT: Final = 1 << 30


def _not_measured(operation: str, timeline: Timeline) -> AbstractContextManager[object]:
    return nullcontext()


def new_caches(size: int) -> tuple[PageCache, BlockCache]:
    """The caches of reads, which take `size` bytes together.

    Blocks of layer files have what the reconstructed values leave: at least a quarter, since a
    value is reconstructed from blocks, and at first all.
    """
    blocks = BlockCache(size)
    return PageCache(size * 3 // 4, blocks), blocks


@dataclass(frozen=True, slots=True)
class StoreResources:
    """The limited goods of a pageserver, one of each for all its repositories.

    page_cache: reconstructed values.
    descriptors: open layer files, and the cache of their blocks.
    memory: what open and frozen layers take.
    files: the way to the file system.
    measure: told of every flush, merge, image and collection.
    count_io: of layer files.
    """

    page_cache: PageCache
    descriptors: DescriptorCache
    memory: MemoryBudget[Timeline]
    files: Files = FILES
    measure: Measure = _not_measured
    count_io: CountIo = not_counted

    @classmethod
    def own(cls, settings: StoreSettings) -> StoreResources:
        """Those of a repository that shares none."""
        page_cache, blocks = new_caches(settings.page_cache_size)
        return cls(
            page_cache,
            DescriptorCache(DEFAULT_MAX_FILE_DESCRIPTORS, blocks=blocks),
            MemoryBudget(DEFAULT_MEMORY_LIMIT),
        )


@dataclass(slots=True)
class StoreContext:
    """What a repository lends its timelines.

    settings: those in force; replaced at run time.
    reconstruct: makes values of records.
    spill_dir: where open layers put values that do not fit into memory.
    branch_points: the LSNs at which branches of a timeline start, loaded or not. Raises StoreError
        if that cannot be told.
    """

    settings: StoreSettings
    reconstruct: Reconstruct
    resources: StoreResources
    spill_dir: Path
    branch_points: Callable[[TimelineId], list[int]]
