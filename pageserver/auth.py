"""Who may do what on this pageserver, over libpq; over HTTP see http/auth.py.

Without authentication (`auth_type = 'Trust'`) clients have no claims and may do everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

from pageserver.config import ConfigError, PageServerConf
from zenith_utils.auth import AuthError, Claims, PermissionDeniedError, check_permission
from zenith_utils.ids import IdParseError, TenantId
from zenith_utils.postgres_backend import (
    Auth,
    CleartextPasswordAuth,
    Connection,
    QueryError,
    TrustAuth,
)

if TYPE_CHECKING:
    from zenith_utils.jwt_tokens import TokenVerifier

ZENITH_JWT: Final = "ZenithJWT"

_INVALID_PASSWORD: Final = "28P01"
_INSUFFICIENT_PRIVILEGE: Final = "42501"
_SYNTAX_ERROR: Final = "42601"


def load_verifier(conf: PageServerConf) -> TokenVerifier | None:
    """What checks clients' tokens; None if nobody needs one. Raises ConfigError."""
    if conf.auth_type != ZENITH_JWT:
        return None
    from zenith_utils.jwt_tokens import KeyFileError, TokenVerifier

    assert conf.auth_validation_public_key_path is not None
    try:
        return TokenVerifier.load(conf.auth_validation_public_key_path)
    except KeyFileError as error:
        raise ConfigError(f"auth_validation_public_key_path: {error}") from error


class Permission(Enum):
    """What a command of the page service needs."""

    ANY = "any valid token"
    TENANT = "access to the tenant that is its first argument"
    MANAGEMENT = "access to everything"


def page_service_auth(verifier: TokenVerifier | None) -> Auth:
    """How clients of the page service prove who they are: with a token as their password."""
    if verifier is None:
        return TrustAuth()

    def check(token: str) -> Claims:
        try:
            return verifier.decode(token)
        except AuthError as error:
            raise QueryError(str(error), _INVALID_PASSWORD) from error

    return CleartextPasswordAuth(check)


def authorize(conn: Connection, permission: Permission, words: Sequence[str]) -> None:
    """Refuse a command, given with its arguments, that the client may not run.

    Raises QueryError.
    """
    claims = conn.identity
    if claims is None or permission is Permission.ANY:
        return
    assert isinstance(claims, Claims)
    try:
        check_permission(claims, _named_tenant(words) if permission is Permission.TENANT else None)
    except PermissionDeniedError as error:
        raise QueryError(str(error), _INSUFFICIENT_PRIVILEGE) from error


def _named_tenant(words: Sequence[str]) -> TenantId:
    if len(words) < 2:
        raise QueryError(f"invalid param number for {words[0]} command", _SYNTAX_ERROR)
    try:
        return TenantId.parse(words[1])
    except IdParseError as error:
        raise QueryError(str(error), _SYNTAX_ERROR) from error
