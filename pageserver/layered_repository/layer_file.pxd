"""Reader of layer files: see layer_file.pyx; for reads without the GIL open_layer.pxd."""
from libc.stdint cimport uint64_t

from pageserver.layered_repository.block_cache cimport BlockCache
from pageserver.layered_repository.io_stats cimport IoStats
from pageserver.layered_repository.layer_scan cimport LayerScan
from pageserver.layered_repository.open_layer cimport OpenLayer
from pageserver.layered_repository.read_batch cimport ReadBatch

cdef class LayerFile:
    cdef readonly str path
    cdef readonly object name
    cdef readonly bytes key_start, key_end
    cdef readonly uint64_t start_lsn, end_lsn
    cdef readonly bint is_image
    cdef public bint gone        # set by whoever unlinks the file, before
    cdef bytes tenant, timeline
    cdef object descriptors, lock, known_size
    cdef BlockCache blocks       # None: blocks are not kept
    cdef IoStats io              # None: not counted
    cdef uint64_t number         # of the file there, 0 until it was opened
    cdef tuple identity          # of the file that was open last
    cdef object __weakref__
    cdef OpenLayer opened        # None while closed
    cdef bint used               # since the descriptor cache last asked

    cpdef OpenLayer open(self)
    cpdef read(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor)
    cdef OpenLayer _open(self)
    cdef void _forget_blocks(self) noexcept
