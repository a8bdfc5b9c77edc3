"""Deterministic simulation of proposers and acceptors over a bad network and bad disks.

The real state machines run; sockets, files and time are replaced by a seeded random choice of what
happens next: a message is delivered, a session breaks (what was under way may still arrive), an
acceptor loses power in the middle of its actions, a new compute starts while an old one still runs,
Postgres writes. WAL consists of records of two 8-byte units, and is sent in any number of units.
After every step the promises of consensus are checked against a record of everything committed.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from compute_tools.walproposer._quorum import PeerState
from compute_tools.walproposer.core import Action as ProposerAction
from compute_tools.walproposer.core import (
    Announced,
    CampaignFailed,
    Defeated,
    Identity,
    Phase,
    Proposer,
    Send,
)
from safekeeper.consensus import (
    Acceptor,
    Action,
    ConsensusError,
    ControlState,
    Persist,
    Reply,
    Session,
    TruncateWal,
)
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    AcceptorMessage,
    AppendRequest,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    VoteRequest,
    parse_append_request,
)

TENANT = TenantId(bytes(16))
TIMELINE = TimelineId(bytes(15) + b"\1")
START = 0x1000100
UNIT = 8
RECORD = 2 * UNIT

Unit = tuple[int, int]
"""A piece of WAL: (term that wrote it, serial number)."""


class PowerLossError(Exception):
    """An acceptor dies here."""


@dataclass
class Disk:
    """What survives a power loss: control state and synced WAL, from `first` on."""

    state: ControlState = field(default_factory=lambda: ControlState(TENANT, TIMELINE))
    first: int = START
    wal: list[Unit] = field(default_factory=list)
    synced: int = 0
    """How many units of `wal` are durable; the rest may be lost, from the end."""

    @property
    def end(self) -> int:
        """Written end."""
        return self.first + len(self.wal) * UNIT

    def units(self, begin: int, end: int) -> list[Unit]:
        """The WAL of a range."""
        assert begin >= self.first, "WAL below the first one is asked for"
        return self.wal[(begin - self.first) // UNIT : (end - self.first) // UNIT]

    def record_end(self, lsn: int) -> int:
        """End of the last complete record at or below."""
        return START + (lsn - START) // RECORD * RECORD


class AcceptorNode:
    """An acceptor with its disk."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.disk = Disk()
        self.generation = 0
        self.acceptor = Acceptor(self.disk.state, 0)

    def restart(self) -> None:
        """Power loss: unsynced WAL is gone, or a part of it."""
        disk, rng = self.disk, self.simulation.rng
        if not disk.state.commit_lsn:
            disk.wal = []
            disk.synced = 0
            flush = 0
        else:
            kept = rng.randint(disk.synced, len(disk.wal))
            flush = disk.record_end(disk.first + kept * UNIT)
            disk.wal = disk.units(disk.first, flush)
            disk.synced = len(disk.wal)
        self.generation += 1
        self.acceptor = Acceptor(disk.state, flush)

    def carry_out(self, actions: list[Action]) -> list[AcceptorMessage]:
        """Carry out actions, perhaps dying before any of them."""
        replies: list[AcceptorMessage] = []
        for action in actions:
            self.simulation.maybe_lose_power()
            if isinstance(action, Persist):
                self.disk.state = action.state
            elif isinstance(action, TruncateWal):
                self._truncate(action.lsn)
            else:
                assert isinstance(action, Reply)
                replies.append(action.message)
        return replies

    def _truncate(self, lsn: int) -> None:
        disk = self.disk
        if not self.acceptor.flush_lsn or not disk.wal or lsn <= disk.first:
            disk.first, disk.wal = lsn, []
        disk.wal = disk.units(disk.first, lsn)
        disk.synced = len(disk.wal)

    def handle(
        self, session: Session, batch: list[tuple[ProposerMessage, list[Unit]]]
    ) -> list[AcceptorMessage]:
        """Handle a message, or a batch of AppendRequests."""
        acceptor = self.acceptor
        message = batch[0][0]
        if isinstance(message, ProposerGreeting):
            return self.carry_out(list(acceptor.greet(session, message)))
        if isinstance(message, VoteRequest):
            return self.carry_out(list(acceptor.vote(session, message)))
        if isinstance(message, ProposerElected):
            return self.carry_out(list(acceptor.elected(session, message)))
        for request, units in batch:
            assert isinstance(request, AppendRequest)
            refusal = acceptor.append(session, request)
            if refusal is not None:
                return [refusal.message]
            if units:
                assert self.disk.end == request.begin_lsn, "write with a gap"
                self.disk.wal += units
            self.simulation.maybe_lose_power()
        self.disk.synced = len(self.disk.wal)
        flush = self.disk.record_end(self.disk.end) if self.disk.wal else acceptor.flush_lsn
        return self.carry_out(list(acceptor.flushed(flush)))


class Connection:
    """A session, as a pair of queues. A broken one may still deliver to the acceptor."""

    def __init__(self, node: AcceptorNode) -> None:
        self.node = node
        self.generation = node.generation
        self.session = Session()
        self.to_acceptor: deque[tuple[ProposerMessage, list[Unit]]] = deque()
        self.to_proposer: deque[AcceptorMessage] = deque()


class ProposerNode:
    """A compute: proposer and Postgres."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self.simulation = simulation
        identity = Identity(TENANT, TIMELINE, number.to_bytes(16, "big"))
        self.core = Proposer(identity, len(simulation.nodes))
        self.connections: list[Connection | None] = [None] * len(simulation.nodes)
        self.wal: list[Unit] = []
        """What Postgres wrote, from epoch_start_lsn on."""
        self.alive = True
        self.campaign_due = False
        self.checked_term = 0

    @property
    def end(self) -> int:
        """End of the WAL that this leader knows of."""
        return self.core.epoch_start_lsn + len(self.wal) * UNIT

    def connect(self, index: int) -> None:
        """Open a session."""
        self.connections[index] = Connection(self.simulation.nodes[index])
        self.perform(self.core.connected(index))

    def disconnect(self, index: int) -> None:
        """Lose a session; what was under way to the acceptor may still arrive."""
        connection = self.connections[index]
        if connection is not None:
            self.simulation.zombies.append(connection)
            self.connections[index] = None
            self.core.disconnected(index)

    def perform(self, actions: object) -> None:
        """Carry out actions of the core."""
        for action in actions:  # type: ignore[attr-defined]
            self._perform(action)
        self._check()

    def _perform(self, action: ProposerAction) -> None:
        if isinstance(action, Send):
            connection = self.connections[action.peer]
            if connection is not None:
                connection.to_acceptor.append((action.message, []))
        elif isinstance(action, Announced):
            self.heartbeat(action.peer)
        elif isinstance(action, CampaignFailed):
            self.campaign_due = True
        else:
            assert isinstance(action, Defeated)
            self.alive = False

    def append_request(self, begin_lsn: int, end_lsn: int) -> AppendRequest:
        """What arrives of the message with the WAL of a range."""
        wal = bytes(end_lsn - begin_lsn)
        return parse_append_request(self.core.append_header(begin_lsn, end_lsn) + wal)

    def heartbeat(self, index: int) -> None:
        """Send an empty AppendRequest."""
        connection = self.connections[index]
        peer = self.core.peers[index]
        if connection is not None and peer.state is PeerState.STREAMING:
            request = self.append_request(peer.next_lsn, peer.next_lsn)
            connection.to_acceptor.append((request, []))

    def send_wal(self, index: int) -> None:
        """Send some of what a peer lacks, from where the real driver would take it."""
        connection, peer = self.connections[index], self.core.peers[index]
        if connection is None or peer.state is not PeerState.STREAMING:
            return
        lsn = peer.next_lsn
        if lsn < self.core.epoch_start_lsn:
            units = self._recover(index, lsn)
        else:
            begin = (lsn - self.core.epoch_start_lsn) // UNIT
            units = self.wal[begin : begin + self.simulation.rng.randint(1, 5)]
        if units:
            peer.next_lsn = lsn + len(units) * UNIT
            request = self.append_request(lsn, peer.next_lsn)
            connection.to_acceptor.append((request, units))

    def _recover(self, index: int, lsn: int) -> list[Unit]:
        for source in self.core.sources(index):
            node = self.simulation.nodes[source]
            if node.acceptor.state.term == self.core.term:
                end = min(node.acceptor.flush_lsn, self.core.epoch_start_lsn)
                units = node.disk.units(lsn, end)
                return units[: self.simulation.rng.randint(1, 5)]
        return []

    def write(self) -> None:
        """Postgres starts, then writes."""
        if self.core.phase is Phase.ELECTED and self.core.synced:
            self.perform(self.core.start(self.core.epoch_start_lsn or START))
        if self.core.phase is Phase.LEADER:
            for _ in range(2 * self.simulation.rng.randint(1, 3)):
                self.wal.append((self.core.term, self.simulation.serial()))

    def _check(self) -> None:
        core, simulation = self.core, self.simulation
        if core.phase is not Phase.CAMPAIGN and core.term != self.checked_term:
            self.checked_term = core.term
            simulation.check_leader(self)
        if core.commit_lsn:
            simulation.check_commit(self)


class Simulation:
    """One schedule. `run` raises AssertionError when a promise is broken."""

    def __init__(self, seed: int, acceptors: int = 3) -> None:
        self.rng = random.Random(seed)
        self.nodes = [AcceptorNode(self) for _ in range(acceptors)]
        self.proposers: list[ProposerNode] = []
        self.zombies: list[Connection] = []
        self.committed: list[Unit] = []
        self.leaders: dict[int, ProposerNode] = {}
        self.power_loss = self.rng.choice([0.0, 0.01, 0.05])
        self._serial = 0
        self._numbers = 0

    def serial(self) -> int:
        """A number for a piece of WAL."""
        self._serial += 1
        return self._serial

    def maybe_lose_power(self) -> None:
        """Raise PowerLossError now and then."""
        if self.rng.random() < self.power_loss:
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
        if len(living) < 1 or (choice < 0.02 and len(living) < 3):
            self._numbers += 1
            self.proposers.append(ProposerNode(self, self._numbers))
            return
        if choice < 0.025:
            self.restart(self.rng.choice(self.nodes))
            return
        if self.zombies and choice < 0.07:
            zombie = self.rng.choice(self.zombies)
            self.deliver_to_acceptor(zombie)
            if not zombie.to_acceptor or self.rng.random() < 0.2:
                self.zombies.remove(zombie)
            return
        # The newest one mostly: a schedule of duels alone would never get far.
        self.proposer_step(living[-1] if choice < 0.7 else self.rng.choice(living))

    def proposer_step(self, proposer: ProposerNode) -> None:
        """Some of the things that may happen between a proposer and an acceptor, in turn."""
        rng = self.rng
        index = rng.randrange(len(self.nodes))
        connection = proposer.connections[index]
        if connection is None:
            if rng.random() < 0.5:
                proposer.connect(index)
            return
        if rng.random() < 0.015 or connection.generation != connection.node.generation:
            proposer.disconnect(index)
            return
        if rng.random() < 0.7:
            self.deliver_to_acceptor(connection, proposer, index)
        if rng.random() < 0.7 and proposer.connections[index] is connection:
            self.deliver_to_proposer(connection, proposer, index)
        if proposer.alive and rng.random() < 0.25:
            proposer.write()
            proposer.send_wal(rng.randrange(len(self.nodes)))
            proposer.heartbeat(rng.randrange(len(self.nodes)))
        phase = proposer.core.phase
        if proposer.campaign_due or (phase is Phase.ELECTED and rng.random() < 0.005):
            proposer.campaign_due = False
            if proposer.alive and phase is not Phase.LEADER:
                proposer.perform(proposer.core.campaign())

    def restart(self, node: AcceptorNode) -> None:
        """Power loss of an acceptor."""
        node.restart()
        self.check_acceptor(node)

    def deliver_to_acceptor(
        self, connection: Connection, proposer: ProposerNode | None = None, index: int = 0
    ) -> None:
        """Deliver the next message, or a batch of AppendRequests."""
        node = connection.node
        if not connection.to_acceptor or connection.generation != node.generation:
            return
        batch = [connection.to_acceptor.popleft()]
        while (
            isinstance(batch[0][0], AppendRequest)
            and connection.to_acceptor
            and isinstance(connection.to_acceptor[0][0], AppendRequest)
            and self.rng.random() < 0.5
        ):
            batch.append(connection.to_acceptor.popleft())
        try:
            connection.to_proposer += node.handle(connection.session, batch)
        except PowerLossError:
            node.restart()
        except ConsensusError:
            # The shell ends the session; requests of the batch accepted before stay unflushed.
            connection.to_acceptor.clear()
            if proposer is not None:
                proposer.disconnect(index)
        self.check_acceptor(node)

    def deliver_to_proposer(
        self, connection: Connection, proposer: ProposerNode, index: int
    ) -> None:
        """Deliver the next answer."""
        if connection.to_proposer:
            proposer.perform(proposer.core.receive(index, connection.to_proposer.popleft()))

    def heal(self) -> None:
        """No more faults: one new compute must get everything committed and more."""
        self.power_loss = 0.0
        self.zombies.clear()
        for node in self.nodes:
            self.restart(node)
        self._numbers += 1
        last = ProposerNode(self, self._numbers)
        self.proposers = [last]
        written = len(self.committed)
        for _ in range(400):
            for index in range(len(self.nodes)):
                connection = last.connections[index]
                if connection is None or connection.generation != connection.node.generation:
                    last.disconnect(index)
                    last.connect(index)
                    continue
                self.deliver_to_acceptor(connection, last, index)
                self.deliver_to_proposer(connection, last, index)
                last.send_wal(index)
                if not connection.to_acceptor and not connection.to_proposer:
                    last.heartbeat(index)
            assert last.alive
            if last.campaign_due:
                last.campaign_due = False
                last.perform(last.core.campaign())
            if len(last.wal) < 6:
                last.write()
            done = last.wal and last.core.commit_lsn == last.end
            if done and all(n.acceptor.commit_lsn == last.end for n in self.nodes):
                break
        else:
            raise AssertionError("no progress although nothing is broken any more")
        assert len(self.committed) > written
        assert len({tuple(node.disk.units(START, last.end)) for node in self.nodes}) == 1

    # ---- promises

    def check_leader(self, proposer: ProposerNode) -> None:
        """One leader per term, and it has everything that was ever committed."""
        core = proposer.core
        assert self.leaders.setdefault(core.term, proposer) is proposer, "two leaders in a term"
        if any(term > core.term for term in self.leaders):
            return  # learns of its votes late: what was committed since is not for it to know
        if core.bootstrap:
            assert not self.committed, "bootstrap over committed WAL"
        else:
            committed_end = START + len(self.committed) * UNIT
            assert core.epoch_start_lsn >= committed_end, "committed WAL lost in an election"

    def check_commit(self, proposer: ProposerNode) -> None:
        """What a leader takes for committed is what everybody ever took for committed."""
        lsn = proposer.core.commit_lsn
        for node, peer in zip(self.nodes, proposer.core.peers, strict=True):
            if peer.flush_lsn < lsn:
                continue
            assert node.acceptor.flush_lsn >= lsn, "acknowledged WAL lost"
            units = node.disk.units(START, lsn)
            known = self.committed[: len(units)]
            assert units[: len(known)] == known, "committed WAL changed"
            self.committed += units[len(known) :]

    def check_acceptor(self, node: AcceptorNode) -> None:
        """Logs match up to their commit LSNs; the live state never runs ahead of the disk."""
        acceptor, disk = node.acceptor, node.disk
        assert acceptor.commit_lsn <= max(acceptor.flush_lsn, acceptor.state.commit_lsn)
        assert acceptor.state.term == disk.state.term
        if acceptor.commit_lsn > START:
            units = disk.units(START, acceptor.commit_lsn)
            assert units == self.committed[: len(units)], "an acceptor commits something else"
            assert len(units) <= len(self.committed)
