"""A repository: the timelines of one tenant."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pageserver.layered_repository.branch_index import BranchIndex, BranchPoint
from pageserver.layered_repository.ephemeral_file import EPHEMERAL_PREFIX
from pageserver.layered_repository.errors import (
    InvalidBranchLsn,
    LsnNotReadable,
    TimelineExists,
    TimelineNotFound,
    TimelineStopped,
)
from pageserver.layered_repository.gc_plan import GcResult
from pageserver.layered_repository.metadata import TimelineMetadata
from pageserver.layered_repository.reader import Reconstruct
from pageserver.layered_repository.resources import StoreContext, StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.layered_repository.timeline_dir import TimelineDir
from zenith_utils.durable import is_temp_file
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import align8, lsn_text

log = logging.getLogger(__name__)

TIMELINES_DIR = "timelines"


class Repository:
    """Timelines under `<path>/timelines/<id>`; each is loaded when it is first asked for.

    `resources` are shared with other repositories (ids of timelines are unique); without them the
    repository has its own. `durable`: the caller has made sure that a crash does not undo the
    creation of `path`, nor of the directory for timelines in it if that is there. All methods are
    thread safe.
    """

    def __init__(
        self,
        path: Path,
        tenant_id: TenantId,
        settings: StoreSettings,
        reconstruct: Reconstruct,
        *,
        resources: StoreResources | None = None,
        durable: bool = False,
    ) -> None:
        self.path = path
        self.tenant_id = tenant_id
        self.resources = resources or StoreResources.own(settings)
        self._files = self.resources.files
        self._lock = threading.Lock()
        self._load_lock = threading.Lock()
        self._timelines: dict[TimelineId, Timeline] = {}
        self._reserved: set[TimelineId] = set()
        self._stopped = False
        self._timelines_path = path / TIMELINES_DIR
        self._make_directory(durable)
        self._remove_leftovers()
        self._branches = BranchIndex(self._ids_on_disk(), self.read_metadata)
        self._context = StoreContext(
            settings, reconstruct, self.resources, path, self._branches.branch_points
        )

    @property
    def settings(self) -> StoreSettings:
        """The settings in force. New ones count from the next decision of each timeline on."""
        return self._context.settings

    @settings.setter
    def settings(self, settings: StoreSettings) -> None:
        self._context.settings = settings

    # ---- timelines come to be

    def create_timeline(self, timeline_id: TimelineId, *, initdb_lsn: int) -> Timeline:
        """A new root timeline, empty. It is on disk from its first layer or `persist` on.

        Raises TimelineExists.
        """
        metadata = TimelineMetadata(0, 0, None, 0, initdb_lsn, initdb_lsn)
        with self._reserve(timeline_id):
            self._branches.add(timeline_id, BranchPoint(None, 0))
            timeline = Timeline(
                self._directory(timeline_id), metadata, self._context, ancestor=None
            )
            self._publish(timeline)
            return timeline

    def branch_timeline(
        self, timeline_id: TimelineId, *, ancestor_id: TimelineId, start_lsn: int | None = None
    ) -> Timeline:
        """A new timeline that shares the history of another up to `start_lsn`; durable on return.

        `start_lsn` is rounded up to 8 and waited for; None: the ancestor's last record. Raises
        TimelineExists, TimelineNotFound, InvalidBranchLsn, WaitLsnTimeout, OSError.
        """
        with self._reserve(timeline_id):
            ancestor = self._load(
                ancestor_id, "Cannot branch off the timeline that's not present locally"
            )
            if start_lsn is not None:
                start_lsn = align8(start_lsn)
                ancestor.wait_lsn(start_lsn, self.settings.wait_lsn_timeout)
            metadata = self._register_branch(timeline_id, ancestor, start_lsn)
            directory = self._directory(timeline_id)
            try:
                ancestor.persist()
                directory.create(metadata)
            except BaseException:
                # If it is there in spite of the error, so is its claim on the ancestor's history.
                if not directory.exists():
                    self._branches.discard(timeline_id)
                raise
            timeline = Timeline(directory, metadata, self._context, ancestor=ancestor)
            self._publish(timeline)
            return timeline

    def _register_branch(
        self, timeline_id: TimelineId, ancestor: Timeline, start_lsn: int | None
    ) -> TimelineMetadata:
        """Claim the ancestor's state at the branch point; the metadata of the branch.

        The cutoff does not move in between, so a garbage collection with a higher one sees the
        claim: it asks for branch points after it has published its cutoff.
        """
        with ancestor.cutoff_held() as cutoff:
            last_lsn, prev_lsn = ancestor.last_record
            start = last_lsn if start_lsn is None else start_lsn
            if start < ancestor.ancestor_lsn:
                raise InvalidBranchLsn(
                    f"invalid start lsn {lsn_text(start)} for ancestor timeline "
                    f"{ancestor.timeline_id}: "
                    f"less than timeline ancestor lsn {ancestor.ancestor_lsn}"
                )
            if start < cutoff:
                cause = LsnNotReadable(
                    f"LSN {lsn_text(start)} is earlier than latest GC horizon {cutoff} "
                    "(we might've already garbage collected needed data)"
                )
                raise InvalidBranchLsn("invalid branch start lsn") from cause
            self._branches.add(timeline_id, BranchPoint(ancestor.timeline_id, start))
        return TimelineMetadata(
            disk_consistent_lsn=start,
            prev_record_lsn=prev_lsn if start == last_lsn else 0,
            ancestor_id=ancestor.timeline_id,
            ancestor_lsn=start,
            latest_gc_cutoff_lsn=cutoff,
            initdb_lsn=ancestor.initdb_lsn,
        )

    @contextmanager
    def _reserve(self, timeline_id: TimelineId) -> Iterator[None]:
        """Keeps others from making or deleting a timeline of that id, which must be free."""
        with self._lock:
            self._check_running()
            if (
                timeline_id in self._timelines
                or timeline_id in self._reserved
                or self._directory(timeline_id).exists()
            ):
                raise TimelineExists(f"timeline {timeline_id} already exists")
            self._reserved.add(timeline_id)
        try:
            yield
        finally:
            with self._lock:
                self._reserved.discard(timeline_id)

    def _publish(self, timeline: Timeline) -> None:
        with self._lock:
            self._check_running()
            self._timelines[timeline.timeline_id] = timeline

    # ---- timelines are found

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        """The timeline, loaded with its ancestors.

        Raises TimelineNotFound, CorruptMetadataError, FormatVersionError, OSError.
        """
        return self._load(timeline_id, f"timeline {timeline_id} is not in the repository")

    def is_loaded(self, timeline_id: TimelineId) -> bool:
        """Whether the timeline is in memory."""
        return timeline_id in self._timelines

    def read_metadata(self, timeline_id: TimelineId) -> TimelineMetadata:
        """The metadata on disk of a timeline, without loading it.

        Raises TimelineNotFound, CorruptMetadataError, FormatVersionError, OSError.
        """
        directory = self._directory(timeline_id)
        try:
            return directory.read_metadata()
        except FileNotFoundError:
            if directory.exists():
                raise
            raise TimelineNotFound(f"timeline {timeline_id} is not in the repository") from None

    def timelines(self) -> list[TimelineId]:
        """The ids of all timelines, ascending, loaded or not."""
        on_disk = self._ids_on_disk()
        with self._lock:
            return sorted({*on_disk, *self._timelines})

    def _load(self, timeline_id: TimelineId, missing: str) -> Timeline:
        """The timeline, loaded after its ancestors; `missing` if it is not here."""
        timeline = self._timelines.get(timeline_id)
        if timeline is not None:
            return timeline
        with self._load_lock:
            to_load: list[tuple[TimelineDir, TimelineMetadata]] = []
            wanted: TimelineId | None = timeline_id
            while wanted is not None and wanted not in self._timelines:
                self._check_running()
                directory = self._directory(wanted)
                if wanted in self._reserved or not directory.exists():
                    raise TimelineNotFound(missing)
                metadata = directory.read_metadata()
                to_load.append((directory, metadata))
                missing = f"timeline {metadata.ancestor_id}, the ancestor of {wanted}, is missing"
                wanted = metadata.ancestor_id
            # In this order every timeline finds its ancestor.
            for directory, metadata in reversed(to_load):
                self._load_one(directory, metadata)
            return self._timelines[timeline_id]

    def _load_one(self, directory: TimelineDir, metadata: TimelineMetadata) -> None:
        ancestor_id = metadata.ancestor_id
        self._branches.add(directory.timeline_id, BranchPoint(ancestor_id, metadata.ancestor_lsn))
        self._publish(
            Timeline(
                directory,
                metadata,
                self._context,
                ancestor=None if ancestor_id is None else self._timelines[ancestor_id],
                layers=directory.load_layers(metadata),
            )
        )

    # ---- garbage collection

    def gc(self, timeline_id: TimelineId, *, choose_cutoff: Callable[[Timeline], int]) -> GcResult:
        """Forget what lies below a cutoff and no branch, whether loaded or not, begins with.

        `choose_cutoff` must not pass what the caller has promised to others; it may publish its
        choice itself by `Timeline.publish_gc_cutoff`, under the lock that its promises are made
        under. Branching waits for nothing but the publication. Raises what Timeline.gc raises,
        TimelineNotFound.
        """
        timeline = self.timeline(timeline_id)
        return timeline.gc(choose_cutoff(timeline))

    # ---- timelines end

    def detach_timeline(self, timeline_id: TimelineId) -> None:
        """Forget a timeline and delete its local files; unflushed data is dropped.

        Readers that are in it get TimelineStopped. Raises TimelineNotFound, StoreError while a
        branch of it is here, OSError.
        """
        directory = self._directory(timeline_id)
        with self._load_lock, self._lock:
            if timeline_id in self._reserved or not (
                timeline_id in self._timelines or directory.exists() or directory.is_half_removed()
            ):
                raise TimelineNotFound(f"timeline {timeline_id} is not in the repository")
            # From here on no branch can begin on it, and it cannot be loaded.
            self._branches.begin_removal(timeline_id)
            self._reserved.add(timeline_id)
            timeline = self._timelines.pop(timeline_id, None)
        removed = False
        try:
            if timeline is not None:
                timeline.detach()
            directory.remove()
            removed = True
        finally:
            # Unless it is durably gone a crash may bring it back: then it needs its branch point.
            ancestor_id = self._branches.end_removal(timeline_id, removed=removed)
            with self._lock:
                self._reserved.discard(timeline_id)
        ancestor = None if ancestor_id is None else self._timelines.get(ancestor_id)
        if ancestor is not None:
            ancestor.branches_changed()

    def shutdown(self, *, flush: bool) -> None:
        """Stop all timelines, with `flush` after making everything ingested durable.

        Every timeline is stopped even if one cannot be flushed; the first error is then raised.
        """
        with self._lock:
            self._stopped = True
            timelines = list(self._timelines.values())
        for timeline in timelines:
            timeline.maintenance.stop()
        errors: list[Exception] = []
        for timeline in timelines:
            try:
                timeline.shutdown(flush=flush)
            except Exception as error:
                log.exception("timeline %s: could not be flushed", timeline.timeline_id)
                errors.append(error)
        if errors:
            raise errors[0]

    # ---- directories

    def _directory(self, timeline_id: TimelineId) -> TimelineDir:
        return TimelineDir(
            self._timelines_path / str(timeline_id),
            self.tenant_id,
            timeline_id,
            self._files,
            self.resources.descriptors,
            self.resources.count_io,
        )

    def _make_directory(self, durable: bool) -> None:
        """Durably, with the parents that are missing.

        What is there may be the work of a process that was killed before it could sync it: a
        timeline that was made, or taken away. Nothing may depend on that before it is durable. Of
        the directories above the caller may know that they are.
        """
        missing = []
        path = self._timelines_path
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            self._files.mkdir(path)
            self._files.fsync_dir(path.parent)
        above = () if durable else (self.path.parent, self.path)
        for path in (*above, self._timelines_path):
            self._files.fsync_dir(path)

    def _remove_leftovers(self) -> None:
        """Delete what the end of the last process left."""
        for path in self._timelines_path.iterdir():
            if is_temp_file(path):  # a timeline that was being made or deleted
                self._files.rmtree(path)
            elif _timeline_id(path.name) is None:
                log.warning("%s: not a timeline, ignored", path)
        for path in self.path.glob(f"{EPHEMERAL_PREFIX}*"):
            self._files.unlink(path)

    def _ids_on_disk(self) -> list[TimelineId]:
        with os.scandir(self._timelines_path) as entries:
            found = (_timeline_id(entry.name) for entry in entries)
            return [timeline_id for timeline_id in found if timeline_id is not None]

    def _check_running(self) -> None:
        if self._stopped:
            raise TimelineStopped(f"{self.path}: the repository was shut down")


def _timeline_id(name: str) -> TimelineId | None:
    try:
        return TimelineId.parse(name)
    except IdParseError:
        return None
