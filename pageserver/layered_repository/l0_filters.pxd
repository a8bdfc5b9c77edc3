"""The key filters of all L0 deltas at once: see l0_filters.pyx."""
from libc.stdint cimport uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_map cimport LayerMap

cdef bint l0_may_contain(LayerMap layers, const Key *key, uint64_t upper) except -1
