"""Blocks of layer files in memory: their checks, their decompression, and the memory of reads."""
import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from pageserver.layered_repository.block_cache cimport block_release
from pageserver.layered_repository.errors import CorruptLayerError
from pageserver.layered_repository.layer_format cimport *
from zenith_utils.unaligned cimport get32
from zenith_utils.zstd cimport zstd_decompress, zstd_decompressor, zstd_free_decompressor

cdef extern from *:
    """
    #include <stddef.h>

    #define LAYER_POOL_SLOTS 32
    static void *layer_pool[LAYER_POOL_SLOTS];

    /* What a thread left in the pool, NULL if there is nothing. */
    static void *layer_pool_take(void)
    {
        for (int i = 0; i < LAYER_POOL_SLOTS; i++)
            if (__atomic_load_n(&layer_pool[i], __ATOMIC_RELAXED) != NULL) {
                void *p = __atomic_exchange_n(&layer_pool[i], NULL, __ATOMIC_ACQUIRE);
                if (p != NULL)
                    return p;
            }
        return NULL;
    }
    /* Whether there was room for it. */
    static int layer_pool_give(void *p)
    {
        for (int i = 0; i < LAYER_POOL_SLOTS; i++) {
            void *empty = NULL;
            if (__atomic_load_n(&layer_pool[i], __ATOMIC_RELAXED) == NULL
                && __atomic_compare_exchange_n(&layer_pool[i], &empty, p, 0, __ATOMIC_RELEASE,
                                               __ATOMIC_RELAXED))
                return 1;
        }
        return 0;
    }
    """
    void *layer_pool_take() noexcept nogil
    int layer_pool_give(void *p) noexcept nogil

cdef enum:
    POOLED_BUFFER = 1 << 18          # larger ones are given back to the system

_REASONS = {
    E_SHORT: "the file ends early",
    E_CHECKSUM: "checksum mismatch",
    E_KIND: "a block of another kind than expected",
    E_CODEC: "a block compressed by a method this program does not know",
    E_MALFORMED: "malformed block",
    E_COMPRESSED: "damaged compressed data",
    E_ORDER: "the entries of the leaf are out of order",
    E_RANGE: "an entry outside of the layer's keys or LSNs",
    E_INDEX: "the leaf is not what the root says",
    E_PLACE: "values are not where the leaf should have them",
    E_COUNT: "the header's counts are not those of the content",
    E_FILTER: "the filter lacks a key",
}


# ---- memory of reads

cdef Scratch *scratch_take() noexcept nogil:
    cdef Scratch *s = <Scratch *> layer_pool_take()
    if s == NULL:
        s = <Scratch *> calloc(1, sizeof(Scratch))
        if s == NULL:
            return NULL
    s.leaf.number = -1
    s.block_offset = 0
    s.error.code = 0
    s.keep = s.holds_gil = False
    return s


cdef void scratch_give(Scratch *s) noexcept nogil:
    if s == NULL:
        return
    block_release(s.leaf_pin)
    block_release(s.block_pin)
    s.leaf_pin = s.block_pin = NULL
    if s.stored_capacity > POOLED_BUFFER:
        free(s.stored)
        s.stored = NULL
        s.stored_capacity = 0
    if s.plain_capacity > POOLED_BUFFER:
        free(s.plain)
        s.plain = NULL
        s.plain_capacity = 0
    if not layer_pool_give(s):
        free(s.stored)
        free(s.plain)
        if s.decompressor != NULL:
            zstd_free_decompressor(s.decompressor)
        free(s)


cdef int reserve(uint8_t **buffer, size_t *capacity, size_t wanted) noexcept nogil:
    """Have room for `wanted` bytes, whatever was there is lost; 0 or E_NO_MEMORY."""
    if wanted > capacity[0]:
        free(buffer[0])
        capacity[0] = 0
        buffer[0] = <uint8_t *> malloc(wanted)
        if buffer[0] == NULL:
            return E_NO_MEMORY
        capacity[0] = wanted
    return 0


# ---- blocks

cdef int read_failed(ReadError *error, int code, uint64_t offset) noexcept nogil:
    error.code = code
    error.offset = offset
    return code


cdef int open_block(const uint8_t *header, uint64_t offset, uint32_t stored, uint8_t kind,
                    uint8_t *plain, uint32_t limit, void **decompressor, Block *block,
                    ReadError *error) noexcept nogil:
    cdef uint32_t size
    if block_crc(offset, header, header + BLOCK_HEADER, stored - BLOCK_HEADER) != get32(header):
        return read_failed(error, E_CHECKSUM, offset)
    if header[12] != kind:
        return read_failed(error, E_KIND, offset)
    size = get32(header + 8)
    if get32(header + 4) != stored - BLOCK_HEADER or size > limit:
        return read_failed(error, E_MALFORMED, offset)
    if header[13] == CODEC_NONE:
        if size != stored - BLOCK_HEADER:
            return read_failed(error, E_MALFORMED, offset)
        block.payload = header + BLOCK_HEADER
    elif header[13] == CODEC_ZSTD and plain != NULL:
        if decompressor[0] == NULL:
            decompressor[0] = zstd_decompressor()
            if decompressor[0] == NULL:
                return read_failed(error, E_NO_MEMORY, offset)
        if zstd_decompress(decompressor[0], plain, size, header + BLOCK_HEADER,
                           stored - BLOCK_HEADER) != <int64_t> size:
            return read_failed(error, E_COMPRESSED, offset)
        block.payload = plain
    else:
        return read_failed(error, E_CODEC, offset)
    block.size = size
    block.stored = stored
    return 0


cdef int raise_read_error(str path, const ReadError *error) except -1:
    if error.code == E_NO_MEMORY:
        raise MemoryError(f"{path}: no memory for a read")
    if error.code == E_IO:
        raise OSError(
            error.number, f"{os.strerror(error.number)} at offset {error.offset}", path
        )
    raise CorruptLayerError(path, error.offset, _REASONS[error.code])
