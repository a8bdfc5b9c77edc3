"""The keys of an environment, and the tokens that are made with them.

The keys are made with every environment, so that authentication can be switched on later; the
libraries they need are loaded only where keys or tokens are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from control_plane.errors import ControlPlaneError
from control_plane.local_env import PRIVATE_KEY_FILE, LocalEnv
from zenith_utils.auth import Claims, Scope
from zenith_utils.durable import write_file_durably
from zenith_utils.ids import TenantId

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

TRUST = "Trust"


def needs_token(env: LocalEnv) -> bool:
    """Whether the pageserver lets nobody in without a token."""
    return env.pageserver.auth_type != TRUST


def make_keys(env: LocalEnv) -> None:
    """Write the keys into the repository, and what the command line needs into `env`.

    With a private key of the user's own, only the public one is written. Raises ControlPlaneError.
    """
    from zenith_utils import jwt_tokens

    if env.private_key_path == PRIVATE_KEY_FILE:
        key = jwt_tokens.generate_key()
        write_file_durably(env.private_key_file, jwt_tokens.private_pem(key))
    else:
        key = _private_key(env)
    write_file_durably(env.public_key_file, jwt_tokens.public_pem(key), mode=0o644)
    env.pageserver.auth_token = jwt_tokens.sign(Claims(Scope.PAGESERVER_API), key)


def tenant_token(env: LocalEnv, tenant_id: TenantId, expires_in: float | None = None) -> str:
    """A token for everything of one tenant, valid for so many seconds; raises ControlPlaneError."""
    return _sign(env, Claims(Scope.TENANT, tenant_id), expires_in)


def management_token(env: LocalEnv, expires_in: float | None = None) -> str:
    """A token for everything, valid for so many seconds; raises ControlPlaneError."""
    return _sign(env, Claims(Scope.PAGESERVER_API), expires_in)


def _sign(env: LocalEnv, claims: Claims, expires_in: float | None) -> str:
    from zenith_utils import jwt_tokens

    return jwt_tokens.sign(claims, _private_key(env), expires_in)


def _private_key(env: LocalEnv) -> RSAPrivateKey:
    from zenith_utils.jwt_tokens import KeyFileError, load_private_key

    try:
        return load_private_key(env.private_key_file)
    except KeyFileError as e:
        raise ControlPlaneError(
            f"no token can be made: {e}. See private_key_path in {env.config_path}"
        ) from e
