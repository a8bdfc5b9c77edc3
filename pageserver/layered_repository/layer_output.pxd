"""The file a layer is written to: see layer_output.pyx."""
from libc.stdint cimport uint8_t, uint64_t

from pageserver.layered_repository.io_stats cimport IoStats

cdef enum:
    OUTPUT_SIZE = 1 << 20
    OUTPUT_RAISED = -2       # `raise_error` raises what the Files object raised

cdef class LayerOutput:
    cdef readonly str path
    cdef object files, raised
    cdef IoStats io              # None: not counted
    cdef bint native
    cdef int fd
    cdef uint64_t position       # in the file, of the first byte of `buffer`
    cdef uint64_t pushed         # up to here the system was asked to start writing
    cdef uint8_t *buffer         # OUTPUT_SIZE bytes
    cdef size_t used

    # 0, an errno, or OUTPUT_RAISED.
    cdef int flush(self) noexcept nogil
    cdef int write(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int write_at(self, const uint8_t *data, size_t size, uint64_t offset) noexcept nogil
    cdef int sync(self) noexcept nogil
    cdef int raise_error(self, int code) except -1
