"""Blocks of layer files in memory, and what a read works with: see layer_block.pyx."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pageserver.layered_repository.block_cache cimport CachedBlock
from pageserver.layered_repository.layer_format cimport MAX_LEAF_SIZE
from pageserver.layered_repository.layer_leaf cimport LeafView

cdef enum ReadErrorCode:
    E_NO_MEMORY = 1
    E_IO = 2
    E_SHORT = 3
    E_CHECKSUM = 4
    E_KIND = 5
    E_CODEC = 6
    E_MALFORMED = 7
    E_COMPRESSED = 8
    E_ORDER = 9
    E_RANGE = 10
    E_INDEX = 11
    E_PLACE = 12
    E_COUNT = 13
    E_FILTER = 14

cdef struct ReadError:
    int code
    int number           # errno of a failed system call
    uint64_t offset      # in the file

cdef struct Block:       # a checked block in memory
    const uint8_t *payload
    uint32_t size        # of the payload, uncompressed
    uint32_t stored      # bytes in the file, with the header

cdef struct Scratch:     # what one read works with, of one thread at a time
    LeafView leaf
    uint64_t block_offset        # of the value block loaded last, 0: none
    Block block
    uint8_t *stored              # that block as it is in the file
    size_t stored_capacity
    uint8_t *plain               # and its payload if it was compressed
    size_t plain_capacity
    void *decompressor
    CachedBlock *leaf_pin        # what `leaf` is in, NULL: leaf_stored or leaf_plain
    CachedBlock *block_pin       # what `block` is in, NULL: stored or plain
    bint keep                    # blocks that are read are to go to the cache
    bint holds_gil               # which is given up to read from the file
    ReadError error
    uint8_t leaf_stored[MAX_LEAF_SIZE]

# From a pool, so that a read allocates nothing. NULL: no memory.
cdef Scratch *scratch_take() noexcept nogil
cdef void scratch_give(Scratch *s) noexcept nogil

cdef int read_failed(ReadError *error, int code, uint64_t offset) noexcept nogil
cdef int reserve(uint8_t **buffer, size_t *capacity, size_t wanted) noexcept nogil
# Check a block that is in memory as it is in the file, `stored` bytes with its header. `limit`
# bounds its payload. Compressed payload goes to `plain`, which has that much room.
cdef int open_block(const uint8_t *header, uint64_t offset, uint32_t stored, uint8_t kind,
                    uint8_t *plain, uint32_t limit, void **decompressor, Block *block,
                    ReadError *error) noexcept nogil
# Raise the exception of a failed read of the file at `path`; with the GIL.
cdef int raise_read_error(str path, const ReadError *error) except -1
