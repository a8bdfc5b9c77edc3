"""Writer of layer files.

Values must come in the order of (key, LSN). They are gathered in a buffer and written as it fills;
index leaves are kept in memory and written at the end, the file header last of all. Nothing is
valid before `finish` has written and fsynced everything; the caller then renames the file.
"""
import os

from libc.errno cimport EINTR, EINVAL, ENOMEM, EOVERFLOW, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from pageserver.layered_repository.inmemory_layer cimport Entry, InMemoryLayer, entry_key
from pageserver.layered_repository.key cimport (
    KEY_SIZE,
    Key,
    key_bytes,
    key_equal,
    key_less,
    key_parse,
    key_store,
)
from pageserver.layered_repository.layer_format cimport *
from pageserver.layered_repository.layer_sort cimport sorted_entries
from zenith_utils.crc32c cimport crc32c_update

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdint.h>
    #include <unistd.h>

    /* Have the system begin to write a range, so that the fsync at the end has little left. */
    static void layer_start_writing(int fd, uint64_t from, uint64_t to)
    {
    #ifdef SYNC_FILE_RANGE_WRITE
        (void) sync_file_range(fd, (off_t) from, (off_t) (to - from), SYNC_FILE_RANGE_WRITE);
    #else
        (void) fd; (void) from; (void) to;
    #endif
    }
    """
    void __builtin_prefetch(const void *p) noexcept nogil
    void layer_start_writing(int fd, uint64_t start, uint64_t end) noexcept nogil
    ssize_t posix_write "write"(int fd, const void *data, size_t size) noexcept nogil
    ssize_t posix_pwrite "pwrite"(int fd, const void *data, size_t size,
                                  int64_t offset) noexcept nogil
    int posix_fsync "fsync"(int fd) noexcept nogil

cdef enum:
    OUT_SIZE = 1 << 20
    PUSH_SIZE = 8 << 20
    FETCH_AHEAD = 8


cdef class LayerWriter:
    """Writes one layer file at `path`, which must not exist.

    The path is a temporary name; ids are 16 bytes each. Raises OSError.
    """

    def __cinit__(self, path, bytes tenant not None, bytes timeline not None):
        self.fd = -1
        if len(tenant) != 16 or len(timeline) != 16:
            raise ValueError("tenant and timeline ids have 16 bytes")
        self.tenant = tenant
        self.timeline = timeline
        self.path = os.fspath(path)
        self.out = <uint8_t *> malloc(OUT_SIZE)
        if self.out == NULL:
            raise MemoryError
        self.fd = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        # Room for the file header, which is known at the end only.
        memset(self.out, 0, HEADER_SIZE)
        self.used = HEADER_SIZE

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)
        free(self.out)
        free(self.index)
        free(self.root)

    @property
    def first_key(self):
        """The key of the first value, None before it."""
        return key_bytes(&self.first) if self.count else None

    @property
    def last_key(self):
        """The key of the last value, None before the first."""
        return key_bytes(&self.last) if self.count else None

    def add(self, bytes key not None, uint64_t lsn, uint8_t flags, const uint8_t[::1] data not None):
        """Append a value. Raises ValueError unless (key, lsn) is above the one before, OSError."""
        cdef Key parsed
        cdef Py_ssize_t size = data.shape[0]
        key_parse(&parsed, key)
        if size > 1 << 30:
            raise ValueError(f"a value of {size} bytes is over the limit of {1 << 30}")
        self._raise(self.add_raw(&parsed, lsn, flags, &data[0] if size else NULL, <uint32_t> size))

    def add_layer(self, InMemoryLayer layer not None):
        """Append all values of a frozen layer; returns their number. Raises OSError."""
        cdef uint64_t added = 0
        cdef int code
        if not layer.sealed:
            raise ValueError("the layer is still open")
        with nogil:
            code = self._add_layer(layer, &added)
        self._raise(code)
        return added

    def finish(self, name):
        """Write index and header for the ranges of the LayerName, fsync, close. Raises OSError."""
        cdef uint8_t header[HEADER_SIZE]
        cdef bytes key_start = name.key_start, key_end = name.key_end
        cdef uint64_t root_offset = 0, leaf_offset
        cdef int code
        cdef Key low, high
        if self.count == 0:
            raise ValueError("a layer needs at least one value")
        key_parse(&low, key_start)
        key_parse(&high, key_end)
        if key_less(&self.first, &low) or not key_less(&self.last, &high):
            raise ValueError(f"{self.path}: keys outside of the range of {name}")
        self._close_block()
        code = self._close_leaf()
        leaf_offset = self.position + self.used
        if code == 0:
            with nogil:
                code = self._write_index(&root_offset)
        self._raise(code)
        memset(header, 0, HEADER_SIZE)
        memcpy(header, <const char *> b"ZNTHLAYR", 8)
        put16(header + 8, FORMAT_VERSION)
        header[10] = KIND_IMAGE if name.is_image else KIND_DELTA
        memcpy(header + 16, <const char *> self.tenant, 16)
        memcpy(header + 32, <const char *> self.timeline, 16)
        memcpy(header + 48, <const char *> key_start, KEY_SIZE)
        memcpy(header + 66, <const char *> key_end, KEY_SIZE)
        put64(header + 88, name.start_lsn)
        put64(header + 96, name.end_lsn)
        put64(header + 104, self.count)
        put64(header + 112, leaf_offset)
        put64(header + 120, root_offset)
        put64(header + 128, self.position)
        put64(header + 136, self.value_bytes)
        put32(header + HEADER_CRC, crc32c_update(0xFFFFFFFFU, header, HEADER_CRC) ^ 0xFFFFFFFFU)
        with nogil:
            code = 0
            if posix_pwrite(self.fd, header, HEADER_SIZE, 0) != HEADER_SIZE:
                code = errno if errno else EINVAL
            elif posix_fsync(self.fd) != 0:
                code = errno
        self._raise(code)
        os.close(self.fd)
        self.fd = -1

    def abort(self):
        """Close and remove the file, if it is not finished."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            os.unlink(self.path)

    cdef int _raise(self, int code) except -1:
        if code == 0:
            return 0
        if code == -1:
            raise ValueError(
                f"{self.path}: keys and LSNs must ascend; after {key_bytes(&self.last).hex().upper()}"
            )
        if code == ENOMEM:
            raise MemoryError(f"{self.path}: no memory for the index of the layer")
        raise OSError(code, os.strerror(code), self.path)

    cdef int add_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil:
        """Append a value; 0, -1 if it is out of order, or an errno."""
        cdef LeafEntry *entry
        cdef int code
        if self.error:
            return self.error
        if self.count == 0:
            self.first = key[0]
        elif not key_less(&self.last, key) and (
                not key_equal(&self.last, key) or lsn <= self.last_lsn):
            return -1
        if self.n_entries == LEAF_ENTRIES:
            code = self._close_leaf()
            if code:
                return code
        entry = &self.entries[self.n_entries]
        if size > BLOCK_TARGET:
            code = self._add_big_value(data, size, entry)
        else:
            code = self._add_value(data, size, entry)
        if code:
            # Part of the value may be in the file: nothing can be appended any more.
            self.error = code
            return code
        entry.key = key[0]
        entry.lsn = lsn
        entry.flags = flags
        entry.size = size
        self.n_entries += 1
        self.count += 1
        self.value_bytes += size
        self.last = key[0]
        self.last_lsn = lsn
        return 0

    cdef int _add_value(self, const uint8_t *data, uint32_t size, LeafEntry *entry) noexcept nogil:
        cdef int code
        if self.block_open and self.used - self.block_at - BLOCK_HEADER + size > BLOCK_TARGET:
            self._close_block()
        if not self.block_open:
            if self.used + BLOCK_HEADER + BLOCK_TARGET > OUT_SIZE:
                code = self._flush_out()
                if code:
                    return code
            self.block_at = self.used
            self.used += BLOCK_HEADER
            self.block_open = True
        entry.block = self.position + self.block_at
        entry.offset = <uint16_t> (self.used - self.block_at - BLOCK_HEADER)
        if size:
            memcpy(self.out + self.used, data, size)
        self.used += size
        return 0

    cdef int _add_big_value(self, const uint8_t *data, uint32_t size,
                            LeafEntry *entry) noexcept nogil:
        """A block of its own, written past the buffer."""
        cdef uint8_t header[BLOCK_HEADER]
        cdef int code
        self._close_block()
        code = self._flush_out()
        if code:
            return code
        entry.block = self.position
        entry.offset = 0
        block_header(header, BLOCK_VALUES, size)
        put32(header, block_crc(self.position, header, data, size))
        code = self._write(header, BLOCK_HEADER)
        return code if code else self._write(data, size)

    cdef void _close_block(self) noexcept nogil:
        cdef uint8_t *header = self.out + self.block_at
        cdef size_t size = self.used - self.block_at - BLOCK_HEADER
        if not self.block_open:
            return
        block_header(header, BLOCK_VALUES, <uint32_t> size)
        put32(header, block_crc(self.position + self.block_at, header, header + BLOCK_HEADER, size))
        self.block_open = False

    cdef int _flush_out(self) noexcept nogil:
        """Write the buffer, which ends with a whole block."""
        cdef int code = self._write(self.out, self.used)
        self.used = 0
        return code

    cdef int _write(self, const uint8_t *data, size_t size) noexcept nogil:
        cdef ssize_t written
        while size:
            written = posix_write(self.fd, data, size)
            if written < 0:
                if errno == EINTR:
                    continue
                return errno
            data += written
            size -= written
            self.position += written
        if self.position - self.pushed >= PUSH_SIZE:
            layer_start_writing(self.fd, self.pushed, self.position)
            self.pushed = self.position
        return 0

    cdef int _close_leaf(self) noexcept nogil:
        """Encode the pending entries; their block gets its checksum when its place is known."""
        cdef int n = self.n_entries, i, prefix, lsn_width, block_width
        cdef size_t width, size, wanted
        cdef uint64_t low_lsn, high_lsn, low_block, high_block
        cdef uint8_t first[KEY_SIZE]
        cdef uint8_t key[KEY_SIZE]
        cdef uint8_t *p
        cdef void *grown
        cdef LeafEntry *entry
        if n == 0:
            return 0
        low_lsn = high_lsn = self.entries[0].lsn
        low_block = self.entries[0].block
        high_block = self.entries[n - 1].block
        for i in range(1, n):
            if self.entries[i].lsn < low_lsn:
                low_lsn = self.entries[i].lsn
            if self.entries[i].lsn > high_lsn:
                high_lsn = self.entries[i].lsn
        # The entries are sorted: what the first and the last key share, all share.
        key_store(&self.entries[0].key, first)
        key_store(&self.entries[n - 1].key, key)
        prefix = 0
        while prefix < KEY_SIZE and first[prefix] == key[prefix]:
            prefix += 1
        lsn_width = 8 if high_lsn - low_lsn > 0xFFFFFFFFU else 4
        block_width = 8 if high_block - low_block > 0xFFFFFFFFU else 4
        width = KEY_SIZE - prefix + lsn_width + 7 + block_width
        size = BLOCK_HEADER + LEAF_HEADER + n * width

        if self.index_used + size > self.index_capacity:
            wanted = 2 * self.index_capacity + MAX_LEAF_SIZE
            grown = realloc(self.index, wanted)
            if grown == NULL:
                return ENOMEM
            self.index = <uint8_t *> grown
            self.index_capacity = wanted
        if self.root_used + ROOT_ENTRY > self.root_capacity:
            wanted = 2 * self.root_capacity + 4096
            grown = realloc(self.root, wanted)
            if grown == NULL:
                return ENOMEM
            self.root = <uint8_t *> grown
            self.root_capacity = wanted
        if self.root_used == 0:
            self.root_used = BLOCK_HEADER + ROOT_HEADER

        p = self.root + self.root_used
        memcpy(p, first, KEY_SIZE)
        put64_big(p + 18, self.entries[0].lsn)
        put64(p + 26, self.index_used)
        put32(p + 34, <uint32_t> size)
        self.root_used += ROOT_ENTRY

        p = self.index + self.index_used
        block_header(p, BLOCK_LEAF, <uint32_t> (size - BLOCK_HEADER))
        p += BLOCK_HEADER
        memset(p, 0, LEAF_HEADER)
        put16(p, <uint16_t> n)
        p[2] = <uint8_t> prefix
        p[3] = (WIDE_LSN if lsn_width == 8 else 0) | (WIDE_BLOCK if block_width == 8 else 0)
        put64(p + 8, low_lsn)
        put64(p + 16, low_block)
        memcpy(p + 24, first, prefix)
        p += LEAF_HEADER
        for i in range(n):
            entry = &self.entries[i]
            key_store(&entry.key, key)
            memcpy(p, key + prefix, KEY_SIZE - prefix)
            p += KEY_SIZE - prefix
            put_big(p, entry.lsn - low_lsn, lsn_width)
            p += lsn_width
            p[0] = entry.flags
            put16(p + 1, entry.offset)
            put32(p + 3, entry.size)
            p += 7
            if block_width == 8:
                put64(p, entry.block - low_block)
            else:
                put32(p, <uint32_t> (entry.block - low_block))
            p += block_width
        self.index_used += size
        self.n_entries = 0
        return 0

    cdef int _write_index(self, uint64_t *root_offset) noexcept nogil:
        """Write the rest of the buffer, the leaves and the root."""
        cdef uint64_t start
        cdef uint8_t *entry
        cdef uint8_t *leaf
        cdef uint32_t size, count, i
        cdef int code = self._flush_out()
        if code:
            return code
        start = self.position
        if self.root_used > 0xFFFFFFFFU:
            return EOVERFLOW
        count = <uint32_t> ((self.root_used - BLOCK_HEADER - ROOT_HEADER) // ROOT_ENTRY)
        entry = self.root + BLOCK_HEADER + ROOT_HEADER
        for i in range(count):
            leaf = self.index + get64(entry + 26)
            size = get32(entry + 34) - BLOCK_HEADER
            put64(entry + 26, start + get64(entry + 26))
            put32(leaf, block_crc(get64(entry + 26), leaf, leaf + BLOCK_HEADER, size))
            entry += ROOT_ENTRY
        code = self._write(self.index, self.index_used)
        if code:
            return code
        root_offset[0] = self.position
        size = <uint32_t> (self.root_used - BLOCK_HEADER)
        block_header(self.root, BLOCK_ROOT, size)
        put32(self.root + BLOCK_HEADER, count)
        put32(self.root + BLOCK_HEADER + 4, 0)
        put32(self.root, block_crc(self.position, self.root, self.root + BLOCK_HEADER, size))
        return self._write(self.root, self.root_used)

    cdef int _add_layer(self, InMemoryLayer layer, uint64_t *added) noexcept nogil:
        cdef uint64_t i, n = 0
        cdef uint32_t *order = sorted_entries(layer, &n)
        cdef Entry *entry
        cdef Entry *following
        cdef Key key, next_key
        cdef int code = 0
        if order == NULL:
            return ENOMEM
        for i in range(n):
            # Entries and values lie in the order of the puts: fetch ahead of their use.
            if i + 2 * FETCH_AHEAD < n:
                __builtin_prefetch(layer.entry_at(order[i + 2 * FETCH_AHEAD]))
            if i + FETCH_AHEAD < n:
                entry = layer.entry_at(order[i + FETCH_AHEAD])
                __builtin_prefetch(layer.value_at(entry.position))
                __builtin_prefetch(layer.value_at(entry.position) + 64)
            entry = layer.entry_at(order[i])
            key = entry_key(entry)
            if i + 1 < n:
                following = layer.entry_at(order[i + 1])
                next_key = entry_key(following)
                if following.lsn == entry.lsn and key_equal(&next_key, &key):
                    continue    # replaced by a later put
            code = self.add_raw(&key, entry.lsn, entry.flags, layer.value_at(entry.position),
                                entry.size)
            if code:
                break
            added[0] += 1
        free(order)
        return code
