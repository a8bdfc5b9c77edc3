"""Making sparse relation files, and writing blocks into them, at the speed of the system calls."""

from libc.errno cimport EINTR, ENAMETOOLONG, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

from posix.fcntl cimport O_CREAT, O_EXCL, O_WRONLY, open as c_open
from posix.types cimport gid_t, off_t, uid_t
from posix.unistd cimport close as c_close, fchown, ftruncate, pwrite

import os

cdef extern from "fcntl.h" nogil:
    int O_CLOEXEC

cdef enum:
    BLOCK_SIZE = 8192
    SEGMENT_BLOCKS = 131072
    PATH_SIZE = 4096
    MANIFEST_ENTRY = 24
    FORK_ENTRY = 32
    STARTUP_ENTRY = 20 + 8192
    BLOCK_PRESENT = 3

cdef struct ManifestEntry:
    uint32_t spcnode
    uint32_t dbnode
    uint32_t relnode
    uint32_t forknum
    uint32_t nblocks
    uint32_t reserved

cdef struct ForkEntry:
    uint32_t spcnode
    uint32_t dbnode
    uint32_t relnode
    uint32_t forknum
    uint32_t nblocks
    uint32_t reserved
    uint64_t first_state

cdef struct BlockEntry:
    uint32_t spcnode
    uint32_t dbnode
    uint32_t relnode
    uint32_t forknum
    uint32_t blkno


class ManifestError(ValueError):
    """The relation manifest or the start-up blocks contradict themselves."""


cdef int _compare(const uint32_t *a, const uint32_t *b) noexcept nogil:
    """Order of two (spcnode, dbnode, relnode, forknum)."""
    cdef int i
    for i in range(4):
        if a[i] != b[i]:
            return -1 if a[i] < b[i] else 1
    return 0


cdef const char *_suffix(uint32_t forknum) noexcept nogil:
    if forknum == 0:
        return b""
    if forknum == 1:
        return b"_fsm"
    if forknum == 2:
        return b"_vm"
    return b"_init"


cdef int _segment_path(
    char *path, const char *directory, uint32_t relnode, uint32_t forknum, uint32_t segment
) noexcept nogil:
    cdef int n
    if segment == 0:
        n = snprintf(path, PATH_SIZE, b"%s/%u%s", directory, relnode, _suffix(forknum))
    else:
        n = snprintf(
            path, PATH_SIZE, b"%s/%u%s.%u", directory, relnode, _suffix(forknum), segment
        )
    return 0 if n < PATH_SIZE else -1


def fork_table(const uint8_t[::1] manifest) -> tuple[bytes, int]:
    """The map file's fork table made of manifest entries, and the number of blocks of all forks.

    `manifest` is the entries alone: 24 bytes each, sorted. Raises ManifestError.
    """
    cdef Py_ssize_t size = manifest.shape[0]
    cdef Py_ssize_t count = size // MANIFEST_ENTRY
    cdef Py_ssize_t i
    cdef uint64_t nblocks = 0
    cdef ManifestEntry entry, previous
    cdef ForkEntry fork
    if size % MANIFEST_ENTRY:
        raise ManifestError("manifest has an incomplete entry")
    table = bytearray(count * FORK_ENTRY)
    cdef uint8_t[::1] out = table
    for i in range(count):
        memcpy(&entry, &manifest[i * MANIFEST_ENTRY], MANIFEST_ENTRY)
        if entry.forknum > 3 or entry.relnode == 0 or entry.reserved != 0:
            raise ManifestError(f"manifest entry {i} is not a relation fork")
        if i > 0 and _compare(&previous.spcnode, &entry.spcnode) >= 0:
            raise ManifestError(f"manifest entry {i} is out of order")
        fork.spcnode = entry.spcnode
        fork.dbnode = entry.dbnode
        fork.relnode = entry.relnode
        fork.forknum = entry.forknum
        fork.nblocks = entry.nblocks
        fork.reserved = 0
        fork.first_state = nblocks
        memcpy(&out[i * FORK_ENTRY], &fork, FORK_ENTRY)
        nblocks += entry.nblocks
        previous = entry
    return bytes(table), nblocks


def databases(const uint8_t[::1] table) -> list[tuple[int, int]]:
    """The (spcnode, dbnode) of a fork table, in its order, each once."""
    cdef Py_ssize_t i
    cdef ForkEntry fork
    cdef uint32_t spcnode = 0, dbnode = 0
    found = []
    for i in range(table.shape[0] // FORK_ENTRY):
        memcpy(&fork, &table[i * FORK_ENTRY], FORK_ENTRY)
        if not found or fork.spcnode != spcnode or fork.dbnode != dbnode:
            spcnode, dbnode = fork.spcnode, fork.dbnode
            found.append((spcnode, dbnode))
    return found


cdef int _create(
    const char *path, uint64_t size, bint chown, uid_t uid, gid_t gid
) noexcept nogil:
    """Make one sparse file; 0 or errno."""
    cdef int fd = c_open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0o600)
    cdef int error = 0
    if fd < 0:
        return errno
    if (size > 0 and ftruncate(fd, <off_t> size) != 0) or (
        chown and fchown(fd, uid, gid) != 0
    ):
        error = errno
    c_close(fd)
    return error


cdef int64_t _create_segments(
    char *path, const char *directory, const ForkEntry *fork, bint chown, uid_t uid, gid_t gid
) noexcept nogil:
    """Make the files of a fork; their number, or -errno with the path left in `path`."""
    cdef uint32_t left = fork.nblocks
    cdef uint32_t segment = 0
    cdef uint32_t blocks
    cdef int error
    while True:
        blocks = left if left < SEGMENT_BLOCKS else SEGMENT_BLOCKS
        if _segment_path(path, directory, fork.relnode, fork.forknum, segment) != 0:
            return -ENAMETOOLONG
        error = _create(path, <uint64_t> blocks * BLOCK_SIZE, chown, uid, gid)
        if error != 0:
            return -error
        left -= blocks
        segment += 1
        if left == 0:
            return segment


def create_files(
    const uint8_t[::1] table, directories: list[bytes], uid: int, gid: int
) -> int:
    """Make the sparse files of all forks, in segments of 1 GB; returns the number of files.

    `directories` holds the path of each of databases(table), in that order; uid -1 leaves the
    owner. Raises OSError that names the file, FileExistsError if there is one already.
    """
    cdef Py_ssize_t i
    cdef Py_ssize_t next_directory = 0
    cdef ForkEntry fork
    cdef uint32_t spcnode = 0, dbnode = 0
    cdef char[PATH_SIZE] path
    cdef const char *directory = NULL
    cdef bint chown = uid >= 0
    cdef uid_t c_uid = <uid_t> (uid if uid >= 0 else 0)
    cdef gid_t c_gid = <gid_t> (gid if uid >= 0 else 0)
    cdef int64_t files = 0, made
    for i in range(table.shape[0] // FORK_ENTRY):
        memcpy(&fork, &table[i * FORK_ENTRY], FORK_ENTRY)
        if directory == NULL or fork.spcnode != spcnode or fork.dbnode != dbnode:
            spcnode, dbnode = fork.spcnode, fork.dbnode
            current = directories[next_directory]
            directory = current
            next_directory += 1
        with nogil:
            made = _create_segments(path, directory, &fork, chown, c_uid, c_gid)
        if made < 0:
            raise OSError(-made, os.strerror(-made), os.fsdecode(<bytes> path))
        files += made
    return files


cdef Py_ssize_t _find(
    const uint8_t *table, Py_ssize_t count, const BlockEntry *block
) noexcept nogil:
    """Index of a block's fork in the table, -1 if it is not there."""
    cdef Py_ssize_t low = 0, high = count, middle
    cdef uint32_t[4] tag
    cdef int order
    while low < high:
        middle = (low + high) // 2
        memcpy(tag, table + middle * FORK_ENTRY, 16)
        order = _compare(&block.spcnode, tag)
        if order == 0:
            return middle
        if order < 0:
            high = middle
        else:
            low = middle + 1
    return -1


cdef int _write_page(const char *path, const uint8_t *page, uint32_t block) noexcept nogil:
    """Write one page into an existing file; 0 or errno."""
    cdef int fd = c_open(path, O_WRONLY | O_CLOEXEC)
    cdef Py_ssize_t done = 0, n
    cdef off_t offset = <off_t> (block % SEGMENT_BLOCKS) * BLOCK_SIZE
    cdef int error = 0
    if fd < 0:
        return errno
    while done < BLOCK_SIZE:
        n = pwrite(fd, page + done, BLOCK_SIZE - done, offset + done)
        if n <= 0 and errno != EINTR:
            error = errno
            break
        if n > 0:
            done += n
    c_close(fd)
    return error


def write_blocks(
    const uint8_t[::1] table, directories: dict[tuple[int, int], bytes],
    const uint8_t[::1] blocks, uint8_t[::1] states,
) -> int:
    """Write start-up blocks into their files and mark them present; returns how many.

    `blocks` is the entries alone: 5 * u32 and a page each; `states` the map's block states.
    Raises ManifestError for a block that no fork of the table has, OSError.
    """
    cdef Py_ssize_t size = blocks.shape[0]
    cdef Py_ssize_t count = size // STARTUP_ENTRY
    cdef Py_ssize_t forks = table.shape[0] // FORK_ENTRY
    cdef Py_ssize_t i, index
    cdef BlockEntry block
    cdef ForkEntry fork
    cdef char[PATH_SIZE] path
    cdef const char *directory
    cdef int error
    if size % STARTUP_ENTRY:
        raise ManifestError("start-up blocks end in an incomplete entry")
    for i in range(count):
        memcpy(&block, &blocks[i * STARTUP_ENTRY], sizeof(BlockEntry))
        index = _find(&table[0], forks, &block) if forks else -1
        if index >= 0:
            memcpy(&fork, &table[index * FORK_ENTRY], FORK_ENTRY)
        if index < 0 or block.blkno >= fork.nblocks:
            raise ManifestError(
                f"start-up block {block.blkno} of {block.spcnode}/{block.dbnode}/{block.relnode}"
                f" fork {block.forknum} is not in the manifest"
            )
        current = directories[block.spcnode, block.dbnode]
        directory = current
        if _segment_path(
            path, directory, block.relnode, block.forknum, block.blkno // SEGMENT_BLOCKS
        ) != 0:
            raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG), os.fsdecode(current))
        error = _write_page(path, &blocks[i * STARTUP_ENTRY + 20], block.blkno)
        if error != 0:
            raise OSError(error, os.strerror(error), os.fsdecode(<bytes> path))
        states[fork.first_state + block.blkno] = BLOCK_PRESENT
    return count
