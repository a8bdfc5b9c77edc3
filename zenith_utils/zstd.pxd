"""Zstandard without the GIL; call zstd_load() first, with the GIL.

A context serves one call at a time; NULL where one is made means that there is no memory.
"""
from libc.stdint cimport int64_t, uint8_t

cdef int zstd_load() except -1

cdef void *zstd_compressor() noexcept nogil
cdef void zstd_free_compressor(void *context) noexcept nogil
# Bytes of the frame made in `target`; 0 if it does not fit there.
cdef size_t zstd_compress(void *context, uint8_t *target, size_t capacity, const uint8_t *source,
                          size_t size, int level) noexcept nogil

cdef void *zstd_decompressor() noexcept nogil
cdef void zstd_free_decompressor(void *context) noexcept nogil
# Bytes of the content; -1 if the frame is damaged or holds more than `capacity`.
cdef int64_t zstd_decompress(void *context, uint8_t *target, size_t capacity,
                             const uint8_t *source, size_t size) noexcept nogil
