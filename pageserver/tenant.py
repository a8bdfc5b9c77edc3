"""One tenant: its settings, its repository, its timelines in use.

``tenants/<tenant>/timelines/<timeline>/`` holds a timeline's layers and metadata,
``tenants/<tenant>/leases/<timeline>`` the leases on it, ``tenants/<tenant>/config`` what settings
the tenant has of its own. Timelines are loaded when first used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pageserver.checkpointer import Checkpointer
from pageserver.config import PageServerConf
from pageserver.layered_repository.errors import (
    InvalidBranchLsn,
    TimelineExists,
    TimelineNotFound,
    WaitLsnTimeout,
)
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.resources import StoreResources
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.lazy_reconstruct import LazyReconstruct, redo_directory
from pageserver.lease_file import LeaseFile
from pageserver.metrics import PageserverMetrics
from pageserver.tenant_config import (
    TENANT_CONFIG_FILE,
    Overrides,
    effective_conf,
    load_overrides,
    merge_overrides,
    save_overrides,
)
from pageserver.timelines import TimelineHandle
from postgres_ffi.distrib import PgDistrib
from zenith_utils.errors import error_chain
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

log = logging.getLogger(__name__)

TIMELINES_DIR: Final = "timelines"
LEASES_DIR: Final = "leases"


class TenantError(Exception):
    """An operation on tenants or timelines cannot be done; the text is for the client."""


class TenantNotFoundError(TenantError):
    """There is no such tenant."""


class TenantExistsError(TenantError):
    """The tenant to be created exists."""


class TimelineNotFoundError(TenantError):
    """There is no such timeline in the tenant."""


class TimelineExistsError(TenantError):
    """The timeline to be created exists."""


class TenantState(Enum):
    """What a tenant is doing; the values are the texts of the HTTP API."""

    IDLE = "Idle"
    ACTIVE = "Active"
    STOPPING = "Stopping"


@dataclass(frozen=True, slots=True)
class Shared:
    """What all tenants of a pageserver have in common."""

    conf: PageServerConf
    distrib: PgDistrib
    resources: StoreResources
    metrics: PageserverMetrics
    checkpointer: Checkpointer


class Tenant:
    """One tenant: its settings, repository, redo processes and loaded timelines.

    Its folder is durable, with the one for timelines in it. Raises ConfigError if the settings on
    disk are wrong.
    """

    def __init__(self, tenant_id: TenantId, shared: Shared) -> None:
        self.tenant_id = tenant_id
        self.state = TenantState.IDLE
        conf, distrib = shared.conf, shared.distrib
        self.path = conf.tenants_path / str(tenant_id)
        self._config_path = self.path / TENANT_CONFIG_FILE
        self.overrides: Overrides = load_overrides(self._config_path)
        """The settings that the tenant has of its own."""
        self.settings = effective_conf(conf.tenant_document, self.overrides)
        """All its settings at this moment."""
        self._config_lock = threading.Lock()
        self._conf = conf
        self._distrib = distrib
        self._metrics = shared.metrics
        self._checkpointer = shared.checkpointer
        self._reconstruct = LazyReconstruct(
            distrib, conf, redo_directory(conf, tenant_id), shared.metrics
        )
        self._repository = Repository(
            self.path,
            tenant_id,
            self.settings.store_settings(_common_settings(conf)),
            self._reconstruct,
            resources=shared.resources,
            durable=True,
        )
        self._lock = threading.Lock()
        self._creating: set[TimelineId] = set()
        self._load_locks: dict[TimelineId, threading.Lock] = {}
        self._timelines: dict[TimelineId, TimelineHandle] = {}

    def configure(self, changes: Overrides) -> None:
        """Change the tenant's own settings (None: the default again), durably and at once.

        Raises ConfigError and then changes nothing, OSError.
        """
        with self._config_lock:
            overrides = merge_overrides(self.overrides, changes)
            settings = effective_conf(self._conf.tenant_document, overrides)
            save_overrides(self._config_path, overrides)
            self.overrides, self.settings = overrides, settings
            self._repository.settings = settings.store_settings(_common_settings(self._conf))

    def timeline_ids(self) -> list[TimelineId]:
        """Ids of all timelines, sorted; those being created are not counted yet."""
        found = self._repository.timelines()
        with self._lock:
            return [timeline_id for timeline_id in found if timeline_id not in self._creating]

    def timeline(self, timeline_id: TimelineId) -> TimelineHandle:
        """The timeline, loaded if need be. Raises TimelineNotFoundError, store errors."""
        handle = self._timelines.get(timeline_id)
        if handle is not None:
            return handle
        with self._lock:
            load_lock = self._load_locks.setdefault(timeline_id, threading.Lock())
        with load_lock:
            handle = self._timelines.get(timeline_id)
            if handle is not None:
                return handle
            try:
                timeline = self._repository.timeline(timeline_id)
            except TimelineNotFound as error:
                raise TimelineNotFoundError(
                    f"Cannot load local timeline {timeline_id}: tenant {self.tenant_id} has no such"
                    " timeline"
                ) from error
            return self._register(timeline)

    def loaded(self) -> list[TimelineHandle]:
        """The timelines in memory."""
        with self._lock:
            return list(self._timelines.values())

    def create_root(self, timeline_id: TimelineId) -> TimelineHandle:
        """A new timeline holding a freshly initialised cluster."""
        from pageserver.import_datadir import import_datadir
        from pageserver.initdb_template import new_system_identifier, template_cluster

        with self._creation(timeline_id):
            template = template_cluster(
                self._distrib, self._conf.initial_superuser_name, self._conf.initdb_options
            )
            timeline = import_datadir(
                self._repository, timeline_id, template, new_system_identifier()
            )
            return self._register(timeline)

    def create_branch(
        self, timeline_id: TimelineId, ancestor_id: TimelineId, start_lsn: Lsn | None
    ) -> TimelineHandle:
        """A new timeline that shares the history of another one up to ``start_lsn``.

        Default: up to its last record. Waits for an LSN that has not arrived yet.
        """
        with self._creation(timeline_id):
            try:
                timeline = self._repository.branch_timeline(
                    timeline_id, ancestor_id=ancestor_id, start_lsn=start_lsn
                )
            except TimelineExists as error:
                raise TimelineExistsError(str(error)) from error
            except (TimelineNotFound, InvalidBranchLsn, WaitLsnTimeout) as error:
                # The causes are for whoever runs the pageserver; clients are told the error.
                log.warning(
                    "tenant %s: no branch %s of %s: %s",
                    *(self.tenant_id, timeline_id, ancestor_id, ": ".join(error_chain(error))),
                )
                raise TenantError(str(error)) from error
            return self._register(timeline)

    def stop_receiving(self) -> None:
        """Ends all WAL receivers, and compaction at its next step."""
        self.state = TenantState.STOPPING
        for handle in self.loaded():
            handle.timeline.maintenance.stop()
        for handle in self.loaded():
            handle.walreceiver.stop()

    def shutdown(self) -> None:
        """Flushes everything in memory to layer files and ends the redo processes."""
        self._repository.shutdown(flush=True)
        self._reconstruct.close()

    def _register(self, timeline: Timeline) -> TimelineHandle:
        ancestor_id = timeline.ancestor_id
        handle = TimelineHandle(
            self.tenant_id,
            timeline,
            self._distrib.version,
            self._metrics,
            repository=self._repository,
            ancestor=None if ancestor_id is None else self.timeline(ancestor_id),
            lease_file=LeaseFile(self.path / LEASES_DIR / str(timeline.timeline_id)),
            wait_lsn_timeout=self._conf.wait_lsn_timeout,
            request_checkpoint=self._checkpointer.request,
        )
        with self._lock:
            self._reconstruct.control_file = handle.control_file.file_bytes()
            self._timelines[handle.timeline_id] = handle
        return handle

    @contextmanager
    def _creation(self, timeline_id: TimelineId) -> Iterator[None]:
        """Keeps two requests from creating the same timeline."""
        with self._lock:
            folder = self.path / TIMELINES_DIR / str(timeline_id)
            if timeline_id in self._creating or folder.exists():
                raise TimelineExistsError(f"timeline {timeline_id} already exists")
            self._creating.add(timeline_id)
        try:
            yield
        finally:
            with self._lock:
                self._creating.discard(timeline_id)


def _common_settings(conf: PageServerConf) -> StoreSettings:
    """The settings of the store that are the same for all tenants."""
    return StoreSettings(
        spill_after=conf.open_layer_spill_threshold,
        wait_lsn_timeout=conf.wait_lsn_timeout,
    )
