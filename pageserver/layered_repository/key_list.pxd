"""A list of keys: see key_list.pyx."""
from pageserver.layered_repository.key cimport Key

cdef class KeyList:
    cdef Key *keys
    cdef size_t count, capacity

    cdef int extend(self, list keys) except -1
    cdef list ascending(self)
