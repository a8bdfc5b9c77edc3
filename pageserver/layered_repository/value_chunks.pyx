"""Where the open layer keeps the bytes of its values: chunks in memory, then in a file.

One thread appends, any number of threads read without a lock. A chunk never moves in memory. When a
chunk beyond the threshold is full it is written to the ephemeral file, and the next one takes its
memory over, which is in the processor's cache then; it stays mapped as long as the layer lives. The
order makes that safe beside readers: the writer sets `Chunk.in_file`, then reuses the memory; a
reader copies the value, then looks at `in_file`. If that is still 0 the copy is good, else the value
is read from the file, where its CRC is checked.

The file is left to the page cache: a layer that is flushed before the system gets round to writing
the file out never costs the disk anything.
"""
from cython cimport no_gc_clear
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pageserver.layered_repository.ephemeral_file cimport (
    EphemeralFile,
    ReadWindow,
    window_free,
    window_room,
)
from pageserver.layered_repository.layer_memory cimport (
    layer_load,
    layer_map_pages,
    layer_read_barrier,
    layer_release_pages,
    layer_store,
    layer_unmap_pages,
    layer_write_barrier,
)
from pageserver.layered_repository.memory_pool cimport HUGE_PAGE, MemoryPool
from zenith_utils.crc32c cimport crc32c_update

cdef enum:
    MAX_CHUNKS = 65536
    PAGE_SIZE = 4096
    FIRST_CHUNK_SIZE = 1 << 18        # what an idle branch takes for a few values stays small
    CHUNK_SIZE = HUGE_PAGE
    OWN_CHUNK_SIZE = 1 << 18          # a value from this size on has a chunk of its own


cdef inline uint32_t crc_of(const uint8_t *data, size_t size) noexcept nogil:
    return crc32c_update(0xFFFFFFFFU, data, size) ^ 0xFFFFFFFFU


@no_gc_clear      # __dealloc__ needs the pool
cdef class ValueChunks:
    """Bytes of values. With a `file` not more than about `spill_after` of them are in memory.

    If the file cannot be written (no space, no directory) the values stay in memory, `memory` says
    so and the next full chunk tries again.
    """

    def __cinit__(self, EphemeralFile file, uint64_t spill_after, MemoryPool pool not None):
        self.file = file
        self.pool = pool
        self.spill_after = spill_after
        self.last_position = -1

    def __dealloc__(self):
        cdef uint32_t i
        # Giving back hundreds of megabytes takes long enough to be done without the GIL.
        with nogil:
            if self.chunks != NULL:
                for i in range(self.n_chunks):
                    if self.chunks[i].lent:
                        continue
                    if self.chunks[i].capacity == CHUNK_SIZE:
                        self.pool.give(self.chunks[i].data, CHUNK_SIZE)
                    else:
                        layer_unmap_pages(self.chunks[i].data, self.chunks[i].capacity)
                self.pool.give(self.spare, CHUNK_SIZE)
                layer_unmap_pages(self.chunks, MAX_CHUNKS * sizeof(Chunk))

    # ---- writer's side

    cdef int64_t _new_chunk(self, uint32_t capacity) noexcept nogil:
        """The index of a new chunk, -1 without memory."""
        cdef Chunk *chunk
        if self.chunks == NULL:
            self.chunks = <Chunk *> layer_map_pages(MAX_CHUNKS * sizeof(Chunk))
            if self.chunks == NULL:
                return -1
        if self.n_chunks >= MAX_CHUNKS:
            return -1
        chunk = &self.chunks[self.n_chunks]
        if self.spare != NULL and capacity == CHUNK_SIZE:
            chunk.data = self.spare
            self.spare = NULL
        elif capacity == CHUNK_SIZE:
            chunk.data = <uint8_t *> self.pool.take(CHUNK_SIZE)
        else:
            chunk.data = <uint8_t *> layer_map_pages(capacity)
        if chunk.data == NULL:
            return -1
        chunk.used = 0
        chunk.capacity = capacity
        chunk.in_file = 0
        chunk.spills = self.file is not None and self.in_memory + capacity > self.spill_after
        self.in_memory += capacity
        self.n_chunks += 1
        return self.n_chunks - 1

    cdef int64_t append(self, const uint8_t *data, uint32_t size) noexcept nogil:
        """Copy the bytes of a value; its position, -1 without memory or beyond MAX_VALUE_SIZE."""
        cdef int64_t index
        cdef Chunk *chunk
        if size > MAX_VALUE_SIZE:
            return -1
        if size >= OWN_CHUNK_SIZE:
            index = self._new_chunk(size)
            if index < 0:
                return -1
        else:
            index = self.current
            if self.n_chunks == 0 or self.chunks[index].used + size > self.chunks[index].capacity:
                if self.n_chunks and self.chunks[index].spills:
                    self._spill(&self.chunks[index])
                index = self._new_chunk(CHUNK_SIZE if self.n_chunks else FIRST_CHUNK_SIZE)
                if index < 0:
                    return -1
                self.current = <uint32_t> index
        chunk = &self.chunks[index]
        if size:
            memcpy(chunk.data + chunk.used, data, size)
        chunk.used += size
        self.last_position = index << 32 | (chunk.used - size)
        if chunk.spills:
            self.last_size = size
            self.last_crc = crc_of(data, size)
            if size >= OWN_CHUNK_SIZE:
                self._spill(chunk)
        return self.last_position

    cdef void _spill(self, Chunk *chunk) noexcept nogil:
        """Move a full chunk to the file, if that can be written.

        Readers learn that it is there before the memory gets another content.
        """
        cdef int64_t offset
        if chunk.in_file:
            return
        offset = self.file.append(chunk.data, chunk.used)
        if offset < 0:
            return
        layer_store(&chunk.in_file, <uint64_t> offset + 1)
        layer_write_barrier()
        if chunk.capacity == CHUNK_SIZE and self.spare == NULL:
            chunk.lent = True
            self.spare = chunk.data
            self.in_memory -= CHUNK_SIZE
        elif layer_release_pages(chunk.data, chunk.capacity) == 0:
            self.in_memory -= chunk.capacity

    cdef int crc_at(self, int64_t position, uint32_t size, uint32_t *crc) noexcept nogil:
        """The CRC of a stored value, 0 if its chunk stays in memory; returns 0, or -1."""
        cdef Chunk *chunk = &self.chunks[position >> 32]
        cdef uint32_t offset = position & 0xFFFFFFFFU
        cdef ReadWindow window
        cdef const uint8_t *data = chunk.data + offset
        if not chunk.spills:
            crc[0] = 0
            return 0
        if position == self.last_position and size == self.last_size:
            crc[0] = self.last_crc
            return 0
        if not chunk.in_file or size == 0:
            crc[0] = crc_of(data, size)
            return 0
        # Another value of the same record has filled the chunk meanwhile.
        memset(&window, 0, sizeof(window))
        data = self.file.read(&window, chunk.in_file - 1 + offset, size, 0)
        if data != NULL:
            crc[0] = crc_of(data, size)
        window_free(&window)
        return 0 if data != NULL else -1

    cdef bint holds(self, int64_t position, uint32_t size) noexcept nogil:
        """Whether `append` has returned the position for a value not smaller than `size`."""
        cdef uint64_t chunk_no = <uint64_t> position >> 32
        return position >= 0 and chunk_no < self.n_chunks \
            and (position & 0xFFFFFFFFU) + size <= self.chunks[chunk_no].used

    cdef uint64_t memory(self) noexcept nogil:
        """Bytes of memory taken."""
        cdef uint64_t total = self.in_memory + (CHUNK_SIZE if self.spare != NULL else 0)
        if self.n_chunks == 0:
            return 0
        # The first chunk is of ordinary pages, which are there as they are used.
        if self.chunks[0].capacity == FIRST_CHUNK_SIZE and not self.chunks[0].in_file:
            total -= FIRST_CHUNK_SIZE - self.chunks[0].used
        return total + PAGE_SIZE

    # ---- readers' side

    cdef const uint8_t *memory_at(self, uint64_t position) noexcept nogil:
        """Where the value is or was in memory."""
        return self.chunks[position >> 32].data + (position & 0xFFFFFFFFU)

    cdef uint64_t file_offset(self, uint64_t position) noexcept nogil:
        """The offset of a value in the file + 1, 0: it is in memory."""
        cdef uint64_t in_file = layer_load(&self.chunks[position >> 32].in_file)
        return in_file + (position & 0xFFFFFFFFU) if in_file else 0

    cdef const uint8_t *checked(self, uint64_t position, uint32_t size, uint32_t crc,
                                ReadWindow *window) noexcept nogil:
        """The bytes of a value, valid until the window's next use; NULL: see the window."""
        cdef Chunk *chunk = &self.chunks[position >> 32]
        cdef uint32_t offset = position & 0xFFFFFFFFU
        cdef uint64_t in_file
        cdef uint8_t *copy
        cdef const uint8_t *data
        if not chunk.spills or size == 0:
            return chunk.data + offset
        in_file = layer_load(&chunk.in_file)
        if in_file == 0:
            # The memory may be released while it is read: copy first, then see whether it was.
            copy = window_room(window, size)
            if copy == NULL:
                return NULL
            memcpy(copy, chunk.data + offset, size)
            layer_read_barrier()
            in_file = layer_load(&chunk.in_file)
            if in_file == 0:
                return copy
        data = self.file.read(window, in_file - 1 + offset, size, in_file - 1 + chunk.used)
        if data != NULL and crc_of(data, size) != crc:
            window.error = 0
            window.failed_at = in_file - 1 + offset
            return NULL
        return data

