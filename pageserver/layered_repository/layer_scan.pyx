"""Cursor over all values of a layer in the order of (key, LSN), for merges and for the verifier.

Reads leaves and value blocks in big pieces, verifies all that it passes: checksums, that entries
ascend and lie in the layer's ranges, that leaves are what the root says, and that values and blocks
lie end to end, so that no byte of them is left out. At the end the header's counts have to agree.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from pageserver.layered_repository.key cimport Key, key_bytes, key_equal, key_less
from pageserver.layered_repository.layer_block cimport (
    E_COUNT,
    E_INDEX,
    E_MALFORMED,
    E_NO_MEMORY,
    E_ORDER,
    E_PLACE,
    E_RANGE,
    Block,
    open_block,
    read_failed,
    reserve,
)
from pageserver.layered_repository.layer_format cimport *
from pageserver.layered_repository.layer_leaf cimport (
    LeafEntryView,
    leaf_at,
    leaf_entry,
    leaf_parse,
)
from pageserver.layered_repository.open_layer cimport Fence, OpenLayer
from zenith_utils.unaligned cimport get32
from zenith_utils.zstd cimport zstd_free_decompressor

cdef extern from *:
    """
    #include <fcntl.h>
    #include <stdint.h>

    /* Have the system read a range in the background. */
    static void layer_read_ahead(int fd, uint64_t from, uint64_t size)
    {
        (void) posix_fadvise(fd, (off_t) from, (off_t) size, POSIX_FADV_WILLNEED);
    }
    """
    void layer_read_ahead(int fd, uint64_t start, uint64_t size) noexcept nogil

cdef enum:
    BLOCK_WINDOW = 256 << 10
    LEAF_WINDOW = 64 << 10


cdef class LayerScan:
    """A cursor before the first entry of the layer; for one thread.

    Raises what opening the layer does.
    """

    def __cinit__(self, layer):
        self.opened = layer if isinstance(layer, OpenLayer) else layer.open()
        self.leaf.number = -1
        self.next_block = HEADER_SIZE

    def __dealloc__(self):
        free(self.blocks.data)
        free(self.leaves.data)
        free(self.plain)
        if self.decompressor != NULL:
            zstd_free_decompressor(self.decompressor)

    def __iter__(self):
        return self

    def __next__(self):
        """The next entry as (key, lsn, flags, data)."""
        cdef int result
        with nogil:
            result = self.next()
        if result < 0:
            self.raise_error()
        if result == 0:
            raise StopIteration
        return key_bytes(&self.key), self.lsn, self.flags, (<const char *> self.data)[:self.size]

    @property
    def key_run_size(self):
        """About how many bytes the current key's values take in the file from this entry on."""
        return self.bytes_of_key()

    cdef int next(self) noexcept nogil:
        cdef LeafEntryView entry
        cdef bint same_key = False
        if self.error.code:
            return -1
        if self.at == self.leaf.count:
            if self.leaf.number + 1 == self.opened.n_fences:
                return self._finish()
            if self._next_leaf() != 0:
                return -1
        leaf_entry(&self.leaf, leaf_at(&self.leaf, self.at), &entry)
        if self.entry_count == 0:
            if key_less(&entry.key, &self.opened.first_key):
                return self._fail(E_RANGE, self.opened.fences[self.leaf.number].offset)
        else:
            same_key = key_equal(&entry.key, &self.key)
            if (same_key and entry.lsn <= self.lsn) or key_less(&entry.key, &self.key):
                return self._fail(E_ORDER, self.opened.fences[self.leaf.number].offset)
        if not same_key:
            if not key_less(&entry.key, &self.opened.end_key):
                return self._fail(E_RANGE, self.opened.fences[self.leaf.number].offset)
            self.key = entry.key
            self.key_count += 1
        if not self.opened.start_lsn <= entry.lsn < self.opened.end_lsn:
            return self._fail(E_RANGE, self.opened.fences[self.leaf.number].offset)
        if entry.size > MAX_VALUE_SIZE:
            return self._fail(E_MALFORMED, self.opened.fences[self.leaf.number].offset)
        if entry.block != self.block_offset \
                and self._next_block(entry.block, entry.at + entry.size) != 0:
            return -1
        if entry.at != self.used or entry.size > self.block.size - self.used:
            return self._fail(E_PLACE, self.opened.fences[self.leaf.number].offset)
        self.lsn = entry.lsn
        self.flags = entry.flags
        self.data = self.block.payload + entry.at
        self.size = entry.size
        self.used += entry.size
        self.value_bytes += entry.size
        self.entry_count += 1
        self.at += 1
        return 1

    cdef int _next_leaf(self) noexcept nogil:
        cdef int64_t number = self.leaf.number + 1
        cdef Fence *fence = &self.opened.fences[number]
        cdef uint32_t stored = <uint32_t> (self.opened.fences[number + 1].offset - fence.offset)
        cdef const uint8_t *p
        cdef Block block
        cdef LeafEntryView first
        p = self._window(&self.leaves, fence.offset, stored, self.opened.leaf_end)
        if p == NULL:
            return -1
        if open_block(p, fence.offset, stored, BLOCK_LEAF, NULL, stored, NULL, &block,
                      &self.error) != 0:
            return -1
        if not leaf_parse(&self.leaf, block.payload, block.size):
            return self._fail(E_MALFORMED, fence.offset)
        leaf_entry(&self.leaf, leaf_at(&self.leaf, 0), &first)
        if not key_equal(&first.key, &fence.key) or first.lsn != fence.lsn \
                or first.block != fence.block:
            return self._fail(E_INDEX, fence.offset)
        self.leaf.number = number
        self.index_bytes += block.size
        self.at = 0
        return 0

    cdef int _next_block(self, uint64_t offset, uint32_t wanted) noexcept nogil:
        """Go to the block at `offset`, of which at least `wanted` bytes have to be there."""
        cdef uint32_t target = self.opened.block_target
        cdef uint32_t limit = wanted if wanted > target else target
        cdef uint64_t leaf = self.opened.fences[self.leaf.number].offset, stored
        cdef const uint8_t *p
        if offset != self.next_block or self.used != self.block.size:
            return self._fail(E_PLACE, leaf)
        if offset > self.opened.leaf_offset - BLOCK_HEADER:
            return self._fail(E_MALFORMED, leaf)
        p = self._window(&self.blocks, offset, BLOCK_HEADER, self.opened.leaf_offset)
        if p == NULL:
            return -1
        stored = <uint64_t> get32(p + 4) + BLOCK_HEADER
        if stored > limit + BLOCK_HEADER or stored > self.opened.leaf_offset - offset:
            return self._fail(E_MALFORMED, offset)
        p = self._window(&self.blocks, offset, stored, self.opened.leaf_offset)
        if p == NULL:
            return -1
        if self.opened.codec != CODEC_NONE and reserve(&self.plain, &self.plain_capacity, limit):
            return self._fail(E_NO_MEMORY, offset)
        if open_block(p, offset, <uint32_t> stored, BLOCK_VALUES,
                      self.plain if self.opened.codec != CODEC_NONE else NULL, limit,
                      &self.decompressor, &self.block, &self.error) != 0:
            return -1
        self.block_offset = offset
        self.next_block = offset + stored
        self.used = 0
        self.block_count += 1
        if self.block.size != stored - BLOCK_HEADER:
            self.packed_count += 1
        return 0

    cdef int _finish(self) noexcept nogil:
        """The end: everything was passed, and it is as much as the header says."""
        if self.used != self.block.size or self.next_block != self.opened.leaf_offset:
            return self._fail(E_PLACE, self.next_block)
        if self.entry_count != self.opened.entry_count \
                or self.key_count != self.opened.key_count \
                or self.value_bytes != self.opened.value_bytes \
                or self.index_bytes != self.opened.index_bytes:
            return self._fail(E_COUNT, 0)
        return 0

    cdef const uint8_t *_window(self, Window *window, uint64_t offset, size_t size,
                                uint64_t end) noexcept nogil:
        """`size` bytes of the file at `offset`; NULL if they cannot be read.

        What follows up to `end` is read ahead.
        """
        cdef size_t least = BLOCK_WINDOW if window == &self.blocks else LEAF_WINDOW
        cdef size_t wanted
        if offset >= window.start and offset + size <= window.start + window.filled:
            return window.data + (offset - window.start)
        window.filled = 0
        wanted = size if size > least else least
        if wanted > end - offset:
            wanted = end - offset
        if reserve(&window.data, &window.capacity, size if size > least else least) != 0:
            self._fail(E_NO_MEMORY, offset)
            return NULL
        if self.opened.read_at(window.data, wanted, offset, &self.error) != 0:
            return NULL
        if offset + wanted < end:
            layer_read_ahead(self.opened.fd, offset + wanted, 4 * least)
        window.start = offset
        window.filled = wanted
        return window.data

    cdef uint64_t bytes_of_key(self) noexcept nogil:
        cdef int64_t number = self.leaf.number + 1
        cdef uint64_t total = 0
        cdef LeafEntryView entry
        cdef int at
        if self.at == 0:
            return 0
        if number < self.opened.n_fences and key_equal(&self.opened.fences[number].key, &self.key):
            while number < self.opened.n_fences \
                    and key_equal(&self.opened.fences[number].key, &self.key):
                number += 1
            return self.opened.fences[number].block - self.block_offset
        # The run ends in this leaf.
        for at in range(self.at - 1, self.leaf.count):
            leaf_entry(&self.leaf, leaf_at(&self.leaf, at), &entry)
            if not key_equal(&entry.key, &self.key):
                break
            total += entry.size
        return total

    cdef int _fail(self, int code, uint64_t offset) noexcept nogil:
        """Remember what is wrong; always -1."""
        read_failed(&self.error, code, offset)
        return -1

    cdef int raise_error(self) except -1:
        return self.opened.raise_error(&self.error)
