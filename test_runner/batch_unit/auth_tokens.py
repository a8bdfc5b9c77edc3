"""Tokens good and bad, and what a server has to say about them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from zenith_utils import jwt_tokens

TENANT = "0123456789abcdef0123456789abcdef"
OTHER_TENANT = "fedcba9876543210fedcba9876543210"

MANAGEMENT = {"scope": "pageserverapi"}
OWN = {"scope": "tenant", "tenant_id": TENANT}
OTHER = {"scope": "tenant", "tenant_id": OTHER_TENANT}

MALFORMED = "malformed jwt token"
EXPIRED = "jwt token has expired"
NO_TENANT = "jwt token scope is Tenant, but tenant id is missing"


@cache
def key() -> RSAPrivateKey:
    """The key that the servers under test trust."""
    return jwt_tokens.generate_key()


@cache
def other_key() -> RSAPrivateKey:
    """One that they do not know."""
    return jwt_tokens.generate_key()


def write_public_key(path: Path) -> Path:
    """The public key of key() in a file."""
    path.write_bytes(jwt_tokens.public_pem(key()))
    return path


def token(claims: dict[str, Any], **options: Any) -> str:
    """A token signed with key(); `options` are of jwt.encode()."""
    return jwt.encode(claims, options.pop("key", key()), **{"algorithm": "RS256", **options})


@dataclass(frozen=True)
class BadToken:
    """A token that must be refused: what HTTP clients are told behind the prefix, and libpq's."""

    token: str
    http: str
    libpq: str


@cache
def bad_tokens() -> dict[str, BadToken]:
    """Every way in which a token can be wrong by itself."""

    def malformed(text: str, libpq: str) -> BadToken:
        return BadToken(text, MALFORMED, libpq)

    good = token(MANAGEMENT)
    head, payload, signature = good.split(".")
    wrong_signature = "Signature verification failed"
    wrong_algorithm = "The specified alg value is not allowed"
    return {
        "not a token": malformed("secret", "Not enough segments"),
        "not base64": malformed("a.b.c", "Invalid header padding"),
        "not text": malformed("\xe4.\xf6.\xfc", "Invalid header padding"),
        "nested too deep": malformed(_part(b"[" * 3000) + ".e30.", "recursion"),
        "unsigned": malformed(jwt.encode(MANAGEMENT, "", algorithm="none"), wrong_algorithm),
        "unsigned as RS256": malformed(f"{head}.{payload}.", wrong_signature),
        "signed with the public key as a secret": malformed(_hs256(MANAGEMENT), wrong_algorithm),
        "another algorithm": malformed(token(MANAGEMENT, algorithm="RS512"), wrong_algorithm),
        "another key": malformed(token(MANAGEMENT, key=other_key()), wrong_signature),
        "signature cut short": malformed(good[:-2], wrong_signature),
        "claims of another token": malformed(
            f"{head}.{token(OWN).split('.')[1]}.{signature}", wrong_signature
        ),
        "expired": BadToken(token({**MANAGEMENT, "exp": int(time.time()) - 60}), EXPIRED, EXPIRED),
        "not valid yet": malformed(
            # Later than the end of the run: tokens are made once, at its start.
            token({**MANAGEMENT, "nbf": int(time.time()) + 10**8}),
            "The token is not yet valid",
        ),
        "for another audience": malformed(
            token({**MANAGEMENT, "aud": "elsewhere"}), "Invalid audience"
        ),
        "no scope": malformed(token({}), "no scope that is known"),
        "unknown scope": malformed(token({"scope": "Tenant"}), "no scope that is known"),
        "scope of another type": malformed(token({"scope": ["tenant"]}), "no scope that is known"),
        "no tenant": BadToken(token({"scope": "tenant"}), NO_TENANT, NO_TENANT),
        "null tenant": BadToken(
            token({"scope": "tenant", "tenant_id": None}), NO_TENANT, NO_TENANT
        ),
        "tenant is no id": malformed(
            token({"scope": "tenant", "tenant_id": "main"}), "is no tenant id"
        ),
        "tenant of another type": malformed(
            token({"scope": "tenant", "tenant_id": 7}), "is no tenant id"
        ),
    }


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _hs256(claims: dict[str, Any]) -> str:
    """Signed by somebody who knows nothing but the public key."""
    head = {"alg": "HS256", "typ": "JWT"}
    signed = ".".join(_part(json.dumps(part).encode()) for part in (head, claims))
    mac = hmac.new(jwt_tokens.public_pem(key()), signed.encode(), hashlib.sha256)
    return f"{signed}.{_part(mac.digest())}"
