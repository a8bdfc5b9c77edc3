"""A proxy inside the test's process, a target that the test controls, and clients byte by byte."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Self

from fixtures.utils import wait_until

from proxy.messages import message, startup_packet
from proxy.server import ProxyServer

TIMEOUT = 20.0
SSL_REQUEST = bytes([0, 0, 0, 8, 4, 210, 22, 47])
GSSENC_REQUEST = bytes([0, 0, 0, 8, 4, 210, 22, 48])
READY = message(b"Z", b"I")
AUTHENTICATION_OK = message(b"R", bytes(4))
TARGET_KEY = b"\0\0\0\x2asecr"


class Peer:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        self.sock = sock

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.sock.sendall(data)

    def send_message(self, kind: bytes, payload: bytes = b"") -> None:
        """Send a message."""
        self.send(message(kind, payload))

    def read(self, count: int) -> bytes:
        """Wait for exactly so many bytes."""
        data = b""
        while len(data) < count:
            chunk = self.sock.recv(count - len(data))
            assert chunk, f"closed after {data!r}"
            data += chunk
        return data

    def read_message(self) -> tuple[bytes, bytes]:
        """Wait for a message: type and payload."""
        header = self.read(5)
        return header[:1], self.read(int.from_bytes(header[1:], "big") - 4)

    def read_error(self) -> dict[str, str]:
        """Wait for an ErrorResponse, and for the end behind it: its fields."""
        kind, payload = self.read_message()
        assert kind == b"E", (kind, payload)
        assert self.at_end()
        return {field[:1].decode(): field[1:].decode() for field in payload.split(b"\0") if field}

    def at_end(self) -> bool:
        """Whether the other side ends the connection next; waits for what comes."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def half_close(self) -> None:
        """Send no more."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Vanish."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


class Client(Peer):
    """A client of the proxy."""

    def start_up(self, parameters: Mapping[bytes, bytes] | None = None) -> None:
        """Send a start-up packet, that of user u and database d unless told otherwise."""
        if parameters is None:
            parameters = {b"user": b"u", b"database": b"d"}
        self.send(startup_packet(parameters))

    def send_password(self, password: bytes = b"secret") -> None:
        """Wait for the request of a cleartext password, and answer."""
        assert self.read_message() == (b"R", b"\0\0\0\3")
        self.send_message(b"p", password + b"\0")

    def log_in(self) -> None:
        """Tell everything; the target does not have to have answered."""
        self.start_up()
        self.send_password()

    def encrypt(self, certificate: str) -> None:
        """Ask for TLS and get it."""
        self.send(SSL_REQUEST)
        assert self.read(1) == b"S"
        context = ssl.create_default_context(cafile=certificate)
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")


class Target(Peer):
    """A server's side of a session with the proxy."""

    def read_startup(self) -> dict[bytes, bytes]:
        """Wait for the start-up packet: its parameters."""
        length = int.from_bytes(self.read(4), "big")
        packet = self.read(length - 4)
        assert packet[:4] == b"\0\3\0\0"
        fields = packet[4:-2].split(b"\0")
        return dict(zip(fields[::2], fields[1::2], strict=True))

    def let_in(self, greeting: bytes = b"") -> dict[bytes, bytes]:
        """Take a client without a password; its parameters."""
        parameters = self.read_startup()
        self.send(AUTHENTICATION_OK + greeting + message(b"K", TARGET_KEY) + READY)
        return parameters


class World:
    """A proxy, and the listening socket of its target."""

    def __init__(self, tls: ssl.SSLContext | None = None, **settings: float) -> None:
        self.target_listener = socket.create_server(("127.0.0.1", 0))
        self.target_listener.settimeout(TIMEOUT)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        address = self.target_listener.getsockname()
        self.server = ProxyServer(listener, address, tls=tls, **settings)  # type: ignore[arg-type]
        self.server.start()

    def client(self) -> Client:
        """A new connection to the proxy."""
        return Client(socket.create_connection(("127.0.0.1", self.port)))

    def target(self) -> Target:
        """Wait for the proxy to connect to the target."""
        return Target(self.target_listener.accept()[0])

    def closed_at_rest(self) -> int:
        """How many connections are over, once those of earlier tests are."""
        traffic = self.server.traffic
        wait_until(lambda: traffic.closed == traffic.accepted, what="earlier sessions to be over")
        return traffic.closed

    @contextlib.contextmanager
    def session(self) -> Iterator[tuple[Client, Target, bytes]]:
        """Both sides of an established session, and the client's cancel key."""
        with self.client() as client:
            client.log_in()
            with self.target() as target:
                target.let_in()
                assert client.read_message() == (b"R", bytes(4))
                kind, key = client.read_message()
                assert kind == b"K"
                assert client.read_message() == (b"Z", b"I")
                yield client, target, key


@contextlib.contextmanager
def running_world(tls: ssl.SSLContext | None = None, **settings: float) -> Iterator[World]:
    """A world, ended with the block."""
    world = World(tls, **settings)
    try:
        yield world
    finally:
        world.server.stop()
        world.target_listener.close()
