"""Layer files: a name, and while it is in use an open file."""
import os
import threading
from dataclasses import dataclass

from libc.stdint cimport int64_t, uint8_t, uint64_t

from pageserver.layered_repository.block_cache cimport BlockCache, new_file_number
from pageserver.layered_repository.errors import LayerGoneError
from pageserver.layered_repository.io_stats cimport IoStats
from pageserver.layered_repository.key cimport Key, key_bytes, key_equal, key_less, key_parse
from pageserver.layered_repository.key_filter cimport filter_lines_for
from pageserver.layered_repository.layer_block cimport (
    E_FILTER,
    ReadError,
    Scratch,
    read_failed,
    scratch_give,
    scratch_take,
)
from pageserver.layered_repository.layer_format cimport *
from pageserver.layered_repository.layer_leaf cimport (
    LeafEntryView,
    leaf_at,
    leaf_entry,
    leaf_key,
    leaf_lsn,
)
from pageserver.layered_repository.layer_scan cimport LayerScan
from pageserver.layered_repository.open_layer cimport OpenLayer
from pageserver.layered_repository.read_batch cimport ReadBatch


@dataclass(frozen=True)
class LayerStats:
    """What verify() found in a layer file.

    size and value_bytes are bytes of the file and of the values as they were put; value_blocks of
    which packed_blocks are compressed; leaves, filter_lines of 64 bytes.
    """

    size: int
    entries: int
    keys: int
    value_bytes: int
    value_blocks: int
    packed_blocks: int
    leaves: int
    filter_lines: int


cdef class LayerFile:
    """A durable delta or image layer; safe for any number of threads.

    `name` is its LayerName, ids are 16 bytes each. The file is opened when it is first used and its
    header checked against all of them; the DescriptorCache `descriptors` may close it in between,
    and its `blocks` keep what reads have verified until they need the room or this object goes.
    `size` is that of the file in bytes, where it is known; `io` counts what is read. Whoever removes the file sets `gone`
    before.

    Every method that reads raises CorruptLayerError (with `path` and `offset`) if what is read is
    not what was written, FormatVersionError, LayerGoneError if the file was removed before it could
    be opened, ZstdUnavailable and OSError.
    """

    def __cinit__(self, path, name, bytes tenant not None, bytes timeline not None, *,
                  descriptors=None, size=None, IoStats io=None):
        self.path = os.fspath(path)
        self.name = name
        self.key_start = name.key_start
        self.key_end = name.key_end
        self.start_lsn = name.start_lsn
        self.end_lsn = name.end_lsn
        self.is_image = name.is_image
        self.tenant = tenant
        self.timeline = timeline
        self.descriptors = descriptors
        self.blocks = None if descriptors is None else descriptors.blocks
        self.known_size = size
        self.io = io
        self.lock = threading.Lock()

    def __dealloc__(self):
        self._forget_blocks()

    def __repr__(self):
        return f"LayerFile({self.path!r})"

    # ---- opening and closing

    cpdef OpenLayer open(self):
        """The open file; it stays readable for as long as the caller keeps it."""
        cdef OpenLayer opened = self.opened
        self.used = True
        return opened if opened is not None else self._open()

    cdef OpenLayer _open(self):
        cdef OpenLayer opened
        with self.lock:
            opened = self.opened
            if opened is not None:
                return opened
            try:
                opened = OpenLayer(
                    self.path, self.name, self.tenant, self.timeline, self.blocks, self.io)
            except FileNotFoundError as error:
                if self.gone:
                    raise LayerGoneError(f"{self.path}: the layer was removed") from error
                raise
            if opened.identity != self.identity:
                # Another layer of the same name may have taken its place since it was open.
                self._forget_blocks()
                self.identity = opened.identity
                self.number = new_file_number()
            opened.number = self.number
            self.opened = opened
            self.known_size = opened.size
            if self.descriptors is not None:
                self.descriptors.admit(self, opened.memory)
            return opened

    cdef void _forget_blocks(self) noexcept:
        if self.blocks is not None and self.number:
            with nogil:
                self.blocks.forget(self.number)

    def was_used(self):
        """Whether the file was used since the last call; for the descriptor cache."""
        cdef bint used = self.used
        self.used = False
        return used

    def evict(self):
        """Close the file as soon as no reader is in it; for the descriptor cache."""
        self.opened = None

    @property
    def is_open(self):
        """Whether the file is open."""
        return self.opened is not None

    @property
    def size(self):
        """Size of the file in bytes. Raises OSError."""
        if self.known_size is None:
            self.known_size = os.stat(self.path).st_size
        return self.known_size

    # ---- lookups

    def may_contain(self, bytes key not None):
        """False only if the layer certainly has no value of the key; cheap once it is open."""
        cdef Key parsed
        key_parse(&parsed, key)
        return self.open().may_contain(&parsed)

    cpdef read(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor):
        """Add to the queries [first, last) of `batch` their values with floor <= LSN <= upper."""
        cdef OpenLayer opened = self.open()
        cdef ReadError error
        cdef int code
        if batch is None or first < 0 or last > batch.count:
            raise IndexError("no such query")
        if last - first == 1 and not opened.may_contain(&batch.queries[first].key):
            return
        with nogil:
            code = opened.collect(batch, first, last, upper, floor, &error)
        if code != 0:
            opened.raise_error(&error)

    def keys(self, bytes start not None, bytes end not None, uint64_t upper, uint64_t floor):
        """The keys in [start, end) with a value in floor <= LSN <= upper, ascending."""
        cdef OpenLayer opened = self.open()
        cdef Scratch *s
        cdef Key low, high, key, previous
        cdef int64_t number
        cdef int at, code
        cdef bint any_found = False
        cdef uint64_t lsn
        cdef list result = []
        key_parse(&low, start)
        key_parse(&high, end)
        previous = low
        s = scratch_take()
        if s == NULL:
            raise MemoryError
        try:
            number = max(opened.find_leaf(&low, 0), 0)
            while number < opened.n_fences and key_less(&opened.fences[number].key, &high):
                with nogil:
                    code = opened.load_leaf(s, number)
                if code != 0:
                    opened.raise_error(&s.error)
                for at in range(s.leaf.count):
                    leaf_key(&s.leaf, leaf_at(&s.leaf, at), &key)
                    if key_less(&key, &low) or (any_found and key_equal(&key, &previous)):
                        continue
                    if not key_less(&key, &high):
                        break
                    lsn = leaf_lsn(&s.leaf, leaf_at(&s.leaf, at))
                    if floor <= lsn <= upper:
                        result.append(key_bytes(&key))
                        previous = key
                        any_found = True
                number += 1
        finally:
            scratch_give(s)
        return result

    # ---- everything in it

    def entries(self):
        """All values as (key, lsn, flags, data), in the order of (key, lsn); see LayerScan."""
        return iter(LayerScan(self))

    def leaf_entries(self, int64_t number):
        """The values of one leaf, as `entries` gives them. Raises IndexError."""
        cdef OpenLayer opened = self.open()
        cdef Scratch *s
        cdef LeafEntryView entry
        cdef const uint8_t *data = NULL
        cdef int at, code
        cdef list result = []
        if not 0 <= number < opened.n_fences:
            raise IndexError("no such leaf")
        s = scratch_take()
        if s == NULL:
            raise MemoryError
        try:
            with nogil:
                code = opened.load_leaf(s, number)
            if code != 0:
                opened.raise_error(&s.error)
            for at in range(s.leaf.count):
                leaf_entry(&s.leaf, leaf_at(&s.leaf, at), &entry)
                with nogil:
                    code = opened.load_value(s, entry.block, entry.at, entry.size, &data)
                if code != 0:
                    opened.raise_error(&s.error)
                result.append((
                    key_bytes(&entry.key),
                    entry.lsn,
                    entry.flags,
                    (<const char *> data)[:entry.size],
                ))
        finally:
            scratch_give(s)
        return result

    def describe(self):
        """What the header says of sizes and counts, by name.

        stored_bytes: value blocks with their headers; index_bytes: leaves without theirs;
        block_target: bytes of values after which a block ends; codec: 0 none, 1 zstd.
        """
        cdef OpenLayer opened = self.open()
        return {
            "entries": opened.entry_count,
            "keys": opened.key_count,
            "size": opened.size,
            "value_bytes": opened.value_bytes,
            "stored_bytes": opened.leaf_offset - HEADER_SIZE,
            "leaves": opened.n_fences,
            "index_bytes": opened.index_bytes,
            "filter_lines": opened.filter_lines,
            "codec": opened.codec,
            "block_target": opened.block_target,
        }

    def verify(self):
        """Read and check every byte of the file; returns LayerStats.

        The header, the root and the filter are read anew, whatever is open. Beyond the checks of
        every read: order, ranges and counts of the entries, leaves against the root, that values
        and blocks leave no gap, and that the filter passes every key.
        """
        cdef OpenLayer opened
        cdef LayerScan scan
        cdef uint64_t lines
        cdef int result
        try:
            opened = OpenLayer(self.path, self.name, self.tenant, self.timeline)
        except FileNotFoundError as error:
            if self.gone:
                raise LayerGoneError(f"{self.path}: the layer was removed") from error
            raise
        scan = LayerScan(opened)
        with nogil:
            result = scan.next()
            while result == 1:
                if not opened.may_contain(&scan.key):
                    result = -1
                    read_failed(&scan.error, E_FILTER, opened.filter_offset)
                    break
                result = scan.next()
        if result < 0:
            scan.raise_error()
        lines = filter_lines_for(opened.key_count) if self.name.is_l0 else 0
        if opened.filter_lines != lines:
            read_failed(&scan.error, E_FILTER, opened.filter_offset)
            scan.raise_error()
        return LayerStats(
            size=opened.size,
            entries=scan.entry_count,
            keys=scan.key_count,
            value_bytes=scan.value_bytes,
            value_blocks=scan.block_count,
            packed_blocks=scan.packed_count,
            leaves=opened.n_fences,
            filter_lines=opened.filter_lines,
        )
