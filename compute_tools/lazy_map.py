"""Relation files that are there in name and size only, and the map of the blocks they lack.

The lazyfiles library, preloaded into Postgres, fetches a block from the pageserver when it is first
read. This module makes what it works on: sparse relation files and the map file, whose format is
`MapHeader` and what follows it in pgxn/lazyfiles/lazyfiles.h.
"""

from __future__ import annotations

import mmap
import os
import pwd
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from compute_tools._sparse_files import (
    ManifestError,
    create_files,
    databases,
    fork_table,
    write_blocks,
)
from compute_tools.auth import AUTH_TOKEN_VARIABLE
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

MANIFEST_MAGIC: Final = b"ZNMANIF1"
MAP_MAGIC: Final = b"ZNLAZYF1"
MAP_VERSION: Final = 1

# Says to the zenith library that the directory must not be used without lazyfiles.
MARKER: Final = Path("pg_stat/zenith.lazyfiles")

_DEFAULT_TABLESPACE = 1663
_GLOBAL_TABLESPACE = 1664
_CATALOG_VERSION_OFFSET = 12  # ControlFileData.catalog_version_no, catalog/pg_control.h
_FORK_ENTRY = 32
_FLAG_CHECKSUMS = 1

# MapHeader up to, not including, its crc; then the crc; statistics lie at 2048.
_HEADER = struct.Struct("<8sIIQQIIQQQQ64s")
_HEADER_SIZE = 4096
_STATISTICS_OFFSET = 2048
_STATISTICS = struct.Struct("<10Q")
_FSM_QUEUE_SIZE = 16384
_FSM_QUEUE_BYTES = 64 + 24 * _FSM_QUEUE_SIZE
_PAGE = 4096
_PRESENT = b"\3"


class LazyMapError(Exception):
    """The manifest, the start-up blocks or a map file cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class LazySummary:
    """What was made. `blocks` counts all blocks of the manifest, `startup_blocks` those written."""

    base_lsn: Lsn
    data_checksums: bool
    forks: int
    files: int
    blocks: int
    startup_blocks: int


@dataclass(frozen=True, slots=True)
class LazyStatistics:
    """Counters of the lazyfiles library since the map file was made (Statistics in lazyfiles.h)."""

    misses: int
    blocks_installed: int
    blocks_discarded: int
    requests: int
    readahead_requests: int
    wait_us: int
    connections: int
    reconnects: int
    errors: int
    blocks_overwritten: int
    blocks: int
    """Blocks of the map."""
    blocks_present: int
    """Blocks whose bytes are in the local files."""


@dataclass(frozen=True, slots=True)
class _Manifest:
    base_lsn: Lsn
    data_checksums: bool
    table: bytes
    nblocks: int


def create_lazy_files(
    datadir: Path,
    map_path: Path,
    manifest: bytes,
    startup_blocks: bytes,
    *,
    owner: pwd.struct_passwd | None,
) -> LazySummary:
    """Make sparse relation files, write the start-up blocks into them, and make the map file.

    `manifest` and `startup_blocks` are the entries `zenith.manifest` and `zenith.startup_blocks`
    of a base backup. `owner` (None: unchanged) gets all that is made. `datadir` and `map_path` may
    be renamed afterwards. Raises LazyMapError and OSError.
    """
    relations = _parse_manifest(manifest)
    blocks = _checked(startup_blocks, "start-up blocks")
    uid, gid = (-1, -1) if owner is None else (owner.pw_uid, owner.pw_gid)
    # Before the first hole is made: a half-made directory is refused as well.
    _make_marker(datadir, uid, gid)
    version = _tablespace_version(datadir)
    directories = _make_directories(datadir, relations.table, version, uid, gid)
    try:
        files = create_files(relations.table, list(directories.values()), uid, gid)
    except FileExistsError as e:
        raise LazyMapError(
            f"{e.filename} is in the base backup and in its manifest: make the backup again"
        ) from e
    written = _write_map(map_path, relations, version, blocks, directories, uid, gid)
    return LazySummary(
        base_lsn=relations.base_lsn,
        data_checksums=relations.data_checksums,
        forks=len(relations.table) // _FORK_ENTRY,
        files=files,
        blocks=relations.nblocks,
        startup_blocks=written,
    )


def lazyfiles_environment(
    module: Path,
    map_path: Path,
    *,
    pageserver: tuple[str, int],
    tenant_id: TenantId,
    timeline_id: TimelineId,
    auth_token: str | None = None,
    extensions: Sequence[Path] = (),
) -> dict[str, str]:
    """Environment variables that make a Postgres server use the map file.

    The library takes `auth_token` out of the environment at once, so that programs which the
    server runs do not get it.

    `module` is the built lazyfiles library, `pageserver` the (host, port) of the page service,
    `extensions` are the built libraries of extensions, with their other files beside them.
    """
    host, port = pageserver
    environment = {
        "LD_PRELOAD": str(module),
        "ZENITH_LAZYFILES_MAP": str(map_path.absolute()),
        "ZENITH_LAZYFILES_PAGESERVER": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "ZENITH_LAZYFILES_TENANT": str(tenant_id),
        "ZENITH_LAZYFILES_TIMELINE": str(timeline_id),
    }
    if auth_token is not None:
        environment[AUTH_TOKEN_VARIABLE] = auth_token
    if extensions:
        environment["ZENITH_LAZYFILES_EXTENSIONS"] = ":".join(str(e.absolute()) for e in extensions)
    return environment


def read_statistics(map_path: Path) -> LazyStatistics:
    """Counters of a map file, which may be in use. Raises LazyMapError and OSError."""
    with map_path.open("rb") as f:
        header = f.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise LazyMapError(f"{map_path} is too short for a map file")
        magic, version, _, _, size, _, _, nblocks, _, _, states, _ = _HEADER.unpack(header)
        if magic != MAP_MAGIC or version != MAP_VERSION or size != os.fstat(f.fileno()).st_size:
            raise LazyMapError(f"{map_path} is not a map file of version {MAP_VERSION}")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            counters = _STATISTICS.unpack_from(view, _STATISTICS_OFFSET)
            present = view[states : states + nblocks].count(_PRESENT)
    names = (field.name for field in fields(LazyStatistics))
    return LazyStatistics(**dict(zip(names, (*counters, nblocks, present), strict=True)))


def _checked(data: bytes, what: str) -> memoryview:
    """The data without the CRC-32C at its end."""
    if len(data) < 4:
        raise LazyMapError(f"{what} are too short: make the base backup again")
    body = memoryview(data)[:-4]
    if crc32c(body) != int.from_bytes(data[-4:], "little"):
        raise LazyMapError(f"checksum of the {what} does not match: make the base backup again")
    return body


def _parse_manifest(manifest: bytes) -> _Manifest:
    body = _checked(manifest, "manifest")
    if bytes(body[:8]) != MANIFEST_MAGIC or len(body) < 24:
        raise LazyMapError("this is not a relation manifest")
    base_lsn, count, flags = struct.unpack_from("<QII", body, 8)
    if len(body) != 24 + 24 * count:
        raise LazyMapError(f"the manifest does not hold the {count} entries it announces")
    try:
        table, nblocks = fork_table(body[24:])
    except ManifestError as e:
        raise LazyMapError(str(e)) from e
    return _Manifest(Lsn(base_lsn), bool(flags & _FLAG_CHECKSUMS), table, nblocks)


def _make_marker(datadir: Path, uid: int, gid: int) -> None:
    path = datadir / MARKER
    _make_directory(path.parent, datadir, uid, gid)
    path.write_text("Relation files here are incomplete: start with the lazyfiles library.\n")
    os.chown(path, uid, gid)


def _tablespace_version(datadir: Path) -> str:
    """TABLESPACE_VERSION_DIRECTORY of the cluster, such as PG_15_202209061."""
    major = (datadir / "PG_VERSION").read_text().strip()
    with (datadir / "global/pg_control").open("rb") as f:
        control = f.read(_CATALOG_VERSION_OFFSET + 4)
    if len(control) < _CATALOG_VERSION_OFFSET + 4:
        raise LazyMapError(f"{datadir}/global/pg_control is too short")
    return f"PG_{major}_{int.from_bytes(control[_CATALOG_VERSION_OFFSET:], 'little')}"


def _make_directories(
    datadir: Path, table: bytes, version: str, uid: int, gid: int
) -> dict[tuple[int, int], bytes]:
    """Directory of each (spcnode, dbnode) of the table, in the table's order."""
    directories = {}
    for spcnode, dbnode in databases(table):
        if spcnode == _GLOBAL_TABLESPACE:
            path = datadir / "global"
        elif spcnode == _DEFAULT_TABLESPACE:
            path = datadir / f"base/{dbnode}"
        else:
            path = datadir / f"pg_tblspc/{spcnode}/{version}/{dbnode}"
        _make_directory(path, datadir, uid, gid)
        directories[spcnode, dbnode] = os.fsencode(path)
    return directories


def _make_directory(path: Path, datadir: Path, uid: int, gid: int) -> None:
    """Make a directory below `datadir` with its parents; those made get the owner."""
    if path == datadir or path.is_dir():
        return
    _make_directory(path.parent, datadir, uid, gid)
    path.mkdir(mode=0o700)
    os.chown(path, uid, gid)


def _write_map(
    map_path: Path,
    relations: _Manifest,
    version: str,
    blocks: memoryview,
    directories: dict[tuple[int, int], bytes],
    uid: int,
    gid: int,
) -> int:
    """Make the map file, and write the start-up blocks; returns their number.

    The states are a hole at first: every block is absent.
    """
    queue = _HEADER_SIZE + len(relations.table)
    queue += -queue % 64
    states = queue + _FSM_QUEUE_BYTES
    states += -states % _PAGE
    size = states + relations.nblocks
    header = _HEADER.pack(
        MAP_MAGIC,
        MAP_VERSION,
        _HEADER_SIZE,
        relations.base_lsn,
        size,
        len(relations.table) // _FORK_ENTRY,
        _FSM_QUEUE_SIZE,
        relations.nblocks,
        _HEADER_SIZE,
        queue,
        states,
        version.encode(),
    )
    header += crc32c(relations.table, crc32c(header)).to_bytes(4, "little")
    map_path.unlink(missing_ok=True)
    fd = os.open(map_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchown(fd, uid, gid)
        # Allocated now: a hole that cannot be filled later would kill whoever writes through mmap.
        os.posix_fallocate(fd, 0, size)
        with mmap.mmap(fd, size) as view:
            view[: len(header)] = header
            view[_HEADER_SIZE : _HEADER_SIZE + len(relations.table)] = relations.table
            with memoryview(view) as whole, whole[states:] as block_states:
                return write_blocks(relations.table, directories, blocks, block_states)
    except ManifestError as e:
        raise LazyMapError(str(e)) from e
    finally:
        os.close(fd)
