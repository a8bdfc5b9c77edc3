"""Zstandard compression with the system's libzstd.so.1, loaded at its first use.

The prototypes are libzstd's stable API (zstd.h, since 1.0): neither its header nor a compiled
binding has to be installed, only the library, which PostgreSQL's own package depends on.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <stddef.h>
    #include <stdint.h>

    #define ZENITH_ZSTD_LIBRARY "libzstd.so.1"

    static void *(*zenith_zstd_create_cctx)(void);
    static size_t (*zenith_zstd_free_cctx)(void *);
    static size_t (*zenith_zstd_compress_cctx)(void *, void *, size_t, const void *, size_t, int);
    static void *(*zenith_zstd_create_dctx)(void);
    static size_t (*zenith_zstd_free_dctx)(void *);
    static size_t (*zenith_zstd_decompress_dctx)(void *, void *, size_t, const void *, size_t);
    static unsigned (*zenith_zstd_is_error)(size_t);
    static unsigned (*zenith_zstd_version)(void);
    static int zenith_zstd_loaded;

    /* NULL, or what is wrong. */
    static const char *zenith_zstd_open(void)
    {
        void *library = dlopen(ZENITH_ZSTD_LIBRARY, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL)
            return dlerror();
    #define ZENITH_ZSTD_BIND(pointer, name) \\
        if ((*(void **) &pointer = dlsym(library, name)) == NULL) \\
            return "it lacks the function " name;
        ZENITH_ZSTD_BIND(zenith_zstd_create_cctx, "ZSTD_createCCtx")
        ZENITH_ZSTD_BIND(zenith_zstd_free_cctx, "ZSTD_freeCCtx")
        ZENITH_ZSTD_BIND(zenith_zstd_compress_cctx, "ZSTD_compressCCtx")
        ZENITH_ZSTD_BIND(zenith_zstd_create_dctx, "ZSTD_createDCtx")
        ZENITH_ZSTD_BIND(zenith_zstd_free_dctx, "ZSTD_freeDCtx")
        ZENITH_ZSTD_BIND(zenith_zstd_decompress_dctx, "ZSTD_decompressDCtx")
        ZENITH_ZSTD_BIND(zenith_zstd_is_error, "ZSTD_isError")
        ZENITH_ZSTD_BIND(zenith_zstd_version, "ZSTD_versionNumber")
        zenith_zstd_loaded = 1;
        return NULL;
    }
    """
    const char *zenith_zstd_open()
    int zenith_zstd_loaded
    void *zenith_zstd_create_cctx() nogil
    size_t zenith_zstd_free_cctx(void *context) nogil
    size_t zenith_zstd_compress_cctx(void *context, void *target, size_t capacity,
                                     const void *source, size_t size, int level) nogil
    void *zenith_zstd_create_dctx() nogil
    size_t zenith_zstd_free_dctx(void *context) nogil
    size_t zenith_zstd_decompress_dctx(void *context, void *target, size_t capacity,
                                       const void *source, size_t size) nogil
    unsigned int zenith_zstd_is_error(size_t code) nogil
    unsigned int zenith_zstd_version()


class ZstdUnavailable(Exception):
    """The system has no usable libzstd."""


class ZstdError(ValueError):
    """Data that is not what zstd made, or more of it than was expected."""


cdef int zstd_load() except -1:
    """Load the library. Raises ZstdUnavailable; the functions below need it loaded."""
    cdef const char *problem
    if not zenith_zstd_loaded:
        problem = zenith_zstd_open()
        if problem != NULL:
            raise ZstdUnavailable(
                f"cannot use libzstd.so.1 ({problem.decode(errors='replace')}): install the "
                "package libzstd1 (libzstd on other systems), on which PostgreSQL's depends too"
            )
    return 0


cdef void *zstd_compressor() noexcept nogil:
    return zenith_zstd_create_cctx()


cdef void zstd_free_compressor(void *context) noexcept nogil:
    if context != NULL:
        zenith_zstd_free_cctx(context)


cdef size_t zstd_compress(void *context, uint8_t *target, size_t capacity, const uint8_t *source,
                          size_t size, int level) noexcept nogil:
    cdef size_t written = zenith_zstd_compress_cctx(context, target, capacity, source, size, level)
    return 0 if zenith_zstd_is_error(written) else written


cdef void *zstd_decompressor() noexcept nogil:
    return zenith_zstd_create_dctx()


cdef void zstd_free_decompressor(void *context) noexcept nogil:
    if context != NULL:
        zenith_zstd_free_dctx(context)


cdef int64_t zstd_decompress(void *context, uint8_t *target, size_t capacity,
                             const uint8_t *source, size_t size) noexcept nogil:
    cdef size_t written = zenith_zstd_decompress_dctx(context, target, capacity, source, size)
    return -1 if zenith_zstd_is_error(written) else <int64_t> written


def version():
    """The library's version as text. Raises ZstdUnavailable."""
    zstd_load()
    cdef unsigned int number = zenith_zstd_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def compress(const uint8_t[::1] data not None, int level=1):
    """`data` as one zstd frame. Raises ZstdUnavailable, MemoryError."""
    cdef size_t size = data.shape[0], capacity, written
    cdef bytes target
    cdef uint8_t *to
    cdef const uint8_t *source = &data[0] if size else NULL
    cdef void *context
    zstd_load()
    capacity = size + size // 128 + 512        # above ZSTD_compressBound for every size
    target = PyBytes_FromStringAndSize(NULL, capacity)
    to = <uint8_t *> <char *> target
    context = zstd_compressor()
    if context == NULL:
        raise MemoryError("no memory for a zstd context")
    with nogil:
        written = zstd_compress(context, to, capacity, source, size, level)
        zstd_free_compressor(context)
    if written == 0:
        raise MemoryError("no memory to compress")
    return target[:written]


def decompress(const uint8_t[::1] data not None, Py_ssize_t limit):
    """The content of a zstd frame of at most `limit` bytes.

    Raises ZstdError if it is not one or holds more, ZstdUnavailable, MemoryError.
    """
    cdef size_t size = data.shape[0]
    cdef int64_t written
    cdef bytes target
    cdef uint8_t *to
    cdef const uint8_t *source = &data[0] if size else NULL
    cdef void *context
    zstd_load()
    if limit < 0:
        raise ValueError("the limit is negative")
    target = PyBytes_FromStringAndSize(NULL, limit)
    to = <uint8_t *> <char *> target
    context = zstd_decompressor()
    if context == NULL:
        raise MemoryError("no memory for a zstd context")
    with nogil:
        written = zstd_decompress(context, to, limit, source, size)
        zstd_free_decompressor(context)
    if written < 0:
        raise ZstdError(f"not a zstd frame of at most {limit} bytes")
    return target[:written]
