"""The open layer: see inmemory_layer.pyx for the protocol between its writer and its readers."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pageserver.layered_repository.ephemeral_file cimport EphemeralFile, ReadWindow
from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.key_table cimport Table
from pageserver.layered_repository.memory_pool cimport MemoryPool
from pageserver.layered_repository.range_tombstones cimport RangeTombstones
from pageserver.layered_repository.read_batch cimport Query, ReadBatch
from pageserver.layered_repository.value_chunks cimport ValueChunks

cdef enum PutResult:
    PUT_OK = 0
    PUT_NO_MEMORY = -1       # or more than 2^32 - 2 entries, 65536 chunks or a value over 1 GiB
    PUT_OLD_LSN = -2         # not above the published LSN, or older than what is in the layer
    PUT_SEALED = -3          # the layer is frozen: the writer kept it beyond advance()
    PUT_BAD_POSITION = -4    # put_ref: not the position of a stored value
    PUT_DELETED = -5         # the key is in a range that was deleted at this LSN or a later one
    PUT_EMPTY_RANGE = -6     # delete_range: the end is not above the start

cdef enum ReadResult:
    READ_OK = 0
    READ_NO_MEMORY = -1
    READ_FAILED = -2         # a value in the ephemeral file: see the ReadWindow

cdef struct Entry:           # 48 bytes; hi, mid, lo are the key
    uint64_t hi
    uint64_t mid
    uint64_t lsn
    uint64_t position        # of the value, see value_chunks.pxd
    uint32_t size
    uint32_t prev            # index + 1 of the key's next older entry, 0: none
    uint16_t lo
    uint8_t flags
    uint32_t crc             # CRC-32C of the value, if its chunk may go to the file


cdef inline Key entry_key(const Entry *entry) noexcept nogil:
    cdef Key key
    key.hi = entry.hi
    key.mid = entry.mid
    key.lo = entry.lo
    return key


cdef class InMemoryLayer:
    cdef readonly uint64_t start_lsn
    cdef readonly uint64_t end_lsn            # exclusive; 0 while open
    cdef readonly uint64_t prev_record_lsn    # of the last record in it, once frozen
    cdef readonly uint64_t max_lsn            # newest value put or range deleted
    cdef readonly bint sealed
    cdef uint64_t published_lsn
    cdef MemoryPool pool
    cdef ValueChunks values
    cdef Entry **entry_chunks
    cdef uint64_t n_entries
    cdef Table *table
    cdef uint64_t n_replaced
    cdef uint64_t table_memory
    cdef RangeTombstones deleted
    cdef readonly EphemeralFile file          # None: nothing is spilled

    # Writer's side: one thread at a time, the holder of the timeline's writer.
    cdef int put_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil
    cdef int64_t append_value(self, const uint8_t *data, uint32_t size) noexcept nogil
    cdef int put_ref(self, const Key *key, uint64_t lsn, uint8_t flags, int64_t position,
                     uint32_t size) noexcept nogil
    cdef int delete_range_raw(self, const Key *start, const Key *end, uint64_t lsn) noexcept nogil
    cdef int raise_put_error(self, int code, const Key *key, uint64_t lsn) except -1

    # Readers' side: any thread. A window belongs to one thread: zeroed before its first use, given
    # back with window_free(), the place of the details when a call fails.
    cdef Entry *entry_at(self, uint64_t index) noexcept nogil
    cdef Entry *find_newest(self, const Key *key) noexcept nogil
    cdef int collect(self, ReadBatch batch, int first, int last, uint64_t upper, uint64_t floor,
                     ReadWindow *window) noexcept nogil
    cdef int raise_read_error(self, int code, const ReadWindow *window) except -1

    # Private.
    cdef int _collect_one(self, ReadBatch batch, Query *query, uint64_t upper, uint64_t floor,
                          ReadWindow *window) noexcept nogil
    cdef void _expect(self, const Key *key) noexcept nogil
    cdef int _start(self) noexcept nogil
    cdef int _new_entry_chunk(self) noexcept nogil
    cdef int _grow_table(self) noexcept nogil
