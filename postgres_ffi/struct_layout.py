"""Layouts of C structs as data: field name -> (byte offset, `struct` code), little-endian."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class StructLayout:
    """One C struct as a compiler for x86-64 or aarch64 lays it out."""

    size: int
    fields: Mapping[str, tuple[int, str]]

    def unpack(self, data: Buffer, base: int = 0) -> dict[str, int | bool]:
        """Every field of the struct that starts at `base`; struct.error if `data` is too short."""
        return {
            name: struct.unpack_from("<" + code, data, base + offset)[0]
            for name, (offset, code) in self.fields.items()
        }

    def pack_into(self, data: bytearray, values: Mapping[str, int | bool], base: int = 0) -> None:
        """Overwrite the fields named in `values`; names this version lacks are left out."""
        for name, value in values.items():
            if name in self.fields:
                offset, code = self.fields[name]
                struct.pack_into("<" + code, data, base + offset, value)

    def offset(self, name: str) -> int:
        """Byte offset of a field; KeyError if this version has no such field."""
        return self.fields[name][0]
