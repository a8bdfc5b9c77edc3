"""A frozen layer in the order in which it is written: see layer_sort.pyx."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.ephemeral_file cimport ReadWindow
from pageserver.layered_repository.inmemory_layer cimport Entry, InMemoryLayer
from pageserver.layered_repository.key cimport Key

cdef extern from *:
    """
    struct SortItem { uint64_t key; uint32_t index; };
    """
    struct SortItem:
        uint64_t key
        uint32_t index

cdef class FrozenLayerScan:
    cdef readonly InMemoryLayer layer
    cdef uint32_t *order         # indexes of the entries, NULL before the first `next`
    cdef uint64_t count, at      # of `order`; the place in it
    cdef int code
    cdef ReadWindow window

    # values out of the ephemeral file for the next places in `order`
    cdef uint8_t *staged
    cdef uint32_t *staged_at     # by place - stage_start: offset in `staged`
    cdef SortItem *wanted
    cdef SortItem *sorting
    cdef uint64_t stage_start, stage_end

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
    cdef int _stage(self) noexcept nogil
