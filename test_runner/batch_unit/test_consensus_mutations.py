"""Each rule of consensus matters: when it is broken, its test or a simulated schedule fails."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from batch_unit import consensus_reference, test_consensus_rules
from batch_unit.consensus_mutants import MUTATIONS, Mutation, mutant
from batch_unit.consensus_nodes import Rules
from batch_unit.consensus_simulator import Simulation

from compute_tools.walproposer._quorum import PeerState, Quorum
from compute_tools.walproposer.membership import Generation
from safekeeper.append_state import AppendState
from zenith_utils.safekeeper_messages import NO_FEEDBACK

SCHEDULES = 150


def rule_tests() -> Iterator[Callable[[Rules], None]]:
    """Those of test_consensus_rules.py that can be run with other rules."""
    for name, function in vars(test_consensus_rules).items():
        if name.startswith("test_") and list(inspect.signature(function).parameters) == ["rules"]:
            yield function


def failure(call: Callable[[], None]) -> BaseException | None:
    """How it fails; a NameError would be the mistake of a mutation."""
    try:
        call()
    except NameError:
        raise
    except (Exception, pytest.fail.Exception) as e:
        return e
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_broken_rules_are_noticed(mutation: Mutation) -> None:
    with mutant(mutation) as rules:
        if any(failure(lambda test=test: test(rules)) for test in rule_tests()):  # type: ignore[misc]
            return
        for seed in range(mutation.seeds, mutation.seeds + SCHEDULES):
            schedule = Simulation(seed, mutation.acceptors, rules)
            if failure(lambda schedule=schedule: schedule.run(300)):  # type: ignore[misc]
                return
    pytest.fail(f"nobody notices without: {mutation.rule}")


def test_unbroken_copies_keep_all_promises() -> None:
    with mutant() as rules:
        for test in rule_tests():
            test(rules)
        for seed in range(50):
            Simulation(seed, rules=rules).run(300)


def test_a_mutation_that_does_not_apply_is_an_error() -> None:
    lost = Mutation("a rule", MUTATIONS[0].module, "no such text", "")
    with pytest.raises(ValueError, match="has 0 times 'no such text'"), mutant(lost):
        pass


# ---- the plain Python that is broken above is what the native rules do


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_quorum_and_its_reference(count: int) -> None:
    rng = random.Random(count)
    fields = (
        "term", "commit_lsn", "previous_commit_lsn", "truncate_lsn", "epoch_start_lsn",
        "established",
    )  # fmt: skip
    for _ in range(200):
        pair: list[Any] = [
            Quorum(count, bytes(16)),
            consensus_reference.Quorum(count, bytes(16)),
        ]
        joint = tuple(
            Generation(number, frozenset(rng.sample(range(count), rng.randint(0, count))), count)
            for number in range(rng.choice([0, 0, 1, 2]))
        )
        for quorum in pair:
            quorum.term, quorum.joint = 5, joint
        for _ in range(40):
            index, term = rng.randrange(count), rng.choice([4, 5, 5, 5, 5, 6])
            flush, commit = rng.randint(0, 60), rng.randint(0, 60)
            epoch_start, state = rng.randint(0, 30), rng.choice([*PeerState, PeerState.STREAMING])
            for quorum in pair:
                if not quorum.established:
                    quorum.epoch_start_lsn = epoch_start
                peer = quorum.peers[index]
                peer.state = state
                taken = quorum.acknowledge(peer, term, flush, commit, NO_FEEDBACK)
                assert taken == (term <= 5)
            native, plain = ([getattr(quorum, name) for name in fields] for quorum in pair)
            assert native == plain
            native, plain = ([(p.flush_lsn, p.commit_lsn) for p in q.peers] for q in pair)
            assert native == plain


def test_append_state_and_its_reference() -> None:
    rng = random.Random(1)
    fields = (
        "term", "next_lsn", "flush_lsn", "commit_lsn", "peer_horizon_lsn", "first_lsn",
        "saved_commit_lsn", "saved_horizon_lsn", "recovered_lsn", "has_recovered",
    )  # fmt: skip
    sessions = [object(), object()]
    segment = 16 << 20
    for _ in range(300):
        flush, commit, horizon = (rng.choice([0, rng.randint(0, 100)]) for _ in range(3))
        start = {"term": 1, "commit_lsn": commit, "horizon_lsn": horizon}
        pair: list[Any] = [
            kind(flush, **start) for kind in (AppendState, consensus_reference.AppendState)
        ]
        for _ in range(40):
            call, arguments = random_call(rng, pair[0], sessions, segment)
            native, plain = (getattr(log, call)(*arguments) for log in pair)
            assert native == plain
            native, plain = ([getattr(log, name) for name in fields] for log in pair)
            assert native == plain


def random_call(
    rng: random.Random, log: AppendState, sessions: list[object], segment: int
) -> tuple[str, tuple[Any, ...]]:
    """Something that may happen to a log."""
    session = rng.choice(sessions)
    match rng.randrange(8):
        case 0:
            return "saved", (rng.choice([log.term, 2]), log.commit_lsn, log.peer_horizon_lsn)
        case 1:
            lsn = rng.randint(0, log.next_lsn)
            return "begin_stream", (session, lsn, rng.choice([0, lsn + rng.randint(0, 300)]))
        case 2:
            return "progress", ()
        case 3:
            return "flushed", (rng.randint(log.flush_lsn, max(log.flush_lsn, log.next_lsn)),)
        case 4:
            return "is_streaming", (session,)
        case _:
            size = rng.choice([0, rng.randint(1, 200), 2 * segment])
            begin = rng.choice([log.next_lsn, log.next_lsn, log.next_lsn, rng.randint(0, 500)])
            commit, horizon = (rng.randint(0, begin + size) for _ in range(2))
            epoch = rng.choice([0, rng.randint(0, begin + 1)])
            term = rng.choice([log.term, log.term, log.term, 3])
            return "append", (session, term, epoch, begin, begin + size, commit, horizon)
