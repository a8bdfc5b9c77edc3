"""Executes the compaction of a timeline: merges of L0 deltas, then image layers, then splits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pageserver.layered_repository.collector import raise_cutoff
from pageserver.layered_repository.compaction_plan import (
    Split,
    garbage_images_due,
    images_due,
    l0_to_compact,
    splits_due,
)
from pageserver.layered_repository.errors import LsnNotReadable, TimelineStopped
from pageserver.layered_repository.image_writer import write_image
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_merge import FinishedFile, merge_layers
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.layer_split import split_layer
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.metadata_keeper import Change, unchanged
from pageserver.layered_repository.partitioning import Part, Partitioning, partition
from pageserver.layered_repository.timeline_dir import FinishedLayer

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline

log = logging.getLogger(__name__)

Keyspace = Callable[[int], Sequence[tuple[bytes, bytes]]]
"""The ranges [start, end) that hold every key that exists at an LSN."""

_MAX_BACKOFF: Final = 64


@dataclass(frozen=True, slots=True)
class CompactionResult:
    """What a round did: L0 deltas merged, files made of them, image layers made, deltas split.

    done: nothing is left to do until something changes. Not so after a round that did something,
    which may make more work, or could not take place, or came while WAL was coming in.
    """

    l0_merged: int = 0
    deltas_written: int = 0
    images_written: int = 0
    deltas_split: int = 0
    done: bool = True


class Compactor:
    """Compacts one timeline; see Timeline.compact."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._backoff = Backoff()
        self._seen: tuple[object, ...] | None = None
        """What the last round found when it had nothing left to do."""
        self._last_record_lsn = 0
        self._partitioning: Partitioning | None = None
        """That of the GC cutoff."""

    def run(self, keyspace: Keyspace, *, force: bool) -> CompactionResult:
        """One round."""
        with self._timeline.maintenance.turn(wait=force) as granted:
            if not granted or (not force and self._backoff.active()):
                return CompactionResult(done=False)
            quiet = force or self._quiet()
            state = self._state(quiet)
            if not force and state == self._seen:
                return CompactionResult()
            self._seen = None
            try:
                result = self._round(keyspace, force=force, quiet=quiet)
            except TimelineStopped:
                raise
            except Exception:
                self._backoff.fail(self._timeline.settings.compaction_retry_interval)
                raise
            self._backoff.succeed()
            if result.done:
                self._seen = state
            return result

    def look_again(self) -> None:
        """Something has changed that a round does not see by itself."""
        self._seen = None

    def _quiet(self) -> bool:
        """Whether no WAL came since the last look and everything is on disk."""
        timeline = self._timeline
        last = timeline.last_record_lsn
        quiet = last == self._last_record_lsn == timeline.disk_consistent_lsn
        self._last_record_lsn = last
        return quiet

    def _state(self, quiet: bool) -> tuple[object, ...]:
        """All that decides what there is to do."""
        timeline = self._timeline
        return (
            timeline.view.layers,
            timeline.latest_gc_cutoff_lsn,
            self._held_below_cutoff(),
            timeline.settings,
            quiet,
            self._ancestors_are_back(),
        )

    def _held_below_cutoff(self) -> frozenset[int]:
        """Where somebody still reads below the cutoff: garbage when he ends."""
        timeline = self._timeline
        # A copy made in one step: threads add and remove entries meanwhile.
        pins = list(timeline.pins.values())
        return frozenset(lsn for lsn in pins if lsn < timeline.latest_gc_cutoff_lsn)

    def _round(self, keyspace: Keyspace, *, force: bool, quiet: bool) -> CompactionResult:
        merged, deltas = self._merge_l0(force=force, quiet=quiet)
        images = self._make_images(keyspace, quiet=quiet)
        split = self._split_deltas(quiet=quiet)
        # Once the timeline is at rest more is worth doing.
        done = quiet and not (merged or images or split)
        return CompactionResult(merged, deltas, images, split, done)

    # ---- L0 to L1

    def _merge_l0(self, *, force: bool, quiet: bool) -> tuple[int, int]:
        """Merge the L0 deltas there are now, if enough; how many, into how many files."""
        timeline = self._timeline
        end_lsn = timeline.disk_consistent_lsn
        merged = written = 0
        while True:
            inputs = l0_to_compact(
                timeline.view.layers,
                threshold=timeline.settings.compaction_threshold,
                cutoff=timeline.latest_gc_cutoff_lsn,
                force=force,
                quiet=quiet,
            )
            # What is flushed meanwhile is for the next round, or this one would never end.
            if not inputs or inputs[0].start_lsn > end_lsn:
                return merged, written
            with timeline.context.resources.measure("compact", timeline):
                written += self._merge(inputs)
            merged += len(inputs)

    def _merge(self, inputs: Sequence[LayerFile]) -> int:
        """Put what is in some L0 deltas into new files; how many."""
        timeline = self._timeline
        merged = merge_layers(
            inputs,
            self._new_writer,
            target_size=timeline.settings.target_size,
            start_lsn=min(layer.start_lsn for layer in inputs),
            end_lsn=max(layer.end_lsn for layer in inputs),
            stop=lambda: timeline.maintenance.stopping,
        )
        self._replace(inputs, merged)
        return len(merged)

    # ---- splits

    def _split_deltas(self, *, quiet: bool) -> int:
        """Write deltas anew without the garbage inside them; how many."""
        timeline = self._timeline
        # First the cutoff, then the points: what is retained later is at or above this cutoff.
        cutoff = timeline.latest_gc_cutoff_lsn
        layers = timeline.view.layers
        if not any(layer.start_lsn < cutoff and not layer.is_image for layer in layers):
            return 0
        points = timeline.retain_points()
        due = splits_due(layers, cutoff=cutoff, points=points, quiet=quiet)
        for split in due:
            timeline.maintenance.check_not_stopping()
            with timeline.context.resources.measure("compact", timeline):
                self._split(split, cutoff)
        return len(due)

    def _split(self, split: Split[LayerFile], cutoff: int) -> None:
        timeline = self._timeline
        pieces = split_layer(
            split.layer, split.keep, self._new_writer, stop=lambda: timeline.maintenance.stopping
        )
        self._replace([split.layer], pieces, raise_cutoff(cutoff))

    # ---- files

    def _replace(
        self,
        layers: Sequence[LayerFile],
        files: Sequence[tuple[FinishedFile, LayerName]],
        change: Change = unchanged,
    ) -> None:
        finished = [FinishedLayer(file.path, file.size, name) for file, name in files]
        self._install(finished, layers, change)

    def _install(
        self,
        finished: Sequence[FinishedLayer],
        remove: Sequence[LayerFile],
        change: Change = unchanged,
    ) -> None:
        """Put new layers in place of others: names, list of layers, readers' view, deletions."""
        directory, maintenance = self._timeline.directory, self._timeline.maintenance
        names = {layer.name for layer in self._timeline.view.layers}
        # A layer of the same name has the same content.
        directory.discard(file for file in finished if file.name in names)
        added = maintenance.install([file for file in finished if file.name not in names])
        kept = {file.name for file in finished}
        gone = [layer for layer in remove if layer.name not in kept]
        maintenance.replace_layers(added, gone, change)

    def _new_writer(self) -> LayerWriter:
        return self._timeline.directory.new_writer(compress=self._timeline.settings.compress_layers)

    # ---- images

    def _make_images(self, keyspace: Keyspace, *, quiet: bool) -> int:
        """Images where reads need or garbage is worth them; how many."""
        images = 0
        try:
            # While the cutoff stands still an image there stays, and serves reads too: where it is
            # worth making, one at the last LSN is often not needed. A cutoff that moves on takes
            # along what is below it by means of the images made for reads.
            if quiet:
                images += self._image_garbage(keyspace, quiet=True)
            images += self._image_deep_parts(keyspace)
            if not quiet:
                images += self._image_garbage(keyspace, quiet=False)
        except LsnNotReadable as error:
            # The cutoff was moved on meanwhile; the next round works with the new one.
            log.debug("timeline %s: no images: %s", self._timeline.timeline_id, error)
        return images

    def _image_deep_parts(self, keyspace: Keyspace) -> int:
        """Images where reads go through many deltas, at the last LSN on disk."""
        timeline = self._timeline
        lsn = timeline.disk_consistent_lsn
        threshold = timeline.settings.image_creation_threshold
        everything = Partitioning(lsn, (Part(MIN_KEY, MAX_KEY, (), 0),))
        # Asked about the whole key space first: the keyspace is not for free.
        if not self._can_image_at(lsn) or not images_due(
            timeline.view.layers, everything, threshold=threshold
        ):
            return 0
        with timeline.pin(lsn):
            partitioning = self._partition(keyspace, lsn)
            due = images_due(timeline.view.layers, partitioning, threshold=threshold)
            return self._write_images(due, lsn)

    def _image_garbage(self, keyspace: Keyspace, *, quiet: bool) -> int:
        """Images at the GC cutoff where they set much free."""
        timeline = self._timeline
        lsn = timeline.latest_gc_cutoff_lsn
        if not self._can_image_at(lsn) or not any(
            layer.start_lsn < lsn for layer in timeline.view.layers
        ):
            return 0
        with timeline.pin(lsn):
            partitioning = self._partitioning
            if partitioning is None or partitioning.lsn != lsn:
                partitioning = self._partitioning = self._partition(keyspace, lsn)
            due = garbage_images_due(
                timeline.view.layers,
                partitioning,
                cutoff=lsn,
                points=timeline.retain_points(),
                quiet=quiet,
                image_keys=timeline.maintenance.count_entries,
            )
            return self._write_images(due, lsn)

    def _can_image_at(self, lsn: int) -> bool:
        """Whether an image would be durable, be read, and can be made without waiting for WAL."""
        timeline = self._timeline
        return timeline.ancestor_lsn < lsn <= timeline.disk_consistent_lsn and (
            self._ancestors_are_back()
        )

    def _ancestors_are_back(self) -> bool:
        """Whether all ancestors have, after a restart, got the WAL up to the branch points."""
        timeline = self._timeline
        while timeline.ancestor is not None:
            if timeline.ancestor.last_record_lsn < timeline.ancestor_lsn:
                return False
            timeline = timeline.ancestor
        return True

    def _partition(self, keyspace: Keyspace, lsn: int) -> Partitioning:
        return partition(keyspace(lsn), lsn, max_keys=self._timeline.settings.image_part_keys)

    def _write_images(self, parts: Sequence[Part], lsn: int) -> int:
        """An image of each part, in place one by one: each helps at once, and none is lost."""
        timeline = self._timeline
        for part in parts:
            timeline.maintenance.check_not_stopping()
            with timeline.context.resources.measure("create images", timeline):
                self._write_image(part, lsn)
        return len(parts)

    def _write_image(self, part: Part, lsn: int) -> None:
        timeline = self._timeline
        writer = self._new_writer()
        name = write_image(
            lambda keys: timeline.get_vectored(keys, lsn, cache=False),
            part,
            lsn,
            writer,
            lambda: timeline.maintenance.stopping,
        )
        self._install([FinishedLayer.of(writer, name)], ())


class Backoff:
    """After failures, for how long not to try again."""

    __slots__ = ("_factor", "_until")

    def __init__(self) -> None:
        self._factor = 1
        self._until = 0.0

    def active(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() < self._until

    def fail(self, interval: float) -> float:
        """Note a failure; the seconds to wait."""
        seconds = interval * self._factor
        self._until = time.monotonic() + seconds
        self._factor = min(2 * self._factor, _MAX_BACKOFF)
        return seconds

    def succeed(self) -> None:
        """Note a success."""
        self._factor = 1
        self._until = 0.0
