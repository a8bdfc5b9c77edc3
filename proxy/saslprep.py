"""What Postgres makes of a password before it is hashed for SCRAM: SASLprep (RFC 4013), if it can.

Step by step as pg_saslprep() does it (src/common/saslprep.c), and as libpq and the server use it:
what cannot be prepared is taken as it is. Anything else would be another password to the server.
"""

from __future__ import annotations

import stringprep
import unicodedata
from typing import Final

_PROHIBITED: Final = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


def prepared_password(password: bytes) -> bytes:
    """The password as it is hashed; itself if it is no UTF-8 or has what SASLprep prohibits."""
    if password.isascii():
        return password
    try:
        text = password.decode()
    except UnicodeDecodeError:
        return password
    mapped = "".join(filter(None, map(_mapped, text)))
    # As in Postgres it is the text before its normalisation that is looked at.
    if not mapped or any(test(c) for c in mapped for test in _PROHIBITED) or _mixed(mapped):
        return password
    return unicodedata.normalize("NFKC", mapped).encode()


def _mapped(character: str) -> str:
    # Zero width space is in both tables: a space, to Postgres.
    if stringprep.in_table_c12(character):
        return " "
    return "" if stringprep.in_table_b1(character) else character


def _mixed(text: str) -> bool:
    """Whether it has writing from right to left that is not all there is, RFC 3454, section 6."""
    if not any(map(stringprep.in_table_d1, text)):
        return False
    ends = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
    return not ends or any(map(stringprep.in_table_d2, text))
