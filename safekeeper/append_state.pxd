"""The positions of a safekeeper's log, and the rules of appending to it: see append_state.pyx."""
from libc.stdint cimport uint64_t

cdef struct AppendHeader:          # of an AppendRequest
    uint64_t term
    uint64_t epoch_start_lsn
    uint64_t begin_lsn
    uint64_t end_lsn
    uint64_t commit_lsn
    uint64_t truncate_lsn

cdef class AppendState:
    cdef readonly uint64_t term                  # the highest one promised to
    cdef readonly uint64_t next_lsn              # where the next written byte goes
    cdef readonly uint64_t flush_lsn             # end of the last complete durable record
    cdef readonly uint64_t commit_lsn            # committed and durable here; never goes back
    cdef readonly uint64_t peer_horizon_lsn      # every safekeeper has all WAL below
    cdef readonly uint64_t first_lsn             # begin of the first WAL, 0 once that is persisted
    cdef readonly uint64_t saved_commit_lsn      # as persisted
    cdef readonly uint64_t saved_horizon_lsn
    cdef readonly uint64_t recovered_lsn         # complete from here on; 0 if it always was
    cdef uint64_t requested_commit, epoch_start_lsn
    cdef object session
    cdef void *streaming                         # the session whose WAL is taken, NULL: nobody's

    cdef bint append_raw(self, void *session, const AppendHeader *header) noexcept nogil
    cdef bint flushed_raw(self, uint64_t flush_lsn) noexcept nogil
    cdef bint recovered(self) noexcept nogil
