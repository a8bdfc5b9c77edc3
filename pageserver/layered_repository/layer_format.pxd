"""The format of a layer file, version 2.

    file header, 256 bytes
    value blocks, leaf blocks, the filter block if there is one, the root block: back to back

Numbers are little-endian; keys, and LSNs where they are part of a sort order, are big-endian.

File header: 0 magic "ZNTHLAYR", 8 u16 format version, 10 u8 kind (1 delta, 2 image), 11 u8 codec
the writer was asked for, 12 u32 value block target, 16 tenant, 32 timeline, 48 first key, 66 end of
the key range, 88 u64 start LSN, 96 u64 end LSN, 104 u64 number of entries, 112 u64 offset of the
first leaf, 120 u64 offset of the root, 128 u64 size of the file, 136 u64 bytes of values, 144 u64
offset of the filter (0: none), 152 u64 number of distinct keys, 160 u64 bytes of the leaves
uncompressed, 252 u32 CRC-32C of the 252 bytes before. The rest is zero. Magic, version and checksum
stay where they are in every version.

Block: 0 u32 CRC-32C of its offset in the file (u64), the rest of this header and the payload as
stored; 4 u32 size of the payload as stored; 8 u32 its size uncompressed; 12 u8 kind; 13 u8 codec
(0: none, 1: one zstd frame); 14 zeros. The offset in the checksum finds a block that was written to
the wrong place. With a codec value blocks are compressed, each by itself, where that makes them
smaller. A reader takes any block with any codec, but leaves are written plain: every lookup needs
one.

Value block: values end to end, in the order of their entries. A value never spans blocks: a block
ends before it passes the target (8 kB with a codec, 4 kB without), and a longer value has one of
its own.

Leaf: up to 128 entries sorted by key and LSN, of one width. u16 count; u8 length p of the prefix
that the keys share; u8 widths (1: LSNs of 8 bytes, 2: block offsets of 8 bytes; else 4); u32 zero;
u64 least LSN; u64 least block offset; prefix (18 bytes), 6 zeros. Entry: the other 18 - p bytes of
the key; LSN - least LSN, big-endian; u8 flags; u16 offset in the block; u32 size; offset of the
block in the file - least block offset.

Filter, in deltas over all keys: a blocked Bloom filter of all keys, see key_filter.pxd.

Root: u32 count, u32 zero, then for each leaf its first key (18), first LSN (u64 big-endian), offset
in the file (u64) and offset of the block of its first value (u64). Leaves lie back to back.

Sizes were measured: heap pages of 8 kB shrink by a factor of 9.7 one by one, 11.2 in blocks of
16 kB, 11.7 in 32 kB; WAL records of 60 to 300 bytes by 2.5, 2.6 and 2.6, while the time to
decompress a block for one value is 6, 9 and 13 us (records: 12, 20, 29). With blocks of 8 kB and
plain leaves a get takes half the time that it takes with 16 kB and packed leaves, for a tenth more
space. Without a codec a smaller block only saves time: its bytes are copied and summed up for one
value.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from zenith_utils.crc32c cimport crc32c_update
from zenith_utils.unaligned cimport put16, put32, put64

cdef enum:
    FORMAT_VERSION = 2
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
    LEAF_HEADER = 48
    WIDE_LSN = 1
    WIDE_BLOCK = 2
    MAX_ENTRY_WIDTH = 41
    MAX_LEAF_SIZE = 5312         # BLOCK_HEADER + LEAF_HEADER + LEAF_ENTRIES * MAX_ENTRY_WIDTH

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
