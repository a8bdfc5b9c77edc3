"""The proposer's part in consensus, as a pure state machine.

No sockets, files or clocks: events of numbered safekeepers go in, actions come out. WAL itself does
not pass through here; the driver asks each peer's `next_lsn` and reports what it has sent. What is
acknowledged and committed, the part that runs for every commit, is native: _quorum.pyx.

The phases: CAMPAIGN until a quorum has voted, and then confirmed it; ELECTED while a quorum is
brought to the donor's end of WAL, so that what any earlier leader may have committed is committed
under this term, too; LEADER from start() on, when Postgres adds WAL of its own.

A greeting may be sent again at any time. As a session is in order, its answer proves that what was
true of the acceptor before still is: it has not lost its memory since. Such greetings go out in
numbered **rounds**. One confirms votes before they count, one precedes the readmission of an
acceptor that has forgotten what it promised: whoever was elected with a forgotten vote is known
to a majority by then, and nobody will be elected with one.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from compute_tools.walproposer._quorum import PeerState, Quorum
from compute_tools.walproposer.divergence import divergence_lsn
from compute_tools.walproposer.membership import ANY_INSTANCE, Generation, Membership
from compute_tools.walproposer.standing import Standing
from postgres_ffi.wal_format import WAL_BLCKSZ, WAL_SEGMENT_SIZE, normalize_lsn
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    AcceptorMessage,
    AppendResponse,
    MessageError,
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
_NO_MEMBERSHIP: Final = Membership()


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


@dataclass(frozen=True, slots=True)
class Outdated:
    """A newer configuration of safekeepers exists: stop, and stop Postgres."""

    peer: int
    generation: int


Action = Send | Announced | CampaignFailed | Defeated | Outdated


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
        self,
        identity: Identity,
        peer_count: int,
        membership: Membership = _NO_MEMBERSHIP,
        predecessors: Predecessors | None = None,
    ) -> None:
        """Raises ValueError if `membership` does not fit `peer_count`."""
        super().__init__(peer_count, identity.proposer_id)
        membership.check(peer_count)
        self.membership = membership
        self.identity = identity
        self._predecessors = predecessors
        self._own_terms = set() if predecessors is None else set(predecessors.terms)
        self._last_own_term = 0 if predecessors is None else predecessors.last_term
        self.phase = Phase.CAMPAIGN
        self.bootstrap = False
        """No complete record was ever written to this timeline."""
        self.donor: int | None = None
        self.history: TermHistory = ()
        self._standings = [Standing() for _ in range(peer_count)]
        self._round = 0
        self._known_established = 0
        self._needed_lsn = 0
        self._told_established = False

    # ---- events

    def connected(self, index: int) -> Sequence[Action]:
        """A session to a safekeeper has opened."""
        self.peers[index].state = PeerState.GREETING
        self._standings[index].begin()
        return (self._greet(index),)

    def disconnected(self, index: int) -> None:
        """The session is over; what is durable there stays so."""
        self.peers[index].state = PeerState.OFFLINE
        self._standings[index].begin()

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
        self._known_established = self.known_established
        self.established = False
        self.joint = self._joint()
        self.term = 1 + max(self.term, self._last_own_term, *(peer.term for peer in self.peers))
        actions: list[Action] = []
        for index, peer in enumerate(self.peers):
            peer.vote = None
            peer.flush_lsn = peer.commit_lsn = 0
            self._standings[index].acknowledged = self._standings[index].readmission = 0
            if peer.state not in (PeerState.OFFLINE, PeerState.GREETING):
                actions.append(self._ask_for_vote(index))
        return actions

    def receive(self, index: int, message: AcceptorMessage) -> Sequence[Action]:
        """A message of a safekeeper has arrived. Raises MessageError: the session must end."""
        if isinstance(message, AppendResponse):
            return self._append_response(index, message)
        if isinstance(message, AcceptorGreeting):
            self._check_instance(index, message.instance)
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
                actions += self._join(index)
        return actions

    def identify(self, system_id: int, pg_version: int) -> Sequence[Action]:
        """Postgres has told who it is: greet again, so that safekeepers can check and keep it."""
        self.identity = replace(self.identity, system_id=system_id, pg_version=pg_version)
        return self._greet_again()

    def tell_established(self) -> Sequence[Action]:
        """Let safekeepers know, once, that the current generation is established.

        Then any one of them can tell the next proposer that earlier generations do not matter.
        """
        if not self.established or self._told_established or not self.membership.generation:
            return ()
        self._told_established = True
        return self._greet_again()

    # ---- what the driver asks

    @property
    def synced(self) -> bool:
        """Whether a quorum has persisted that everything below epoch_start_lsn is committed.

        A quorum of each generation that still mattered when this was elected.
        """
        if self.phase is Phase.CAMPAIGN:
            return False
        if self.bootstrap:
            return True
        return self._is_quorum(
            {
                index
                for index, peer in enumerate(self.peers)
                if peer.commit_lsn >= self.epoch_start_lsn
            }
        )

    @property
    def known_established(self) -> int:
        """The highest generation known to be established; the ones below do not matter."""
        return self.membership.generation if self.established else self._known_established

    def awaits_greeting(self, index: int) -> bool:
        """Whether a safekeeper has not answered a greeting yet."""
        return bool(self._standings[index].asked)

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
        """Feedback of the pageserver that has received most.

        A safekeeper that it has left repeats what it heard last: the newest report counts.
        """
        feedbacks = (peer.feedback for peer in self.peers)
        return max(feedbacks, key=lambda f: (f.ps_writelsn, f.ps_replytime))

    # ---- messages

    def _check_instance(self, index: int, instance: bytes) -> None:
        peer, standing = self.peers[index], self._standings[index]
        expected = self._instance(index)
        if expected not in (ANY_INSTANCE, instance):
            peer.flush_lsn = peer.commit_lsn = 0
            raise MessageError(
                f"the safekeeper's disk is not the one the configuration knows: it was replaced or "
                f"wiped; replace it by a new safekeeper (expected instance {expected.hex()}, "
                f"got {instance.hex()})"
            )
        standing.instance = instance

    def _greeted(self, index: int, message: AcceptorGreeting) -> Sequence[Action]:
        peer, standing = self.peers[index], self._standings[index]
        if not standing.asked:
            raise MessageError("a greeting that answers nothing")
        answered = standing.asked.popleft()
        if not message.recovering and message.term <= self.term:
            standing.answered = answered
        peer.term = max(peer.term, message.term)
        if self.phase is not Phase.CAMPAIGN:
            if message.term > self.term:
                return (Defeated(index, message.term),)
            if peer.state is not PeerState.GREETING:
                return self._readmit()
            # No vote is needed any more, but the answer tells where its log stands.
            return (self._ask_for_vote(index),)
        if self._must_yield(message.term):
            return (Defeated(index, message.term),)
        if peer.state is not PeerState.GREETING:
            return (CampaignFailed(),) if message.term > self.term else self._count_votes()
        peer.state = PeerState.GREETED
        if self.term == 0:
            greeted = sum(peer.state is PeerState.GREETED for peer in self.peers)
            return self.campaign() if greeted >= self.quorum else ()
        if message.term >= self.term:
            return (CampaignFailed(),)
        return (self._ask_for_vote(index),)

    def _vote_response(self, index: int, message: VoteResponse) -> Sequence[Action]:
        peer = self.peers[index]
        if message.generation > self.membership.generation:
            return (Outdated(index, message.generation),)
        self._known_established = max(self._known_established, message.established)
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
            return self._join(index)
        if self._must_yield(message.term):
            return (Defeated(index, message.term),)
        if not message.vote_given and (message.term > self.term or not message.recovering):
            return (CampaignFailed(),)
        peer.vote = message
        peer.state = PeerState.VOTED
        return self._voted(index) if message.vote_given else ()

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

    def _joint(self) -> tuple[Generation, ...]:
        """The earlier generations without which this cannot be elected."""
        known = self.known_established
        return tuple(one for one in self.membership.earlier if one.number >= known)

    def _is_quorum(self, indexes: Set[int]) -> bool:
        """Whether these are a majority of the current generation and of each that matters."""
        return len(indexes) >= self.quorum and (
            self.established or all(len(one.members & indexes) >= one.quorum for one in self.joint)
        )

    def could_win(self, indexes: Set[int]) -> bool:
        """Whether the votes of these are enough, as far as is known now."""
        needed = [(len(indexes), self.quorum)]
        needed += [(len(one.members & indexes), one.quorum) for one in self._joint()]
        return all(count >= quorum for count, quorum in needed)

    def _votes(self) -> dict[int, VoteResponse]:
        """The votes given in this campaign, in sessions that still last."""
        return {
            index: peer.vote
            for index, peer in enumerate(self.peers)
            if peer.state is PeerState.VOTED and peer.vote is not None and peer.vote.vote_given
        }

    def _voted(self, index: int) -> Sequence[Action]:
        """With a quorum of votes, ask whether they still hold, now that all are there."""
        self._standings[index].voted = self._round
        self.joint = self._joint()
        votes = self._votes()
        if not self._is_quorum(votes.keys()):
            return ()
        self._round += 1
        return [self._greet(voter) for voter in votes]

    def _count_votes(self) -> Sequence[Action]:
        """Win if a quorum has confirmed, in one round, votes that were all given before it."""
        votes = self._votes()
        for number in range(1, self._round + 1):
            confirmed = {
                index: vote
                for index, vote in votes.items()
                if self._standings[index].voted < number <= self._standings[index].answered
            }
            if self._is_quorum(confirmed.keys()):
                return self._win(confirmed)
        return ()

    def _win(self, votes: dict[int, VoteResponse]) -> Sequence[Action]:
        def rank(index: int) -> tuple[int, int]:
            vote = votes[index]
            return last_term(vote.term_history, vote.flush_lsn), vote.flush_lsn

        self.phase = Phase.ELECTED
        self.donor = max(votes, key=rank)
        best = votes[self.donor]
        self.truncate_lsn = max(vote.truncate_lsn for vote in votes.values())
        self._needed_lsn = self.truncate_lsn
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
        for index, peer in enumerate(self.peers):
            if peer.state is PeerState.VOTED:
                actions += self._join(index)
        return actions

    def _must_yield(self, term: int) -> bool:
        """Whether a term is above all that we and our predecessors, if any, asked for votes in."""
        return self._predecessors is not None and term > max(self.term, self._last_own_term)

    def _set_epoch_start(self, lsn: int) -> None:
        self.epoch_start_lsn = lsn
        self.history = (*self.history, TermLsn(self.term, lsn))
        # The first switch is where the timeline's WAL begins: nobody needs what is before.
        self.truncate_lsn = max(self.truncate_lsn, self.history[0].lsn)

    def _join(self, index: int) -> Sequence[Action]:
        """Announce ourselves to a peer, or first see whether one that forgets may be readmitted."""
        peer, standing = self.peers[index], self._standings[index]
        assert peer.vote is not None
        if not peer.vote.recovering:
            return self._announce(index)
        standing.acknowledged = max(standing.acknowledged, peer.flush_lsn)
        peer.flush_lsn = peer.commit_lsn = 0
        if self.donor == index:
            self.donor = None
        self._round += 1
        standing.readmission = self._round
        return [
            self._greet(other)
            for other, peer in enumerate(self.peers)
            if peer.state is PeerState.STREAMING
        ]

    def _readmit(self) -> Sequence[Action]:
        """Announce ourselves to peers that forget, once a quorum of others has confirmed us.

        All who answered follow us and remember everything, and did so after the loss of memory.
        """
        actions: list[Action] = []
        for index, standing in enumerate(self._standings):
            if standing.readmission:
                confirmed = {
                    other
                    for other, peer in enumerate(self.peers)
                    if peer.state is PeerState.STREAMING
                    and self._standings[other].answered >= standing.readmission
                }
                if self._is_quorum(confirmed):
                    standing.readmission = 0
                    recovered_lsn = max(self.epoch_start_lsn, standing.acknowledged)
                    actions += self._announce(index, recovered_lsn)
        return actions

    def _announce(self, index: int, recovered_lsn: int = 0) -> Sequence[Action]:
        peer = self.peers[index]
        assert peer.vote is not None
        join_lsn, log_end = self._join_lsn(), peer.vote.flush_lsn
        # A log that has nothing in common with ours (of another bootstrap) goes as a whole.
        no_common = self.history[0].lsn if log_end else join_lsn
        start = divergence_lsn(self.history, peer.vote.term_history, log_end, no_common)
        if recovered_lsn and start >= log_end:
            # WAL may be left out behind its log, but nothing foreign be left in.
            start = max(start, join_lsn)
        peer.state = PeerState.STREAMING
        peer.next_lsn = start
        elected = ProposerElected(
            self.term, start, self.history, self.membership.generation, recovered_lsn
        )
        # What it confirms to us from here on, it confirms as a follower.
        self._standings[index].answered = 0
        actions: list[Action] = [Send(index, elected), Announced(index)]
        if any(standing.readmission for standing in self._standings):
            actions.append(self._greet(index))
        return actions

    def _join_lsn(self) -> int:
        """Where the log of a newcomer begins: all have what is below, and so has the pageserver.

        So it is as good a place as the others for what the pageserver has still to get. More than
        that is committed: a newcomer always gets a record, and its log an end that can be counted.
        """
        delivered = min(self.truncate_lsn, self.feedback.ps_flushlsn)
        return max(self._needed_lsn, delivered, self.history[0].lsn)

    def _ask_for_vote(self, index: int) -> Send:
        self.peers[index].state = PeerState.VOTING
        request = VoteRequest(self.term, self.identity.proposer_id, self.membership.generation)
        return Send(index, request)

    def _instance(self, index: int) -> bytes:
        """The instance that a safekeeper must be: the pinned one, or the one seen before."""
        pinned = self.membership.instance(index)
        return self._standings[index].instance if pinned == ANY_INSTANCE else pinned

    def _greet_again(self) -> Sequence[Action]:
        dialogue = (PeerState.VOTING, PeerState.VOTED, PeerState.STREAMING)
        return [
            self._greet(index) for index, peer in enumerate(self.peers) if peer.state in dialogue
        ]

    def _greet(self, index: int) -> Send:
        self._standings[index].asked.append(self._round)
        me = self.identity
        greeting = ProposerGreeting(
            me.pg_version,
            me.proposer_id,
            me.system_id,
            me.timeline_id,
            me.tenant_id,
            _TLI,
            WAL_SEGMENT_SIZE,
            self._instance(index),
            self.known_established,
        )
        return Send(index, greeting)


def _with_page_header(lsn: int) -> int:
    """`lsn`, or the page boundary before it if only the page's header lies between."""
    page_lsn = lsn - lsn % WAL_BLCKSZ
    return page_lsn if lsn == normalize_lsn(page_lsn) else lsn
