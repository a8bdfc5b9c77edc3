"""What a storage key belongs to, in words: for pictures of the key space."""

from __future__ import annotations

from typing import Final

from pageserver.keys import (
    CHECKPOINT_KEY,
    COMMIT_TIME_KEY,
    CONTROL_FILE_KEY,
    COUNTERS_KEY,
    KEY_SIZE,
    PARAMETERS_KEY,
    KeyKind,
    split_key,
)
from postgres_ffi.relfile import DEFAULTTABLESPACE_OID
from postgres_ffi.slru import SlruKind

_FORKS: Final = ("", "_fsm", "_vm", "_init")
_CONTROL: Final = {
    CONTROL_FILE_KEY: "control file",
    CHECKPOINT_KEY: "checkpoint",
    COUNTERS_KEY: "counters",
    PARAMETERS_KEY: "parameters",
    COMMIT_TIME_KEY: "commit time",
}
_END_OF_KEYS: Final = b"\xff" * KEY_SIZE


def key_labels(key: bytes) -> tuple[str, ...]:
    """From the whole to the part: a database and its relation by oids, or what else there is.

    For the border of a layer too, which need not be a key that exists.
    """
    if key == _END_OF_KEYS:
        return ("end",)
    kind, a, b, c, d, _ = split_key(key)
    if kind == KeyKind.RELATION:
        return _relation(a, b, c, d)
    if kind == KeyKind.SLRU and a in list(SlruKind):
        return ("SLRU", SlruKind(a).directory)
    if kind == KeyKind.TWOPHASE:
        return ("prepared transactions",)
    if kind == KeyKind.CONTROL:
        return ("control", _CONTROL[key]) if key in _CONTROL else ("control",)
    if kind == KeyKind.ORIGINS:
        return ("replication origins",)
    if kind == KeyKind.TABLESPACES:
        return ("tablespaces",)
    return ("unknown",)


def _relation(spcnode: int, dbnode: int, relnode: int, forknum: int) -> tuple[str, ...]:
    if spcnode == 0:
        return ("databases",)
    if dbnode == 0:
        database = "shared"
    elif spcnode == DEFAULTTABLESPACE_OID:
        database = f"database {dbnode}"
    else:
        database = f"database {dbnode} in tablespace {spcnode}"
    if relnode == 0:
        return (database, "sizes" if forknum else "relation map")
    fork = _FORKS[forknum] if forknum < len(_FORKS) else ""
    return (database, f"{relnode}{fork}")
