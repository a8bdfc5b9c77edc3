"""The keys of keys.py, made without Python."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.size_table cimport KIND_RELATION, KIND_SLRU
from postgres_ffi.wal_record cimport BlockRef

cdef enum:
    SLRU_CLOG = 0
    SLRU_MEMBERS = 1
    SLRU_OFFSETS = 2
    PAGES_PER_SEGMENT = 32


cdef inline Key make_key(uint8_t kind, uint32_t a, uint32_t b, uint32_t c, uint8_t d,
                         uint32_t e) noexcept nogil:
    cdef Key key
    key.hi = <uint64_t> kind << 56 | <uint64_t> a << 24 | b >> 8
    key.mid = <uint64_t> (b & 0xFFU) << 56 | <uint64_t> c << 24 | <uint64_t> d << 16 | e >> 16
    key.lo = <uint16_t> (e & 0xFFFFU)
    return key


cdef inline Key block_key(const BlockRef *block) noexcept nogil:
    return make_key(KIND_RELATION, block.spcnode, block.dbnode, block.relnode, block.forknum,
                    block.blkno)


cdef inline Key rel_size_key(uint32_t spcnode, uint32_t dbnode, uint32_t relnode,
                             uint8_t forknum) noexcept nogil:
    return make_key(KIND_RELATION, spcnode, dbnode, 0, 1 + forknum, relnode)


cdef inline Key slru_key(uint8_t kind, uint32_t page) noexcept nogil:
    """The key of a page of an SLRU, counted from the SLRU's beginning."""
    return make_key(KIND_SLRU, kind, 1, page // PAGES_PER_SEGMENT, 0, page % PAGES_PER_SEGMENT)
