"""Memory of the open layer: pages straight from the system, and how threads hand over what is there.

Untouched pages cost nothing and freed ones leave the process at once.
"""
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #ifndef ZENITH_LAYER_MEMORY
    #define ZENITH_LAYER_MEMORY
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <stdint.h>
    #include <stddef.h>
    #include <sys/mman.h>

    static inline void *layer_map_anonymous(size_t size)
    {
        void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    /* Zeroed memory of which little may be used: never a huge page for the first byte. */
    static inline void *layer_map_pages(size_t size)
    {
        void *p = layer_map_anonymous(size);
    #ifdef MADV_NOHUGEPAGE
        if (p)
            (void) madvise(p, size, MADV_NOHUGEPAGE);
    #endif
        return p;
    }
    /* A multiple of 2 MB that will be filled from end to end: huge pages, if there are any, save
       most of the page faults, which otherwise take longer than filling the memory. */
    static inline void *layer_map_huge(size_t size)
    {
        const size_t huge = (size_t) 2 << 20;
        char *p = (char *) layer_map_anonymous(size + huge), *aligned;
        if (p == NULL)
            return NULL;
        aligned = (char *) (((uintptr_t) p + huge - 1) & ~(uintptr_t) (huge - 1));
        if (aligned > p)
            munmap(p, (size_t) (aligned - p));
        if (aligned < p + huge)
            munmap(aligned + size, (size_t) (p + huge - aligned));
    #ifdef MADV_HUGEPAGE
        (void) madvise(aligned, size, MADV_HUGEPAGE);
    #endif
        return aligned;
    }
    static inline void layer_unmap_pages(void *p, size_t size) { if (p) munmap(p, size); }
    /* Give the memory back and keep the addresses, which read as zeros from now on; 0 or -1. */
    static inline int layer_release_pages(void *p, size_t size)
    { return madvise(p, size, MADV_DONTNEED); }

    /* Let the system have the memory back when it needs some: the content is kept or zeros. */
    static inline void layer_offer_pages(void *p, size_t size)
    {
    #ifdef MADV_FREE
        (void) madvise(p, size, MADV_FREE);
    #else
        (void) p; (void) size;
    #endif
    }

    /* Everything written before a store is there for whoever loads what it stored. */
    static inline uint64_t layer_load(const uint64_t *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void layer_store(uint64_t *p, uint64_t v)
    { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    /* What is loaded after it is no older than what was read before it. */
    static inline void layer_read_barrier(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    /* What is stored after it is seen by nobody who does not see what was stored before it. */
    static inline void layer_write_barrier(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    /* Fetch memory that is soon read. The empty assembly keeps the compiler from taking callers that
       do nothing else for functions without effect, which it drops. */
    static inline void layer_fetch(const void *p, size_t size)
    {
        const char *line = (const char *) ((uintptr_t) p & ~(uintptr_t) 63);
        __asm__ volatile ("");
        for (; line < (const char *) p + size; line += 64)
            __builtin_prefetch(line);
    }
    #define layer_load_pointer(p) __atomic_load_n((void **) &(p), __ATOMIC_ACQUIRE)
    #define layer_store_pointer(p, v) __atomic_store_n((void **) &(p), (void *) (v), __ATOMIC_RELEASE)
    #endif
    """
    void *layer_map_pages(size_t size) noexcept nogil
    void *layer_map_huge(size_t size) noexcept nogil
    void layer_unmap_pages(void *p, size_t size) noexcept nogil
    int layer_release_pages(void *p, size_t size) noexcept nogil
    void layer_offer_pages(void *p, size_t size) noexcept nogil
    void layer_read_barrier() noexcept nogil
    void layer_write_barrier() noexcept nogil
    void layer_fetch(const void *p, size_t size) noexcept nogil
    uint64_t layer_load(const uint64_t *p) noexcept nogil
    void layer_store(uint64_t *p, uint64_t v) noexcept nogil
    void *layer_load_pointer(void *p) noexcept nogil
    void layer_store_pointer(void *p, const void *v) noexcept nogil
