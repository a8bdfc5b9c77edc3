"""Reader of layer files.

Every block is read with pread and its checksum verified each time: what a read returns was right in
this very read, wherever a bit may flip, and a failing disk or a truncated file is an error instead
of a signal. Only the root, the first key of every leaf, stays in memory. A lookup reads one leaf
and the blocks of the values it needs; the neighbours asked for in one batch share them.
"""
import os
import threading

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from pageserver.layered_repository.errors import CorruptLayerError
from pageserver.layered_repository.key cimport (
    KEY_SIZE,
    WILL_INIT,
    Key,
    key_bytes,
    key_equal,
    key_less,
    key_load,
    key_parse,
    key_store,
)
from pageserver.layered_repository.layer_format cimport *
from pageserver.layered_repository.read_batch cimport Query, ReadBatch
from zenith_utils.crc32c cimport crc32c_update

cdef extern from "<unistd.h>":
    ssize_t posix_pread "pread"(int fd, void *data, size_t size, int64_t offset) noexcept nogil

cdef enum:
    E_NO_MEMORY = 1
    E_IO = 2
    E_SHORT = 3
    E_CHECKSUM = 4
    E_KIND = 5
    E_CODEC = 6
    E_MALFORMED = 7

_REASONS = {
    E_SHORT: "the file ends early",
    E_CHECKSUM: "checksum mismatch",
    E_KIND: "a block of another kind than expected",
    E_CODEC: "a block compressed by a method this program does not know",
    E_MALFORMED: "malformed block",
}


cdef inline void scratch_init(Scratch *s) noexcept nogil:
    s.leaf.number = -1
    s.block = NULL
    s.block_capacity = 0
    s.block_offset = 0
    s.block_size = 0
    s.error_offset = 0
    s.error_number = 0


cdef inline int failed(Scratch *s, int code, uint64_t offset) noexcept nogil:
    s.error_offset = offset
    return code


cdef inline int check_block(Scratch *s, const uint8_t *header, uint64_t offset, uint8_t kind,
                            uint32_t size) noexcept nogil:
    """Verify a block of which header and `size` bytes of payload are in memory."""
    if block_crc(offset, header, header + BLOCK_HEADER, size) != get32(header):
        return failed(s, E_CHECKSUM, offset)
    if header[12] != kind:
        return failed(s, E_KIND, offset)
    if header[13] != CODEC_NONE:
        return failed(s, E_CODEC, offset)
    if get32(header + 4) != size or get32(header + 8) != size:
        return failed(s, E_MALFORMED, offset)
    return 0


cdef inline uint64_t entry_lsn(const LeafView *leaf, const uint8_t *entry) noexcept nogil:
    return leaf.low_lsn + get_big(entry + KEY_SIZE - leaf.prefix, leaf.lsn_width)


cdef inline void entry_key(const LeafView *leaf, const uint8_t *entry, Key *key) noexcept nogil:
    cdef uint8_t raw[KEY_SIZE]
    memcpy(raw, leaf.data + BLOCK_HEADER + 24, leaf.prefix)
    memcpy(raw + leaf.prefix, entry, KEY_SIZE - leaf.prefix)
    key_load(key, raw)


cdef int leaf_upper_bound(const LeafView *leaf, const uint8_t *key, uint64_t lsn) noexcept nogil:
    """How many entries of the leaf are at or below (key, lsn)."""
    cdef uint8_t target[KEY_SIZE + 8]
    cdef int order = memcmp(key, leaf.data + BLOCK_HEADER + 24, leaf.prefix)
    cdef int suffix = KEY_SIZE - leaf.prefix, low = 0, high = leaf.count, middle
    cdef bint equal_counts = lsn >= leaf.low_lsn
    cdef uint64_t distance = lsn - leaf.low_lsn if equal_counts else 0
    if order != 0:
        return leaf.count if order > 0 else 0
    if leaf.lsn_width == 4 and distance > 0xFFFFFFFFU:
        distance = 0xFFFFFFFFU
    memcpy(target, key + leaf.prefix, suffix)
    put_big(target + suffix, distance, leaf.lsn_width)
    while low < high:
        middle = (low + high) >> 1
        order = memcmp(leaf.entries + middle * leaf.width, target, suffix + leaf.lsn_width)
        if order < 0 or (order == 0 and equal_counts):
            low = middle + 1
        else:
            high = middle
    return low


cdef class LayerFile:
    """A durable delta or image layer; safe for any number of threads.

    `name` is its LayerName, ids are 16 bytes each. The file is opened at the first use and its
    header checked against all of them. Every method that reads raises CorruptLayerError (with
    `path` and `offset`) if what is read is not what was written, and OSError.
    """

    def __cinit__(self, path, name, bytes tenant not None, bytes timeline not None):
        self.fd = -1
        self.path = os.fspath(path)
        self.name = name
        self.key_start = name.key_start
        self.key_end = name.key_end
        self.start_lsn = name.start_lsn
        self.end_lsn = name.end_lsn
        self.is_image = name.is_image
        self.tenant = tenant
        self.timeline = timeline
        self.lock = threading.Lock()

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)
        free(self.fences)

    def __repr__(self):
        return f"LayerFile({self.path!r})"

    # ---- opening

    cdef int ensure_open(self) except -1:
        if not self.ready:
            with self.lock:
                if not self.ready:
                    self._open()
        return 0

    cdef int _open(self) except -1:
        """Open the file, check header and size, load the root."""
        cdef Scratch s
        cdef uint8_t header[HEADER_SIZE]
        cdef int code
        scratch_init(&s)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with nogil:
                code = self._read_at(&s, header, HEADER_SIZE, 0)
            self._raise(code, &s)
            self._check_header(header, os.fstat(self.fd).st_size)
            self._load_root()
        except BaseException:
            os.close(self.fd)
            self.fd = -1
            free(self.fences)
            self.fences = NULL
            raise
        self.ready = True
        return 0

    cdef int _check_header(self, const uint8_t *header, uint64_t size) except -1:
        if memcmp(header, <const char *> b"ZNTHLAYR", 8) != 0:
            self._corrupt(0, "not a layer file")
        if crc32c_update(0xFFFFFFFFU, header, HEADER_CRC) ^ 0xFFFFFFFFU != get32(header + HEADER_CRC):
            self._corrupt(0, "checksum mismatch in the file header")
        if get16(header + 8) != FORMAT_VERSION:
            self._corrupt(8, f"format version {get16(header + 8)}, this program reads {FORMAT_VERSION}")
        if header[10] != (KIND_IMAGE if self.is_image else KIND_DELTA) \
                or memcmp(header + 48, <const char *> self.key_start, KEY_SIZE) != 0 \
                or memcmp(header + 66, <const char *> self.key_end, KEY_SIZE) != 0 \
                or get64(header + 88) != self.start_lsn or get64(header + 96) != self.end_lsn:
            self._corrupt(10, "the header belongs to a layer of another name")
        if header[16:32] != self.tenant or header[32:48] != self.timeline:
            self._corrupt(16, "the header belongs to a layer of another timeline")
        self.entry_count = get64(header + 104)
        self.leaf_offset = get64(header + 112)
        self.root_offset = get64(header + 120)
        self.size = get64(header + 128)
        self.value_bytes = get64(header + 136)
        if self.size != size:
            self._corrupt(min(size, self.size), f"the file has {size} bytes instead of {self.size}")
        if self.leaf_offset < HEADER_SIZE or self.leaf_offset > self.root_offset \
                or self.root_offset > size - min(size, BLOCK_HEADER + ROOT_HEADER):
            self._corrupt(112, "offsets outside of the file")
        return 0

    cdef int _load_root(self) except -1:
        cdef Scratch s
        cdef uint32_t size = <uint32_t> (self.size - self.root_offset - BLOCK_HEADER)
        cdef uint8_t *root
        cdef int code
        if self.size - self.root_offset > 0xFFFFFFFFU:
            self._corrupt(self.root_offset, "malformed block")
        scratch_init(&s)
        root = <uint8_t *> malloc(<size_t> size + BLOCK_HEADER)
        if root == NULL:
            raise MemoryError
        try:
            with nogil:
                code = self._read_at(&s, root, <size_t> size + BLOCK_HEADER, self.root_offset)
                if code == 0:
                    code = check_block(&s, root, self.root_offset, BLOCK_ROOT, size)
            self._raise(code, &s)
            self._parse_root(root + BLOCK_HEADER, size)
        finally:
            free(root)
        return 0

    cdef int _parse_root(self, const uint8_t *p, uint32_t size) except -1:
        cdef uint32_t i, count = get32(p)
        cdef Fence *fence
        if count == 0 or <uint64_t> count * ROOT_ENTRY + ROOT_HEADER != size:
            self._corrupt(self.root_offset, "malformed block")
        self.fences = <Fence *> calloc(count, sizeof(Fence))
        if self.fences == NULL:
            raise MemoryError
        self.n_fences = count
        p += ROOT_HEADER
        for i in range(count):
            fence = &self.fences[i]
            key_load(&fence.key, p)
            fence.lsn = get64_big(p + 18)
            fence.offset = get64(p + 26)
            fence.size = get32(p + 34)
            if fence.size < BLOCK_HEADER + LEAF_HEADER or fence.size > MAX_LEAF_SIZE \
                    or fence.offset < self.leaf_offset \
                    or fence.offset + fence.size > self.root_offset:
                self._corrupt(self.root_offset, "malformed block")
            p += ROOT_ENTRY
        return 0

    # ---- reading blocks

    cdef int _read_at(self, Scratch *s, uint8_t *buffer, size_t size,
                      uint64_t offset) noexcept nogil:
        cdef ssize_t got
        cdef size_t done = 0
        while done < size:
            got = posix_pread(self.fd, buffer + done, size - done, <int64_t> (offset + done))
            if got > 0:
                done += got
            elif got == 0:
                return failed(s, E_SHORT, offset + done)
            elif errno != EINTR:
                s.error_number = errno
                return failed(s, E_IO, offset + done)
        return 0

    cdef int _load_leaf(self, Scratch *s, int64_t number) noexcept nogil:
        cdef LeafView *leaf = &s.leaf
        cdef Fence *fence = &self.fences[number]
        cdef const uint8_t *p = leaf.data + BLOCK_HEADER
        cdef int code
        if leaf.number == number:
            return 0
        leaf.number = -1
        code = self._read_at(s, leaf.data, fence.size, fence.offset)
        if code == 0:
            code = check_block(s, leaf.data, fence.offset, BLOCK_LEAF, fence.size - BLOCK_HEADER)
        if code != 0:
            return code
        leaf.count = get16(p)
        leaf.prefix = p[2]
        leaf.lsn_width = 8 if p[3] & WIDE_LSN else 4
        leaf.block_width = 8 if p[3] & WIDE_BLOCK else 4
        leaf.width = KEY_SIZE - leaf.prefix + leaf.lsn_width + 7 + leaf.block_width
        leaf.low_lsn = get64(p + 8)
        leaf.low_block = get64(p + 16)
        leaf.entries = p + LEAF_HEADER
        if leaf.prefix > KEY_SIZE or leaf.count == 0 \
                or BLOCK_HEADER + LEAF_HEADER + <uint32_t> (leaf.count * leaf.width) != fence.size:
            return failed(s, E_MALFORMED, fence.offset)
        leaf.number = number
        return 0

    cdef int _load_block(self, Scratch *s, uint64_t offset) noexcept nogil:
        """Have the value block at `offset` in the scratch buffer, verified."""
        cdef size_t ahead = BLOCK_HEADER + BLOCK_TARGET
        cdef uint32_t size
        cdef uint8_t *grown
        cdef int code
        if s.block_offset == offset:
            return 0
        s.block_offset = 0
        if offset < HEADER_SIZE or offset > self.leaf_offset - BLOCK_HEADER:
            return failed(s, E_MALFORMED, offset)
        if s.block == NULL:
            s.block = <uint8_t *> malloc(ahead)
            if s.block == NULL:
                return E_NO_MEMORY
            s.block_capacity = ahead
        # The size stands in the block's header; but for long values one read gets all of it.
        if ahead > self.leaf_offset - offset:
            ahead = self.leaf_offset - offset
        code = self._read_at(s, s.block, ahead, offset)
        if code != 0:
            return code
        size = get32(s.block + 4)
        if size > self.leaf_offset - offset - BLOCK_HEADER:
            return failed(s, E_MALFORMED, offset)
        if <size_t> size + BLOCK_HEADER > ahead:
            if <size_t> size + BLOCK_HEADER > s.block_capacity:
                grown = <uint8_t *> realloc(s.block, <size_t> size + BLOCK_HEADER)
                if grown == NULL:
                    return E_NO_MEMORY
                s.block = grown
                s.block_capacity = <size_t> size + BLOCK_HEADER
            code = self._read_at(s, s.block + ahead, size + BLOCK_HEADER - ahead, offset + ahead)
            if code != 0:
                return code
        code = check_block(s, s.block, offset, BLOCK_VALUES, size)
        if code != 0:
            return code
        s.block_offset = offset
        s.block_size = size
        return 0

    cdef int _value(self, Scratch *s, const uint8_t *entry, const uint8_t **data,
                    uint32_t *size) noexcept nogil:
        """Load the value of an entry of the current leaf; it stays valid until the next load."""
        cdef LeafView *leaf = &s.leaf
        cdef const uint8_t *p = entry + KEY_SIZE - leaf.prefix + leaf.lsn_width
        cdef uint32_t offset = get16(p + 1)
        cdef uint64_t block = leaf.low_block
        cdef int code
        size[0] = get32(p + 3)
        block += get64(p + 7) if leaf.block_width == 8 else get32(p + 7)
        code = self._load_block(s, block)
        if code != 0:
            return code
        if <uint64_t> offset + size[0] > s.block_size:
            return failed(s, E_MALFORMED, self.fences[leaf.number].offset)
        data[0] = s.block + BLOCK_HEADER + offset
        return 0

    # ---- lookup

    cdef int64_t _find_leaf(self, const Key *key, uint64_t lsn) noexcept nogil:
        """The last leaf that begins at or below (key, lsn), -1 if there is none."""
        cdef int64_t low = 0, high = self.n_fences, middle
        cdef Fence *fence
        while low < high:
            middle = (low + high) >> 1
            fence = &self.fences[middle]
            if key_less(&fence.key, key) or (key_equal(&fence.key, key) and fence.lsn <= lsn):
                low = middle + 1
            else:
                high = middle
        return low - 1

    cdef int _collect_one(self, Scratch *s, ReadBatch batch, Query *query, uint64_t upper,
                          uint64_t floor) noexcept nogil:
        """Add the values of one key with floor <= LSN <= upper, newest first."""
        cdef int64_t number = self._find_leaf(&query.key, upper)
        cdef int at, code
        cdef bint bounded = True
        cdef uint8_t raw[KEY_SIZE]
        cdef uint8_t flags
        cdef const uint8_t *entry
        cdef const uint8_t *data = NULL
        cdef uint32_t size = 0
        cdef uint64_t lsn
        cdef Key key
        if floor <= query.floor:
            floor = query.floor + 1
        key_store(&query.key, raw)
        while number >= 0:
            code = self._load_leaf(s, number)
            if code != 0:
                return code
            at = leaf_upper_bound(&s.leaf, raw, upper) if bounded else s.leaf.count
            bounded = False
            while at > 0:
                at -= 1
                entry = s.leaf.entries + at * s.leaf.width
                entry_key(&s.leaf, entry, &key)
                lsn = entry_lsn(&s.leaf, entry)
                if not key_equal(&key, &query.key) or lsn < floor:
                    return 0
                code = self._value(s, entry, &data, &size)
                if code != 0:
                    return code
                flags = entry[KEY_SIZE - s.leaf.prefix + s.leaf.lsn_width]
                if batch.add(query, lsn, flags, data, size) != 0:
                    return E_NO_MEMORY
                if flags & WILL_INIT:
                    return 0
            number -= 1
        return 0

    cdef int _collect(self, Scratch *s, ReadBatch batch, int first, int last, uint64_t upper,
                      uint64_t floor) noexcept nogil:
        cdef int i, code
        for i in range(first, last):
            if not batch.queries[i].complete:
                code = self._collect_one(s, batch, &batch.queries[i], upper, floor)
                if code != 0:
                    return code
        return 0

    def read(self, ReadBatch batch not None, int first, int last, uint64_t upper, uint64_t floor):
        """Add to the queries [first, last) of `batch` their values with floor <= LSN <= upper."""
        cdef Scratch s
        cdef int code
        if first < 0 or last > batch.count:
            raise IndexError("no such query")
        self.ensure_open()
        scratch_init(&s)
        with nogil:
            code = self._collect(&s, batch, first, last, upper, floor)
            free(s.block)
        self._raise(code, &s)

    def keys(self, bytes start not None, bytes end not None, uint64_t upper, uint64_t floor):
        """The keys in [start, end) with a value in floor <= LSN <= upper, ascending."""
        cdef Scratch s
        cdef Key low, high, key, previous
        cdef int64_t number
        cdef int at, code
        cdef bint found, any_found = False
        cdef const uint8_t *entry
        cdef list result = []
        key_parse(&low, start)
        key_parse(&high, end)
        previous = low
        self.ensure_open()
        scratch_init(&s)
        number = max(self._find_leaf(&low, 0), 0)
        while number < self.n_fences and key_less(&self.fences[number].key, &high):
            with nogil:
                code = self._load_leaf(&s, number)
            self._raise(code, &s)
            for at in range(s.leaf.count):
                entry = s.leaf.entries + at * s.leaf.width
                entry_key(&s.leaf, entry, &key)
                if key_less(&key, &low) or not key_less(&key, &high) \
                        or not floor <= entry_lsn(&s.leaf, entry) <= upper:
                    continue
                if not any_found or not key_equal(&key, &previous):
                    result.append(key_bytes(&key))
                    previous = key
                    any_found = True
            number += 1
        return result

    def entries(self):
        """All values as (key, lsn, flags, data), in the order of (key, lsn)."""
        cdef int64_t number
        cdef list values
        self.ensure_open()
        for number in range(self.n_fences):
            values = self.leaf_entries(number)
            yield from values

    def leaf_entries(self, int64_t number):
        """The values of one leaf, as `entries` gives them."""
        cdef Scratch s
        cdef Key key
        cdef int at, code
        cdef const uint8_t *entry
        cdef const uint8_t *data = NULL
        cdef uint32_t size = 0
        cdef list result = []
        self.ensure_open()
        if not 0 <= number < self.n_fences:
            raise IndexError("no such leaf")
        scratch_init(&s)
        try:
            with nogil:
                code = self._load_leaf(&s, number)
            self._raise(code, &s)
            for at in range(s.leaf.count):
                entry = s.leaf.entries + at * s.leaf.width
                with nogil:
                    code = self._value(&s, entry, &data, &size)
                self._raise(code, &s)
                entry_key(&s.leaf, entry, &key)
                result.append((
                    key_bytes(&key),
                    entry_lsn(&s.leaf, entry),
                    entry[KEY_SIZE - s.leaf.prefix + s.leaf.lsn_width],
                    (<const char *> data)[:size],
                ))
        finally:
            free(s.block)
        return result

    def describe(self):
        """What the header says: entries, value_bytes, leaves and size of the file."""
        self.ensure_open()
        return {
            "entries": self.entry_count,
            "value_bytes": self.value_bytes,
            "leaves": self.n_fences,
            "size": self.size,
        }

    cdef int _raise(self, int code, Scratch *s) except -1:
        if code == 0:
            return 0
        if code == E_NO_MEMORY:
            raise MemoryError(f"{self.path}: no memory for a read")
        if code == E_IO:
            raise OSError(
                s.error_number,
                f"{os.strerror(s.error_number)} at offset {s.error_offset}",
                self.path,
            )
        self._corrupt(s.error_offset, _REASONS[code])
        return 0

    cdef int _corrupt(self, uint64_t offset, str reason) except -1:
        raise CorruptLayerError(self.path, offset, reason)
