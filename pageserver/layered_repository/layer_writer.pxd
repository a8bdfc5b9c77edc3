"""Writer of layer files: see layer_writer.pyx."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_format cimport LEAF_ENTRIES, PACKED_TARGET
from pageserver.layered_repository.layer_leaf_encoder cimport LeafEntry
from pageserver.layered_repository.layer_output cimport LayerOutput

cdef struct ImageRef:     # a value to add
    Key key
    const uint8_t *data
    uint32_t size

cdef struct Growing:      # bytes in memory
    uint8_t *data
    size_t used, capacity

cdef class LayerWriter:
    cdef bytes tenant, timeline
    cdef LayerOutput out
    cdef int error
    cdef bint finished           # or removed
    cdef readonly uint64_t count, key_count, value_bytes
    cdef uint32_t block_target
    cdef bint block_open
    cdef uint64_t block_at       # of the open block, in the file
    cdef uint32_t block_size     # of its payload so far
    cdef uint8_t *block          # where that is
    cdef LeafEntry[LEAF_ENTRIES] entries
    cdef int n_entries
    cdef Growing index           # finished leaves
    cdef uint64_t index_bytes    # of their payloads
    cdef Growing root
    cdef Growing hashes          # of the distinct keys
    cdef Key first, last
    cdef uint64_t last_lsn, low_lsn, high_lsn
    cdef void *compressor        # NULL: blocks stay as they are
    cdef uint8_t packing[PACKED_TARGET]

    # Append a value; 0 or a code for raise_error: the order is wrong, no memory, an errno.
    cdef int add_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil
    # Bytes the file has so far, about.
    cdef uint64_t bytes_so_far(self) noexcept nogil
    # With the GIL; raises ValueError, MemoryError, OSError.
    cdef int raise_error(self, int code) except -1

    cdef int _check_ranges(self, object name) except -1
    cdef int _fill_header(self, uint8_t *header, object name) except -1
    cdef int _place_value(self, const uint8_t *data, uint32_t size, LeafEntry *entry) noexcept nogil
    cdef int _place_long_value(self, const uint8_t *data, uint32_t size,
                               LeafEntry *entry) noexcept nogil
    cdef void _store_block(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil
    cdef int _open_block(self) noexcept nogil
    cdef void _close_block(self) noexcept nogil
    cdef int _close_leaf(self) noexcept nogil
    cdef int _write_tail(self, bint filtered, uint64_t *filter_offset,
                         uint64_t *root_offset) noexcept nogil
    cdef int _write_filter(self) noexcept nogil
    cdef int _write_root(self) noexcept nogil
