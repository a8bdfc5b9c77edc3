"""Cursor over all values of a layer: see layer_scan.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_block cimport Block, ReadError
from pageserver.layered_repository.layer_leaf cimport LeafView
from pageserver.layered_repository.open_layer cimport OpenLayer

cdef struct Window:      # a part of the file in memory
    uint8_t *data
    size_t capacity
    uint64_t start       # in the file
    size_t filled

cdef class LayerScan:
    # The entry that the last `next` went to. `data` is valid until the following call.
    cdef Key key
    cdef uint64_t lsn
    cdef uint8_t flags
    cdef const uint8_t *data
    cdef uint32_t size

    # 1: there is an entry, 0: that was the last one, < 0: failed, see raise_error.
    cdef int next(self) noexcept nogil
    # With the GIL, after a failure; raises CorruptLayerError, OSError or MemoryError.
    cdef int raise_error(self) except -1
    # About how many bytes the values of `key` take in the file from this entry on.
    cdef uint64_t bytes_of_key(self) noexcept nogil

    cdef readonly OpenLayer opened
    cdef readonly uint64_t entry_count, key_count, value_bytes     # so far
    cdef readonly uint64_t block_count, packed_count, index_bytes
    cdef ReadError error
    cdef Window blocks, leaves
    cdef LeafView leaf
    cdef Block block
    cdef int at                  # of the next entry in the leaf
    cdef uint64_t block_offset   # of the current block, 0: none
    cdef uint64_t next_block     # where the next one has to begin
    cdef uint32_t used           # bytes of the current block that had values
    cdef uint8_t *plain
    cdef size_t plain_capacity
    cdef void *decompressor

    cdef int _fail(self, int code, uint64_t offset) noexcept nogil
    cdef const uint8_t *_window(self, Window *window, uint64_t offset, size_t size,
                                uint64_t end) noexcept nogil
    cdef int _next_leaf(self) noexcept nogil
    cdef int _next_block(self, uint64_t offset, uint32_t wanted) noexcept nogil
    cdef int _finish(self) noexcept nogil
