"""Writer of layer files: see layer_writer.pyx."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pageserver.layered_repository.inmemory_layer cimport InMemoryLayer
from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_format cimport LEAF_ENTRIES

cdef struct LeafEntry:
    Key key
    uint64_t lsn
    uint64_t block        # offset of the value's block in the file
    uint32_t size
    uint16_t offset
    uint8_t flags

cdef class LayerWriter:
    cdef readonly str path
    cdef bytes tenant, timeline
    cdef int fd, error
    cdef readonly uint64_t count, value_bytes
    cdef uint64_t position           # in the file, of the first byte of `out`
    cdef uint64_t pushed             # up to here the system was asked to start writing
    cdef uint8_t *out
    cdef size_t used, block_at
    cdef bint block_open
    cdef LeafEntry[LEAF_ENTRIES] entries
    cdef int n_entries
    cdef uint8_t *index
    cdef size_t index_used, index_capacity
    cdef uint8_t *root
    cdef size_t root_used, root_capacity
    cdef Key first, last
    cdef uint64_t last_lsn

    cdef int add_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil
    cdef int _add_value(self, const uint8_t *data, uint32_t size, LeafEntry *entry) noexcept nogil
    cdef int _add_big_value(self, const uint8_t *data, uint32_t size,
                            LeafEntry *entry) noexcept nogil
    cdef void _close_block(self) noexcept nogil
    cdef int _close_leaf(self) noexcept nogil
    cdef int _flush_out(self) noexcept nogil
    cdef int _write(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int _write_index(self, uint64_t *root_offset) noexcept nogil
    cdef int _add_layer(self, InMemoryLayer layer, uint64_t *added) noexcept nogil
    cdef int _raise(self, int code) except -1
