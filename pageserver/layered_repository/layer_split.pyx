"""Splitting of a delta by LSN: what it has in some LSN ranges, each in a file of its own.

One pass over the layer; every range has a writer, which gets its values in the order of (key, LSN).
What lies in none of the ranges is not written. The work is done in slices without the GIL; between
them the caller is asked whether to stop.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from pageserver.layered_repository.errors import TimelineStopped
from pageserver.layered_repository.layer_merge cimport (
    CLOCK_EVERY,
    CUT,
    FINISHED,
    PAUSED,
    READ_FAILED,
    SLICE_NS,
    WRITE_FAILED,
    finish_delta,
    nanoseconds,
    remove_files,
)
from pageserver.layered_repository.layer_scan cimport LayerScan
from pageserver.layered_repository.layer_writer cimport LayerWriter

cdef enum:
    PIECES = 16

MAX_PIECES = PIECES


cdef struct Piece:
    uint64_t start_lsn, end_lsn
    void *writer                 # LayerWriter, kept alive by the list of them; NULL: none yet


cdef class Split:
    """The state of one split; see split_layer."""

    cdef LayerScan scan
    cdef object new_writer, stop
    cdef list writers, finished
    cdef Piece[PIECES] pieces
    cdef int count
    cdef bint pending            # the entry of the cursor has not been written yet
    cdef int at                  # the piece it belongs to
    cdef int error

    def __cinit__(self, layer, keep, new_writer, stop):
        cdef int i
        memset(self.pieces, 0, sizeof(self.pieces))
        self.count = len(keep)
        for i in range(self.count):
            self.pieces[i].start_lsn, self.pieces[i].end_lsn = keep[i]
        self.scan = LayerScan(layer)
        self.new_writer = new_writer
        self.stop = stop
        self.writers = []
        self.finished = []

    # ---- with the GIL

    cdef list run(self):
        """Write all pieces; returns the finished files."""
        cdef int result = PAUSED
        try:
            while result != FINISHED:
                if self.stop():
                    raise TimelineStopped("the split of a layer was stopped")
                with nogil:
                    result = self._slice()
                if result == CUT:
                    self._open_piece()
                elif result == READ_FAILED:
                    self.scan.raise_error()
                elif result == WRITE_FAILED:
                    (<LayerWriter> self.pieces[self.at].writer).raise_error(self.error)
            self._finish_pieces()
        except BaseException:
            remove_files(self.writers, self.finished)
            raise
        return [(file, name) for _, file, name in self.finished]

    cdef int _open_piece(self) except -1:
        cdef LayerWriter writer = self.new_writer()
        self.writers.append(writer)
        self.pieces[self.at].writer = <void *> writer
        return 0

    cdef int _finish_pieces(self) except -1:
        cdef LayerWriter writer
        cdef Piece *piece
        cdef int i
        for i in range(self.count):
            piece = &self.pieces[i]
            if piece.writer == NULL:
                continue
            writer = <LayerWriter> piece.writer
            file, name = finish_delta(writer, piece.start_lsn, piece.end_lsn)
            self.finished.append((writer.out.files, file, name))
            self.writers.remove(writer)
        return 0

    # ---- without it

    cdef int _slice(self) noexcept nogil:
        """Write for a while; a Result."""
        cdef int64_t deadline = nanoseconds() + SLICE_NS
        cdef int left = CLOCK_EVERY, got
        cdef void *writer
        while True:
            if not self.pending:
                got = self.scan.next()
                if got <= 0:
                    return FINISHED if got == 0 else READ_FAILED
                self.at = self._piece_of(self.scan.lsn)
                self.pending = self.at >= 0
            if self.pending:
                writer = self.pieces[self.at].writer
                if writer == NULL:
                    return CUT
                self.error = (<LayerWriter> writer).add_raw(
                    &self.scan.key, self.scan.lsn, self.scan.flags, self.scan.data, self.scan.size
                )
                if self.error != 0:
                    return WRITE_FAILED
                self.pending = False
            left -= 1
            if left == 0:
                left = CLOCK_EVERY
                if nanoseconds() >= deadline:
                    return PAUSED

    cdef int _piece_of(self, uint64_t lsn) noexcept nogil:
        """The piece a change at an LSN belongs to, -1 if it is dropped."""
        cdef int i
        for i in range(self.count):
            if lsn < self.pieces[i].end_lsn:
                return i if lsn >= self.pieces[i].start_lsn else -1
        return -1


def split_layer(layer, keep, new_writer, *, stop):
    """Write what a ranged delta has in the LSN ranges `keep` to files of their own.

    `keep` are [start, end) in ascending order that do not overlap, within the layer's LSN range, at
    most MAX_PIECES. Returns (FinishedFile, LayerName) in their order; a range without changes has
    none. Each file has all changes of its key range in its LSN range, as the layer has them; it is
    durable, under the temporary name that its writer, made by `new_writer`, was given. All of the
    layer is verified, also what is dropped.

    The GIL is released for the bulk of the work, and `stop` asked about every 20 ms:
    TimelineStopped if it says so. Raises ValueError for ranges or a layer that do not fit,
    CorruptLayerError, LayerGoneError, OSError; what was written is removed then.
    """
    cdef Split split
    if layer.is_image or layer.name.is_l0:
        raise ValueError(f"{layer.path}: only a delta over a range of keys can be split")
    if len(keep) > PIECES:
        raise ValueError(f"a layer is split into at most {PIECES} pieces, not {len(keep)}")
    last = layer.start_lsn
    for start, end in keep:
        if not last <= start < end <= layer.end_lsn:
            raise ValueError(f"{layer.path}: cannot be split into the LSN ranges {keep}")
        last = end
    split = Split(layer, keep, new_writer, stop)
    return split.run()
