"""Tokens: what is taken for one, what it says, and the files of keys."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from batch_unit.auth_tokens import (
    MANAGEMENT,
    OTHER_TENANT,
    OWN,
    TENANT,
    bad_tokens,
    key,
    other_key,
    token,
    write_public_key,
)
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from zenith_utils import jwt_tokens
from zenith_utils.auth import AuthError, Claims, PermissionDeniedError, Scope, check_permission
from zenith_utils.conninfo import redact
from zenith_utils.ids import TenantId
from zenith_utils.jwt_tokens import KeyFileError, TokenVerifier
from zenith_utils.log import LineFormatter

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = Claims(Scope.PAGESERVER_API)
ONE_TENANT = Claims(Scope.TENANT, TenantId.parse(TENANT))


def verifier(tmp_path: Path) -> TokenVerifier:
    return TokenVerifier.load(write_public_key(tmp_path / "key.pem"))


def test_what_good_tokens_say(tmp_path: Path) -> None:
    check = verifier(tmp_path).decode
    assert check(token(MANAGEMENT)) == EVERYTHING
    assert check(token({**MANAGEMENT, "tenant_id": None})) == EVERYTHING
    assert check(token(OWN)) == ONE_TENANT
    assert check(token({**OWN, "exp": 1 << 40, "nbf": 1, "iat": 1})) == ONE_TENANT
    # A UUID as many libraries write it.
    dashed = "01234567-89ab-cdef-0123-456789ABCDEF"
    assert check(token({"scope": "tenant", "tenant_id": dashed})) == ONE_TENANT


def test_what_is_signed_is_read_back(tmp_path: Path) -> None:
    for claims in (EVERYTHING, ONE_TENANT):
        for expires_in in (None, 60.0):
            signed = jwt_tokens.sign(claims, key(), expires_in)
            assert verifier(tmp_path).decode(signed) == claims
            # Connection strings and command lines need no quotes for it.
            assert re.fullmatch(r"[A-Za-z0-9._-]+", signed)
    with pytest.raises(AuthError, match="expired"):
        verifier(tmp_path).decode(jwt_tokens.sign(EVERYTHING, key(), -1.0))


def test_the_same_claims_give_the_same_token() -> None:
    """Safekeepers take a pageserver they are told about again for the one they know."""
    assert jwt_tokens.sign(ONE_TENANT, key()) == jwt_tokens.sign(ONE_TENANT, key())


@pytest.mark.parametrize("name", list(bad_tokens()))
def test_bad_tokens_are_refused(tmp_path: Path, name: str) -> None:
    """With a text that says why, and does not repeat the token."""
    bad = bad_tokens()[name]
    with pytest.raises(AuthError) as refusal:
        verifier(tmp_path).decode(bad.token)
    assert bad.libpq in str(refusal.value)
    parts = [part for part in bad.token.split(".") if len(part) > 8]
    assert not any(part in str(refusal.value) for part in parts)


def test_permissions() -> None:
    own, other = TenantId.parse(TENANT), TenantId.parse(OTHER_TENANT)
    for claims in (None, EVERYTHING):
        for tenant in (None, own, other):
            check_permission(claims, tenant)
    check_permission(ONE_TENANT, own)
    with pytest.raises(PermissionDeniedError) as denied:
        check_permission(ONE_TENANT, other)
    assert str(denied.value) == "Tenant id mismatch. Permission denied"
    with pytest.raises(PermissionDeniedError) as denied:
        check_permission(ONE_TENANT, None)
    assert (
        str(denied.value) == "Attempt to access management api with tenant scope. Permission denied"
    )


def test_a_key_file_with_two_keys_takes_tokens_of_both(tmp_path: Path) -> None:
    """So that keys can be changed without a moment in which nobody is let in."""
    path = write_public_key(tmp_path / "keys.pem")
    path.write_bytes(jwt_tokens.public_pem(other_key()) + path.read_bytes())
    check = TokenVerifier.load(path).decode
    assert check(token(OWN)) == check(token(OWN, key=other_key())) == ONE_TENANT
    for name, bad in bad_tokens().items():
        if name != "another key":
            with pytest.raises(AuthError):
                check(bad.token)


def test_keys_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "private.pem"
    path.write_bytes(jwt_tokens.private_pem(key()))
    again = jwt_tokens.load_private_key(path)
    assert jwt_tokens.public_pem(again) == jwt_tokens.public_pem(key())
    assert jwt_tokens.public_pem(key()).startswith(b"-----BEGIN PUBLIC KEY-----\n")


def test_bad_public_keys_are_refused(tmp_path: Path) -> None:
    """By the name of the file and what is wrong with it: no pageserver starts with less."""
    path = tmp_path / "key.pem"

    def refused(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match=re.escape(str(path))) as error:
            TokenVerifier.load(path)
        return str(error.value)

    public = jwt_tokens.public_pem(key())
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    short = generate_private_key(65537, 1024)
    assert "no public key in PEM format" in refused(b"")
    assert "no public key in PEM format" in refused(public[:100])
    assert "that can be read" in refused(public.replace(b"MIIB", b"AAAA"))
    assert "a private key" in refused(jwt_tokens.private_pem(key()))
    assert "a private key" in refused(public + jwt_tokens.private_pem(key()))
    pem = curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert "not one of RSA" in refused(pem)
    assert "1024 bits" in refused(jwt_tokens.public_pem(short))
    path.unlink()
    with pytest.raises(KeyFileError, match="No such file"):
        TokenVerifier.load(path)


def test_bad_private_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    curve = ec.generate_private_key(ec.SECP256R1())
    pem = curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content, text in (
        (jwt_tokens.public_pem(key()), "no private key"),
        (b"nonsense", "no private key"),
        (pem, "not one of RSA"),
    ):
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match=text):
            jwt_tokens.load_private_key(path)


def test_tokens_are_redacted() -> None:
    """Wherever they stand in a text, with or without a connection string around them."""
    for good in (token(MANAGEMENT), token(OWN)):
        for text in (
            good,
            f"Bearer {good}",
            f"x postgresql://u:{good}@h:1",
            f"password='{good}'",
            f"/v1/doc?token%3D{good}",
            f"t.{good}",
        ):
            assert not any(part in redact(text) for part in good.split("."))
    assert redact("the eyJ of 1.2.3 is none") == "the eyJ of 1.2.3 is none"


def test_no_log_line_holds_a_token() -> None:
    """Whatever is logged: a message, its arguments, the text of an exception."""
    good = token(OWN)
    try:
        raise ValueError(f"cannot use postgresql://u:{good}@h")
    except ValueError as e:
        error = e
    record = logging.LogRecord(
        "zenith", logging.INFO, "", 1, "got %s", (good,), (ValueError, error, error.__traceback__)
    )
    line = LineFormatter().format(record)
    assert "got ***" in line and "cannot use postgresql://u:***@h" in line
    assert good not in line


@pytest.mark.parametrize(
    "module", ["pageserver.auth", "pageserver.http.auth", "control_plane.auth"]
)
def test_without_authentication_nothing_of_it_is_loaded(module: str) -> None:
    """Its libraries cost a third of a start."""
    code = f"import sys, {module}; sys.exit('jwt' in sys.modules or 'cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
