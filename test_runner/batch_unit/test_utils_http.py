"""The HTTP server: bodies, errors, access log and stopping."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from zenith_utils.daemonize import bind_listener
from zenith_utils.http_server import (
    Forbidden,
    HttpServer,
    NotFound,
    Request,
    Response,
    Route,
    Unauthorized,
    json_response,
    metrics_route,
)
from zenith_utils.metrics import Metrics

TENANT = "0123456789abcdef0123456789abcdef"


class Api:
    """Handlers of every kind of outcome."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def routes(self) -> list[Route]:
        """All of them, by path."""
        tenant = "/v1/tenant/{tenant_id}"
        return [
            Route("GET", "/v1/status", lambda _: {"id": 7}),
            Route("GET", tenant, lambda r: [str(r.tenant_id()), "flag" in r.query]),
            Route("POST", tenant, lambda r: json_response(r.json_object(), 201)),
            Route("GET", tenant + "/timeline/{timeline_id}", self.timeline),
            Route("POST", "/conflict", lambda _: Response(409)),
            Route("GET", "/bug", self.bug),
            Route("GET", "/slow", self.slow),
            Route("GET", "/secret", lambda r: r.context["user"]),
            metrics_route(Metrics("pageserver")),
        ]

    def timeline(self, request: Request) -> object:
        """Never finds anything."""
        raise NotFound(f"no timeline {request.timeline_id()}")

    def bug(self, _: Request) -> object:
        """An error with a cause."""
        raise RuntimeError("outermost") from ValueError("inner")

    def slow(self, _: Request) -> object:
        """Waits to be released."""
        self.entered.set()
        self.release.wait(10)
        return "done"


def authorize(request: Request) -> None:
    if request.path != "/secret":
        return
    if "authorization" not in request.headers:
        raise Unauthorized("missing authorization header")
    if request.headers["authorization"] != "Bearer t":
        raise Forbidden("wrong token")
    request.context["user"] = "u"


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def url(api: Api) -> Iterator[str]:
    sock = bind_listener("127.0.0.1:0")
    server = HttpServer(sock, api.routes(), before=authorize, shutdown_timeout=5)
    port = sock.getsockname()[1]
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "expected"),
    [
        ("GET", "/v1/status", None, 200, {"id": 7}),
        ("GET", f"/v1/tenant/{TENANT}", None, 200, [TENANT, False]),
        ("GET", f"/v1/tenant/{TENANT}?flag", None, 200, [TENANT, True]),
        ("POST", f"/v1/tenant/{TENANT}", "", 201, {}),
        ("POST", f"/v1/tenant/{TENANT}", '{"a": null}', 201, {"a": None}),
        ("POST", "/conflict", None, 409, None),
        ("GET", "/v1/tenant/xyz", None, 400, "Bad request: failed to parse tenant_id"),
        (
            "GET",
            f"/v1/tenant/{TENANT}/timeline/1",
            None,
            400,
            "Bad request: failed to parse timeline_id",
        ),
        (
            "GET",
            f"/v1/tenant/{TENANT}/timeline/{TENANT}",
            None,
            404,
            f"NotFound: no timeline {TENANT}",
        ),
        ("GET", "/nowhere", None, 404, "page not found"),
        ("DELETE", "/v1/status", None, 404, "page not found"),
        ("GET", "/bug", None, 500, "outermost"),
    ],
)
def test_answers(
    url: str, method: str, path: str, body: str | None, status: int, expected: object
) -> None:
    response = requests.request(method, url + path, data=body, timeout=10)
    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/json"
    is_message = isinstance(expected, str)
    assert response.json() == ({"msg": expected} if is_message else expected)


def test_bad_json(url: str) -> None:
    response = requests.post(f"{url}/v1/tenant/{TENANT}", data="{", timeout=10)
    assert response.status_code == 400
    assert response.json()["msg"].startswith("Bad request: Failed to parse json request ")


def test_hook_before_handlers(url: str) -> None:
    missing = requests.get(f"{url}/secret", timeout=10)
    assert (missing.status_code, missing.json()) == (
        401,
        {"msg": "Unauthorized: missing authorization header"},
    )
    wrong = requests.get(f"{url}/secret", headers={"Authorization": "Bearer x"}, timeout=10)
    assert (wrong.status_code, wrong.json()) == (403, {"msg": "Forbidden: wrong token"})
    right = requests.get(f"{url}/secret", headers={"AUTHORIZATION": "Bearer t"}, timeout=10)
    assert (right.status_code, right.json()) == (200, "u")


def test_metrics_and_access_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zenith_utils.http_server"):
        response = requests.get(f"{url}/metrics?x=1", timeout=10)
        requests.get(f"{url}/nowhere", timeout=10)
    assert response.headers["Content-Type"].startswith("text/plain")
    assert "\npageserver_maxrss_kb " in response.text
    assert [record.getMessage() for record in caplog.records] == [
        "GET /metrics 200",
        "GET /nowhere 404",
    ]


def test_stop_lets_a_request_finish(api: Api) -> None:
    sock = bind_listener("127.0.0.1:0")
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = HttpServer(sock, api.routes(), shutdown_timeout=5)
    server.start()
    with ThreadPoolExecutor(2) as pool, requests.Session() as idle:
        idle.get(f"{url}/v1/status", timeout=10)  # stays connected, must not hold up the stop
        answer = pool.submit(requests.get, f"{url}/slow", timeout=10)
        assert api.entered.wait(10)
        stopping = pool.submit(server.stop)
        api.release.set()
        assert answer.result(10).json() == "done"
        stopping.result(10)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/v1/status", timeout=10)
    server.stop()
