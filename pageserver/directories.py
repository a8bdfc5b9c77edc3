"""Encodings of the small sets and maps that are stored whole under one key (big-endian).

`u64` number of elements, then the elements, sorted. Decoding raises DirectoryError on damage.
"""

from collections.abc import Iterable, Mapping
from struct import Struct

_COUNT = Struct(">Q")
_DATABASE = Struct(">IIB")
_NUMBER = Struct(">I")
_ORIGIN = Struct(">HQ")
_TABLESPACE = Struct(">IH")


class DirectoryError(ValueError):
    """A stored directory that does not have the length it announces."""


def encode_databases(databases: Mapping[tuple[int, int], bool]) -> bytes:
    """(spcnode, dbnode) -> whether the database has a relation map file."""
    items = sorted(databases.items())
    return _COUNT.pack(len(items)) + b"".join(
        _DATABASE.pack(spcnode, dbnode, has_relmap) for (spcnode, dbnode), has_relmap in items
    )


def decode_databases(data: bytes) -> dict[tuple[int, int], bool]:
    """The reverse of `encode_databases`."""
    elements = _elements(data, _DATABASE, "database")
    return {(spcnode, dbnode): bool(flag) for spcnode, dbnode, flag in elements}


def encode_numbers(numbers: Iterable[int]) -> bytes:
    """A set of unsigned 32-bit numbers: xids or segment numbers."""
    items = sorted(numbers)
    return _COUNT.pack(len(items)) + b"".join(_NUMBER.pack(number) for number in items)


def decode_numbers(data: bytes) -> set[int]:
    """The reverse of `encode_numbers`."""
    return {number for (number,) in _elements(data, _NUMBER, "number")}


def encode_origins(origins: Mapping[int, int]) -> bytes:
    """Replication origin id -> remote LSN up to which it was replayed."""
    items = sorted(origins.items())
    return _COUNT.pack(len(items)) + b"".join(_ORIGIN.pack(*item) for item in items)


def decode_origins(data: bytes) -> dict[int, int]:
    """The reverse of `encode_origins`."""
    return dict(_elements(data, _ORIGIN, "replication origin"))  # type: ignore[arg-type]


def encode_tablespaces(tablespaces: Mapping[int, str]) -> bytes:
    """Tablespace oid -> location, empty for one inside the data directory."""
    parts = [_COUNT.pack(len(tablespaces))]
    for spcnode, location in sorted(tablespaces.items()):
        raw = location.encode("utf-8", "surrogateescape")
        parts += (_TABLESPACE.pack(spcnode, len(raw)), raw)
    return b"".join(parts)


def decode_tablespaces(data: bytes) -> dict[int, str]:
    """The reverse of `encode_tablespaces`."""
    count, offset, tablespaces = _count(data), _COUNT.size, {}
    for _ in range(count):
        start = offset + _TABLESPACE.size
        if start > len(data):
            raise DirectoryError(f"tablespace directory is cut off at {len(data)} bytes")
        spcnode, length = _TABLESPACE.unpack_from(data, offset)
        offset = start + length
        tablespaces[spcnode] = data[start:offset].decode("utf-8", "surrogateescape")
    if offset != len(data):
        raise DirectoryError(f"tablespace directory has {len(data)} bytes instead of {offset}")
    return tablespaces


def _count(data: bytes) -> int:
    if len(data) < _COUNT.size:
        raise DirectoryError(f"directory has only {len(data)} bytes")
    count: int = _COUNT.unpack_from(data)[0]
    return count


def _elements(data: bytes, layout: Struct, what: str) -> Iterable[tuple[int, ...]]:
    expected = _COUNT.size + _count(data) * layout.size
    if len(data) != expected:
        raise DirectoryError(f"{what} directory has {len(data)} bytes instead of {expected}")
    return layout.iter_unpack(data[_COUNT.size :])
