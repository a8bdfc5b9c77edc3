"""Sizes as people write them: ``64MB``, ``1 GiB``, ``1048576``."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+)\s*([kmgt]?)(i?b)?\s*", re.IGNORECASE | re.ASCII)


class SizeError(ValueError):
    """The text is not a size."""


def parse_size(text: str) -> int:
    """Bytes of a whole number with a unit, which counts by 1024 as in Postgres' settings.

    Raises SizeError.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SizeError(f"invalid size {text!r}: expected e.g. '64MB' or '1 GB'")
    return int(match[1]) * _UNITS[match[2].lower()]


def format_size(size: int) -> str:
    """A size for people: ``1.5 GiB``, ``16 MiB``, ``700 B``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} B"
