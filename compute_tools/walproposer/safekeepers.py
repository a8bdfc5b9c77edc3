"""The sessions with all safekeepers: connecting for ever, sending WAL, catching laggards up.

A safekeeper that keeps pace gets WAL straight from Postgres' stream (_relay.pyx). One that does
not (its socket is full, it was away) holds at most one unsent message here; what it lacks is read
back from pg_wal or from another safekeeper, so nobody's slowness costs memory.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from compute_tools.walproposer._link import Link, LinkError
from compute_tools.walproposer._quorum import Peer, PeerState
from compute_tools.walproposer._relay import Member, Relay
from compute_tools.walproposer.config import Config
from compute_tools.walproposer.core import Action, Announced, Phase, Proposer, Send
from compute_tools.walproposer.link import copy_data_header, open_session
from compute_tools.walproposer.loop import EventLoop
from compute_tools.walproposer.member_log import MemberLog
from compute_tools.walproposer.wal_source import PgWalReader, RecoveryReader
from zenith_utils.pq_client import PqError
from zenith_utils.safekeeper_messages import (
    APPEND_HEADER_SIZE,
    MAX_SEND_SIZE,
    MessageError,
    parse_acceptor_message,
)

_RETRY_FIRST: Final = 0.05
_RETRY_MOST: Final = 1.0
# A session that has lasted so long was a good one: after its end there is no reason to wait.
_SETTLED: Final = 5.0
_SILENCE: Final = 15.0
_RECOVERY_RETRY: Final = 0.2
_COPY_DONE: Final = b"c\0\0\0\4"


class Safekeeper(Member):
    """One safekeeper: its address, the session if there is one, and the reader helping it."""

    def __init__(self, index: int, address: tuple[str, int], peer: Peer) -> None:
        super().__init__(peer)
        self.index = index
        self.address = address
        self.trouble = ""
        """Why there is no session, or why the last one ended."""
        self.connecting = False
        self.retry_at = 0.0
        self.retry_delay = _RETRY_FIRST
        self.connected_at = math.inf
        self.heard_at = 0.0
        self.log = MemberLog(str(self))
        self.recovery: RecoveryReader | None = None
        self.recovery_at = 0.0
        self.recovery_failures = 0
        """Since a recovery got on: the next one asks another safekeeper."""

    def __str__(self) -> str:
        return f"safekeeper {self.address[0]}:{self.address[1]}"

    def back_off(self, now: float) -> None:
        """A session, or an attempt at one, is over: when to try again.

        The pauses get longer until a session has lasted: one that accepts us and fails each time
        (its disk is full) is not driven to do that as fast as it can.
        """
        if now - self.connected_at >= _SETTLED:
            self.retry_delay = _RETRY_FIRST
        self.connected_at = math.inf
        self.retry_at = now + self.retry_delay
        self.retry_delay = min(2 * self.retry_delay, _RETRY_MOST)


class SafekeeperPool:
    """All safekeepers of the timeline."""

    def __init__(
        self,
        config: Config,
        core: Proposer,
        loop: EventLoop,
        on_actions: Callable[[Iterable[Action]], None],
        on_feedback: Callable[[], None],
        before_sending: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_actions` gets the core's actions other than Send and Announced.

        `on_feedback` is called when a pageserver's feedback has changed, `before_sending` before
        the core's messages are sent.
        """
        self._config = config
        self._core = core
        self._loop = loop
        self._on_actions = on_actions
        self.on_feedback = on_feedback
        self._before_sending = before_sending
        self._pg_wal = PgWalReader(config.pgdata) if config.pgdata is not None else None
        self.members = [
            Safekeeper(i, address, core.peers[i]) for i, address in enumerate(config.safekeepers)
        ]
        self.relay = Relay(loop, core, tuple(self.members), self)

    # ---- sessions

    def connect_missing(self, now: float) -> bool:
        """Begin to connect to whoever is away and due; whether anybody is away."""
        away = False
        for member in self.members:
            if member.link is None:
                away = True
                if not member.connecting and now >= member.retry_at:
                    self._connect(member)
        return away

    def _connect(self, member: Safekeeper) -> None:
        member.connecting = True
        options = self._config.session_options
        pageserver = self._config.pageserver_connstr

        def work() -> Callable[[], None]:
            try:
                sock, received = open_session(member.address, options, pageserver)
            except (PqError, OSError) as e:
                reason = str(e)
                return lambda: self._connect_failed(member, reason)
            return lambda: self._connected(member, sock, received)

        self._loop.in_thread(f"connect-{member.index}", work)

    def _connect_failed(self, member: Safekeeper, reason: str) -> None:
        member.connecting = False
        member.trouble = reason
        member.log.cannot_connect(reason)
        member.back_off(time.monotonic())

    def _connected(self, member: Safekeeper, sock: socket.socket, received: bytes) -> None:
        link = Link(self._loop, sock, self._core, member.index, self)
        member.connecting = False
        member.link = link
        member.connected_at = member.heard_at = time.monotonic()
        member.log.connected()
        self.perform(self._core.connected(member.index))
        try:
            if received and not link.closed:
                link.feed(received)
        except (LinkError, MessageError) as e:
            self.on_link_error(link, str(e))

    def _drop(self, member: Safekeeper, reason: str) -> None:
        link = member.link
        if link is None:
            return
        member.log.lost(reason)
        link.close()
        member.link = None
        member.trouble = reason
        self._stop_recovery(member)
        self._core.disconnected(member.index)
        member.back_off(time.monotonic())

    def drop_silent(self, now: float) -> None:
        """End sessions that answer no heartbeats: the peer or the network is stuck."""
        idle = (PeerState.GREETED, PeerState.VOTED)  # nothing was asked but greetings
        for member in self.members:
            member.log.tick()
            link = member.link
            quiet = member.peer.state in idle and not self._core.awaits_greeting(member.index)
            if quiet or (link is not None and link.heard):
                member.heard_at = now
                if link is not None:
                    link.heard = False
            elif link is not None and now - member.heard_at > _SILENCE:
                self._drop(member, f"no answer for {_SILENCE:.0f} s")

    # ---- events

    def on_message(self, link: Link, payload: bytes) -> None:
        """A safekeeper has sent something that is to be thought about. Raises MessageError."""
        member = self._member(link)
        self.perform(self._core.receive(member.index, parse_acceptor_message(payload)))

    def on_link_error(self, link: Link, reason: str) -> None:
        """A session has failed."""
        if not link.closed:
            self._drop(self._member(link), reason)

    def _member(self, link: Link) -> Safekeeper:
        return next(member for member in self.members if member.link is link)

    def perform(self, actions: Sequence[Action]) -> None:
        """Carry out actions of the core."""
        self._before_sending()
        rest = []
        for action in actions:
            if isinstance(action, Send):
                payload = action.message.encode()  # type: ignore[union-attr]
                self._send(self.members[action.peer], copy_data_header(len(payload)) + payload)
            elif isinstance(action, Announced):
                member = self.members[action.peer]
                member.log.following(member.peer.next_lsn)
                self._stop_recovery(member)
                self._heartbeat(member)
            else:
                rest.append(action)
        if rest:
            self._on_actions(rest)

    # ---- sending

    def heartbeat(self) -> None:
        """Tell the commit LSN to everybody who is not busy with WAL, and have them answer."""
        for member in self.members:
            if member.peer.state is PeerState.STREAMING and member.link is not None:
                self._heartbeat(member)
        self.relay.told_commit = self._core.commit_lsn

    def _heartbeat(self, member: Safekeeper) -> None:
        if member.link is not None and not member.link.pending:
            lsn = member.peer.next_lsn
            self._send(member, self._append_message(lsn, lsn))

    def _append_message(self, begin_lsn: int, end_lsn: int, data: bytes = b"") -> bytes:
        header = copy_data_header(APPEND_HEADER_SIZE + end_lsn - begin_lsn)
        return header + self._core.append_header(begin_lsn, end_lsn) + data

    def _send(self, member: Safekeeper, message: bytes) -> None:
        if member.link is None:
            return
        try:
            member.link.send(message)
        except LinkError as e:
            self._drop(member, str(e))

    # ---- catching up

    def pump(self, end_lsn: int, now: float) -> bool:
        """Send one piece of WAL below `end_lsn` to each laggard; whether more can be sent now."""
        more = False
        for member in self.members:
            peer, link = member.peer, member.link
            if (
                peer.next_lsn < end_lsn
                and link is not None
                and peer.state is PeerState.STREAMING
                and not link.pending
                and self._pump(member, end_lsn, now)
            ):
                more = True
            if peer.next_lsn >= end_lsn:
                member.log.caught_up(peer.next_lsn)
        return more

    def _pump(self, member: Safekeeper, end_lsn: int, now: float) -> bool:
        lsn = member.peer.next_lsn
        data: bytes | None = None
        if member.recovery is not None:
            data = member.recovery.take()
            if data is None and member.recovery.finished:
                error = member.recovery.error
                if error is not None:
                    member.log.recovery_failed(error)
                    member.recovery_at = now + _RECOVERY_RETRY
                    member.recovery_failures += 1
                self._stop_recovery(member)
        elif self._core.phase is Phase.LEADER and lsn >= self._core.epoch_start_lsn:
            data = self._read_pg_wal(lsn, min(end_lsn - lsn, MAX_SEND_SIZE))
            if data is not None:
                member.log.behind(lsn, end_lsn, "the compute's pg_wal")
        if data is None:
            if member.recovery is None and now >= member.recovery_at:
                self._start_recovery(member, end_lsn, now)
            return False
        member.recovery_failures = 0
        for offset in range(0, len(data), MAX_SEND_SIZE):
            piece = data[offset : offset + MAX_SEND_SIZE]
            begin = member.peer.next_lsn
            member.peer.next_lsn = begin + len(piece)
            self._send(member, self._append_message(begin, begin + len(piece), piece))
        return True

    def _read_pg_wal(self, lsn: int, size: int) -> bytes | None:
        return None if self._pg_wal is None else self._pg_wal.read(lsn, size)

    def _start_recovery(self, member: Safekeeper, end_lsn: int, now: float) -> None:
        """Have a safekeeper that holds what `member` lacks stream it to us."""
        core = self._core
        lsn = member.peer.next_lsn
        sources = [s for s in core.sources(member.index) if self.members[s].link is not None]
        if sources:
            # Each has removed WAL on its own: what one has not any more another may have.
            source = sources[member.recovery_failures % len(sources)]
            have = core.peers[source].flush_lsn
            if source == core.donor:
                have = max(have, core.epoch_start_lsn)
            member.log.behind(lsn, end_lsn, str(self.members[source]), tell=True)
            member.recovery = RecoveryReader(
                self.members[source].address,
                # Of our term only: it would serve the WAL of another leader otherwise.
                f"{self._config.session_options} zterm={core.term}",
                lsn,
                min(have, end_lsn),
                lambda: self._loop.post(lambda: None),
            )
            return
        member.recovery_at = now + _RECOVERY_RETRY

    def _stop_recovery(self, member: Safekeeper) -> None:
        if member.recovery is not None:
            member.recovery.cancel()
            member.recovery = None

    # ---- the end

    def have_all(self, lsn: int) -> int:
        """How many safekeepers have been sent everything below `lsn`."""
        return sum(
            member.link is not None
            and member.peer.state is PeerState.STREAMING
            and member.peer.next_lsn >= lsn
            and not member.link.pending
            for member in self.members
        )

    def say_goodbye(self) -> None:
        """Tell the last commit LSN and end the sessions in order."""
        self.heartbeat()
        for member in self.members:
            if member.link is not None:
                self._send(member, _COPY_DONE)

    def all_gone(self) -> bool:
        """Whether every safekeeper has processed our goodbye or is away."""
        return all(member.link is None or member.link.finished for member in self.members)
