"""Writes frozen layers to disk, on demand and in the background."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from pageserver.layered_repository.errors import TimelineStopped

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
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(
                    target=self._run, name=f"flush {self._timeline.timeline_id}", daemon=True
                )
                self._thread.start()

    def flush(self) -> None:
        """Flush everything frozen before the call, in this thread.

        Raises OSError, TimelineStopped.
        """
        with self._flush_lock:
            while (layer := self._timeline.oldest_frozen()) is not None:
                if self._stopping.is_set():
                    raise TimelineStopped(f"timeline {self._timeline.timeline_id} was shut down")
                self._timeline.flush_layer(layer)

    def join(self) -> None:
        """Stop after the layer in progress and wait for the thread and for callers of `flush`."""
        self._stopping.set()
        with self._flush_lock:
            pass
        with self._state_lock:
            thread = self._thread
        if thread is not None:
            thread.join()

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
                if self._stopping.is_set() or self._timeline.oldest_frozen() is None:
                    self._thread = None
                    return
