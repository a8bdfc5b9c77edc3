"""The native rules of consensus in plain Python: _quorum.pyx and append_state.pyx, line by line."""

from __future__ import annotations

from typing import Any

from compute_tools.walproposer._quorum import PeerState
from compute_tools.walproposer.membership import Generation
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from zenith_utils.safekeeper_messages import NO_FEEDBACK, AppendRequest
from zenith_utils.zenith_feedback import ZenithFeedback

SAVE_EVERY = WAL_SEGMENT_SIZE
U64_MOST = (1 << 64) - 1


class Peer:
    """A safekeeper as the proposer knows it."""

    def __init__(self) -> None:
        self.state = PeerState.OFFLINE
        self.feedback = NO_FEEDBACK
        self.vote: Any = None
        self.term = self.next_lsn = self.flush_lsn = self.commit_lsn = 0


class Quorum:
    """The leader's term, and the acknowledgements of its peers."""

    def __init__(self, peer_count: int, proposer_id: bytes) -> None:
        self.peers = [Peer() for _ in range(peer_count)]
        self.quorum = peer_count // 2 + 1
        self.proposer_id = proposer_id
        self.joint: tuple[Generation, ...] = ()
        self.established = False
        self.term = self.epoch_start_lsn = self.truncate_lsn = 0
        self.commit_lsn = self.previous_commit_lsn = 0

    def acknowledge(
        self, peer: Peer, term: int, flush_lsn: int, commit_lsn: int, feedback: ZenithFeedback
    ) -> bool:
        """Take a peer's AppendResponse."""
        if term > self.term:
            return False
        if term < self.term or peer.state is not PeerState.STREAMING:
            return True
        peer.feedback = feedback
        if commit_lsn > peer.commit_lsn:
            peer.commit_lsn = commit_lsn
        if flush_lsn > peer.flush_lsn:
            peer.flush_lsn = flush_lsn
            self._advance()
        return True

    def _advance(self) -> None:
        commit = 0
        lowest = U64_MOST
        for peer in self.peers:
            lowest = min(lowest, peer.flush_lsn)
            if peer.flush_lsn <= commit:
                continue
            reached = sum(other.flush_lsn >= peer.flush_lsn for other in self.peers)
            if reached >= self.quorum and (self.established or self._by_joint(peer.flush_lsn)):
                commit = peer.flush_lsn
        if commit and commit >= self.epoch_start_lsn:
            self.established = True
            if commit > self.commit_lsn:
                self.previous_commit_lsn = self.commit_lsn
                self.commit_lsn = commit
        self.truncate_lsn = max(self.truncate_lsn, min(lowest, self.previous_commit_lsn))

    def _by_joint(self, lsn: int) -> bool:
        for generation in self.joint:
            reached = sum(self.peers[index].flush_lsn >= lsn for index in generation.members)
            if reached < generation.quorum:
                return False
        return True


class AppendState:
    """A log of which everything up to `flush_lsn` is durable."""

    def __init__(self, flush_lsn: int, *, term: int, commit_lsn: int, horizon_lsn: int) -> None:
        self.flush_lsn = self.next_lsn = flush_lsn
        self.commit_lsn = min(commit_lsn, flush_lsn)
        self.peer_horizon_lsn = horizon_lsn
        self.first_lsn = self.requested_commit = self.epoch_start_lsn = self.recovered_lsn = 0
        self.term = 0
        self.streaming: object = None
        self.saved(term, commit_lsn, horizon_lsn)

    def saved(self, term: int, commit_lsn: int, horizon_lsn: int) -> None:
        """Note what is persisted."""
        if term != self.term:
            self.streaming = None
        self.term = term
        self.saved_commit_lsn = commit_lsn
        self.saved_horizon_lsn = horizon_lsn

    def begin_stream(self, session: object, lsn: int, recovered_lsn: int = 0) -> None:
        """From here on `session` alone appends, at `lsn`."""
        self.flush_lsn = min(self.flush_lsn, lsn)
        self.next_lsn = lsn
        self.first_lsn = 0
        self.requested_commit = 0
        self.recovered_lsn = recovered_lsn
        self.streaming = session

    def is_streaming(self, session: object) -> bool:
        """Whether WAL of this session is taken."""
        return self.streaming is session

    def append(self, session: object, *fields: int) -> bool:
        """Accept a piece of WAL, or a heartbeat."""
        header = AppendRequest._make((*fields, b""))
        if session is not self.streaming or header.term != self.term:
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

    def flushed(self, flush_lsn: int) -> bool:
        """What was appended is durable up to `flush_lsn`."""
        commit = min(self.requested_commit, flush_lsn)
        saved = self.saved_commit_lsn
        self.flush_lsn = flush_lsn
        if commit > self.commit_lsn:
            self.commit_lsn = commit
        if self.has_recovered:
            return True
        if not saved:
            return self.first_lsn != 0
        return (
            saved < self.epoch_start_lsn <= self.commit_lsn
            or self.commit_lsn > saved + SAVE_EVERY
            or self.peer_horizon_lsn > self.saved_horizon_lsn + SAVE_EVERY
        )

    @property
    def has_recovered(self) -> bool:
        """Whether the log was recovering, and is complete now."""
        return self.recovered_lsn != 0 and self.flush_lsn >= self.recovered_lsn

    def progress(self) -> int:
        """The commit LSN to persist now."""
        self.commit_lsn = max(self.commit_lsn, self.first_lsn)
        self.first_lsn = 0
        return self.commit_lsn
