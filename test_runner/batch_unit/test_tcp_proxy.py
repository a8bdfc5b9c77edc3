"""The TCP proxy of the tests does to connections what it is told, and nothing else."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest
from fixtures.ports import PortDistributor
from fixtures.tcp_proxy import Direction, TcpProxy
from fixtures.utils import wait_until


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets."""

    def handle(self) -> None:
        """Until the end of the input."""
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


class EchoServer(socketserver.ThreadingTCPServer):
    """Ends with the test, whatever its clients do."""

    allow_reuse_address = True
    daemon_threads = True


@pytest.fixture
def proxy(port_distributor: PortDistributor) -> Iterator[TcpProxy]:
    """A proxy before an echo server."""
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        target = ("127.0.0.1", server.server_address[1])
        try:
            with TcpProxy(port_distributor.get_port(), target) as proxy:
                yield proxy
        finally:
            server.shutdown()
            thread.join()


def connect(proxy: TcpProxy) -> socket.socket:
    """A client whose connection the proxy has taken."""
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    assert exchange(sock, b"hello") == b"hello"
    return sock


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """What comes back for `data`."""
    threading.Thread(target=sock.sendall, args=(data,)).start()
    return receive(sock, len(data))


def receive(sock: socket.socket, size: int) -> bytes:
    """`size` bytes."""
    got = b""
    while len(got) < size:
        data = sock.recv(size - len(got))
        assert data, "the connection has ended"
        got += data
    return got


def is_silent(sock: socket.socket) -> bool:
    """Whether nothing arrives for a while."""
    return not select.select([sock], [], [], 0.2)[0]


def test_forwards_everything(proxy: TcpProxy) -> None:
    data = random.Random(1).randbytes(3_000_000)
    with connect(proxy) as sock, connect(proxy) as other:
        assert exchange(sock, data) == data
        assert exchange(other, b"abc") == b"abc"
        # The end of one direction goes through, and what is under way in the other one comes.
        sock.sendall(b"last words")
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock, 10) == b"last words"
        assert sock.recv(1) == b""
    wait_until(lambda: proxy.connections == 0, what="the connections to end")


@pytest.mark.parametrize("reset", [True, False])
def test_cut(proxy: TcpProxy, reset: bool) -> None:
    with connect(proxy) as sock:
        assert proxy.cut(reset=reset) == 1
        if reset:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        else:
            assert sock.recv(1) == b""
    with connect(proxy):
        pass


@pytest.mark.parametrize("direction", [Direction.TO_SERVER, Direction.TO_CLIENT, None])
def test_stall(proxy: TcpProxy, direction: Direction | None) -> None:
    """What is stalled comes later, all of it; a new connection stalls, too."""
    with connect(proxy) as sock:
        proxy.stall(*([direction] if direction else []))
        sock.sendall(b"late")
        assert is_silent(sock)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as new:
            new.sendall(b"new")
            assert is_silent(new)
            proxy.resume()
            assert receive(new, 3) == b"new"
        assert receive(sock, 4) == b"late"


def test_stall_of_the_other_direction(proxy: TcpProxy) -> None:
    """The server gets, and answers, what the client sends while the answers are held."""
    seen = bytearray()

    def watch(direction: Direction, data: bytes) -> bytes:
        if direction is Direction.TO_SERVER:
            seen.extend(data)
        return data

    with connect(proxy) as sock:
        proxy.tamper(watch)
        proxy.stall(Direction.TO_CLIENT)
        sock.sendall(b"through")
        wait_until(lambda: seen == b"through", what="the bytes to go through")
        assert is_silent(sock)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_refuse(proxy: TcpProxy) -> None:
    with connect(proxy) as sock:
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    proxy.resume()
    with connect(proxy):
        pass


def test_server_away(proxy: TcpProxy, port_distributor: PortDistributor) -> None:
    """Whose server does not listen is reset."""
    proxy.target = ("127.0.0.1", port_distributor.get_port())
    # The reset may come before the connection is known to be there.
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as sock,
    ):
        sock.recv(1)


def test_delay_and_limit(proxy: TcpProxy) -> None:
    """Slow, but whole and in order."""
    data = random.Random(2).randbytes(60_000)
    with connect(proxy) as sock:
        proxy.delay(0.3)
        begin = time.monotonic()
        sock.sendall(b"later")
        assert receive(sock, 5) == b"later"
        assert time.monotonic() - begin >= 0.6  # both ways
        proxy.resume()
        proxy.limit(100_000)
        begin = time.monotonic()
        sock.sendall(data)
        assert receive(sock, len(data)) == data
        assert time.monotonic() - begin >= 0.4
        proxy.resume()


def test_tamper(proxy: TcpProxy) -> None:
    def change(direction: Direction, data: bytes) -> bytes:
        return data.replace(b"a", b"b") if direction is Direction.TO_CLIENT else data

    with connect(proxy) as sock:
        proxy.tamper(change)
        assert exchange(sock, b"banana") == b"bbnbnb"
        proxy.tamper(None)
        assert exchange(sock, b"banana") == b"banana"
