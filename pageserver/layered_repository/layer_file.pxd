"""Reader of layer files: see layer_file.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.key cimport KEY_SIZE, Key
from pageserver.layered_repository.layer_format cimport MAX_LEAF_SIZE
from pageserver.layered_repository.read_batch cimport Query, ReadBatch

cdef struct Fence:
    Key key              # first key of the leaf
    uint64_t lsn         # and its LSN
    uint64_t offset      # of the leaf in the file
    uint32_t size

cdef struct LeafView:    # a checked leaf in memory
    int64_t number       # -1: none loaded
    int count
    int prefix
    int lsn_width
    int block_width
    int width
    uint64_t low_lsn
    uint64_t low_block
    const uint8_t *entries
    uint8_t data[MAX_LEAF_SIZE]

cdef struct Scratch:     # of one read; nothing is shared between threads
    LeafView leaf
    uint8_t *block       # header and payload of the value block loaded last
    size_t block_capacity
    uint64_t block_offset        # 0: none loaded
    uint32_t block_size
    uint64_t error_offset
    int error_number

cdef class LayerFile:
    cdef readonly str path
    cdef readonly object name
    cdef readonly bytes key_start, key_end
    cdef readonly uint64_t start_lsn, end_lsn
    cdef readonly bint is_image
    cdef bytes tenant, timeline
    cdef object lock
    cdef int fd
    cdef bint ready
    cdef uint64_t entry_count, leaf_offset, root_offset, size, value_bytes
    cdef Fence *fences
    cdef uint32_t n_fences

    cdef int ensure_open(self) except -1
    cdef int _open(self) except -1
    cdef int _check_header(self, const uint8_t *header, uint64_t size) except -1
    cdef int _load_root(self) except -1
    cdef int _parse_root(self, const uint8_t *p, uint32_t size) except -1
    cdef int _read_at(self, Scratch *s, uint8_t *buffer, size_t size, uint64_t offset) noexcept nogil
    cdef int _load_leaf(self, Scratch *s, int64_t number) noexcept nogil
    cdef int _load_block(self, Scratch *s, uint64_t offset) noexcept nogil
    cdef int _value(self, Scratch *s, const uint8_t *entry, const uint8_t **data,
                    uint32_t *size) noexcept nogil
    cdef int64_t _find_leaf(self, const Key *key, uint64_t lsn) noexcept nogil
    cdef int _collect_one(self, Scratch *s, ReadBatch batch, Query *query, uint64_t upper,
                          uint64_t floor) noexcept nogil
    cdef int _collect(self, Scratch *s, ReadBatch batch, int first, int last, uint64_t upper,
                      uint64_t floor) noexcept nogil
    cdef int _raise(self, int code, Scratch *s) except -1
    cdef int _corrupt(self, uint64_t offset, str reason) except -1
