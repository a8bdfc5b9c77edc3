"""Tenant and timeline identifiers: 16 random bytes shown as 32 lower-case hex characters."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

_HEX = re.compile(r"[0-9A-Fa-f]{32}", re.ASCII)


class IdParseError(ValueError):
    """The text is not 32 hexadecimal characters."""


@dataclass(frozen=True, slots=True, order=True)
class _Id:
    raw: bytes
    kind: ClassVar[str] = "id"

    def __post_init__(self) -> None:
        if type(self.raw) is not bytes or len(self.raw) != 16:
            raise ValueError(f"a {self.kind} is 16 bytes, not {self.raw!r}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse exactly 32 hex characters, no dashes; raises IdParseError."""
        if _HEX.fullmatch(text) is None:
            raise IdParseError(f"invalid {cls.kind} {text!r}: expected 32 hexadecimal characters")
        return cls(bytes.fromhex(text))

    @classmethod
    def generate(cls) -> Self:
        """A new random id."""
        return cls(os.urandom(16))

    def __str__(self) -> str:
        return self.raw.hex()

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.raw.hex()}')"


@dataclass(frozen=True, slots=True, order=True, repr=False)
class TenantId(_Id):
    """Identifies a tenant: the owner of a set of timelines."""

    kind: ClassVar[str] = "tenant id"


@dataclass(frozen=True, slots=True, order=True, repr=False)
class TimelineId(_Id):
    """Identifies a Zenith timeline (a branch); not Postgres' own 32-bit timeline number."""

    kind: ClassVar[str] = "timeline id"


class TenantTimelineId(NamedTuple):
    """A timeline with its tenant; printed ``<tenant>-<timeline>``."""

    tenant_id: TenantId
    timeline_id: TimelineId

    def __str__(self) -> str:
        return f"{self.tenant_id}-{self.timeline_id}"
