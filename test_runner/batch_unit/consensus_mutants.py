"""Copies of the rules of consensus with one of them broken, to see whether that is noticed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from batch_unit.consensus_nodes import Rules

CORE: Final = "compute_tools.walproposer.core"
DIVERGENCE: Final = "compute_tools.walproposer.divergence"
CONSENSUS: Final = "safekeeper.consensus"
NATIVE: Final = "batch_unit.consensus_reference"
"""Stands for _quorum.pyx and append_state.pyx."""

_SWAPPED: Final = {
    "compute_tools.walproposer._quorum": NATIVE,
    "safekeeper.append_state": NATIVE,
    NATIVE: NATIVE,
    DIVERGENCE: DIVERGENCE,
}


@dataclass(frozen=True)
class Mutation:
    """A rule and how to break it: a text of a module, which occurs once, and what replaces it."""

    rule: str
    module: str
    text: str
    broken: str
    seeds: int = 0
    """The first seed to try: rare schedules are needed for some."""
    acceptors: int = 3

    def __str__(self) -> str:
        return self.rule


@contextmanager
def mutant(mutation: Mutation | None = None) -> Iterator[Rules]:
    """The rules as plain Python, one of them broken. ValueError if its text is not there."""
    names: list[str] = []
    try:
        modules = {
            name: _load(name, mutation, names) for name in (NATIVE, DIVERGENCE, CORE, CONSENSUS)
        }
        yield Rules(modules[CORE], modules[CONSENSUS])
    finally:
        for name in names:
            del sys.modules[name]


def _load(name: str, mutation: Mutation | None, names: list[str]) -> ModuleType:
    path = importlib.import_module(name).__file__
    assert path is not None
    source = Path(path).read_text()
    if mutation is not None and mutation.module == name:
        if source.count(mutation.text) != 1:
            raise ValueError(f"{name} has {source.count(mutation.text)} times {mutation.text!r}")
        source = source.replace(mutation.text, mutation.broken)
    for original, stand_in in _SWAPPED.items():
        if name != NATIVE:
            source = source.replace(f"from {original} import", f"from {_copy(stand_in)} import")
    module = ModuleType(_copy(name))
    module.__file__ = path
    sys.modules[module.__name__] = module
    names.append(module.__name__)
    exec(compile(source, f"{name} (mutant)", "exec"), module.__dict__)
    return module


def _copy(name: str) -> str:
    return f"mutant_{name.replace('.', '_')}"


MUTATIONS: Final = (
    # ---- the acceptor: greeting
    Mutation("another tenant is refused", CONSENSUS,
             "message.tenant_id != state.tenant_id", "False"),
    Mutation("another timeline is refused", CONSENSUS,
             "message.timeline_id != state.timeline_id", "False"),
    Mutation("another protocol is refused", CONSENSUS,
             "message.protocol_version != PROTOCOL_VERSION", "False"),
    Mutation("another segment size is refused", CONSENSUS,
             "message.wal_seg_size != WAL_SEGMENT_SIZE", "False"),
    Mutation("another system is refused", CONSENSUS,
             "message.system_id != known.system_id", "False"),
    Mutation("a session for another instance is refused", CONSENSUS,
             "message.instance != instance", "False"),
    Mutation("an established generation is remembered", CONSENSUS,
             "established=max(state.established, message.established)",
             "established=state.established"),
    # ---- the acceptor: vote
    Mutation("one vote per term", CONSENSUS,
             "self.state.term < message.term and not", "self.state.term <= message.term and not"),
    Mutation("the vote is durable", CONSENSUS, """            actions.append(Persist(self.state))
        state = self.state
        response""", """            pass
        state = self.state
        response"""),
    Mutation("no vote for an earlier generation", CONSENSUS,
             "outdated = message.generation < self.state.generation", "outdated = False"),
    Mutation("no vote while recovering", CONSENSUS,
             "newer and not state.recovering", "newer"),
    Mutation("the vote tells where the log ends", CONSENSUS,
             "            self.flush_lsn,\n            min(state.peer_horizon_lsn",
             "            self.commit_lsn,\n            min(state.peer_horizon_lsn"),
    Mutation("the vote tells the history as far as the log goes", CONSENSUS,
             "history_up_to(state.term_history, self.flush_lsn)", "state.term_history"),
    # ---- the acceptor: elected
    Mutation("no lower leader is followed", CONSENSUS,
             "if message.term < self.state.term:\n            return ()", "if False: return ()"),
    Mutation("no leader of an earlier generation is followed", CONSENSUS,
             "if message.generation < self.state.generation:", "if False:"),
    Mutation("a leader who does not know of the recovery is not followed", CONSENSUS,
             "self.state.recovering and not message.recovered_lsn", "False"),
    Mutation("a leader who is followed cuts nothing", CONSENSUS,
             "history[-1].term == message.term and start < self.flush_lsn", "False"),
    Mutation("committed WAL is not cut", CONSENSUS,
             "if start < self.commit_lsn:", "if False:"),
    Mutation("no gap", CONSENSUS, "if gap and not self.state.recovering:", "if False:"),
    Mutation("the leader's history has its own term", CONSENSUS,
             "if not message.term_history or message.term_history[-1].term != message.term:",
             "if False:"),
    Mutation("the leader's term is durable", CONSENSUS,
             "if message.term > self.state.term:\n            # Lift",
             "if False:\n            # Lift"),
    Mutation("the log is cut", CONSENSUS, "actions.append(TruncateWal(start))", "pass"),
    Mutation("WAL is cut before the history is replaced", CONSENSUS,
             "        return actions\n\n    def append(",
             "        return sorted(actions, key=lambda one: type(one) is TruncateWal)\n\n"
             "    def append("),
    Mutation("the leader's history is taken over", CONSENSUS,
             "term_history=message.term_history, generation", "generation"),
    Mutation("the leader's generation is taken over", CONSENSUS,
             "generation=message.generation\n", "\n"),
    Mutation("a recovering acceptor is told when it is whole", CONSENSUS,
             "message.recovered_lsn if followed.recovering else 0", "0"),
    Mutation("a recovering acceptor stays so until then", CONSENSUS,
             "recovering=self.state.recovering and not self.log.has_recovered",
             "recovering=False"),
    # ---- the acceptor: append and flush
    Mutation("WAL of the streaming session only", NATIVE,
             "session is not self.streaming or header.term", "header.term"),
    Mutation("WAL of the own term only", NATIVE,
             "session is not self.streaming or header.term != self.term",
             "session is not self.streaming"),
    Mutation("the session ends with the term", NATIVE,
             "if term != self.term:\n            self.streaming = None", "if False: pass"),
    Mutation("WAL where the log ends only", NATIVE,
             "if header.begin_lsn != self.next_lsn:", "if False:"),
    Mutation("commit LSN up to the flush LSN only", NATIVE,
             "commit = min(self.requested_commit, flush_lsn)", "commit = self.requested_commit"),
    Mutation("the commit LSN does not go back", NATIVE,
             "if commit > self.commit_lsn:\n            self.commit_lsn = commit\n        if",
             "if commit:\n            self.commit_lsn = commit\n        if"),
    Mutation("the first commit LSN is durable before the answer", NATIVE,
             "return self.first_lsn != 0", "return False"),
    Mutation("the commit LSN is durable once it is past the epoch's start", NATIVE,
             "saved < self.epoch_start_lsn <= self.commit_lsn\n            or ", ""),
    Mutation("the end of recovery is durable before the answer", NATIVE,
             "if self.has_recovered:\n            return True", "if False: pass"),
    Mutation("recovered only when complete", NATIVE,
             "self.recovered_lsn != 0 and self.flush_lsn >= self.recovered_lsn",
             "self.recovered_lsn != 0"),
    # ---- the proposer: campaign
    Mutation("a term above all seen", CORE,
             "max(self.term, self._last_own_term, *(peer.term for peer in self.peers))",
             "max(self.term, self._last_own_term)"),
    Mutation("a majority of votes", CORE, "len(indexes) >= self.quorum and", "indexes and"),
    Mutation("a majority of every generation that matters", CORE,
             "or all(len(one.members & indexes) >= one.quorum for one in self.joint)", "or True"),
    Mutation("an earlier generation matters until a later one is established", CORE,
             "self._known_established, message.established",
             "self._known_established, message.generation"),
    Mutation("the votes are confirmed", CORE,
             "        self._round += 1\n        return [self._greet(voter) for voter in votes]",
             "        return self._win(votes)"),
    Mutation("votes are confirmed by a round after all of them", CORE,
             "self._standings[index].voted < number <= self._standings[index].answered",
             "self._standings[index].answered >= 0 and self._standings[index].voted < self._round"),
    Mutation("a vote is lost with its session", CORE,
             "if peer.state is PeerState.VOTED and peer.vote is not None and peer.vote.vote_given",
             "if peer.vote is not None and peer.vote.vote_given"),
    Mutation("a refusal is no vote", CORE,
             "if not message.vote_given and (message.term > self.term or not message.recovering):",
             "if False:"),
    Mutation("answers to an earlier campaign do not count", CORE,
             "message.term < self.term or peer.state is not PeerState.VOTING",
             "peer.state is not PeerState.VOTING"),
    Mutation("another instance is not counted", CORE,
             "if expected not in (ANY_INSTANCE, instance):", "if False:"),
    # ---- the proposer: what follows from the votes
    Mutation("the greatest log wins", CORE, "self.donor = max(votes", "self.donor = min(votes"),
    Mutation("logs compare by epoch first", CORE,
             "return last_term(vote.term_history, vote.flush_lsn), vote.flush_lsn",
             "return 0, vote.flush_lsn"),
    Mutation("the own epoch starts where the donor's log ends", CORE,
             "self._set_epoch_start(best.flush_lsn)",
             "self._set_epoch_start(min(v.flush_lsn for v in votes.values()) or best.flush_lsn)"),
    Mutation("the history is the donor's", CORE,
             "self.history = best.term_history", "self.history = best.term_history[-1:]"),
    Mutation("a bootstrap only without any WAL", CORE,
             "if best.flush_lsn == 0 or", "if any(not v.flush_lsn for v in votes.values()) or"),
    Mutation("the terms of the histories decide where logs part", DIVERGENCE,
             "if term in ends:", "if True:\n            ends.setdefault(term, end)"),
    Mutation("in the last common term the shorter log decides", DIVERGENCE,
             "return end if our_end is None else min(end, our_end)", "return end"),
    Mutation("a log that has nothing in common goes as a whole", CORE,
             "self.history[0].lsn if log_end else join_lsn", "join_lsn"),
    Mutation("a recovering log keeps nothing foreign", CORE,
             "if recovered_lsn and start >= log_end:", "if recovered_lsn:"),
    Mutation("recovery takes WAL from those who have it in this term", CORE,
             "if peer.flush_lsn > position", "if True"),
    # ---- the proposer: commit
    Mutation("a majority commits", NATIVE, "if reached >= self.quorum and", "if reached and"),
    Mutation("a commit needs all generations until the last one is established", NATIVE,
             "(self.established or self._by_joint(peer.flush_lsn))", "True"),
    Mutation("nothing is committed below the epoch's start", NATIVE,
             "if commit and commit >= self.epoch_start_lsn:", "if commit:"),
    Mutation("acknowledgements of this term count only", NATIVE,
             "term < self.term or peer.state is not PeerState.STREAMING",
             "peer.state is not PeerState.STREAMING"),
    Mutation("acknowledgements of followers count only", NATIVE,
             "term < self.term or peer.state is not PeerState.STREAMING", "term < self.term"),
    Mutation("the horizon is what all have", NATIVE,
             "min(lowest, self.previous_commit_lsn)", "self.previous_commit_lsn"),
    Mutation("the horizon is less than all that is committed", NATIVE,
             "min(lowest, self.previous_commit_lsn)", "min(lowest, self.commit_lsn)"),
    Mutation("Postgres starts when a majority knows the commit", CORE,
             "if peer.commit_lsn >= self.epoch_start_lsn", "if True"),
    Mutation("acknowledgements of earlier terms are forgotten", CORE,
             "peer.flush_lsn = peer.commit_lsn = 0\n            self._standings[index].ack",
             "self._standings[index].ack"),
    Mutation("a higher term is a defeat", NATIVE,
             "if term > self.term:\n            return False", "if False: pass"),
    # ---- the proposer: who forgets
    Mutation("a recovering acceptor is readmitted by a quorum of others", CORE,
             "if not peer.vote.recovering:\n            return self._announce(index)",
             "if True:\n            return self._announce(index, self.epoch_start_lsn)"),
    Mutation("those who are recovering confirm nothing", CORE,
             "if not message.recovering and message.term", "if message.term"),
    Mutation("readmission is confirmed after the loss of memory", CORE,
             "self._standings[other].answered >= standing.readmission", "True"),
    Mutation("recovered means all that was acknowledged", CORE,
             "recovered_lsn = max(self.epoch_start_lsn, standing.acknowledged)",
             "recovered_lsn = self.epoch_start_lsn"),
    Mutation("recovered means the epoch's start at least", CORE,
             "recovered_lsn = max(self.epoch_start_lsn, standing.acknowledged)",
             "recovered_lsn = max(1, standing.acknowledged)"),
)  # fmt: skip
