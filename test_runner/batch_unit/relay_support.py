"""Links and a relay with socket pairs for safekeepers and Postgres, and the frames between them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from compute_tools.walproposer._link import Link
from compute_tools.walproposer._quorum import PeerState
from compute_tools.walproposer._relay import Member, Relay
from compute_tools.walproposer.core import Identity, Proposer
from compute_tools.walproposer.loop import EventLoop
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import (
    APPEND_HEADER_SIZE,
    AcceptorGreeting,
    AppendRequest,
    VoteResponse,
    parse_acceptor_message,
    parse_append_request,
)

DEADLINE = 30.0
TERM = 1
START = 0x1000000
PROPOSER = bytes(range(16))


def copy_data(payload: bytes) -> bytes:
    return struct.pack(">BI", ord("d"), len(payload) + 4) + payload


def xlog_data(lsn: int, wal: bytes) -> bytes:
    return copy_data(struct.pack(">cQQq", b"w", lsn, lsn + len(wal), 7) + wal)


def keepalive(reply: bool) -> bytes:
    return copy_data(struct.pack(">cQqB", b"k", START, 7, reply))


END = b"c\0\0\0\4" + b"C\0\0\0\x0bCOPY 0\0"
ERROR = b"E\0\0\0\x14SFATAL\0Mgone away\0"[:21]


def leader() -> Proposer:
    """A leader whose three peers stream."""
    core = Proposer(Identity(TenantId(bytes(16)), TimelineId(bytes(16)), PROPOSER), 3)
    for index in range(3):
        core.connected(index)
        core.receive(index, AcceptorGreeting(0))
    for index in range(3):
        core.receive(index, VoteResponse(TERM, True, 0, 0, ()))
    for index in range(2):
        core.receive(index, AcceptorGreeting(TERM))
    core.start(START)
    assert [peer.state for peer in core.peers] == [PeerState.STREAMING] * 3
    assert [peer.next_lsn for peer in core.peers] == [START] * 3
    return core


class Pool:
    """What stands behind links and relay: members, and a record of what they reported."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.core = leader()
        self.loop = EventLoop()
        self.members = tuple(Member(peer) for peer in self.core.peers)
        self.defeats: list[object] = []
        self.messages: list[bytes] = []
        self.feedbacks = 0
        self.reasons: list[str] = []
        self.ends: list[str] = []
        for index, sock in enumerate(sockets):
            self.members[index].link = Link(self.loop, sock, self.core, index, self)
        self.relay = Relay(self.loop, self.core, self.members, self)

    def link(self, index: int) -> Link:
        """An open link."""
        link = self.members[index].link
        assert link is not None
        return link

    def on_message(self, link: Link, payload: bytes) -> None:
        """As the real one."""
        (index,) = (i for i, member in enumerate(self.members) if member.link is link)
        self.messages.append(payload)
        self.defeats += self.core.receive(index, parse_acceptor_message(payload))

    def on_feedback(self) -> None:
        """Feedback has changed."""
        self.feedbacks += 1

    def on_link_error(self, link: Link, reason: str) -> None:
        """As the real one."""
        (member,) = (member for member in self.members if member.link is link)
        self.reasons.append(reason)
        link.close()
        member.link = None

    def on_stream_end(self) -> None:
        """Postgres has ended."""
        self.ends.append("end")
        self.relay.detach()

    def on_stream_lost(self, reason: str) -> None:
        """Postgres has gone."""
        self.ends.append(reason)
        self.relay.detach()


@contextmanager
def pool_of(count: int, kind: type[Pool] = Pool) -> Iterator[tuple[Pool, list[socket.socket]]]:
    """A pool with links, and their other ends."""
    pairs = [socket.socketpair() for _ in range(count)]
    pool = kind([ours for ours, _ in pairs])
    try:
        yield pool, [theirs for _, theirs in pairs]
    finally:
        pool.relay.detach()
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def raw(end: socket.socket) -> bytes:
    """What waits in a socket."""
    data = b""
    end.setblocking(False)
    try:
        while piece := end.recv(1 << 20):
            data += piece
    except BlockingIOError:
        pass
    return data


def received(end: socket.socket) -> tuple[list[AppendRequest], bytes]:
    """The AppendRequests that wait in a socket, and their WAL."""
    data, requests, wal = raw(end), [], b""
    while data:
        kind, length = struct.unpack_from(">BI", data)
        payload, data = data[5 : length + 1], data[length + 1 :]
        assert kind == ord("d")
        requests.append(parse_append_request(payload))
        assert requests[-1].begin_lsn == START + len(wal)
        wal += payload[APPEND_HEADER_SIZE:]
    return requests, wal


def status_update(lsn: int) -> bytes:
    """A status update without its last nine bytes, the time and a flag."""
    return struct.pack(">BIcQQQ", ord("d"), 38, b"r", lsn, lsn, lsn)


def attach(pool: Pool) -> socket.socket:
    """Postgres' end of a replication stream."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(DEADLINE)
    pool.relay.attach(ours, START, pool)
    return theirs
