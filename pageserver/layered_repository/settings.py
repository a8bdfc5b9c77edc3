"""Limits and sizes of the value store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings of a repository; they may be replaced while it runs.

    Writing:
    checkpoint_distance: bytes of WAL after which the open layer is frozen.
    max_open_layer_size: bytes of memory and spilled values after which it is frozen however little
        WAL that is.
    spill_after: bytes of values an open layer keeps in memory; more of them go to a file.
    max_frozen_layers: frozen layers that may wait for the flush before the writer has to.
    flush_retry_interval: seconds between attempts of the background flush after a failure.

    Reading:
    wait_lsn_timeout: seconds to wait for WAL when branching or reading from an ancestor.
    page_cache_size: bytes of reconstructed values and of unpacked blocks of layer files kept in
        memory, 0 for none; for a repository that shares no cache with others.

    Compaction:
    compaction_threshold: L0 deltas that are merged when there are so many.
    compaction_target_size: bytes of a file that a merge writes, 0 for checkpoint_distance.
    image_creation_threshold: deltas over a key range since its last image that call for a new one.
    image_part_keys: keys in an image layer, about.
    compress_layers: compress what compaction writes, and the image that a timeline begins with.
    compaction_retry_interval: seconds without compaction of a timeline after one that failed;
        twice as long after each further failure, up to 64 times.
    """

    checkpoint_distance: int = 256 << 20
    max_open_layer_size: int = 1 << 30
    spill_after: int = 64 << 20
    max_frozen_layers: int = 3
    flush_retry_interval: float = 1.0

    wait_lsn_timeout: float = 60.0
    page_cache_size: int = 64 << 20

    compaction_threshold: int = 10
    compaction_target_size: int = 0
    image_creation_threshold: int = 3
    image_part_keys: int = 16384
    compress_layers: bool = True
    compaction_retry_interval: float = 10.0

    @property
    def target_size(self) -> int:
        """Bytes of a file that a merge writes."""
        return self.compaction_target_size or self.checkpoint_distance
