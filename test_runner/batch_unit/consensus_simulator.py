"""Deterministic simulation of proposers and acceptors over a bad network and bad disks.

The real state machines run; sockets, files and time are replaced by a seeded random choice of what
happens next: a message is delivered, a session breaks (what was under way may still arrive, after
later ones of the next session), a compute and a safekeeper are cut off from each other, an acceptor
loses power in the middle of its actions, a new compute starts while an old one still runs, Postgres
writes. In half of the schedules safekeepers are replaced by empty ones, too, computes start with a
configuration that is outdated, and disks are wiped or damaged, as long as a majority of those who
matter has its memory, with WAL or still without. WAL consists of records of two 8-byte units, and
is sent in any number of units. After every step the promises of consensus are checked against a
record of everything committed. In the end all faults stop; a majority alone has to get on then.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from batch_unit.consensus_nodes import (
    START,
    UNIT,
    AcceptorNode,
    Connection,
    PowerLossError,
    ProposerNode,
    Rules,
    Unit,
)

from compute_tools.walproposer.membership import Generation, Membership
from zenith_utils.safekeeper_messages import AppendRequest, VoteResponse
from zenith_utils.zenith_feedback import ZenithFeedback

MOST_GENERATIONS = 4


@dataclass(frozen=True)
class Configuration:
    """A generation of safekeepers: where they are, and who is there."""

    number: int
    members: tuple[tuple[int, bytes], ...]

    def membership(self, older: list[Configuration]) -> Membership:
        """What a compute with this configuration is told."""
        earlier = tuple(
            Generation(
                one.number,
                frozenset(i for i, member in enumerate(self.members) if member in one.members),
                len(one.members),
            )
            for one in older
        )
        return Membership(self.number, tuple(instance for _, instance in self.members), earlier)


class Simulation:
    """One schedule. `run` raises AssertionError when a promise is broken."""

    def __init__(
        self, seed: int, acceptors: int = 3, rules: Rules | None = None, *, changes: bool = True
    ) -> None:
        self.rng = random.Random(seed)
        self.rules = rules or Rules()
        self.changes = changes and self.rng.random() < 0.5
        self.counts: Counter[str] = Counter()
        self._numbers = 0
        self.slots: list[AcceptorNode] = []
        """Who is at which address."""
        for _ in range(acceptors):
            self.slots.append(self._new_node())
        first = tuple((slot, node.instance) for slot, node in enumerate(self.slots))
        self.configurations = [Configuration(1, first)]
        self.established = 0
        """The highest generation that the control plane knows to be established."""
        self.proposers: list[ProposerNode] = []
        self.zombies: list[Connection] = []
        self.committed: list[Unit] = []
        self.leaders: dict[int, ProposerNode] = {}
        self.feedback = ZenithFeedback()
        """The pageserver's: up to where it has WAL durably."""
        self.power_loss = self.rng.choice([0.0, 0.01, 0.05])
        self.partitions = self.rng.choice([0.0, 0.0, 0.02])
        self.newcomers = self.rng.choice([0.02, 0.02, 0.08])
        self.duels = self.rng.choice([0.3, 0.3, 0.9])
        self.operations = self.rng.choice([0.01, 0.03]) if self.changes else 0.0
        self.breaks = self.rng.choice([0.0, 0.015, 0.05])
        self.writes = self.rng.choice([1.0, 1.0, 0.1])
        self._serial = 0

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _new_node(self) -> AcceptorNode:
        return AcceptorNode(self, self._number().to_bytes(16, "little"))

    def serial(self) -> int:
        """A number for a piece of WAL."""
        self._serial += 1
        return self._serial

    def maybe_lose_power(self) -> None:
        """Raise PowerLossError now and then."""
        if self.power_loss and self.rng.random() < self.power_loss:
            raise PowerLossError

    # ---- steps

    def run(self, steps: int) -> None:
        """Run a schedule of random steps, then let everything heal and come to an end."""
        for _ in range(steps):
            self.step()
        self.heal()

    def step(self) -> None:
        """One random event."""
        living = [p for p in self.proposers if p.alive]
        choice = self.rng.random()
        if not living or (choice < self.newcomers and len(living) < 3):
            self.proposers = [*living, self.start_compute()]
            return
        choice = self.rng.random()
        if choice < 0.005:
            node = self.rng.choice(self.slots)
            node.restart()
            self.check_acceptor(node)
            return
        if choice < 0.02:
            if self.rng.random() < 0.3:
                self.pageserver_gets_on()
            self.save_progress(self.rng.choice(self.slots))
            return
        if choice < 0.02 + self.operations:
            self.change()
            return
        if self.zombies and choice < 0.1:
            zombie = self.rng.choice(self.zombies)
            self.deliver_to_acceptor(zombie)
            if not zombie.to_acceptor or self.rng.random() < 0.2:
                self.zombies.remove(zombie)
            return
        # The newest one mostly: a schedule of duels alone would never get far.
        duel = self.rng.random() < self.duels
        self.proposer_step(self.rng.choice(living) if duel else living[-1])

    def save_progress(self, node: AcceptorNode) -> None:
        """What a safekeeper does every second."""
        try:
            node.carry_out(node.acceptor.progress())
        except PowerLossError:
            node.restart()
        self.check_acceptor(node)

    def pageserver_gets_on(self) -> None:
        """It has durably all that is committed."""
        lsn = START + len(self.committed) * UNIT
        self.feedback = ZenithFeedback(0, lsn, lsn, lsn)

    def start_compute(self, *, stale: bool = True) -> ProposerNode:
        """A compute with the last configuration, or perhaps with an older one."""
        number = self._number()
        if not self.changes:
            slots = [slot for slot, _ in self.configurations[0].members]
            return ProposerNode(self, number, slots, Membership())
        last = len(self.configurations) - 1
        if stale and last and self.rng.random() < 0.25:
            last = self.rng.randrange(last)
        chosen = self.configurations[last]
        older = [one for one in self.configurations[:last] if one.number >= self.established]
        slots = [slot for slot, _ in chosen.members]
        return ProposerNode(self, number, slots, chosen.membership(older))

    def proposer_step(self, proposer: ProposerNode) -> None:
        """Some of the things that may happen between a proposer and an acceptor, in turn."""
        rng = self.rng
        index = rng.randrange(len(proposer.slots))
        if self.partitions and rng.random() < self.partitions:
            proposer.cut ^= {index}
        if index in proposer.cut:
            if rng.random() < 0.1:
                proposer.disconnect(index)
            return
        connection = proposer.connections[index]
        if connection is None:
            if rng.random() < 0.5:
                proposer.connect(index)
            return
        choice = rng.random()
        if choice < self.breaks or connection.broken:
            proposer.disconnect(index)
            return
        if choice < 0.7:
            self.deliver_to_acceptor(connection, proposer, index)
        if rng.random() < 0.7 and proposer.connections[index] is connection:
            self.deliver_to_proposer(connection, proposer, index)
        if proposer.alive and rng.random() < 0.3:
            if rng.random() < self.writes:
                proposer.write()
            proposer.send_wal(index)
            proposer.send_wal(rng.randrange(len(proposer.slots)))
            proposer.heartbeat(rng.randrange(len(proposer.slots)))
            if self.changes and rng.random() < 0.2:
                proposer.perform(proposer.core.tell_established())
        phase = proposer.core.phase.value
        if proposer.campaign_due or (phase == "elected" and rng.random() < 0.005):
            proposer.campaign_due = False
            if proposer.alive and phase != "leader":
                proposer.perform(proposer.core.campaign())

    def deliver_to_acceptor(
        self, connection: Connection, proposer: ProposerNode | None = None, index: int = 0
    ) -> None:
        """Deliver the next message, or a batch of AppendRequests."""
        node, waiting = connection.node, connection.to_acceptor
        if not waiting or connection.broken:
            return
        batch = [waiting.popleft()]
        if isinstance(batch[0][0], AppendRequest):
            while waiting and isinstance(waiting[0][0], AppendRequest) and self.rng.random() < 0.5:
                batch.append(waiting.popleft())
        try:
            for reply in node.handle(connection.session, batch):
                units = node.snapshot() if isinstance(reply, VoteResponse) else ()
                connection.to_proposer.append((reply, units))
        except PowerLossError:
            node.restart()
        except self.rules.consensus.ConsensusError:
            # The shell ends the session; requests of the batch accepted before stay unflushed.
            waiting.clear()
            if proposer is not None:
                proposer.disconnect(index)
        self.check_acceptor(node)

    def deliver_to_proposer(
        self, connection: Connection, proposer: ProposerNode, index: int
    ) -> None:
        """Deliver the next answer."""
        if connection.to_proposer:
            proposer.receive(index, *connection.to_proposer.popleft())

    # ---- the operator, and broken disks

    def mattering(self) -> list[Configuration]:
        """The last configuration, and those that the control plane cannot rule out."""
        return [one for one in self.configurations if one.number >= self.established]

    def whole(self, slot: int, instance: bytes) -> bool:
        """Whether a member is there, with its memory."""
        node = self.slots[slot]
        return node.instance == instance and not node.disk.state.recovering

    def expendable(self, *slots: int) -> bool:
        """Whether a majority of everybody who matters would stay whole without these."""
        there = {
            member
            for member in self.configurations[-1].members
            if member[0] not in slots and self.whole(*member)
        }
        return all(
            2 * len(there.intersection(one.members)) > len(one.members) for one in self.mattering()
        )

    def change(self) -> None:
        """Replace a safekeeper, wipe or damage its disk, as long as a majority stays whole."""
        rng = self.rng
        last = self.configurations[-1]
        position = rng.randrange(len(last.members))
        slot, instance = last.members[position]
        gone = self.slots[slot].instance != instance
        choice = rng.random()
        empty = any(not self.slots[at].acceptor.flush_lsn for at, who in last.members if at != slot)
        self.counts["empty"] += empty and bool(self.committed) and self.expendable(slot)
        if choice < 0.4 or gone:
            if len(self.configurations) < MOST_GENERATIONS and (gone or self.expendable(slot)):
                self.replace(position, empty=not gone)
        elif self.expendable(slot):
            node = self.slots[slot]
            if choice < 0.5:
                self.counts["wiped"] += 1
                node.starts += 1  # its sessions end
                self.slots[slot] = self._new_node()
            elif not node.disk.state.recovering:
                self.counts["damaged"] += 1
                node.damage(max(other.disk.first for other in self.slots))
                self.check_acceptor(node)

    def replace(self, position: int, *, empty: bool) -> None:
        """Begin a generation with a new safekeeper, or the one that is at the address now."""
        self.counts["replaced"] += 1
        last = self.configurations[-1]
        slot = last.members[position][0]
        if empty:
            slot = len(self.slots)
            self.slots.append(self._new_node())
        members = list(last.members)
        members[position] = (slot, self.slots[slot].instance)
        self.configurations.append(Configuration(last.number + 1, tuple(members)))

    # ---- the end

    def heal(self) -> None:
        """No more faults: a new compute must get everything committed and more.

        First with no more of the others than must be enough, then with all; and then again after
        one of them was replaced, and nothing written until the change was established.
        """
        self.power_loss = 0.0
        self.zombies.clear()
        for node in self.slots:
            node.restart()
            self.check_acceptor(node)
        self.proceed_without(self.dispensable())
        self.proceed_without(())
        members = self.configurations[-1].members
        expendable = [n for n, (slot, _) in enumerate(members) if self.expendable(slot)]
        if self.changes and expendable:
            self.pageserver_gets_on()
            for slot, _ in members:
                self.save_progress(self.slots[slot])
            self.replace(self.rng.choice(expendable), empty=True)
            self.establish()
            self.proceed_without(self.dispensable())
        self.counts["committed"] += len(self.committed)

    def dispensable(self) -> list[int]:
        """Some of those that a majority of everybody who matters would stay whole without."""
        found: list[int] = []
        slots = [slot for slot, _ in self.configurations[-1].members]
        for slot in self.rng.sample(slots, len(slots)):
            if self.rng.random() < 0.7 and self.expendable(*found, slot):
                found.append(slot)
        self.counts["away"] += bool(found)
        return found

    def establish(self) -> None:
        """Have a compute elected that writes nothing, until its generation is established."""
        compute = self.start_last_compute()
        for _ in range(100):
            self.round(compute, ())
            if compute.core.established:
                self.established = compute.core.membership.generation
                return
        raise AssertionError("a generation is not established although nothing is broken")

    def proceed_without(self, away: Collection[int]) -> None:
        """Have a compute commit some WAL, and everybody who is not away get all there is."""
        compute = self.start_last_compute()
        nodes = [
            self.slots[at]
            for at, who in self.configurations[-1].members
            if at not in away and self.slots[at].instance == who
        ]
        written = len(self.committed)
        for _ in range(600):
            self.round(compute, away)
            if len(self.committed) < written + 6:
                compute.write()
            end = compute.end
            done = compute.core.commit_lsn == end and len(self.committed) >= written + 6
            if done and all(node.acceptor.commit_lsn == end for node in nodes):
                break
        else:
            raise AssertionError("no progress although nothing is broken any more")
        assert compute.log == self.committed
        for node in nodes:
            assert not node.disk.state.recovering, "an acceptor is never whole again"
            assert node.snapshot() == self.committed, "logs differ in the end"

    def start_last_compute(self) -> ProposerNode:
        """The only one from now on."""
        self.proposers = [self.start_compute(stale=False)]
        return self.proposers[0]

    def round(self, compute: ProposerNode, away: Collection[int]) -> None:
        """What happens between a compute and everybody else, without a fault."""
        for index, slot in enumerate(compute.slots):
            if slot in away:
                continue
            connection = compute.connections[index]
            if connection is None or connection.broken:
                compute.disconnect(index)
                compute.connect(index)
                continue
            self.deliver_to_acceptor(connection, compute, index)
            self.deliver_to_proposer(connection, compute, index)
            compute.send_wal(index)
            if not connection.to_acceptor and not connection.to_proposer:
                compute.heartbeat(index)
        assert compute.alive
        if compute.campaign_due:
            compute.campaign_due = False
            compute.perform(compute.core.campaign())

    # ---- promises

    def check_leader(self, proposer: ProposerNode) -> None:
        """One leader per term, and it has everything that was ever committed."""
        core = proposer.core
        self.counts["elected"] += 1
        assert self.leaders.setdefault(core.term, proposer) is proposer, "two leaders in a term"
        if max(self.leaders) > core.term:
            return  # learns of its votes late: what was committed since is not for it to know
        if core.bootstrap:
            assert not self.committed, "bootstrap over committed WAL"
        else:
            assert proposer.end == core.epoch_start_lsn
            known = proposer.log[: len(self.committed)]
            assert known == self.committed, "committed WAL lost in an election"

    def check_commit(self, proposer: ProposerNode) -> None:
        """What a leader takes for committed is what everybody ever took for committed."""
        core = proposer.core
        lsn = core.commit_lsn
        assert lsn > proposer.checked_commit, "the commit LSN goes back"
        begin, end = max(0, proposer.checked_commit - START) // UNIT, (lsn - START) // UNIT
        proposer.checked_commit = lsn
        units = proposer.log[begin:end]
        known = self.committed[begin:end]
        assert units[: len(known)] == known, "committed WAL changed"
        assert len(units) == end - begin, "WAL that does not exist is committed"
        self.committed += units[len(known) :]
        if self.rng.random() < 0.3:
            self.feedback = ZenithFeedback(0, lsn, lsn, lsn)
        if core.established:
            # The control plane learns of it sooner or later.
            if self.rng.random() < 0.5:
                self.established = max(self.established, core.membership.generation)
            self.counts["established"] += bool(core.membership.earlier)
        for index, peer in enumerate(core.peers):
            node = proposer.node(index)
            if peer.flush_lsn >= lsn and not node.losses and node.starts:
                whole = self.changes is False or node.instance == core.membership.instance(index)
                assert not whole or node.acceptor.flush_lsn >= lsn, "acknowledged WAL lost"

    def check_acceptor(self, node: AcceptorNode) -> None:
        """Logs match up to their commit LSNs; the live state never runs ahead of the disk."""
        acceptor, disk = node.acceptor, node.disk
        commit = acceptor.commit_lsn
        assert commit <= max(acceptor.flush_lsn, acceptor.state.commit_lsn)
        assert acceptor.state.term == disk.state.term
        if commit != node.checked_commit:
            assert commit > node.checked_commit, "the commit LSN of an acceptor goes back"
            begin = max(node.checked_commit, disk.first)
            node.checked_commit = commit
            if commit > begin:
                units = disk.units(begin, commit)
                known = self.committed[(begin - START) // UNIT : (commit - START) // UNIT]
                assert units == known, "an acceptor commits something else"
