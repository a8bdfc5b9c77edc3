"""All timelines of this safekeeper: loaded on first use, created by proposers and over HTTP."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safekeeper import control_file, delivery
from safekeeper.consensus import ControlState, PeerInfo
from safekeeper.control_file import ControlFileError
from safekeeper.delivery import DeliveryFileError
from safekeeper.identity import INSTANCE_SIZE
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.remote_wal import RemoteWal
from safekeeper.timeline import Timeline
from safekeeper.timeline_registry import TimelineRegistry
from zenith_utils.durable import fsync_dir
from zenith_utils.ids import IdParseError, TenantId, TenantTimelineId, TimelineId
from zenith_utils.thread_priority import become_background

logger = logging.getLogger(__name__)


class TimelineNotFoundError(Exception):
    """No such timeline on this safekeeper."""


class TimelineExistsError(Exception):
    """The timeline to be created exists already."""


class Timelines:
    """Registry of timelines below a data directory: ``<tenant>/<timeline>/``."""

    def __init__(
        self,
        directory: Path,
        metrics: SafekeeperMetrics,
        *,
        sync: bool,
        instance: bytes = bytes(INSTANCE_SIZE),
        remote: RemoteWal | None = None,
    ) -> None:
        """`instance` is that of the data directory; WAL is offloaded to `remote`, if it is.

        Raises RegistryError, OSError.
        """
        self._directory = directory
        self._metrics = metrics
        self.instance = instance
        self._sync = sync
        self._remote = remote
        self._lock = threading.Lock()
        self._loaded: dict[TenantTimelineId, Timeline] = {}
        self._helper = ThreadPoolExecutor(2, thread_name_prefix="wal-segments")
        self._checker = ThreadPoolExecutor(
            1, thread_name_prefix="check-wal", initializer=become_background
        )
        present = [timeline_id for timeline_id, _ in self.on_disk()]
        self._registry = TimelineRegistry(directory, present, sync=sync)

    def get(self, timeline_id: TenantTimelineId) -> Timeline:
        """The timeline, loaded if need be.

        Raises TimelineNotFoundError, TimelineFailedError, ControlFileError, WalStorageError,
        RegistryError, OSError.
        """
        with self._lock:
            timeline = self._loaded.get(timeline_id)
            if timeline is None or (timeline.failure and not timeline.failed_for_good):
                timeline = self._load(timeline_id, timeline)
            timeline.check_usable()
            return timeline

    def get_or_create(self, timeline_id: TenantTimelineId) -> Timeline:
        """The timeline, created empty if it does not exist."""
        try:
            return self.get(timeline_id)
        except TimelineNotFoundError:
            try:
                return self.create(timeline_id)
            except TimelineExistsError:
                return self.get(timeline_id)

    def create(self, timeline_id: TenantTimelineId, peer_ids: Sequence[int] = ()) -> Timeline:
        """Create an empty timeline durably, on this and some other safekeepers.

        Raises TimelineExistsError, OSError.
        """
        with self._lock:
            directory = self._path(timeline_id)
            known = self._registry.term(timeline_id) is not None
            if known or (directory / control_file.CONTROL_FILE_NAME).exists():
                raise TimelineExistsError(f"timeline {timeline_id} already exists")
            directory.mkdir(parents=True, exist_ok=True)
            peers = tuple((peer, PeerInfo(0, 0, 0, 0)) for peer in peer_ids)
            state = ControlState(*timeline_id, peers=peers)
            control_file.store(directory, state, sync=self._sync)
            if self._sync:
                fsync_dir(directory.parent)
                fsync_dir(self._directory)
            self._registry.note(timeline_id, 0)
            logger.info("created timeline %s", timeline_id)
            return self._load(timeline_id, None)

    def undelivered(self) -> Iterator[tuple[TenantTimelineId, str]]:
        """The timelines on disk with committed WAL that their pageserver may lack, and its address.

        Nothing is loaded: of a timeline that is at rest two small files are read. What cannot be
        read is logged and does not hide the others.
        """
        for timeline_id, directory in self.on_disk():
            try:
                known = delivery.load(directory)
                state = control_file.load(directory / control_file.CONTROL_FILE_NAME)
                if known is not None and state.commit_lsn > known.flush_lsn:
                    yield timeline_id, known.connstr
            except (ControlFileError, DeliveryFileError, OSError) as e:
                logger.error("cannot tell whether WAL is to be delivered: %s", e)

    def on_disk(self) -> Iterator[tuple[TenantTimelineId, Path]]:
        """The timelines that have a directory with a control file, and it; loaded or not."""
        for path in sorted(self._directory.glob(f"*/*/{control_file.CONTROL_FILE_NAME}")):
            try:
                timeline_id = TenantTimelineId(
                    TenantId.parse(path.parent.parent.name), TimelineId.parse(path.parent.name)
                )
            except IdParseError:
                logger.warning("%s is no timeline's directory, ignored", path.parent)
                continue
            yield timeline_id, path.parent

    def delivered(
        self, timeline_id: TenantTimelineId, pageserver: str, flush_lsn: int, remote_lsn: int
    ) -> None:
        """A pageserver has told how far it has a timeline's WAL; see Timeline.delivered()."""
        with self._lock:
            timeline = self._loaded.get(timeline_id)
        if timeline is not None:
            timeline.delivered(pageserver, flush_lsn, remote_lsn)

    def states(self) -> list[ControlState]:
        """The durable state of every timeline; recovering where it cannot be read."""
        loaded = {timeline.id: timeline.acceptor.state for timeline in self.loaded()}
        states = []
        for timeline_id in self._registry.timelines():
            state = loaded.get(timeline_id)
            if state is None:
                try:
                    path = self._path(timeline_id) / control_file.CONTROL_FILE_NAME
                    state = control_file.load(path)
                except (ControlFileError, OSError):
                    state = ControlState(*timeline_id, recovering=True)
            states.append(state)
        return states

    def loaded(self) -> list[Timeline]:
        """The timelines in memory."""
        with self._lock:
            return list(self._loaded.values())

    def save_progress(self, timelines: Iterable[Timeline] | None = None) -> None:
        """Persist commit LSNs that have moved; errors are left to the timelines' next users."""
        for timeline in self.loaded() if timelines is None else timelines:
            try:
                timeline.save_progress()
            except Exception as e:
                logger.error("cannot save the commit LSN of timeline %s: %s", timeline.id, e)

    def _load(self, timeline_id: TenantTimelineId, failed: Timeline | None) -> Timeline:
        if failed is not None:
            failed.close()
            del self._loaded[timeline_id]
        try:
            timeline = Timeline(
                timeline_id,
                self._path(timeline_id),
                self._metrics,
                registry=self._registry,
                instance=self.instance,
                sync=self._sync,
                helper=self._helper,
                remote=self._remote,
            )
        except FileNotFoundError as e:
            raise TimelineNotFoundError(f"timeline {timeline_id} is not on this safekeeper") from e
        self._loaded[timeline_id] = timeline
        self._checker.submit(timeline.check_all_wal)
        return timeline

    def _path(self, timeline_id: TenantTimelineId) -> Path:
        return self._directory / str(timeline_id.tenant_id) / str(timeline_id.timeline_id)
