"""Reading the main data of WAL records with every length checked."""

import struct
from dataclasses import dataclass

from typing_extensions import Buffer

from .relfile import RelTag


class RecordFormatError(ValueError):
    """Main data that does not have the layout its record type promises."""


@dataclass(frozen=True, slots=True)
class RelFileNode:
    """A relation without its fork."""

    spcnode: int
    dbnode: int
    relnode: int

    def fork(self, forknum: int) -> RelTag:
        """One of its forks."""
        return RelTag(self.spcnode, self.dbnode, self.relnode, forknum)


class RecordReader:
    """A cursor over main data that never reads past the end."""

    def __init__(self, data: Buffer, what: str) -> None:
        self.data = bytes(data)
        self.offset = 0
        self.what = what

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.offset + size
        if size < 0 or end > len(self.data):
            raise self.error(f"needs {size} bytes at {self.offset} of {len(self.data)}")
        chunk = self.data[self.offset : end]
        self.offset = end
        return chunk

    def skip(self, count: int, size: int) -> None:
        """Leave out `count` elements of `size` bytes."""
        self.take(self.count(count) * size)

    def number(self, code: str) -> int:
        """The next number, of a `struct` code."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return int(value)

    def count(self, value: int) -> int:
        """`value`, which must be a possible number of elements."""
        if value < 0:
            raise self.error(f"has {value} elements")
        return value

    def u32s(self, count: int) -> tuple[int, ...]:
        """The next `count` unsigned 32-bit numbers."""
        return struct.unpack(f"<{self.count(count)}I", self.take(4 * self.count(count)))

    def relations(self, count: int) -> tuple[RelFileNode, ...]:
        """The next `count` RelFileNodes."""
        raw = self.take(12 * self.count(count))
        return tuple(RelFileNode(*node) for node in struct.iter_unpack("<III", raw))

    def cstring(self) -> str:
        """The next zero-terminated string."""
        end = self.data.find(b"\0", self.offset)
        if end < 0:
            raise self.error("has a string without an end")
        text = self.take(end - self.offset).decode("utf-8", "surrogateescape")
        self.offset += 1
        return text

    def align(self) -> None:
        """Go on at the next multiple of 8."""
        self.take(-self.offset % 8)

    def end(self) -> None:
        """Nothing may be left."""
        if self.offset != len(self.data):
            raise self.error(f"has {len(self.data) - self.offset} bytes too many")

    def error(self, problem: str) -> RecordFormatError:
        """The exception that says what is wrong with the record."""
        return RecordFormatError(f"WAL record {self.what} {problem}")
