"""Limits and sizes of the value store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings of a repository.

    checkpoint_distance: bytes of WAL after which the open layer is frozen.
    max_open_layer_size: bytes of memory after which it is frozen however little WAL that is.
    max_frozen_layers: frozen layers that may wait for the flush before the writer has to.
    wait_lsn_timeout: seconds to wait for WAL when branching or reading from an ancestor.
    page_cache_size: bytes of reconstructed values kept in memory, 0 for none.
    flush_retry_interval: seconds between attempts of the background flush after a failure.
    """

    checkpoint_distance: int = 256 << 20
    max_open_layer_size: int = 1 << 30
    max_frozen_layers: int = 3
    wait_lsn_timeout: float = 60.0
    page_cache_size: int = 64 << 20
    flush_retry_interval: float = 1.0
