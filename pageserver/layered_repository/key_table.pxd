"""The hash table of the open layer: from a key to its newest entry.

A table that is half full is copied into one of twice the size. The old one is kept until the layer
goes, for readers that still walk it.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.layer_memory cimport layer_map_pages, layer_unmap_pages
from pageserver.layered_repository.memory_pool cimport MemoryPool

cdef enum:
    FIRST_TABLE_SLOTS = 512
    HUGE_TABLE_SLOTS = 1 << 18       # 2 MB

cdef struct Table:
    uint64_t mask
    uint64_t used
    Table *retired           # the smaller table this one replaced
    uint64_t *slots          # tag << 32 | (index + 1 of the newest entry), 0: empty


cdef inline uint32_t key_tag(const Key *key) noexcept nogil:
    """A hash whose low bits are the slot. Eight neighbouring keys share a cache line of slots."""
    cdef uint64_t h = key.hi * 0x9E3779B97F4A7C15ULL ^ (key.mid + 0x165667B19E3779F9ULL)
    h = (h ^ (h >> 29)) * 0xC2B2AE3D27D4EB4FULL + (key.lo >> 3)
    h = (h ^ (h >> 32)) * 0x9FB21C651E98DF25ULL
    return (<uint32_t> (h >> 32) & 0xFFFFFFF8U) | (key.lo & 7)


cdef inline Table *table_new(uint64_t slots, MemoryPool pool) noexcept nogil:
    """An empty table, NULL without memory; `slots` is a power of two."""
    cdef Table *table = <Table *> calloc(1, sizeof(Table))
    if table == NULL:
        return NULL
    if slots >= HUGE_TABLE_SLOTS:
        table.slots = <uint64_t *> pool.take_zeroed(slots * sizeof(uint64_t))
    else:
        table.slots = <uint64_t *> layer_map_pages(slots * sizeof(uint64_t))
    if table.slots == NULL:
        free(table)
        return NULL
    table.mask = slots - 1
    return table


cdef inline Table *table_grown(Table *old, MemoryPool pool) noexcept nogil:
    """A copy of twice the size that keeps `old`, NULL without memory."""
    cdef Table *new = table_new((old.mask + 1) * 2, pool)
    cdef uint64_t i, at, slot
    if new == NULL:
        return NULL
    for i in range(old.mask + 1):
        slot = old.slots[i]
        if slot:
            at = (slot >> 32) & new.mask
            while new.slots[at]:
                at = (at + 1) & new.mask
            new.slots[at] = slot
    new.used = old.used
    new.retired = old
    return new


cdef inline void table_free(Table *table, MemoryPool pool) noexcept nogil:
    """Free a table and all that it replaced."""
    cdef Table *retired
    cdef uint64_t size
    while table != NULL:
        retired = table.retired
        size = (table.mask + 1) * sizeof(uint64_t)
        if table.mask + 1 >= HUGE_TABLE_SLOTS:
            pool.give(table.slots, size)
        else:
            layer_unmap_pages(table.slots, size)
        free(table)
        table = retired
