"""What one WAL record changes, collected first and then applied as a whole.

For the records that Python handles. `CurrentState` is the cluster as of the record before, held in
memory while ingesting; reading the store instead would miss what is not published yet.
"""

from collections.abc import Iterable

from pageserver import keys
from pageserver._ingest import IngestLoop
from pageserver.directories import (
    encode_databases,
    encode_numbers,
    encode_origins,
    encode_tablespaces,
)
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.size_table import SizeTable
from pageserver.values import IMAGE_FLAGS, ValueKind, value_flags
from postgres_ffi.relfile import MAX_FORKNUM, RelTag
from postgres_ffi.slru import SlruKind, page_position

_DATABASE_KIND = 255  # KIND_DATABASE of the size table: has no key of its own

# So many blocks that go at once are deleted as a range of keys, so that their space comes back with
# the next garbage collection. Fewer wait for the next image layer, which leaves them out: a deleted
# range costs a file of its own for a while.
_DELETE_RANGE_BLOCKS = 128


class CurrentState:
    """Directories, checkpoint and sizes as of the last ingested record."""

    def __init__(self, datadir: DatadirTimeline, sizes: SizeTable) -> None:
        self.datadir = datadir
        self.sizes = sizes
        lsn = datadir.timeline.last_record_lsn
        self.checkpoint = datadir.timeline.get(keys.CHECKPOINT_KEY, lsn)
        self.databases = datadir.list_dbs(lsn)
        self.segments = {kind: frozenset(datadir.slru_segments(kind, lsn)) for kind in SlruKind}
        self.twophase = frozenset(datadir.twophase_xids(lsn))
        self.origins = datadir.replication_origins(lsn)
        self.tablespaces = datadir.tablespaces(lsn)
        for spcnode, dbnode in self.databases:
            sizes.set(_DATABASE_KIND, spcnode, dbnode, 0, 0, 0)

    def load_size(self, kind: int, a: int, b: int, c: int, d: int) -> None:
        """Put what the store says about an object into the size table.

        Right only for what was not touched since the store was last published: everything that
        was is in the table already.
        """
        lsn = self.datadir.timeline.last_record_lsn
        size: int | None
        if kind == keys.KeyKind.RELATION:
            size = self.datadir.stored_fork_size(RelTag(a, b, c, d), lsn)
        elif c in self.segments[SlruKind(a)]:
            size = self.datadir.slru_segment_size(SlruKind(a), c, lsn)
        else:
            size = None
        self.sizes.set(kind, a, b, c, d, size)

    def size(self, kind: int, a: int, b: int, c: int, d: int) -> int | None:
        """Blocks of an object, None if it does not exist."""
        if not self.sizes.known(kind, a, b, c, d):
            self.load_size(kind, a, b, c, d)
        return self.sizes.get(kind, a, b, c, d)


class DatadirModification:
    """The changes of one record; nothing happens before `commit`.

    Reads see the changes made here. Every key is written at most once, directories at `commit`.
    """

    def __init__(self, state: CurrentState, loop: IngestLoop) -> None:
        self._state = state
        self._loop = loop
        self._values: dict[bytes, tuple[int, bytes]] = {}
        self._sizes: dict[tuple[int, int, int, int, int], int | None] = {}
        self._deleted: list[tuple[bytes, bytes]] = []
        self._xids: list[int] = []
        self._grown = 0
        self._checkpoint: bytearray | None = None
        self._counters: tuple[int, int, int] | None = None
        self._multis: list[tuple[int, int]] = []
        self._databases: dict[tuple[int, int], bool] | None = None
        self._segments: dict[SlruKind, set[int]] = {}
        self._twophase: set[int] | None = None
        self._origins: dict[int, int] | None = None
        self._tablespaces: dict[int, str] | None = None

    # ---- values

    def put_image(self, key: bytes, data: bytes) -> None:
        """The whole value of a key; for a block b"" is a page of zeros."""
        self._put(key, IMAGE_FLAGS, data)

    def put_record(self, key: bytes, kind: ValueKind, data: bytes, will_init: bool = False) -> None:
        """A change to the page at `key`; with `will_init` to a page of zeros."""
        self._put(key, value_flags(kind, will_init), data)

    def _put(self, key: bytes, flags: int, data: bytes) -> None:
        if key in self._values:
            raise AssertionError(f"key {keys.key_text(key)} is written twice by one record")
        self._values[key] = (flags, data)

    # ---- relations

    def fork_size(self, rel: RelTag) -> int | None:
        """Blocks of a fork, None if it does not exist."""
        return self._size(keys.KeyKind.RELATION, *rel[:3], rel.forknum)

    def set_fork_size(self, rel: RelTag, nblocks: int) -> None:
        """Create a fork or change its size; pages that are added must be put, too."""
        self.add_database(rel.spcnode, rel.dbnode)
        if (self.fork_size(rel) or 0) - nblocks >= _DELETE_RANGE_BLOCKS:
            self._deleted.append(keys.fork_range(rel, nblocks))
        self._set_fork_size(rel, nblocks)

    def drop_relation(self, spcnode: int, dbnode: int, relnode: int) -> None:
        """Remove all forks of a relation."""
        dropped = 0
        for forknum in range(MAX_FORKNUM + 1):
            fork = RelTag(spcnode, dbnode, relnode, forknum)
            nblocks = self.fork_size(fork)
            if nblocks is not None:
                dropped += nblocks
                self._set_fork_size(fork, None)
        if dropped >= _DELETE_RANGE_BLOCKS:
            self._deleted.append(keys.relation_range(spcnode, dbnode, relnode))

    def _set_fork_size(self, rel: RelTag, nblocks: int | None) -> None:
        self._grown += (nblocks or 0) - (self.fork_size(rel) or 0)
        self._sizes[keys.KeyKind.RELATION, *rel[:3], rel.forknum] = nblocks

    def _size(self, *what: int) -> int | None:
        if what in self._sizes:
            return self._sizes[what]
        return self._state.size(*what)

    # ---- databases

    @property
    def databases(self) -> dict[tuple[int, int], bool]:
        """(spcnode, dbnode) -> has a relation map file."""
        return self._state.databases if self._databases is None else self._databases

    def add_database(self, spcnode: int, dbnode: int, *, has_relmap: bool | None = None) -> None:
        """Enter a database; what is known of its relation map stays unless it is said."""
        known = self.databases.get((spcnode, dbnode))
        wanted = bool(known) if has_relmap is None else has_relmap
        if known is None or known != wanted:
            self._databases = {**self.databases, (spcnode, dbnode): wanted}
            self._sizes[_DATABASE_KIND, spcnode, dbnode, 0, 0] = 0

    def drop_database(
        self,
        spcnode: int,
        dbnode: int,
        forks: Iterable[tuple[RelTag, int]],
        *,
        replaced: bool = False,
    ) -> None:
        """Remove a database; `forks` are all it has, with their sizes before this record.

        With `replaced` the same record makes another one of that name: blocks that it puts must
        not be deleted by it, so all are left to the next image layer.
        """
        dropped = 0
        for rel, nblocks in forks:
            dropped += nblocks
            self._sizes[keys.KeyKind.RELATION, *rel[:3], rel.forknum] = None
        self._grown -= dropped
        if dropped >= _DELETE_RANGE_BLOCKS and not replaced:
            self._deleted.append(keys.database_range(spcnode, dbnode))
        self._databases = {k: v for k, v in self.databases.items() if k != (spcnode, dbnode)}
        self._sizes[_DATABASE_KIND, spcnode, dbnode, 0, 0] = None

    # ---- SLRUs

    def slru_segments(self, kind: SlruKind) -> frozenset[int]:
        """Numbers of the existing segments."""
        changed = self._segments.get(kind)
        return self._state.segments[kind] if changed is None else frozenset(changed)

    def slru_page_exists(self, kind: SlruKind, page: int) -> bool:
        """Whether the page was ever created."""
        segno, blkno = page_position(page)
        return blkno < (self._size(keys.KeyKind.SLRU, kind, 1, segno, 0) or 0)

    def put_slru_zero_page(self, kind: SlruKind, page: int) -> None:
        """Create or clear a page."""
        self._extend_slru(kind, page)
        self.put_image(keys.slru_block_key(kind, *page_position(page)), b"")

    def put_slru_record(self, kind: SlruKind, page: int, value: ValueKind, data: bytes) -> None:
        """A change to a page, which is created from zeros if it does not exist."""
        created = self._extend_slru(kind, page)
        self.put_record(keys.slru_block_key(kind, *page_position(page)), value, data, created)

    def drop_slru_segment(self, kind: SlruKind, segno: int) -> None:
        """Remove a segment if it exists."""
        if segno in self.slru_segments(kind):
            self._segments[kind] = set(self.slru_segments(kind) - {segno})
            self._sizes[keys.KeyKind.SLRU, kind, 1, segno, 0] = None

    def _extend_slru(self, kind: SlruKind, page: int) -> bool:
        """Make the segment long enough; True if the page is new. Skipped pages become zeros."""
        segno, blkno = page_position(page)
        what = (keys.KeyKind.SLRU, kind, 1, segno, 0)
        nblocks = self._size(*what) or 0
        if blkno < nblocks:
            return False
        if segno not in self.slru_segments(kind):
            self._segments[kind] = set(self.slru_segments(kind) | {segno})
        for skipped in range(nblocks, blkno):
            self.put_image(keys.slru_block_key(kind, segno, skipped), b"")
        self._sizes[what] = blkno + 1
        return True

    # ---- the rest

    @property
    def twophase(self) -> frozenset[int]:
        """xids of the prepared transactions."""
        return self._state.twophase if self._twophase is None else frozenset(self._twophase)

    def add_twophase(self, xid: int, data: bytes) -> None:
        """A prepared transaction."""
        self._twophase = set(self.twophase | {xid})
        self.put_image(keys.twophase_key(xid), data)

    def drop_twophase(self, xid: int) -> None:
        """The end of a prepared transaction."""
        if xid in self.twophase:
            self._twophase = set(self.twophase - {xid})

    @property
    def origins(self) -> dict[int, int]:
        """Replication origin id -> remote LSN."""
        return self._state.origins if self._origins is None else self._origins

    def set_origin(self, origin: int, remote_lsn: int | None) -> None:
        """Progress of a replication origin; None: it is dropped."""
        origins = {key: lsn for key, lsn in self.origins.items() if key != origin}
        if remote_lsn is not None:
            origins[origin] = remote_lsn
        self._origins = origins

    def set_tablespace(self, spcnode: int, location: str | None) -> None:
        """A tablespace's location; None: it is dropped."""
        current = self._state.tablespaces if self._tablespaces is None else self._tablespaces
        tablespaces = {key: value for key, value in current.items() if key != spcnode}
        if location is not None:
            tablespaces[spcnode] = location
        self._tablespaces = tablespaces

    def checkpoint_fields(self) -> dict[str, int | bool]:
        """The fields of CheckPoint; its counters are those of `counters`."""
        return self._state.datadir.version.checkpoint.unpack(
            self._state.checkpoint if self._checkpoint is None else self._checkpoint
        )

    def set_checkpoint_fields(self, **values: int | bool) -> None:
        """Change fields of CheckPoint."""
        if self._checkpoint is None:
            self._checkpoint = bytearray(self._state.checkpoint)
        self._state.datadir.version.checkpoint.pack_into(self._checkpoint, values)

    @property
    def counters(self) -> tuple[int, int, int]:
        """Next full transaction id, multixact id and member offset before this record."""
        loop = self._loop
        return loop.next_xid, loop.next_multi, loop.next_multi_offset

    def set_counters(self, next_xid: int, next_multi: int, next_multi_offset: int) -> None:
        """Replace the counters."""
        self._counters = (next_xid, next_multi, next_multi_offset)

    def see_xid(self, xid: int) -> None:
        """The next transaction id lies above `xid`."""
        self._xids.append(xid)

    def see_multi(self, next_multi: int, next_offset: int) -> None:
        """The multixact counters are at least these."""
        self._multis.append((next_multi, next_offset))

    # ---- the end

    def put_now(self, key: bytes, data: bytes) -> None:
        """Write an image past the collected ones, for what is too big to collect.

        From here on a failure leaves ingestion unusable, see `IngestLoop.dirty`.
        """
        self._loop.put(key, IMAGE_FLAGS, data)

    def commit(self) -> None:
        """Write everything, then make it the current state."""
        for start, end in self._deleted:
            self._loop.delete_range(start, end)
        self._put_directories()
        for what, size in self._sizes.items():
            key = _size_key(what)
            if key is not None:
                self.put_image(key, keys.encode_size(size))
        for key, (flags, data) in self._values.items():
            self._loop.put(key, flags, data)
        self._update_state()

    def _put_directories(self) -> None:
        if self._databases is not None:
            self.put_image(keys.DATABASE_DIRECTORY_KEY, encode_databases(self._databases))
        for kind, segments in self._segments.items():
            self.put_image(keys.slru_directory_key(kind), encode_numbers(segments))
        if self._twophase is not None:
            self.put_image(keys.TWOPHASE_DIRECTORY_KEY, encode_numbers(self._twophase))
        if self._origins is not None:
            self.put_image(keys.ORIGINS_KEY, encode_origins(self._origins))
        if self._tablespaces is not None:
            self.put_image(keys.TABLESPACES_KEY, encode_tablespaces(self._tablespaces))
        if self._checkpoint is not None and self._checkpoint != self._state.checkpoint:
            self.put_image(keys.CHECKPOINT_KEY, bytes(self._checkpoint))

    def _update_state(self) -> None:
        state, loop = self._state, self._loop
        for what, size in self._sizes.items():
            state.sizes.set(*what, size)
        loop.add_blocks(self._grown)
        if self._databases is not None:
            state.databases = self._databases
        for kind, segments in self._segments.items():
            state.segments[kind] = frozenset(segments)
        if self._twophase is not None:
            state.twophase = frozenset(self._twophase)
        if self._origins is not None:
            state.origins = self._origins
        if self._tablespaces is not None:
            state.tablespaces = self._tablespaces
        if self._checkpoint is not None:
            state.checkpoint = bytes(self._checkpoint)
        if self._counters is not None:
            loop.set_counters(*self._counters)
        for xid in self._xids:
            loop.see_xid(xid)
        for multi, offset in self._multis:
            loop.see_multi(multi, offset)


def _size_key(what: tuple[int, int, int, int, int]) -> bytes | None:
    kind, a, b, c, d = what
    if kind == keys.KeyKind.RELATION:
        return keys.rel_size_key(RelTag(a, b, c, d))
    if kind == keys.KeyKind.SLRU:
        return keys.slru_size_key(SlruKind(a), c)
    return None
