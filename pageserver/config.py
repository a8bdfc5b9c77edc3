"""Configuration of the pageserver: ``pageserver.toml`` plus ``-c`` overrides.

The file is a flat TOML document. Every ``-c`` option is a TOML document of its own whose
top-level keys replace whole values, in command-line order. The result is checked as a whole and
frozen: nothing in the daemon changes its configuration while it runs. Some of its keys are only
defaults, see ``tenant_config.py``: each tenant may have other values, which may change.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageserver.config_table import ConfigError, ConfigTable
from pageserver.tenant_config import TENANT_KEYS, TenantConf, read_tenant_conf
from zenith_utils.daemonize import AddressError, parse_address

__all__ = ["ConfigError", "PageServerConf", "RemoteStorageConf"]

CONFIG_FILE_NAME = "pageserver.toml"
TENANTS_DIR = "tenants"

DEFAULT_LISTEN_PG_ADDR = "127.0.0.1:64000"
DEFAULT_LISTEN_HTTP_ADDR = "127.0.0.1:9898"
DEFAULT_SUPERUSER = "zenith_admin"

DEFAULT_CONFIG_FILE = f"""\
# Initial configuration file created by 'pageserver --init'

#id = 1  # mandatory, set by 'pageserver --init -c id=<number>'

#listen_pg_addr = '{DEFAULT_LISTEN_PG_ADDR}'
#listen_http_addr = '{DEFAULT_LISTEN_HTTP_ADDR}'

# Settings that each tenant may have of its own ('zenith tenant config'); these are the defaults.
# WAL is collected in memory and written as a layer file after so many bytes, or so much time.
#checkpoint_distance = 268435456
#checkpoint_timeout = '10 m'  # of all tenants; 0 s: no limit
# Layer files are merged when there are so many new ones, into files of about this size (default:
# checkpoint_distance); a part of the key space with so many changes since its last image gets a
# new one. Timelines are looked at once in a period; 0 s: only on demand.
#compaction_period = '1 s'
#compaction_threshold = 10
#compaction_target_size = 268435456
#image_creation_threshold = 3
#compression = 'zstd'  # or 'none'
# History stays readable for so much WAL and for so much time, whichever is more. gc_horizon = 0:
# nothing is removed by itself; pitr_interval = '0 s': by gc_horizon only.
#gc_horizon = 67108864
#pitr_interval = '1 day'
#gc_period = '100 s'

#wait_lsn_timeout = '60 s'
#wal_redo_timeout = '60 s'
#max_redo_processes = 2  # per tenant

# What bounds the memory of the whole pageserver: what reads keep, in pages of 8 KiB, rebuilt pages
# and unpacked blocks of layer files together; memory for new WAL of all timelines, beyond which the
# largest layer is written out (with half as much again WAL has to wait); values of one timeline in
# memory, the others go to a file; layer files that are open at the same time, and the memory of
# their indexes and filters.
#page_cache_size = 8192
#open_layer_memory_limit = 536870912
#open_layer_spill_threshold = 67108864
#max_file_descriptors = 100
#layer_index_memory_limit = 268435456

# name of the superuser and further initdb options of new timelines
#initial_superuser_name = '{DEFAULT_SUPERUSER}'
#initdb_options = []  # e.g. ['--data-checksums']

# 'ZenithJWT': every client needs a token that was signed with the private key of this public one.
#auth_type = 'Trust'
#auth_validation_public_key_path = 'auth_public_key.pem'

# Where layers would be uploaded to; this version checks the settings and uploads nothing.
# [remote_storage]  # local_path = '...', or:
# bucket_name = '...'
# bucket_region = '...'
# prefix_in_bucket, endpoint, access_key_id, secret_access_key
# max_concurrent_sync = 100
# max_sync_errors = 10

"""

_AUTH_TYPES = ("Trust", "MD5", "ZenithJWT")
_PUBLIC_KEY_FILE = "auth_public_key.pem"


@dataclass(frozen=True, slots=True)
class RemoteStorageConf:
    """The ``remote_storage`` table: a local folder or a bucket, never both."""

    local_path: Path | None
    bucket_name: str | None
    bucket_region: str | None
    prefix_in_bucket: str | None
    endpoint: str | None
    access_key_id: str | None
    secret_access_key: str | None
    max_concurrent_sync: int
    max_sync_errors: int

    def __str__(self) -> str:
        """The place, without secrets."""
        if self.local_path is not None:
            return f"the directory {self.local_path}"
        prefix = f" below {self.prefix_in_bucket}/" if self.prefix_in_bucket else ""
        return f"the bucket {self.bucket_name}{prefix}"


@dataclass(frozen=True, slots=True)
class PageServerConf:
    """Checked configuration. Sizes are bytes (``page_cache_size``: pages), durations seconds."""

    id: int
    workdir: Path
    listen_pg_addr: str
    listen_http_addr: str
    tenant: TenantConf
    """Settings of tenants that have none of their own."""
    tenant_document: Mapping[str, Any]
    """The same as they were given."""
    checkpoint_timeout: float
    """Longest time that WAL stays in memory only; 0 for no limit."""
    wait_lsn_timeout: float
    wal_redo_timeout: float
    max_redo_processes: int
    initial_superuser_name: str
    initdb_options: tuple[str, ...]
    page_cache_size: int
    open_layer_memory_limit: int
    """Memory of the open layers of all timelines; beyond it the largest is frozen."""
    open_layer_spill_threshold: int
    """Values that one open layer keeps in memory; more of them go to a file."""
    max_file_descriptors: int
    layer_index_memory_limit: int
    """What the indexes and key filters of open layer files may take."""
    pg_distrib_dir: Path | None
    auth_type: str
    auth_validation_public_key_path: Path | None
    """Where the public keys are that tokens are checked with; set with ``ZenithJWT``."""
    remote_storage: RemoteStorageConf | None

    @property
    def tenants_path(self) -> Path:
        """Folder of all tenants."""
        return self.workdir / TENANTS_DIR


def parse_override(text: str) -> dict[str, Any]:
    """The TOML document of one ``-c`` option. Raises ConfigError."""
    try:
        return tomllib.loads(text.strip())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Option '{text}' could not be parsed as a toml document") from error


def merge_overrides(
    base: Mapping[str, Any], overrides: Sequence[str], *, init: bool
) -> dict[str, Any]:
    """``base`` with the top-level keys of every override, in order.

    ``id`` identifies the node for good, so an override of it is accepted only with ``init``.
    """
    merged = dict(base)
    for text in overrides:
        document = parse_override(text)
        if "id" in document and not init:
            raise ConfigError(
                "node id can only be set during pageserver init and cannot be overridden"
            )
        merged.update(document)
    return merged


def load_document(workdir: Path) -> dict[str, Any]:
    """The document of ``<workdir>/pageserver.toml``. Raises ConfigError."""
    path = workdir / CONFIG_FILE_NAME
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"No pageserver config at '{path}'") from error
    except OSError as error:
        raise ConfigError(f"Failed to read pageserver config at '{path}'") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Failed to read '{path}' as pageserver config") from error


def dump_document(document: Mapping[str, Any]) -> str:
    """Text of ``pageserver.toml``: the commented defaults, then the keys of ``document``."""
    import toml

    return DEFAULT_CONFIG_FILE + toml.dumps(dict(document))


def parse_config(document: Mapping[str, Any], workdir: Path) -> PageServerConf:
    """Checks ``document`` and fills in the defaults.

    Relative paths in it are relative to ``workdir``. Raises ConfigError
    ("Failed to parse pageserver configuration" with the reason as its cause).
    """
    try:
        return _parse(document, workdir)
    except ConfigError as error:
        invalid = ConfigError("invalid config")
        invalid.__cause__ = error
        raise ConfigError("Failed to parse pageserver configuration") from invalid


def _parse(document: Mapping[str, Any], workdir: Path) -> PageServerConf:
    table = ConfigTable(document)
    node_id = table.integer("id", -1)
    distrib_dir = table.string("pg_distrib_dir")
    auth_type = table.choice("auth_type", "Trust", _AUTH_TYPES)
    conf = PageServerConf(
        id=node_id,
        workdir=workdir,
        listen_pg_addr=_address(table, "listen_pg_addr", DEFAULT_LISTEN_PG_ADDR),
        listen_http_addr=_address(table, "listen_http_addr", DEFAULT_LISTEN_HTTP_ADDR),
        tenant=read_tenant_conf(table),
        tenant_document={key: document[key] for key in TENANT_KEYS & document.keys()},
        checkpoint_timeout=table.duration("checkpoint_timeout", 600.0),
        wait_lsn_timeout=table.duration("wait_lsn_timeout", 60.0),
        wal_redo_timeout=table.duration("wal_redo_timeout", 60.0),
        max_redo_processes=table.integer("max_redo_processes", 2, minimum=1),
        initial_superuser_name=table.required_string("initial_superuser_name", DEFAULT_SUPERUSER),
        initdb_options=table.strings("initdb_options"),
        page_cache_size=table.integer("page_cache_size", 8192),
        open_layer_memory_limit=table.integer(
            "open_layer_memory_limit", 512 << 20, minimum=1 << 20
        ),
        open_layer_spill_threshold=table.integer("open_layer_spill_threshold", 64 << 20),
        max_file_descriptors=table.integer("max_file_descriptors", 100, minimum=1),
        layer_index_memory_limit=table.integer("layer_index_memory_limit", 256 << 20),
        pg_distrib_dir=workdir / distrib_dir if distrib_dir else None,
        auth_type=auth_type,
        auth_validation_public_key_path=_public_key_path(table, auth_type, workdir),
        remote_storage=_remote_storage(table.table("remote_storage"), workdir),
    )
    table.refuse_unknown()
    if node_id < 0:
        raise ConfigError("missing id")
    return conf


def _public_key_path(table: ConfigTable, auth_type: str, workdir: Path) -> Path | None:
    name = table.string("auth_validation_public_key_path")
    if auth_type == "MD5":
        raise ConfigError(
            "auth_type 'MD5' is not supported: the pageserver has no users with passwords. Use "
            "'ZenithJWT', or 'Trust' where the network is trusted"
        )
    if auth_type == "Trust":
        return workdir / name if name else None
    path = workdir / (name or _PUBLIC_KEY_FILE)
    if not path.is_file():
        raise ConfigError(f"Can't find auth_validation_public_key at '{path}'")
    return path


def _address(table: ConfigTable, key: str, default: str) -> str:
    value = table.required_string(key, default)
    try:
        parse_address(value)
    except AddressError as error:
        raise ConfigError(f"configure option {key}: {error}") from error
    return value


def _remote_storage(table: ConfigTable | None, workdir: Path) -> RemoteStorageConf | None:
    if table is None:
        return None
    local_path = table.string("local_path")
    bucket = table.string("bucket_name")
    region = table.string("bucket_region")
    if local_path and bucket:
        raise ConfigError("local_path and bucket_name are mutually exclusive")
    if bucket and not region:
        raise ConfigError("'bucket_region' option is mandatory if 'bucket_name' is given ")
    if region and not bucket:
        raise ConfigError("'bucket_name' option is mandatory if 'bucket_region' is given ")
    if not local_path and not bucket:
        raise ConfigError("no 'local_path' nor 'bucket_name' option")
    prefix = table.string("prefix_in_bucket")
    conf = RemoteStorageConf(
        local_path=workdir / local_path if local_path else None,
        bucket_name=bucket,
        bucket_region=region,
        prefix_in_bucket=prefix.strip("/") if prefix else None,
        endpoint=_endpoint(table),
        access_key_id=table.string("access_key_id"),
        secret_access_key=table.string("secret_access_key"),
        max_concurrent_sync=table.integer("max_concurrent_sync", 100, minimum=1),
        max_sync_errors=table.integer("max_sync_errors", 10, minimum=1),
    )
    table.refuse_unknown()
    return conf


def _endpoint(table: ConfigTable) -> str | None:
    url = table.string("endpoint")
    if url is not None and not re.fullmatch(r"https?://[^/\s]+\S*", url):
        raise ConfigError(
            f"configure option remote_storage.endpoint: '{url}' is not a URL such as"
            " 'http://127.0.0.1:9000'"
        )
    return url


def ineffective_settings(conf: PageServerConf) -> list[str]:
    """Warnings about settings that are right and yet do nothing in this version."""
    if conf.remote_storage is None:
        return []
    return [
        f"remote_storage is set to {conf.remote_storage}, but this version does not upload"
        " anything: the layers are on the local disk only"
    ]
