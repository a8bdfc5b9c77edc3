"""The HTTP API of a daemon: aiohttp on uvloop in a thread of its own, plain functions as handlers.

A handler takes a Request and returns what is sent as JSON (or a Response). It runs in a thread
pool and may block. An exception becomes ``{"msg": ...}`` with the status of an HttpError, or 500.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import uvloop
from aiohttp import HttpVersion11, web

from zenith_utils.errors import error_message
from zenith_utils.http_connection import (
    WRITE_TIMEOUT,
    BoundedSite,
    HttpConnection,
    default_max_connections,
)
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from zenith_utils.metrics import IntegerMetric, Metrics

logger = logging.getLogger(__name__)

# Bodies are parsed with the interpreter's lock held: a bigger one would be felt by page requests.
MAX_BODY: Final = 64 << 10
BODY_TIMEOUT: Final = 30.0
"""Seconds in which the body of a request has to arrive."""
YAML_CONTENT_TYPE: Final = "text/yaml; charset=utf-8"
HTML_CONTENT_TYPE: Final = "text/html; charset=utf-8"
_UNKNOWN_PATH: Final = "unknown"
_CONTINUE: Final = "100-continue"
# What the end takes beside the waiting for requests, in seconds.
_STOP_MARGIN: Final = 5.0


class HttpError(Exception):
    """Answered with a status and ``{"msg": <prefix><message>}``."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    prefix = ""


class BadRequest(HttpError):
    """400: the request itself is wrong."""

    status = HTTPStatus.BAD_REQUEST
    prefix = "Bad request: "


class Unauthorized(HttpError):
    """401: no or invalid credentials."""

    status = HTTPStatus.UNAUTHORIZED
    prefix = "Unauthorized: "


class Forbidden(HttpError):
    """403: the credentials do not allow this."""

    status = HTTPStatus.FORBIDDEN
    prefix = "Forbidden: "


class NotFound(HttpError):
    """404: the thing asked for does not exist."""

    status = HTTPStatus.NOT_FOUND
    prefix = "NotFound: "


class RequestTimeout(HttpError):
    """408: the request did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    prefix = "Request timeout: "


class ExpectationFailed(HttpError):
    """417: the request asks for something in its header Expect that is not known."""

    status = HTTPStatus.EXPECTATION_FAILED
    prefix = "Expectation failed: "


class PayloadTooLarge(HttpError):
    """413: the body is bigger than any request needs."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    prefix = "Payload too large: "


class _ClientGone(Exception):
    """The connection ended before the request was there; the cause is aiohttp's word for it."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request, fully received."""

    method: str
    path: str
    uri: str
    """Path with the query string, as sent."""
    path_params: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names are matched without regard to case."""
    body: bytes
    context: dict[str, Any] = field(default_factory=dict)
    """For the `before` hook to leave something to the handler."""

    def json(self) -> Any:
        """The body as JSON; BadRequest if it is not."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"Failed to parse json request {error}") from error

    def json_object(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body counts as ``{}``. Raises BadRequest."""
        value = self.json() if self.body.strip() else {}
        if not isinstance(value, dict):
            raise BadRequest("Failed to parse json request expected an object")
        return value

    def tenant_id(self) -> TenantId:
        """The path parameter ``tenant_id``. Raises BadRequest."""
        try:
            return TenantId.parse(self.path_params["tenant_id"])
        except IdParseError as error:
            raise BadRequest("failed to parse tenant_id") from error

    def timeline_id(self) -> TimelineId:
        """The path parameter ``timeline_id``. Raises BadRequest."""
        try:
            return TimelineId.parse(self.path_params["timeline_id"])
        except IdParseError as error:
            raise BadRequest("failed to parse timeline_id") from error


@dataclass(frozen=True, slots=True)
class Response:
    """An answer other than 200 with JSON."""

    status: int = 200
    body: bytes = b"null"
    content_type: str = "application/json"


def json_response(value: Any, status: int = 200) -> Response:
    """An answer with a JSON body."""
    return Response(status, json.dumps(value).encode())


HttpHandler = Callable[[Request], Any]
RequestHook = Callable[[Request], None]


@dataclass(frozen=True, slots=True)
class Route:
    """A method and path such as ``/v1/tenant/{tenant_id}/timeline`` with its handler."""

    method: str
    path: str
    handler: HttpHandler
    quick: bool = False
    """Waits for nothing and nobody: has a thread when all others are taken by requests that do."""


def metrics_route(metrics: Metrics) -> Route:
    """GET /metrics."""

    def serve(_: Request) -> Response:
        return Response(200, metrics.render(), METRICS_CONTENT_TYPE)

    return Route("GET", "/metrics", serve, quick=True)


def documentation_routes(load: Callable[[], Mapping[str, Any]]) -> list[Route]:
    """GET /swagger.yml and /v1/doc: an OpenAPI document as text, and as a page for people.

    `load` makes the document (`openapi.build()`); it is called at the first request, so that its
    parts may be imported only then.
    """

    @functools.cache
    def texts() -> tuple[bytes, bytes]:
        from zenith_utils.openapi_page import to_html
        from zenith_utils.yaml_text import to_yaml

        document = load()
        return to_yaml(document).encode(), to_html(document).encode()

    return [
        Route("GET", "/swagger.yml", lambda _: Response(200, texts()[0], YAML_CONTENT_TYPE)),
        Route("GET", "/v1/doc", lambda _: Response(200, texts()[1], HTML_CONTENT_TYPE)),
    ]


class HttpServer:
    """Serves routes on a bound socket from a thread of its own."""

    def __init__(
        self,
        sock: socket.socket,
        routes: Sequence[Route],
        *,
        name: str = "http",
        before: RequestHook | None = None,
        metrics: Metrics | None = None,
        workers: int = 16,
        shutdown_timeout: float = 10.0,
        body_timeout: float = BODY_TIMEOUT,
        write_timeout: float = WRITE_TIMEOUT,
        max_connections: int | None = None,
    ) -> None:
        """Take over a bound and listening socket.

        `before` runs ahead of every handler and refuses by raising an HttpError. Requests are
        counted in `metrics`. Stopping lets requests that are being answered finish for
        `shutdown_timeout` seconds. A request's body has to arrive within `body_timeout` seconds,
        and some of its answer has to be taken in any `write_timeout` seconds. `max_connections`
        defaults to what the process may open, within reason.
        """
        self._sock = sock
        self._routes = routes
        self._before = before
        self._shutdown_timeout = shutdown_timeout
        self._body_timeout = body_timeout
        self._write_timeout = write_timeout
        self._max_connections = max_connections or default_max_connections()
        self._requests = None if metrics is None else _request_counter(metrics)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"{name}-worker")
        self._quick_pool = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-quick")
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._started: Future[web.AppRunner] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to serve; returns when requests are taken, raises what prevents it."""
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Take no more requests, let the current ones finish, and end the thread.

        Clients that prevent it are told of in the log: whoever stops has more to do.
        """
        if not self._thread.is_alive():
            return
        runner = self._started.result()
        cleanup = asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop)
        try:
            # aiohttp waits twice: for the handler of a request, and for its connection to end.
            cleanup.result(2 * self._shutdown_timeout + _STOP_MARGIN)
        except TimeoutError:
            logger.warning("HTTP requests did not end in time, their connections are cut")
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            for pool in (self._pool, self._quick_pool):
                pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._started.set_result(self._loop.run_until_complete(self._set_up()))
        except BaseException as error:
            self._started.set_exception(error)
        else:
            self._loop.run_forever()
            self._loop.run_until_complete(_finish_tasks())
        finally:
            self._loop.close()

    async def _set_up(self) -> web.AppRunner:
        app = web.Application(middlewares=[self._middleware], client_max_size=MAX_BODY)
        for route in self._routes:
            app.router.add_route(
                route.method, route.path, self._adapt(route), expect_handler=_expect
            )
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=self._shutdown_timeout,
        )
        await runner.setup()
        await BoundedSite(
            runner,
            self._sock,
            max_connections=self._max_connections,
            write_timeout=self._write_timeout,
        ).start()
        return runner

    def _adapt(self, route: Route) -> Callable[[web.Request], Any]:
        pool = self._quick_pool if route.quick else self._pool

        async def handle(request: web.Request) -> web.Response:
            if not _expects_nothing_unknown(request):
                raise ExpectationFailed(f"not known: {request.headers['Expect']}")
            received = Request(
                method=request.method,
                path=request.path,
                uri=request.raw_path,
                path_params=dict(request.match_info),
                query=request.query,
                headers=request.headers,
                body=await self._body(request),
            )
            connection = request.protocol
            assert isinstance(connection, HttpConnection)
            with connection.at_work():
                response = await self._loop.run_in_executor(
                    pool, self._call, route.handler, received
                )
            return _aiohttp_response(response)

        return handle

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._body_timeout):
                return await request.read()
        except TimeoutError:
            seconds = f"{self._body_timeout:g} seconds"
            raise RequestTimeout(f"the body did not arrive within {seconds}") from None
        except web.HTTPRequestEntityTooLarge:
            raise PayloadTooLarge(f"a request may have {MAX_BODY} bytes at most") from None
        except web.RequestPayloadError as error:
            raise BadRequest(f"malformed body: {error}") from error
        except ConnectionError as error:
            raise _ClientGone from error

    def _call(self, handler: HttpHandler, request: Request) -> Response:
        if self._before is not None:
            self._before(request)
        value = handler(request)
        return value if isinstance(value, Response) else json_response(value)

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Any]
    ) -> web.StreamResponse:
        """Errors as JSON, the access log, and the count."""
        # As sent: what is decoded could write lines of its own into the log.
        path = request.rel_url.raw_path
        response: web.StreamResponse
        try:
            response = await handler(request)
        except HttpError as error:
            response = _error_response(error.status, error.prefix + str(error))
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            response = _error_response(HTTPStatus.NOT_FOUND, "page not found")
        except web.HTTPException as error:
            response = _error_response(error.status, error.reason)
        except _ClientGone as gone:
            logger.info("%s %s: the client has gone", request.method, path)
            assert gone.__cause__ is not None
            raise gone.__cause__ from None
        except Exception as error:
            logger.exception("%s %s failed", request.method, path)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            response = _error_response(status, error_message(error))
        logger.info("%s %s %d", request.method, path, response.status)
        self._count(request, response.status)
        return response

    def _count(self, request: web.Request, status: int) -> None:
        if self._requests is not None:
            resource = request.match_info.route.resource
            if resource is None:
                # Neither of these may be chosen by whoever sends requests.
                self._requests.inc("", _UNKNOWN_PATH, str(status))
            else:
                self._requests.inc(request.method, resource.canonical, str(status))


def _expects_nothing_unknown(request: web.Request) -> bool:
    return request.headers.get("Expect", _CONTINUE).lower() == _CONTINUE


async def _expect(request: web.Request) -> None:
    """Let a client go on with its body, RFC 9110 10.1.1; the handler refuses what is not known."""
    # HTTP/1.0 has no such answer.
    if request.version >= HttpVersion11 and _expects_nothing_unknown(request):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # It is no part of the answer, which may still become another one.
        request.writer.output_size = 0


async def _finish_tasks() -> None:
    """End what connections that were closed have left behind."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _request_counter(metrics: Metrics) -> IntegerMetric:
    labels = ("method", "path", "status")
    return metrics.counter("http_requests_count", "Requests to the HTTP API answered", labels)


def _error_response(status: int, message: str) -> web.Response:
    response = _aiohttp_response(json_response({"msg": message}, status))
    if status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _aiohttp_response(response: Response) -> web.Response:
    headers = {"Content-Type": response.content_type}
    return web.Response(status=response.status, body=response.body, headers=headers)
