"""The positions of a safekeeper's log, and the rules of appending to it.

The half of the acceptor that every commit passes through; consensus.py has the other, and says on
what orders safety rests. Pure like that: no sockets, files or clocks.
"""
from libc.stdint cimport uint64_t

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE

cdef uint64_t SAVE_EVERY = WAL_SEGMENT_SIZE


cdef class AppendState:
    """A log of which everything up to `flush_lsn` is durable, with what is persisted about it."""

    def __init__(self, uint64_t flush_lsn, *, uint64_t term, uint64_t commit_lsn,
                 uint64_t horizon_lsn):
        self.flush_lsn = self.next_lsn = flush_lsn
        # WAL found after a crash may end before what was known to be committed.
        self.commit_lsn = min(commit_lsn, flush_lsn)
        self.peer_horizon_lsn = horizon_lsn
        self.saved(term, commit_lsn, horizon_lsn)

    def saved(self, uint64_t term, uint64_t commit_lsn, uint64_t horizon_lsn):
        """Note what is persisted, or will be before anything else happens."""
        if term != self.term:
            # A session streams in one term.
            self.session = None
            self.streaming = NULL
        self.term = term
        self.saved_commit_lsn = commit_lsn
        self.saved_horizon_lsn = horizon_lsn

    def begin_stream(self, session not None, uint64_t lsn, uint64_t recovered_lsn=0):
        """From here on `session` alone appends, at `lsn`; what is behind it is cut.

        A log that is recovering has recovered when it reaches `recovered_lsn`, if that is not 0.
        """
        self.flush_lsn = min(self.flush_lsn, lsn)
        self.next_lsn = lsn
        self.first_lsn = 0
        self.requested_commit = 0
        self.recovered_lsn = recovered_lsn
        self.session = session
        self.streaming = <void *> session

    def is_streaming(self, session):
        """Whether WAL of this session is taken."""
        return self.streaming == <void *> session

    def append(self, session not None, uint64_t term, uint64_t epoch_start_lsn, uint64_t begin_lsn,
               uint64_t end_lsn, uint64_t commit_lsn, uint64_t truncate_lsn):
        """Accept a piece of WAL, or a heartbeat: LSNs that are equal.

        True: its bytes have to be written at `begin_lsn`, later `flushed` be called. False: it
        comes from another session, term or place, and nothing has changed.
        """
        cdef AppendHeader header = AppendHeader(
            term, epoch_start_lsn, begin_lsn, end_lsn, commit_lsn, truncate_lsn
        )
        return self.append_raw(<void *> session, &header)

    cdef bint append_raw(self, void *session, const AppendHeader *header) noexcept nogil:
        if session != self.streaming or header.term != self.term:
            return False
        if header.begin_lsn != header.end_lsn:
            if header.begin_lsn != self.next_lsn:
                return False
            self.next_lsn = header.end_lsn
            if not self.saved_commit_lsn and not self.first_lsn:
                self.first_lsn = header.begin_lsn
        if header.commit_lsn:
            self.requested_commit = header.commit_lsn
        self.epoch_start_lsn = header.epoch_start_lsn
        if header.truncate_lsn > self.peer_horizon_lsn:
            self.peer_horizon_lsn = header.truncate_lsn
        return True

    def flushed(self, uint64_t flush_lsn):
        """What was appended is durable up to `flush_lsn`, the end of a complete record.

        True: progress has to be persisted before this is answered.
        """
        return self.flushed_raw(flush_lsn)

    cdef bint flushed_raw(self, uint64_t flush_lsn) noexcept nogil:
        cdef uint64_t commit = min(self.requested_commit, flush_lsn), saved = self.saved_commit_lsn
        self.flush_lsn = flush_lsn
        if commit > self.commit_lsn:
            self.commit_lsn = commit
        if self.recovered():
            return True
        if not saved:
            return self.first_lsn != 0
        return saved < self.epoch_start_lsn <= self.commit_lsn \
            or self.commit_lsn > saved + SAVE_EVERY \
            or self.peer_horizon_lsn > self.saved_horizon_lsn + SAVE_EVERY

    @property
    def has_recovered(self):
        """Whether the log was recovering, and is complete now."""
        return self.recovered()

    cdef bint recovered(self) noexcept nogil:
        return self.recovered_lsn != 0 and self.flush_lsn >= self.recovered_lsn

    def progress(self):
        """The commit LSN to persist now."""
        # The hole before the first WAL cannot be scanned after a restart: start behind it.
        self.commit_lsn = max(self.commit_lsn, self.first_lsn)
        self.first_lsn = 0
        return self.commit_lsn
