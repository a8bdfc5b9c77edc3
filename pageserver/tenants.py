"""All tenants of a pageserver: what is on disk, what they share, how they come to be and end.

A tenant exists when its folder does, with or without timelines.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from pageserver.background import BackgroundThread
from pageserver.checkpointer import Checkpointer
from pageserver.config import ConfigError, PageServerConf
from pageserver.layered_repository.descriptor_cache import DescriptorCache
from pageserver.layered_repository.memory_budget import MemoryBudget
from pageserver.layered_repository.resources import StoreResources, new_caches
from pageserver.maintenance import CompactionTask, GcTask
from pageserver.metrics import PageserverMetrics
from pageserver.tenant import (
    TIMELINES_DIR,
    Shared,
    Tenant,
    TenantError,
    TenantExistsError,
    TenantNotFoundError,
    TenantState,
)
from pageserver.tenant_config import (
    TENANT_CONFIG_FILE,
    Overrides,
    TenantConf,
    effective_conf,
    merge_overrides,
    save_overrides,
)
from pageserver.timelines import TimelineHandle
from postgres_ffi.distrib import PgDistrib
from postgres_ffi.page import BLCKSZ
from zenith_utils.durable import TEMP_SUFFIX, fsync_dir, is_temp_file
from zenith_utils.errors import error_chain
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn

log = logging.getLogger(__name__)


class TenantManager:
    """All tenants of the pageserver. All methods are thread safe."""

    def __init__(self, conf: PageServerConf, distrib: PgDistrib) -> None:
        self.conf = conf
        self.metrics = PageserverMetrics()
        self._checkpointer = Checkpointer(self._loaded, conf.checkpoint_timeout)
        page_cache, blocks = new_caches(conf.page_cache_size * BLCKSZ)
        self._resources = StoreResources(
            page_cache=page_cache,
            descriptors=DescriptorCache(
                conf.max_file_descriptors,
                memory_limit=conf.layer_index_memory_limit,
                blocks=blocks,
            ),
            memory=MemoryBudget(conf.open_layer_memory_limit),
            measure=self.metrics.storage_time,
            count_io=self.metrics.io_stats,
        )
        self._shared = Shared(conf, distrib, self._resources, self.metrics, self._checkpointer)
        self._background = [
            BackgroundThread(task, self._active) for task in (CompactionTask(), GcTask())
        ]
        self.metrics.watch_store(self._resources, self._loaded)
        self._lock = threading.Lock()
        self._tenants: dict[TenantId, Tenant] = {}
        self._unusable: dict[TenantId, str] = {}
        """Tenants on disk that cannot be used, and why."""
        self._stopping = False

    def load(self) -> None:
        """Registers every tenant on disk and begins the work in the background.

        Foreign folders are left alone.
        """
        self.conf.tenants_path.mkdir(exist_ok=True)
        # A tenant gets its name with everything in it synced, see _make_tenant_directory(). Only
        # that name may not be durable yet, if the last process was killed: nothing may be made in a
        # tenant that a crash would take away. One sync serves all of them.
        for path in (self.conf.tenants_path.parent, self.conf.tenants_path):
            fsync_dir(path)
        for path in sorted(self.conf.tenants_path.iterdir()):
            if is_temp_file(path):
                shutil.rmtree(path)  # of a tenant that was being made
                continue
            try:
                tenant_id = TenantId.parse(path.name)
            except IdParseError:
                log.warning("%s is no tenant folder, ignored", path)
                continue
            self._load_tenant(tenant_id)
        self._checkpointer.start()
        for thread in self._background:
            thread.start()

    def _load_tenant(self, tenant_id: TenantId) -> None:
        try:
            tenant = Tenant(tenant_id, self._shared)
        except ConfigError as error:
            # With other settings than its own it might lose history: it waits for its owner.
            reason = f"tenant {tenant_id} cannot be used: {': '.join(error_chain(error))}"
            log.error("%s", reason)
            with self._lock:
                self._unusable[tenant_id] = reason
            return
        with self._lock:
            self._tenants[tenant_id] = tenant

    def tenants(self) -> list[Tenant]:
        """All tenants, sorted by id."""
        with self._lock:
            return [self._tenants[tenant_id] for tenant_id in sorted(self._tenants)]

    def tenant(self, tenant_id: TenantId) -> Tenant:
        """Raises TenantNotFoundError."""
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            if tenant_id in self._unusable:
                raise TenantError(self._unusable[tenant_id])
            raise TenantNotFoundError(f"Tenant {tenant_id} not found")
        return tenant

    def timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineHandle:
        """Raises TenantNotFoundError, TimelineNotFoundError."""
        return self.tenant(tenant_id).timeline(timeline_id)

    def create_tenant(
        self, tenant_id: TenantId | None = None, overrides: Overrides | None = None
    ) -> Tenant:
        """A new, empty tenant with settings of its own, durable at return.

        Raises TenantExistsError, ConfigError.
        """
        tenant_id = tenant_id or TenantId.generate()
        overrides = merge_overrides({}, overrides or {})
        effective_conf(self.conf.tenant_document, overrides)
        with self._lock:
            self._refuse_if_stopping()
            if tenant_id in self._tenants:
                raise TenantExistsError(f"tenant {tenant_id} already exists")
            path = self.conf.tenants_path / str(tenant_id)
            if path.exists():
                raise TenantError(f"tenant {tenant_id} directory already exists")
            _make_tenant_directory(path, overrides)
            tenant = Tenant(tenant_id, self._shared)
            self._tenants[tenant_id] = tenant
        log.info("tenant %s created", tenant_id)
        return tenant

    def configure_tenant(self, tenant_id: TenantId, changes: Overrides) -> Tenant:
        """Changes the settings that a tenant has of its own.

        Raises TenantNotFoundError, ConfigError.
        """
        self._refuse_if_stopping()
        tenant = self.tenant(tenant_id)
        tenant.configure(changes)
        log.info("tenant %s has settings of its own: %s", tenant_id, tenant.overrides)
        for thread in self._background:
            thread.wake()
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
            for thread in self._background:
                thread.wake()

    def shutdown(self) -> bool:
        """Stops all work and makes everything in memory durable.

        Failures are logged and all tenants are tried; False if there was one.
        """
        with self._lock:
            self._stopping = True
            tenants = list(self._tenants.values())
        for thread in self._background:
            thread.ask_to_stop()
        self._checkpointer.stop()
        for tenant in tenants:
            tenant.stop_receiving()
        for thread in self._background:
            thread.join()
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

    def _active(self) -> Iterator[tuple[TimelineHandle, TenantConf]]:
        """The loaded timelines that get background work, with their settings."""
        for tenant in self.tenants():
            if tenant.state is TenantState.ACTIVE:
                settings = tenant.settings
                for handle in tenant.loaded():
                    yield handle, settings

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise TenantError("the pageserver is shutting down")


def _make_tenant_directory(path: Path, overrides: Overrides) -> None:
    """All of it or nothing, however the process ends."""
    temp = path.with_name(path.name + TEMP_SUFFIX)
    if temp.exists():
        shutil.rmtree(temp)
    (temp / TIMELINES_DIR).mkdir(parents=True)
    if overrides:
        save_overrides(temp / TENANT_CONFIG_FILE, overrides)
    fsync_dir(temp)
    temp.rename(path)
    fsync_dir(path.parent)
