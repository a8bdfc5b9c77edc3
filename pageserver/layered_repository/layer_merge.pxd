"""What the merge and the split of deltas have in common: see layer_merge.pyx."""
from libc.stdint cimport int64_t, uint64_t

from pageserver.layered_repository.layer_writer cimport LayerWriter

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        int64_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    int CLOCK_MONOTONIC

cdef enum:
    SLICE_NS = 20000000          # after so long the caller is asked whether to stop
    CLOCK_EVERY = 64             # entries between looks at the clock

cdef enum Result:                # of a slice, or of a step in it
    FINISHED                     # the step is done; of a slice: all inputs are at their end
    PAUSED
    CUT                          # the next entry needs a new file
    READ_FAILED                  # the cursor says what
    WRITE_FAILED                 # the writer says what the code of the error is
    CONFLICT                     # two cursors disagree

cdef inline int64_t nanoseconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000000000 + now.tv_nsec

# Finish the file of a writer, which has values, as a delta of its keys: (FinishedFile, LayerName).
cdef tuple finish_delta(LayerWriter writer, uint64_t start_lsn, uint64_t end_lsn)
# Remove what was written: the files of writers, and (Files, FinishedFile, LayerName) of finished
# ones. What cannot be removed is a temporary file all the same.
cdef int remove_files(list writers, list finished) except -1
