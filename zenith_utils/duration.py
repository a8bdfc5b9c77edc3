"""Durations as people write them: ``1 s``, ``100ms``, ``1h 30min``."""

from __future__ import annotations

import re

_UNITS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1e-9, ("ns", "nsec", "nanos")),
    (1e-6, ("us", "usec", "micros")),
    (1e-3, ("ms", "msec", "millis")),
    (1, ("s", "sec", "secs", "second", "seconds")),
    (60, ("m", "min", "mins", "minute", "minutes")),
    (3600, ("h", "hr", "hrs", "hour", "hours")),
    (86400, ("d", "day", "days")),
    (7 * 86400, ("w", "week", "weeks")),
    (30.44 * 86400, ("M", "month", "months")),
    (365.25 * 86400, ("y", "year", "years")),
)
_SECONDS = {name: seconds for seconds, names in _UNITS for name in names}
# Far above what makes sense, and below what the system's clocks and waits can count to.
MAX_DURATION = 100 * 365.25 * 86400
_PART = re.compile(r"\s*([0-9]+)\s*([A-Za-z]+)\s*")


class DurationError(ValueError):
    """The text is not a duration."""


def parse_duration(text: str) -> float:
    """Seconds of a duration made of whole numbers with units, which are added up.

    A lone ``0`` needs no unit; the sum is MAX_DURATION at most. Raises DurationError.
    """
    if text.strip() == "0":
        return 0.0
    total, position = 0.0, 0
    while position < len(text) or not text:
        match = _PART.match(text, position)
        if match is None:
            raise DurationError(f"invalid duration {text!r}: expected e.g. '10 s' or '1h 30min'")
        if match[2] not in _SECONDS:
            raise DurationError(f"invalid duration {text!r}: unknown unit {match[2]!r}")
        total += float(match[1]) * _SECONDS[match[2]]
        position = match.end()
    if total > MAX_DURATION:
        raise DurationError(f"invalid duration {text!r}: more than 100 years")
    return total


def format_duration(seconds: float) -> str:
    """The duration in the form that parse_duration() reads, exact to the microsecond."""
    micros = round(seconds * 1_000_000)
    parts = []
    for size, unit in (
        (86_400_000_000, "day"),
        (3_600_000_000, "h"),
        (60_000_000, "min"),
        (1_000_000, "s"),
        (1000, "ms"),
        (1, "us"),
    ):
        count, micros = divmod(micros, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts) or "0s"
