"""The HTTP server against clients that are wrong, slow, many, or no HTTP clients at all."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import socket
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from batch_unit.walproposer_support import wait_until

from zenith_utils import http_server
from zenith_utils.daemonize import bind_listener
from zenith_utils.http_connection import HttpConnection
from zenith_utils.http_server import (
    MAX_BODY,
    HttpServer,
    Request,
    Response,
    Route,
    json_response,
    metrics_route,
)
from zenith_utils.metrics import Metrics

TENANT = "0123456789abcdef0123456789abcdef"
LOGGER = "zenith_utils.http_server"
MAX_CONNECTIONS = 8
ASKS_FOR_BIG = b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 2
BEGINS_TO_POST = (
    b"POST /v1/tenant HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
)
BIG_ANSWER = b"x" * (16 << 20)


class Server:
    """A server whose requests can be made to wait."""

    def __init__(self, **options: Any) -> None:
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()
        metrics = Metrics("pageserver")
        sock = bind_listener("127.0.0.1:0")
        self.port = int(sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        routes = [
            Route("GET", "/v1/status", lambda _: {"id": 7}, quick=True),
            Route("GET", "/v1/tenant/{tenant_id}", lambda r: str(r.tenant_id())),
            Route("POST", "/v1/tenant", lambda r: json_response(r.json_object(), 201)),
            Route("GET", "/slow", self.slow),
            Route("GET", "/lost", self.lost),
            Route("GET", "/big", lambda _: Response(200, BIG_ANSWER)),
            metrics_route(metrics),
        ]
        self.http = HttpServer(sock, routes, metrics=metrics, **options)
        self.http.start()

    def slow(self, _: Request) -> str:
        """Waits to be released."""
        self.entered.release()
        assert self.release.wait(30)
        return "done"

    def lost(self, _: Request) -> str:
        """Loses a connection of its own."""
        raise ConnectionResetError("another server has gone")

    def connect(self, data: bytes = b"") -> socket.socket:
        """A client that has sent no more than this."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(data)
        return sock

    def answer(self, data: bytes) -> tuple[int, Any]:
        """Status and JSON body of the answer to these bytes, after which the server hangs up."""
        with self.connect(data) as sock:
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
        assert b"application/json" in head
        return int(head.split()[1]), json.loads(body)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Server]:
    server = Server(**options)
    try:
        yield server
    finally:
        server.release.set()
        server.http.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def test_bodies_have_a_limit(server: Server) -> None:
    """However they are sent; what is just below is taken."""
    longest = json.dumps({"a": ""})
    longest = json.dumps({"a": "x" * (MAX_BODY - len(longest))})
    assert len(longest) == MAX_BODY
    url = f"{server.url}/v1/tenant"
    assert requests.post(url, data=longest, timeout=10).status_code == 201
    for body in (longest + " ", iter([longest.encode(), b" "])):
        response = requests.post(url, data=body, timeout=10)
        assert response.status_code == 413
        assert response.json() == {
            "msg": "Payload too large: a request may have 65536 bytes at most"
        }


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{", "Expecting property name"),
        (b"[" * 10_000, "maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
        (b"\xff\xfe{", "codec can't decode"),
        (b"[]", "expected an object"),
        (b'"x"', "expected an object"),
        (b"null", "expected an object"),
    ],
)
def test_malformed_json(server: Server, body: bytes, detail: str) -> None:
    response = requests.post(f"{server.url}/v1/tenant", data=body, timeout=10)
    assert response.status_code == 400
    message = response.json()["msg"]
    assert message.startswith("Bad request: Failed to parse json request ")
    assert detail in message


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "no type at all", ""])
def test_any_content_type_is_json(server: Server, content_type: str) -> None:
    response = requests.post(
        f"{server.url}/v1/tenant",
        data='{"a": 1}',
        headers={"Content-Type": content_type},
        timeout=10,
    )
    assert (response.status_code, response.json()) == (201, {"a": 1})


def test_malformed_compression(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Content-Encoding": "gzip"}
    response = requests.post(f"{server.url}/v1/tenant", data="{}", headers=headers, timeout=10)
    assert response.status_code == 400
    assert response.json()["msg"].startswith("Bad request: malformed body")
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "method", ["HEAD", "OPTIONS", "TRACE", "PATCH", "PUT", "DELETE", "PROPFIND"]
)
def test_methods_that_are_not_there(server: Server, method: str) -> None:
    response = requests.request(method, f"{server.url}/v1/status", timeout=10)
    assert response.status_code == 404
    if method != "HEAD":
        assert response.json() == {"msg": "page not found"}


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/v1/%73tatus", 200, {"id": 7}),
        ("/v1/tenant/%30" + TENANT[1:], 200, TENANT),
        ("/v1/tenant/" + TENANT.upper(), 200, TENANT),
        ("/v1/tenant/%ff", 400, {"msg": "Bad request: failed to parse tenant_id"}),
        ("/v1/tenant/%00" + TENANT, 400, {"msg": "Bad request: failed to parse tenant_id"}),
        ("/v1/tenant/" + "a" * 5000, 400, {"msg": "Bad request: failed to parse tenant_id"}),
        ("/v1/tenant/a%2Fb", 400, {"msg": "Bad request: failed to parse tenant_id"}),
        ("/v1/status/", 404, {"msg": "page not found"}),
        ("//v1/status", 404, {"msg": "page not found"}),
        ("/", 404, {"msg": "page not found"}),
    ],
)
def test_paths(server: Server, path: str, status: int, answer: object) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert server.answer(request.encode()) == (status, answer)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS",
        b"hello\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/tenant HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_http(server: Server, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused in a few words, and no stranger can fill the log with it."""
    with caplog.at_level(logging.INFO):
        status, answer = server.answer(data)
    assert status == 400
    assert list(answer) == ["msg"]
    assert answer["msg"].startswith("Bad request: ")
    assert not caplog.records


def test_log_lines_cannot_be_forged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        requests.get(f"{server.url}/x%0A2026-11-22%20FATAL?secret=1", timeout=10)
    assert [record.getMessage() for record in caplog.records] == ["GET /x%0A2026-11-22%20FATAL 404"]


def test_expectations(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """One is met; what else may be asked for is refused as everything is that is refused."""
    head = b"POST /v1/tenant HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
    with server.connect(head + b"Expect: 100-Continue\r\n\r\n") as sock:
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert read_all(sock).startswith(b"HTTP/1.1 201 ")
    with caplog.at_level(logging.INFO, LOGGER):
        status, answer = server.answer(head + b"Expect: a miracle\r\n\r\n{}")
    assert (status, answer) == (417, {"msg": "Expectation failed: not known: a miracle"})
    assert "POST /v1/tenant 417" in caplog.messages


def test_requests_are_counted() -> None:
    """By route and status; what strangers ask for adds no series."""
    with serving() as server:
        for path in (f"/v1/tenant/{TENANT}", "/v1/tenant/x", "/v1/tenant/y", "/a", "/b"):
            requests.get(server.url + path, timeout=10)
        text = requests.get(f"{server.url}/metrics", timeout=10).text
    prefix = "pageserver_http_requests_count"
    assert {line for line in text.splitlines() if line.startswith(prefix)} == {
        prefix + '{method="GET",path="/v1/tenant/{tenant_id}",status="200"} 1',
        prefix + '{method="GET",path="/v1/tenant/{tenant_id}",status="400"} 2',
        prefix + '{method="",path="unknown",status="404"} 2',
    }


def test_body_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    with serving(body_timeout=0.05) as server, caplog.at_level(logging.INFO, LOGGER):
        head = b"POST /v1/tenant HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        with server.connect(head) as sock:
            answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'{"msg": "Request timeout: the body did not arrive within 0.05 seconds"}' in answer
    assert caplog.messages == ["POST /v1/tenant 408"]


def test_client_that_leaves_in_the_middle(caplog: pytest.LogCaptureFixture) -> None:
    """It is no failure of the server."""
    with serving() as server, caplog.at_level(logging.INFO, LOGGER):
        head = b"POST /v1/tenant HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        server.connect(head).close()
        wait_until(lambda: "gone" in caplog.text, "the log to tell of it")
        assert requests.get(f"{server.url}/v1/status", timeout=10).json() == {"id": 7}
    assert "POST /v1/tenant: the client has gone" in caplog.messages
    assert not [record for record in caplog.records if record.exc_info]


def test_connections_that_a_handler_loses(server: Server) -> None:
    """They are no reason not to answer."""
    response = requests.get(f"{server.url}/lost", timeout=10)
    assert (response.status_code, response.json()) == (500, {"msg": "another server has gone"})


@pytest.mark.parametrize("data", [b"", b"GET /v1/status HTTP/1.1\r\nHo", b"GET"])
def test_idle_connections_make_room(data: bytes) -> None:
    """As many clients as there may be connections keep nobody out; who is served stays."""
    with serving(max_connections=MAX_CONNECTIONS) as server, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(requests.get, f"{server.url}/slow", timeout=30)
        assert server.entered.acquire(timeout=30)
        with contextlib.ExitStack() as idle:
            socks = [idle.enter_context(server.connect(data)) for _ in range(3 * MAX_CONNECTIONS)]
            assert requests.get(f"{server.url}/v1/status", timeout=30).json() == {"id": 7}
            # The oldest have gone.
            assert socks[0].recv(1) == b""
        server.release.set()
        assert slow.result().json() == "done"


def test_no_room_among_the_busy(caplog: pytest.LogCaptureFixture) -> None:
    with (
        serving(max_connections=2, workers=2) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        slow = [pool.submit(requests.get, f"{server.url}/slow", timeout=30) for _ in range(2)]
        for _ in slow:
            assert server.entered.acquire(timeout=30)
        with caplog.at_level(logging.WARNING), server.connect() as sock:
            assert sock.recv(1) == b""
        server.release.set()
        assert [future.result().json() for future in slow] == ["done", "done"]
        assert requests.get(f"{server.url}/v1/status", timeout=30).json() == {"id": 7}
    # A task of asyncio that has failed tells of it when it is collected.
    gc.collect()
    assert "2 HTTP connections: closing a new one" in caplog.messages
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("data", [ASKS_FOR_BIG, BEGINS_TO_POST], ids=["answer", "body"])
def test_who_waits_for_nothing_but_a_client_makes_room(data: bytes) -> None:
    """Clients that do not read their answers, or do not send all of a request."""
    with serving(max_connections=2) as server, contextlib.ExitStack() as held:
        for _ in range(2):
            assert held.enter_context(server.connect(data)).recv(1) == b"H"
        assert requests.get(f"{server.url}/v1/status", timeout=20).json() == {"id": 7}


def test_answers_that_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody keeps a connection, and what waits for it, for ever."""
    with serving(write_timeout=0.05) as server, server.connect(ASKS_FOR_BIG) as sock:
        wait_until(lambda: "nobody takes the answer" in caplog.text, "the end of its patience")
        # What the kernel holds may still come.
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(sock)) < len(BIG_ANSWER)


class SlowLink:
    """A connection whose client takes what waits for it as the test says."""

    unsent = 100
    aborted = False

    def get_write_buffer_size(self) -> int:
        """As of an asyncio.Transport."""
        return self.unsent

    def is_closing(self) -> bool:
        """As of an asyncio.Transport: everything is written, and waits."""
        return True

    def close(self) -> None:
        """As of an asyncio.Transport: nothing, as long as something waits."""

    def abort(self) -> None:
        """As of an asyncio.Transport."""
        self.aborted = True


def test_answers_that_are_taken_slowly() -> None:
    """It may take for ever, as long as there is some progress: a look every 10 seconds here."""
    clock = itertools.count(0, 10)
    loop: Any = types.SimpleNamespace(time=lambda: next(clock))
    server: Any = types.SimpleNamespace(request_handler=None, request_factory=None)
    connection = HttpConnection(server, loop=loop, max_connections=1)
    link: Any = SlowLink()
    connection._link = link
    for _ in range(10):
        link.unsent -= 1
        for _ in range(3):
            connection.cut_if_stalled(30)
        assert not link.aborted
    connection.cut_if_stalled(30)
    assert link.aborted


def test_quick_requests_do_not_queue() -> None:
    """Status and metrics are answered when all threads are waiting for something."""
    with serving(workers=1) as server, ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(requests.get, f"{server.url}/slow", timeout=30) for _ in range(2)]
        assert server.entered.acquire(timeout=30)
        assert requests.get(f"{server.url}/v1/status", timeout=30).json() == {"id": 7}
        assert requests.get(f"{server.url}/metrics", timeout=30).status_code == 200
        server.release.set()
        assert [future.result().json() for future in slow] == ["done", "done"]


@pytest.mark.parametrize("data", [b"", b"GET /v1/status HTTP/1.1\r\nHo"])
def test_stop_does_not_wait_for_idle_clients(data: bytes) -> None:
    server = Server(shutdown_timeout=600)
    with server.connect(data) as idle, requests.Session() as kept:
        assert kept.get(f"{server.url}/v1/status", timeout=30).status_code == 200
        stopped = threading.Thread(target=server.http.stop)
        stopped.start()
        stopped.join(30)
        assert not stopped.is_alive()
        assert idle.recv(1) == b""


def test_stop_in_spite_of_a_client_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it holds up: whoever stops goes on."""
    monkeypatch.setattr(http_server, "_STOP_MARGIN", -1.15)
    server = Server(shutdown_timeout=0.6)
    with server.connect(ASKS_FOR_BIG) as sock:
        assert sock.recv(1) == b"H"
        server.http.stop()
    assert "HTTP requests did not end in time" in caplog.text
