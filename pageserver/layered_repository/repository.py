"""A repository: the timelines of one tenant."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from pageserver.layered_repository.errors import (
    InvalidBranchLsn,
    LsnNotReadable,
    StoreError,
    TimelineExists,
    TimelineNotFound,
    TimelineStopped,
)
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.page_cache import PageCache
from pageserver.layered_repository.reader import Reconstruct
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import StoreContext, Timeline
from pageserver.layered_repository.timeline_dir import TimelineDir
from zenith_utils.durable import fsync_dir, is_temp_file
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import align8, lsn_text

log = logging.getLogger(__name__)

TIMELINES_DIR = "timelines"


class Repository:
    """Timelines under `<path>/timelines/<id>`; each is loaded when it is first asked for.

    `page_cache` may be shared by repositories (ids of timelines are unique); without one the
    repository has its own of `settings.page_cache_size` bytes.
    """

    def __init__(
        self,
        path: Path,
        tenant_id: TenantId,
        settings: StoreSettings,
        reconstruct: Reconstruct,
        *,
        page_cache: PageCache | None = None,
    ) -> None:
        self.path = path
        self.tenant_id = tenant_id
        cache = PageCache(settings.page_cache_size) if page_cache is None else page_cache
        self._context = StoreContext(settings, reconstruct, cache)
        self._lock = threading.RLock()
        self._timelines: dict[TimelineId, Timeline] = {}
        self._stopped = False
        self._timelines_path = path / TIMELINES_DIR
        if not self._timelines_path.exists():
            self._timelines_path.mkdir(parents=True)
            fsync_dir(path)
            fsync_dir(path.parent)
        for leftover in self._timelines_path.iterdir():
            # A timeline that was being made or deleted when the process ended.
            if is_temp_file(leftover):
                shutil.rmtree(leftover)

    def create_timeline(self, timeline_id: TimelineId, *, initdb_lsn: int) -> Timeline:
        """A new root timeline, empty. It is on disk from its first layer or `persist` on.

        Raises TimelineExists.
        """
        metadata = TimelineMetadata(0, 0, None, 0, initdb_lsn, initdb_lsn)
        with self._lock:
            self._check_free(timeline_id)
            timeline = Timeline(
                self._directory(timeline_id), metadata, self._context, ancestor=None
            )
            self._timelines[timeline_id] = timeline
            return timeline

    def branch_timeline(
        self, timeline_id: TimelineId, *, ancestor_id: TimelineId, start_lsn: int | None = None
    ) -> Timeline:
        """A new timeline that shares the history of another up to `start_lsn`; durable on return.

        `start_lsn` is rounded up to 8 and waited for; None: the ancestor's last record. Raises
        TimelineExists, TimelineNotFound, InvalidBranchLsn, WaitLsnTimeout, OSError.
        """
        with self._lock:
            self._check_free(timeline_id)
            ancestor = self._get(
                ancestor_id, "Cannot branch off the timeline that's not present locally"
            )
        if start_lsn is not None:
            start_lsn = align8(start_lsn)
            ancestor.wait_lsn(start_lsn, self._context.settings.wait_lsn_timeout)
        with self._lock:
            last_lsn, prev_lsn = ancestor.last_record
            start = last_lsn if start_lsn is None else start_lsn
            if start < ancestor.ancestor_lsn:
                raise InvalidBranchLsn(
                    f"invalid start lsn {lsn_text(start)} for ancestor timeline {ancestor_id}: "
                    f"less than timeline ancestor lsn {ancestor.ancestor_lsn}"
                )
            self._check_branch_lsn(ancestor, start)
            metadata = TimelineMetadata(
                disk_consistent_lsn=start,
                prev_record_lsn=prev_lsn if start == last_lsn else 0,
                ancestor_id=ancestor_id,
                ancestor_lsn=start,
                latest_gc_cutoff_lsn=ancestor.latest_gc_cutoff_lsn,
                initdb_lsn=ancestor.initdb_lsn,
            )
            self._check_free(timeline_id)
            ancestor.persist()
            directory = self._directory(timeline_id)
            directory.create(metadata)
            timeline = Timeline(directory, metadata, self._context, ancestor=ancestor)
            self._timelines[timeline_id] = timeline
            return timeline

    @staticmethod
    def _check_branch_lsn(ancestor: Timeline, start: int) -> None:
        cutoff = ancestor.latest_gc_cutoff_lsn
        if start < cutoff:
            cause = LsnNotReadable(
                f"LSN {lsn_text(start)} is earlier than latest GC horizon {cutoff} "
                "(we might've already garbage collected needed data)"
            )
            raise InvalidBranchLsn("invalid branch start lsn") from cause

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        """The timeline, loaded with its ancestors.

        Raises TimelineNotFound, CorruptMetadataError, OSError.
        """
        timeline = self._timelines.get(timeline_id)
        if timeline is not None:
            return timeline
        with self._lock:
            return self._get(timeline_id, f"timeline {timeline_id} is not in the repository")

    def is_loaded(self, timeline_id: TimelineId) -> bool:
        """Whether the timeline is in memory."""
        return timeline_id in self._timelines

    def read_metadata(self, timeline_id: TimelineId) -> TimelineMetadata:
        """The metadata on disk of a timeline, without loading it.

        Raises TimelineNotFound, CorruptMetadataError, OSError.
        """
        directory = self._directory(timeline_id)
        if not directory.exists():
            raise TimelineNotFound(f"timeline {timeline_id} is not in the repository")
        return directory.read_metadata()

    def timelines(self) -> list[TimelineId]:
        """The ids of all timelines, ascending, loaded or not."""
        with self._lock:
            found = set(self._timelines)
            for path in self._timelines_path.iterdir():
                if is_temp_file(path):
                    continue
                try:
                    found.add(TimelineId.parse(path.name))
                except IdParseError:
                    log.warning("%s: not a timeline, ignored", path)
            return sorted(found)

    def detach_timeline(self, timeline_id: TimelineId) -> None:
        """Forget a timeline and delete its local files; unflushed data is dropped.

        Raises TimelineNotFound, and StoreError while a branch of it is here.
        """
        with self._lock:
            timeline = self._timelines.get(timeline_id)
            directory = self._directory(timeline_id)
            if timeline is None and not directory.exists():
                raise TimelineNotFound(f"timeline {timeline_id} is not in the repository")
            for other in self.timelines():
                if other != timeline_id and self._ancestor_id(other) == timeline_id:
                    raise StoreError(
                        f"timeline {timeline_id} is the ancestor of {other}: detach that one first"
                    )
            if timeline is not None:
                timeline.shutdown(flush=False)
                del self._timelines[timeline_id]
            directory.remove()

    def _ancestor_id(self, timeline_id: TimelineId) -> TimelineId | None:
        loaded = self._timelines.get(timeline_id)
        return loaded.ancestor_id if loaded else self.read_metadata(timeline_id).ancestor_id

    def shutdown(self, *, flush: bool) -> None:
        """Stop all timelines, with `flush` after making everything ingested durable.

        Every timeline is stopped even if one cannot be flushed; the first error is then raised.
        """
        with self._lock:
            self._stopped = True
            timelines = list(self._timelines.values())
        errors: list[Exception] = []
        for timeline in timelines:
            try:
                timeline.shutdown(flush=flush)
            except Exception as error:
                log.exception("timeline %s: could not be flushed", timeline.timeline_id)
                errors.append(error)
        if errors:
            raise errors[0]

    def _directory(self, timeline_id: TimelineId) -> TimelineDir:
        return TimelineDir(self._timelines_path / str(timeline_id), self.tenant_id, timeline_id)

    def _check_free(self, timeline_id: TimelineId) -> None:
        if self._stopped:
            raise TimelineStopped(f"{self.path}: the repository was shut down")
        if timeline_id in self._timelines or self._directory(timeline_id).exists():
            raise TimelineExists(f"timeline {timeline_id} already exists")

    def _get(self, timeline_id: TimelineId, missing: str) -> Timeline:
        """With the lock: the timeline, loaded after its ancestors; `missing` if it is not here."""
        if self._stopped and timeline_id not in self._timelines:
            raise TimelineStopped(f"{self.path}: the repository was shut down")
        to_load: list[tuple[TimelineDir, TimelineMetadata]] = []
        wanted: TimelineId | None = timeline_id
        while wanted is not None and wanted not in self._timelines:
            directory = self._directory(wanted)
            if not directory.exists():
                raise TimelineNotFound(missing)
            metadata = directory.read_metadata()
            to_load.append((directory, metadata))
            missing = f"timeline {metadata.ancestor_id}, the ancestor of {wanted}, is missing"
            wanted = metadata.ancestor_id
        for directory, metadata in reversed(to_load):
            ancestor_id = metadata.ancestor_id
            self._timelines[directory.timeline_id] = Timeline(
                directory,
                metadata,
                self._context,
                ancestor=None if ancestor_id is None else self._timelines[ancestor_id],
                layers=directory.load_layers(metadata.disk_consistent_lsn),
            )
        return self._timelines[timeline_id]
