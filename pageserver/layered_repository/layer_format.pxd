"""The format of a layer file, version 3.

    file header, 256 bytes
    value blocks, leaf blocks, the filter block if there is one, the root block: back to back

Numbers are little-endian; keys, and LSNs where they are part of a sort order, are big-endian.

File header: 0 magic "ZNTHLAYR", 8 u16 format version, 10 u8 kind (1 delta, 2 image), 11 u8 codec
the writer was asked for, 12 u32 value block target, 16 tenant, 32 timeline, 48 first key, 66 end of
the key range, 88 u64 start LSN, 96 u64 end LSN, 104 u64 number of entries, 112 u64 offset of the
first leaf, 120 u64 offset of the root, 128 u64 size of the file, 136 u64 bytes of values, 144 u64
offset of the filter (0: none), 152 u64 number of distinct keys, 160 u64 bytes of the leaves without
their block headers, 252 u32 CRC-32C of the 252 bytes before. The rest is zero. Magic, version and
checksum stay where they are in every version.

Block: 0 u32 CRC-32C of its offset in the file (u64), the rest of this header and the payload as
stored; 4 u32 size of the payload as stored; 8 u32 its size uncompressed; 12 u8 kind; 13 u8 codec
(0: none, 1: one zstd frame); 14 zeros. The offset in the checksum finds a block that was written to
the wrong place. With a codec value blocks are compressed, each by itself, where that makes them
smaller; no other block is.

Value block: values end to end, in the order of their entries. A value never spans blocks: a block
ends before it passes the target (8 kB with a codec, 4 kB without), and a longer value has one of
its own.

Leaf: 1 to 128 entries sorted by key and LSN, of one width, which is the least that they need.

    header, 26 bytes: 0 u8 count n of the entries; 1 u8 length p of the prefix that the keys share;
        2 u8 bytes of an LSN, 0 to 8; 3 u8 bytes of a position, 1 to 8; 4 u8 bytes of a distance,
        0 to 8; 5 u8 bytes of flags, 0 or 1; 6 u8 count b of the blocks that its values are in;
        7 u8 the flags of all entries, if entries have none; 8 u64 least LSN; 16 u64 offset of the
        first block in the file; 24 u16 offset of the first value in that block
    p bytes: the prefix
    n entries: the other 18 - p bytes of the key; LSN - least LSN; the position where the value
        ends; flags
    b u8: the number of the first entry in the block, 0 for the first block
    b distances: offset of the block in the file - that of the first block

LSNs, positions and distances are big-endian there, so that key and LSN compare as one string. A
position counts the bytes of values from the beginning of the first block on, across blocks: a value
begins where the one before ends, and lies in its block as far behind the block's first value.

Filter, in deltas over all keys: a blocked Bloom filter of all keys, see key_filter.pxd.

Root: u32 count, u32 zero, then for each leaf its first key (18), first LSN (u64 big-endian), offset
in the file (u64) and offset of the block of its first value (u64). Leaves lie back to back.

Sizes were measured. An entry of a leaf takes 6.7 bytes where 32 keys have four records each; with
numbers of 4 bytes and the block in every entry it was 16.6. zstd would save 0.7 % of that, so it is
left out. Heap pages of 8 kB shrink by a factor of 9.7 one by one, 11.2 in blocks of 16 kB, 11.7 in
32 kB; WAL records of 60 to 300 bytes by 2.5, 2.6 and 2.6, while the time to decompress a block for
one value is 6, 9 and 13 us (records: 12, 20, 29): reads of 8 kB, and a cache full of such blocks,
are worth the tenth of space. Level 3 of zstd makes catalog pages 1 % smaller than level 1 does and
records of row changes 2 % larger, for 10 to 40 % more CPU time; a trained dictionary of 16 kB would
make these pages 6 % smaller and the records 1 %, for a training of 0.1 s a file. Without a codec a
smaller block only saves time: its bytes are copied and summed up for one value.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from zenith_utils.crc32c cimport crc32c_update
from zenith_utils.unaligned cimport put16, put32, put64

cdef enum:
    FORMAT_VERSION = 3
    KIND_DELTA = 1
    KIND_IMAGE = 2

    HEADER_SIZE = 256
    HEADER_CRC = 252

    BLOCK_HEADER = 16
    PLAIN_TARGET = 4096
    PACKED_TARGET = 8192
    MAX_VALUE_SIZE = 1 << 30
    BLOCK_VALUES = 1
    BLOCK_LEAF = 2
    BLOCK_ROOT = 3
    BLOCK_FILTER = 4
    CODEC_NONE = 0
    CODEC_ZSTD = 1
    ZSTD_LEVEL = 1

    LEAF_ENTRIES = 128
    LEAF_HEADER = 26
    # BLOCK_HEADER + LEAF_HEADER + LEAF_ENTRIES * (35 + 9): all numbers of their greatest width, keys
    # that share nothing, each value in a block of its own.
    MAX_LEAF_SIZE = 5674

    ROOT_HEADER = 8
    ROOT_ENTRY = 42


cdef inline uint32_t block_crc(uint64_t offset, const uint8_t *header, const uint8_t *payload,
                               size_t size) noexcept nogil:
    """The checksum of a block at `offset` in its file."""
    cdef uint8_t place[8]
    cdef uint32_t state
    put64(place, offset)
    state = crc32c_update(0xFFFFFFFFU, place, 8)
    state = crc32c_update(state, header + 4, BLOCK_HEADER - 4)
    return crc32c_update(state, payload, size) ^ 0xFFFFFFFFU


cdef inline uint32_t header_crc(const uint8_t *header) noexcept nogil:
    """The checksum of a file header."""
    return crc32c_update(0xFFFFFFFFU, header, HEADER_CRC) ^ 0xFFFFFFFFU


cdef inline void block_header(uint8_t *header, uint8_t kind, uint8_t codec, uint32_t stored,
                              uint32_t plain) noexcept nogil:
    """Fill the header of a block except for the checksum; sizes of the payload."""
    put32(header, 0)
    put32(header + 4, stored)
    put32(header + 8, plain)
    header[12] = kind
    header[13] = codec
    put16(header + 14, 0)
