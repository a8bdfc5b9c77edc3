"""What metadata and the names of layers alone prove to be wrong with a timeline.

Pure: no I/O. Which layers there must be is known from the timeline's list. That they are a whole
history cannot be told by their names: a flush writes no delta for WAL that changed no key, a merge
gives each new delta the range of the keys that it holds, and garbage collection takes everything
away where no key is left. Whether they are shows when values are read: see verify_reads.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pageserver.layered_repository.layer_map import LayerRange
from pageserver.layered_repository.metadata import TimelineMetadata
from zenith_utils.lsn import lsn_text

L = TypeVar("L", bound=LayerRange)


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that is wrong, or (no problem) only worth knowing."""

    message: str
    is_problem: bool = True


def check_metadata(metadata: TimelineMetadata) -> list[Remark]:
    """Whether the LSNs of one timeline's metadata fit together."""
    problems = []
    consistent = metadata.disk_consistent_lsn
    if consistent % 8:
        problems.append(f"disk_consistent_lsn {lsn_text(consistent)} is not a multiple of 8")
    if metadata.prev_record_lsn > consistent:
        problems.append(
            f"prev_record_lsn {lsn_text(metadata.prev_record_lsn)} is above disk_consistent_lsn "
            f"{lsn_text(consistent)}"
        )
    if metadata.latest_gc_cutoff_lsn < metadata.initdb_lsn:
        problems.append(
            f"latest_gc_cutoff_lsn {lsn_text(metadata.latest_gc_cutoff_lsn)} is below initdb_lsn "
            f"{lsn_text(metadata.initdb_lsn)}"
        )
    if metadata.ancestor_id is None:
        if metadata.ancestor_lsn:
            problems.append(f"ancestor_lsn {lsn_text(metadata.ancestor_lsn)} without an ancestor")
    elif not 0 < metadata.ancestor_lsn <= consistent:
        problems.append(
            f"ancestor_lsn {lsn_text(metadata.ancestor_lsn)} is not between 0/0 and "
            f"disk_consistent_lsn {lsn_text(consistent)}"
        )
    return [Remark(text) for text in problems]


def check_ancestor(metadata: TimelineMetadata, ancestor: TimelineMetadata) -> list[Remark]:
    """Whether a branch begins within the history of its ancestor.

    Not whether that is still there: garbage collection keeps the state at branch points below its
    cutoff, and what is gone shows when it is read.
    """
    begin = metadata.ancestor_lsn
    remarks = []
    if begin < ancestor.ancestor_lsn:
        remarks.append(
            Remark(
                f"it begins at {lsn_text(begin)}, before its ancestor {metadata.ancestor_id} does, "
                f"at {lsn_text(ancestor.ancestor_lsn)}"
            )
        )
    if begin < ancestor.initdb_lsn:
        remarks.append(
            Remark(
                f"it begins at {lsn_text(begin)}, before the history of its ancestor "
                f"{metadata.ancestor_id}, at {lsn_text(ancestor.initdb_lsn)}"
            )
        )
    if begin > ancestor.disk_consistent_lsn:
        remarks.append(
            Remark(
                f"it begins at {lsn_text(begin)}, beyond what is on disk of its ancestor "
                f"{metadata.ancestor_id} (disk_consistent_lsn "
                f"{lsn_text(ancestor.disk_consistent_lsn)}): reads wait until the WAL up to there "
                "has come again",
                is_problem=False,
            )
        )
    return remarks


def check_layer(layer: LayerRange, metadata: TimelineMetadata) -> Remark | None:
    """Whether a layer that counts lies within the LSNs of its timeline."""
    if layer.end_lsn > metadata.disk_consistent_lsn + 1:
        return Remark(
            f"it ends at {lsn_text(layer.end_lsn)}, beyond disk_consistent_lsn "
            f"{lsn_text(metadata.disk_consistent_lsn)}"
        )
    if layer.start_lsn <= metadata.ancestor_lsn:
        return Remark(
            f"it begins at {lsn_text(layer.start_lsn)}, but the timeline's own history begins "
            f"after its branch point {lsn_text(metadata.ancestor_lsn)}"
        )
    return None


def check_unlisted(layer: LayerRange, metadata: TimelineMetadata) -> Remark:
    """What becomes of a layer that does not count."""
    if layer.end_lsn > metadata.disk_consistent_lsn + 1:
        return Remark(
            f"beyond disk_consistent_lsn {lsn_text(metadata.disk_consistent_lsn)}: the next start "
            "sets it aside, its WAL comes again",
            is_problem=False,
        )
    return Remark("not in the list of layers: the next start removes it", is_problem=False)


def overlapping_groups(layers: Iterable[L]) -> list[list[L]]:
    """The layers that overlap others of their kind in keys and LSNs, in groups that do.

    Where deltas overlap, each has all the changes; images at one LSN, all the keys. Anything else
    than an interrupted compaction or garbage collection leaves few of them.
    """
    by_kind: dict[int, list[L]] = defaultdict(list)
    for layer in layers:
        by_kind[layer.start_lsn if layer.is_image else -1].append(layer)
    groups: list[list[L]] = []
    for same in by_kind.values():
        groups += _connected(same)
    return groups


def _connected(layers: Sequence[L]) -> list[list[L]]:
    """Connected components with more than one layer of the graph of overlaps."""
    ordered = sorted(layers, key=lambda layer: layer.start_lsn)
    leader = list(range(len(ordered)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    active: list[int] = []
    for i, layer in enumerate(ordered):
        active = [j for j in active if ordered[j].end_lsn > layer.start_lsn]
        for j in active:
            other = ordered[j]
            if other.key_start < layer.key_end and layer.key_start < other.key_end:
                leader[find(i)] = find(j)
        active.append(i)
    groups: dict[int, list[L]] = defaultdict(list)
    for i, layer in enumerate(ordered):
        groups[find(i)].append(layer)
    return [group for group in groups.values() if len(group) > 1]
