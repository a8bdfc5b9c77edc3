# distutils: language = c++
"""A frozen layer in the order of key and LSN.

The first 14 bytes of a key, its prefix, take few values compared with the entries (for relation
blocks: one for each relation fork). So the distinct prefixes are ranked first; rank and the last
four bytes of the key make a 64-bit sort key, sorted by a radix sort that skips the bytes all have in
common. It is stable: entries of one key keep the order of their puts, which is that of their LSNs.

Values in the ephemeral file lie in the order of the puts. They are fetched stage by stage, a part of
the order with as many values as there is room for, each in the order of the file: so that is read in
few large pieces even if the keys came at random. Which entries belong to which stage is found out for
all of them in two passes over the entries, in the order in which these lie in memory.
"""
from cython cimport no_gc_clear
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from pageserver.layered_repository.ephemeral_file cimport window_free
from pageserver.layered_repository.inmemory_layer cimport (
    READ_FAILED,
    READ_NO_MEMORY,
    Entry,
    InMemoryLayer,
    entry_key,
)
from pageserver.layered_repository.layer_memory cimport layer_fetch
from pageserver.layered_repository.memory_pool cimport HUGE_PAGE, MemoryPool

cdef uint64_t NO_MEMORY = 0xFFFFFFFFFFFFFFFFULL
cdef uint32_t NOT_IN_ORDER = 0xFFFFFFFFU
cdef uint32_t NOT_STAGED = 0xFFFFFFFFU

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <algorithm>
    #include <new>
    #include <unordered_map>
    #include <vector>

    namespace {

    struct SortItem { uint64_t key; uint32_t index; };

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

    /* Sorts items by their keys. The result is in *items, which may have changed places with *other.
       0, or -1 without memory. */
    static int sort_items(SortItem **items, SortItem **other, uint64_t n)
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

    /* Puts ranks in the place of the numbers of prefixes, the upper halves of the keys. 1 if the
       keys ascend already, 0 if not, -1 without memory. */
    static int rank_items(void *table, SortItem *items, uint64_t n)
    {
        try {
            const std::vector<uint32_t> rank = ((PrefixTable *) table)->ranks();
            bool sorted = true;
            for (uint64_t i = 0; i < n; i++) {
                items[i].key = (uint64_t) rank[items[i].key >> 32] << 32 | (uint32_t) items[i].key;
                if (i && items[i].key < items[i - 1].key)
                    sorted = false;
            }
            return sorted;
        }
        catch (const std::bad_alloc &) { return -1; }
    }
    """
    struct SortItem:
        uint64_t key
        uint32_t index

    int sort_items(SortItem **items, SortItem **other, uint64_t n) noexcept nogil
    int rank_items(void *table, SortItem *items, uint64_t n) noexcept nogil
    void *prefix_table_new() noexcept nogil
    void prefix_table_free(void *table) noexcept nogil
    long long prefix_number(void *table, uint64_t hi, uint64_t mid) noexcept nogil


cdef inline size_t scratch_size(uint64_t size) noexcept nogil:
    """Sizes of which there are few, so that the pool has one that fits."""
    cdef size_t rounded = HUGE_PAGE
    while rounded < size:
        rounded *= 2
    return rounded


cdef void *scratch_new(MemoryPool pool, uint64_t size) noexcept nogil:
    """Memory for a moment, NULL without."""
    return malloc(size) if size < HUGE_PAGE else pool.take(scratch_size(size))


cdef void scratch_free(MemoryPool pool, void *data, uint64_t size) noexcept nogil:
    if size < HUGE_PAGE:
        free(data)
    else:
        pool.give(data, scratch_size(size))


cdef uint64_t collect_items(InMemoryLayer layer, SortItem *items, void *table) noexcept nogil:
    """Fill in the entries below the layer's end LSN; their number, NO_MEMORY without."""
    cdef uint64_t i, n = 0
    cdef const Entry *entry
    cdef long long number
    for i in range(layer.n_entries):
        entry = layer.entry_at(i)
        if entry.lsn < layer.end_lsn:
            number = prefix_number(table, entry.hi, entry.mid >> 16)
            if number < 0:
                return NO_MEMORY
            items[n].key = <uint64_t> number << 32 | (entry.mid & 0xFFFF) << 16 | entry.lo
            items[n].index = <uint32_t> i
            n += 1
    return n


cdef uint32_t *sorted_entries(InMemoryLayer layer, uint64_t *count) noexcept nogil:
    """Indexes of the entries below the layer's end LSN, sorted by key, LSN and order of the puts.

    NULL without memory; else to be freed by the caller, `count` entries.
    """
    cdef uint64_t i, n = NO_MEMORY, size = (layer.n_entries + 1) * sizeof(SortItem)
    cdef void *table = prefix_table_new()
    cdef SortItem *items = <SortItem *> scratch_new(layer.pool, size)
    cdef SortItem *other = NULL
    cdef uint32_t *result = NULL
    cdef int sorted_ = -1
    if table != NULL and items != NULL:
        n = collect_items(layer, items, table)
    if n != NO_MEMORY:
        sorted_ = rank_items(table, items, n)
    if sorted_ == 0:
        other = <SortItem *> scratch_new(layer.pool, size)
        if other == NULL or sort_items(&items, &other, n) != 0:
            sorted_ = -1
    if sorted_ >= 0:
        result = <uint32_t *> malloc((n + 1) * sizeof(uint32_t))
    if result != NULL:
        for i in range(n):
            result[i] = items[i].index
        count[0] = n
    scratch_free(layer.pool, items, size)
    scratch_free(layer.pool, other, size)
    if table != NULL:
        prefix_table_free(table)
    return result


cdef enum:
    FETCH_AHEAD = 12             # places; entries twice as far
    MAX_FETCHED = 512            # bytes of a value: the processor fetches on by itself
    STAGE_SIZE = 32 << 20        # bytes of values fetched from the ephemeral file at once
    BIG_VALUE = 1 << 20          # not worth to stage
    BUCKET_ENTRIES = 1 << 10     # stages are made of whole buckets of the order
    SORTED = 1                   # `code` once the order is there


@no_gc_clear      # __dealloc__ needs the layer's pool
cdef class FrozenLayerScan:
    """All values of a frozen layer below its end LSN, by key and LSN, the replaced ones left out."""

    def __cinit__(self, InMemoryLayer layer not None):
        if not layer.sealed:
            raise ValueError("the layer is still open")
        self.layer = layer

    def __dealloc__(self):
        free(self.order)
        free(self.place_of)
        free(self.spilled)
        free(self.stages)
        free(self.staged_at)
        if self.layer is not None:
            self.layer.pool.give(self.staged, STAGE_SIZE)
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
            layer_fetch(self._place_of_value(place, entry),
                        entry.size if entry.size < MAX_FETCHED else MAX_FETCHED)

    cdef inline const uint8_t *_place_of_value(self, uint64_t place,
                                               const Entry *entry) noexcept nogil:
        """Where the value will be read, to be fetched."""
        if self.stage_start <= place < self.stage_end and self._is_spilled(entry):
            return self.staged + self.staged_at[place - self.stage_start]
        return self.layer.values.memory_at(entry.position)

    cdef inline bint _is_spilled(self, const Entry *entry) noexcept nogil:
        """Whether the value is fetched from the ephemeral file with those of its stage."""
        return self.layer.values.file_offset(entry.position) != 0 and entry.size < BIG_VALUE

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
        cdef uint32_t staged_at
        if not self._is_spilled(entry):
            return self._checked(entry)
        if self.at >= self.stage_end and self._next_stage() != 0:
            return NULL
        staged_at = self.staged_at[self.at - self.stage_start]
        if staged_at == NOT_STAGED:
            return self._checked(entry)
        return self.staged + staged_at

    cdef int _next_stage(self) noexcept nogil:
        """Fetch the values of the stage with the current place; 0, or -1."""
        cdef uint64_t first
        cdef int code = 0
        if self.stages == NULL:
            code = self._plan_stages()
        if code != 0:
            self.window.error = ENOMEM
            return -1
        while self.stages[self.stage].end <= self.at:
            self.stage += 1
        self.stage_start = self.stages[self.stage - 1].end if self.stage else 0
        self.stage_end = self.stages[self.stage].end
        first = self.stages[self.stage - 1].spilled if self.stage else 0
        return self._fetch_stage(first, self.stages[self.stage].spilled)

    cdef int _fetch_stage(self, uint64_t first, uint64_t last) noexcept nogil:
        """Fetch the values of the entries [first, last) of `spilled`, which lie in the file so."""
        cdef uint64_t i, used = 0
        cdef const Entry *entry
        cdef const uint8_t *data
        cdef uint32_t *staged_at
        for i in range(first, last):
            if i + FETCH_AHEAD < last:
                layer_fetch(self.layer.entry_at(self.spilled[i + FETCH_AHEAD]), sizeof(Entry))
            entry = self.layer.entry_at(self.spilled[i])
            staged_at = &self.staged_at[self.place_of[self.spilled[i]] - self.stage_start]
            if used + entry.size > STAGE_SIZE:
                # Only if a single bucket does not fit.
                staged_at[0] = NOT_STAGED
                continue
            data = self._checked(entry)
            if data == NULL:
                return -1
            memcpy(self.staged + used, data, entry.size)
            staged_at[0] = <uint32_t> used
            used += entry.size
        return 0

    cdef int _plan_stages(self) noexcept nogil:
        """Divide the order into stages and list the entries of each; 0, or -1 without memory."""
        cdef uint64_t entries = self.layer.n_entries, places, i
        cdef Bucket *buckets = <Bucket *> calloc(self.count // BUCKET_ENTRIES + 1, sizeof(Bucket))
        self.staged = <uint8_t *> self.layer.pool.take(STAGE_SIZE)
        self.place_of = <uint32_t *> malloc(entries * sizeof(uint32_t))
        self.spilled = <uint32_t *> malloc(self.count * sizeof(uint32_t))
        self.stages = <Stage *> calloc(self.count // BUCKET_ENTRIES + 1, sizeof(Stage))
        if buckets != NULL and self.staged != NULL and self.place_of != NULL \
                and self.spilled != NULL and self.stages != NULL:
            memset(self.place_of, 0xFF, entries * sizeof(uint32_t))
            for i in range(self.count):
                self.place_of[self.order[i]] = <uint32_t> i
            self._fill_buckets(buckets)
            places = self._divide(buckets)
            self._list_spilled(buckets)
            self.staged_at = <uint32_t *> malloc(places * sizeof(uint32_t))
        free(buckets)
        return 0 if self.staged_at != NULL else -1

    cdef inline bint _is_staged(self, uint64_t index, const Entry *entry) noexcept nogil:
        return self.place_of[index] != NOT_IN_ORDER and self._is_spilled(entry) \
            and not self._is_replaced(self.place_of[index])

    cdef void _fill_buckets(self, Bucket *buckets) noexcept nogil:
        """Count what is in the file."""
        cdef uint64_t i
        cdef const Entry *entry
        cdef Bucket *bucket
        for i in range(self.layer.n_entries):
            entry = self.layer.entry_at(i)
            if self._is_staged(i, entry):
                bucket = &buckets[self.place_of[i] // BUCKET_ENTRIES]
                bucket.bytes += entry.size
                bucket.values += 1

    cdef uint64_t _divide(self, Bucket *buckets) noexcept nogil:
        """Make stages of the buckets; how many places the longest has."""
        cdef uint64_t i, used = 0, values = 0, start = 0, longest = 0
        cdef uint32_t stage = 0
        for i in range((self.count + BUCKET_ENTRIES - 1) // BUCKET_ENTRIES):
            if used and used + buckets[i].bytes > STAGE_SIZE:
                stage += 1
                used = 0
                start = self.stages[stage - 1].end
                # Where its list begins; _list_spilled moves it on to the end.
                self.stages[stage].spilled = values
            buckets[i].stage = stage
            used += buckets[i].bytes
            values += buckets[i].values
            self.stages[stage].end = (i + 1) * BUCKET_ENTRIES
            if self.stages[stage].end > self.count:
                self.stages[stage].end = self.count
            if self.stages[stage].end - start > longest:
                longest = self.stages[stage].end - start
        return longest

    cdef void _list_spilled(self, const Bucket *buckets) noexcept nogil:
        """List the entries of each stage in the order of the puts, which is that of the file."""
        cdef uint64_t i
        cdef Stage *stage
        for i in range(self.layer.n_entries):
            if self._is_staged(i, self.layer.entry_at(i)):
                stage = &self.stages[buckets[self.place_of[i] // BUCKET_ENTRIES].stage]
                self.spilled[stage.spilled] = <uint32_t> i
                stage.spilled += 1

    cdef int raise_error(self) except -1:
        """Raise why `next` failed: MemoryError; for the ephemeral file OSError, CorruptLayerError."""
        return self.layer.raise_read_error(self.code, &self.window)
