"""Sessions through the proxy once they are established: bytes, pauses, ends, cancel requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from batch_unit.proxy_support import TARGET_KEY, Client, Peer, Target, World, running_world
from fixtures.certificate import write_certificate
from fixtures.utils import wait_until

from proxy import server as proxy_server
from proxy.cancellation import CancelKeys
from proxy.endpoint import Endpoint, Traffic, join
from proxy.messages import cancel_packet

MIB = 1 << 20


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as running:
        yield running


def random_bytes(seed: int, size: int) -> bytes:
    """Bytes that are the same for the same seed."""
    return random.Random(seed).randbytes(size)


def send_in_pieces(peer: Peer, data: bytes, seed: int) -> None:
    """Send data in pieces of any size, then end this direction."""
    numbers = random.Random(seed)
    position = 0
    while position < len(data):
        size = numbers.choice((1, 7, 100, 5_000, 70_000, 1_000_000))
        peer.send(data[position : position + size])
        position += size
    peer.half_close()


def read_to_end(peer: Peer) -> bytes:
    """Everything that comes."""
    chunks = []
    while chunk := peer.sock.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def test_both_directions_at_once(world: World) -> None:
    """Every byte arrives in order, and the end of each direction behind its last byte."""
    up, down = random_bytes(1, 12 * MIB), random_bytes(2, 20 * MIB)
    before = world.server.traffic.proxied
    with world.session() as (client, target, _):
        threads = [
            threading.Thread(target=send_in_pieces, args=(client, up, 3)),
            threading.Thread(target=send_in_pieces, args=(target, down, 4)),
        ]
        received: dict[str, bytes] = {}
        threads.append(threading.Thread(target=lambda: received.update(target=read_to_end(target))))
        for thread in threads:
            thread.start()
        received["client"] = read_to_end(client)
        for thread in threads:
            thread.join()
    assert received["client"] == down
    assert received["target"] == up
    assert world.server.traffic.proxied - before == len(up) + len(down)


def kernel_buffer() -> int:
    """How much the kernel may let a buffer of a connection grow."""
    settings = (Path(f"/proc/sys/net/ipv4/tcp_{name}mem").read_text() for name in "rw")
    return max(int(text.split()[2]) for text in settings)


def fill(peer: Peer, limit: int) -> int:
    """Send until nothing more is taken for a while, or it was `limit` bytes; how much was."""
    peer.sock.setblocking(False)
    sent = 0
    while sent < limit and select.select([], [peer.sock], [], 1.0)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += peer.sock.send(bytes(MIB))
    peer.sock.settimeout(20)
    return sent


@pytest.mark.parametrize("writer", ["client", "target"])
def test_nobody_reads(world: World, writer: str) -> None:
    """The writer is made to wait; when the other side reads, all that was sent is there."""
    with world.session() as (client, target, _):
        source, sink = (client, target) if writer == "client" else (target, client)
        # Buffers of the kernel on the way, four of them, and of the proxy.
        limit = 4 * kernel_buffer() + 4 * MIB
        sent = fill(source, limit)
        assert sent < limit
        # The other direction is not held up.
        sink.send(b"still here")
        assert source.read(10) == b"still here"
        source.half_close()
        assert len(read_to_end(sink)) == sent


def test_client_ends_first(world: World) -> None:
    """A client that has said all still gets its answers."""
    with world.session() as (client, target, _):
        client.send(b"last words")
        client.half_close()
        assert read_to_end(target) == b"last words"
        target.send(b"answer")
        target.sock.close()
        assert read_to_end(client) == b"answer"


def test_target_ends_first(world: World) -> None:
    """Its last words arrive even at a client that is sending; then the session is over."""
    with world.session() as (client, target, _):
        client.send(bytes(MIB))
        target.send(b"why")
        # This resets the connection, on which the proxy may still be sending.
        target.sock.close()
        assert client.read(3) == b"why"
        assert client.at_end()


async def endpoint_and_socket(traffic: Traffic) -> tuple[Endpoint, socket.socket]:
    """An end of a session, and the socket of who is there."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        _, endpoint = await loop.create_connection(lambda: Endpoint(traffic), *address)
        sock, _ = listener.accept()
    sock.setblocking(False)
    return endpoint, sock


def test_last_words_before_a_reset() -> None:
    """What a target said arrives if its end is found by a write; its client may go on sending."""

    async def session() -> None:
        loop = asyncio.get_running_loop()
        traffic = Traffic()
        client, client_sock = await endpoint_and_socket(traffic)
        target, target_sock = await endpoint_and_socket(traffic)
        join(client, target)
        # Nothing is read from the target until its connection is reset.
        client.pause_writing()
        target_sock.send(b"why")
        Peer(target_sock).reset()
        with client_sock:
            await loop.sock_sendall(client_sock, b"unheard")
            await target.lost
            assert await loop.sock_recv(client_sock, 100) == b"why"
            assert await loop.sock_recv(client_sock, 100) == b""
            await loop.sock_sendall(client_sock, bytes(MIB))
            assert not client.lost.done()
        await client.lost
        assert traffic.proxied == len(b"why" + b"unheard")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(session(), 20))


def test_client_that_does_not_notice_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not keep the session of a target that has left."""
    monkeypatch.setattr(proxy_server, "_LINGER", 0.2)
    with running_world() as world, world.session() as (client, target, _):
        target.sock.close()
        assert client.at_end()
        wait_until(lambda: world.server.traffic.closed == 1, what="the session to be over")


@pytest.mark.parametrize("who", ["client", "target"])
def test_one_side_vanishes(world: World, who: str) -> None:
    """The other one is closed, also when it was not reading."""
    closed = world.closed_at_rest()
    with world.session() as (client, target, _):
        gone, left = (client, target) if who == "client" else (target, client)
        fill(gone, 4 * MIB)
        gone.reset()
        with contextlib.suppress(ConnectionResetError):
            read_to_end(left)
    wait_until(lambda: world.server.traffic.closed == closed + 1, what="the session to be over")


def cancel(world: World, key: bytes) -> None:
    """Send a cancel request, and wait until it has been taken care of."""
    with world.client() as canceller:
        canceller.send(cancel_packet(key))
        assert canceller.at_end()


def test_cancel(world: World) -> None:
    """A request with the client's key reaches the target with the target's key."""
    with world.session() as (_, _, key):
        canceller = threading.Thread(target=cancel, args=(world, key))
        canceller.start()
        with world.target() as target:
            assert target.read(16) == cancel_packet(TARGET_KEY)
            # The canceller is told when the target has done it, not before.
            canceller.join(0.2)
            assert canceller.is_alive()
        canceller.join()


def test_keys_that_cancel_nothing(world: World) -> None:
    """A wrong secret, the target's own key, the key of a session that is over, half a key."""
    closed = world.closed_at_rest()
    with world.session() as (_, _, key):
        pass
    wait_until(lambda: world.server.traffic.closed == closed + 1, what="the session to be over")
    with world.session() as (client, target, live):
        for made_up in (live[:4] + bytes(4), TARGET_KEY, key, live[:4], live + b"x"):
            cancel(world, made_up)
        world.target_listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            world.target()
        world.target_listener.settimeout(20)
        client.send(b"on")
        assert target.read(2) == b"on"


def test_cancel_keys() -> None:
    """Each session has a key of its own; one is forgotten without the others."""
    keys = CancelKeys()
    issued = [keys.issue(b"%8d" % number) for number in range(1000)]
    assert len({key[:4] for key in issued}) == 1000
    assert [keys.find(key) for key in issued] == [b"%8d" % number for number in range(1000)]
    keys.revoke(issued[7])
    assert keys.find(issued[7]) is None
    assert keys.find(issued[8]) == b"       8"
    # A target that has given none cannot be asked to cancel anything.
    assert keys.find(keys.issue(b"")) is None


def test_too_many_clients() -> None:
    """Those beyond the limit are told so; when others leave there is room again."""
    with running_world(max_sessions=2) as world:
        with world.session(), world.session():
            with world.client() as third:
                error = third.read_error()
                assert error["M"] == "sorry, too many clients already"
                assert error["C"] == "53300"
            assert world.server.traffic.accepted == 3
        wait_until(lambda: world.server.traffic.closed == 3, what="the sessions to be over")
        with world.session():
            pass


def test_stop() -> None:
    """Sessions end, logins are told why, and nobody can connect any more."""
    with running_world() as world:
        with world.session() as (client, target, _), world.client() as other:
            other.start_up()
            other.read_message()
            world.server.stop()
            assert other.read_error()["C"] == "57P01"
            assert read_to_end(client) == b""
            assert read_to_end(target) == b""
        with pytest.raises(ConnectionRefusedError):
            world.client()


def test_nothing_is_logged_for_sessions(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Sessions that come and go are no news, however they end."""
    with caplog.at_level(logging.INFO):
        closed = world.closed_at_rest()
        for number in range(8):
            with world.session() as (client, target, _):
                client.send(bytes(MIB))
                (client if number % 2 else target).reset()
        wait_until(
            lambda: world.server.traffic.closed == closed + 8, what="the sessions to be over"
        )
    assert not caplog.records


@pytest.fixture(scope="module")
def tls_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Path]]:
    key, certificate = write_certificate(tmp_path_factory.mktemp("tls"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running_world(context) as running:
        yield running, certificate


@contextlib.contextmanager
def encrypted_session(tls_world: tuple[World, Path]) -> Iterator[tuple[Client, Target]]:
    """Both sides of a session whose client encrypts."""
    world, certificate = tls_world
    with world.client() as client:
        client.encrypt(str(certificate))
        client.log_in()
        with world.target() as target:
            target.let_in()
            assert [client.read_message()[0] for _ in "RKZ"] == [b"R", b"K", b"Z"]
            yield client, target


def test_encrypted_bytes(tls_world: tuple[World, Path]) -> None:
    """Every byte arrives, in both directions one after another, and the target's end."""
    up, down = random_bytes(5, 6 * MIB), random_bytes(6, 6 * MIB)
    with encrypted_session(tls_world) as (client, target):
        sending = threading.Thread(target=client.send, args=(up,))
        sending.start()
        assert target.read(len(up)) == up
        sending.join()
        sending = threading.Thread(target=target.send, args=(down,))
        sending.start()
        assert client.read(len(down)) == down
        sending.join()
        target.send(b"bye")
        target.sock.close()
        assert read_to_end(client) == b"bye"


def test_encrypted_client_leaves(tls_world: tuple[World, Path]) -> None:
    """Politely or not: the target's connection ends, behind all that the client has sent."""
    with encrypted_session(tls_world) as (client, target):
        client.send(b"last words")
        assert isinstance(client.sock, ssl.SSLSocket)
        client.sock.unwrap()
        assert read_to_end(target) == b"last words"
    with encrypted_session(tls_world) as (client, target):
        client.reset()
        assert read_to_end(target) == b""
