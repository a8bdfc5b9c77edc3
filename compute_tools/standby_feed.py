"""Which safekeeper a hot standby follows.

libpq goes on to the next one when a connection is refused or breaks, and that is all it does: a
walreceiver waits for ever for a safekeeper that hangs while it logs in, and follows one that has
lost touch with the others. So the safekeepers are asked how far they are, and if the one that is
followed does not answer or stays behind, the one that is furthest takes its place.

WAL that nobody needed for long is removed, on each safekeeper by itself. A standby that could not
follow meanwhile asks for it again and again: it is led to one that still has it. If there is none,
it can only begin anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from compute_tools.spec import ComputeSpec, address_text
from postgres_ffi.wal_format import segment_start
from zenith_utils.lsn import Lsn, LsnParseError
from zenith_utils.pq_client import PqConnection, PqError, connect

log = logging.getLogger(__name__)

# What the safekeeper knows a standby's walreceiver, and us, by.
APPLICATION_NAME: Final = "zenith_hot_standby"
USER: Final = "zenith_standby"
CHECK_INTERVAL: Final = 3.0
# SQLSTATE of a safekeeper, as of a stock walsender, that has not the WAL asked for.
WAL_IS_GONE: Final = "58P01"

_CONNECT_TIMEOUT: Final = 5.0
_CHECK_TIMEOUT: Final = 2.0
# Checks that find nobody with the WAL before the standby is given up. Between them Postgres has
# tried itself (wal_retrieve_retry_interval), perhaps in the segment after, and got nothing.
_MISSES: Final = 2
# Where the standby's WAL ends if nobody sends it more. A walreceiver shows itself from when it is
# connected until it ends, so between two attempts that bring nothing there is none to be seen,
# however long each of them takes.
_WAITS: Final = (
    "SELECT greatest(pg_last_wal_replay_lsn(), pg_last_wal_receive_lsn()) "
    "WHERE NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"
)

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
        self._missed = (Lsn(0), 0)  # where WAL was missed, and how often
        self.lost = ""
        """Why the standby can never go on, if that is so."""

    def begin_at(self, lsn: Lsn) -> None:
        """Begin with a safekeeper that has the segment of `lsn`: the newest one may have a part."""
        found, _ = self._find_wal(lsn)
        if found is not None:
            self._prefer(found)

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
        """Follow another safekeeper if the present one is away, or behind for a whole interval.

        Or if it has removed the WAL that the standby needs next; `lost` says so if all have. Raises
        PqError, LsnParseError if Postgres does not tell where it stands.
        """
        known = progress(self._spec, [], timeout=_CHECK_TIMEOUT)
        if known and not self._left_laggard(known):
            self._look_for_wal()

    def _left_laggard(self, known: dict[Address, int]) -> bool:
        """Whether the safekeeper that is furthest is followed now instead of one that is not."""
        here = known.get(self._order[0])
        expected, self._furthest = self._furthest, max(known.values())
        if here is not None and here >= expected:
            return False
        best = max(known, key=lambda address: known[address])
        if best == self._order[0]:
            return False
        self._follow(best, "does not answer" if here is None else f"stays behind at {Lsn(here)}")
        return True

    def _look_for_wal(self) -> None:
        """See to it that a standby which waits for WAL gets it, or is lost."""
        lsn = waits_at(self._spec)
        if lsn is None:
            return
        found, lacking = self._find_wal(lsn)
        if found is None:
            self._count_miss(lsn, lacking)
            return
        self._missed = (lsn, 0)
        if found != self._order[0]:
            self._follow(found, f"has no WAL at {lsn}")

    def _find_wal(self, lsn: Lsn) -> tuple[Address | None, list[Address]]:
        """The first safekeeper that has WAL at `lsn`, and those before it that have none."""
        lacking: list[Address] = []
        for address in self._order:
            try:
                if has_wal(address, self._spec, lsn):
                    return address, lacking
            except (PqError, OSError, TimeoutError):
                continue  # it may have it
            lacking.append(address)
        return None, lacking

    def _count_miss(self, lsn: Lsn, lacking: list[Address]) -> None:
        """Nobody who answers has the WAL. If most say that it is gone, it will not come back."""
        if 2 * len(lacking) <= len(self._order):
            return
        missed_at, times = self._missed
        self._missed = lsn, times + 1 if lsn == missed_at else 1
        if self._missed[1] == _MISSES:
            self.lost = (
                f"the WAL at {lsn}, where this hot standby stands, has been removed from the "
                "safekeepers while it could not follow: start it again, it begins anew with the "
                "branch as it is then"
            )

    def _follow(self, address: Address, why: str) -> None:
        log.info("following %s: %s %s", address_text(*address), address_text(*self._order[0]), why)
        self._prefer(address)
        self._on_change()

    def _prefer(self, address: Address) -> None:
        self._order = (address, *(other for other in self._order if other != address))


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


def has_wal(address: Address, spec: ComputeSpec, lsn: Lsn) -> bool:
    """Whether a safekeeper streams from the segment with `lsn` on, as a walreceiver asks for it.

    Raises PqError, TimeoutError: it does not say.
    """
    with connect_safekeeper(address, spec, _CHECK_TIMEOUT) as conn:
        try:
            command = f"START_REPLICATION {Lsn(segment_start(lsn))} TIMELINE 1"
            conn.start_copy_both(command, timeout=_CHECK_TIMEOUT)
            conn.recv_copy_data(timeout=_CHECK_TIMEOUT)
        except PqError as e:
            if e.sqlstate != WAL_IS_GONE:
                raise
            return False
    return True


def waits_at(spec: ComputeSpec) -> Lsn | None:
    """Where the running standby has found no WAL to go on with; None if it did not look in vain.

    Raises PqError, LsnParseError.
    """
    with connect(
        "127.0.0.1", spec.port, user=spec.superuser, database="postgres", timeout=_CHECK_TIMEOUT
    ) as conn:
        rows = conn.simple_query(_WAITS, timeout=_CHECK_TIMEOUT)
    lsn = rows[0][0] if rows else None
    return None if lsn is None else Lsn.parse(lsn.decode())
