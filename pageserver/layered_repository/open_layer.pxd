"""An open layer file and lookups in it without the GIL: see open_layer.pyx.

A loop over many layers takes, with the GIL, `opened = layer.open()` for each one (see LayerFile)
and keeps the references as long as it runs. Without the GIL it calls `opened.may_contain(key)` and
`opened.collect(...)`; what is evicted or removed meanwhile stays readable for it. `collect` returns
0, or a code that it leaves with its details in the caller's ReadError; with the GIL again
`opened.raise_error(&error)` makes the exception of it. What it added to the batch before an error
is right but not complete.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.block_cache cimport BlockCache
from pageserver.layered_repository.io_stats cimport IoStats
from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_block cimport ReadError, Scratch
from pageserver.layered_repository.read_batch cimport Query, ReadBatch

cdef struct Fence:       # of a leaf, as in the root
    Key key              # of its first entry
    uint64_t lsn         # of that entry
    uint64_t offset      # of the leaf in the file; it ends where the next one begins
    uint64_t block       # offset of the block of its first value

cdef class OpenLayer:
    cdef readonly str path
    cdef readonly uint64_t size, entry_count, key_count, value_bytes, index_bytes
    cdef readonly uint64_t leaf_offset, leaf_end, filter_offset, root_offset
    cdef readonly uint32_t block_target
    cdef readonly uint8_t codec
    cdef int fd
    cdef BlockCache blocks       # None: blocks are not kept
    cdef IoStats io              # None: not counted
    cdef uint64_t number         # of the file, in `blocks`
    cdef tuple identity          # no other file has it
    cdef Key first_key, end_key
    cdef uint64_t start_lsn, end_lsn
    cdef Fence *fences           # n_fences, and one more that ends the last leaf
    cdef readonly uint32_t n_fences
    cdef uint8_t *filter         # NULL: the file has none
    cdef readonly uint64_t filter_lines

    # Lookups, for any number of threads.
    cdef bint may_contain(self, const Key *key) noexcept nogil
    cdef int collect(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor,
                     ReadError *error) noexcept nogil
    cdef int collect_cached(self, ReadBatch batch, int first, int last, uint64_t upper,
                            uint64_t floor, ReadError *error) noexcept
    cdef int raise_error(self, const ReadError *error) except -1

    # The parts of a lookup.
    cdef int read_at(self, uint8_t *buffer, size_t size, uint64_t offset,
                     ReadError *error) noexcept nogil
    cdef int64_t find_leaf(self, const Key *key, uint64_t lsn) noexcept nogil
    cdef int load_leaf(self, Scratch *s, int64_t number) noexcept nogil
    cdef int load_block(self, Scratch *s, uint64_t offset, uint32_t wanted) noexcept nogil
    cdef int load_value(self, Scratch *s, uint64_t block, uint32_t at, uint32_t size,
                        const uint8_t **data) noexcept nogil
    cdef int _read_leaf(self, Scratch *s, int64_t number) noexcept nogil
    cdef int _read_block(self, Scratch *s, uint64_t offset, uint32_t wanted) noexcept nogil
    cdef int _collect(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor,
                      bint holds_gil, ReadError *error) noexcept nogil
    cdef int _collect_one(self, Scratch *s, ReadBatch batch, Query *query, int64_t number,
                          uint64_t upper, uint64_t floor) noexcept nogil
    cdef bint _leaf_covers(self, int64_t number, const Key *key, uint64_t lsn) noexcept nogil
    cdef void _fetch_filter_line(self, const Key *key) noexcept nogil

    cdef int _check_header(self, const uint8_t *header, object name, bytes tenant,
                           bytes timeline) except -1
    cdef int _check_layout(self, const uint8_t *header, uint64_t size) except -1
    cdef int _load_root(self) except -1
    cdef int _parse_root(self, const uint8_t *p, uint64_t size) except -1
    cdef int _load_filter(self) except -1
    cdef int _corrupt(self, uint64_t offset, str reason) except -1
