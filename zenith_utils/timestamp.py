"""Points in time as Postgres stores them: TimestampTz (datatype/timestamp.h).

A time is a number of microseconds since 2000-01-01 UTC; as text it is what RFC 3339 says.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

POSTGRES_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)

_MICROSECOND = timedelta(microseconds=1)
_RFC3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(?:\.\d+)?(?:[Zz]|[+-]\d{2}:\d{2})", re.ASCII
)
# What text can say; a clock that shows something else is not set.
_MIN = (datetime.min.replace(tzinfo=UTC) - POSTGRES_EPOCH) // _MICROSECOND
_MAX = (datetime.max.replace(tzinfo=UTC) - POSTGRES_EPOCH) // _MICROSECOND


class TimestampParseError(ValueError):
    """The text is not a point in time."""


def timestamp_of(moment: datetime) -> int:
    """Microseconds since 2000-01-01 UTC of a datetime that knows its zone."""
    return (moment - POSTGRES_EPOCH) // _MICROSECOND


def parse_timestamp(text: str) -> int:
    """The time that an RFC 3339 text names; parts of a microsecond are cut off.

    Raises TimestampParseError.
    """
    if _RFC3339.fullmatch(text) is None:
        raise TimestampParseError(
            f"invalid timestamp {text!r}: expected the form 2026-11-22T10:00:00Z"
        )
    try:
        return timestamp_of(datetime.fromisoformat(text.upper()))
    except ValueError as error:
        raise TimestampParseError(f"invalid timestamp {text!r}: {error}") from error


def timestamp_text(time: int) -> str:
    """RFC 3339, in UTC; times outside the years 1 to 9999 become the ends of that range."""
    moment = POSTGRES_EPOCH + min(max(time, _MIN), _MAX) * _MICROSECOND
    return moment.replace(tzinfo=None).isoformat() + "Z"
