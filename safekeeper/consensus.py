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
- the first commit LSN, from which the end of WAL is searched after a restart, is durable before
  the first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

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

WAL_SEGMENT_SIZE: Final = 16 << 20
"""The only segment size accepted."""


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

    def __init__(self, state: ControlState, flush_lsn: int) -> None:
        """Resume from the durable state and the end of the last complete durable WAL record."""
        self.state = state
        self.flush_lsn = flush_lsn
        self.commit_lsn = min(state.commit_lsn, flush_lsn)
        """Live commit LSN: never above flush_lsn, never going back."""
        self.peer_horizon_lsn = state.peer_horizon_lsn
        self._next_lsn = flush_lsn
        self._streaming: Session | None = None
        self._requested_commit = 0
        self._epoch_start_lsn = 0
        self._first_lsn = 0

    @property
    def epoch(self) -> int:
        """Term in which the end of the local log was written."""
        return last_term(self.state.term_history, self.flush_lsn)

    @property
    def next_lsn(self) -> int:
        """Where the next written byte goes; behind flush_lsn lies what is not durable yet."""
        return self._next_lsn

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
        reply = Reply(AcceptorGreeting(state.term))
        if server == known and message.proposer_id == state.proposer_uuid:
            return (reply,)
        self.state = replace(state, server=server, proposer_uuid=message.proposer_id)
        return Persist(self.state), reply

    def vote(self, session: Session, message: VoteRequest) -> Sequence[Action]:
        """Vote at most once per term; always tell where the local log stands."""
        _require_greeting(session)
        actions: list[Action] = []
        given = self.state.term < message.term
        if given:
            self.state = replace(self.state, term=message.term)
            self._streaming = None
            actions.append(Persist(self.state))
        state = self.state
        history = history_up_to(state.term_history, self.flush_lsn)
        response = VoteResponse(state.term, given, self.flush_lsn, state.peer_horizon_lsn, history)
        actions.append(Reply(response))
        return actions

    def elected(self, session: Session, message: ProposerElected) -> Sequence[Action]:
        """Follow the leader of a term at least as high as ours: cut our log, take its history."""
        _require_greeting(session)
        session.announced = True
        if message.term < self.state.term:
            return ()
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
        if self.flush_lsn and start > self._next_lsn:
            raise ConsensusError(
                f"cannot stream from {lsn_text(start)}: local WAL ends at "
                f"{lsn_text(self._next_lsn)}"
            )
        if not message.term_history or message.term_history[-1].term != message.term:
            raise ConsensusError(f"term history of the leader lacks its own term {message.term}")
        actions: list[Action] = []
        if message.term > self.state.term:
            # Lift the term before cutting: no answer of an older leader may count from here on.
            self.state = replace(self.state, term=message.term)
            actions.append(Persist(self.state))
        actions.append(TruncateWal(start))
        if message.term_history != self.state.term_history:
            self.state = replace(self.state, term_history=message.term_history)
            actions.append(Persist(self.state))
        self.flush_lsn = min(self.flush_lsn, start)
        self._next_lsn = start
        self._first_lsn = 0
        self._streaming = session
        self._requested_commit = 0
        return actions

    def append(self, session: Session, request: AppendRequest) -> Reply | None:
        """Accept a piece of WAL, or a heartbeat.

        None means accepted: write its bytes at begin_lsn, later flush and call flushed(). A Reply
        is a refusal by a higher term: send it and write nothing. ConsensusError ends the session.
        """
        if not session.announced:
            raise ConsensusError("got AppendRequest before ProposerElected")
        term = self.state.term
        if request.term < term:
            return Reply(AppendResponse(term))
        if request.term > term:
            raise ConsensusError(
                f"got AppendRequest of term {request.term} without an election, own term is {term}"
            )
        if session is not self._streaming:
            raise ConsensusError("another connection streams WAL to this timeline now")
        if request.begin_lsn != request.end_lsn:
            if request.begin_lsn != self._next_lsn:
                raise self._misplaced(request.begin_lsn)
            self._next_lsn = request.end_lsn
            if not self.state.commit_lsn and not self._first_lsn:
                self._first_lsn = request.begin_lsn
        if request.commit_lsn:
            self._requested_commit = request.commit_lsn
        self._epoch_start_lsn = request.epoch_start_lsn
        if request.truncate_lsn > self.peer_horizon_lsn:
            self.peer_horizon_lsn = request.truncate_lsn
        return None

    def flushed(
        self,
        flush_lsn: int,
        hs_feedback: HotStandbyFeedback = NO_HOT_STANDBY_FEEDBACK,
        feedback: ZenithFeedback = NO_FEEDBACK,
    ) -> Sequence[Action]:
        """Answer the requests accepted so far, their WAL being durable up to `flush_lsn`.

        `flush_lsn` ends a complete record, or is where WAL begins while there is none.
        """
        self.flush_lsn = flush_lsn
        commit = min(self._requested_commit, flush_lsn)
        if commit > self.commit_lsn:
            self.commit_lsn = commit
        if not self._must_persist():
            return (self._append_reply(hs_feedback, feedback),)
        self._save_progress()
        return Persist(self.state), self._append_reply(hs_feedback, feedback)

    def progress(self) -> Sequence[Action]:
        """Persist the live commit LSN and horizon, which otherwise lag; for quiet moments."""
        state = self.state
        if not state.commit_lsn or (self.commit_lsn, self.peer_horizon_lsn) == (
            state.commit_lsn,
            state.peer_horizon_lsn,
        ):
            return ()
        self._save_progress()
        return (Persist(self.state),)

    def _append_reply(self, hs: HotStandbyFeedback, feedback: ZenithFeedback) -> Reply:
        state = self.state
        return Reply(AppendResponse(state.term, self.flush_lsn, state.commit_lsn, hs, feedback))

    def _must_persist(self) -> bool:
        saved = self.state.commit_lsn
        if not saved:
            return self._first_lsn != 0
        commit = self.commit_lsn
        return (
            saved < self._epoch_start_lsn <= commit
            or commit - saved > WAL_SEGMENT_SIZE
            or self.peer_horizon_lsn - self.state.peer_horizon_lsn > WAL_SEGMENT_SIZE
        )

    def _save_progress(self) -> None:
        # The hole before the first WAL cannot be scanned after a restart: start behind it.
        self.commit_lsn = max(self.commit_lsn, self._first_lsn)
        self._first_lsn = 0
        self.state = replace(
            self.state, commit_lsn=self.commit_lsn, peer_horizon_lsn=self.peer_horizon_lsn
        )

    def _misplaced(self, begin_lsn: int) -> ConsensusError:
        what = (
            "write_wal rewrites WAL written before"
            if begin_lsn < self._next_lsn
            else "write_wal creates gap in written WAL"
        )
        return ConsensusError(
            f"{what}: begins at {lsn_text(begin_lsn)}, WAL ends at {lsn_text(self._next_lsn)}"
        )


def _require_greeting(session: Session) -> None:
    if not session.greeted:
        raise ConsensusError("first message of a session must be ProposerGreeting")
