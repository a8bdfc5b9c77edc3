"""What the safekeepers have, and what is committed because of it.

Pure like core.py, which builds on it: no sockets, files or clocks. These are the rules that run for
every answer of a safekeeper; there is no second copy of them.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from zenith_utils.unaligned cimport put64

from enum import Enum

from zenith_utils.safekeeper_messages import NO_FEEDBACK, NO_XMIN

cdef enum:
    TAG_APPEND = 0x61
    PROPOSER_ID_SIZE = 16


class PeerState(Enum):
    """Where the dialogue with a safekeeper stands."""

    OFFLINE = "offline"
    GREETING = "greeting"
    GREETED = "greeted"
    VOTING = "voting"
    VOTED = "voted"
    STREAMING = "streaming"


cdef object _OFFLINE = PeerState.OFFLINE
cdef object _STREAMING = PeerState.STREAMING


cdef class Peer:
    """A safekeeper as the proposer knows it.

    next_lsn: first byte not sent yet in this session, meaningful while STREAMING; flush_lsn:
    durable there in our term, as far as we know, also valid while offline; commit_lsn: persisted
    commit LSN as last reported in our term; standby_xmin, standby_catalog_xmin: the oldest
    transactions that its hot standbys need, with their epochs, NO_XMIN if none.
    """

    def __init__(self):
        self.state = _OFFLINE
        self.feedback = NO_FEEDBACK
        self.standby_xmin = self.standby_catalog_xmin = NO_XMIN


cdef class Quorum:
    """The leader's term, and the acknowledgements of its peers.

    established: a majority follows us, of the current generation and of all in `joint`, and has
    WAL to the start of our epoch. Before that nothing is committed, after it the current one alone
    decides: no leader of an earlier generation can be elected any more. previous_commit_lsn: what
    commit_lsn was before it moved last; truncate_lsn: the horizon, below which all have all WAL.
    """

    def __init__(self, int peer_count, bytes proposer_id not None):
        if peer_count < 1:
            raise ValueError("a proposer needs at least one safekeeper")
        if len(proposer_id) != PROPOSER_ID_SIZE:
            raise ValueError(f"a proposer's id has {PROPOSER_ID_SIZE} bytes")
        self.peers = [Peer() for _ in range(peer_count)]
        self.quorum = peer_count // 2 + 1
        self.proposer_id = proposer_id
        self.joint = ()

    cpdef bint acknowledge(
        self, Peer peer, uint64_t term, uint64_t flush_lsn, uint64_t commit_lsn, feedback
    ) noexcept:
        """Take a peer's AppendResponse; False, and nothing taken, if it is of a higher term."""
        if term > self.term:
            return False
        if term < self.term or peer.state is not _STREAMING:
            return True
        peer.feedback = feedback
        if commit_lsn > peer.commit_lsn:
            peer.commit_lsn = commit_lsn
        if flush_lsn > peer.flush_lsn:
            peer.flush_lsn = flush_lsn
            self._advance()
        return True

    cdef void _advance(self) noexcept:
        """Recompute the commit LSN and the truncate horizon from what is durable where."""
        cdef Peer peer, other
        cdef uint64_t commit = 0
        cdef uint64_t lowest = <uint64_t> -1
        cdef int reached
        for peer in self.peers:
            lowest = min(lowest, peer.flush_lsn)
            if peer.flush_lsn <= commit:
                continue
            reached = 0
            for other in self.peers:
                reached += other.flush_lsn >= peer.flush_lsn
            if reached >= self.quorum and (self.established or self._by_joint(peer.flush_lsn)):
                commit = peer.flush_lsn
        # WAL of older terms commits only together with reaching our own epoch (Raft's rule).
        if commit and commit >= self.epoch_start_lsn:
            self.established = True
            if commit > self.commit_lsn:
                self.previous_commit_lsn = self.commit_lsn
                self.commit_lsn = commit
        # Less than all that is committed: so whoever begins there gets a record at least, and can
        # show where its log ends.
        self.truncate_lsn = max(self.truncate_lsn, min(lowest, self.previous_commit_lsn))

    cdef bint _by_joint(self, uint64_t lsn) noexcept:
        """Whether a majority of each earlier generation that still matters has WAL up to `lsn`."""
        cdef int reached
        for generation in self.joint:
            reached = 0
            for index in generation.members:
                reached += (<Peer> self.peers[index]).flush_lsn >= lsn
            if reached < generation.quorum:
                return False
        return True

    def standby_horizon(self):
        """The oldest (xmin, catalog xmin) that hot standbys of connected safekeepers need."""
        cdef Peer peer
        cdef uint64_t xmin = <uint64_t> -1
        cdef uint64_t catalog_xmin = <uint64_t> -1
        for peer in self.peers:
            if peer.state is _STREAMING:
                xmin = min(xmin, peer.standby_xmin)
                catalog_xmin = min(catalog_xmin, peer.standby_catalog_xmin)
        return xmin, catalog_xmin

    cdef bint none_ahead(self) noexcept:
        """Whether the next commit needs news from as many peers as are a quorum.

        Then it needs news from one at least who is not among any `quorum` - 1 peers.
        """
        cdef Peer peer
        for peer in self.peers:
            if peer.flush_lsn > self.commit_lsn:
                return False
        return True

    cdef void write_append_header(
        self, uint8_t *header, uint64_t begin_lsn, uint64_t end_lsn
    ) noexcept:
        """The APPEND_HEADER_SIZE bytes before the WAL of an AppendRequest."""
        put64(header, TAG_APPEND)
        put64(header + 8, self.term)
        put64(header + 16, self.epoch_start_lsn)
        put64(header + 24, begin_lsn)
        put64(header + 32, end_lsn)
        put64(header + 40, self.commit_lsn)
        put64(header + 48, self.truncate_lsn)
        memcpy(header + 56, PyBytes_AS_STRING(self.proposer_id), PROPOSER_ID_SIZE)

    def append_header(self, uint64_t begin_lsn, uint64_t end_lsn):
        """Header of an AppendRequest with the WAL of a range, or of a heartbeat if it is empty."""
        cdef bytes header = PyBytes_FromStringAndSize(NULL, APPEND_HEADER_SIZE)
        self.write_append_header(<uint8_t *> PyBytes_AS_STRING(header), begin_lsn, end_lsn)
        return header
