"""Where the open layer keeps the bytes of its values: see value_chunks.pyx.

A position is the number of a chunk << 32 | the offset in it.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.ephemeral_file cimport EphemeralFile, ReadWindow
from pageserver.layered_repository.memory_pool cimport MemoryPool

cdef enum:
    MAX_VALUE_SIZE = 1 << 30

cdef struct Chunk:
    uint8_t *data            # of no meaning once the chunk is in the file
    uint64_t in_file         # offset in the file + 1, 0: in memory
    uint32_t used
    uint32_t capacity
    bint spills              # goes to the file when it is full
    bint lent                # ... and its memory to the next chunk

cdef class ValueChunks:
    cdef EphemeralFile file
    cdef MemoryPool pool
    cdef uint64_t spill_after
    cdef Chunk *chunks
    cdef uint32_t n_chunks, current
    cdef uint64_t in_memory          # bytes of the chunks that are
    cdef uint8_t *spare              # memory of a chunk that is in the file, for the next one
    cdef int64_t last_position       # of the value appended last: its CRC is at hand
    cdef uint32_t last_size, last_crc

    # Writer's side.
    cdef int64_t append(self, const uint8_t *data, uint32_t size) noexcept nogil
    cdef bint holds(self, int64_t position, uint32_t size) noexcept nogil
    cdef int crc_at(self, int64_t position, uint32_t size, uint32_t *crc) noexcept nogil
    cdef uint64_t memory(self) noexcept nogil

    # Readers' side: any thread.
    cdef const uint8_t *checked(self, uint64_t position, uint32_t size, uint32_t crc,
                                ReadWindow *window) noexcept nogil
    cdef uint64_t file_offset(self, uint64_t position) noexcept nogil
    cdef const uint8_t *memory_at(self, uint64_t position) noexcept nogil      # to prefetch only

    # Private.
    cdef int64_t _new_chunk(self, uint32_t capacity) noexcept nogil
    cdef void _spill(self, Chunk *chunk) noexcept nogil
