"""WAL redo for a tenant, set up when the first page has to be rebuilt."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pageserver.config import PageServerConf
from pageserver.metrics import PageserverMetrics
from postgres_ffi.distrib import PgDistrib
from zenith_utils.cache_dir import cache_dir
from zenith_utils.ids import TenantId
from zenith_utils.os_user import postgres_user

if TYPE_CHECKING:
    from pageserver.layered_repository.reader import Reconstruct, ReconstructInput
    from pageserver.walredo import WalRedoPool

REDO_DIR: Final = "wal-redo-datadir"


class LazyReconstruct:
    """The store's callback that makes pages of records; sets up redo when first called."""

    def __init__(
        self,
        distrib: PgDistrib,
        conf: PageServerConf,
        workdir: Path,
        metrics: PageserverMetrics,
    ) -> None:
        self._distrib = distrib
        self._conf = conf
        self._workdir = workdir
        self._metrics = metrics
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
                    raise RuntimeError("WAL redo was asked for before a timeline was loaded")
                self._pool = WalRedoPool(
                    self._distrib,
                    build_module(self._distrib, "walredo"),
                    self._workdir,
                    control_file=self.control_file,
                    max_processes=self._conf.max_redo_processes,
                    timeout=self._conf.wal_redo_timeout,
                    waited=self._metrics.wal_redo_wait_time.labels().observe,
                )
                self._reconstruct = make_reconstruct(self._metrics.measured_redo(self._pool))
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
