# distutils: language = c++
"""Sorting of a frozen layer's entries by key and LSN.

The first 14 bytes of a key, its prefix, take few values compared with the entries (for relation
blocks: one for each relation fork). So the distinct prefixes are ranked first; rank and the last
four bytes of the key make a 64-bit sort key, sorted by a radix sort that skips the bytes all have in
common. It is stable: entries of one key keep the order of their puts, which is that of their LSNs.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pageserver.layered_repository.inmemory_layer cimport Entry, InMemoryLayer

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <algorithm>
    #include <new>
    #include <unordered_map>
    #include <vector>

    struct SortItem { uint64_t key; uint32_t index; };

    namespace {

    struct Prefix {
        uint64_t hi, mid;
        bool operator==(const Prefix &o) const { return hi == o.hi && mid == o.mid; }
        bool operator<(const Prefix &o) const { return hi != o.hi ? hi < o.hi : mid < o.mid; }
    };
    struct PrefixHash {
        size_t operator()(const Prefix &p) const
        {
            uint64_t h = (p.hi * 0x9E3779B97F4A7C15ULL) ^ (p.mid + 0x165667B19E3779F9ULL);
            h = (h ^ (h >> 29)) * 0xC2B2AE3D27D4EB4FULL;
            return (size_t) (h ^ (h >> 32));
        }
    };

    /* Numbers the prefixes in the order they come, then ranks them. */
    class PrefixTable {
    public:
        uint32_t number(uint64_t hi, uint64_t mid)
        {
            const Prefix prefix = {hi, mid};
            if (!prefixes.empty() && prefixes[last] == prefix)
                return last;
            auto found = numbers.emplace(prefix, (uint32_t) prefixes.size());
            if (found.second)
                prefixes.push_back(prefix);
            return last = found.first->second;
        }
        std::vector<uint32_t> ranks() const
        {
            std::vector<uint32_t> order(prefixes.size()), rank(prefixes.size());
            for (uint32_t i = 0; i < order.size(); i++)
                order[i] = i;
            std::sort(order.begin(), order.end(), [this](uint32_t a, uint32_t b)
                      { return prefixes[a] < prefixes[b]; });
            for (uint32_t i = 0; i < order.size(); i++)
                rank[order[i]] = i;
            return rank;
        }
    private:
        std::unordered_map<Prefix, uint32_t, PrefixHash> numbers;
        std::vector<Prefix> prefixes;
        uint32_t last = 0;
    };

    void radix_sort(SortItem *&items, SortItem *&other, uint64_t n)
    {
        std::vector<uint64_t> counts(8 * 256, 0);
        for (uint64_t i = 0; i < n; i++)
            for (int digit = 0; digit < 8; digit++)
                counts[digit * 256 + ((items[i].key >> (8 * digit)) & 255)]++;
        for (int digit = 0; digit < 8; digit++) {
            uint64_t *count = &counts[digit * 256], start = 0;
            if (count[(items[0].key >> (8 * digit)) & 255] == n)
                continue;
            for (int value = 0; value < 256; value++) {
                uint64_t here = count[value];
                count[value] = start;
                start += here;
            }
            for (uint64_t i = 0; i < n; i++)
                other[count[(items[i].key >> (8 * digit)) & 255]++] = items[i];
            std::swap(items, other);
        }
    }

    }

    static void *prefix_table_new(void) { return new (std::nothrow) PrefixTable; }
    static void prefix_table_free(void *table) { delete (PrefixTable *) table; }

    /* The number of a prefix; -1 without memory. */
    static int64_t prefix_number(void *table, uint64_t hi, uint64_t mid)
    {
        try { return ((PrefixTable *) table)->number(hi, mid); }
        catch (const std::bad_alloc &) { return -1; }
    }

    /* Sorts items whose keys are prefix number << 32 | last four bytes. The result is in *items,
       which may have changed places with *other. 0, or -1 without memory. */
    static int sort_items(void *table, SortItem **items, SortItem **other, uint64_t n)
    {
        try {
            const std::vector<uint32_t> rank = ((PrefixTable *) table)->ranks();
            bool sorted = true;
            for (uint64_t i = 0; i < n; i++) {
                SortItem &item = (*items)[i];
                item.key = (uint64_t) rank[item.key >> 32] << 32 | (uint32_t) item.key;
                if (i && item.key < (*items)[i - 1].key)
                    sorted = false;
            }
            if (!sorted)
                radix_sort(*items, *other, n);
            return 0;
        }
        catch (const std::bad_alloc &) { return -1; }
    }
    """
    struct SortItem:
        uint64_t key
        uint32_t index
    void *prefix_table_new() noexcept nogil
    void prefix_table_free(void *table) noexcept nogil
    long long prefix_number(void *table, uint64_t hi, uint64_t mid) noexcept nogil
    int sort_items(void *table, SortItem **items, SortItem **other, uint64_t n) noexcept nogil


cdef uint32_t *sorted_entries(InMemoryLayer layer, uint64_t *count) noexcept nogil:
    """Indexes of the entries below the layer's end LSN, sorted by key, LSN and order of the puts.

    NULL without memory; else to be freed by the caller, `count` entries.
    """
    cdef uint64_t i, n = 0
    cdef void *table = prefix_table_new()
    cdef SortItem *items = <SortItem *> malloc((layer.n_entries + 1) * sizeof(SortItem))
    cdef SortItem *other = <SortItem *> malloc((layer.n_entries + 1) * sizeof(SortItem))
    cdef uint32_t *result = NULL
    cdef Entry *entry
    cdef long long number
    cdef bint ok = table != NULL and items != NULL and other != NULL
    i = 0
    while ok and i < layer.n_entries:
        entry = layer.entry_at(i)
        if entry.lsn < layer.end_lsn:
            number = prefix_number(table, entry.hi, entry.mid >> 16)
            ok = number >= 0
            items[n].key = <uint64_t> number << 32 | (entry.mid & 0xFFFF) << 16 | entry.lo
            items[n].index = <uint32_t> i
            n += 1
        i += 1
    if ok and (n == 0 or sort_items(table, &items, &other, n) == 0):
        # `other` has served; it is large enough for the indexes.
        result = <uint32_t *> other
        other = NULL
        for i in range(n):
            result[i] = items[i].index
        count[0] = n
    free(items)
    free(other)
    if table != NULL:
        prefix_table_free(table)
    return result
