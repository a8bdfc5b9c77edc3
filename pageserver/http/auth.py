"""Who may do what over HTTP: a hook that runs ahead of every handler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zenith_utils.auth import (
    AuthError,
    Claims,
    MalformedTokenError,
    PermissionDeniedError,
    check_permission,
)
from zenith_utils.http_server import Forbidden, HttpError, Request, RequestHook, Unauthorized
from zenith_utils.ids import IdParseError, TenantId

if TYPE_CHECKING:
    from zenith_utils.jwt_tokens import TokenVerifier

# Compared with the whole URI: with a query string they are no exception.
PUBLIC_URIS: Final = frozenset({"/v1/status", "/v1/doc", "/swagger.yml"})
# What every valid token may see.
_ANY_TOKEN_PATHS: Final = frozenset({"/metrics"})
# Requests that name their tenant in the body, and under which key.
_TENANT_IN_BODY: Final = {("PUT", "/v1/tenant/config"): "tenant_id"}


def http_gate(verifier: TokenVerifier | None) -> RequestHook | None:
    """What runs ahead of every HTTP handler.

    A route with a `tenant_id` in its path is an operation on that tenant, any other is one of
    management unless it is named above: a new route is closed until somebody opens it.
    """
    if verifier is None:
        return None

    def check(request: Request) -> None:
        if request.uri in PUBLIC_URIS:
            return
        claims = _http_claims(verifier, request)
        if request.path in _ANY_TOKEN_PATHS:
            return
        try:
            check_permission(claims, _tenant_of(request))
        except PermissionDeniedError as error:
            raise Forbidden(str(error)) from error

    return check


def _http_claims(verifier: TokenVerifier, request: Request) -> Claims:
    header = request.headers.get("Authorization")
    if header is None:
        raise Unauthorized("missing authorization header")
    # RFC 9110: the scheme's name in any case.
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("malformed authorization header")
    try:
        return verifier.decode(token.strip())
    except MalformedTokenError as error:
        raise Unauthorized("malformed jwt token") from error
    except AuthError as error:
        raise Unauthorized(str(error)) from error


def _tenant_of(request: Request) -> TenantId | None:
    """The tenant that a request is about; raises BadRequest where it should name one."""
    if "tenant_id" in request.path_params:
        return request.tenant_id()
    key = _TENANT_IN_BODY.get((request.method, request.path))
    if key is None:
        return None
    try:
        return TenantId.parse(request.json_object()[key])
    except (HttpError, KeyError, TypeError, AttributeError, IdParseError):
        return None  # the handler says so to those who may manage tenants
