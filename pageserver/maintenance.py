"""What the background threads do for a timeline: compaction, garbage collection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pageserver.tenant_config import TenantConf
    from pageserver.timelines import TimelineHandle


class CompactionTask:
    """Merges layers and makes images where that is due."""

    name: Final = "compaction"

    def period(self, conf: TenantConf) -> float:
        """Seconds between two looks at a timeline."""
        return conf.compaction_period

    def state(self, handle: TimelineHandle, conf: TenantConf) -> Any:
        """Layers, GC cutoff, leases, settings; and the WAL: more is done for a timeline at rest."""
        timeline = handle.timeline
        return (
            timeline.view.layers,
            timeline.latest_gc_cutoff_lsn,
            handle.leases.lsns(),
            timeline.last_record_lsn,
            timeline.disk_consistent_lsn,
            conf,
        )

    def work(self, handle: TimelineHandle, conf: TenantConf) -> bool:
        """One round of compaction."""
        return handle.compact().done


class GcTask:
    """Removes the layers that only history beyond its limits needs."""

    name: Final = "garbage collection"

    def period(self, conf: TenantConf) -> float:
        """Seconds between two collections; none without a horizon."""
        return conf.gc_period if conf.gc_horizon else 0.0

    def state(self, handle: TimelineHandle, conf: TenantConf) -> Any:
        """Layers, WAL, leases and settings."""
        timeline = handle.timeline
        return (
            timeline.view.layers,
            timeline.last_record_lsn,
            timeline.disk_consistent_lsn,
            handle.leases.lsns(),
            conf,
        )

    def work(self, handle: TimelineHandle, conf: TenantConf) -> bool:
        """One collection; done if time alone cannot bring more."""
        handle.collect_garbage(conf.gc_horizon, conf.pitr_interval)
        # What is not on disk yet is out of reach.
        reachable = min(handle.horizon_lsn(conf.gc_horizon), handle.timeline.disk_consistent_lsn)
        return handle.timeline.latest_gc_cutoff_lsn >= reachable
