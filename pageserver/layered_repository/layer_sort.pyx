# distutils: language = c++
"""A frozen layer in the order of key and LSN.

The first 14 bytes of a key, its prefix, take few values compared with the entries (for relation
blocks: one for each relation fork). So the distinct prefixes are ranked first; rank and the last
four bytes of the key make a 64-bit sort key, sorted by a radix sort that skips the bytes all have in
common. It is stable: entries of one key keep the order of their puts, which is that of their LSNs.

Values in the ephemeral file lie in the order of the puts. They are fetched for many entries at once,
in the order of the file, so that it is read in few large pieces even if the keys came at random.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from pageserver.layered_repository.ephemeral_file cimport window_free
from pageserver.layered_repository.inmemory_layer cimport (
    READ_FAILED,
    READ_NO_MEMORY,
    Entry,
    InMemoryLayer,
    entry_key,
)
from pageserver.layered_repository.layer_memory cimport layer_fetch

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <algorithm>
    #include <new>
    #include <unordered_map>
    #include <vector>

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

    /* The result is in *items, which may have changed places with *other. 0, or -1 without memory. */
    static int sort_by_key(SortItem **items, SortItem **other, uint64_t n)
    {
        try { radix_sort(*items, *other, n); return 0; }
        catch (const std::bad_alloc &) { return -1; }
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
    int sort_by_key(SortItem **items, SortItem **other, uint64_t n) noexcept nogil
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


cdef enum:
    FETCH_AHEAD = 12             # places; entries twice as far
    MAX_FETCHED = 512            # bytes of a value: the processor fetches on by itself
    STAGE_SIZE = 32 << 20        # bytes of values fetched from the ephemeral file at once
    STAGE_ENTRIES = 1 << 19      # places in the order this may be for
    BIG_VALUE = 1 << 20          # not worth to stage
    SORTED = 1                   # `code` once the order is there


cdef class FrozenLayerScan:
    """All values of a frozen layer below its end LSN, by key and LSN, the replaced ones left out."""

    def __cinit__(self, InMemoryLayer layer not None):
        if not layer.sealed:
            raise ValueError("the layer is still open")
        self.layer = layer

    def __dealloc__(self):
        free(self.order)
        free(self.staged)
        free(self.staged_at)
        free(self.wanted)
        free(self.sorting)
        window_free(&self.window)

    cdef int next(self) noexcept nogil:
        """Go to the next value: 1; 0 at the end; below 0: call raise_error."""
        cdef const Entry *entry
        if self.code != SORTED:
            if self.code < 0:
                return self.code
            self.order = sorted_entries(self.layer, &self.count)
            if self.order == NULL:
                self.code = READ_NO_MEMORY
                return self.code
            self.code = SORTED
        while self.at < self.count and self._is_replaced(self.at):
            self.at += 1
        if self.at >= self.count:
            return 0
        self._fetch_ahead()
        entry = self.layer.entry_at(self.order[self.at])
        self.data = self._value(entry)
        if self.data == NULL:
            self.code = READ_FAILED
            return self.code
        self.key = entry_key(entry)
        self.lsn = entry.lsn
        self.flags = entry.flags
        self.size = entry.size
        self.at += 1
        return 1

    cdef inline void _fetch_entry(self, uint64_t place) noexcept nogil:
        if place < self.count:
            layer_fetch(self.layer.entry_at(self.order[place]), sizeof(Entry))

    cdef inline void _fetch_ahead(self) noexcept nogil:
        """Entries and values lie in the order of the puts: fetch them ahead of their use."""
        cdef uint64_t place = self.at + FETCH_AHEAD
        cdef const Entry *entry
        self._fetch_entry(place + FETCH_AHEAD)
        if place < self.count:
            entry = self.layer.entry_at(self.order[place])
            layer_fetch(self.layer.values.memory_at(entry.position),
                        entry.size if entry.size < MAX_FETCHED else MAX_FETCHED)

    cdef inline bint _is_replaced(self, uint64_t place) noexcept nogil:
        """Whether a later put of the same key at the same LSN follows."""
        cdef const Entry *entry
        cdef const Entry *following
        if self.layer.n_replaced == 0 or place + 1 >= self.count:
            return False
        entry = self.layer.entry_at(self.order[place])
        following = self.layer.entry_at(self.order[place + 1])
        return following.lsn == entry.lsn and following.mid == entry.mid \
            and following.lo == entry.lo and following.hi == entry.hi

    cdef inline const uint8_t *_checked(self, const Entry *entry) noexcept nogil:
        return self.layer.values.checked(entry.position, entry.size, entry.crc, &self.window)

    cdef const uint8_t *_value(self, const Entry *entry) noexcept nogil:
        """The bytes of the entry at the current place, NULL: see the window."""
        if self.layer.values.file_offset(entry.position) == 0 or entry.size >= BIG_VALUE:
            return self._checked(entry)
        if self.at >= self.stage_end and self._stage() != 0:
            return NULL
        return self.staged + self.staged_at[self.at - self.stage_start]

    cdef int _stage(self) noexcept nogil:
        """Fetch values from the current place on as far as there is room; 0, or -1."""
        cdef uint64_t place, i, n = 0, used = 0
        cdef const Entry *entry
        cdef uint64_t offset
        cdef const uint8_t *data
        if self.staged == NULL:
            self.staged = <uint8_t *> malloc(STAGE_SIZE)
            self.staged_at = <uint32_t *> malloc(STAGE_ENTRIES * sizeof(uint32_t))
            self.wanted = <SortItem *> malloc(STAGE_ENTRIES * sizeof(SortItem))
            self.sorting = <SortItem *> malloc(STAGE_ENTRIES * sizeof(SortItem))
            if self.staged == NULL or self.staged_at == NULL or self.wanted == NULL \
                    or self.sorting == NULL:
                self.window.error = ENOMEM
                return -1
        self.stage_start = place = self.at
        while place < self.count and place - self.stage_start < STAGE_ENTRIES:
            self._fetch_entry(place + FETCH_AHEAD)
            entry = self.layer.entry_at(self.order[place])
            offset = self.layer.values.file_offset(entry.position)
            if offset and entry.size < BIG_VALUE and not self._is_replaced(place):
                if used + entry.size > STAGE_SIZE:
                    break
                self.wanted[n].key = offset
                self.wanted[n].index = <uint32_t> (place - self.stage_start)
                self.staged_at[place - self.stage_start] = <uint32_t> used
                used += entry.size
                n += 1
            place += 1
        self.stage_end = place
        if n and sort_by_key(&self.wanted, &self.sorting, n) != 0:
            self.window.error = ENOMEM
            return -1
        for i in range(n):
            if i + FETCH_AHEAD < n:
                self._fetch_entry(self.stage_start + self.wanted[i + FETCH_AHEAD].index)
            place = self.wanted[i].index
            entry = self.layer.entry_at(self.order[self.stage_start + place])
            data = self._checked(entry)
            if data == NULL:
                return -1
            memcpy(self.staged + self.staged_at[place], data, entry.size)
        return 0

    cdef int raise_error(self) except -1:
        """Raise why `next` failed: MemoryError; for the ephemeral file OSError, CorruptLayerError."""
        return self.layer.raise_read_error(self.code, &self.window)
