"""What metadata and the names of layers alone prove to be wrong with a timeline.

Pure: no I/O. What the names prove is less than one may wish, because of how layers come to be:

- A flush writes no delta for WAL that changed no key, so between two deltas there may be LSNs that
  none covers. A merge gives each new delta the range of the keys that it holds, so there may be
  keys that no delta covers at some LSN. A hole in the coverage is therefore not proof that a layer
  is missing, and nothing can be said of a hole at some keys. LSNs that no delta covers at any key
  are worth a note, as such WAL is rare.
- Garbage collection takes the layers below images, and a tombstone (an empty image) with nothing
  below it: that a key range has no image does not prove that one is missing. But every timeline
  that was imported keeps at least one image.

What is missing shows when values are read that were built on it: see verify_reads.py.
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
    """Whether a layer lies within the LSNs of its timeline."""
    if layer.end_lsn > metadata.disk_consistent_lsn + 1:
        return Remark(
            f"beyond disk_consistent_lsn {lsn_text(metadata.disk_consistent_lsn)}: the next start "
            "sets it aside, its WAL comes again",
            is_problem=False,
        )
    if layer.start_lsn <= metadata.ancestor_lsn:
        return Remark(
            f"it begins at {lsn_text(layer.start_lsn)}, but the timeline's own history begins "
            f"after its branch point {lsn_text(metadata.ancestor_lsn)}"
        )
    return None


def check_layers(
    layers: Iterable[LayerRange], metadata: TimelineMetadata, tombstones: Iterable[int] = ()
) -> list[Remark]:
    """Whether the layers that count, those check_layer() says nothing of, are a whole history.

    `tombstones` are the LSNs of images that may be tombstones.
    """
    layers = list(layers)
    deltas = [layer for layer in layers if not layer.is_image]
    remarks = []
    # A timeline without an import is written from its first LSN on.
    imported = min((delta.start_lsn for delta in deltas), default=0) != 1
    if (
        metadata.ancestor_id is None
        and metadata.disk_consistent_lsn
        and imported
        and len(deltas) == len(layers)
    ):
        remarks.append(
            Remark(
                f"there is no image layer: that of the import at {lsn_text(metadata.initdb_lsn)}, "
                "or those that took its place, are missing"
            )
        )
    for first, end in uncovered_lsns(layers, metadata, tombstones):
        remarks.append(
            Remark(
                f"no delta layer has LSNs {lsn_text(first)} to {lsn_text(end)}: unless the WAL "
                "there changed no key, one is missing",
                is_problem=False,
            )
        )
    return remarks


def uncovered_lsns(
    layers: Iterable[LayerRange], metadata: TimelineMetadata, tombstones: Iterable[int] = ()
) -> list[tuple[int, int]]:
    """The ranges [first, end) of LSNs that no delta covers, in the part that is never collected.

    That is all above the newest image at or below the GC cutoff; without one, all since the import
    or the branch point. A range with a tombstone is none: a flush may have had nothing else.
    """
    layers = list(layers)
    cutoff = max(metadata.latest_gc_cutoff_lsn, metadata.initdb_lsn)
    images = [layer.start_lsn for layer in layers if layer.is_image and layer.start_lsn <= cutoff]
    at = max([metadata.ancestor_lsn, *images]) + 1
    found = []
    for delta in sorted((x for x in layers if not x.is_image), key=lambda x: x.start_lsn):
        if delta.start_lsn > at:
            found.append((at, delta.start_lsn))
        at = max(at, delta.end_lsn)
    if at <= metadata.disk_consistent_lsn:
        found.append((at, metadata.disk_consistent_lsn + 1))
    deleted = set(tombstones)
    return [(at, end) for at, end in found if not any(at <= lsn < end for lsn in deleted)]


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
