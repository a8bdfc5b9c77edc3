"""A Postgres data directory as it was at an LSN, read from a timeline of the value store."""

from collections.abc import Iterator, Sequence

from pageserver import keys
from pageserver.directories import (
    decode_databases,
    decode_numbers,
    decode_origins,
    decode_tablespaces,
)
from pageserver.layered_repository.timeline import Timeline, TimelineWriter
from pageserver.logical_size import EndOfWal, LogicalSize
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.page import BLCKSZ, ZERO_PAGE
from postgres_ffi.relfile import (
    FSM_FORKNUM,
    GLOBALTABLESPACE_OID,
    VISIBILITYMAP_FORKNUM,
    RelTag,
)
from postgres_ffi.slru import SLRU_PAGES_PER_SEGMENT, SlruKind
from postgres_ffi.versions import PgVersion
from postgres_ffi.xlog_records import parse_parameter_change
from zenith_utils.lsn import lsn_text

_READ_AT_ONCE = 256  # pages or keys in one vectored read
_SCAN = 64  # pages of one read that are taken for part of a scan
_MAX_CACHED_SIZES = 1 << 16


class RelationNotFound(LookupError):
    """The relation fork does not exist at the LSN."""


class MissingPageError(Exception):
    """A page that must exist has no value: the stored history is incomplete."""


class DatadirTimeline:
    """Reads of a timeline in terms of relations, SLRUs and files. Safe for many threads.

    Every `lsn` must have been reached (`timeline.wait_lsn`) and must not be older than what is
    kept. Store errors pass through: KeyNotFound for what every cluster has but this LSN has not.
    """

    def __init__(self, timeline: Timeline, version: PgVersion) -> None:
        self.timeline = timeline
        self.version = version
        self._sizes: dict[tuple[RelTag, int], int | None] = {}
        self._logical_size = LogicalSize(timeline, self.logical_size)

    # ---- relations

    def rel_exists(self, rel: RelTag, lsn: int) -> bool:
        """Whether the fork exists."""
        return self._fork_size(rel, lsn) is not None

    def get_rel_size(self, rel: RelTag, lsn: int) -> int:
        """Blocks of the fork; a missing FSM or VM has 0. RelationNotFound for other forks."""
        nblocks = self._fork_size(rel, lsn)
        if nblocks is not None:
            return nblocks
        if rel.forknum in (FSM_FORKNUM, VISIBILITYMAP_FORKNUM):
            return 0
        raise RelationNotFound(f"relation {rel} does not exist at {lsn_text(lsn)}")

    def get_rel_page(self, rel: RelTag, blkno: int, lsn: int) -> bytes:
        """8192 bytes; zeros beyond the end of the fork or if it does not exist."""
        return self.get_rel_pages(rel, blkno, 1, lsn)[0]

    def get_rel_pages(self, rel: RelTag, blkno: int, count: int, lsn: int) -> list[bytes]:
        """`count` consecutive pages from `blkno` on, as `get_rel_page` gives them."""
        stored = min(max((self._fork_size(rel, lsn) or 0) - blkno, 0), count)
        if stored == 0:
            return [ZERO_PAGE] * count
        pages = self._pages([keys.rel_block_key(rel, blkno + i) for i in range(stored)], lsn)
        return pages + [ZERO_PAGE] * (count - stored)

    def list_rels(self, spcnode: int, dbnode: int, lsn: int) -> list[RelTag]:
        """All forks of a database, sorted."""
        return [rel for rel, _ in self.database_sizes(spcnode, dbnode, lsn)]

    def database_sizes(self, spcnode: int, dbnode: int, lsn: int) -> list[tuple[RelTag, int]]:
        """All forks of a database with their blocks, sorted."""
        sizes = []
        size_keys = self.timeline.scan_keys(*keys.rel_size_range(spcnode, dbnode), lsn)
        for key, value in zip(size_keys, self._values(size_keys, lsn), strict=True):
            nblocks = keys.decode_size(value)
            if nblocks is not None:
                sizes.append((keys.rel_of_size_key(key), nblocks))
        sizes.sort()
        return sizes

    def relation_sizes(self, lsn: int) -> list[tuple[RelTag, int]]:
        """All forks of the cluster with their blocks, sorted."""
        sizes = []
        for spcnode, dbnode in sorted(self.list_dbs(lsn)):
            sizes += self.database_sizes(spcnode, dbnode, lsn)
        return sizes

    def logical_size(self, lsn: int) -> int:
        """Bytes of all relation forks, added up."""
        return BLCKSZ * sum(nblocks for _, nblocks in self.relation_sizes(lsn))

    def current_logical_size(self) -> int | None:
        """The same at the end of the WAL; see `LogicalSize.current`."""
        return self._logical_size.current()

    def end_of_wal(self, *, sized: bool = True, recount: bool = False) -> EndOfWal:
        """Where the WAL ends, and the size there; see `LogicalSize.end_of_wal`."""
        return self._logical_size.end_of_wal(sized=sized, recount=recount)

    def _fork_size(self, rel: RelTag, lsn: int) -> int | None:
        # what was true at an LSN that has been reached never changes
        cached = self._sizes.get((rel, lsn), -1)
        if cached != -1:
            return cached
        nblocks = self.stored_fork_size(rel, lsn)
        if len(self._sizes) >= _MAX_CACHED_SIZES:
            self._sizes = {}
        self._sizes[rel, lsn] = nblocks
        return nblocks

    def stored_fork_size(self, rel: RelTag, lsn: int) -> int | None:
        """Blocks of the fork, None if it does not exist; not cached."""
        (value,) = self.timeline.get_vectored([keys.rel_size_key(rel)], lsn)
        return keys.decode_size(value)

    # ---- databases

    def list_dbs(self, lsn: int) -> dict[tuple[int, int], bool]:
        """(spcnode, dbnode) -> whether it has a relation map file."""
        return decode_databases(self.timeline.get(keys.DATABASE_DIRECTORY_KEY, lsn))

    def relmap(self, spcnode: int, dbnode: int, lsn: int) -> bytes:
        """pg_filenode.map of a database, or of the shared catalogs (1664, 0)."""
        if spcnode == GLOBALTABLESPACE_OID:
            dbnode = 0
        return self.timeline.get(keys.relmap_key(spcnode, dbnode), lsn)

    def tablespaces(self, lsn: int) -> dict[int, str]:
        """Oid -> location of each tablespace made by the user; empty if inside the directory."""
        return decode_tablespaces(self.timeline.get(keys.TABLESPACES_KEY, lsn))

    # ---- SLRUs

    def slru_segments(self, kind: SlruKind, lsn: int) -> list[int]:
        """Numbers of the segments of an SLRU, sorted."""
        return sorted(decode_numbers(self.timeline.get(keys.slru_directory_key(kind), lsn)))

    def slru_segment_size(self, kind: SlruKind, segno: int, lsn: int) -> int:
        """Pages of a segment."""
        return keys.decode_size(self.timeline.get(keys.slru_size_key(kind, segno), lsn)) or 0

    def slru_page(self, kind: SlruKind, segno: int, blkno: int, lsn: int) -> bytes:
        """A page of a segment (`blkno` 0..31)."""
        return self._pages([keys.slru_block_key(kind, segno, blkno)], lsn)[0]

    def slru_segment(self, kind: SlruKind, segno: int, lsn: int) -> bytes:
        """All pages of a segment."""
        size = self.slru_segment_size(kind, segno, lsn)
        pages = self._pages([keys.slru_block_key(kind, segno, i) for i in range(size)], lsn)
        return b"".join(pages)

    # ---- the rest

    def twophase_xids(self, lsn: int) -> list[int]:
        """The transactions that are prepared, sorted."""
        return sorted(decode_numbers(self.timeline.get(keys.TWOPHASE_DIRECTORY_KEY, lsn)))

    def twophase_files(self, lsn: int) -> dict[int, bytes]:
        """xid -> state data (without CRC) of the prepared transactions."""
        xids = self.twophase_xids(lsn)
        return {xid: self.timeline.get(keys.twophase_key(xid), lsn) for xid in xids}

    def control_file(self, lsn: int) -> bytes:
        """pg_control as imported, with the parameters that WAL has changed since."""
        control = self.timeline.get(keys.CONTROL_FILE_KEY, lsn)
        (parameters,) = self.timeline.get_vectored([keys.PARAMETERS_KEY], lsn)
        if not parameters:
            return control
        changes = parse_parameter_change(parameters).control_fields()
        return parse_control_file(control).with_fields(changes).file_bytes()

    def checkpoint(self, lsn: int) -> bytes:
        """CheckPoint struct: what a shutdown checkpoint at `lsn` would say, `redo` apart."""
        checkpoint = bytearray(self.timeline.get(keys.CHECKPOINT_KEY, lsn))
        next_xid, next_multi, next_multi_offset = self.counters(lsn)
        self.version.checkpoint.pack_into(
            checkpoint,
            {
                "next_xid": next_xid,
                "next_multi": next_multi,
                "next_multi_offset": next_multi_offset,
            },
        )
        return bytes(checkpoint)

    def counters(self, lsn: int) -> tuple[int, int, int]:
        """Next full transaction id, next multixact id, next multixact member offset."""
        return keys.decode_counters(self.timeline.get(keys.COUNTERS_KEY, lsn))

    def commit_time(self, lsn: int) -> keys.CommitTime:
        """When the newest transactions at `lsn` ended; keys.BEFORE_COMMITS if none has."""
        (value,) = self.timeline.get_vectored([keys.COMMIT_TIME_KEY], lsn)
        return keys.decode_commit_time(value)

    def replication_origins(self, lsn: int) -> dict[int, int]:
        """Origin id -> remote LSN up to which it was replayed."""
        return decode_origins(self.timeline.get(keys.ORIGINS_KEY, lsn))

    # ---- all of it

    def collect_keyspace(self, lsn: int) -> list[tuple[bytes, bytes]]:
        """The [start, end) ranges of all live keys, sorted: what a new image has to contain."""
        ranges = [_single(keys.DATABASE_DIRECTORY_KEY)]
        for (spcnode, dbnode), has_relmap in sorted(self.list_dbs(lsn).items()):
            if has_relmap:
                ranges.append(_single(keys.relmap_key(spcnode, dbnode)))
            sizes = self.database_sizes(spcnode, dbnode, lsn)
            ranges += sorted(_single(keys.rel_size_key(rel)) for rel, _ in sizes)
            for rel, nblocks in sizes:
                if nblocks:
                    last = keys.rel_block_key(rel, nblocks - 1)
                    ranges.append((keys.rel_block_key(rel, 0), keys.next_key(last)))
        for kind in SlruKind:
            ranges.append(_single(keys.slru_directory_key(kind)))
            for segno in self.slru_segments(kind, lsn):
                last = keys.slru_block_key(kind, segno, SLRU_PAGES_PER_SEGMENT - 1)
                ranges.append((keys.slru_block_key(kind, segno, 0), keys.next_key(last)))
                ranges.append(_single(keys.slru_size_key(kind, segno)))
        ranges.append(_single(keys.TWOPHASE_DIRECTORY_KEY))
        ranges += [_single(keys.twophase_key(xid)) for xid in self.twophase_xids(lsn)]
        ranges.append((keys.CONTROL_FILE_KEY, keys.next_key(keys.COMMIT_TIME_KEY)))
        ranges += [_single(keys.ORIGINS_KEY), _single(keys.TABLESPACES_KEY)]
        return ranges

    def publish(self, writer: TimelineWriter, lsn: int, prev_lsn: int, grown: int) -> None:
        """Ingestion's `writer.advance`; relations have grown by `grown` blocks since the last."""
        self._logical_size.publish(writer, lsn, prev_lsn, grown * BLCKSZ)
        writer.make_room()

    def _pages(self, block_keys: Sequence[bytes], lsn: int) -> list[bytes]:
        pages = []
        # A scan must not drive what is read again and again out of the page cache.
        cache = len(block_keys) < _SCAN
        for key, page in zip(block_keys, self._values(block_keys, lsn, cache=cache), strict=True):
            if page is None:
                raise MissingPageError(
                    f"page {keys.key_text(key)} has no value at {lsn_text(lsn)}"
                    f" on timeline {self.timeline.timeline_id}"
                )
            pages.append(page or ZERO_PAGE)
        return pages

    def _values(
        self, wanted: Sequence[bytes], lsn: int, *, cache: bool = True
    ) -> Iterator[bytes | None]:
        for start in range(0, len(wanted), _READ_AT_ONCE):
            block = wanted[start : start + _READ_AT_ONCE]
            yield from self.timeline.get_vectored(block, lsn, cache=cache)


def _single(key: bytes) -> tuple[bytes, bytes]:
    return key, keys.next_key(key)
