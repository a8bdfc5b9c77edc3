"""Settings that a tenant may have of its own.

Their defaults for all tenants stand in ``pageserver.toml``; ``tenants/<tenant>/config``, a TOML
document of the same keys, holds what differs for one tenant. It may change at any time.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pageserver.config_table import ConfigError, ConfigTable
from pageserver.layered_repository.settings import StoreSettings
from zenith_utils.durable import write_file_durably
from zenith_utils.duration import format_duration

TENANT_CONFIG_FILE = "config"
COMPRESSIONS = ("zstd", "none")

# What changes of settings look like from outside: a value by key, None to have the default again.
Overrides = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TenantConf:
    """The settings of a tenant. Sizes are bytes, durations seconds."""

    checkpoint_distance: int
    """WAL after which the open layer is frozen."""
    compaction_period: float
    """Time between two looks at a timeline for compaction; 0: only on demand."""
    compaction_threshold: int
    """Number of L0 deltas that are merged."""
    compaction_target_size: int
    """Size of the files that a merge writes."""
    image_creation_threshold: int
    """Number of deltas over a key range that make its next image due."""
    gc_horizon: int
    """WAL behind the last record whose history is kept; 0: no garbage collection by itself."""
    gc_period: float
    """Time between two garbage collections of a timeline; 0: only on demand."""
    pitr_interval: float
    """Time for which history is kept in any case; 0: by gc_horizon only."""
    compression: str
    """Of ranged and image layers: zstd or none."""

    def document(self) -> dict[str, int | str]:
        """The values as they stand in a configuration."""
        values: dict[str, int | str] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = format_duration(value) if isinstance(value, float) else value
        return values

    def store_settings(self, common: StoreSettings) -> StoreSettings:
        """``common`` with this tenant's settings of the store."""
        return replace(
            common,
            checkpoint_distance=self.checkpoint_distance,
            compaction_threshold=self.compaction_threshold,
            compaction_target_size=self.compaction_target_size,
            image_creation_threshold=self.image_creation_threshold,
            compress_layers=self.compression != "none",
        )


TENANT_KEYS = frozenset(field.name for field in fields(TenantConf))


def read_tenant_conf(table: ConfigTable) -> TenantConf:
    """The settings in a table, with defaults for what it does not have. Raises ConfigError."""
    checkpoint_distance = table.integer("checkpoint_distance", 256 << 20, minimum=1)
    return TenantConf(
        checkpoint_distance=checkpoint_distance,
        compaction_period=table.duration("compaction_period", 1.0),
        compaction_threshold=table.integer("compaction_threshold", 10, minimum=1),
        compaction_target_size=table.integer(
            "compaction_target_size", checkpoint_distance, minimum=1
        ),
        image_creation_threshold=table.integer("image_creation_threshold", 3, minimum=1),
        gc_horizon=table.integer("gc_horizon", 64 << 20),
        gc_period=table.duration("gc_period", 100.0),
        pitr_interval=table.duration("pitr_interval", 24 * 3600.0),
        compression=table.choice("compression", "zstd", COMPRESSIONS),
    )


def effective_conf(defaults: Mapping[str, Any], overrides: Overrides) -> TenantConf:
    """The settings of a tenant: ``defaults``, a document, where ``overrides`` says nothing.

    Raises ConfigError for a key that tenants do not have and for a wrong value.
    """
    table = ConfigTable({**defaults, **overrides})
    conf = read_tenant_conf(table)
    try:
        table.refuse_unknown("tenant")
    except ConfigError as error:
        raise ConfigError(f"{error}, expected one of {', '.join(sorted(TENANT_KEYS))}") from None
    return conf


def merge_overrides(current: Overrides, changes: Overrides) -> dict[str, Any]:
    """``current`` with ``changes`` made; a change to None removes what there is."""
    merged = {**current, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def load_overrides(path: Path) -> dict[str, Any]:
    """A tenant's own settings, none if there is no such file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"Failed to read tenant config at '{path}'") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Failed to read '{path}' as tenant config") from error


def save_overrides(path: Path, overrides: Overrides) -> None:
    """Write a tenant's own settings durably. Raises OSError."""
    import toml

    write_file_durably(path, toml.dumps(dict(overrides)).encode(), mode=0o644)
