"""A walproposer that takes up the stream of one that died: when it may, when it must yield."""

from __future__ import annotations

import pytest

from compute_tools.proposer_keeper import DEATHS_WITHIN, MAX_DEATHS, RestartLimit
from compute_tools.walproposer.core import (
    Action,
    CampaignFailed,
    Defeated,
    Identity,
    Phase,
    Predecessors,
    Proposer,
    Send,
)
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    AcceptorGreeting,
    ProposerElected,
    ProposerGreeting,
    TermHistory,
    TermLsn,
    VoteRequest,
    VoteResponse,
)

IDENTITY = Identity(TenantId(b"t" * 16), TimelineId(b"l" * 16), b"p" * 16)
OURS = (TermLsn(1, 1000), TermLsn(4, 2000))
"""Our Postgres started in term 4."""
FOREIGN = (*OURS, TermLsn(5, 3000))


def successor(*terms: int, last_term: int) -> Proposer:
    """One whose predecessors won `terms`, with three safekeepers that it is connected to."""
    proposer = Proposer(IDENTITY, 3, predecessors=Predecessors(frozenset(terms), last_term))
    for index in range(3):
        proposer.connected(index)
    return proposer


def greet(proposer: Proposer, *terms: int) -> list[Action]:
    """Safekeepers answer from the first on, with these terms; the last answer's actions."""
    actions: list[Action] = []
    for index, term in enumerate(terms):
        actions = list(proposer.receive(index, AcceptorGreeting(term)))
    return actions


def vote(
    proposer: Proposer, index: int, history: TermHistory, flush: int, given: bool = True
) -> list[Action]:
    """A safekeeper answers the vote request; whoever is asked to confirm its vote does."""
    answer = VoteResponse(proposer.term, given, flush, 1000, history)
    actions = list(proposer.receive(index, answer))
    asked = [a for a in actions if isinstance(a, Send) and isinstance(a.message, ProposerGreeting)]
    for confirmed in asked:
        actions = list(proposer.receive(confirmed.peer, AcceptorGreeting(proposer.term)))
    return actions


def announced(actions: list[Action]) -> list[ProposerElected]:
    """The announcements among actions."""
    messages = [action.message for action in actions if isinstance(action, Send)]
    return [message for message in messages if isinstance(message, ProposerElected)]


def test_takes_up_its_own_log() -> None:
    proposer = successor(4, last_term=4)
    assert greet(proposer, 4, 4)[-1] == Send(1, VoteRequest(5, b"p" * 16))
    assert vote(proposer, 0, OURS, 2500) == []
    (first, second) = announced(vote(proposer, 1, OURS, 2700))
    assert first.term == second.term == 5
    assert proposer.epoch_start_lsn == 2700
    assert proposer.history == (*OURS, TermLsn(5, 2700))


def test_asks_above_all_that_was_asked_for_before() -> None:
    """A predecessor died in its campaign, and not everybody has heard of it."""
    proposer = successor(4, last_term=7)
    assert greet(proposer, 4, 4)[-1] == Send(1, VoteRequest(8, b"p" * 16))
    late = proposer.receive(2, AcceptorGreeting(7))
    assert list(late) == [Send(2, VoteRequest(8, b"p" * 16))]


@pytest.mark.parametrize("terms", [(5,), (4, 5), (4, 4, 6)])
def test_yields_without_a_campaign(terms: tuple[int, ...]) -> None:
    """To whoever asked for votes meanwhile, even at one safekeeper only."""
    proposer = successor(4, last_term=4)
    assert greet(proposer, *terms) == [Defeated(len(terms) - 1, terms[-1])]


def test_yields_to_a_later_campaign() -> None:
    proposer = successor(4, last_term=4)
    greet(proposer, 4, 4)
    refusal = VoteResponse(6, False, 2500, 1000, OURS)
    assert proposer.receive(0, refusal) == (Defeated(0, 6),)
    # Its own vote, whose answer was lost, is no reason to.
    proposer = successor(4, last_term=4)
    greet(proposer, 4, 4)
    assert vote(proposer, 0, OURS, 2500, given=False) == [CampaignFailed()]


def test_never_leads_on_from_the_wal_of_others() -> None:
    """Another compute has won the very term that a predecessor asked for votes in."""
    proposer = successor(4, last_term=5)
    greet(proposer, 5, 5)
    vote(proposer, 0, OURS, 2900)
    actions = vote(proposer, 1, FOREIGN, 3000)
    assert actions == [Defeated(1, 5)]
    # Had a predecessor won it, it would be our Postgres' WAL.
    proposer = successor(4, 5, last_term=5)
    greet(proposer, 5, 5)
    vote(proposer, 0, OURS, 2900)
    assert len(announced(vote(proposer, 1, FOREIGN, 3000))) == 2


def test_another_election_of_its_own() -> None:
    """Without its donor it campaigns again: what it has won itself is its own."""
    proposer = successor(4, last_term=4)
    greet(proposer, 4, 4)
    vote(proposer, 0, OURS, 2500)
    vote(proposer, 1, OURS, 2700)
    assert proposer.phase is Phase.ELECTED
    proposer.campaign()
    vote(proposer, 0, (*OURS, TermLsn(5, 2700)), 2700)
    assert len(announced(vote(proposer, 1, (*OURS, TermLsn(5, 2700)), 2700))) == 2


def test_nothing_was_written_yet() -> None:
    proposer = successor(1, last_term=1)
    greet(proposer, 1, 1)
    vote(proposer, 0, (TermLsn(1, 1000),), 1000)
    assert vote(proposer, 1, (), 0) == []
    assert proposer.bootstrap
    assert len(announced(list(proposer.start(1000)))) == 2


def test_pauses_grow_until_it_works() -> None:
    limit = RestartLimit()
    assert limit.died(0.0, did_work=True) == 0.0
    pauses = [limit.died(1.0, did_work=False) for _ in range(4)]
    assert pauses == [0.1, 0.2, 0.4, 0.8]
    assert limit.died(2.0, did_work=True) == 0.0
    assert limit.died(2.0, did_work=False) == 0.1


@pytest.mark.parametrize("did_work", [False, True])
def test_too_many_deaths(did_work: bool) -> None:
    limit = RestartLimit()
    for number in range(MAX_DEATHS - 1):
        assert limit.died(float(number), did_work=did_work) is not None
    assert limit.died(DEATHS_WITHIN + 2.5, did_work=did_work) is not None, "the first are long ago"
    assert limit.died(DEATHS_WITHIN + 2.5, did_work=did_work) is not None
    assert limit.died(DEATHS_WITHIN + 2.5, did_work=did_work) is not None
    assert limit.died(DEATHS_WITHIN + 2.5, did_work=did_work) is None
