"""An open layer file: its descriptor, the index of its leaves, its key filter, and lookups.

Blocks are read with pread, so a failing disk or a truncated file is an error instead of a signal,
and the checksum of each one is verified whenever it comes from the file. What was right then is put
into the block cache, unpacked, and lookups look there first. The root, the first key of every leaf,
and the filter stay in memory as long as the file is open. A lookup needs one leaf and the blocks of
the values it finds; the neighbours asked for in one batch share them.

The object never changes, so any number of threads read it at once. The file is closed when the last
reference goes.
"""
import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp

from pageserver.layered_repository.block_cache cimport BlockCache, block_release
from pageserver.layered_repository.errors import CorruptLayerError, FormatVersionError
from pageserver.layered_repository.io_stats cimport IoStats, clock_seconds
from pageserver.layered_repository.key cimport (
    KEY_SIZE,
    WILL_INIT,
    Key,
    key_equal,
    key_less,
    key_load,
    key_store,
)
from pageserver.layered_repository.key_filter cimport (
    FILTER_LINE,
    filter_hash,
    filter_line,
    filter_may_contain,
)
from pageserver.layered_repository.layer_block cimport (
    E_CHECKSUM,
    E_IO,
    E_MALFORMED,
    E_NO_MEMORY,
    E_SHORT,
    Block,
    ReadError,
    Scratch,
    open_block,
    raise_read_error,
    read_failed,
    reserve,
    scratch_give,
    scratch_take,
)
from pageserver.layered_repository.layer_format cimport *
from pageserver.layered_repository.layer_leaf cimport (
    LeafEntryView,
    leaf_at,
    leaf_entry,
    leaf_parse,
    leaf_upper_bound,
)
from pageserver.layered_repository.read_batch cimport Query, ReadBatch
from zenith_utils.unaligned cimport get16, get32, get64, get64_big
from zenith_utils.zstd cimport zstd_load

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <unistd.h>

    /* Memory on the boundary of a cache line, for free(). */
    static void *layer_alloc_lines(size_t size)
    {
        void *p;
        return posix_memalign(&p, 64, size) == 0 ? p : NULL;
    }
    """
    void *layer_alloc_lines(size_t size) noexcept nogil
    void __builtin_prefetch(const void *p) noexcept nogil
    ssize_t posix_pread "pread"(int fd, void *data, size_t size, int64_t offset) noexcept nogil
    int posix_close "close"(int fd) noexcept nogil

cdef extern from "Python.h":
    ctypedef struct PyThreadState:
        pass
    PyThreadState *PyEval_SaveThread() noexcept nogil
    void PyEval_RestoreThread(PyThreadState *thread) noexcept nogil

cdef enum:
    MAX_BLOCK_TARGET = 1 << 16       # offsets in a block have 16 bits
    FETCH_AHEAD = 8

cdef inline bint begins_by(const Fence *fence, const Key *key, uint64_t lsn) noexcept nogil:
    """Whether the leaf begins at or below (key, lsn)."""
    return key_less(&fence.key, key) or (key_equal(&fence.key, key) and fence.lsn <= lsn)


cdef class OpenLayer:
    """The file at `path`, opened and checked to be the layer of that LayerName.

    Its blocks are kept in `blocks`, None: nowhere. Set `number` before the first lookup then.
    `io` counts what is read, None: nothing does.
    Raises CorruptLayerError (with `path` and `offset`), FormatVersionError, OSError and
    ZstdUnavailable.
    """

    def __cinit__(self, str path not None, name, bytes tenant not None, bytes timeline not None,
                  BlockCache blocks=None, IoStats io=None):
        cdef uint8_t header[HEADER_SIZE]
        cdef ReadError error
        cdef double started
        cdef int code
        self.fd = -1
        self.path = path
        self.blocks = blocks
        self.io = io
        started = clock_seconds()
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if io is not None:
            io.open_time.add(clock_seconds() - started)
        with nogil:
            code = self.read_at(header, HEADER_SIZE, 0, &error)
        if code != 0:
            self.raise_error(&error)
        self._check_header(header, name, tenant, timeline)
        status = os.fstat(self.fd)
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        self._check_layout(header, status.st_size)
        if self.codec != CODEC_NONE:
            zstd_load()
        self._load_root()
        if self.filter_offset:
            self._load_filter()

    def __dealloc__(self):
        # Closing the last descriptor of a removed file frees its blocks, which takes a while.
        if self.fd >= 0:
            with nogil:
                posix_close(self.fd)
        free(self.fences)
        free(self.filter)

    @property
    def memory(self):
        """Bytes that the index and the filter take."""
        return (self.n_fences + 1) * sizeof(Fence) + self.filter_lines * FILTER_LINE

    # ---- opening

    cdef int _check_header(self, const uint8_t *header, object name, bytes tenant,
                           bytes timeline) except -1:
        cdef bytes key_start = name.key_start, key_end = name.key_end
        if memcmp(header, <const char *> b"ZNTHLAYR", 8) != 0:
            self._corrupt(0, "not a layer file")
        if header_crc(header) != get32(header + HEADER_CRC):
            self._corrupt(0, "checksum mismatch in the file header")
        if get16(header + 8) != FORMAT_VERSION:
            raise FormatVersionError(self.path, get16(header + 8), FORMAT_VERSION)
        if header[10] != (KIND_IMAGE if name.is_image else KIND_DELTA) \
                or memcmp(header + 48, <const char *> key_start, KEY_SIZE) != 0 \
                or memcmp(header + 66, <const char *> key_end, KEY_SIZE) != 0 \
                or get64(header + 88) != name.start_lsn or get64(header + 96) != name.end_lsn:
            self._corrupt(10, "the header belongs to a layer of another name")
        if header[16:32] != tenant or header[32:48] != timeline:
            self._corrupt(16, "the header belongs to a layer of another timeline")
        key_load(&self.first_key, header + 48)
        key_load(&self.end_key, header + 66)
        self.start_lsn = get64(header + 88)
        self.end_lsn = get64(header + 96)
        return 0

    cdef int _check_layout(self, const uint8_t *header, uint64_t size) except -1:
        """Check where the parts of a file of `size` bytes are, before anything is read there."""
        self.codec = header[11]
        self.block_target = get32(header + 12)
        self.entry_count = get64(header + 104)
        self.leaf_offset = get64(header + 112)
        self.root_offset = get64(header + 120)
        self.size = get64(header + 128)
        self.value_bytes = get64(header + 136)
        self.filter_offset = get64(header + 144)
        self.key_count = get64(header + 152)
        self.index_bytes = get64(header + 160)
        self.leaf_end = self.filter_offset if self.filter_offset else self.root_offset
        if self.size != size:
            self._corrupt(min(size, self.size), f"the file has {size} bytes instead of {self.size}")
        if self.codec > CODEC_ZSTD or self.block_target > MAX_BLOCK_TARGET:
            self._corrupt(11, "a codec or a size of blocks that this program does not know")
        if not (HEADER_SIZE <= self.leaf_offset <= self.leaf_end <= self.root_offset
                and self.root_offset + BLOCK_HEADER + ROOT_HEADER <= size
                and self.root_offset <= size):
            self._corrupt(112, "offsets outside of the file")
        return 0

    cdef int _load_root(self) except -1:
        cdef uint64_t stored = self.size - self.root_offset
        cdef ReadError error
        cdef Block block
        cdef uint8_t *root
        cdef int code
        if stored > 0xFFFFFFFFU:
            self._corrupt(self.root_offset, "malformed block")
        root = <uint8_t *> malloc(stored)
        if root == NULL:
            raise MemoryError
        try:
            with nogil:
                code = self.read_at(root, stored, self.root_offset, &error)
                if code == 0:
                    code = open_block(root, self.root_offset, <uint32_t> stored, BLOCK_ROOT, NULL,
                                      <uint32_t> stored, NULL, &block, &error)
            if code != 0:
                self.raise_error(&error)
            self._parse_root(block.payload, block.size)
        finally:
            free(root)
        return 0

    cdef int _parse_root(self, const uint8_t *p, uint64_t size) except -1:
        """Keep the fences. Leaves lie back to back, keys, LSNs and blocks ascend."""
        cdef uint32_t i, count = get32(p)
        cdef Fence *fence
        cdef Fence *before
        cdef bint good
        if <uint64_t> count * ROOT_ENTRY + ROOT_HEADER != size:
            self._corrupt(self.root_offset, "malformed block")
        self.fences = <Fence *> calloc(<size_t> count + 1, sizeof(Fence))
        if self.fences == NULL:
            raise MemoryError
        self.n_fences = count
        self.fences[count].offset = self.leaf_end
        self.fences[count].block = self.leaf_offset
        p += ROOT_HEADER
        for i in range(count):
            fence = &self.fences[i]
            key_load(&fence.key, p)
            fence.lsn = get64_big(p + 18)
            fence.offset = get64(p + 26)
            fence.block = get64(p + 34)
            p += ROOT_ENTRY
        good = self.fences[0].offset == self.leaf_offset and self.fences[0].block == HEADER_SIZE
        for i in range(count):
            before = &self.fences[i]
            fence = &self.fences[i + 1]
            good = good and before.offset < fence.offset <= self.leaf_end \
                and fence.offset - before.offset <= MAX_LEAF_SIZE \
                and fence.offset - before.offset > BLOCK_HEADER \
                and before.block <= fence.block and before.block < self.leaf_offset
            if i + 1 < count:
                good = good and (key_less(&before.key, &fence.key) or (
                    key_equal(&before.key, &fence.key) and before.lsn < fence.lsn))
        if not good:
            self._corrupt(self.root_offset, "malformed block")
        return 0

    cdef int _load_filter(self) except -1:
        cdef uint8_t header[FILTER_LINE]
        cdef uint64_t stored = self.root_offset - self.filter_offset
        cdef uint64_t size = stored - BLOCK_HEADER
        cdef uint8_t *block
        cdef ReadError error
        cdef int code
        if stored <= BLOCK_HEADER or size % FILTER_LINE or stored > 0xFFFFFFFFU:
            self._corrupt(self.filter_offset, "malformed block")
        # The lines on cache lines of their own; the header is read apart.
        self.filter = <uint8_t *> layer_alloc_lines(size)
        if self.filter == NULL:
            raise MemoryError
        with nogil:
            code = self.read_at(header, BLOCK_HEADER, self.filter_offset, &error)
            if code == 0:
                code = self.read_at(self.filter, size, self.filter_offset + BLOCK_HEADER, &error)
            if code == 0 and block_crc(self.filter_offset, header, self.filter, size) \
                    != get32(header):
                code = read_failed(&error, E_CHECKSUM, self.filter_offset)
            if code == 0 and (header[12] != BLOCK_FILTER or header[13] != CODEC_NONE
                              or get32(header + 4) != size or get32(header + 8) != size):
                code = read_failed(&error, E_MALFORMED, self.filter_offset)
        if code != 0:
            self.raise_error(&error)
        self.filter_lines = size // FILTER_LINE
        return 0

    # ---- reading blocks

    cdef int read_at(self, uint8_t *buffer, size_t size, uint64_t offset,
                     ReadError *error) noexcept nogil:
        """Read exactly `size` bytes; 0 or an error code."""
        cdef ssize_t got
        cdef size_t done = 0
        cdef double started = clock_seconds() if self.io is not None else 0
        while done < size:
            got = posix_pread(self.fd, buffer + done, size - done, <int64_t> (offset + done))
            if got > 0:
                done += got
            elif got == 0:
                return read_failed(error, E_SHORT, offset + done)
            elif errno != EINTR:
                error.number = errno
                return read_failed(error, E_IO, offset + done)
        if self.io is not None:
            self.io.count_read(started, size)
        return 0

    cdef int load_leaf(self, Scratch *s, int64_t number) noexcept nogil:
        """Have a leaf in the scratch memory, or pinned in the cache."""
        cdef uint64_t offset = self.fences[number].offset
        cdef PyThreadState *thread = NULL
        cdef int code
        if s.leaf.number == number:
            return 0
        s.leaf.number = -1
        block_release(s.leaf_pin)
        s.leaf_pin = NULL
        if self.blocks is not None:
            s.leaf_pin = self.blocks.find(self.number, offset, s.keep)
        if s.leaf_pin == NULL:
            if s.holds_gil:
                thread = PyEval_SaveThread()
            code = self._read_leaf(s, number)
            if thread != NULL:
                PyEval_RestoreThread(thread)
            if code != 0:
                return code
        if s.leaf_pin != NULL:
            s.leaf = s.leaf_pin.leaf
        s.leaf.number = number
        return 0

    cdef int _read_leaf(self, Scratch *s, int64_t number) noexcept nogil:
        """Read a leaf and verify it."""
        cdef uint64_t offset = self.fences[number].offset
        cdef uint32_t stored = <uint32_t> (self.fences[number + 1].offset - offset)
        cdef Block block
        cdef int code = self.read_at(s.leaf_stored, stored, offset, &s.error)
        if code == 0:
            code = open_block(s.leaf_stored, offset, stored, BLOCK_LEAF, NULL, stored, NULL,
                              &block, &s.error)
        if code != 0:
            return code
        if not leaf_parse(&s.leaf, block.payload, block.size):
            return read_failed(&s.error, E_MALFORMED, offset)
        if s.keep and self.blocks is not None:
            s.leaf_pin = self.blocks.add(self.number, offset, block.payload, block.size, True)
        return 0

    cdef int load_block(self, Scratch *s, uint64_t offset, uint32_t wanted) noexcept nogil:
        """Have the value block at `offset` in the scratch memory, or pinned in the cache.

        `wanted`: the least payload it must have. It has no more than that or the target of blocks.
        """
        cdef PyThreadState *thread = NULL
        cdef int code
        if s.block_offset == offset:
            return 0
        if offset < HEADER_SIZE or offset > self.leaf_offset - BLOCK_HEADER:
            return read_failed(&s.error, E_MALFORMED, offset)
        s.block_offset = 0
        block_release(s.block_pin)
        s.block_pin = NULL
        if self.blocks is not None:
            s.block_pin = self.blocks.find(self.number, offset, s.keep)
        if s.block_pin == NULL:
            if s.holds_gil:
                thread = PyEval_SaveThread()
            code = self._read_block(s, offset, wanted)
            if thread != NULL:
                PyEval_RestoreThread(thread)
            if code != 0:
                return code
        if s.block_pin != NULL:
            s.block.payload = s.block_pin.payload
            s.block.size = s.block_pin.size
        s.block_offset = offset
        return 0

    cdef int _read_block(self, Scratch *s, uint64_t offset, uint32_t wanted) noexcept nogil:
        """Read a value block and verify it; see load_block."""
        cdef uint32_t limit = wanted if wanted > self.block_target else self.block_target
        cdef uint64_t available, ahead = <uint64_t> limit + BLOCK_HEADER
        cdef uint64_t stored
        cdef int code
        # The size stands in the block's header; one read gets all of it, and a little more.
        available = self.leaf_offset - offset
        if ahead > available:
            ahead = available
        if reserve(&s.stored, &s.stored_capacity, ahead) != 0 or (
                self.codec != CODEC_NONE
                and reserve(&s.plain, &s.plain_capacity, limit) != 0):
            return read_failed(&s.error, E_NO_MEMORY, offset)
        code = self.read_at(s.stored, ahead, offset, &s.error)
        if code != 0:
            return code
        stored = <uint64_t> get32(s.stored + 4) + BLOCK_HEADER
        if stored > ahead:
            return read_failed(&s.error, E_MALFORMED, offset)
        code = open_block(s.stored, offset, <uint32_t> stored, BLOCK_VALUES,
                          s.plain if self.codec != CODEC_NONE else NULL, limit, &s.decompressor,
                          &s.block, &s.error)
        if code == 0 and s.keep and self.blocks is not None:
            s.block_pin = self.blocks.add(self.number, offset, s.block.payload, s.block.size, False)
        return code

    cdef int load_value(self, Scratch *s, uint64_t block, uint32_t at, uint32_t size,
                        const uint8_t **data) noexcept nogil:
        """Load a value of the current leaf; it stays valid until the next load."""
        cdef int code
        if size > MAX_VALUE_SIZE:
            return read_failed(&s.error, E_MALFORMED, self.fences[s.leaf.number].offset)
        code = self.load_block(s, block, at + size)
        if code != 0:
            return code
        if at + size > s.block.size:
            return read_failed(&s.error, E_MALFORMED, self.fences[s.leaf.number].offset)
        data[0] = s.block.payload + at
        return 0

    # ---- lookup

    cdef bint may_contain(self, const Key *key) noexcept nogil:
        """Whether the filter leaves open that the key has values here; True without a filter."""
        return self.filter == NULL \
            or filter_may_contain(self.filter, self.filter_lines, filter_hash(key))

    cdef int64_t find_leaf(self, const Key *key, uint64_t lsn) noexcept nogil:
        """The last leaf that begins at or below (key, lsn), -1 if there is none."""
        cdef int64_t low = 0, high = self.n_fences, middle
        while low < high:
            middle = (low + high) >> 1
            if begins_by(&self.fences[middle], key, lsn):
                low = middle + 1
            else:
                high = middle
        return low - 1

    cdef int _collect_one(self, Scratch *s, ReadBatch batch, Query *query, int64_t number,
                          uint64_t upper, uint64_t floor) noexcept nogil:
        """Add the values of one key with floor <= LSN <= upper, newest first.

        `number` is that of the leaf where find_leaf sees the newest one.
        """
        cdef int at, code
        cdef bint bounded = True
        cdef uint8_t raw[KEY_SIZE]
        cdef const uint8_t *data = NULL
        cdef LeafEntryView entry
        if floor <= query.floor:
            floor = query.floor + 1
        key_store(&query.key, raw)
        while number >= 0:
            code = self.load_leaf(s, number)
            if code != 0:
                return code
            at = leaf_upper_bound(&s.leaf, raw, upper) if bounded else s.leaf.count
            bounded = False
            while at > 0:
                at -= 1
                leaf_entry(&s.leaf, leaf_at(&s.leaf, at), &entry)
                if not key_equal(&entry.key, &query.key) or entry.lsn < floor:
                    return 0
                code = self.load_value(s, entry.block, entry.at, entry.size, &data)
                if code != 0:
                    return code
                if batch.add_shared(query, entry.lsn, entry.flags, data, entry.size,
                                    s.block_pin) != 0:
                    return read_failed(&s.error, E_NO_MEMORY, entry.block)
                if entry.flags & WILL_INIT:
                    return 0
            number -= 1
        return 0

    cdef int collect(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor,
                     ReadError *error) noexcept nogil:
        """Add to the queries [first, last) their values with floor <= LSN <= upper, newest first.

        0, or an error code that is left in `error` with the details.
        """
        return self._collect(batch, first, last, upper, floor, False, error)

    cdef int collect_cached(self, ReadBatch batch, int first, int last, uint64_t upper,
                            uint64_t floor, ReadError *error) noexcept:
        """The same with the GIL, which is given up to read what is not in the cache."""
        return self._collect(batch, first, last, upper, floor, True, error)

    cdef int _collect(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor,
                      bint holds_gil, ReadError *error) noexcept nogil:
        cdef Scratch *s = NULL
        cdef Query *query
        cdef int64_t number
        cdef int i, code = 0
        for i in range(first, last):
            query = &batch.queries[i]
            if self.filter != NULL and i + FETCH_AHEAD < last:
                self._fetch_filter_line(&batch.queries[i + FETCH_AHEAD].key)
            if query.complete:
                continue
            # Neighbours of keys that are here mostly are in the same leaf: look there at once.
            if s != NULL and self._leaf_covers(s.leaf.number, &query.key, upper):
                number = s.leaf.number
            elif self.may_contain(&query.key):
                number = self.find_leaf(&query.key, upper)
            else:
                continue
            if s == NULL:
                s = scratch_take()
                if s == NULL:
                    return read_failed(error, E_NO_MEMORY, 0)
                s.keep = batch.keeps_blocks
                s.holds_gil = holds_gil
            code = self._collect_one(s, batch, query, number, upper, floor)
            if code != 0:
                error[0] = s.error
                break
        scratch_give(s)
        return code

    cdef bint _leaf_covers(self, int64_t number, const Key *key, uint64_t lsn) noexcept nogil:
        """Whether find_leaf(key, lsn) is the leaf `number`."""
        return number >= 0 and begins_by(&self.fences[number], key, lsn) and (
            number + 1 == self.n_fences or not begins_by(&self.fences[number + 1], key, lsn))

    cdef void _fetch_filter_line(self, const Key *key) noexcept nogil:
        __builtin_prefetch(self.filter + filter_line(filter_hash(key), self.filter_lines))

    # ---- errors

    cdef int raise_error(self, const ReadError *error) except -1:
        """Raise the exception of a failed read."""
        return raise_read_error(self.path, error)

    cdef int _corrupt(self, uint64_t offset, str reason) except -1:
        raise CorruptLayerError(self.path, offset, reason)
