"""JSON web tokens (RFC 7519), signed with RSA keys and SHA-256 (RS256, RFC 7518).

Claims: `scope` is "tenant" or "pageserverapi"; `tenant_id` a tenant in hex, or null. `exp` and the
other times of RFC 7519 may be there and then count. Importing this loads large libraries, in about
0.1 s: import it where tokens are used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from zenith_utils.auth import AuthError, Claims, MalformedTokenError, Scope
from zenith_utils.ids import IdParseError, TenantId

ALGORITHM: Final = "RS256"
KEY_SIZE: Final = 2048
"""Bits of a new key, and the least that RS256 allows (RFC 7518, 3.3)."""

_EXPONENT: Final = 65537
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----", re.DOTALL)


class KeyFileError(Exception):
    """A key file cannot be used; the message names it and says why."""


class TokenVerifier:
    """Decodes tokens that were signed with any of some keys."""

    def __init__(self, keys: Sequence[RSAPublicKey]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(cls, path: Path) -> TokenVerifier:
        """Read the public keys of a PEM file, one or several; raises KeyFileError."""
        blocks = [match[0] for match in _PEM.finditer(_read(path))]
        if not blocks:
            raise KeyFileError(f"'{path}' holds no public key in PEM format")
        return cls([_public_key(block, path) for block in blocks])

    def decode(self, token: str) -> Claims:
        """What a token says. Raises AuthError."""
        failure: AuthError = MalformedTokenError("there is no key to verify it with")
        for key in self._keys:
            try:
                document = jwt.decode(token, key, algorithms=[ALGORITHM])
            except jwt.InvalidSignatureError as e:
                failure = MalformedTokenError(str(e))
            except jwt.ExpiredSignatureError:
                raise AuthError("jwt token has expired") from None
            except (jwt.PyJWTError, ValueError, RecursionError) as e:
                # What it is not, is not made better by another key.
                raise MalformedTokenError(str(e)) from None
            else:
                return _claims(document)
        raise failure


def _claims(document: dict[str, Any]) -> Claims:
    try:
        scope = Scope(document.get("scope"))
    except ValueError:
        expected = " or ".join(repr(s.value) for s in Scope)
        raise MalformedTokenError(f"jwt token has no scope that is known: {expected}") from None
    text = document.get("tenant_id")
    if text is None:
        if scope is Scope.TENANT:
            raise AuthError("jwt token scope is Tenant, but tenant id is missing")
        return Claims(scope)
    try:
        # With dashes as well: that is how the libraries of many languages write a UUID.
        return Claims(scope, TenantId.parse(text.replace("-", "")))
    except (IdParseError, AttributeError):
        raise MalformedTokenError("the tenant_id of the jwt token is no tenant id") from None


def sign(claims: Claims, private_key: RSAPrivateKey, expires_in: float | None = None) -> str:
    """A token. `expires_in` is in seconds; without it the token is valid for ever.

    The same key and claims without an expiry always give the same token.
    """
    document: dict[str, Any] = {"scope": claims.scope.value}
    if claims.tenant_id is not None:
        document["tenant_id"] = str(claims.tenant_id)
    if expires_in is not None:
        document["exp"] = int(time.time() + expires_in)
    return jwt.encode(document, private_key, ALGORITHM)


def generate_key() -> RSAPrivateKey:
    """A new key pair."""
    return generate_private_key(_EXPONENT, KEY_SIZE)


def private_pem(key: RSAPrivateKey) -> bytes:
    """The key pair in PEM format (PKCS #8), not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: RSAPrivateKey) -> bytes:
    """The public key of a pair in PEM format (SubjectPublicKeyInfo)."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_private_key(path: Path) -> RSAPrivateKey:
    """Read a private key in PEM format; raises KeyFileError."""
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise KeyFileError(f"'{path}' holds no private key in PEM format that can be read") from e
    if not isinstance(key, RSAPrivateKey):
        raise KeyFileError(f"the private key in '{path}' is not one of RSA")
    return key


def _public_key(block: bytes, path: Path) -> RSAPublicKey:
    if b"PRIVATE KEY" in block.partition(b"\n")[0]:
        raise KeyFileError(f"'{path}' holds a private key, and must hold public ones only")
    try:
        key = load_pem_public_key(block)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise KeyFileError(f"'{path}' holds no public key in PEM format that can be read") from e
    if not isinstance(key, RSAPublicKey):
        raise KeyFileError(f"the public key in '{path}' is not one of RSA")
    if key.key_size < KEY_SIZE:
        raise KeyFileError(
            f"the key in '{path}' has {key.key_size} bits, and needs at least {KEY_SIZE}"
        )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise KeyFileError(f"cannot read the key file '{path}': {e.strerror}") from e
