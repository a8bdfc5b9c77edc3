"""Answers to what a server asks for in its authentication requests.

Which methods there are: protocol.sgml, "Start-up". SCRAM-SHA-256 (RFC 7677) is scramp's.
"""

from __future__ import annotations

import hashlib
from typing import Final

from scramp import ScramClient, ScramException

from .messages import SessionError, message, sasl_initial_response
from .saslprep import prepared_password

OK: Final = 0
CLEARTEXT: Final = 3
MD5: Final = 5
SASL: Final = 10
SASL_CONTINUE: Final = 11
SASL_FINAL: Final = 12

_SCRAM: Final = "SCRAM-SHA-256"
_NAMES: Final = {2: "Kerberos", 6: "SCM", 7: "GSSAPI", 8: "GSSAPI", 9: "SSPI"}


class Authentication:
    """The client's part in one login. Does no I/O."""

    def __init__(self, user: bytes, password: bytes) -> None:
        self._user = user
        self._password = password
        self._scram: ScramClient | None = None
        self._server_proved = False
        self.password_used = False
        """Whether the server has asked for the password in any way."""

    def answer(self, payload: bytes) -> bytes:
        """The message that answers a request (its payload); b"" if there is nothing to answer.

        Takes about a millisecond of computing when the request is SASLContinue, without the GIL.
        Raises SessionError.
        """
        method, data = int.from_bytes(payload[:4], "big"), payload[4:]
        if method == OK:
            if self._scram is not None and not self._server_proved:
                raise _refused("it skipped the end of SCRAM, its proof that it knows the password")
            return b""
        self.password_used = True
        if method == CLEARTEXT:
            return message(b"p", self._password + b"\0")
        if method == MD5:
            return message(b"p", self._md5(data))
        try:
            if method == SASL:
                return self._begin_scram(data)
            if method == SASL_CONTINUE and self._scram is not None:
                self._scram.set_server_first(data.decode())
                return message(b"p", self._scram.get_client_final().encode())
            if method == SASL_FINAL and self._scram is not None:
                self._scram.set_server_final(data.decode())
                self._server_proved = True
                return b""
        except (ScramException, ValueError) as e:
            raise _refused(f"SCRAM failed: {e}") from e
        raise _refused(
            f"it asks for the method {_NAMES.get(method, method)}, which the proxy cannot answer; "
            "have its pg_hba.conf ask for scram-sha-256, md5 or password"
        )

    def _md5(self, salt: bytes) -> bytes:
        """MD5PasswordMessage: md5(md5(password + user) + salt) (libpq, pg_md5_encrypt)."""
        inner = hashlib.md5(self._password + self._user).hexdigest().encode()
        return b"md5" + hashlib.md5(inner + salt).hexdigest().encode() + b"\0"

    def _begin_scram(self, data: bytes) -> bytes:
        offered = data.split(b"\0")
        if _SCRAM.encode() not in offered:
            names = b", ".join(filter(None, offered)).decode("ascii", "replace")
            raise _refused(f"it offers the SASL mechanisms {names}, the proxy knows {_SCRAM}")
        # Postgres takes the user from the start-up packet; scramp wants some name.
        self._scram = ScramClient([_SCRAM], "*", "")
        # scramp refuses passwords that Postgres takes as they are.
        self._scram.password = prepared_password(self._password)
        return sasl_initial_response(_SCRAM, self._scram.get_client_first())


def _refused(reason: str) -> SessionError:
    return SessionError(f"cannot log in to the target: {reason}", "28000")
