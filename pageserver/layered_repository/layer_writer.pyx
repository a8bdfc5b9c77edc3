"""Writer of layer files.

Values must come in the order of (key, LSN). They are gathered in a buffer and written as it fills;
index leaves are kept in memory and written at the end, the file header last of all. Nothing is
valid before `finish` has written and fsynced everything; the caller then renames the file.
"""
import os

from libc.errno cimport EFBIG, ENOMEM
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

from pageserver.layered_repository.files import FILES
from pageserver.layered_repository.inmemory_layer cimport InMemoryLayer
from pageserver.layered_repository.io_stats cimport IoStats
from pageserver.layered_repository.key cimport (
    FLAGS_IMAGE,
    KEY_SIZE,
    Key,
    key_bytes,
    key_equal,
    key_less,
    key_parse,
    key_store,
)
from pageserver.layered_repository.key_filter cimport (
    FILTER_LINE,
    filter_add,
    filter_hash,
    filter_line,
    filter_lines_for,
)
from pageserver.layered_repository.layer_format cimport *
from pageserver.layered_repository.layer_leaf_encoder cimport LeafEntry, leaf_encode
from pageserver.layered_repository.layer_output cimport OUTPUT_SIZE, LayerOutput
from pageserver.layered_repository.layer_sort cimport FrozenLayerScan
from zenith_utils.crc32c cimport crc32c_update
from zenith_utils.unaligned cimport get32, get64, put16, put32, put64, put64_big
from zenith_utils.zstd cimport zstd_compress, zstd_compressor, zstd_free_compressor, zstd_load

cdef extern from *:
    void __builtin_prefetch(const void *p) noexcept nogil

cdef enum:
    E_UNORDERED = -1
    FETCH_AHEAD = 8


cdef inline uint8_t *grow(Growing *bytes_, size_t more, size_t least) noexcept nogil:
    """Room for `more` bytes at the end; NULL without memory."""
    cdef size_t wanted
    cdef void *grown
    if bytes_.used + more > bytes_.capacity:
        wanted = 2 * bytes_.capacity + more + least
        grown = realloc(bytes_.data, wanted)
        if grown == NULL:
            return NULL
        bytes_.data = <uint8_t *> grown
        bytes_.capacity = wanted
    return bytes_.data + bytes_.used


cdef inline void finish_block(uint8_t *block, uint64_t offset, uint8_t kind, uint32_t packed,
                              uint32_t plain) noexcept nogil:
    """Give a block in memory its header. `packed`: size of the payload if it was compressed."""
    finish_header(block, offset, kind, packed, plain, block + BLOCK_HEADER)


cdef inline void finish_header(uint8_t *header, uint64_t offset, uint8_t kind, uint32_t packed,
                               uint32_t plain, const uint8_t *payload) noexcept nogil:
    """The same for a payload that is elsewhere."""
    cdef uint32_t stored = packed if packed else plain
    block_header(header, kind, CODEC_ZSTD if packed else CODEC_NONE, stored, plain)
    put32(header, block_crc(offset, header, payload, stored))


cdef class LayerWriter:
    """Writes one layer file at `path`, a temporary name; ids are 16 bytes each.

    With `compress` blocks that get smaller by it are compressed; `io` counts what is written. Raises OSError, ZstdUnavailable.
    """

    def __cinit__(self, path, bytes tenant not None, bytes timeline not None, *, files=FILES,
                  bint compress=False, IoStats io=None):
        if len(tenant) != 16 or len(timeline) != 16:
            raise ValueError("tenant and timeline ids have 16 bytes")
        self.tenant = tenant
        self.timeline = timeline
        self.block_target = PLAIN_TARGET
        if compress:
            zstd_load()
            self.block_target = PACKED_TARGET
            self.compressor = zstd_compressor()
            if self.compressor == NULL:
                raise MemoryError("no memory for a zstd context")
        self.low_lsn = 0xFFFFFFFFFFFFFFFFU
        self.out = LayerOutput(os.fspath(path), files, io)
        # Room for the file header, which is known at the end only.
        memset(self.out.buffer, 0, HEADER_SIZE)
        self.out.used = HEADER_SIZE

    def __dealloc__(self):
        free(self.index.data)
        free(self.root.data)
        free(self.hashes.data)
        if self.compressor != NULL:
            zstd_free_compressor(self.compressor)

    @property
    def path(self):
        """Where the file is."""
        return self.out.path

    @property
    def file_size(self):
        """Bytes the file has so far, index included, about."""
        return self.bytes_so_far()

    @property
    def first_key(self):
        """The key of the first value, None before it."""
        return key_bytes(&self.first) if self.count else None

    @property
    def last_key(self):
        """The key of the last value, None before the first."""
        return key_bytes(&self.last) if self.count else None

    def add(self, bytes key not None, uint64_t lsn, uint8_t flags,
            const uint8_t[::1] data not None):
        """Append a value. Raises ValueError unless (key, lsn) is above the one before, OSError."""
        cdef Key parsed
        cdef Py_ssize_t size = data.shape[0]
        key_parse(&parsed, key)
        if size > MAX_VALUE_SIZE:
            raise ValueError(f"a value of {size} bytes is over the limit of {MAX_VALUE_SIZE}")
        self.raise_error(
            self.add_raw(&parsed, lsn, flags, &data[0] if size else NULL, <uint32_t> size)
        )

    def add_images(self, list keys not None, uint64_t lsn, list values not None):
        """Append the values of keys at one LSN; a key whose value is None is left out.

        Compresses and writes without the GIL. Raises what `add` does; the values before the failing
        one are in the file then.
        """
        cdef Py_ssize_t i, n = 0
        cdef bytes value
        cdef int code = 0
        cdef ImageRef *images
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys and {len(values)} values")
        images = <ImageRef *> malloc((len(keys) + 1) * sizeof(ImageRef))
        if images == NULL:
            raise MemoryError
        try:
            for i in range(len(keys)):
                value = values[i]
                if value is None:
                    continue
                if len(value) > MAX_VALUE_SIZE:
                    raise ValueError(f"a value of {len(value)} bytes is over {MAX_VALUE_SIZE}")
                key_parse(&images[n].key, keys[i])
                images[n].data = <const uint8_t *> <const char *> value
                images[n].size = <uint32_t> len(value)
                n += 1
            with nogil:
                for i in range(n):
                    code = self.add_raw(&images[i].key, lsn, FLAGS_IMAGE, images[i].data,
                                        images[i].size)
                    if code != 0:
                        break
        finally:
            free(images)
        self.raise_error(code)

    def add_layer(self, InMemoryLayer layer not None):
        """Append all values of a frozen layer below its end LSN; returns their number.

        Raises OSError; CorruptLayerError for a value that was damaged in its ephemeral file.
        """
        cdef FrozenLayerScan scan = FrozenLayerScan(layer)
        cdef uint64_t before = self.count
        cdef int got, code = 0
        with nogil:
            got = scan.next()
            while got == 1 and code == 0:
                code = self.add_raw(&scan.key, scan.lsn, scan.flags, scan.data, scan.size)
                got = scan.next()
        self.raise_error(code)
        if got < 0:
            scan.raise_error()
        return self.count - before

    def finish(self, name):
        """Write index and header for the ranges of the LayerName, fsync, close.

        Only an image may be without entries: no key of its range exists. Raises ValueError if an
        entry is outside of the ranges, OSError.
        """
        cdef uint8_t header[HEADER_SIZE]
        cdef uint64_t leaf_offset = 0, filter_offset = 0, root_offset = 0
        cdef bint filtered = name.is_l0
        cdef int code = self.error
        self._check_ranges(name)
        with nogil:
            self._close_block()
            if code == 0:
                code = self._close_leaf()
            leaf_offset = self.out.position + self.out.used
            if code == 0:
                code = self._write_tail(filtered, &filter_offset, &root_offset)
        self.raise_error(code)
        self._fill_header(header, name)
        put64(header + 112, leaf_offset)
        put64(header + 120, root_offset)
        put64(header + 144, filter_offset)
        put32(header + HEADER_CRC, header_crc(header))
        with nogil:
            code = self.out.write_at(header, HEADER_SIZE, 0)
            if code == 0:
                code = self.out.sync()
        self.raise_error(code)
        self.out.close()
        self.finished = True

    cdef int _check_ranges(self, object name) except -1:
        cdef bytes key_start = name.key_start, key_end = name.key_end
        cdef Key low, high
        if self.count == 0:
            if not name.is_image:
                raise ValueError("a delta layer needs at least one value")
            return 0
        key_parse(&low, key_start)
        key_parse(&high, key_end)
        if key_less(&self.first, &low) or not key_less(&self.last, &high):
            raise ValueError(f"{self.path}: keys outside of the range of {name}")
        if self.low_lsn < name.start_lsn or self.high_lsn >= name.end_lsn:
            raise ValueError(f"{self.path}: LSNs outside of the range of {name}")
        return 0

    cdef int _fill_header(self, uint8_t *header, object name) except -1:
        """The header but for offsets and checksum; the content is written."""
        cdef bytes key_start = name.key_start, key_end = name.key_end
        memset(header, 0, HEADER_SIZE)
        memcpy(header, <const char *> b"ZNTHLAYR", 8)
        put16(header + 8, FORMAT_VERSION)
        header[10] = KIND_IMAGE if name.is_image else KIND_DELTA
        header[11] = CODEC_ZSTD if self.compressor != NULL else CODEC_NONE
        put32(header + 12, self.block_target)
        memcpy(header + 16, <const char *> self.tenant, 16)
        memcpy(header + 32, <const char *> self.timeline, 16)
        memcpy(header + 48, <const char *> key_start, KEY_SIZE)
        memcpy(header + 66, <const char *> key_end, KEY_SIZE)
        put64(header + 88, name.start_lsn)
        put64(header + 96, name.end_lsn)
        put64(header + 104, self.count)
        put64(header + 128, self.out.position)
        put64(header + 136, self.value_bytes)
        put64(header + 152, self.key_count)
        put64(header + 160, self.index_bytes)
        return 0

    def abort(self):
        """Close and remove the file, if it is not finished. Raises OSError."""
        if not self.finished:
            self.finished = True
            self.out.close()
            self.out.remove()

    cdef int raise_error(self, int code) except -1:
        if code == 0:
            return 0
        if code == E_UNORDERED:
            last = key_bytes(&self.last).hex().upper()
            raise ValueError(f"{self.path}: keys and LSNs must ascend; after {last}")
        return self.out.raise_error(code)

    cdef uint64_t bytes_so_far(self) noexcept nogil:
        return self.out.position + self.out.used + self.index.used + self.root.used

    # ---- values

    cdef int add_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil:
        cdef LeafEntry *entry
        cdef uint8_t *hash_at
        cdef int code
        if self.error:
            return self.error
        if self.count == 0 or not key_equal(&self.last, key):
            if self.count and not key_less(&self.last, key):
                return E_UNORDERED
            hash_at = grow(&self.hashes, sizeof(uint64_t), 4096)
            if hash_at == NULL:
                return ENOMEM
            if self.count == 0:
                self.first = key[0]
        elif lsn <= self.last_lsn:
            return E_UNORDERED
        else:
            hash_at = NULL
        if self.n_entries == LEAF_ENTRIES:
            code = self._close_leaf()
            if code:
                return code
        entry = &self.entries[self.n_entries]
        if size > self.block_target:
            code = self._place_long_value(data, size, entry)
        else:
            code = self._place_value(data, size, entry)
        if code:
            # Part of the value may be in the file: nothing can be appended any more.
            self.error = code
            return code
        if hash_at != NULL:
            put64(hash_at, filter_hash(key))
            self.hashes.used += sizeof(uint64_t)
            self.key_count += 1
        entry.key = key[0]
        entry.lsn = lsn
        entry.flags = flags
        entry.size = size
        self.n_entries += 1
        self.count += 1
        self.value_bytes += size
        self.last = key[0]
        self.last_lsn = lsn
        if lsn < self.low_lsn:
            self.low_lsn = lsn
        if lsn > self.high_lsn:
            self.high_lsn = lsn
        return 0

    cdef int _place_value(self, const uint8_t *data, uint32_t size,
                          LeafEntry *entry) noexcept nogil:
        cdef int code
        if self.block_open and self.block_size + size > self.block_target:
            self._close_block()
        if not self.block_open:
            code = self._open_block()
            if code:
                return code
        entry.block = self.block_at
        entry.offset = <uint16_t> self.block_size
        if size:
            memcpy(self.block + self.block_size, data, size)
        self.block_size += size
        return 0

    cdef int _open_block(self) noexcept nogil:
        """Begin a block, with room for a whole one in the buffer."""
        cdef int code
        if self.out.used + BLOCK_HEADER + self.block_target > OUTPUT_SIZE:
            code = self.out.flush()
            if code:
                return code
        self.block_at = self.out.position + self.out.used
        self.block_size = 0
        # What will be compressed is gathered aside and goes to the buffer when it is.
        if self.compressor == NULL:
            self.block = self.out.buffer + self.out.used + BLOCK_HEADER
        else:
            self.block = self.packing
        self.block_open = True
        return 0

    cdef void _close_block(self) noexcept nogil:
        if self.block_open:
            self.block_open = False
            self._store_block(self.block_at, self.block, self.block_size)

    cdef int _place_long_value(self, const uint8_t *data, uint32_t size,
                               LeafEntry *entry) noexcept nogil:
        """A block of its own."""
        cdef uint8_t *packed = NULL
        cdef const uint8_t *payload = data
        cdef uint8_t header[BLOCK_HEADER]
        cdef uint32_t stored = 0
        cdef int code
        self._close_block()
        if self.out.used + BLOCK_HEADER + size > OUTPUT_SIZE:
            code = self.out.flush()
            if code:
                return code
        entry.block = self.out.position + self.out.used
        entry.offset = 0
        if BLOCK_HEADER + size <= OUTPUT_SIZE:
            self._store_block(entry.block, data, size)
            return 0
        # It does not fit in the buffer, which is empty. Without memory to compress it, it stays
        # as it is.
        if self.compressor != NULL:
            packed = <uint8_t *> malloc(size)
            if packed != NULL:
                stored = <uint32_t> zstd_compress(self.compressor, packed, size - 1, data, size,
                                                  ZSTD_LEVEL)
                if stored:
                    payload = packed
        finish_header(header, entry.block, BLOCK_VALUES, stored, size, payload)
        code = self.out.write(header, BLOCK_HEADER)
        if code == 0:
            code = self.out.write(payload, stored if stored else size)
        free(packed)
        return code

    cdef void _store_block(self, uint64_t offset, const uint8_t *data,
                           uint32_t size) noexcept nogil:
        """Complete the block at the end of the buffer, compressed if that makes it smaller."""
        cdef uint8_t *header = self.out.buffer + self.out.used
        cdef uint32_t stored = 0
        if self.compressor != NULL and size:
            stored = <uint32_t> zstd_compress(self.compressor, header + BLOCK_HEADER, size - 1,
                                              data, size, ZSTD_LEVEL)
        if stored == 0 and size and data != header + BLOCK_HEADER:
            memcpy(header + BLOCK_HEADER, data, size)
        finish_block(header, offset, BLOCK_VALUES, stored, size)
        self.out.used += BLOCK_HEADER + (stored if stored else size)

    # ---- index

    cdef int _close_leaf(self) noexcept nogil:
        """Encode the pending entries; their block gets its checksum when its place is known."""
        cdef LeafEntry *first = &self.entries[0]
        cdef uint8_t *fence
        cdef uint8_t *leaf
        cdef uint32_t size
        if self.n_entries == 0:
            return 0
        fence = grow(&self.root, ROOT_ENTRY, 4096)
        leaf = grow(&self.index, MAX_LEAF_SIZE, 1 << 16)
        if fence == NULL or leaf == NULL:
            return ENOMEM
        key_store(&first.key, fence)
        put64_big(fence + 18, first.lsn)
        put64(fence + 26, self.index.used)
        put64(fence + 34, first.block)
        size = leaf_encode(first, self.n_entries, leaf + BLOCK_HEADER)
        block_header(leaf, BLOCK_LEAF, CODEC_NONE, size, size)
        self.root.used += ROOT_ENTRY
        self.index.used += BLOCK_HEADER + size
        self.index_bytes += size
        self.n_entries = 0
        return 0

    cdef int _write_tail(self, bint filtered, uint64_t *filter_offset,
                         uint64_t *root_offset) noexcept nogil:
        """Write the rest of the buffer, the leaves, the filter and the root."""
        cdef uint64_t leaf_offset, i, count = self.root.used // ROOT_ENTRY
        cdef uint8_t *leaf
        cdef uint8_t *fence = self.root.data
        cdef int code = self.out.flush()
        if code:
            return code
        leaf_offset = self.out.position
        for i in range(count):
            leaf = self.index.data + get64(fence + 26)
            put64(fence + 26, leaf_offset + get64(fence + 26))
            put32(leaf, block_crc(get64(fence + 26), leaf, leaf + BLOCK_HEADER, get32(leaf + 4)))
            fence += ROOT_ENTRY
        code = self.out.write(self.index.data, self.index.used)
        if code == 0 and filtered:
            filter_offset[0] = self.out.position
            code = self._write_filter()
        if code == 0:
            root_offset[0] = self.out.position
            code = self._write_root()
        return code

    cdef int _write_filter(self) noexcept nogil:
        cdef uint64_t lines = filter_lines_for(self.key_count), i
        cdef uint64_t *hashes = <uint64_t *> self.hashes.data
        cdef uint32_t size = <uint32_t> (lines * FILTER_LINE)
        cdef uint8_t *block = <uint8_t *> calloc(1, BLOCK_HEADER + <size_t> size)
        cdef uint8_t *filter = block + BLOCK_HEADER
        cdef int code
        if block == NULL:
            return ENOMEM
        for i in range(self.key_count):
            if i + FETCH_AHEAD < self.key_count:
                __builtin_prefetch(filter + filter_line(hashes[i + FETCH_AHEAD], lines))
            filter_add(filter, lines, hashes[i])
        finish_block(block, self.out.position, BLOCK_FILTER, 0, size)
        code = self.out.write(block, BLOCK_HEADER + <size_t> size)
        free(block)
        return code

    cdef int _write_root(self) noexcept nogil:
        cdef uint8_t header[BLOCK_HEADER + ROOT_HEADER]
        cdef uint64_t size = ROOT_HEADER + self.root.used
        cdef uint32_t crc
        cdef int code
        if size > 0xFFFFFFFFU:
            return EFBIG
        block_header(header, BLOCK_ROOT, CODEC_NONE, <uint32_t> size, <uint32_t> size)
        put32(header + BLOCK_HEADER, <uint32_t> (self.root.used // ROOT_ENTRY))
        put32(header + BLOCK_HEADER + 4, 0)
        crc = block_crc(self.out.position, header, header + BLOCK_HEADER, ROOT_HEADER)
        crc = crc32c_update(crc ^ 0xFFFFFFFFU, self.root.data, self.root.used) ^ 0xFFFFFFFFU
        put32(header, crc)
        code = self.out.write(header, BLOCK_HEADER + ROOT_HEADER)
        return code if code else self.out.write(self.root.data, self.root.used)
