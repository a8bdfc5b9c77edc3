"""Names of layer files, which carry everything the layer map needs to know about a layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

KEY_SIZE: Final = 18
MIN_KEY: Final = bytes(KEY_SIZE)
MAX_KEY: Final = b"\xff" * KEY_SIZE

_NAME = re.compile(r"([0-9A-F]{36})-([0-9A-F]{36})__([0-9A-F]{16})(?:-([0-9A-F]{16}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LayerName:
    """What a layer covers: keys [key_start, key_end), LSNs [start_lsn, end_lsn).

    An image layer holds the state at start_lsn, its end_lsn is start_lsn + 1.
    """

    key_start: bytes
    key_end: bytes
    start_lsn: int
    end_lsn: int
    is_image: bool

    def __post_init__(self) -> None:
        if len(self.key_start) != KEY_SIZE or len(self.key_end) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes")
        if self.key_start >= self.key_end or self.start_lsn >= self.end_lsn:
            raise ValueError("the key range or the LSN range of the layer is empty")

    @classmethod
    def image(cls, key_start: bytes, key_end: bytes, lsn: int) -> LayerName:
        """An image layer: every key of the range that exists at `lsn`."""
        return cls(key_start, key_end, lsn, lsn + 1, True)

    @classmethod
    def delta(cls, key_start: bytes, key_end: bytes, start_lsn: int, end_lsn: int) -> LayerName:
        """A delta layer: all changes of the keys in the LSN range."""
        return cls(key_start, key_end, start_lsn, end_lsn, False)

    @classmethod
    def l0_delta(cls, start_lsn: int, end_lsn: int) -> LayerName:
        """A delta layer over all keys, as a flush of the open layer makes it."""
        return cls(MIN_KEY, MAX_KEY, start_lsn, end_lsn, False)

    @classmethod
    def parse(cls, text: str) -> LayerName | None:
        """The layer a file name stands for, None if it is no layer's name."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        key_start, key_end = bytes.fromhex(match[1]), bytes.fromhex(match[2])
        start_lsn = int(match[3], 16)
        end_lsn = start_lsn + 1 if match[4] is None else int(match[4], 16)
        if key_start >= key_end or start_lsn >= end_lsn:
            return None
        return cls(key_start, key_end, start_lsn, end_lsn, match[4] is None)

    @property
    def is_l0(self) -> bool:
        """Whether it is a delta over the whole key space."""
        return not self.is_image and self.key_start == MIN_KEY and self.key_end == MAX_KEY

    def __str__(self) -> str:
        keys = f"{self.key_start.hex().upper()}-{self.key_end.hex().upper()}"
        if self.is_image:
            return f"{keys}__{self.start_lsn:016X}"
        return f"{keys}__{self.start_lsn:016X}-{self.end_lsn:016X}"
