"""The in-memory layer: the newest changes of a timeline, by key and LSN.

One thread writes (the holder of the timeline's writer), any number of threads read, none of them
takes a lock:

- Values and entries live in chunks that never move. An entry never changes once it is published.
- A hash table leads from a key to its newest entry, `Entry.prev` on to the older ones. The writer
  fills an entry completely, then stores its slot with release order; a reader loads slots with
  acquire order and so sees whole entries only.
- A table that is half full is copied into one of twice the size and the new one is published with
  a release store. The old one is kept until the layer goes, for readers that still walk it: it
  holds everything put before it was replaced, and a reader asks only for LSNs that were published
  before it began.
- Readers pick entries by LSN. What a batch has put so far lies above the published LSN, so a
  half-written batch is never seen.

For one key at one LSN the last put replaces the earlier ones. Puts of a key go up in LSN.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from pageserver.layered_repository.key cimport (
    KEY_SIZE,
    WILL_INIT,
    Key,
    key_bytes,
    key_less,
    key_load,
    key_parse,
)
from pageserver.layered_repository.read_batch cimport Query, ReadBatch

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <sys/mman.h>

    /* Fresh zeroed pages straight from the system: untouched ones cost nothing and freed ones
       leave the process at once. */
    static void *layer_map_pages(size_t size)
    {
        void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    /* A multiple of 2 MB that will be filled from end to end: huge pages, if there are any, save
       most of the page faults, which otherwise take longer than filling the memory. */
    static void *layer_map_huge(size_t size)
    {
        const size_t huge = (size_t) 2 << 20;
        char *p = (char *) layer_map_pages(size + huge), *aligned;
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
    static void layer_unmap_pages(void *p, size_t size) { if (p) munmap(p, size); }

    static inline uint64_t layer_load(const uint64_t *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void layer_store(uint64_t *p, uint64_t v)
    { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    #define layer_load_pointer(p) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
    #define layer_store_pointer(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELEASE)
    """
    void *layer_map_pages(size_t size) noexcept nogil
    void *layer_map_huge(size_t size) noexcept nogil
    void layer_unmap_pages(void *p, size_t size) noexcept nogil
    uint64_t layer_load(const uint64_t *p) noexcept nogil
    void layer_store(uint64_t *p, uint64_t v) noexcept nogil
    Table *layer_load_pointer(Table *p) noexcept nogil
    void layer_store_pointer(Table *p, Table *v) noexcept nogil

cdef enum:
    HUGE_PAGE = 2 << 20
    MAX_CHUNKS = 65536
    FIRST_CHUNK_SIZE = 1 << 18        # what an idle branch takes for a few values stays small
    CHUNK_SIZE = HUGE_PAGE
    OWN_CHUNK_SIZE = 1 << 18          # a value from this size on has a chunk of its own
    MAX_VALUE_SIZE = 1 << 30
    ENTRIES_PER_CHUNK = 43690         # HUGE_PAGE // sizeof(Entry)
    MAX_ENTRY_CHUNKS = 98305          # for 2^32 entries
    FIRST_TABLE_SLOTS = 1024

cdef uint64_t MAX_ENTRIES = 0xFFFFFFFEU


cdef inline uint32_t key_tag(const Key *key) noexcept nogil:
    """A hash whose low bits are the slot. Eight neighbouring keys share a cache line of slots."""
    cdef uint64_t h = key.hi * 0x9E3779B97F4A7C15ULL ^ (key.mid + 0x165667B19E3779F9ULL)
    h = (h ^ (h >> 29)) * 0xC2B2AE3D27D4EB4FULL + (key.lo >> 3)
    h = (h ^ (h >> 32)) * 0x9FB21C651E98DF25ULL
    return (<uint32_t> (h >> 32) & 0xFFFFFFF8U) | (key.lo & 7)


cdef inline bint entry_has_key(const Entry *entry, const Key *key) noexcept nogil:
    return entry.hi == key.hi and entry.mid == key.mid and entry.lo == key.lo


cdef Table *table_new(uint64_t slots) noexcept nogil:
    cdef Table *table = <Table *> calloc(1, sizeof(Table))
    if table == NULL:
        return NULL
    if slots * sizeof(uint64_t) >= HUGE_PAGE:
        table.slots = <uint64_t *> layer_map_huge(slots * sizeof(uint64_t))
    else:
        table.slots = <uint64_t *> layer_map_pages(slots * sizeof(uint64_t))
    if table.slots == NULL:
        free(table)
        return NULL
    table.mask = slots - 1
    return table


cdef class InMemoryLayer:
    """Changes of one timeline from `start_lsn` on.

    Puts above the LSN given to `publish` only, so what readers may see never changes.
    """

    def __cinit__(self, uint64_t start_lsn):
        self.start_lsn = start_lsn
        self.published_lsn = start_lsn - 1 if start_lsn else 0

    def __dealloc__(self):
        cdef Table *table = self.table
        cdef Table *retired
        cdef uint64_t i
        # Giving back hundreds of megabytes takes long enough to be done without the GIL.
        with nogil:
            while table != NULL:
                retired = table.retired
                layer_unmap_pages(table.slots, (table.mask + 1) * sizeof(uint64_t))
                free(table)
                table = retired
            if self.chunks != NULL:
                for i in range(self.n_chunks):
                    layer_unmap_pages(self.chunks[i].data, self.chunks[i].capacity)
                layer_unmap_pages(self.chunks, MAX_CHUNKS * sizeof(Chunk))
            if self.entry_chunks != NULL:
                for i in range(self.n_entries // ENTRIES_PER_CHUNK + 1):
                    layer_unmap_pages(self.entry_chunks[i], HUGE_PAGE)
                layer_unmap_pages(self.entry_chunks, MAX_ENTRY_CHUNKS * sizeof(Entry *))

    # ---- writer's side

    cdef int _start(self) noexcept nogil:
        """Allocate what the first value needs; an unused layer costs next to nothing."""
        if self.chunks == NULL:
            self.chunks = <Chunk *> layer_map_pages(MAX_CHUNKS * sizeof(Chunk))
        if self.entry_chunks == NULL:
            self.entry_chunks = <Entry **> layer_map_pages(MAX_ENTRY_CHUNKS * sizeof(Entry *))
        if self.chunks == NULL or self.entry_chunks == NULL:
            return PUT_NO_MEMORY
        if self.table == NULL:
            layer_store_pointer(self.table, table_new(FIRST_TABLE_SLOTS))
        return PUT_OK if self.table != NULL else PUT_NO_MEMORY

    cdef int64_t _new_chunk(self, uint32_t capacity) noexcept nogil:
        """The index of a new chunk, or PUT_NO_MEMORY."""
        cdef Chunk *chunk
        if self.n_chunks >= MAX_CHUNKS:
            return PUT_NO_MEMORY
        chunk = &self.chunks[self.n_chunks]
        if capacity == CHUNK_SIZE:
            chunk.data = <uint8_t *> layer_map_huge(capacity)
        else:
            chunk.data = <uint8_t *> layer_map_pages(capacity)
        if chunk.data == NULL:
            return PUT_NO_MEMORY
        chunk.used = 0
        chunk.capacity = capacity
        self.memory += capacity
        self.n_chunks += 1
        return self.n_chunks - 1

    cdef int _new_entry_chunk(self) noexcept nogil:
        cdef Entry *chunk
        if self.n_entries:
            chunk = <Entry *> layer_map_huge(HUGE_PAGE)
        else:
            chunk = <Entry *> layer_map_pages(HUGE_PAGE)
        if chunk == NULL:
            return PUT_NO_MEMORY
        self.entry_chunks[self.n_entries // ENTRIES_PER_CHUNK] = chunk
        self.memory += HUGE_PAGE
        return PUT_OK

    cdef int64_t append_value(self, const uint8_t *data, uint32_t size) noexcept nogil:
        """Copy the bytes of a value once; the position for `put_ref`, or a PutResult below 0."""
        cdef int64_t index
        cdef Chunk *chunk
        if self.sealed:
            return PUT_SEALED
        if size > MAX_VALUE_SIZE:
            return PUT_NO_MEMORY
        if self.chunks == NULL and self._start() != PUT_OK:
            return PUT_NO_MEMORY
        if size >= OWN_CHUNK_SIZE:
            index = self._new_chunk(size)
            if index < 0:
                return index
        else:
            index = self.current_chunk
            if self.n_chunks == 0 or self.chunks[index].used + size > self.chunks[index].capacity:
                index = self._new_chunk(CHUNK_SIZE if self.n_chunks else FIRST_CHUNK_SIZE)
                if index < 0:
                    return index
                self.current_chunk = <uint32_t> index
        chunk = &self.chunks[index]
        if size:
            memcpy(chunk.data + chunk.used, data, size)
        chunk.used += size
        return index << 32 | (chunk.used - size)

    cdef int put_ref(self, const Key *key, uint64_t lsn, uint8_t flags, int64_t position,
                     uint32_t size) noexcept nogil:
        """Add a value whose bytes are stored already; a PutResult."""
        cdef uint64_t chunk_no = <uint64_t> position >> 32, offset = position & 0xFFFFFFFFU
        cdef uint64_t slot, at
        cdef uint32_t tag, newest = 0
        cdef Entry *entry
        if self.sealed:
            return PUT_SEALED
        if lsn <= self.published_lsn:
            return PUT_OLD_LSN
        if self.chunks == NULL or position < 0 or chunk_no >= self.n_chunks \
                or offset + size > self.chunks[chunk_no].used:
            return PUT_BAD_POSITION
        if self.table == NULL and self._start() != PUT_OK:
            return PUT_NO_MEMORY
        if 2 * self.table.used > self.table.mask and self._grow_table() != PUT_OK:
            return PUT_NO_MEMORY
        tag = key_tag(key)
        at = tag & self.table.mask
        while True:
            slot = self.table.slots[at]
            if slot == 0:
                break
            if slot >> 32 == tag:
                newest = <uint32_t> slot
                entry = self.entry_at(newest - 1)
                if entry_has_key(entry, key):
                    if entry.lsn > lsn:
                        return PUT_OLD_LSN
                    if entry.lsn == lsn:
                        newest = entry.prev
                        self.n_replaced += 1
                    break
                newest = 0
            at = (at + 1) & self.table.mask
        if self.n_entries >= MAX_ENTRIES:
            return PUT_NO_MEMORY
        if self.entry_chunks[self.n_entries // ENTRIES_PER_CHUNK] == NULL \
                and self._new_entry_chunk() != PUT_OK:
            return PUT_NO_MEMORY
        entry = self.entry_at(self.n_entries)
        entry.hi = key.hi
        entry.mid = key.mid
        entry.lo = key.lo
        entry.lsn = lsn
        entry.position = position
        entry.size = size
        entry.prev = newest
        entry.flags = flags
        self.n_entries += 1
        if slot == 0:
            self.table.used += 1
        layer_store(&self.table.slots[at], <uint64_t> tag << 32 | self.n_entries)
        if lsn > self.max_lsn:
            self.max_lsn = lsn
        return PUT_OK

    cdef int put_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil:
        """Add a value, copying its bytes; a PutResult."""
        cdef int64_t position
        if lsn <= self.published_lsn:
            return PUT_OLD_LSN
        position = self.append_value(data, size)
        if position < 0:
            return <int> position
        return self.put_ref(key, lsn, flags, position, size)

    cdef int _grow_table(self) noexcept nogil:
        cdef Table *old = self.table
        cdef Table *new
        cdef uint64_t i, at, slot
        # A tag has 32 bits, so a table of 2^32 slots cannot grow; it never gets full either.
        if old.mask >= 0xFFFFFFFFU:
            return PUT_OK
        new = table_new((old.mask + 1) * 2)
        if new == NULL:
            return PUT_NO_MEMORY
        for i in range(old.mask + 1):
            slot = old.slots[i]
            if slot:
                at = (slot >> 32) & new.mask
                while new.slots[at]:
                    at = (at + 1) & new.mask
                new.slots[at] = slot
        new.used = old.used
        new.retired = old
        self.memory += (new.mask + 1) * sizeof(uint64_t)
        layer_store_pointer(self.table, new)
        return PUT_OK

    cdef int raise_put_error(self, int code, const Key *key, uint64_t lsn) except -1:
        """Raise the exception of a PutResult below 0."""
        cdef str where = f"key {key_bytes(key).hex().upper()} at LSN {lsn >> 32:X}/{lsn & 0xFFFFFFFFU:X}"
        if code == PUT_NO_MEMORY:
            raise MemoryError(f"no room in the open layer for {where}")
        if code == PUT_OLD_LSN:
            raise ValueError(f"{where}: the LSN is not above what is already written")
        if code == PUT_SEALED:
            raise RuntimeError(f"{where}: the layer is frozen, use the writer's current open layer")
        raise ValueError(f"{where}: not the position of a stored value")

    def put(self, bytes key not None, uint64_t lsn, uint8_t flags, const uint8_t[::1] data not None):
        """Add a value. The last put of a key at one LSN replaces the others.

        ValueError: the LSN is not above the published one or below the key's newest;
        RuntimeError: the layer is frozen; MemoryError.
        """
        cdef Key parsed
        cdef int code
        cdef Py_ssize_t size = data.shape[0]
        key_parse(&parsed, key)
        if size > MAX_VALUE_SIZE:
            raise ValueError(f"a value of {size} bytes is over the limit of {MAX_VALUE_SIZE}")
        code = self.put_raw(&parsed, lsn, flags, &data[0] if size else NULL, <uint32_t> size)
        if code != PUT_OK:
            self.raise_put_error(code, &parsed, lsn)

    def put_many(self, const uint8_t[::1] keys not None, const uint64_t[::1] lsns not None,
                 uint8_t flags, const uint8_t[::1] data not None):
        """Add len(lsns) values of one size: 18 bytes of `keys` and an equal share of `data` each.

        Raises what `put` does; the values before the failing one are in the layer then.
        """
        cdef Py_ssize_t i, n = lsns.shape[0], size = data.shape[0] // n if n else 0
        cdef Key key
        cdef int code = PUT_OK
        if keys.shape[0] != n * KEY_SIZE or data.shape[0] != n * size:
            raise ValueError("keys, LSNs and data do not belong together")
        if size > MAX_VALUE_SIZE:
            raise ValueError(f"a value of {size} bytes is over the limit of {MAX_VALUE_SIZE}")
        with nogil:
            for i in range(n):
                key_load(&key, &keys[i * KEY_SIZE])
                code = self.put_raw(&key, lsns[i], flags, &data[i * size] if size else NULL,
                                    <uint32_t> size)
                if code != PUT_OK:
                    break
        if code != PUT_OK:
            self.raise_put_error(code, &key, lsns[i])

    def publish(self, uint64_t lsn):
        """Everything up to `lsn` may be read from now on: refuse puts at or below it."""
        self.published_lsn = lsn

    def freeze(self, uint64_t end_lsn, uint64_t prev_record_lsn):
        """Refuse further puts; values at or above `end_lsn`, an aborted batch, are dropped.

        `end_lsn` is exclusive, `prev_record_lsn` belongs to the last record (0: unknown).
        """
        self.sealed = True
        self.prev_record_lsn = prev_record_lsn
        layer_store(&self.end_lsn, end_lsn)

    # ---- readers' side

    cdef inline Entry *entry_at(self, uint64_t index) noexcept nogil:
        return self.entry_chunks[index // ENTRIES_PER_CHUNK] + index % ENTRIES_PER_CHUNK

    cdef inline const uint8_t *value_at(self, uint64_t position) noexcept nogil:
        return self.chunks[position >> 32].data + (position & 0xFFFFFFFFU)

    cdef Entry *find_newest(self, const Key *key) noexcept nogil:
        """The newest entry of a key, published or not; NULL if there is none."""
        cdef Table *table = layer_load_pointer(self.table)
        cdef uint32_t tag
        cdef uint64_t at, slot
        cdef Entry *entry
        if table == NULL:
            return NULL
        tag = key_tag(key)
        at = tag & table.mask
        while True:
            slot = layer_load(&table.slots[at])
            if slot == 0:
                return NULL
            if slot >> 32 == tag:
                entry = self.entry_at((slot & 0xFFFFFFFFU) - 1)
                if entry_has_key(entry, key):
                    return entry
            at = (at + 1) & table.mask

    cdef int collect(self, ReadBatch batch, int first, int last, uint64_t upper,
                     uint64_t floor) noexcept nogil:
        """Add to queries [first, last) the values with floor <= LSN <= upper; 0, -1 no memory."""
        cdef int i
        cdef Query *query
        cdef Entry *entry
        cdef uint64_t end_lsn = layer_load(&self.end_lsn)
        if end_lsn and upper >= end_lsn:
            upper = end_lsn - 1
        if layer_load_pointer(self.table) == NULL:
            return 0
        for i in range(first, last):
            query = &batch.queries[i]
            if query.complete:
                continue
            entry = self.find_newest(&query.key)
            while entry != NULL and entry.lsn >= floor and entry.lsn > query.floor:
                if entry.lsn <= upper:
                    if batch.add(query, entry.lsn, entry.flags, self.value_at(entry.position),
                                 entry.size) != 0:
                        return -1
                    if entry.flags & WILL_INIT:
                        break
                entry = self.entry_at(entry.prev - 1) if entry.prev else NULL
        return 0

    def read(self, ReadBatch batch not None, int first, int last, uint64_t upper, uint64_t floor):
        """Add to the queries [first, last) of `batch` their values with floor <= LSN <= upper."""
        cdef int code
        if first < 0 or last > batch.count:
            raise IndexError("no such query")
        with nogil:
            code = self.collect(batch, first, last, upper, floor)
        if code != 0:
            raise MemoryError("no memory for the values of a read")

    def keys(self, bytes start not None, bytes end not None, uint64_t upper):
        """The keys in [start, end) with a value at or below `upper`, as an unordered list."""
        cdef Key low, high, key
        cdef Table *table
        cdef Entry *entry
        cdef uint64_t i = 0, slot, stop, slots
        cdef uint64_t end_lsn = layer_load(&self.end_lsn)
        cdef list result = []
        if end_lsn and upper >= end_lsn:
            upper = end_lsn - 1
        key_parse(&low, start)
        key_parse(&high, end)
        table = layer_load_pointer(self.table)
        slots = table.mask + 1 if table != NULL else 0
        while i < slots:
            # Walk without the GIL up to the next match.
            entry = NULL
            with nogil:
                while i < slots and entry == NULL:
                    slot = layer_load(&table.slots[i])
                    i += 1
                    if slot == 0:
                        continue
                    entry = self.entry_at((slot & 0xFFFFFFFFU) - 1)
                    key = entry_key(entry)
                    if key_less(&key, &low) or not key_less(&key, &high):
                        entry = NULL
                        continue
                    while entry != NULL and entry.lsn > upper:
                        entry = self.entry_at(entry.prev - 1) if entry.prev else NULL
            if entry != NULL:
                result.append(key_bytes(&key))
        return result

    @property
    def entry_count(self):
        """Values in the layer, replaced ones not counted."""
        return self.n_entries - self.n_replaced

    @property
    def memory_size(self):
        """Bytes of memory taken, about."""
        return self.memory
