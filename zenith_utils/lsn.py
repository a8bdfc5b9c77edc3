"""Log sequence numbers: byte positions in the write-ahead log."""

from __future__ import annotations

import re
from typing import Final

MAX_LSN: Final = 0xFFFF_FFFF_FFFF_FFFF
WAL_SEGMENT_SIZE: Final = 16 * 1024 * 1024

_TEXT = re.compile(r"([0-9A-Fa-f]+)/([0-9A-Fa-f]+)", re.ASCII)


class LsnParseError(ValueError):
    """The text is not an LSN of the form ``X/X``."""


class Lsn(int):
    """A 64-bit WAL position. An int in every respect, printed the way Postgres does (``%X/%X``)."""

    __slots__ = ()

    def __new__(cls, value: int = 0) -> Lsn:
        """Make an LSN of an unsigned 64-bit integer; ValueError outside that range."""
        if not 0 <= value <= MAX_LSN:
            raise ValueError(f"LSN {int(value)} does not fit 64 bits")
        return int.__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Parse ``X/X``: one slash, each side hexadecimal of at most 32 bits, any case.

        Raises LsnParseError.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise LsnParseError(f"invalid LSN {text!r}: expected the form 0/16B9188")
        high, low = int(match[1], 16), int(match[2], 16)
        if high > 0xFFFF_FFFF or low > 0xFFFF_FFFF:
            raise LsnParseError(f"invalid LSN {text!r}: each side must fit 32 bits")
        return int.__new__(cls, high << 32 | low)

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFF_FFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn('{self}')"

    def __format__(self, spec: str) -> str:
        """Text form, unless the spec ends in an integer type (``f'{lsn:016X}'``)."""
        if spec and spec[-1] in "bcdnoxX":
            return int.__format__(self, spec)
        return format(str(self), spec)

    def align8(self) -> Lsn:
        """The position rounded up to a multiple of 8, where a WAL record may start."""
        return Lsn((self + 7) & ~7)

    def is_aligned(self) -> bool:
        """Whether a WAL record may start here as far as alignment goes."""
        return self & 7 == 0

    def segment_number(self, segment_size: int = WAL_SEGMENT_SIZE) -> int:
        """Number of the WAL segment that holds the byte at this position."""
        return self // segment_size

    def segment_offset(self, segment_size: int = WAL_SEGMENT_SIZE) -> int:
        """Offset of this position in its segment, in bytes."""
        return self % segment_size


INVALID_LSN: Final = Lsn(0)


def align8(position: int) -> int:
    """Round a WAL position up to a multiple of 8 (plain integers; see Lsn.align8)."""
    return (position + 7) & ~7


def lsn_text(position: int) -> str:
    """``%X/%X`` of a plain integer, without making an Lsn."""
    return f"{position >> 32:X}/{position & 0xFFFF_FFFF:X}"
