"""A frozen layer in the order in which it is written: see layer_sort.pyx."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.ephemeral_file cimport ReadWindow
from pageserver.layered_repository.inmemory_layer cimport Entry, InMemoryLayer
from pageserver.layered_repository.key cimport Key

cdef struct Stage:               # a part of `order`
    uint64_t end                 # place after its last one
    uint64_t spilled             # place in `spilled` after its last one

cdef struct Bucket:              # BUCKET_ENTRIES places
    uint64_t bytes               # in the file
    uint32_t values
    uint32_t stage               # of which it is a part

cdef class FrozenLayerScan:
    cdef readonly InMemoryLayer layer
    cdef uint32_t *order         # indexes of the entries, NULL before the first `next`
    cdef uint64_t count, at      # of `order`; the place in it
    cdef int code
    cdef ReadWindow window

    # values out of the ephemeral file, those of one stage
    cdef uint8_t *staged
    cdef uint32_t *staged_at     # by place - stage_start: offset in `staged`, or NOT_STAGED
    cdef uint32_t *place_of      # by index: the place in `order`, or NOT_IN_ORDER
    cdef uint32_t *spilled       # indexes of the entries in the file, by stage
    cdef Stage *stages           # NULL before the first one is needed
    cdef uint64_t stage, stage_start, stage_end

    # the current value, valid until the next call of `next`
    cdef Key key
    cdef uint64_t lsn
    cdef uint8_t flags
    cdef uint32_t size
    cdef const uint8_t *data

    cdef int next(self) noexcept nogil
    cdef int raise_error(self) except -1
    cdef void _fetch_entry(self, uint64_t place) noexcept nogil
    cdef void _fetch_ahead(self) noexcept nogil
    cdef bint _is_replaced(self, uint64_t place) noexcept nogil
    cdef const uint8_t *_checked(self, const Entry *entry) noexcept nogil
    cdef const uint8_t *_value(self, const Entry *entry) noexcept nogil
    cdef bint _is_spilled(self, const Entry *entry) noexcept nogil
    cdef const uint8_t *_place_of_value(self, uint64_t place, const Entry *entry) noexcept nogil
    cdef int _next_stage(self) noexcept nogil
    cdef int _fetch_stage(self, uint64_t first, uint64_t last) noexcept nogil
    cdef int _plan_stages(self) noexcept nogil
    cdef bint _is_staged(self, uint64_t index, const Entry *entry) noexcept nogil
    cdef void _fill_buckets(self, Bucket *buckets) noexcept nogil
    cdef uint64_t _divide(self, Bucket *buckets) noexcept nogil
    cdef void _list_spilled(self, const Bucket *buckets) noexcept nogil
