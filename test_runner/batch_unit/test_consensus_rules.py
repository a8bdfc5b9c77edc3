"""The rules of the acceptor and of the proposer, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from batch_unit.consensus_nodes import Rules

from compute_tools.walproposer.divergence import divergence_lsn
from compute_tools.walproposer.membership import Generation, Membership
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.consensus import ServerInfo
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    MessageError,
    ProposerElected,
    ProposerGreeting,
    TermLsn,
    VoteRequest,
    VoteResponse,
)

TENANT, TIMELINE = TenantId(b"t" * 16), TimelineId(b"l" * 16)
INSTANCE = b"i" * 16
UNCHANGED = Membership()
HISTORY = (TermLsn(1, 1000), TermLsn(3, 2000))
VOTE = VoteResponse(2, True, 3000, 1000, (TermLsn(1, 1000),))


GREETING = ProposerGreeting(0, b"p" * 16, 0, TIMELINE, TENANT, 1, WAL_SEGMENT_SIZE)


@pytest.fixture(name="rules")
def real_rules() -> Rules:
    """What is tested here; test_consensus_mutations.py passes broken copies."""
    return Rules()


def greeting(system_id: int = 0) -> ProposerGreeting:
    return replace(GREETING, system_id=system_id)


def make_acceptor(
    rules: Rules, flush: int = 3000, commit: int = 2500, **fields: object
) -> tuple[Any, Any]:
    server = ServerInfo(150000, 77, WAL_SEGMENT_SIZE)
    state = rules.consensus.ControlState(
        TENANT, TIMELINE, 3, HISTORY, server, b"p" * 16, commit, peer_horizon_lsn=1000, **fields
    )
    acceptor = rules.consensus.Acceptor(state, flush, INSTANCE)
    session = rules.consensus.Session()
    acceptor.greet(session, greeting(77))
    return acceptor, session


def append(term: int, begin: int, end: int, commit: int = 0, truncate: int = 0) -> AppendRequest:
    return AppendRequest(term, 2000, begin, end, commit, truncate, b"p" * 16)


def test_greeting_checks_whom_it_serves(rules: Rules) -> None:
    c = rules.consensus
    acceptor, _ = make_acceptor(rules)
    session = c.Session()
    for foreign, message in (
        ({"tenant_id": TenantId(b"x" * 16)}, "invalid tenant ID"),
        ({"timeline_id": TimelineId(b"x" * 16)}, "invalid timeline ID"),
        ({"protocol_version": 1}, "incompatible protocol version 1, expected 2"),
        ({"wal_seg_size": 1 << 20}, "unsupported WAL segment size"),
        ({"instance": b"x" * 16}, "replaced or wiped; replace it by a new safekeeper"),
    ):
        with pytest.raises(c.ConsensusError, match=message):
            acceptor.greet(session, replace(GREETING, **foreign))
    acceptor.greet(c.Session(), replace(GREETING, instance=INSTANCE))
    with pytest.raises(c.ConsensusError, match="system identifier 78 does not match 77"):
        acceptor.greet(session, greeting(78))
    with pytest.raises(c.ConsensusError, match="must be ProposerGreeting"):
        acceptor.vote(session, VoteRequest(9))
    assert acceptor.greet(session, greeting(0))[-1] == c.Reply(AcceptorGreeting(3, INSTANCE))
    assert acceptor.state.server.system_id == 77


def test_one_vote_per_term_persisted_before_it_is_given(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules, flush=1500, commit=1200)
    acceptor.needed_lsn = 1400
    persist, reply = acceptor.vote(session, VoteRequest(4))
    assert isinstance(persist, c.Persist)
    assert persist.state.term == 4
    assert reply == c.Reply(VoteResponse(4, True, 1500, 1000, HISTORY[:1]))
    (refusal,) = acceptor.vote(session, VoteRequest(4))
    assert isinstance(refusal, c.Reply)
    assert isinstance(refusal.message, VoteResponse)
    assert not refusal.message.vote_given


def test_elected_truncates_before_it_takes_the_history(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules)
    history = (*HISTORY, TermLsn(5, 2800))
    actions = list(acceptor.elected(session, ProposerElected(5, 2800, history)))
    assert [type(action) for action in actions] == [c.Persist, c.TruncateWal, c.Persist]
    assert actions[1] == c.TruncateWal(2800)
    assert isinstance(actions[0], c.Persist)
    assert actions[0].state.term_history == HISTORY
    assert acceptor.flush_lsn == acceptor.next_lsn == 2800


def test_elected_never_cuts_committed_or_acknowledged_wal(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules)
    with pytest.raises(c.ConsensusError, match="below commit LSN"):
        acceptor.elected(session, ProposerElected(5, 2400, (*HISTORY, TermLsn(5, 2400))))
    with pytest.raises(c.ConsensusError, match="local WAL ends at"):
        acceptor.elected(session, ProposerElected(5, 3008, (*HISTORY, TermLsn(5, 3008))))
    with pytest.raises(c.ConsensusError, match="lacks its own term 5"):
        acceptor.elected(session, ProposerElected(5, 3000, HISTORY))
    # A late message of an earlier connection of the leader that we follow already.
    with pytest.raises(c.ConsensusError, match="WAL of term 3"):
        acceptor.elected(session, ProposerElected(3, 2900, HISTORY))
    assert acceptor.elected(session, ProposerElected(2, 1000, HISTORY[:1])) == ()
    assert acceptor.flush_lsn == 3000


def test_append_order(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules)
    with pytest.raises(c.ConsensusError, match="before ProposerElected"):
        acceptor.append(session, append(3, 3000, 3100))
    acceptor.elected(session, ProposerElected(3, 3000, HISTORY))
    assert acceptor.append(session, append(2, 3000, 3100)) == c.Reply(AppendResponse(3))
    assert acceptor.append(session, append(3, 3000, 3100)) is None
    with pytest.raises(c.ConsensusError, match="rewrites WAL written before"):
        acceptor.append(session, append(3, 3000, 3100))
    with pytest.raises(c.ConsensusError, match="creates gap in written WAL"):
        acceptor.append(session, append(3, 3200, 3300))
    with pytest.raises(c.ConsensusError, match="without an election"):
        acceptor.append(session, append(4, 3100, 3200))
    other = c.Session()
    acceptor.greet(other, greeting())
    acceptor.elected(other, ProposerElected(3, 3000, HISTORY))
    with pytest.raises(c.ConsensusError, match="another connection"):
        acceptor.append(session, append(3, 3100, 3200))
    # Whoever streams was elected in the term: a session does not go on into the next one.
    acceptor.vote(other, VoteRequest(4))
    with pytest.raises(c.ConsensusError, match="another connection"):
        acceptor.append(other, append(4, 3000, 3100))


def test_commit_is_capped_and_persisted_rarely(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules)
    acceptor.elected(session, ProposerElected(3, 3000, HISTORY))
    acceptor.append(session, append(3, 3000, 3104, commit=9000))
    (reply,) = acceptor.flushed(3104)
    assert reply == c.Reply(AppendResponse(3, 3104, 2500))
    assert acceptor.commit_lsn == 3104
    (persist,) = acceptor.progress()
    assert isinstance(persist, c.Persist)
    assert persist.state.commit_lsn == 3104
    assert acceptor.progress() == ()
    acceptor.append(session, append(3, 3104, 3104, commit=3000))
    acceptor.flushed(3104)
    assert acceptor.commit_lsn == 3104
    far = 3104 + WAL_SEGMENT_SIZE + 8
    acceptor.append(session, append(3, 3104, far, commit=far))
    persist, reply = acceptor.flushed(far)
    assert isinstance(persist, c.Persist)
    assert persist.state.commit_lsn == far


def test_first_wal_of_a_timeline(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = c.Acceptor(c.ControlState(TENANT, TIMELINE), 0), c.Session()
    acceptor.greet(session, greeting())
    acceptor.elected(session, ProposerElected(1, 5000, (TermLsn(1, 5000),)))
    assert acceptor.append(session, append(1, 5000, 5000)) is None
    assert acceptor.flushed(0) == (c.Reply(AppendResponse(1)),)
    acceptor.append(session, append(1, 5000, 5100, truncate=5000))
    persist, reply = acceptor.flushed(5000)
    assert isinstance(persist, c.Persist)
    assert (persist.state.commit_lsn, persist.state.peer_horizon_lsn) == (5000, 5000)
    assert reply == c.Reply(AppendResponse(1, 5000, 5000))


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


def elect(rules: Rules, *votes: VoteResponse, membership: Membership = UNCHANGED) -> Any:
    """A proposer of three acceptors, of which these voted."""
    core = rules.core.Proposer(rules.core.Identity(TENANT, TIMELINE, bytes(16)), 3, membership)
    for index in range(len(votes)):
        core.connected(index)
        core.receive(index, AcceptorGreeting(votes[index].term - 1))
    for index, vote in enumerate(votes):
        core.receive(index, vote)
    for index, vote in enumerate(votes):
        core.receive(index, AcceptorGreeting(vote.term))
    return core


def test_donor_is_the_one_with_the_newest_epoch(rules: Rules) -> None:
    longer = VoteResponse(9, True, 5000, 1000, (TermLsn(1, 1000),))
    newer = VoteResponse(9, True, 3000, 1000, (TermLsn(1, 1000), TermLsn(2, 2000)))
    core = elect(rules, longer, newer)
    assert core.phase is rules.core.Phase.ELECTED
    assert (core.term, core.donor, core.epoch_start_lsn) == (9, 1, 3000)
    assert core.history[-1] == TermLsn(9, 3000)
    assert core.peers[0].next_lsn == 2000
    assert core.sources(0) == [1]
    # Nothing is committed before a quorum reaches the start of the new epoch.
    core.receive(1, AppendResponse(9, 3000, 3000))
    core.receive(0, AppendResponse(9, 2992, 0))
    core.receive(0, AppendResponse(8, 5000, 5000))
    assert core.commit_lsn == 0
    core.receive(0, AppendResponse(9, 3000, 0))
    assert core.commit_lsn == 3000
    assert not core.synced
    core.receive(0, AppendResponse(9, 3000, 3000))
    assert core.synced
    with pytest.raises(rules.core.ProposerError, match="but the safekeepers' WAL ends at"):
        core.start(3008)
    core.start(3000)
    for index in (0, 1):
        core.receive(index, AppendResponse(9, 3104, 3000))
    assert (core.commit_lsn, core.truncate_lsn) == (3104, 1000)  # one has nothing
    assert core.receive(0, AppendResponse(10)) == (rules.core.Defeated(0, 10),)
    # A late joiner is asked where it stands, and defeats us only with a higher term.
    core.connected(2)
    (question,) = core.receive(2, AcceptorGreeting(9))
    assert isinstance(question, rules.core.Send)
    assert isinstance(question.message, VoteRequest)
    core.disconnected(2)
    core.connected(2)
    assert core.receive(2, AcceptorGreeting(10)) == (rules.core.Defeated(2, 10),)


def join(rules: Rules, flush: int, *history: tuple[int, int], recovering: bool) -> int:
    """Where the stream to an acceptor with some log begins; the horizon is 4000."""
    common = VoteResponse(9, True, 5000, 4000, (TermLsn(2, 1000),))
    core = elect(rules, common, common)
    core.connected(2)
    core.receive(2, AcceptorGreeting(9, recovering=recovering))
    entries = tuple(TermLsn(*entry) for entry in history)
    actions = core.receive(2, VoteResponse(9, False, flush, 0, entries, recovering=recovering))
    if recovering:
        hello(core, 0)
        actions = hello(core, 1)
    assert isinstance(actions[0].message, ProposerElected)
    return actions[0].message.start_streaming_at


def test_nothing_foreign_is_left_below_the_horizon(rules: Rules) -> None:
    for recovering in (False, True):
        assert join(rules, 0, recovering=recovering) == 4000
        assert join(rules, 4500, (1, 1000), recovering=recovering) == 1000
        assert join(rules, 4500, (2, 1000), (3, 3500), recovering=recovering) == 3500
        assert join(rules, 4500, (2, 1000), recovering=recovering) == 4500
    assert join(rules, 3500, (2, 1000), recovering=False) == 3500
    assert join(rules, 3500, (2, 1000), recovering=True) == 4000


def test_another_campaign_begins_with_nothing(rules: Rules) -> None:
    core = elect(rules, VOTE, VOTE)
    for index in (0, 1):
        core.receive(index, AppendResponse(2, 3000, 3000))
    assert core.synced
    core.campaign()
    assert (core.term, core.synced, core.established) == (3, False, False)
    assert [(peer.flush_lsn, peer.commit_lsn) for peer in core.peers] == [(0, 0)] * 3
    assert core.receive(0, replace(VOTE, term=2)) == ()
    refusal = replace(VOTE, term=3, vote_given=False)
    assert core.receive(0, refusal) == (rules.core.CampaignFailed(),)


def test_bootstrap_begins_with_the_page_header(rules: Rules) -> None:
    empty = VoteResponse(1, True, 0, 0, ())
    for start, expected in ((0x2000 * 9 + 24, 0x2000 * 9), (0x2000 * 9 + 32, 0x2000 * 9 + 32)):
        core = elect(rules, empty, empty)
        assert core.bootstrap
        assert core.synced
        core.start(start)
        assert core.epoch_start_lsn == core.truncate_lsn == expected


# ---- generations of safekeepers


def test_no_vote_for_an_outdated_configuration(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules, generation=2)
    (refusal,) = acceptor.vote(session, VoteRequest(9, generation=1))
    assert (refusal.message.vote_given, refusal.message.generation) == (False, 2)
    assert acceptor.state.term == 3
    with pytest.raises(c.ConsensusError, match="generation 1 of the safekeepers is outdated"):
        acceptor.elected(session, ProposerElected(9, 3000, (*HISTORY, TermLsn(9, 3000)), 1))
    assert acceptor.vote(session, VoteRequest(9, generation=3))[-1].message.vote_given
    assert acceptor.state.generation == 2
    # The generation is durable together with the history, before any WAL is acknowledged.
    elected = ProposerElected(9, 3000, (*HISTORY, TermLsn(9, 3000)), 3)
    cut, persist = acceptor.elected(session, elected)
    assert cut == c.TruncateWal(3000)
    assert (persist.state.generation, persist.state.term_history[-1].term) == (3, 9)


def test_that_a_generation_is_established_is_remembered_and_told(rules: Rules) -> None:
    acceptor, session = make_acceptor(rules)
    persist, _ = acceptor.greet(session, replace(greeting(77), established=5))
    assert persist.state.established == 5
    assert len(acceptor.greet(session, replace(greeting(77), established=4))) == 1
    assert acceptor.vote(session, VoteRequest(4))[-1].message.established == 5


CHANGED = Membership(2, (b"a" * 16, b"b" * 16, b"d" * 16), (Generation(1, frozenset({0, 1}), 3),))


def campaign(rules: Rules, *indexes: int, membership: Membership = CHANGED) -> Any:
    """A proposer in its first campaign, which these acceptors of term 1 have been asked in."""
    core = rules.core.Proposer(rules.core.Identity(TENANT, TIMELINE, bytes(16)), 3, membership)
    for index in indexes:
        core.connected(index)
        core.receive(index, AcceptorGreeting(1, membership.instance(index)))
    assert core.term == 2
    return core


def hello(core: Any, index: int, *, recovering: bool = False) -> Any:
    """The acceptor answers a greeting."""
    instance = core.membership.instance(index)
    return tuple(core.receive(index, AcceptorGreeting(core.term, instance, recovering)))


def test_a_new_safekeeper_cannot_outvote_those_who_know(rules: Rules) -> None:
    core = campaign(rules, 0, 2)
    core.receive(0, VOTE)
    assert core.receive(2, VOTE) == ()  # a majority of the new generation only
    core.connected(1)
    core.receive(1, AcceptorGreeting(1, b"b" * 16))
    assert len(core.receive(1, VOTE)) == 3
    for index in (0, 2):
        assert hello(core, index) == ()
    assert core.phase is rules.core.Phase.CAMPAIGN
    hello(core, 1)
    assert core.phase is rules.core.Phase.ELECTED
    # The same for what is committed and known to be, until the new generation is established.
    for index in (0, 2):
        core.receive(index, AppendResponse(2, 3000, 3000))
    assert (core.commit_lsn, core.synced, core.established) == (0, False, False)
    assert core.tell_established() == ()
    core.receive(1, AppendResponse(2, 3000, 3000))
    assert (core.commit_lsn, core.synced, core.established) == (3000, True, True)
    core.start(3000)
    told = core.tell_established()
    assert [send.message.established for send in told] == [2, 2, 2]
    assert core.tell_established() == ()
    for index in (0, 2):
        core.receive(index, AppendResponse(2, 3104, 3000))
    assert core.commit_lsn == 3104


def test_an_established_generation_rules_out_the_ones_below(rules: Rules) -> None:
    core = campaign(rules, 0, 2)
    core.receive(0, replace(VOTE, generation=2))  # followed a leader of it, which proves nothing
    assert core.receive(2, VOTE) == ()
    core = campaign(rules, 0, 2)
    core.receive(0, replace(VOTE, generation=2, established=2))
    core.receive(2, VOTE)
    hello(core, 0)
    hello(core, 2)
    assert core.phase is rules.core.Phase.ELECTED


def test_an_outdated_configuration_gives_up(rules: Rules) -> None:
    core = campaign(rules, 0, 1)
    newer = VoteResponse(1, False, 3000, 1000, (TermLsn(1, 1000),), 3)
    assert core.receive(0, newer) == (rules.core.Outdated(0, 3),)


def test_a_membership_that_cannot_be(rules: Rules) -> None:
    identity = rules.core.Identity(TENANT, TIMELINE, bytes(16))
    for membership, message in (
        (Membership(1, (b"a" * 16,)), "1 instances of 3 safekeepers"),
        (Membership(1, (b"a",) * 3), "an instance has 16 bytes"),
        (Membership(1, (), (Generation(1, frozenset(), 3),)), "out of order"),
        (Membership(2, (), (Generation(1, frozenset({3}), 3),)), "beyond 3 safekeepers"),
    ):
        with pytest.raises(ValueError, match=message):
            rules.core.Proposer(identity, 3, membership)
    with pytest.raises(ValueError, match="generation 1 of 1 safekeepers cannot have 2 members"):
        Generation(1, frozenset({0, 1}), 1)


def test_another_instance_is_never_counted(rules: Rules) -> None:
    core = campaign(rules, 0, 2)
    core.connected(1)
    with pytest.raises(MessageError, match="replaced or wiped; replace it by a new safekeeper"):
        core.receive(1, AcceptorGreeting(1, b"x" * 16))
    # Not pinned: it must stay the one that was seen first.
    core = rules.core.Proposer(core.identity, 3)
    core.connected(1)
    core.receive(1, AcceptorGreeting(1, b"b" * 16))
    core.disconnected(1)
    (again,) = core.connected(1)
    assert again.message.instance == b"b" * 16
    with pytest.raises(MessageError, match="expected instance 6262"):
        core.receive(1, AcceptorGreeting(1, b"x" * 16))


# ---- memory


def test_votes_count_when_they_are_confirmed_after_the_last_one(rules: Rules) -> None:
    core = campaign(rules, 0, 1, 2, membership=UNCHANGED)
    campaigning = rules.core.Phase.CAMPAIGN
    core.receive(0, VOTE)
    assert [send.peer for send in core.receive(1, VOTE)] == [0, 1]
    hello(core, 0)
    # A session ends: its vote may be forgotten. The late vote takes its place, but what was
    # confirmed before it does not count together with it.
    core.disconnected(1)
    assert core.phase is campaigning
    asked = core.receive(2, VOTE)
    assert [send.peer for send in asked] == [0, 2]
    hello(core, 2)
    assert core.phase is campaigning
    hello(core, 0)
    assert core.phase is rules.core.Phase.ELECTED


def test_a_confirmation_of_a_higher_term_is_none(rules: Rules) -> None:
    core = campaign(rules, 0, 1, membership=UNCHANGED)
    core.receive(0, VOTE)
    core.receive(1, VOTE)
    assert core.receive(0, AcceptorGreeting(3)) == (rules.core.CampaignFailed(),)
    assert hello(core, 1) == ()
    assert core.phase is rules.core.Phase.CAMPAIGN


def test_a_recovering_acceptor_does_not_vote_until_it_is_whole(rules: Rules) -> None:
    c = rules.consensus
    acceptor, session = make_acceptor(rules, recovering=True)
    assert acceptor.greet(session, greeting(77)) == (c.Reply(AcceptorGreeting(3, INSTANCE, True)),)
    persist, reply = acceptor.vote(session, VoteRequest(5))
    assert persist.state.term == 5
    assert (reply.message.vote_given, reply.message.recovering) == (False, True)
    elected = ProposerElected(5, 3000, (*HISTORY, TermLsn(5, 3200)))
    with pytest.raises(c.ConsensusError, match="does not know that this safekeeper is recovering"):
        acceptor.elected(session, elected)
    acceptor.elected(session, replace(elected, recovered_lsn=3200))
    acceptor.append(session, append(5, 3000, 3192))
    (reply,) = acceptor.flushed(3192)
    assert reply.message.flush_lsn == 3192
    (persist,) = acceptor.save_progress()
    assert persist.state.recovering
    acceptor.append(session, append(5, 3192, 3200))
    persist, reply = acceptor.flushed(3200)
    assert not persist.state.recovering
    assert reply.message.flush_lsn == 3200


def test_readmission_of_an_acceptor_that_forgets(rules: Rules) -> None:
    core = campaign(rules, 0, 1, 2, membership=UNCHANGED)
    recovering = replace(VOTE, vote_given=False, recovering=True, flush_lsn=1500)
    assert core.receive(2, recovering) == ()  # no vote, no refusal
    core.receive(0, VOTE)
    core.receive(1, VOTE)
    hello(core, 0)
    actions = hello(core, 1)
    assert core.phase is rules.core.Phase.ELECTED
    greeted = [
        action.peer
        for action in actions
        if isinstance(action, rules.core.Send) and isinstance(action.message, ProposerGreeting)
    ]
    assert greeted == [0, 1]  # is there another leader?
    core.receive(2, AppendResponse(2, 9000, 9000))
    assert core.peers[2].flush_lsn == 0
    assert hello(core, 0) == ()
    assert hello(core, 1)[0] == rules.core.Send(
        2, ProposerElected(2, 1500, core.history, recovered_lsn=3000)
    )


def test_an_acceptor_that_forgets_reaches_again_what_it_had_acknowledged(rules: Rules) -> None:
    core = elect(rules, VOTE, VOTE)
    for index in (0, 1):
        core.receive(index, AppendResponse(2, 3000, 3000))
    core.start(3000)
    core.receive(1, AppendResponse(2, 3500, 3000))
    core.disconnected(1)
    core.connected(1)
    hello(core, 1)
    recovering = replace(VOTE, vote_given=False, recovering=True, flush_lsn=1500)
    (question,) = core.receive(1, recovering)
    assert question.peer == 0
    assert core.peers[1].flush_lsn == 0
    assert hello(core, 0) == ()  # it is no majority alone
    core.connected(2)
    hello(core, 2)
    actions = core.receive(2, replace(VOTE, vote_given=False))
    assert [action.peer for action in actions] == [2, 2, 2]
    assert hello(core, 2, recovering=True) == ()
    core.disconnected(2)
    core.connected(2)
    hello(core, 2)
    core.receive(2, replace(VOTE, vote_given=False))
    (announced, _) = hello(core, 2)
    assert (announced.peer, announced.message.recovered_lsn) == (1, 3500)


def test_a_higher_term_among_the_others_prevents_a_readmission(rules: Rules) -> None:
    core = elect(rules, VOTE, VOTE)
    core.connected(2)
    hello(core, 2)
    assert len(core.receive(2, replace(VOTE, vote_given=False, recovering=True))) == 2
    assert core.receive(0, AcceptorGreeting(7)) == (rules.core.Defeated(0, 7),)


class Wire:
    """A session between a proposer and an acceptor; nothing is under way that is not in hand."""

    def __init__(self, rules: Rules, core: Any, index: int, acceptor: Any) -> None:
        self.core, self.index, self.acceptor = core, index, acceptor
        self.session = rules.consensus.Session()
        self.actions = core.connected(index)

    def requests(self, actions: Any) -> list[Any]:
        """What of some actions is sent here."""
        return [
            one.message for one in actions if one.peer == self.index and hasattr(one, "message")
        ]

    def ask(self, message: Any) -> Any:
        """Have a message answered; what the proposer makes of the answer."""
        handle = {
            ProposerGreeting: self.acceptor.greet,
            VoteRequest: self.acceptor.vote,
            ProposerElected: self.acceptor.elected,
        }[type(message)]
        actions: list[Any] = []
        for action in handle(self.session, message):
            if hasattr(action, "message"):
                actions += self.core.receive(self.index, action.message)
        return actions

    def append(self, begin: int, end: int) -> Any:
        """Have WAL flushed."""
        core = self.core
        told = (core.commit_lsn, core.truncate_lsn, b"p" * 16)
        request = AppendRequest(core.term, core.epoch_start_lsn, begin, end, *told)
        assert self.acceptor.append(self.session, request) is None
        return self.core.receive(self.index, self.acceptor.flushed(end)[-1].message)


def election(rules: Rules, core: Any, acceptors: dict[int, Any]) -> dict[int, Wire]:
    """Let a proposer be elected, and followed, by acceptors; the sessions."""
    wires = {index: Wire(rules, core, index, one) for index, one in acceptors.items()}
    pending = [(one, message) for one in wires.values() for message in one.requests(one.actions)]
    while pending:
        wire, message = pending.pop(0)
        actions = wire.ask(message)
        pending += [(one, sent) for one in wires.values() for sent in one.requests(actions)]
    assert core.phase is rules.core.Phase.ELECTED
    return wires


def test_one_that_has_all_and_an_empty_one_are_a_quorum(rules: Rules) -> None:
    """One of three that have all is replaced, and another fails before the newcomer has WAL."""
    identity = rules.core.Identity(TENANT, TIMELINE, b"o" * 16)
    leader = rules.core.Proposer(identity, 3)
    acceptors = {index: make_acceptor(rules)[0] for index in range(3)}
    wires = election(rules, leader, acceptors)
    for begin, end in ((3000, 3000), (3000, 3104), (3104, 3208), (3208, 3208)):
        for wire in wires.values():
            wire.append(begin, end)
        if end == 3000:
            leader.start(3000)
    assert leader.commit_lsn == 3208
    whole = acceptors[0]
    whole.progress()
    assert whole.state.commit_lsn == whole.flush_lsn == 3208
    whole.needed_lsn = 3208  # nor does the pageserver need any WAL

    empty = rules.consensus.Acceptor(rules.consensus.ControlState(TENANT, TIMELINE), 0, INSTANCE)
    successor = rules.core.Proposer(identity, 3, Membership(2))
    wires = election(rules, successor, {0: whole, 2: empty})
    assert (successor.epoch_start_lsn, successor.donor) == (3208, 0)
    # There is something to send, so that it can tell an end of its log.
    assert successor.peers[2].next_lsn == 3104
    assert successor.sources(2) == [0]
    wires[0].append(3208, 3208)
    wires[2].append(3104, 3208)
    assert successor.commit_lsn == 3208
    for wire in wires.values():
        wire.append(3208, 3208)
    assert successor.synced


def test_nobody_is_elected_with_a_vote_that_was_forgotten(rules: Rules) -> None:
    leader = rules.core.Proposer(rules.core.Identity(TENANT, TIMELINE, b"o" * 16), 3)
    other = rules.core.Proposer(rules.core.Identity(TENANT, TIMELINE, b"n" * 16), 3)
    acceptors = [make_acceptor(rules)[0] for _ in range(3)]

    wires = election(rules, leader, dict(enumerate(acceptors)))
    for wire in wires.values():
        wire.append(3000, 3000)
    leader.start(3000)
    assert (leader.term, leader.commit_lsn) == (4, 3000)

    # A second proposer gets the vote of one acceptor; the request to another is under way.
    rivals = [Wire(rules, other, index, acceptors[index]) for index in (0, 1)]
    rivals[0].ask(*rivals[0].requests(rivals[0].actions))
    requests = rivals[1].ask(*rivals[1].requests(rivals[1].actions))
    (late,) = rivals[0].requests(requests)
    assert rivals[1].ask(*rivals[1].requests(requests)) == []

    # The disk of the one that voted is damaged: it knows neither the vote nor all of its WAL.
    leader.disconnected(1)
    acceptors[1] = make_acceptor(rules, flush=2600, recovering=True)[0]
    again = Wire(rules, leader, 1, acceptors[1])
    questions = again.ask(*again.requests(again.ask(*again.requests(again.actions))))
    assert [question.peer for question in questions] == [0, 2]
    assert wires[0].ask(questions[0].message) == []
    (elected, _) = wires[2].ask(questions[1].message)
    again.ask(elected.message)
    again.append(2600, 3000)
    assert not acceptors[1].state.recovering
    again.append(3000, 3104)
    wires[2].append(3000, 3104)
    assert leader.commit_lsn == 3104

    # Now the other one votes, who does not have what is committed.
    confirmations = rivals[0].ask(late)
    rivals[0].ask(*rivals[0].requests(confirmations))
    other.disconnected(1)
    assert other.phase is rules.core.Phase.CAMPAIGN
