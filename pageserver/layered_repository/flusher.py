"""Writes frozen layers to disk, on demand and in the background."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from pageserver.failpoints import BEFORE_SAVING_METADATA
from pageserver.layered_repository.errors import TimelineStopped
from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.metadata import TimelineMetadata
from zenith_utils.thread_priority import start_in_foreground

if TYPE_CHECKING:
    from pageserver.layered_repository.timeline import Timeline

log = logging.getLogger(__name__)


class LayerFlusher:
    """Flushes the frozen layers of one timeline, oldest first.

    A thread exists only while there is something to flush. It tries again after an error, so that
    work resumes by itself when, for instance, the disk has room again.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._flush_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def wake(self) -> None:
        """Have the frozen layers flushed in the background."""
        with self._state_lock:
            idle = self._thread is None and not self._stopping.is_set()
            if idle and self._timeline.layer_set.oldest_frozen() is not None:
                self._thread = threading.Thread(
                    target=self._run, name=f"flush {self._timeline.timeline_id}", daemon=True
                )
                start_in_foreground(self._thread)

    def flush(self) -> None:
        """Flush everything frozen before the call, in this thread.

        Raises OSError, TimelineStopped.
        """
        frozen = self._timeline.view.frozen
        end_lsn = frozen[0].end_lsn if frozen else 0
        with self._flush_lock:
            while True:
                layer = self._timeline.layer_set.oldest_frozen()
                if layer is None or layer.end_lsn > end_lsn:
                    return
                if self._stopping.is_set():
                    raise TimelineStopped(f"timeline {self._timeline.timeline_id} was shut down")
                try:
                    with self._timeline.context.resources.measure("layer flush", self._timeline):
                        self._flush_layer(layer)
                except BaseException:
                    self._timeline.context.resources.memory.flush_failed(self._timeline)
                    raise

    def join(self) -> None:
        """Stop after the layer in progress and wait for the thread and for callers of `flush`."""
        self._stopping.set()
        with self._flush_lock:
            pass
        with self._state_lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _flush_layer(self, layer: InMemoryLayer) -> None:
        """Write the oldest frozen layer: its files, list of layers and metadata, readers' view.

        A crash in between leaves files beyond disk_consistent_lsn, which the next start sets aside.
        The layers and the LSN count in one step: once it is done the WAL need not come again.
        """
        timeline = self._timeline
        timeline.persist()
        timeline.metadata.settle()
        files = timeline.directory.write_frozen(layer)

        def made_durable(metadata: TimelineMetadata) -> TimelineMetadata:
            if BEFORE_SAVING_METADATA.active:
                BEFORE_SAVING_METADATA.hit()
            return replace(
                metadata,
                disk_consistent_lsn=layer.end_lsn - 1,
                prev_record_lsn=layer.prev_record_lsn,
                latest_gc_cutoff_lsn=timeline.latest_gc_cutoff_lsn,
            )

        timeline.metadata.commit(made_durable, add=files, flushed=True)
        timeline.context.resources.memory.flushed(timeline, layer.memory_size)

    def _run(self) -> None:
        while True:
            try:
                self.flush()
            except TimelineStopped:
                log.debug("timeline %s: stopped before its flush", self._timeline.timeline_id)
            except Exception:
                log.exception(
                    "timeline %s: could not flush a layer, trying again in %s s",
                    self._timeline.timeline_id,
                    self._timeline.settings.flush_retry_interval,
                )
                self._stopping.wait(self._timeline.settings.flush_retry_interval)
            with self._state_lock:
                # Whoever freezes a layer after this look finds no thread and starts one.
                if self._stopping.is_set() or self._timeline.layer_set.oldest_frozen() is None:
                    self._thread = None
                    return
