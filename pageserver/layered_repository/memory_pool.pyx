"""Memory that open layers hand on to later ones.

A server that takes in WAL fills layer after layer of about the same size. Memory that is new to the
process has to be cleared by the system first, which takes as long as filling it, and in a virtual
machine much longer. So what a layer gives back is kept, up to a limit, for those that follow.

What is kept is marked as free for the taking (MADV_FREE): if memory gets scarce the system takes it
without a write, so an idle server is no burden to its neighbours.
"""
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pythread cimport (
    WAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
)
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memmove, memset

from pageserver.layered_repository.layer_memory cimport (
    layer_map_huge,
    layer_offer_pages,
    layer_unmap_pages,
)

cdef enum:
    MAX_BLOCKS = 4096


cdef class MemoryPool:
    """Keeps at most `limit` bytes. Blocks are zeroed or hold whatever was in them last."""

    def __cinit__(self, uint64_t limit=0):
        self.limit = limit
        self.lock = PyThread_allocate_lock()
        self.blocks = <Block *> PyMem_RawMalloc(MAX_BLOCKS * sizeof(Block))
        if self.lock == NULL or self.blocks == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.blocks != NULL:
            with nogil:
                self._drop_beyond(0)
            PyMem_RawFree(self.blocks)
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    def resize(self, uint64_t limit):
        """Keep at most `limit` bytes from now on."""
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            self.limit = limit
            self._drop_beyond(limit)
            PyThread_release_lock(self.lock)

    cdef void *take(self, size_t size) noexcept nogil:
        """Memory with any content, NULL without."""
        cdef void *data = self._take_kept(size)
        return data if data != NULL else layer_map_huge(size)

    cdef void *take_zeroed(self, size_t size) noexcept nogil:
        """Zeroed memory, NULL without."""
        cdef void *data = self._take_kept(size)
        if data == NULL:
            return layer_map_huge(size)
        memset(data, 0, size)
        return data

    cdef void give(self, void *data, size_t size) noexcept nogil:
        """Take back what `take` has returned, if anything."""
        if data == NULL:
            return
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        if self.n_blocks < MAX_BLOCKS and self.kept + size <= self.limit:
            layer_offer_pages(data, size)
            self.blocks[self.n_blocks].data = data
            self.blocks[self.n_blocks].size = size
            self.n_blocks += 1
            self.kept += size
            data = NULL
        PyThread_release_lock(self.lock)
        layer_unmap_pages(data, size)

    cdef void *_take_kept(self, size_t size) noexcept nogil:
        """A block of the size, the one given last: it is the likeliest to be in a cache."""
        cdef uint32_t i
        cdef void *data = NULL
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        i = self.n_blocks
        while i:
            i -= 1
            if self.blocks[i].size == size:
                data = self.blocks[i].data
                self.n_blocks -= 1
                self.kept -= size
                memmove(&self.blocks[i], &self.blocks[i + 1],
                        (self.n_blocks - i) * sizeof(Block))
                break
        PyThread_release_lock(self.lock)
        return data

    cdef void _drop_beyond(self, uint64_t limit) noexcept nogil:
        """Give blocks back to the system until `limit` bytes are left; with the lock."""
        while self.kept > limit:
            self.n_blocks -= 1
            self.kept -= self.blocks[self.n_blocks].size
            layer_unmap_pages(self.blocks[self.n_blocks].data, self.blocks[self.n_blocks].size)
