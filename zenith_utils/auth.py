"""What a client's token says about it, and what it may do because of that.

A token's scope is `pageserverapi`, which allows everything, or `tenant`, which allows every
operation on one tenant and nothing else. The tokens themselves are the business of jwt_tokens.py,
whose libraries are loaded only where tokens are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from zenith_utils.ids import TenantId


class AuthError(Exception):
    """The client is not who it has to be. The text may be told to it and never holds the token."""


class MalformedTokenError(AuthError):
    """This is no token, or was not signed with the right key, or lacks the claims it needs."""


class PermissionDeniedError(Exception):
    """The client is known, and may not do this; the text may be told to it."""


class Scope(Enum):
    """What a token is for."""

    TENANT = "tenant"
    PAGESERVER_API = "pageserverapi"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says; `tenant_id` is set with scope TENANT."""

    scope: Scope
    tenant_id: TenantId | None = None


def check_permission(claims: Claims | None, tenant_id: TenantId | None) -> None:
    """Whether an operation on a tenant, or with None one of management, is allowed.

    `claims` are None where nobody has to authenticate. Raises PermissionDeniedError.
    """
    if claims is None or claims.scope is Scope.PAGESERVER_API:
        return
    if tenant_id is None:
        raise PermissionDeniedError(
            "Attempt to access management api with tenant scope. Permission denied"
        )
    if claims.tenant_id != tenant_id:
        raise PermissionDeniedError("Tenant id mismatch. Permission denied")
