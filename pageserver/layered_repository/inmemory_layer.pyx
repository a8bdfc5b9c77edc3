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
- Deleted ranges of keys are in a tree that is replaced as a whole, see range_tombstones.pyx.
- Readers pick entries and deletions by LSN. What a batch has put so far lies above the published
  LSN, so a half-written batch is never seen.
- Chunks of values may move to a file while they are read, see value_chunks.pyx.

For one key at one LSN the last put replaces the earlier ones. Puts of a key go up in LSN. A range
deleted at LSN T is like an image layer at T without keys: what was put at or below T does not count
for reads at or above T. So it takes no further value at T itself, and none below: the image layer
that a flush makes of it would hide them.
"""
from cython cimport no_gc_clear
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from pageserver.layered_repository.ephemeral_file cimport EphemeralFile, ReadWindow, window_free
from pageserver.layered_repository.key cimport (
    KEY_SIZE,
    WILL_INIT,
    Key,
    key_bytes,
    key_less,
    key_load,
    key_parse,
)
from pageserver.layered_repository.key_table cimport (
    FIRST_TABLE_SLOTS,
    Table,
    key_tag,
    table_free,
    table_grown,
    table_new,
)
from pageserver.layered_repository.layer_memory cimport (
    layer_fetch,
    layer_load,
    layer_load_pointer,
    layer_map_pages,
    layer_store,
    layer_store_pointer,
    layer_unmap_pages,
)
from pageserver.layered_repository.memory_pool cimport HUGE_PAGE, MemoryPool
from pageserver.layered_repository.range_tombstones cimport (
    RangeTombstones,
    Tombstone,
    newest_covering,
)
from pageserver.layered_repository.read_batch cimport Query, ReadBatch
from pageserver.layered_repository.value_chunks cimport MAX_VALUE_SIZE, ValueChunks

cdef enum:
    PAGE_SIZE = 4096
    ENTRIES_PER_CHUNK = 43690         # HUGE_PAGE // sizeof(Entry)
    MAX_ENTRY_CHUNKS = 98305          # for 2^32 entries
    FETCH_AHEAD = 12

cdef uint64_t MAX_ENTRIES = 0xFFFFFFFEU
cdef uint64_t MAX_LSN = 0xFFFFFFFFFFFFFFFFULL


cdef inline bint entry_has_key(const Entry *entry, const Key *key) noexcept nogil:
    return entry.hi == key.hi and entry.mid == key.mid and entry.lo == key.lo


@no_gc_clear      # __dealloc__ needs the pool
cdef class InMemoryLayer:
    """Changes of one timeline from `start_lsn` on.

    Takes changes above the LSN given to `publish` only, so what readers may see never changes.

    With a `spill_dir` the first `spill_after` bytes of values stay in memory and the others go to an
    ephemeral file there, in chunks of 2 MB as these fill. If the file cannot be written (no space,
    no directory) the values stay in memory, `memory_size` says so and the next chunk tries again.

    Memory comes from the `pool`, if there is one, and goes back to it.
    """

    def __cinit__(self, uint64_t start_lsn, *, spill_dir=None, uint64_t spill_after=0,
                  MemoryPool pool=None):
        self.start_lsn = start_lsn
        self.published_lsn = start_lsn - 1 if start_lsn else 0
        self.deleted = RangeTombstones()
        self.file = EphemeralFile(spill_dir) if spill_dir is not None else None
        self.pool = pool if pool is not None else MemoryPool()
        self.values = ValueChunks(self.file, spill_after, self.pool)

    def __dealloc__(self):
        cdef uint64_t i
        # Giving back hundreds of megabytes takes long enough to be done without the GIL.
        with nogil:
            table_free(self.table, self.pool)
            if self.entry_chunks != NULL:
                layer_unmap_pages(self.entry_chunks[0], HUGE_PAGE)
                for i in range(1, self.n_entries // ENTRIES_PER_CHUNK + 1):
                    self.pool.give(self.entry_chunks[i], HUGE_PAGE)
                layer_unmap_pages(self.entry_chunks, MAX_ENTRY_CHUNKS * sizeof(Entry *))

    # ---- writer's side

    cdef int _start(self) noexcept nogil:
        """Allocate what the first entry needs; an unused layer costs next to nothing."""
        if self.entry_chunks == NULL:
            self.entry_chunks = <Entry **> layer_map_pages(MAX_ENTRY_CHUNKS * sizeof(Entry *))
            if self.entry_chunks == NULL:
                return PUT_NO_MEMORY
        layer_store_pointer(self.table, table_new(FIRST_TABLE_SLOTS, self.pool))
        self.table_memory = PAGE_SIZE + FIRST_TABLE_SLOTS * sizeof(uint64_t)
        return PUT_OK if self.table != NULL else PUT_NO_MEMORY

    cdef int _new_entry_chunk(self) noexcept nogil:
        cdef Entry *chunk
        if self.n_entries:
            chunk = <Entry *> self.pool.take(HUGE_PAGE)
        else:
            chunk = <Entry *> layer_map_pages(HUGE_PAGE)
        if chunk == NULL:
            return PUT_NO_MEMORY
        self.entry_chunks[self.n_entries // ENTRIES_PER_CHUNK] = chunk
        return PUT_OK

    cdef inline void _expect(self, const Key *key) noexcept nogil:
        """Fetch what the put of a key will look at first."""
        if self.table != NULL:
            layer_fetch(&self.table.slots[key_tag(key) & self.table.mask], sizeof(uint64_t))

    cdef int64_t append_value(self, const uint8_t *data, uint32_t size) noexcept nogil:
        """Copy the bytes of a value once; the position for `put_ref`, or a PutResult below 0."""
        cdef int64_t position
        if self.sealed:
            return PUT_SEALED
        position = self.values.append(data, size)
        return position if position >= 0 else PUT_NO_MEMORY

    cdef int put_ref(self, const Key *key, uint64_t lsn, uint8_t flags, int64_t position,
                     uint32_t size) noexcept nogil:
        """Add a value whose bytes are stored already; a PutResult."""
        cdef uint64_t slot, at
        cdef uint32_t tag, newest = 0, crc = 0
        cdef bint replaces = False
        cdef Entry *entry
        if self.sealed:
            return PUT_SEALED
        if lsn <= self.published_lsn:
            return PUT_OLD_LSN
        if lsn <= self.deleted.max_lsn and self.deleted.newest(key, MAX_LSN) >= lsn:
            return PUT_DELETED
        if not self.values.holds(position, size):
            return PUT_BAD_POSITION
        if self.table == NULL and self._start() != PUT_OK:
            return PUT_NO_MEMORY
        if self.values.crc_at(position, size, &crc) != 0:
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
                        replaces = True
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
        entry.crc = crc
        self.n_entries += 1
        self.n_replaced += replaces
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
        self._expect(key)
        position = self.append_value(data, size)
        if position < 0:
            return <int> position
        return self.put_ref(key, lsn, flags, position, size)

    cdef int _grow_table(self) noexcept nogil:
        cdef Table *grown
        # A tag has 32 bits, so a table of 2^32 slots cannot grow; it never gets full either.
        if self.table.mask >= 0xFFFFFFFFU:
            return PUT_OK
        grown = table_grown(self.table, self.pool)
        if grown == NULL:
            return PUT_NO_MEMORY
        self.table_memory += (grown.mask + 1) * sizeof(uint64_t)
        layer_store_pointer(self.table, grown)
        return PUT_OK

    cdef int delete_range_raw(self, const Key *start, const Key *end, uint64_t lsn) noexcept nogil:
        """Say that no key of [start, end) exists at `lsn`; a PutResult. See delete_range."""
        if self.sealed:
            return PUT_SEALED
        if not key_less(start, end):
            return PUT_EMPTY_RANGE
        if lsn <= self.published_lsn or lsn < self.max_lsn:
            return PUT_OLD_LSN
        if self.deleted.add(start, end, lsn) != 0:
            return PUT_NO_MEMORY
        self.max_lsn = lsn
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
        if code == PUT_DELETED:
            raise ValueError(f"{where}: its range is deleted at this LSN or a later one")
        if code == PUT_EMPTY_RANGE:
            raise ValueError(f"{where}: the end of the range is not above its start")
        raise ValueError(f"{where}: not the position of a stored value")

    def put(self, bytes key not None, uint64_t lsn, uint8_t flags, const uint8_t[::1] data not None):
        """Add a value. The last put of a key at one LSN replaces the others.

        ValueError: the LSN is not above the published one, below the key's newest, or not above
        that of a deleted range with the key;
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
                if i + FETCH_AHEAD < n:
                    key_load(&key, &keys[(i + FETCH_AHEAD) * KEY_SIZE])
                    self._expect(&key)
                key_load(&key, &keys[i * KEY_SIZE])
                code = self.put_raw(&key, lsns[i], flags, &data[i * size] if size else NULL,
                                    <uint32_t> size)
                if code != PUT_OK:
                    break
        if code != PUT_OK:
            self.raise_put_error(code, &key, lsns[i])

    def delete_range(self, bytes start not None, bytes end not None, uint64_t lsn):
        """Say that no key of [start, end) exists at `lsn`, whatever was put at or below it.

        Values above `lsn` bring keys back; values of these keys at `lsn` itself are refused from
        now on. ValueError: the LSN is not above the published one or below the newest change of the
        layer, or the range is empty; RuntimeError: the layer is frozen; MemoryError.
        """
        cdef Key low, high
        cdef int code
        key_parse(&low, start)
        key_parse(&high, end)
        code = self.delete_range_raw(&low, &high, lsn)
        if code != PUT_OK:
            self.raise_put_error(code, &low, lsn)

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

    cdef int raise_read_error(self, int code, const ReadWindow *window) except -1:
        """Raise the exception of a ReadResult below 0."""
        if code == READ_NO_MEMORY:
            raise MemoryError("no memory for the values of a read")
        return self.file.raise_error(window)

    cdef Entry *find_newest(self, const Key *key) noexcept nogil:
        """The newest entry of a key, published or not; NULL if there is none."""
        cdef Table *table = <Table *> layer_load_pointer(self.table)
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
                     uint64_t floor, ReadWindow *window) noexcept nogil:
        """Add to queries [first, last) the values with floor <= LSN <= upper; a ReadResult.

        A query of a deleted key is complete with what is newer than the deletion: nothing older
        counts, not even a base the caller has.
        """
        cdef int i, code = READ_OK
        cdef uint64_t end_lsn = layer_load(&self.end_lsn)
        if end_lsn and upper >= end_lsn:
            upper = end_lsn - 1
        if layer_load_pointer(self.table) == NULL and self.deleted.snapshot() == NULL:
            return READ_OK
        for i in range(first, last):
            if not batch.queries[i].complete:
                code = self._collect_one(batch, &batch.queries[i], upper, floor, window)
                if code != READ_OK:
                    break
        return code

    cdef int _collect_one(self, ReadBatch batch, Query *query, uint64_t upper, uint64_t floor,
                          ReadWindow *window) noexcept nogil:
        cdef uint64_t deleted_at = self.deleted.newest(&query.key, upper)
        cdef Entry *entry = self.find_newest(&query.key)
        cdef const uint8_t *data
        if deleted_at < floor:
            deleted_at = 0
        while entry != NULL and entry.lsn >= floor and entry.lsn > query.floor \
                and entry.lsn > deleted_at:
            if entry.lsn <= upper:
                data = self.values.checked(entry.position, entry.size, entry.crc, window)
                if data == NULL:
                    return READ_FAILED
                if batch.add(query, entry.lsn, entry.flags, data, entry.size) != 0:
                    return READ_NO_MEMORY
                if entry.flags & WILL_INIT:
                    return READ_OK
            entry = self.entry_at(entry.prev - 1) if entry.prev else NULL
        if deleted_at > query.floor:
            query.complete = True
            batch.pending -= 1
        return READ_OK

    def read(self, ReadBatch batch not None, int first, int last, uint64_t upper, uint64_t floor):
        """Add to the queries [first, last) of `batch` their values with floor <= LSN <= upper.

        Raises MemoryError; for a value in the ephemeral file OSError, CorruptLayerError.
        """
        cdef int code
        cdef ReadWindow window
        if first < 0 or last > batch.count:
            raise IndexError("no such query")
        memset(&window, 0, sizeof(window))
        with nogil:
            code = self.collect(batch, first, last, upper, floor, &window)
            window_free(&window)
        if code != READ_OK:
            self.raise_read_error(code, &window)

    def keys(self, bytes start not None, bytes end not None, uint64_t upper):
        """The keys in [start, end) with a value at or below `upper`, as an unordered list.

        Without those deleted since; what is in older layers is the caller's, see tombstones().
        """
        cdef Key low, high, key
        cdef Table *table
        cdef Entry *entry
        cdef uint64_t i = 0, slot, slots
        cdef const Tombstone *deleted = self.deleted.snapshot()
        cdef uint64_t end_lsn = layer_load(&self.end_lsn)
        cdef list result = []
        if end_lsn and upper >= end_lsn:
            upper = end_lsn - 1
        key_parse(&low, start)
        key_parse(&high, end)
        table = <Table *> layer_load_pointer(self.table)
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
                    if entry != NULL and newest_covering(deleted, &key, upper, 0) >= entry.lsn:
                        entry = NULL
            if entry != NULL:
                result.append(key_bytes(&key))
        return result

    def tombstones(self, upper=None):
        """The deleted ranges [(start, end, lsn)] at or below `upper`, in the order of the LSNs.

        Without `upper` all of them, those of an unfinished batch included while the layer is open;
        once it is frozen those below its end.
        """
        cdef uint64_t limit = MAX_LSN if upper is None else upper
        cdef uint64_t end_lsn = layer_load(&self.end_lsn)
        if end_lsn and limit >= end_lsn:
            limit = end_lsn - 1
        return self.deleted.listed(limit)

    @property
    def entry_count(self):
        """Values in the layer, replaced ones not counted."""
        return self.n_entries - self.n_replaced

    @property
    def memory_size(self):
        """Bytes of memory taken: values not in the file, entries, tables, deleted ranges."""
        cdef uint64_t entries = self.n_entries * sizeof(Entry)
        # Huge pages are there as a whole; the first chunk is of ordinary ones.
        if self.n_entries > ENTRIES_PER_CHUNK:
            entries = (self.n_entries // ENTRIES_PER_CHUNK + 1) * HUGE_PAGE
        return self.values.memory() + entries + self.table_memory + self.deleted.memory

    @property
    def spilled_size(self):
        """Bytes in the ephemeral file."""
        return self.file.size if self.file is not None else 0
