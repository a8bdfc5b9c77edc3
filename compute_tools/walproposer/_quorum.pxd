# What the safekeepers have, and what is committed because of it: see _quorum.pyx.
from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    APPEND_HEADER_SIZE = 72


cdef class Peer:
    cdef public object state
    cdef public uint64_t term
    cdef public object vote
    cdef public uint64_t next_lsn
    cdef public uint64_t flush_lsn
    cdef public uint64_t commit_lsn
    cdef public object feedback
    cdef public uint64_t standby_xmin
    cdef public uint64_t standby_catalog_xmin


cdef class Quorum:
    cdef readonly list peers
    cdef readonly int quorum
    cdef public uint64_t term
    cdef public uint64_t epoch_start_lsn
    cdef public uint64_t truncate_lsn
    cdef public uint64_t commit_lsn
    cdef readonly uint64_t previous_commit_lsn
    cdef public bint established
    cdef public tuple joint
    cdef bytes proposer_id

    cpdef bint acknowledge(
        self, Peer peer, uint64_t term, uint64_t flush_lsn, uint64_t commit_lsn, feedback
    ) noexcept
    cdef bint none_ahead(self) noexcept
    cdef void _advance(self) noexcept
    cdef bint _by_joint(self, uint64_t lsn) noexcept
    cdef void write_append_header(
        self, uint8_t *header, uint64_t begin_lsn, uint64_t end_lsn
    ) noexcept
