"""The endpoints' paths, and the server that answers them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pageserver.http.api import Json, PageserverApi
from pageserver.tenant import TenantError
from pageserver.tenants import TenantManager
from pageserver.timelines import LsnNotReadableError
from zenith_utils.http_server import (
    HttpError,
    HttpHandler,
    HttpServer,
    Request,
    RequestHook,
    Response,
    Route,
    documentation_routes,
    json_response,
    metrics_route,
)

_RECOUNT = "include-non-incremental-logical-size"


def routes(tenants: TenantManager) -> list[Route]:
    """All routes of the API on these tenants."""
    api = PageserverApi(tenants)
    tenant = "/v1/tenant/{tenant_id}/timeline"
    timeline = tenant + "/{timeline_id}"
    lease = timeline + "/lsn_lease"
    described: list[Route] = [
        Route("GET", "/v1/status", lambda _: api.status(), quick=True),
        Route("GET", "/v1/tenant", lambda _: api.tenant_list()),
        Route("POST", "/v1/tenant", _created(lambda r: api.tenant_create(r.json_object()))),
        Route("PUT", "/v1/tenant/config", lambda r: api.tenant_configure(r.json_object())),
        Route("GET", "/v1/tenant/{tenant_id}/config", lambda r: api.tenant_config(r.tenant_id())),
        Route(
            "GET", tenant, lambda r: api.timeline_list(r.tenant_id(), recount=_RECOUNT in r.query)
        ),
        Route(
            "POST",
            tenant,
            _created(lambda r: api.timeline_create(r.tenant_id(), r.json_object())),
        ),
        Route(
            "GET",
            timeline,
            lambda r: api.timeline_detail(
                r.tenant_id(), r.timeline_id(), recount=_RECOUNT in r.query
            ),
        ),
        Route(
            "GET",
            timeline + "/get_lsn_by_timestamp",
            lambda r: api.lsn_by_timestamp(
                r.tenant_id(), r.timeline_id(), r.query.get("timestamp")
            ),
        ),
        Route("POST", timeline + "/attach", lambda r: api.attach(r.tenant_id(), r.timeline_id())),
        Route("POST", timeline + "/detach", lambda r: api.detach(r.tenant_id(), r.timeline_id())),
        Route(
            "POST",
            lease,
            _created(lambda r: api.lease_create(r.tenant_id(), r.timeline_id(), r.json_object())),
        ),
        Route(
            "PUT",
            lease + "/{lease_id}",
            lambda r: api.lease_renew(
                r.tenant_id(), r.timeline_id(), r.path_params["lease_id"], r.json_object()
            ),
        ),
        Route(
            "DELETE",
            lease + "/{lease_id}",
            lambda r: api.lease_release(r.tenant_id(), r.timeline_id(), r.path_params["lease_id"]),
        ),
        metrics_route(tenants.metrics),
    ]

    def load() -> Mapping[str, Any]:
        from pageserver.http.openapi import description
        from zenith_utils.openapi import build

        return build(description(), described)

    described += documentation_routes(load)
    return described


def start_http(
    sock: socket.socket, tenants: TenantManager, before: RequestHook | None = None
) -> HttpServer:
    """Serves the API on a listening socket; `before` runs ahead of every handler."""
    served = [replace(route, handler=_guarded(route.handler)) for route in routes(tenants)]
    server = HttpServer(sock, served, before=before, metrics=tenants.metrics)
    server.start()
    return server


def _created(handler: Callable[[Request], Json]) -> Callable[[Request], Response]:
    """Answers with status 201, unless the handler chose another one."""

    def create(request: Request) -> Response:
        value = handler(request)
        return value if isinstance(value, Response) else json_response(value, 201)

    return create


def _guarded(handler: HttpHandler) -> HttpHandler:
    """What the client may be told as it is; other exceptions are defects and logged as such."""

    def call(request: Request) -> Json:
        try:
            return handler(request)
        except (TenantError, LsnNotReadableError) as error:
            raise HttpError(str(error)) from error

    return call
