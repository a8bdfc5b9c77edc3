"""The acceptor: a safekeeper's part in consensus, as a pure state machine.

No sockets, files or clocks: messages go in, actions come out, and whoever drives it carries the
actions out **in order**, the next one only when the one before is durable. If an action fails the
acceptor is ahead of the disk and must be thrown away and made anew from what is on disk.

Safety rests on these orders:
- a term is durable before any answer that mentions it, so no term is voted in twice;
- WAL is truncated before the history that disowns it is replaced: a crash in between leaves a
  shorter log of the old history, never foreign bytes under the new one;
- WAL is durable before the flush LSN that covers it is answered;
- whatever is resumed from after a crash is made durable again before it is relied upon;
- an acceptor that has lost a part of that gives no votes, durably, until a leader who knows that
  nobody relies on a forgotten vote has brought it up to date;
- the generation of a leader is durable before its WAL is acknowledged, so that leaders of earlier
  generations get no votes any more;
- the first commit LSN, from which the end of WAL is searched after a restart, is durable before
  the first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.append_state import AppendState
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.safekeeper_messages import (
    NO_FEEDBACK,
    NO_HOT_STANDBY_FEEDBACK,
    PROTOCOL_VERSION,
    AcceptorGreeting,
    AcceptorMessage,
    AppendRequest,
    AppendResponse,
    HotStandbyFeedback,
    ProposerElected,
    ProposerGreeting,
    TermHistory,
    VoteRequest,
    VoteResponse,
    history_up_to,
    last_term,
)
from zenith_utils.zenith_feedback import ZenithFeedback


class ConsensusError(Exception):
    """A message that ends the session; the acceptor's state is unchanged."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The Postgres whose WAL this is; zeros until a proposer has told."""

    pg_version: int = 0
    system_id: int = 0
    wal_seg_size: int = 0


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What was last known of another safekeeper."""

    s3_wal_lsn: int
    term: int
    flush_lsn: int
    commit_lsn: int


@dataclass(frozen=True, slots=True)
class ControlState:
    """What an acceptor must remember across crashes: the content of the control file."""

    tenant_id: TenantId
    timeline_id: TimelineId
    term: int = 0
    term_history: TermHistory = ()
    server: ServerInfo = ServerInfo()
    proposer_uuid: bytes = bytes(16)
    commit_lsn: int = 0
    s3_wal_lsn: int = 0
    peer_horizon_lsn: int = 0
    remote_consistent_lsn: int = 0
    peers: tuple[tuple[int, PeerInfo], ...] = ()
    generation: int = 0
    """The highest generation of safekeepers whose leader was followed."""
    established: int = 0
    """The highest generation known to be established: no earlier one matters any more."""
    recovering: bool = False
    """Something promised or acknowledged earlier may be forgotten: no votes are given."""


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the state durable before the next action."""

    state: ControlState


@dataclass(frozen=True, slots=True)
class TruncateWal:
    """Durably drop all WAL at and behind `lsn`; the next write begins there."""

    lsn: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Send the message to the proposer of this session."""

    message: AcceptorMessage


Action = Persist | TruncateWal | Reply


class Session:
    """One proposer's connection, as far as the rules care."""

    __slots__ = ("announced", "greeted")

    def __init__(self) -> None:
        self.greeted = False
        self.announced = False


class Acceptor:
    """State of one timeline on one safekeeper. Calls are serialised by the caller."""

    def __init__(self, state: ControlState, flush_lsn: int, instance: bytes = bytes(16)) -> None:
        """Resume from the durable state and the end of the last complete durable WAL record.

        `instance` is that of the safekeeper's data directory.
        """
        self.instance = instance
        self.needed_lsn = 0
        """Pageservers have durably what is below; the driver keeps it up to date."""
        self.log = AppendState(
            flush_lsn,
            term=state.term,
            commit_lsn=state.commit_lsn,
            horizon_lsn=state.peer_horizon_lsn,
        )
        """Where the log stands; what goes in here without us counts like append() and flushed()."""
        self._state = state

    @property
    def state(self) -> ControlState:
        """What is persisted, or will be by the actions returned."""
        return self._state

    @state.setter
    def state(self, state: ControlState) -> None:
        self._state = state
        self.log.saved(state.term, state.commit_lsn, state.peer_horizon_lsn)

    @property
    def flush_lsn(self) -> int:
        """End of the last complete durable record."""
        return self.log.flush_lsn

    @property
    def commit_lsn(self) -> int:
        """Live commit LSN: never above flush_lsn, never going back."""
        return self.log.commit_lsn

    @property
    def next_lsn(self) -> int:
        """Where the next written byte goes; behind flush_lsn lies what is not durable yet."""
        return self.log.next_lsn

    @property
    def epoch(self) -> int:
        """Term in which the end of the local log was written."""
        return last_term(self.state.term_history, self.flush_lsn)

    def greet(self, session: Session, message: ProposerGreeting) -> Sequence[Action]:
        """Check whom we talk to and learn about its Postgres. May be repeated in a session."""
        state = self.state
        if message.protocol_version != PROTOCOL_VERSION:
            raise ConsensusError(
                f"incompatible protocol version {message.protocol_version}, "
                f"expected {PROTOCOL_VERSION}"
            )
        if message.tenant_id != state.tenant_id:
            raise ConsensusError(
                f"invalid tenant ID, got {message.tenant_id}, expected {state.tenant_id}"
            )
        if message.timeline_id != state.timeline_id:
            raise ConsensusError(
                f"invalid timeline ID, got {message.timeline_id}, expected {state.timeline_id}"
            )
        if message.wal_seg_size != WAL_SEGMENT_SIZE:
            raise ConsensusError(
                f"unsupported WAL segment size {message.wal_seg_size}, expected {WAL_SEGMENT_SIZE}"
            )
        check_instance(message, self.instance)
        known = state.server
        if message.system_id and known.system_id and message.system_id != known.system_id:
            raise ConsensusError(
                f"system identifier {message.system_id} does not match {known.system_id} "
                f"of timeline {state.timeline_id}: this is another cluster's WAL"
            )
        server = ServerInfo(
            message.pg_version or known.pg_version,
            message.system_id or known.system_id,
            message.wal_seg_size,
        )
        session.greeted = True
        reply = Reply(AcceptorGreeting(state.term, self.instance, state.recovering))
        learned = replace(
            state,
            server=server,
            proposer_uuid=message.proposer_id,
            established=max(state.established, message.established),
        )
        if learned == state:
            return (reply,)
        self.state = learned
        return Persist(self.state), reply

    def vote(self, session: Session, message: VoteRequest) -> Sequence[Action]:
        """Vote at most once per term; always tell where the local log stands.

        A recovering acceptor takes the term but gives no vote; a proposer of an earlier generation
        than that of a leader who was followed here gets neither.
        """
        _require_greeting(session)
        actions: list[Action] = []
        outdated = message.generation < self.state.generation
        newer = self.state.term < message.term and not outdated
        if newer:
            self.state = replace(self.state, term=message.term)
            actions.append(Persist(self.state))
        state = self.state
        response = VoteResponse(
            state.term,
            newer and not state.recovering,
            self.flush_lsn,
            min(state.peer_horizon_lsn, self.needed_lsn),
            history_up_to(state.term_history, self.flush_lsn),
            state.generation,
            state.established,
            state.recovering,
        )
        actions.append(Reply(response))
        return actions

    def elected(self, session: Session, message: ProposerElected) -> Sequence[Action]:
        """Follow the leader of a term at least as high as ours: cut our log, take its history."""
        _require_greeting(session)
        session.announced = True
        if message.term < self.state.term:
            return ()
        if message.generation < self.state.generation:
            raise ConsensusError(
                f"a leader of generation {message.generation} of the safekeepers is outdated, "
                f"generation {self.state.generation} exists"
            )
        if self.state.recovering and not message.recovered_lsn:
            raise ConsensusError("the leader does not know that this safekeeper is recovering")
        start = message.start_streaming_at
        history = self.state.term_history
        if history and history[-1].term == message.term and start < self.flush_lsn:
            # We follow this leader already: its log and ours agree, and what we have was
            # acknowledged. It can only be the late message of a connection since replaced.
            raise ConsensusError(
                f"refusing to truncate WAL of term {message.term} to {lsn_text(start)} below "
                f"flush LSN {lsn_text(self.flush_lsn)}"
            )
        if start < self.commit_lsn:
            raise ConsensusError(
                f"refusing to truncate WAL to {lsn_text(start)} "
                f"below commit LSN {lsn_text(self.commit_lsn)}"
            )
        # One that is recovering may lack so much that nobody has, or needs, all of it any more.
        gap = self.flush_lsn != 0 and start > self.next_lsn
        if gap and not self.state.recovering:
            raise ConsensusError(
                f"cannot stream from {lsn_text(start)}: local WAL ends at {lsn_text(self.next_lsn)}"
            )
        if not message.term_history or message.term_history[-1].term != message.term:
            raise ConsensusError(f"term history of the leader lacks its own term {message.term}")
        actions: list[Action] = []
        if message.term > self.state.term:
            # Lift the term before cutting: no answer of an older leader may count from here on.
            self.state = replace(self.state, term=message.term)
            actions.append(Persist(self.state))
        if gap:
            # As of a log that begins at `start`: it is the first WAL that is found after a crash.
            self.state = replace(self.state, commit_lsn=0)
            actions.append(Persist(self.state))
        actions.append(TruncateWal(start))
        followed = replace(
            self.state, term_history=message.term_history, generation=message.generation
        )
        if followed != self.state:
            self.state = followed
            actions.append(Persist(self.state))
        self.log.begin_stream(session, start, message.recovered_lsn if followed.recovering else 0)
        return actions

    def append(self, session: Session, request: AppendRequest) -> Reply | None:
        """Accept a piece of WAL, or a heartbeat.

        None means accepted: write its bytes at begin_lsn, later flush and call flushed(). A Reply
        is a refusal by a higher term: send it and write nothing. ConsensusError ends the session.
        """
        if self.log.append(session, *request[:6]):
            return None
        if not session.announced:
            raise ConsensusError("got AppendRequest before ProposerElected")
        term = self.state.term
        if request.term < term:
            return Reply(AppendResponse(term))
        if request.term > term:
            raise ConsensusError(
                f"got AppendRequest of term {request.term} without an election, own term is {term}"
            )
        if not self.log.is_streaming(session):
            raise ConsensusError("another connection streams WAL to this timeline now")
        raise self._misplaced(request.begin_lsn)

    def flushed(
        self,
        flush_lsn: int,
        hs_feedback: HotStandbyFeedback = NO_HOT_STANDBY_FEEDBACK,
        feedback: ZenithFeedback = NO_FEEDBACK,
    ) -> Sequence[Action]:
        """Answer the requests accepted so far, their WAL being durable up to `flush_lsn`.

        `flush_lsn` ends a complete record, or is where WAL begins while there is none.
        """
        actions = self.save_progress() if self.log.flushed(flush_lsn) else ()
        state = self.state
        return *actions, Reply(
            AppendResponse(state.term, self.flush_lsn, state.commit_lsn, hs_feedback, feedback)
        )

    def progress(self) -> Sequence[Action]:
        """Persist the live commit LSN and horizon, which otherwise lag; for quiet moments."""
        state = self.state
        if not state.commit_lsn or (self.commit_lsn, self.log.peer_horizon_lsn) == (
            state.commit_lsn,
            state.peer_horizon_lsn,
        ):
            return ()
        return self.save_progress()

    def save_progress(self) -> Sequence[Persist]:
        """Persist the live commit LSN and horizon, and that the log has recovered."""
        self.state = replace(
            self.state,
            commit_lsn=self.log.progress(),
            peer_horizon_lsn=self.log.peer_horizon_lsn,
            recovering=self.state.recovering and not self.log.has_recovered,
        )
        return (Persist(self.state),)

    def _misplaced(self, begin_lsn: int) -> ConsensusError:
        what = (
            "write_wal rewrites WAL written before"
            if begin_lsn < self.next_lsn
            else "write_wal creates gap in written WAL"
        )
        return ConsensusError(
            f"{what}: begins at {lsn_text(begin_lsn)}, WAL ends at {lsn_text(self.next_lsn)}"
        )


def check_instance(message: ProposerGreeting, instance: bytes) -> None:
    """Refuse a proposer that knows this safekeeper with another disk; raises ConsensusError."""
    if any(message.instance) and message.instance != instance:
        raise ConsensusError(
            "this safekeeper's disk is not the one the configuration knows: it was replaced or "
            f"wiped; replace it by a new safekeeper (expected instance {message.instance.hex()}, "
            f"this is {instance.hex()})"
        )


def _require_greeting(session: Session) -> None:
    if not session.greeted:
        raise ConsensusError("first message of a session must be ProposerGreeting")
