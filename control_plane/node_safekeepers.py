"""The safekeepers in a node's postgresql.conf: the environment's own, or others the user chose.

A node that is created gets the environment's safekeepers written into its `wal_acceptors`, and goes
on with them when they change. A list that never was the environment's is the user's: it stays as it
is, and nothing is known of it but the addresses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from compute_tools.spec import address_text
from control_plane.local_env import LocalEnv
from control_plane.membership import was_safekeepers
from zenith_utils.durable import write_file_durably
from zenith_utils.os_user import give

Addresses = tuple[tuple[str, int], ...]

_HOST = "localhost"
_LOOPBACK = frozenset({_HOST, "127.0.0.1", "::1"})
_LINE = re.compile(r"^[ \t]*(?:zenith\.)?wal_acceptors\b[^\n]*", re.IGNORECASE | re.MULTILINE)


def own_addresses(env: LocalEnv) -> Addresses:
    """The WAL services of the environment's safekeepers."""
    return tuple((_HOST, conf.pg_port) for conf in env.safekeepers)


def are_own(env: LocalEnv, addresses: Addresses) -> bool:
    """Whether these are all the environment's present safekeepers, in any order."""
    return sorted(_ports(addresses)) == sorted(conf.pg_port for conf in env.safekeepers)


def were_own(env: LocalEnv, addresses: Addresses) -> bool:
    """Whether these are all the safekeepers of the present or an earlier generation."""
    return bool(addresses) and was_safekeepers(env, set(_ports(addresses)))


def setting(addresses: Addresses) -> str:
    """The value of wal_acceptors."""
    return ",".join(address_text(*address) for address in addresses)


def follow(pgdata: Path, addresses: Addresses) -> None:
    """Put addresses into the postgresql.conf of a node. Raises OSError."""
    path = pgdata / "postgresql.conf"
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    line = f"wal_acceptors='{setting(addresses)}'"
    changed = _LINE.sub(lambda _: line, text)
    if changed != text:
        write_file_durably(path, changed.encode(errors="surrogateescape"), sync=False)
        give(path)


def _ports(addresses: Sequence[tuple[str, int]]) -> list[int]:
    """The ports; of an address elsewhere one that nobody has."""
    return [port if host in _LOOPBACK else -1 for host, port in addresses]
