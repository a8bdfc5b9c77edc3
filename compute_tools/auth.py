"""The token that lets a compute in at its pageserver.

It comes in the environment and goes on to the compute's processes there, and nowhere else: files
and command lines can be read by others, and settings by everybody who can connect to Postgres.
"""

from __future__ import annotations

import os
from typing import Final

AUTH_TOKEN_VARIABLE: Final = "ZENITH_AUTH_TOKEN"
"""Tokens consist of letters, digits, '-', '_' and '.', which need no quoting anywhere."""


def auth_token() -> str | None:
    """The token for the pageserver; None if it asks for none."""
    return os.environ.get(AUTH_TOKEN_VARIABLE) or None


def with_auth_token(connstr: str) -> str:
    """A connection string with the token in the place of the variable that stands for it."""
    return connstr.replace(f"${AUTH_TOKEN_VARIABLE}", auth_token() or "")


def password_placeholder(*, needed: bool) -> str:
    """What stands in a connection string for the token, if one is `needed`."""
    return f"${AUTH_TOKEN_VARIABLE}" if needed else ""
