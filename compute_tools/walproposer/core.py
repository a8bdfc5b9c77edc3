"""The proposer's part in consensus, as a pure state machine.

No sockets, files or clocks: events of numbered safekeepers go in, actions come out. WAL itself does
not pass through here; the driver asks each peer's `next_lsn` and reports what it has sent. What is
acknowledged and committed, the part that runs for every commit, is native: _quorum.pyx.

The phases: CAMPAIGN until a quorum has voted; ELECTED while a quorum is brought to the donor's end
of WAL, so that what any earlier leader may have committed is committed under this term, too;
LEADER from start() on, when Postgres adds WAL of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from compute_tools.walproposer._quorum import PeerState, Quorum
from postgres_ffi.wal_format import WAL_BLCKSZ, WAL_SEGMENT_SIZE, normalize_lsn
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    AcceptorMessage,
    AppendResponse,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    TermHistory,
    TermLsn,
    VoteRequest,
    VoteResponse,
    last_term,
)
from zenith_utils.zenith_feedback import ZenithFeedback

_TLI: Final = 1


class ProposerError(Exception):
    """Something that must not happen; the compute cannot go on."""


class Phase(Enum):
    """Where the proposer stands."""

    CAMPAIGN = "campaign"
    ELECTED = "elected"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a safekeeper."""

    peer: int
    message: ProposerMessage


@dataclass(frozen=True, slots=True)
class Announced:
    """A safekeeper follows us now: send it WAL from its next_lsn on."""

    peer: int


@dataclass(frozen=True, slots=True)
class CampaignFailed:
    """Another proposer was faster with this term: call campaign() after a random pause."""


@dataclass(frozen=True, slots=True)
class Defeated:
    """Another compute led or wants to, in this term: stop, and stop Postgres."""

    peer: int
    term: int


Action = Send | Announced | CampaignFailed | Defeated


@dataclass(frozen=True, slots=True)
class Identity:
    """What a greeting tells; `system_id` and `pg_version` are 0 while unknown."""

    tenant_id: TenantId
    timeline_id: TimelineId
    proposer_id: bytes
    pg_version: int = 0
    system_id: int = 0


@dataclass(frozen=True, slots=True)
class Predecessors:
    """The proposers that served the same Postgres before, and have died.

    `terms` are those in which all WAL is this Postgres': the term its start was based on, and what
    each proposer since has won. `last_term` is the highest in which any of them asked for votes.
    """

    terms: frozenset[int]
    last_term: int


class Proposer(Quorum):
    """Drives one election and then the stream. All methods are called by one thread.

    One with predecessors takes up the stream of a Postgres that runs: where others may try again
    in a higher term, it must yield to whoever asked for votes after them.
    """

    def __init__(
        self, identity: Identity, peer_count: int, predecessors: Predecessors | None = None
    ) -> None:
        super().__init__(peer_count, identity.proposer_id)
        self.identity = identity
        self._predecessors = predecessors
        self._own_terms = set() if predecessors is None else set(predecessors.terms)
        self._last_own_term = 0 if predecessors is None else predecessors.last_term
        self.phase = Phase.CAMPAIGN
        self.bootstrap = False
        """No complete record was ever written to this timeline."""
        self.donor: int | None = None
        self.history: TermHistory = ()

    # ---- events

    def connected(self, index: int) -> Sequence[Action]:
        """A session to a safekeeper has opened."""
        self.peers[index].state = PeerState.GREETING
        return (Send(index, self._greeting()),)

    def disconnected(self, index: int) -> None:
        """The session is over; what is durable there stays so."""
        self.peers[index].state = PeerState.OFFLINE

    def campaign(self) -> Sequence[Action]:
        """Start, or start again, asking for votes, in a term above all terms seen.

        May also give up an election whose donor has gone, as long as Postgres has not started.
        """
        if self.phase is Phase.LEADER:
            raise ProposerError("a leader cannot campaign again")
        self.phase = Phase.CAMPAIGN
        self.bootstrap = False
        self.donor = None
        self.epoch_start_lsn = 0
        self.term = 1 + max(self.term, self._last_own_term, *(peer.term for peer in self.peers))
        actions: list[Action] = []
        for index, peer in enumerate(self.peers):
            peer.vote = None
            peer.flush_lsn = peer.commit_lsn = 0
            if peer.state not in (PeerState.OFFLINE, PeerState.GREETING):
                actions.append(self._ask_for_vote(index))
        return actions

    def receive(self, index: int, message: AcceptorMessage) -> Sequence[Action]:
        """A message of a safekeeper has arrived."""
        if isinstance(message, AppendResponse):
            return self._append_response(index, message)
        if isinstance(message, AcceptorGreeting):
            return self._greeted(index, message)
        return self._vote_response(index, message)

    def start(self, start_lsn: int) -> Sequence[Action]:
        """Postgres runs on the state at `start_lsn` and is about to write there.

        In a bootstrap this is where the timeline's WAL begins; otherwise it must be
        epoch_start_lsn, give or take a page header. Raises ProposerError.
        """
        if self.phase is not Phase.ELECTED:
            raise ProposerError(f"told to start in phase {self.phase.value}")
        if self.bootstrap:
            self._set_epoch_start(_with_page_header(start_lsn))
        elif normalize_lsn(start_lsn) != normalize_lsn(self.epoch_start_lsn):
            raise ProposerError(
                f"Postgres was started at {lsn_text(start_lsn)}, but the safekeepers' WAL ends "
                f"at {lsn_text(self.epoch_start_lsn)}"
            )
        self.phase = Phase.LEADER
        actions: list[Action] = []
        for index, peer in enumerate(self.peers):
            if peer.state is PeerState.VOTED:
                actions += self._announce(index)
        return actions

    def identify(self, system_id: int, pg_version: int) -> Sequence[Action]:
        """Postgres has told who it is: greet again, so that safekeepers can check and keep it."""
        self.identity = replace(self.identity, system_id=system_id, pg_version=pg_version)
        return [
            Send(index, self._greeting())
            for index, peer in enumerate(self.peers)
            if peer.state in (PeerState.VOTING, PeerState.VOTED, PeerState.STREAMING)
        ]

    # ---- what the driver asks

    @property
    def synced(self) -> bool:
        """Whether a quorum has persisted that everything below epoch_start_lsn is committed."""
        if self.phase is Phase.CAMPAIGN:
            return False
        if self.bootstrap:
            return True
        reached = sum(peer.commit_lsn >= self.epoch_start_lsn for peer in self.peers)
        return reached >= self.quorum

    def sources(self, index: int) -> list[int]:
        """Safekeepers that hold the WAL at a peer's next_lsn in our term, the best one first."""
        position = self.peers[index].next_lsn
        ends = {
            other: peer.flush_lsn
            for other, peer in enumerate(self.peers)
            if peer.flush_lsn > position
        }
        if self.donor is not None and position < self.epoch_start_lsn:
            ends[self.donor] = max(ends.get(self.donor, 0), self.epoch_start_lsn)
        ends.pop(index, None)
        return sorted(ends, key=lambda other: ends[other], reverse=True)

    @property
    def feedback(self) -> ZenithFeedback:
        """Feedback of the pageserver that has received most."""
        return max((peer.feedback for peer in self.peers), key=lambda f: f.ps_writelsn)

    # ---- messages

    def _greeted(self, index: int, message: AcceptorGreeting) -> Sequence[Action]:
        peer = self.peers[index]
        peer.term = max(peer.term, message.term)
        if self.phase is not Phase.CAMPAIGN and message.term > self.term:
            return (Defeated(index, message.term),)
        if peer.state is not PeerState.GREETING:
            return ()  # told about Postgres' identity
        peer.state = PeerState.GREETED
        if self._must_yield(message.term):
            return (Defeated(index, message.term),)
        if self.phase is not Phase.CAMPAIGN:
            # No vote is needed any more, but the answer tells where its log stands.
            return (self._ask_for_vote(index),)
        if self.term == 0:
            greeted = sum(peer.state is PeerState.GREETED for peer in self.peers)
            return self.campaign() if greeted >= self.quorum else ()
        if message.term >= self.term:
            return (CampaignFailed(),)
        return (self._ask_for_vote(index),)

    def _vote_response(self, index: int, message: VoteResponse) -> Sequence[Action]:
        peer = self.peers[index]
        peer.term = max(peer.term, message.term)
        if message.term < self.term or peer.state is not PeerState.VOTING:
            return ()  # answers an earlier campaign
        if self.phase is not Phase.CAMPAIGN:
            if message.term > self.term:
                return (Defeated(index, message.term),)
            peer.vote = message
            peer.state = PeerState.VOTED
            if self.bootstrap and self.phase is Phase.ELECTED:
                return ()  # where WAL begins is not known yet
            return self._announce(index)
        if self._must_yield(message.term):
            return (Defeated(index, message.term),)
        if not message.vote_given:
            return (CampaignFailed(),)
        peer.vote = message
        peer.state = PeerState.VOTED
        votes = {i: p.vote for i, p in enumerate(self.peers) if p.vote is not None}
        return self._win(votes) if len(votes) >= self.quorum else ()

    def _append_response(self, index: int, message: AppendResponse) -> Sequence[Action]:
        taken = self.acknowledge(
            self.peers[index],
            message.term,
            message.flush_lsn,
            message.commit_lsn,
            message.feedback,
        )
        return () if taken else (Defeated(index, message.term),)

    # ---- election

    def _win(self, votes: dict[int, VoteResponse]) -> Sequence[Action]:
        def rank(index: int) -> tuple[int, int]:
            vote = votes[index]
            return last_term(vote.term_history, vote.flush_lsn), vote.flush_lsn

        self.phase = Phase.ELECTED
        self.donor = max(votes, key=rank)
        best = votes[self.donor]
        self.truncate_lsn = max(vote.truncate_lsn for vote in votes.values())
        # A log without one complete record is as good as none: start again where it began.
        if best.flush_lsn == 0 or best.flush_lsn == best.term_history[0].lsn:
            self.bootstrap = True
            self.donor = None
            self.history = ()
            self._own_terms.add(self.term)
            return ()
        epoch = rank(self.donor)[0]
        if self._predecessors is not None and epoch not in self._own_terms:
            # Not a prefix of our Postgres' WAL. Nobody was told anything yet.
            return (Defeated(self.donor, epoch),)
        self._own_terms.add(self.term)
        self.history = best.term_history
        self._set_epoch_start(best.flush_lsn)
        actions: list[Action] = []
        for index in votes:
            if self.peers[index].state is PeerState.VOTED:
                actions += self._announce(index)
        return actions

    def _must_yield(self, term: int) -> bool:
        """Whether a term is above all that we and our predecessors, if any, asked for votes in."""
        return self._predecessors is not None and term > max(self.term, self._last_own_term)

    def _set_epoch_start(self, lsn: int) -> None:
        self.epoch_start_lsn = lsn
        self.history = (*self.history, TermLsn(self.term, lsn))
        # The first switch is where the timeline's WAL begins: nobody needs what is before.
        self.truncate_lsn = max(self.truncate_lsn, self.history[0].lsn)

    def _announce(self, index: int) -> Sequence[Action]:
        peer = self.peers[index]
        assert peer.vote is not None
        start = divergence_lsn(
            self.history, peer.vote.term_history, peer.vote.flush_lsn, self.truncate_lsn
        )
        peer.state = PeerState.STREAMING
        peer.next_lsn = start
        return Send(index, ProposerElected(self.term, start, self.history)), Announced(index)

    def _ask_for_vote(self, index: int) -> Send:
        self.peers[index].state = PeerState.VOTING
        return Send(index, VoteRequest(self.term, self.identity.proposer_id))

    def _greeting(self) -> ProposerGreeting:
        me = self.identity
        return ProposerGreeting(
            me.pg_version,
            me.proposer_id,
            me.system_id,
            me.timeline_id,
            me.tenant_id,
            _TLI,
            WAL_SEGMENT_SIZE,
        )


def divergence_lsn(
    ours: TermHistory, theirs: TermHistory, their_flush_lsn: int, no_common: int
) -> int:
    """Where an acceptor's log stops being a prefix of ours; `no_common` if it never was one.

    In the last term that both histories know the logs agree as far as both go in that term.
    """
    ends = dict(_term_ends(ours, None))
    for term, end in reversed(list(_term_ends(theirs, their_flush_lsn))):
        if term in ends:
            our_end = ends[term]
            assert end is not None
            return end if our_end is None else min(end, our_end)
    return no_common


def _term_ends(history: TermHistory, end_lsn: int | None) -> Iterable[tuple[int, int | None]]:
    """(term, where it ends): the next switch, or `end_lsn` for the last one."""
    for entry, following in zip(history, [*history[1:], None], strict=False):
        yield entry.term, end_lsn if following is None else following.lsn


def _with_page_header(lsn: int) -> int:
    """`lsn`, or the page boundary before it if only the page's header lies between."""
    page_lsn = lsn - lsn % WAL_BLCKSZ
    return page_lsn if lsn == normalize_lsn(page_lsn) else lsn
