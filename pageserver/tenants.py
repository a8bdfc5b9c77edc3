"""Tenants and their timelines: what is on disk, what is loaded, how they come to be.

``tenants/<tenant>/timelines/<timeline>/`` holds a timeline's layers and metadata. A tenant exists
when its folder does, with or without timelines. Timelines are loaded when first used.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from pageserver.checkpointer import Checkpointer
from pageserver.config import PageServerConf
from pageserver.layered_repository.errors import (
    InvalidBranchLsn,
    TimelineExists,
    TimelineNotFound,
    WaitLsnTimeout,
)
from pageserver.layered_repository.page_cache import PageCache
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.metrics import PageserverMetrics
from pageserver.timelines import TimelineHandle
from postgres_ffi.distrib import PgDistrib
from postgres_ffi.page import BLCKSZ
from zenith_utils.cache_dir import cache_dir
from zenith_utils.durable import fsync_dir
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import postgres_user

if TYPE_CHECKING:
    from pageserver.layered_repository.reader import Reconstruct, ReconstructInput
    from pageserver.walredo import WalRedoPool

log = logging.getLogger(__name__)

TIMELINES_DIR = "timelines"
REDO_DIR = "wal-redo-datadir"


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


class LazyReconstruct:
    """The store's callback that makes pages of records; sets up redo when first called."""

    def __init__(self, distrib: PgDistrib, conf: PageServerConf, workdir: Path) -> None:
        self._distrib = distrib
        self._conf = conf
        self._workdir = workdir
        self._lock = threading.Lock()
        self._pool: WalRedoPool | None = None
        self._reconstruct: Reconstruct | None = None
        self.control_file: bytes | None = None
        """pg_control of one of the tenant's clusters; known once a timeline is loaded."""

    def __call__(self, inputs: Sequence[ReconstructInput]) -> list[bytes]:
        """The values, in order."""
        return (self._reconstruct or self._open())(inputs)

    def close(self) -> None:
        """Ends the redo processes."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()

    def _open(self) -> Reconstruct:
        from pageserver.reconstruct import make_reconstruct
        from pageserver.walredo import WalRedoPool
        from pgxn.build import build_module

        with self._lock:
            if self._reconstruct is None:
                if self.control_file is None:
                    raise TenantError("WAL redo was asked for before a timeline was loaded")
                self._pool = WalRedoPool(
                    self._distrib,
                    build_module(self._distrib, "walredo"),
                    self._workdir,
                    control_file=self.control_file,
                    max_processes=self._conf.max_redo_processes,
                    timeout=self._conf.wal_redo_timeout,
                )
                self._reconstruct = make_reconstruct(self._pool)
            return self._reconstruct


def redo_directory(conf: PageServerConf, tenant_id: TenantId) -> Path:
    """Where the redo processes of a tenant keep their scratch data.

    In the tenant's folder, unless they run as another user, who may not be able to get there:
    then in the cache directory, which everybody can reach.
    """
    if postgres_user() is None:
        return conf.tenants_path / str(tenant_id) / REDO_DIR
    node = hashlib.sha256(str(conf.workdir).encode()).hexdigest()[:16]
    return cache_dir() / "redo" / node / str(tenant_id)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all tenants of a pageserver have in common."""

    conf: PageServerConf
    distrib: PgDistrib
    page_cache: PageCache
    metrics: PageserverMetrics
    checkpointer: Checkpointer


class Tenant:
    """One tenant: its repository, redo processes and loaded timelines."""

    def __init__(self, tenant_id: TenantId, shared: Shared) -> None:
        self.tenant_id = tenant_id
        self.state = TenantState.IDLE
        conf, distrib = shared.conf, shared.distrib
        self.path = conf.tenants_path / str(tenant_id)
        self._conf = conf
        self._distrib = distrib
        self._metrics = shared.metrics
        self._checkpointer = shared.checkpointer
        self._reconstruct = LazyReconstruct(distrib, conf, redo_directory(conf, tenant_id))
        self._repository = Repository(
            self.path,
            tenant_id,
            _store_settings(conf),
            self._reconstruct,
            page_cache=shared.page_cache,
        )
        self._lock = threading.Lock()
        self._creating: set[TimelineId] = set()
        self._load_locks: dict[TimelineId, threading.Lock] = {}
        self._timelines: dict[TimelineId, TimelineHandle] = {}

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
                raise TenantError(str(error)) from error
            return self._register(timeline)

    def stop_receiving(self) -> None:
        """Ends all WAL receivers."""
        self.state = TenantState.STOPPING
        for handle in self.loaded():
            handle.walreceiver.stop()

    def shutdown(self) -> None:
        """Flushes everything in memory to layer files and ends the redo processes."""
        self._repository.shutdown(flush=True)
        self._reconstruct.close()

    def _register(self, timeline: Timeline) -> TimelineHandle:
        handle = TimelineHandle(
            self.tenant_id,
            timeline,
            self._distrib.version,
            self._metrics,
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


class TenantManager:
    """All tenants of the pageserver. All methods are thread safe."""

    def __init__(self, conf: PageServerConf, distrib: PgDistrib) -> None:
        self.conf = conf
        self.metrics = PageserverMetrics()
        self._checkpointer = Checkpointer(self._loaded, conf.checkpoint_timeout)
        self._shared = Shared(
            conf,
            distrib,
            PageCache(conf.page_cache_size * BLCKSZ),
            self.metrics,
            self._checkpointer,
        )
        self._lock = threading.Lock()
        self._tenants: dict[TenantId, Tenant] = {}
        self._stopping = False

    def load(self) -> None:
        """Registers every tenant on disk and begins the work in the background.

        Foreign folders are left alone.
        """
        self.conf.tenants_path.mkdir(exist_ok=True)
        for path in sorted(self.conf.tenants_path.iterdir()):
            try:
                tenant_id = TenantId.parse(path.name)
            except IdParseError:
                log.warning("%s is no tenant folder, ignored", path)
                continue
            with self._lock:
                self._tenants[tenant_id] = Tenant(tenant_id, self._shared)
        self._checkpointer.start()

    def tenants(self) -> list[Tenant]:
        """All tenants, sorted by id."""
        with self._lock:
            return [self._tenants[tenant_id] for tenant_id in sorted(self._tenants)]

    def tenant(self, tenant_id: TenantId) -> Tenant:
        """Raises TenantNotFoundError."""
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            raise TenantNotFoundError(f"Tenant {tenant_id} not found")
        return tenant

    def timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineHandle:
        """Raises TenantNotFoundError, TimelineNotFoundError."""
        return self.tenant(tenant_id).timeline(timeline_id)

    def create_tenant(self, tenant_id: TenantId | None = None) -> Tenant:
        """A new, empty tenant, durable at return. Raises TenantExistsError."""
        tenant_id = tenant_id or TenantId.generate()
        with self._lock:
            self._refuse_if_stopping()
            if tenant_id in self._tenants:
                raise TenantExistsError(f"tenant {tenant_id} already exists")
            path = self.conf.tenants_path / str(tenant_id)
            if path.exists():
                raise TenantError(f"tenant {tenant_id} directory already exists")
            (path / TIMELINES_DIR).mkdir(parents=True)
            fsync_dir(path)
            fsync_dir(path.parent)
            tenant = Tenant(tenant_id, self._shared)
            self._tenants[tenant_id] = tenant
        log.info("tenant %s created", tenant_id)
        return tenant

    def create_timeline(
        self,
        tenant_id: TenantId,
        timeline_id: TimelineId | None = None,
        *,
        ancestor_id: TimelineId | None = None,
        start_lsn: Lsn | None = None,
    ) -> TimelineHandle:
        """A new timeline: a fresh cluster without, a branch with an ancestor.

        Durable at return. Raises TenantError.
        """
        self._refuse_if_stopping()
        tenant = self.tenant(tenant_id)
        timeline_id = timeline_id or TimelineId.generate()
        if ancestor_id is None:
            handle = tenant.create_root(timeline_id)
        else:
            handle = tenant.create_branch(timeline_id, ancestor_id, start_lsn)
        log.info("timeline %s created at %s", handle, Lsn(handle.timeline.last_record_lsn))
        return handle

    def activate(self, tenant_id: TenantId) -> None:
        """The tenant receives WAL from now on."""
        self._refuse_if_stopping()
        tenant = self.tenant(tenant_id)
        if tenant.state is TenantState.IDLE:
            tenant.state = TenantState.ACTIVE

    def shutdown(self) -> bool:
        """Stops all work and makes everything in memory durable.

        Failures are logged and all tenants are tried; False if there was one.
        """
        with self._lock:
            self._stopping = True
            tenants = list(self._tenants.values())
        self._checkpointer.stop()
        for tenant in tenants:
            tenant.stop_receiving()
        clean = True
        for tenant in tenants:
            try:
                tenant.shutdown()
            except Exception:
                log.exception("tenant %s could not be shut down cleanly", tenant.tenant_id)
                clean = False
        return clean

    def _loaded(self) -> list[TimelineHandle]:
        return [handle for tenant in self.tenants() for handle in tenant.loaded()]

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise TenantError("the pageserver is shutting down")


def _store_settings(conf: PageServerConf) -> StoreSettings:
    return StoreSettings(
        checkpoint_distance=conf.checkpoint_distance,
        wait_lsn_timeout=conf.wait_lsn_timeout,
    )
