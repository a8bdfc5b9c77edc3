"""The order in which a frozen layer is written: see layer_sort.pyx."""
from libc.stdint cimport uint32_t, uint64_t

from pageserver.layered_repository.inmemory_layer cimport InMemoryLayer

cdef uint32_t *sorted_entries(InMemoryLayer layer, uint64_t *count) noexcept nogil
