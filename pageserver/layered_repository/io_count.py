"""Who counts the input and output of which timeline."""

from __future__ import annotations

from collections.abc import Callable

from pageserver.layered_repository.io_stats import IoStats
from zenith_utils.ids import TenantId, TimelineId

CountIo = Callable[[TenantId, TimelineId], IoStats | None]
"""What counts the system calls on the layer files of a timeline; always the same for one."""


def not_counted(tenant_id: TenantId, timeline_id: TimelineId) -> IoStats | None:
    """Nothing does."""
    return None
