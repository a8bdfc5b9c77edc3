"""Values that are applied to pages in-process: visibility map, commit log and multixact changes.

Formats of the values: values.py. Layouts of the pages: access/visibilitymap.c, access/clog.c,
access/multixact.c, whose redo all this repeats. Only SET_VM has an effect on the page's LSN.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zenith_utils.lsn import lsn_text
from zenith_utils.unaligned cimport get32, put16, put32

cdef enum:
    BLCKSZ = 8192
    PAGE_HEADER = 24
    KIND_CLEAR_VM = 2
    KIND_CLOG_COMMITTED = 3
    KIND_CLOG_ABORTED = 4
    KIND_MULTIXACT_OFFSET = 5
    KIND_MULTIXACT_MEMBERS = 6
    KIND_TRUNCATE_VM = 7
    KIND_SET_VM = 8
    PD_UPPER_OFFSET = 14
    PAGE_LAYOUT_VERSION = 4
    HEAPBLOCKS_PER_PAGE = 32672
    CLOG_XACTS_PER_PAGE = 32768
    OFFSETS_PER_PAGE = 2048
    MEMBERS_PER_PAGE = 1636
    MEMBER_GROUP_SIZE = 20


cdef int _clear_vm(uint8_t *page, const uint8_t *data, Py_ssize_t size) noexcept:
    cdef Py_ssize_t at = 1
    cdef uint32_t index
    if size != 5 and size != 9:
        return -1
    while at < size:
        index = get32(data + at) % HEAPBLOCKS_PER_PAGE
        page[PAGE_HEADER + index // 4] &= <uint8_t> ~((data[0] & 3) << (index % 4 * 2))
        at += 4
    return 0


cdef int _set_vm(uint8_t *page, const uint8_t *data, Py_ssize_t size, uint64_t lsn) noexcept:
    """The page's half of heap_xlog_visible: nothing changes, not even its LSN, if the bits are set.

    A page of zeros is initialised first.
    """
    cdef uint32_t index
    cdef uint8_t *byte
    cdef int shift
    if size != 5:
        return -1
    if not page[PD_UPPER_OFFSET] and not page[PD_UPPER_OFFSET + 1]:
        memset(page, 0, BLCKSZ)
        put16(page + 12, PAGE_HEADER)                       # pd_lower
        put16(page + PD_UPPER_OFFSET, BLCKSZ)
        put16(page + 16, BLCKSZ)                            # pd_special
        put16(page + 18, BLCKSZ | PAGE_LAYOUT_VERSION)
    index = get32(data + 1) % HEAPBLOCKS_PER_PAGE
    byte = page + PAGE_HEADER + index // 4
    shift = index % 4 * 2
    if (byte[0] >> shift & 3) != data[0]:
        byte[0] |= <uint8_t> (data[0] << shift)
        put32(page, <uint32_t> (lsn >> 32))
        put32(page + 4, <uint32_t> lsn)
    return 0


cdef int _truncate_vm(uint8_t *page, const uint8_t *data, Py_ssize_t size) noexcept:
    cdef uint32_t index, byte
    if size != 4:
        return -1
    index = get32(data) % HEAPBLOCKS_PER_PAGE
    byte = PAGE_HEADER + index // 4
    page[byte] &= <uint8_t> ((1 << (index % 4 * 2)) - 1)
    memset(page + byte + 1, 0, BLCKSZ - byte - 1)
    return 0


cdef int _set_clog(uint8_t *page, const uint8_t *data, Py_ssize_t size, int status) noexcept:
    cdef Py_ssize_t at
    cdef uint32_t index
    cdef int shift
    if size % 4:
        return -1
    for at in range(0, size, 4):
        index = get32(data + at) % CLOG_XACTS_PER_PAGE
        shift = index % 4 * 2
        page[index // 4] = <uint8_t> (page[index // 4] & ~(3 << shift) | status << shift)
    return 0


cdef int _set_offsets(uint8_t *page, const uint8_t *data, Py_ssize_t size) noexcept:
    cdef Py_ssize_t at
    if size != 8 and size != 16:
        return -1
    for at in range(0, size, 8):
        memcpy(page + get32(data + at) % OFFSETS_PER_PAGE * 4, data + at + 4, 4)
    return 0


cdef int _set_members(uint8_t *page, const uint8_t *data, Py_ssize_t size) noexcept:
    """Four flag bytes, then four transaction ids, for every four members."""
    cdef Py_ssize_t at
    cdef uint32_t index, group
    if size < 4 or (size - 4) % 8:
        return -1
    index = get32(data) % MEMBERS_PER_PAGE
    if index + (size - 4) // 8 > MEMBERS_PER_PAGE:
        return -1
    for at in range(4, size, 8):
        group = index // 4 * MEMBER_GROUP_SIZE
        page[group + index % 4] = data[at + 4]
        memcpy(page + group + 4 + index % 4 * 4, data + at, 4)
        index += 1
    return 0


def apply_custom_records(const uint8_t[::1] base not None, records):
    """The page `base` (8192 bytes) with the (lsn, flags, data) of `records` applied, as bytes.

    ValueError for a value that is none of these kinds or malformed.
    """
    cdef bytearray result
    cdef uint8_t *page
    cdef const uint8_t *p
    cdef Py_ssize_t size
    cdef int kind, rc
    cdef bytes data
    if base.shape[0] != BLCKSZ:
        raise ValueError(f"a page has {BLCKSZ} bytes, not {base.shape[0]}")
    result = bytearray(base)
    page = <uint8_t *> <char *> result
    for lsn, flags, data in records:
        kind = <int> flags >> 1
        p = <const uint8_t *> <const char *> data
        size = len(data)
        if kind == KIND_CLEAR_VM:
            rc = _clear_vm(page, p, size)
        elif kind == KIND_CLOG_COMMITTED:
            rc = _set_clog(page, p, size, 1)
        elif kind == KIND_CLOG_ABORTED:
            rc = _set_clog(page, p, size, 2)
        elif kind == KIND_MULTIXACT_OFFSET:
            rc = _set_offsets(page, p, size)
        elif kind == KIND_MULTIXACT_MEMBERS:
            rc = _set_members(page, p, size)
        elif kind == KIND_SET_VM:
            rc = _set_vm(page, p, size, lsn)
        elif kind == KIND_TRUNCATE_VM:
            rc = _truncate_vm(page, p, size)
        else:
            rc = -1
        if rc:
            raise ValueError(
                f"the value of kind {kind} at {lsn_text(lsn)}, {size} bytes, is no change to a page")
    return bytes(result)
