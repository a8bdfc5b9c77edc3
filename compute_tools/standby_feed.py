"""Which safekeeper a hot standby follows.

libpq goes on to the next one when a connection is refused or breaks, and that is all it does: a
walreceiver waits for ever for a safekeeper that hangs while it logs in, and follows one that has
lost touch with the others. So the safekeepers are asked how far they are, and if the one that is
followed does not answer or stays behind, the one that is furthest takes its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from compute_tools.spec import ComputeSpec, address_text
from zenith_utils.lsn import Lsn, LsnParseError
from zenith_utils.pq_client import PqConnection, PqError, connect

log = logging.getLogger(__name__)

# What the safekeeper knows a standby's walreceiver, and us, by.
APPLICATION_NAME: Final = "zenith_hot_standby"
USER: Final = "zenith_standby"
CHECK_INTERVAL: Final = 3.0

_CONNECT_TIMEOUT: Final = 5.0
_CHECK_TIMEOUT: Final = 2.0

Address = tuple[str, int]


class StandbyFeed:
    """The order in which the safekeepers are tried. check() runs in a thread of its own."""

    def __init__(self, spec: ComputeSpec, on_change: Callable[[], None]) -> None:
        """`on_change` is called when conninfo() has changed, in the thread of check()."""
        self._spec = spec
        self._on_change = on_change
        # Nodes with different ports begin with different ones.
        first = spec.port % max(1, len(spec.safekeepers))
        self._order = (*spec.safekeepers[first:], *spec.safekeepers[:first])
        self._furthest = 0

    def conninfo(self) -> str:
        """The connection string of the walreceiver."""
        order = self._order
        settings = {
            "host": ",".join(host for host, _ in order),
            "port": ",".join(str(port) for _, port in order),
            "user": USER,
            "application_name": APPLICATION_NAME,
            "options": replication_options(self._spec),
            "sslmode": "disable",
            "gssencmode": "disable",
        }
        return " ".join(f"{name}='{value}'" for name, value in settings.items())

    def check(self) -> None:
        """Follow another safekeeper if the present one is away, or behind for a whole interval."""
        known = progress(self._spec, [], timeout=_CHECK_TIMEOUT)
        if not known:
            return
        here = known.get(self._order[0])
        expected, self._furthest = self._furthest, max(known.values())
        if here is not None and here >= expected:
            return
        best = max(known, key=lambda address: known[address])
        if best == self._order[0]:
            return
        log.info(
            "following %s: %s %s",
            address_text(*best),
            address_text(*self._order[0]),
            "does not answer" if here is None else f"stays behind at {Lsn(here)}",
        )
        self._order = (best, *(address for address in self._order if address != best))
        self._on_change()


def progress(
    spec: ComputeSpec, reasons: list[str], *, timeout: float = _CONNECT_TIMEOUT
) -> dict[Address, int]:
    """The flush LSNs of the safekeepers that know the timeline; why others do not is appended."""
    known = {}
    for address in spec.safekeepers:
        try:
            with connect_safekeeper(address, spec, timeout) as conn:
                known[address] = flush_lsn(conn, timeout)
        except (PqError, OSError, TimeoutError, LsnParseError) as e:
            reasons.append(f"{address_text(*address)}: {e}")
    return known


def replication_options(spec: ComputeSpec) -> str:
    """Start-up options that name the timeline to a safekeeper."""
    return f"-c ztimelineid={spec.timeline_id} ztenantid={spec.tenant_id}"


def connect_safekeeper(
    address: Address, spec: ComputeSpec, timeout: float = _CONNECT_TIMEOUT
) -> PqConnection:
    """Connect as a standby does. Raises PqError."""
    return connect(
        *address,
        user=USER,
        options=replication_options(spec),
        application_name=APPLICATION_NAME,
        timeout=timeout,
    )


def flush_lsn(conn: PqConnection, timeout: float = _CONNECT_TIMEOUT) -> int:
    """How far the safekeeper's WAL reaches. Raises PqError, LsnParseError."""
    row = conn.simple_query("IDENTIFY_SYSTEM", timeout=timeout)[0]
    return Lsn.parse((row[2] or b"").decode())
