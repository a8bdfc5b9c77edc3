"""Executes the garbage collection of a timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pageserver.layered_repository.gc_plan import GcResult, plan_gc
from pageserver.layered_repository.metadata_keeper import Change

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline


def raise_cutoff(cutoff: int) -> Change:
    """Have the metadata say that nothing can be read below `cutoff`.

    In the same step as the change of layers that takes away what only such reads need: after a
    crash nobody may believe that what is gone can be read, or begin a branch there.
    """
    return lambda metadata: replace(
        metadata, latest_gc_cutoff_lsn=max(cutoff, metadata.latest_gc_cutoff_lsn)
    )


def collect(timeline: Timeline, points: Sequence[int]) -> GcResult:
    """Delete the layers that nobody needs who reads at or above the published cutoff.

    The state at `points` is kept too, and at those of the timeline; see Timeline.gc.
    """
    measured = timeline.context.resources.measure("gc", timeline)
    with timeline.maintenance.turn(wait=True), measured:
        cutoff = timeline.latest_gc_cutoff_lsn
        plan = plan_gc(
            timeline.view.layers,
            cutoff=cutoff,
            points=[*points, *timeline.retain_points()],
            has_ancestor=timeline.ancestor_id is not None,
            disk_consistent_lsn=timeline.disk_consistent_lsn,
            is_empty=lambda image: timeline.maintenance.count_entries(image) == 0,
        )
        # In one step, so that no layer is back after a crash without the tombstone that hid it.
        timeline.maintenance.replace_layers(
            (), [*plan.remove, *plan.tombstones], raise_cutoff(cutoff)
        )
        return plan.counters
