"""Writing plain values as YAML, for people to read: maps, lists, texts, numbers, null."""

from __future__ import annotations

import json
import re
from typing import Any

# Texts that need no quotes whatever the version of YAML: nothing that could be a number, a date,
# a truth value or null, and no character with a meaning of its own.
_PLAIN = re.compile(r"[A-Za-z/$][A-Za-z0-9 _./$()*-]*(?<! )", re.ASCII)
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def to_yaml(value: Any) -> str:
    """A document of one value. The keys of maps have to be texts."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    """The value as a block; a scalar is one line, or a literal block."""
    if isinstance(value, dict) and value:
        return [line for key, item in value.items() for line in _entry(f"{_text(key)}:", item)]
    if isinstance(value, list | tuple) and value:
        return [line for item in value for line in _item(item)]
    return [_scalar(value)]


def _entry(head: str, value: Any) -> list[str]:
    """A key with its value."""
    if isinstance(value, str) and "\n" in value and _is_literal(value):
        return [f"{head} |-", *(f"  {line}" if line else "" for line in value.split("\n"))]
    if isinstance(value, dict | list | tuple) and value:
        return [head, *(f"  {line}" if line else "" for line in _lines(value))]
    return [f"{head} {_scalar(value)}"]


def _item(value: Any) -> list[str]:
    """An entry of a list."""
    first, *rest = _lines(value)
    return [f"- {first}", *(f"  {line}" if line else "" for line in rest)]


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list | tuple):
        return "[]"
    return json.dumps(value)


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # JSON escapes what is beyond 16 bits as two characters, which YAML does not put together.
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _is_literal(text: str) -> bool:
    """Whether a literal block gives the text back: no line ends after it, no blank before it."""
    return text.isprintable() or (
        not text.endswith("\n")
        and not text.startswith((" ", "\n"))
        and all(line.isprintable() for line in text.split("\n"))
    )
