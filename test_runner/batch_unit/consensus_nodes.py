"""The machines of the consensus simulator: acceptors with disks, computes with proposers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compute_tools.walproposer import core as real_core
from compute_tools.walproposer._quorum import PeerState
from compute_tools.walproposer.membership import Membership
from safekeeper import consensus as real_consensus
from safekeeper.consensus import ControlState
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    AcceptorMessage,
    AppendRequest,
    MessageError,
    ProposerGreeting,
    ProposerMessage,
    VoteRequest,
    VoteResponse,
)

if TYPE_CHECKING:
    from batch_unit.consensus_simulator import Simulation

TENANT = TenantId(bytes(16))
TIMELINE = TimelineId(bytes(15) + b"\1")
START = 0x1000100
UNIT = 8
RECORD = 2 * UNIT

Unit = tuple[int, int]
"""A piece of WAL: (term that wrote it, serial number)."""


class PowerLossError(Exception):
    """An acceptor dies here."""


@dataclass(frozen=True)
class Rules:
    """The modules under test: the real ones, or copies with a rule broken."""

    core: ModuleType = real_core
    consensus: ModuleType = real_consensus


@dataclass(slots=True)
class Disk:
    """What survives a power loss: control state and synced WAL, from `first` on."""

    state: ControlState
    wal: list[Unit]
    first: int = START
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


def record_end(lsn: int) -> int:
    """End of the last complete record at or below."""
    return START + (lsn - START) // RECORD * RECORD


class AcceptorNode:
    """An acceptor with its disk."""

    def __init__(self, simulation: Simulation, instance: bytes) -> None:
        self.simulation = simulation
        self.instance = instance
        self.disk = Disk(simulation.rules.consensus.ControlState(TENANT, TIMELINE), [])
        self.starts = 0
        self.losses = 0
        """How often it has lost what it had acknowledged."""
        self.checked_commit = 0
        self._load(0)

    def _load(self, flush_lsn: int) -> None:
        self.starts += 1
        self.checked_commit = 0
        self.acceptor = self.simulation.rules.consensus.Acceptor(
            self.disk.state, flush_lsn, self.instance
        )

    def restart(self) -> None:
        """Power loss: unsynced WAL is gone, or a part of it."""
        disk = self.disk
        if not disk.state.commit_lsn:
            self._keep(0)
        else:
            self._keep(self.simulation.rng.randint(disk.synced, len(disk.wal)))

    def _keep(self, count: int) -> None:
        disk = self.disk
        if not disk.state.commit_lsn:
            disk.wal, disk.synced, flush = [], 0, 0
        else:
            flush = record_end(disk.first + count * UNIT)
            disk.wal = disk.units(disk.first, flush)
            disk.synced = len(disk.wal)
        self._load(flush)

    def damage(self, keep_from: int) -> None:
        """The control file is lost and with it all, or WAL behind `keep_from` or later."""
        self.losses += 1
        disk, rng = self.disk, self.simulation.rng
        kept = max(0, keep_from - disk.first) // UNIT
        if rng.random() < 0.5 or not disk.state.commit_lsn or kept > len(disk.wal):
            blank = self.simulation.rules.consensus.ControlState
            disk.state = blank(TENANT, TIMELINE, recovering=True)
            disk.first, disk.wal = START, []
            self._keep(0)
        else:
            disk.state = replace(disk.state, recovering=True)
            self._keep(rng.randint(kept, len(disk.wal)))

    def carry_out(self, actions: Iterable[Any]) -> list[AcceptorMessage]:
        """Carry out actions, perhaps dying before any of them."""
        replies: list[AcceptorMessage] = []
        consensus = self.simulation.rules.consensus
        for action in actions:
            self.simulation.maybe_lose_power()
            kind = type(action)
            if kind is consensus.Reply:
                replies.append(action.message)
            elif kind is consensus.Persist:
                self.disk.state = action.state
            else:
                self._truncate(action.lsn)
        return replies

    def _truncate(self, lsn: int) -> None:
        disk = self.disk
        if not self.acceptor.flush_lsn or not disk.wal or not disk.first < lsn <= disk.end:
            disk.first, disk.wal = lsn, []
        disk.wal = disk.units(disk.first, lsn)
        disk.synced = len(disk.wal)

    def handle(
        self, session: Any, batch: Sequence[tuple[ProposerMessage, Sequence[Unit]]]
    ) -> list[AcceptorMessage]:
        """Handle a message, or a batch of AppendRequests."""
        acceptor = self.acceptor
        message = batch[0][0]
        if isinstance(message, ProposerGreeting):
            return self.carry_out(acceptor.greet(session, message))
        if isinstance(message, VoteRequest):
            acceptor.needed_lsn = self.simulation.feedback.ps_flushlsn
            return self.carry_out(acceptor.vote(session, message))
        if not isinstance(message, AppendRequest):
            return self.carry_out(acceptor.elected(session, message))
        for request, units in batch:
            refusal = acceptor.append(session, request)
            if refusal is not None:
                return [refusal.message]
            if units:
                assert isinstance(request, AppendRequest)
                assert self.disk.end == request.begin_lsn, "write with a gap"
                self.disk.wal += units
            self.simulation.maybe_lose_power()
        self.disk.synced = len(self.disk.wal)
        flush = record_end(self.disk.end) if self.disk.wal else acceptor.flush_lsn
        return self.carry_out(acceptor.flushed(flush, feedback=self.simulation.feedback))

    def snapshot(self) -> list[Unit]:
        """Its WAL from START on, with what is committed for what it does not have."""
        disk = self.disk
        if not self.acceptor.flush_lsn:
            return []
        before = self.simulation.committed[: (disk.first - START) // UNIT]
        return before + disk.units(disk.first, self.acceptor.flush_lsn)


class Connection:
    """A session, as a pair of queues. A broken one may still deliver to the acceptor."""

    __slots__ = ("node", "session", "starts", "to_acceptor", "to_proposer")

    def __init__(self, node: AcceptorNode) -> None:
        self.node = node
        self.starts = node.starts
        self.session = node.simulation.rules.consensus.Session()
        self.to_acceptor: deque[tuple[ProposerMessage, Sequence[Unit]]] = deque()
        self.to_proposer: deque[tuple[AcceptorMessage, Sequence[Unit]]] = deque()

    @property
    def broken(self) -> bool:
        """Whether the acceptor has been restarted, or replaced, since."""
        return self.starts != self.node.starts


class ProposerNode:
    """A compute: proposer and Postgres."""

    def __init__(
        self, simulation: Simulation, number: int, slots: Sequence[int], membership: Membership
    ) -> None:
        self.simulation = simulation
        self.slots = slots
        self.core = simulation.rules.core.Proposer(
            real_core.Identity(TENANT, TIMELINE, number.to_bytes(16, "big")),
            len(slots),
            membership,
        )
        self.connections: list[Connection | None] = [None] * len(slots)
        self.cut: set[int] = set()
        """Safekeepers on the other side of a partition."""
        self.alive = True
        self.campaign_due = False
        self.checked_term = 0
        self.checked_commit = 0
        self._snapshots: list[Sequence[Unit]] = [()] * len(slots)
        self.log: list[Unit] = []
        """WAL of this leader from START on: the donor's, then what Postgres wrote."""

    @property
    def end(self) -> int:
        """End of the WAL that this leader knows of."""
        return START + len(self.log) * UNIT

    def node(self, index: int) -> AcceptorNode:
        """Who answers at the address of a safekeeper now."""
        return self.simulation.slots[self.slots[index]]

    def connect(self, index: int) -> None:
        """Open a session."""
        self.connections[index] = Connection(self.node(index))
        self.perform(self.core.connected(index))

    def disconnect(self, index: int) -> None:
        """Lose a session; what was under way to the acceptor may still arrive."""
        connection = self.connections[index]
        if connection is not None:
            if connection.to_acceptor and not connection.broken:
                self.simulation.zombies.append(connection)
            self.connections[index] = None
            self.core.disconnected(index)

    def receive(self, index: int, message: AcceptorMessage, units: Sequence[Unit]) -> None:
        """An answer arrives."""
        if isinstance(message, VoteResponse):
            self._snapshots[index] = units
        try:
            self.perform(self.core.receive(index, message))
        except MessageError:
            self.disconnect(index)

    def perform(self, actions: Iterable[Any]) -> None:
        """Carry out actions of the core."""
        for action in actions:
            self._perform(action)
        core = self.core
        if core.term != self.checked_term and core.phase.value != "campaign":
            self.checked_term = core.term
            self.log = [] if core.donor is None else list(self._snapshots[core.donor])
            self.simulation.check_leader(self)
        if core.commit_lsn != self.checked_commit:
            self.simulation.check_commit(self)

    def _perform(self, action: Any) -> None:
        core = self.simulation.rules.core
        kind = type(action)
        if kind is core.Send:
            connection = self.connections[action.peer]
            if connection is not None:
                connection.to_acceptor.append((action.message, ()))
        elif kind is core.Announced:
            self.heartbeat(action.peer)
        elif kind is core.CampaignFailed:
            self.campaign_due = True
        else:
            assert kind in (core.Defeated, core.Outdated)
            self.simulation.counts[kind.__name__] += 1
            self.alive = False

    def append_request(self, begin_lsn: int, end_lsn: int) -> AppendRequest:
        """What arrives of the message with the WAL of a range."""
        core = self.core
        return AppendRequest(
            core.term,
            core.epoch_start_lsn,
            begin_lsn,
            end_lsn,
            core.commit_lsn,
            core.truncate_lsn,
            core.identity.proposer_id,
        )

    def heartbeat(self, index: int) -> None:
        """Send an empty AppendRequest."""
        connection = self.connections[index]
        peer = self.core.peers[index]
        if connection is not None and peer.state is PeerState.STREAMING:
            request = self.append_request(peer.next_lsn, peer.next_lsn)
            connection.to_acceptor.append((request, ()))

    def send_wal(self, index: int) -> None:
        """Send some of what a peer lacks, from where the real driver would take it."""
        connection, peer = self.connections[index], self.core.peers[index]
        if connection is None or peer.state is not PeerState.STREAMING:
            return
        lsn = peer.next_lsn
        if lsn < self.core.epoch_start_lsn:
            units = self._recover(index, lsn)
        else:
            begin = (lsn - START) // UNIT
            units = self.log[begin : begin + self.simulation.rng.randint(1, 5)]
        if units:
            peer.next_lsn = lsn + len(units) * UNIT
            connection.to_acceptor.append((self.append_request(lsn, peer.next_lsn), units))

    def _recover(self, index: int, lsn: int) -> list[Unit]:
        for source in self.core.sources(index):
            node = self.node(source)
            end = min(node.acceptor.flush_lsn, self.core.epoch_start_lsn)
            if node.acceptor.state.term == self.core.term and node.disk.first <= lsn < end:
                units = node.disk.units(lsn, end)
                return units[: self.simulation.rng.randint(1, 5)]
        return []

    def write(self) -> None:
        """Postgres starts, then writes."""
        core = self.core
        if core.phase.value == "elected" and core.synced:
            self.perform(core.start(core.epoch_start_lsn or START))
        if core.phase.value == "leader":
            for _ in range(2 * self.simulation.rng.randint(1, 3)):
                self.log.append((core.term, self.simulation.serial()))
