"""The open layer: see inmemory_layer.pyx for the protocol between its writer and its readers."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.read_batch cimport ReadBatch

cdef enum PutResult:
    PUT_OK = 0
    PUT_NO_MEMORY = -1       # or more than 2^32 - 2 entries, 65536 chunks or a value over 1 GiB
    PUT_OLD_LSN = -2         # not above the published LSN, or older than the key's newest value
    PUT_SEALED = -3          # the layer is frozen: the writer kept it beyond advance()
    PUT_BAD_POSITION = -4    # put_ref: not the position of a stored value

cdef struct Entry:           # 48 bytes; hi, mid, lo are the key
    uint64_t hi
    uint64_t mid
    uint64_t lsn
    uint64_t position        # of the value: chunk << 32 | offset
    uint32_t size
    uint32_t prev            # index + 1 of the key's next older entry, 0: none
    uint16_t lo
    uint8_t flags


cdef inline Key entry_key(const Entry *entry) noexcept nogil:
    cdef Key key
    key.hi = entry.hi
    key.mid = entry.mid
    key.lo = entry.lo
    return key


cdef struct Chunk:
    uint8_t *data
    uint32_t used
    uint32_t capacity

cdef struct Table:
    uint64_t mask
    uint64_t used
    Table *retired           # the smaller table this one replaced
    uint64_t *slots          # tag << 32 | (index + 1 of the newest entry), 0: empty

cdef class InMemoryLayer:
    cdef readonly uint64_t start_lsn
    cdef readonly uint64_t end_lsn            # exclusive; 0 while open
    cdef readonly uint64_t prev_record_lsn    # of the last record in it, once frozen
    cdef readonly uint64_t max_lsn            # newest value put
    cdef readonly bint sealed
    cdef uint64_t published_lsn
    cdef Chunk *chunks
    cdef uint32_t n_chunks, current_chunk
    cdef Entry **entry_chunks
    cdef uint64_t n_entries
    cdef Table *table
    cdef uint64_t n_replaced
    cdef uint64_t memory

    # Writer's side: one thread at a time, the holder of the timeline's writer.
    cdef int put_raw(self, const Key *key, uint64_t lsn, uint8_t flags, const uint8_t *data,
                     uint32_t size) noexcept nogil
    cdef int64_t append_value(self, const uint8_t *data, uint32_t size) noexcept nogil
    cdef int put_ref(self, const Key *key, uint64_t lsn, uint8_t flags, int64_t position,
                     uint32_t size) noexcept nogil
    cdef int raise_put_error(self, int code, const Key *key, uint64_t lsn) except -1

    # Readers' side: any thread.
    cdef Entry *entry_at(self, uint64_t index) noexcept nogil
    cdef const uint8_t *value_at(self, uint64_t position) noexcept nogil
    cdef Entry *find_newest(self, const Key *key) noexcept nogil
    cdef int collect(self, ReadBatch batch, int first, int last, uint64_t upper,
                     uint64_t floor) noexcept nogil

    # Private to the writer.
    cdef int _start(self) noexcept nogil
    cdef int _grow_table(self) noexcept nogil
    cdef int _new_entry_chunk(self) noexcept nogil
    cdef int64_t _new_chunk(self, uint32_t capacity) noexcept nogil
