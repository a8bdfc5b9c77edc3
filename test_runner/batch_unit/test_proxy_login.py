"""Logins through the proxy: what clients may send, what they must not, what targets answer."""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.proxy_support import (
    AUTHENTICATION_OK,
    GSSENC_REQUEST,
    READY,
    SSL_REQUEST,
    TARGET_KEY,
    World,
    running_world,
)
from fixtures.certificate import write_certificate
from fixtures.utils import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scramp import ScramMechanism

from proxy.authentication import Authentication
from proxy.messages import error_response, message, startup_packet


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as running:
        yield running


@pytest.fixture(scope="module")
def tls_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    key, certificate = write_certificate(tmp_path_factory.mktemp("tls"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running_world(context) as running:
        yield running, str(certificate)


def test_greeting(world: World) -> None:
    """The client gets the target's settings and notices as they are, and a key of the proxy."""
    with world.client() as client:
        client.start_up({b"user": b"u\xff", b"database": b"d", b"options": b"-c a=b", b"x": b""})
        client.send_password()
        with world.target() as target:
            status = message(b"S", b"server_version\x0015.4\0")
            notice = message(b"N", b"SNOTICE\0Mhello\0\0")
            assert target.let_in(notice + status) == {
                b"client_encoding": b"UTF8",
                b"user": b"u\xff",
                b"database": b"d",
                b"options": b"-c a=b",
                b"x": b"",
            }
            assert client.read_message() == (b"R", bytes(4))
            assert client.read(len(notice + status)) == notice + status
            kind, key = client.read_message()
            assert kind == b"K"
            assert len(key) == 8
            assert key != TARGET_KEY
            assert int.from_bytes(key[:4], "big", signed=True) > 0
            assert client.read_message() == (b"Z", b"I")


def test_client_chooses_its_encoding(world: World) -> None:
    """UTF8 is only what a client gets that does not say otherwise."""
    with world.client() as client:
        client.start_up({b"user": b"u", b"database": b"d", b"client_encoding": b"LATIN1"})
        client.send_password()
        with world.target() as target:
            assert target.let_in()[b"client_encoding"] == b"LATIN1"


def test_newer_protocol(world: World) -> None:
    """A client that asks for more is told what there is, and the options do not go on."""
    with world.client() as client:
        packet = startup_packet({b"user": b"u", b"database": b"d", b"_pq_.a": b"1"})
        client.send(packet[:4] + b"\0\3\0\2" + packet[8:])
        assert client.read_message() == (b"v", b"\0\3\0\0\0\0\0\1_pq_.a\0")
        client.send_password()
        with world.target() as target:
            assert b"_pq_.a" not in target.let_in()
            assert client.read_message() == (b"R", bytes(4))


def test_encryption_is_declined_without_a_certificate(world: World) -> None:
    """Clients that may go on unencrypted do, each kind of request is declined once."""
    with world.client() as client:
        for request in (GSSENC_REQUEST, SSL_REQUEST):
            client.send(request)
            assert client.read(1) == b"N"
        client.log_in()
        with world.target() as target:
            assert target.let_in()[b"user"] == b"u"
    with world.client() as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"N"
        client.send(SSL_REQUEST)
        assert client.at_end()


def test_bytes_sent_ahead(world: World) -> None:
    """Neither what a client sends before it is let in is lost, nor what a target sends early."""
    early = message(b"A", b"\0\0\0\1channel\0payload\0")
    with world.client() as client:
        client.start_up()
        query = message(b"Q", b"SELECT 1\0")
        client.send(message(b"p", b"secret\0") + query * 3)
        with world.target() as target:
            target.read_startup()
            target.send(AUTHENTICATION_OK + READY + early)
            assert target.read(3 * len(query)) == query * 3
            assert client.read_message() == (b"R", bytes(3) + b"\3")
            assert client.read_message() == (b"R", bytes(4))
            assert client.read_message()[0] == b"K"
            assert client.read(len(READY + early)) == READY + early


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({b"database": b"d"}, "no PostgreSQL user name specified in startup packet"),
        ({b"user": b"", b"database": b"d"}, "no PostgreSQL user name specified"),
        ({b"user": b"u"}, "no database name specified in startup packet"),
        ({}, "no PostgreSQL user name specified"),
    ],
)
def test_user_and_database_are_needed(
    world: World, parameters: dict[bytes, bytes], said: str
) -> None:
    """Without them there is nothing to log in to."""
    with world.client() as client:
        client.start_up(parameters)
        error = client.read_error()
        assert said in error["M"]
        assert (error["S"], error["V"], error["C"]) == ("FATAL", "FATAL", "28000")


@pytest.mark.parametrize(
    ("version", "said"),
    [(b"\0\2\0\0", "protocol 2.0"), (b"\0\4\0\1", "protocol 4.1"), (b"HTTP", "unsupported")],
)
def test_other_protocols(world: World, version: bytes, said: str) -> None:
    """Another major version is refused."""
    with world.client() as client:
        client.send(b"\0\0\0\x10" + version + bytes(8))
        error = client.read_error()
        assert said in error["M"]
        assert error["C"] == "0A000"


@pytest.mark.parametrize(
    "packet",
    [
        b"\0\0\0\7",
        b"\0\0\x27\x11",
        b"\xff\xff\xff\xff",
        b"\x16\3\1\2\0\1\0",
        b"GET / HTTP/1.1\r\n\r\n",
        SSL_REQUEST[:3] + b"\x0c" + SSL_REQUEST[4:] + b"more",
    ],
)
def test_garbage_instead_of_a_startup_packet(world: World, packet: bytes) -> None:
    """Whoever does not speak the protocol gets no answer."""
    with world.client() as client:
        client.send(packet)
        assert client.at_end()


@pytest.mark.parametrize(
    "fields", [b"", b"user", b"user\0", b"user\0u\0", b"user\0\0", b"\0u\0\0", b"user\0u\0\0x"]
)
def test_startup_packet_that_is_cut_off(world: World, fields: bytes) -> None:
    """Fields that do not end as they must are refused."""
    with world.client() as client:
        client.send((8 + len(fields)).to_bytes(4, "big") + b"\0\3\0\0" + fields)
        error = client.read_error()
        assert error["M"] == "invalid startup packet layout"
        assert error["C"] == "08P01"


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(min_size=1, max_size=64))
def test_anything_may_come_from_clients(world: World, data: bytes) -> None:
    """Random bytes, alone or in the place of the password, end their connection and no more."""
    with world.client() as client:
        client.send(data)
        client.half_close()
        while not client.at_end():
            pass
    with world.client() as client:
        client.start_up()
        client.read_message()
        client.send(data.replace(b"p", b"q"))
        client.half_close()
        while not client.at_end():
            pass


def test_clients_that_leave(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A client may leave at any point of its login, however it does so."""
    whole = startup_packet({b"user": b"u", b"database": b"d"})
    with caplog.at_level(logging.WARNING):
        closed = world.closed_at_rest()
        for size in range(len(whole)):
            client = world.client()
            client.send(whole[:size])
            if size % 2:
                client.reset()
            else:
                client.sock.close()
        wait_until(
            lambda: world.server.traffic.closed == closed + len(whole), what="all to be gone"
        )
    assert not caplog.records
    with world.session():
        pass


def connected(world: World, client_port: int) -> bool:
    """Whether the proxy's end of a client's connection is established, as the kernel sees it."""
    ends = f"0100007F:{world.port:04X} 0100007F:{client_port:04X} 01"
    return ends in Path("/proc/net/tcp").read_text()


@pytest.mark.parametrize("let_in", [True, False])
def test_client_that_vanishes_while_the_target_decides(
    world: World, caplog: pytest.LogCaptureFixture, let_in: bool
) -> None:
    """Nobody is there for what the target says then, and its session ends."""
    with caplog.at_level(logging.ERROR):
        closed = world.closed_at_rest()
        client = world.client()
        client_port = client.sock.getsockname()[1]
        client.log_in()
        with world.target() as target:
            target.read_startup()
            # While it waits for the target the proxy notices.
            client.reset()
            wait_until(lambda: not connected(world, client_port), what="the proxy to notice")
            if let_in:
                target.send(AUTHENTICATION_OK + READY + b"early")
            else:
                target.send(error_response("no", "28000"))
            assert target.at_end()
        wait_until(lambda: world.server.traffic.closed == closed + 1, what="it to be over")
    assert not caplog.records


@pytest.mark.parametrize(
    ("answer", "sqlstate", "said"),
    [
        (message(b"p", b"\0"), "28P01", "empty password"),
        (message(b"p", b""), "08P01", "invalid password packet size"),
        (message(b"p", b"secret"), "08P01", "invalid password packet size"),
        (message(b"p", b"sec\0ret\0"), "08P01", "invalid password packet size"),
        (message(b"Q", b"SELECT 1\0"), "08P01", "expected password response"),
        (b"p\0\0\0\3", "08P01", "invalid message length 3"),
        (b"p\0\1\0\1", "08P01", "invalid message length 65537"),
        (b"p\xff\xff\xff\xff", "08P01", "invalid message length"),
    ],
)
def test_answers_that_are_no_password(
    world: World, answer: bytes, sqlstate: str, said: str
) -> None:
    """They are refused before the target hears of the client."""
    with world.client() as client:
        client.start_up()
        client.read_message()
        client.send(answer)
        error = client.read_error()
        assert said in error["M"]
        assert error["C"] == sqlstate


def test_longest_password(world: World) -> None:
    """As long as Postgres allows, and it reaches the target."""
    password = bytes(range(1, 256)) * 256
    with world.client() as client:
        client.start_up()
        client.send_password(password)
        with world.target() as target:
            target.read_startup()
            target.send_message(b"R", b"\0\0\0\3")
            assert target.read_message() == (b"p", password + b"\0")


def test_md5(world: World) -> None:
    """The answer to a salt is what Postgres computes."""
    with world.client() as client:
        client.log_in()
        with world.target() as target:
            target.read_startup()
            target.send_message(b"R", b"\0\0\0\5salt")
            inner = hashlib.md5(b"secretu").hexdigest().encode()
            expected = b"md5" + hashlib.md5(inner + b"salt").hexdigest().encode() + b"\0"
            assert target.read_message() == (b"p", expected)


def scram_until_final(world: World, end: str) -> dict[str, str]:
    """A login by SCRAM whose end the target spoils (`end`); the error that the client gets."""
    mechanism = ScramMechanism("SCRAM-SHA-256")
    server = mechanism.make_server(lambda _: mechanism.make_auth_info("secret"))
    with world.client() as client:
        client.log_in()
        with world.target() as target:
            target.read_startup()
            target.send_message(b"R", b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
            _, first = target.read_message()
            name, _, rest = first.partition(b"\0")
            assert name == b"SCRAM-SHA-256"
            assert int.from_bytes(rest[:4], "big") == len(rest) - 4
            server.set_client_first(rest[4:].decode())
            server_first = server.get_server_first()
            if end == "another nonce":
                server_first = "r=" + "x" * 40 + server_first[server_first.index(",s=") :]
            target.send_message(b"R", b"\0\0\0\x0b" + server_first.encode())
            if end != "another nonce":
                server.set_client_final(target.read_message()[1].decode())
                final = server.get_server_final()
                if end == "no proof":
                    target.send(AUTHENTICATION_OK + READY)
                else:
                    target.send_message(b"R", b"\0\0\0\x0cv=" + b"A" * (len(final) - 3) + b"=")
            error = client.read_error()
            assert target.at_end()
            return error


@pytest.mark.parametrize(
    ("password", "hashed"),
    [
        (b"secret", b"secret"),
        (b"bell \x07", b"bell \x07"),
        (b"p\xffw", b"p\xffw"),
        ("p😀w".encode(), "p😀w".encode()),
        ("₿".encode(), "₿".encode()),
        ("a\u0627".encode(), "a\u0627".encode()),
        ("\u0627a\u0627".encode(), "\u0627a\u0627".encode()),
        ("\u06271\u0627".encode(), "\u06271\u0627".encode()),
        ("é\x07".encode(), "é\x07".encode()),
        ("\u00ad".encode(), "\u00ad".encode()),
        ("e\u0301 \u00adⅨ\u00a0x\u200b".encode(), "é IX x ".encode()),
    ],
)
def test_every_password_is_prepared_as_by_postgres(password: bytes, hashed: bytes) -> None:
    """SASLprep (pg_saslprep) where it can be done, else the password as it is."""
    keys = hashlib.pbkdf2_hmac("sha256", hashed, bytes(16), 4096)
    stored = hashlib.sha256(hmac.digest(keys, b"Client Key", "sha256")).digest()
    known = (bytes(16), stored, hmac.digest(keys, b"Server Key", "sha256"), 4096)
    server = ScramMechanism("SCRAM-SHA-256").make_server(lambda _: known)
    login = Authentication(b"u", password)
    first = login.answer(b"\0\0\0\x0aSCRAM-SHA-256\0\0")
    server.set_client_first(first[first.index(b"n,,") :].decode())
    proof = login.answer(b"\0\0\0\x0b" + server.get_server_first().encode())
    server.set_client_final(proof[5:].decode())
    login.answer(b"\0\0\0\x0c" + server.get_server_final().encode())
    assert login.answer(bytes(4)) == b""


@pytest.mark.parametrize("end", ["no proof", "wrong proof", "another nonce"])
def test_target_that_does_not_know_the_password(world: World, end: str) -> None:
    """SCRAM is mutual: somebody in the target's place who cannot prove to know it is left."""
    error = scram_until_final(world, end)
    assert "cannot log in to the target" in error["M"]
    assert "SCRAM" in error["M"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"\0\0\0\7", "asks for the method GSSAPI"),
        (b"\0\0\0\x63", "asks for the method 99"),
        (b"\0\0\0\x0aSCRAM-SHA-512\0OAUTHBEARER\0\0", "SCRAM-SHA-512, OAUTHBEARER"),
        (b"\0\0\0\x0bv=x", "asks for the method 11"),
    ],
)
def test_methods_the_proxy_cannot_answer(world: World, request_: bytes, said: str) -> None:
    """The client is told what the target asks for."""
    with world.client() as client:
        client.log_in()
        with world.target() as target:
            target.read_startup()
            target.send_message(b"R", request_)
            assert said in client.read_error()["M"]


@pytest.mark.parametrize("after", [b"", AUTHENTICATION_OK, AUTHENTICATION_OK + READY[:3]])
def test_target_that_leaves(world: World, after: bytes) -> None:
    """The client is told that, wherever in the login it happens."""
    with world.client() as client:
        client.log_in()
        with world.target() as target:
            target.read_startup()
            target.send(after)
        error = client.read_error()
        assert "cannot log in to the target" in error["M"]
        assert error["C"] == "08001"


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n", message(b"T", b""), AUTHENTICATION_OK + b"D\0\0\0\4"]
)
def test_target_that_is_no_server(world: World, said: bytes) -> None:
    """What is no login is an error."""
    with world.client() as client:
        client.log_in()
        with world.target() as target:
            target.read_startup()
            target.send(said)
            error = client.read_error()
            assert "cannot log in to the target" in error["M"]
            assert target.at_end()


def test_errors_of_the_target_are_handed_on(world: World) -> None:
    """Whole, whenever in the login they come."""
    response = error_response("no, thank you\nnot today", "53300")
    for before in (b"", AUTHENTICATION_OK, AUTHENTICATION_OK + message(b"S", b"a\0b\0")):
        with world.client() as client:
            client.log_in()
            with world.target() as target:
                target.read_startup()
                target.send(before + response)
            assert client.read(len(response)) == response
            assert client.at_end()


def test_silence_is_not_waited_for() -> None:
    """A client that says nothing, or no password, or a target that does not answer."""
    with running_world(startup_timeout=0.3) as world:
        with world.client() as client:
            assert client.at_end()
        with world.client() as client:
            client.send(b"\0\0")
            assert client.at_end()
    # What comes before must have time.
    with running_world(startup_timeout=2.0) as world, world.client() as client:
        client.start_up()
        client.read_message()
        assert client.read_error()["C"] == "57014"
    with running_world(login_timeout=0.3) as world, world.client() as client:
        client.log_in()
        with world.target():
            error = client.read_error()
            assert "no answer within 0.3 s" in error["M"]
            assert error["C"] == "08001"


def test_name_that_does_not_exist() -> None:
    """A target that cannot be found is an error of each login, not of the start."""
    from proxy.server import ProxyServer

    listener = socket.create_server(("127.0.0.1", 0))
    server = ProxyServer(listener, ("host.invalid", 5432))
    server.start()
    try:
        with running_world() as world:
            world.port = listener.getsockname()[1]
            with world.client() as client:
                client.log_in()
                assert "cannot connect to the target host.invalid:5432" in client.read_error()["M"]
    finally:
        server.stop()


def test_tls_only(tls_world: tuple[World, str]) -> None:
    """With a certificate a client that does not encrypt is refused before it tells its password."""
    world, certificate = tls_world
    with world.client() as client:
        client.send(GSSENC_REQUEST)
        assert client.read(1) == b"N"
        client.start_up()
        assert "sslmode=require" in client.read_error()["M"]
    with world.client() as client:
        client.encrypt(certificate)
        client.log_in()
        with world.target() as target:
            target.let_in()
            assert client.read_message() == (b"R", bytes(4))


def test_unencrypted_bytes_behind_the_request(tls_world: tuple[World, str]) -> None:
    """What somebody in between has slipped in is not taken for encrypted (CVE-2021-23214)."""
    world, _ = tls_world
    with world.client() as client:
        client.send(SSL_REQUEST + startup_packet({b"user": b"evil", b"database": b"d"}))
        assert client.at_end()


def test_failed_handshakes(tls_world: tuple[World, str], caplog: pytest.LogCaptureFixture) -> None:
    """Clients that break off or send something else are logged in a line each."""
    world, certificate = tls_world
    closed = world.closed_at_rest()
    with caplog.at_level(logging.WARNING):
        for said in (b"no TLS at all, but long enough", b""):
            with world.client() as client:
                client.send(SSL_REQUEST)
                assert client.read(1) == b"S"
                client.send(said)
        with world.client() as client:
            client.encrypt(certificate)
            client.send(SSL_REQUEST)
            assert client.at_end()
        wait_until(lambda: world.server.traffic.closed == closed + 3, what="all to be gone")
    assert not [record for record in caplog.records if record.exc_info]
    assert "TLS handshake failed" in caplog.text
    assert "repeated encryption request" in caplog.text
