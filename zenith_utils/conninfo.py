"""Connection strings of libpq and the ``options`` start-up parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import unquote

_URL_PREFIXES = ("postgresql://", "postgres://")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_KEYWORD_VALUE = re.compile(
    r"\s*(?P<key>[^\s=]+)\s*=\s*(?:'(?P<quoted>(?:[^'\\]|\\.)*)'(?=\s|$)|(?P<plain>(?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*|))\s*",
    re.DOTALL,
)
# To the last "@" of the authority: whoever forgot to encode one meant it as part of the password.
_URL_PASSWORD = re.compile(r"(postgres(?:ql)?://[^\s:/@]*):(?:[^\s/?]*|[^\s/@]*)@")
# In the query of a URL, or of the keyword form; what is quoted without an end goes on to the last.
_PARAMETER_PASSWORD = re.compile(
    r"([?&](?:ssl)?password=)[^\s&]*"
    r"|(password\s*=\s*)(?:'(?:[^'\\]|\\.)*+(?:'|\\?\Z)|(?:[^\s'\\]|\\.?)(?:[^\s\\]|\\.?)*+)",
    re.IGNORECASE | re.DOTALL,
)
# Three or more parts in base64url with dots between, as JSON web tokens have. Nothing is read
# twice (possessive, and only from the beginning of a word on): texts of strangers are searched.
_DOTTED_WORD = re.compile(r"(?<![\w-])[\w-]++\.[\w-]++\.[\w.-]*+", re.ASCII)
# A token's first part begins with '{"', in base64url.
_TOKEN_MARK = "eyJ"


class ConninfoError(ValueError):
    """Malformed connection string."""


def parse_conninfo(text: str) -> dict[str, str]:
    """Parse a libpq connection string, keyword form or URL, into its parameters.

    ``host=h port=5432 options='-c a=b'`` (values quoted with ``'``, backslash escapes) or
    ``postgresql://user:password@host:port/dbname?param=value`` (percent-encoded; IPv6 in
    brackets). The database is called ``dbname``. Raises ConninfoError, without the text itself,
    which may hold a password.
    """
    if text.startswith(_URL_PREFIXES):
        return _parse_url(text)
    result: dict[str, str] = {}
    position = 0
    text = text.strip()
    while position < len(text):
        match = _KEYWORD_VALUE.match(text, position)
        if match is None:
            raise ConninfoError(f"invalid connection string: no key=value at offset {position}")
        value = match["quoted"] if match["quoted"] is not None else match["plain"]
        result[match["key"]] = _ESCAPE.sub(r"\1", value)
        position = match.end()
    return result


def _parse_url(text: str) -> dict[str, str]:
    result: dict[str, str] = {}
    rest, _, query = text.partition("://")[2].partition("?")
    authority, slash, database = rest.partition("/")
    userinfo, at, address = authority.rpartition("@")
    if at:
        user, colon, password = userinfo.partition(":")
        if user:
            result["user"] = _decode(user)
        if colon:
            result["password"] = _decode(password)
    host, port = _split_address(address)
    if host:
        result["host"] = _decode(host)
    if port:
        result["port"] = port
    if slash and database:
        result["dbname"] = _decode(database)
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConninfoError("invalid connection URL: a parameter is not of the form key=value")
        result[_decode(key)] = _decode(value)
    return result


def _split_address(address: str) -> tuple[str, str]:
    if address.startswith("["):
        host, bracket, port = address[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ConninfoError("invalid connection URL: malformed IPv6 address")
        return host, port[1:]
    host, _, port = address.partition(":")
    return host, port


def _decode(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise ConninfoError("invalid connection URL: malformed percent encoding")
    return unquote(text)


def format_conninfo(params: Mapping[str, str | int]) -> str:
    """The keyword form of parameters, quoted where needed: the inverse of parse_conninfo()."""
    return " ".join(f"{key}={_quote(str(value))}" for key, value in params.items())


def _quote(value: str) -> str:
    if value and not re.search(r"[\s'\\]", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def redact(text: str) -> str:
    """A text with tokens, and the passwords of connection strings, made unreadable; for logs.

    Takes time in proportion to the length of the text, whatever stands in it.
    """
    if _TOKEN_MARK in text:
        text = _DOTTED_WORD.sub(_without_token, text)
    if "postgres" in text:
        text = _URL_PASSWORD.sub(r"\1:***@", text)
    if "assword" in text.lower():
        text = _PARAMETER_PASSWORD.sub(r"\1\2***", text)
    return text


def _without_token(match: re.Match[str]) -> str:
    return "***" if _TOKEN_MARK in match[0] else match[0]


def redact_start(text: str, length: int = 200) -> str:
    """The first characters of a text, redacted; what is behind them costs nothing.

    A text that is longer is cut behind its last whole word within `length`: half a token, or half
    a password, would not be known for one.
    """
    if len(text) <= length:
        return redact(text)
    return redact(re.sub(r"(?<!\S)\S*\Z", "", text[: length + 1]).rstrip()) + "..."


def without_password(conninfo: str) -> str:
    """A connection string that names the same server and does not let in: it tells who is meant.

    One without a password stays as it is.
    """
    if conninfo.startswith(_URL_PREFIXES):
        conninfo = _URL_PASSWORD.sub(r"\1:@", conninfo, count=1)
        return _PARAMETER_PASSWORD.sub(r"\1\2", conninfo)
    return _PARAMETER_PASSWORD.sub(r"\1\2''", conninfo)


def split_options(options: str) -> dict[str, str]:
    """Settings in an ``options`` parameter: ``-c a=b c=d``, with ``\\`` escaping a blank.

    Every piece ``name=value`` is a setting; ``-c`` and pieces without ``=`` are passed over.
    """
    result: dict[str, str] = {}
    for piece in re.findall(r"(?:[^\s\\]|\\.)+", options, re.DOTALL):
        name, equals, value = _ESCAPE.sub(r"\1", piece).partition("=")
        if name.startswith(("-c", "--")):
            name = name[2:]
        if equals and name:
            result[name] = value
    return result


def options_from_startup(params: Mapping[str, str]) -> dict[str, str]:
    """Start-up parameters with the settings inside ``options`` beside them; the later one wins."""
    result: dict[str, str] = {}
    for name, value in params.items():
        if name == "options":
            result.update(split_options(value))
        else:
            result[name] = value
    return result
