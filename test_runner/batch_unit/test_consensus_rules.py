"""The rules of the acceptor and of the proposer, one by one."""

from __future__ import annotations

import pytest

from compute_tools.walproposer.core import (
    Defeated,
    Identity,
    Phase,
    Proposer,
    ProposerError,
    Send,
)
from compute_tools.walproposer.divergence import divergence_lsn
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.consensus import (
    Acceptor,
    ConsensusError,
    ControlState,
    Persist,
    Reply,
    ServerInfo,
    Session,
    TruncateWal,
)
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    VoteResponse,
)

TENANT, TIMELINE = TenantId(b"t" * 16), TimelineId(b"l" * 16)
HISTORY = (TermLsn(1, 1000), TermLsn(3, 2000))


def greeting(system_id: int = 0, tenant: TenantId = TENANT) -> ProposerGreeting:
    return ProposerGreeting(0, b"p" * 16, system_id, TIMELINE, tenant, 1, WAL_SEGMENT_SIZE)


def make_acceptor(flush: int = 3000, commit: int = 2500) -> tuple[Acceptor, Session]:
    server = ServerInfo(150000, 77, WAL_SEGMENT_SIZE)
    state = ControlState(
        TENANT, TIMELINE, 3, HISTORY, server, b"p" * 16, commit, peer_horizon_lsn=1000
    )
    acceptor, session = Acceptor(state, flush), Session()
    acceptor.greet(session, greeting(77))
    return acceptor, session


def append(term: int, begin: int, end: int, commit: int = 0, truncate: int = 0) -> AppendRequest:
    return AppendRequest(term, 2000, begin, end, commit, truncate, b"p" * 16)


def test_greeting_checks_whom_it_serves() -> None:
    acceptor, _ = make_acceptor()
    session = Session()
    with pytest.raises(ConsensusError, match="invalid tenant ID"):
        acceptor.greet(session, greeting(77, TenantId(b"x" * 16)))
    with pytest.raises(ConsensusError, match="system identifier 78 does not match 77"):
        acceptor.greet(session, greeting(78))
    with pytest.raises(ConsensusError, match="must be ProposerGreeting"):
        acceptor.vote(session, VoteRequest(9))
    assert acceptor.greet(session, greeting(0))[-1] == Reply(AcceptorGreeting(3))
    assert acceptor.state.server.system_id == 77


def test_one_vote_per_term_persisted_before_it_is_given() -> None:
    acceptor, session = make_acceptor(flush=1500, commit=1200)
    persist, reply = acceptor.vote(session, VoteRequest(4))
    assert isinstance(persist, Persist)
    assert persist.state.term == 4
    assert reply == Reply(VoteResponse(4, True, 1500, 1000, HISTORY[:1]))
    (refusal,) = acceptor.vote(session, VoteRequest(4))
    assert isinstance(refusal, Reply)
    assert isinstance(refusal.message, VoteResponse)
    assert not refusal.message.vote_given


def test_elected_truncates_before_it_takes_the_history() -> None:
    acceptor, session = make_acceptor()
    history = (*HISTORY, TermLsn(5, 2800))
    actions = list(acceptor.elected(session, ProposerElected(5, 2800, history)))
    assert [type(action) for action in actions] == [Persist, TruncateWal, Persist]
    assert actions[1] == TruncateWal(2800)
    assert isinstance(actions[0], Persist)
    assert actions[0].state.term_history == HISTORY
    assert acceptor.flush_lsn == acceptor.next_lsn == 2800


def test_elected_never_cuts_committed_or_acknowledged_wal() -> None:
    acceptor, session = make_acceptor()
    with pytest.raises(ConsensusError, match="below commit LSN"):
        acceptor.elected(session, ProposerElected(5, 2400, (*HISTORY, TermLsn(5, 2400))))
    with pytest.raises(ConsensusError, match="local WAL ends at"):
        acceptor.elected(session, ProposerElected(5, 3008, (*HISTORY, TermLsn(5, 3008))))
    # A late message of an earlier connection of the leader that we follow already.
    with pytest.raises(ConsensusError, match="WAL of term 3"):
        acceptor.elected(session, ProposerElected(3, 2900, HISTORY))
    assert acceptor.elected(session, ProposerElected(2, 1000, HISTORY[:1])) == ()
    assert acceptor.flush_lsn == 3000


def test_append_order() -> None:
    acceptor, session = make_acceptor()
    with pytest.raises(ConsensusError, match="before ProposerElected"):
        acceptor.append(session, append(3, 3000, 3100))
    acceptor.elected(session, ProposerElected(3, 3000, HISTORY))
    assert acceptor.append(session, append(2, 3000, 3100)) == Reply(AppendResponse(3))
    assert acceptor.append(session, append(3, 3000, 3100)) is None
    with pytest.raises(ConsensusError, match="rewrites WAL written before"):
        acceptor.append(session, append(3, 3000, 3100))
    with pytest.raises(ConsensusError, match="creates gap in written WAL"):
        acceptor.append(session, append(3, 3200, 3300))
    with pytest.raises(ConsensusError, match="without an election"):
        acceptor.append(session, append(4, 3100, 3200))
    other = Session()
    acceptor.greet(other, greeting())
    acceptor.elected(other, ProposerElected(3, 3000, HISTORY))
    with pytest.raises(ConsensusError, match="another connection"):
        acceptor.append(session, append(3, 3100, 3200))


def test_commit_is_capped_and_persisted_rarely() -> None:
    acceptor, session = make_acceptor()
    acceptor.elected(session, ProposerElected(3, 3000, HISTORY))
    acceptor.append(session, append(3, 3000, 3104, commit=9000))
    (reply,) = acceptor.flushed(3104)
    assert reply == Reply(AppendResponse(3, 3104, 2500))
    assert acceptor.commit_lsn == 3104
    (persist,) = acceptor.progress()
    assert isinstance(persist, Persist)
    assert persist.state.commit_lsn == 3104
    assert acceptor.progress() == ()
    far = 3104 + WAL_SEGMENT_SIZE + 8
    acceptor.append(session, append(3, 3104, far, commit=far))
    persist, reply = acceptor.flushed(far)
    assert isinstance(persist, Persist)
    assert persist.state.commit_lsn == far


def test_first_wal_of_a_timeline() -> None:
    acceptor, session = Acceptor(ControlState(TENANT, TIMELINE), 0), Session()
    acceptor.greet(session, greeting())
    acceptor.elected(session, ProposerElected(1, 5000, (TermLsn(1, 5000),)))
    assert acceptor.append(session, append(1, 5000, 5000)) is None
    assert acceptor.flushed(0) == (Reply(AppendResponse(1)),)
    acceptor.append(session, append(1, 5000, 5100, truncate=5000))
    persist, reply = acceptor.flushed(5000)
    assert isinstance(persist, Persist)
    assert (persist.state.commit_lsn, persist.state.peer_horizon_lsn) == (5000, 5000)
    assert reply == Reply(AppendResponse(1, 5000, 5000))


@pytest.mark.parametrize(
    ("theirs", "flush", "expected"),
    [
        ((), 0, 77),
        (((1, 100),), 150, 150),
        (((1, 100),), 350, 200),
        (((1, 100), (2, 200)), 250, 250),
        (((1, 100), (2, 200)), 450, 300),
        (((1, 100), (3, 180)), 190, 180),
        (((1, 100), (2, 200), (5, 300)), 444, 444),
        (((4, 100),), 200, 77),
    ],
)
def test_divergence(theirs: tuple[tuple[int, int], ...], flush: int, expected: int) -> None:
    ours = (TermLsn(1, 100), TermLsn(2, 200), TermLsn(5, 300))
    history = tuple(TermLsn(*entry) for entry in theirs)
    assert divergence_lsn(ours, history, flush, 77) == expected


def elect(*votes: VoteResponse) -> Proposer:
    """A proposer of three acceptors, of which these voted."""
    core = Proposer(Identity(TENANT, TIMELINE, bytes(16)), 3)
    for index in range(len(votes)):
        core.connected(index)
        core.receive(index, AcceptorGreeting(votes[index].term - 1))
    for index, vote in enumerate(votes):
        core.receive(index, vote)
    for index, vote in enumerate(votes):
        core.receive(index, AcceptorGreeting(vote.term))
    return core


def test_donor_is_the_one_with_the_newest_epoch() -> None:
    longer = VoteResponse(9, True, 5000, 1000, (TermLsn(1, 1000),))
    newer = VoteResponse(9, True, 3000, 1000, (TermLsn(1, 1000), TermLsn(2, 2000)))
    core = elect(longer, newer)
    assert core.phase is Phase.ELECTED
    assert (core.term, core.donor, core.epoch_start_lsn) == (9, 1, 3000)
    assert core.history[-1] == TermLsn(9, 3000)
    assert core.peers[0].next_lsn == 2000
    assert core.sources(0) == [1]
    # Nothing is committed before a quorum reaches the start of the new epoch.
    core.receive(1, AppendResponse(9, 3000, 3000))
    core.receive(0, AppendResponse(9, 2992, 0))
    assert core.commit_lsn == 0
    core.receive(0, AppendResponse(9, 3000, 0))
    assert core.commit_lsn == 3000
    assert not core.synced
    core.receive(0, AppendResponse(9, 3000, 3000))
    assert core.synced
    with pytest.raises(ProposerError, match="but the safekeepers' WAL ends at"):
        core.start(3008)
    core.start(3000)
    # A late joiner is asked where it stands, and defeats us only with a higher term.
    core.connected(2)
    (question,) = core.receive(2, AcceptorGreeting(9))
    assert isinstance(question, Send)
    assert isinstance(question.message, VoteRequest)
    core.disconnected(2)
    core.connected(2)
    assert core.receive(2, AcceptorGreeting(10)) == (Defeated(2, 10),)


def test_bootstrap_begins_with_the_page_header() -> None:
    empty = VoteResponse(1, True, 0, 0, ())
    for start, expected in ((0x2000 * 9 + 24, 0x2000 * 9), (0x2000 * 9 + 32, 0x2000 * 9 + 32)):
        core = elect(empty, empty)
        assert core.bootstrap
        assert core.synced
        core.start(start)
        assert core.epoch_start_lsn == core.truncate_lsn == expected
