"""Merging of deltas: the values of many files in the order of (key, LSN), in new files.

The cursors of the files are in a heap. The work is done in slices without the GIL; between them the
caller is asked whether to stop. What is in memory is a window of each file that is read and the
buffers of the one that is written.

A new file begins at a change of the key. A key with more changes than a whole file should have gets
files of its own, cut by LSN. So every file holds all changes of its key range in its LSN range.
"""
import logging
from dataclasses import dataclass

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

from pageserver.layered_repository.errors import CorruptLayerError, TimelineStopped
from pageserver.layered_repository.key cimport (
    KEY_SIZE,
    Key,
    key_bytes,
    key_equal,
    key_parse,
)
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from pageserver.layered_repository.layer_scan cimport LayerScan
from pageserver.layered_repository.layer_writer cimport LayerWriter

cdef struct Head:                # the entry a cursor is at
    Key key
    uint64_t lsn
    void *scan                   # LayerScan, kept alive by the list of them

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """A finished, durable file under its temporary name, and its bytes."""

    path: str
    size: int


cdef inline bint head_less(const Head *a, const Head *b) noexcept nogil:
    if a.key.hi != b.key.hi:
        return a.key.hi < b.key.hi
    if a.key.mid != b.key.mid:
        return a.key.mid < b.key.mid
    if a.key.lo != b.key.lo:
        return a.key.lo < b.key.lo
    return a.lsn < b.lsn


cdef inline bint head_equal(const Head *a, const Head *b) noexcept nogil:
    return a.lsn == b.lsn and key_equal(&a.key, &b.key)


cdef tuple finish_delta(LayerWriter writer, uint64_t start_lsn, uint64_t end_lsn):
    cdef bytes last = key_bytes(&writer.last)
    cdef bytes key_end = (int.from_bytes(last, "big") + 1).to_bytes(KEY_SIZE, "big")
    name = LayerName.delta(key_bytes(&writer.first), key_end, start_lsn, end_lsn)
    writer.finish(name)
    return FinishedFile(writer.path, writer.out.position), name


cdef int remove_files(list writers, list finished) except -1:
    cdef LayerWriter writer
    try:
        for writer in writers:
            writer.abort()
        for files, file, _ in finished:
            files.unlink(file.path)
    except OSError as error:
        log.warning("could not remove the files of a compaction that failed: %s", error)
    return 0


cdef class Merge:
    """The state of one merge; see merge_layers."""

    cdef list scans, finished
    cdef object new_writer, stop
    cdef Head *heap
    cdef int count               # of cursors that are not at their end
    cdef uint64_t target, start_lsn, end_lsn
    cdef LayerWriter writer      # of the current file, None: there is none
    cdef uint64_t piece_lsn      # first LSN of the current file
    cdef bint one_key            # the current file is one of several for one key
    cdef Key lowest, highest     # of the key space
    cdef void *failed
    cdef int error

    def __cinit__(self, scans, new_writer, uint64_t target, uint64_t start_lsn, uint64_t end_lsn,
                  stop):
        self.scans = scans
        self.new_writer = new_writer
        self.stop = stop
        self.finished = []
        self.target = target
        self.start_lsn = start_lsn
        self.end_lsn = end_lsn
        key_parse(&self.lowest, MIN_KEY)
        key_parse(&self.highest, (int.from_bytes(MAX_KEY, "big") - 1).to_bytes(KEY_SIZE, "big"))
        self.heap = <Head *> calloc(len(scans) + 1, sizeof(Head))
        if self.heap == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.heap)

    # ---- with the GIL

    cdef list run(self):
        """Merge everything; returns the finished files."""
        cdef int result
        try:
            self._fill_heap()
            result = PAUSED
            while result != FINISHED:
                if self.stop():
                    raise TimelineStopped("the merge of layers was stopped")
                with nogil:
                    result = self._slice()
                if result == CUT:
                    self._cut()
                elif result != PAUSED and result != FINISHED:
                    self._raise(result)
            if self.writer is not None:
                self._finish_file(self.end_lsn)
        except BaseException:
            remove_files([] if self.writer is None else [self.writer], self.finished)
            raise
        return [(file, name) for _, file, name in self.finished]

    cdef int _fill_heap(self) except -1:
        cdef LayerScan scan
        cdef int i, got
        for scan in self.scans:
            self.heap[self.count].scan = <void *> scan
            got = self._load(self.count)
            if got < 0:
                scan.raise_error()
            self.count += got
        for i in range(self.count // 2 - 1, -1, -1):
            self._sift_down(i)
        return 0

    cdef int _cut(self) except -1:
        """Finish the current file and begin one for the entry on top of the heap."""
        cdef bint same_key
        cdef uint64_t lsn = self.heap[0].lsn
        same_key = self.writer is not None and key_equal(&self.heap[0].key, &self.writer.last)
        if self.writer is not None:
            self._finish_file(lsn if same_key else self.end_lsn)
        self.writer = self.new_writer()
        self.one_key = same_key
        self.piece_lsn = lsn if same_key else self.start_lsn
        return 0

    cdef int _finish_file(self, uint64_t end_lsn) except -1:
        cdef LayerWriter writer = self.writer
        file, name = finish_delta(writer, self.piece_lsn, end_lsn)
        # The writer itself goes, with its buffers: there may be hundreds of files.
        self.finished.append((writer.out.files, file, name))
        self.writer = None
        return 0

    cdef int _raise(self, int result) except -1:
        cdef LayerScan scan, other
        if result == WRITE_FAILED:
            return self.writer.raise_error(self.error)
        scan = <LayerScan> self.failed
        if result == CONFLICT:
            other = <LayerScan> self.heap[0].scan
            raise CorruptLayerError(
                scan.opened.path,
                0,
                f"{other.opened.path} has another value of key "
                f"{key_bytes(&scan.key).hex().upper()} at LSN {scan.lsn:X}",
            )
        return scan.raise_error()

    # ---- without it

    cdef int _slice(self) noexcept nogil:
        """Merge for a while; a Result."""
        cdef int64_t deadline = nanoseconds() + SLICE_NS
        cdef int left = CLOCK_EVERY, result
        while self.count:
            result = self._drop_duplicates()
            if result != FINISHED:
                return result
            if self._needs_new_file():
                return CUT
            result = self._move_top()
            if result != FINISHED:
                return result
            left -= 1
            if left == 0:
                left = CLOCK_EVERY
                if nanoseconds() >= deadline:
                    return PAUSED
        return FINISHED

    cdef int _move_top(self) noexcept nogil:
        """Write the entry on top of the heap and go to the next one; a Result."""
        cdef void *scan = self.heap[0].scan
        self.error = self.writer.add_raw(
            &self.heap[0].key, self.heap[0].lsn, (<LayerScan> scan).flags,
            (<LayerScan> scan).data, (<LayerScan> scan).size,
        )
        if self.error != 0:
            return WRITE_FAILED
        return self._advance(0)

    cdef int _drop_duplicates(self) noexcept nogil:
        """Pass what other inputs have for the entry on top of the heap; a Result."""
        cdef int other, result
        cdef void *a
        cdef void *b
        while True:
            if self.count > 1 and head_equal(&self.heap[0], &self.heap[1]):
                other = 1
            elif self.count > 2 and head_equal(&self.heap[0], &self.heap[2]):
                other = 2
            else:
                return FINISHED
            a = self.heap[0].scan
            b = self.heap[other].scan
            if (<LayerScan> a).flags != (<LayerScan> b).flags \
                    or (<LayerScan> a).size != (<LayerScan> b).size \
                    or memcmp((<LayerScan> a).data, (<LayerScan> b).data, (<LayerScan> a).size):
                self.failed = b
                return CONFLICT
            result = self._advance(other)
            if result != FINISHED:
                return result

    cdef bint _needs_new_file(self) noexcept nogil:
        """Whether the entry on top of the heap cannot go to the current file."""
        cdef Key *key = &self.heap[0].key
        cdef bint full
        if self.writer is None:
            return True
        if self.writer.count == 0:
            return False
        full = self.writer.bytes_so_far() >= self.target
        if key_equal(key, &self.writer.last):
            return full and key_equal(&self.writer.first, key)
        if full or self.one_key or self._bytes_of_key(key, 0) >= self.target:
            return True
        # A delta over the whole key space would pass for an L0 delta.
        return key_equal(key, &self.highest) and key_equal(&self.writer.first, &self.lowest)

    cdef uint64_t _bytes_of_key(self, const Key *key, int i) noexcept nogil:
        """About how many bytes the inputs from place `i` of the heap downwards have for a key.

        It is that of the top, so it is at a place only if it is at all above.
        """
        if i >= self.count or not key_equal(&self.heap[i].key, key):
            return 0
        return (<LayerScan> self.heap[i].scan).bytes_of_key() \
            + self._bytes_of_key(key, 2 * i + 1) + self._bytes_of_key(key, 2 * i + 2)

    cdef int _advance(self, int i) noexcept nogil:
        """Take the cursor at a place of the heap, below which all is in order, on; a Result."""
        cdef int got = self._load(i)
        if got < 0:
            return READ_FAILED
        if got == 0:
            self.count -= 1
            self.heap[i] = self.heap[self.count]
        self._sift_down(i)
        return FINISHED

    cdef int _load(self, int i) noexcept nogil:
        """Have the next entry of a cursor at place `i`; 1, 0 at its end, < 0 if it failed."""
        cdef void *scan = self.heap[i].scan
        cdef int got = (<LayerScan> scan).next()
        if got > 0:
            self.heap[i].key = (<LayerScan> scan).key
            self.heap[i].lsn = (<LayerScan> scan).lsn
        elif got < 0:
            self.failed = scan
        return got

    cdef void _sift_down(self, int i) noexcept nogil:
        cdef Head moving = self.heap[i]
        cdef int child
        while True:
            child = 2 * i + 1
            if child >= self.count:
                break
            if child + 1 < self.count and head_less(&self.heap[child + 1], &self.heap[child]):
                child += 1
            if not head_less(&self.heap[child], &moving):
                break
            self.heap[i] = self.heap[child]
            i = child
        self.heap[i] = moving


def merge_layers(layers, new_writer, *, uint64_t target_size, uint64_t start_lsn, uint64_t end_lsn,
                 stop):
    """Merge deltas of one key range; returns (FinishedFile, LayerName) of the new, in key order.

    No other delta may have changes in a gap between the LSN ranges of the layers: the new files
    claim to have all changes in [start_lsn, end_lsn), which is the union of these ranges. Each is
    durable, under the temporary name that its writer, made by `new_writer`, was given; it has about
    `target_size` bytes and is never a delta over the whole key space. A value that several layers
    have is written once. All history is kept.

    The GIL is released for the bulk of the work, and `stop` asked about every 20 ms: TimelineStopped
    if it says so. Raises ValueError for layers that cannot be merged, CorruptLayerError (also when
    two layers differ in a value), LayerGoneError, OSError; what was written is removed then.
    """
    cdef Merge merge
    if not layers:
        return []
    for layer in layers:
        if layer.is_image or layer.key_start != layers[0].key_start \
                or layer.key_end != layers[0].key_end:
            raise ValueError(f"{layer.path}: only deltas of the same key range can be merged")
    if start_lsn != min(layer.start_lsn for layer in layers) \
            or end_lsn != max(layer.end_lsn for layer in layers):
        raise ValueError(
            f"the layers do not have the changes from LSN {start_lsn:X} to {end_lsn:X}"
        )
    merge = Merge([LayerScan(layer) for layer in layers], new_writer, target_size, start_lsn,
                  end_lsn, stop)
    return merge.run()
