"""What differs between major versions of PostgreSQL, one frozen table per version.

Nothing outside this module compares version numbers: another major version is another entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from .struct_layout import StructLayout


class Rmgr(IntEnum):
    """Resource manager ids (access/rmgrlist.h); the order is the same in 15 to 18."""

    XLOG = 0
    XACT = 1
    SMGR = 2
    CLOG = 3
    DBASE = 4
    TBLSPC = 5
    MULTIXACT = 6
    RELMAP = 7
    STANDBY = 8
    HEAP2 = 9
    HEAP = 10
    BTREE = 11
    HASH = 12
    GIN = 13
    GIST = 14
    SEQ = 15
    SPGIST = 16
    BRIN = 17
    COMMIT_TS = 18
    REPLORIGIN = 19
    GENERIC = 20
    LOGICALMSG = 21


MIN_CUSTOM_RMGR = 128  # RM_MIN_CUSTOM_ID: extensions' resource managers, up to 255


@dataclass(frozen=True, slots=True)
class PgVersion:
    """Numbers and layouts of one major version.

    `checkpoint` and `control_file` are the layouts of CheckPoint and ControlFileData
    (catalog/pg_control.h); `control_crc_offset` is where ControlFileData.crc lies, covering all
    bytes before it. `bimg_*` are the bits of XLogRecordBlockImageHeader.bimg_info.
    `sync_rep_minor` is the first minor release whose commits wait for the synchronous standby from
    the server's first moment on. `slru_page_code` is the `struct` code of a page number in SLRU
    records; `dropped_stats_size` and `invalidation_size` are the bytes of one xl_xact_stats_item
    and of one SharedInvalidationMessage in commit records.
    """

    major: int
    xlog_page_magic: int
    control_version: int
    catalog_version: int
    checkpoint: StructLayout
    control_file: StructLayout
    control_checkpoint_offset: int
    control_crc_offset: int
    bimg_has_hole: int
    bimg_apply: int
    bimg_compressed: int
    max_builtin_rmgr: int
    twophase_magic: int
    sync_rep_minor: int
    slru_page_code: str
    dropped_stats_size: int
    invalidation_size: int

    @property
    def tablespace_version_directory(self) -> str:
        """Directory inside a tablespace, e.g. `PG_15_202209061` (common/relpath.h)."""
        return f"PG_{self.major}_{self.catalog_version}"


def _layout(size: int, **fields: tuple[int, str]) -> StructLayout:
    return StructLayout(size, MappingProxyType(fields))


_CHECKPOINT_15 = _layout(
    88,
    redo=(0, "Q"),
    this_timeline_id=(8, "I"),
    prev_timeline_id=(12, "I"),
    full_page_writes=(16, "?"),
    next_xid=(24, "Q"),
    next_oid=(32, "I"),
    next_multi=(36, "I"),
    next_multi_offset=(40, "I"),
    oldest_xid=(44, "I"),
    oldest_xid_db=(48, "I"),
    oldest_multi=(52, "I"),
    oldest_multi_db=(56, "I"),
    time=(64, "q"),
    oldest_commit_ts_xid=(72, "I"),
    newest_commit_ts_xid=(76, "I"),
    oldest_active_xid=(80, "I"),
)

_CONTROL_FILE_15 = _layout(
    296,
    system_identifier=(0, "Q"),
    control_version=(8, "I"),
    catalog_version=(12, "I"),
    state=(16, "I"),
    time=(24, "q"),
    checkpoint=(32, "Q"),
    unlogged_lsn=(128, "Q"),
    min_recovery_point=(136, "Q"),
    min_recovery_point_tli=(144, "I"),
    backup_start_point=(152, "Q"),
    backup_end_point=(160, "Q"),
    backup_end_required=(168, "?"),
    wal_level=(172, "i"),
    wal_log_hints=(176, "?"),
    max_connections=(180, "i"),
    max_worker_processes=(184, "i"),
    max_wal_senders=(188, "i"),
    max_prepared_xacts=(192, "i"),
    max_locks_per_xact=(196, "i"),
    track_commit_timestamp=(200, "?"),
    max_align=(204, "I"),
    block_size=(216, "I"),
    relseg_size=(220, "I"),
    wal_block_size=(224, "I"),
    wal_segment_size=(228, "I"),
    data_checksum_version=(252, "I"),
)

VERSIONS: Mapping[int, PgVersion] = MappingProxyType(
    {
        15: PgVersion(
            major=15,
            xlog_page_magic=0xD110,
            control_version=1300,
            catalog_version=202209061,
            checkpoint=_CHECKPOINT_15,
            control_file=_CONTROL_FILE_15,
            control_checkpoint_offset=40,
            control_crc_offset=288,
            bimg_has_hole=0x01,
            bimg_apply=0x02,
            bimg_compressed=0x1C,
            max_builtin_rmgr=Rmgr.LOGICALMSG,
            twophase_magic=0x57F94534,
            # Before, none waited until the checkpointer had begun (commit ec59500a1).
            sync_rep_minor=13,
            slru_page_code="i",
            dropped_stats_size=12,
            invalidation_size=16,
        ),
    }
)


class UnsupportedVersionError(ValueError):
    """Data of a major version that Zenith has no table for."""


def _supported() -> str:
    return ", ".join(str(major) for major in sorted(VERSIONS))


def version_of_major(major: int) -> PgVersion:
    """The table of a major version; UnsupportedVersionError names the supported ones."""
    try:
        return VERSIONS[major]
    except KeyError:
        raise UnsupportedVersionError(
            f"PostgreSQL {major} is not supported (supported: {_supported()})"
        ) from None


def version_of_magic(xlog_page_magic: int) -> PgVersion:
    """The version whose WAL pages carry `xlog_page_magic`; UnsupportedVersionError if none."""
    for version in VERSIONS.values():
        if version.xlog_page_magic == xlog_page_magic:
            return version
    raise UnsupportedVersionError(
        f"no supported PostgreSQL writes WAL page magic {xlog_page_magic:04X}"
        f" (supported: {_supported()})"
    )


def version_of_catalog(control_version: int, catalog_version: int) -> PgVersion:
    """The version of a pg_control, by its two version numbers; UnsupportedVersionError if none."""
    for version in VERSIONS.values():
        if (version.control_version, version.catalog_version) == (control_version, catalog_version):
            return version
    raise UnsupportedVersionError(
        f"no supported PostgreSQL has pg_control version {control_version} with catalog version"
        f" {catalog_version} (supported: {_supported()})"
    )
