"""Where the WAL of a timeline can be had, and whether what is found there is that timeline's.

Branches share the system identifier and the Postgres timeline number of their root, so a compute
must also name the Zenith timeline it runs (its setting ``zenith.zenith_timeline``); a safekeeper
is asked for the timeline by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zenith_utils.conninfo import parse_conninfo, redact, split_options
from zenith_utils.lsn import Lsn, LsnParseError
from zenith_utils.pq_client import PqConnection, connect

if TYPE_CHECKING:
    from pageserver.timelines import TimelineHandle


class SourceError(Exception):
    """The source is not one for this timeline, or breaks the protocol."""


@dataclass(frozen=True, slots=True)
class WalSource:
    """A place to get WAL from, as named by ``callmemaybe``."""

    conninfo: str
    host: str
    port: int
    user: str
    database: str | None
    password: str | None
    options: str | None
    timeline_option: str | None
    tenant_option: str | None

    @property
    def is_safekeeper(self) -> bool:
        """Safekeepers serve many timelines, so their conninfo names one; computes serve one."""
        return self.timeline_option is not None

    def __str__(self) -> str:
        return f"{'safekeeper' if self.is_safekeeper else 'compute'} {self.host}:{self.port}"

    @classmethod
    def parse(cls, conninfo: str) -> WalSource:
        """Raises SourceError if it is no connection string."""
        try:
            fields = parse_conninfo(conninfo)
            options = fields.get("options")
            # Read as a safekeeper reads them: what is checked here is what it will go by.
            settings = split_options(options or "")
            return cls(
                conninfo=conninfo,
                host=fields.get("hostaddr") or fields.get("host") or "127.0.0.1",
                port=int(fields.get("port") or 5432),
                user=fields.get("user") or "zenith_admin",
                database=fields.get("dbname"),
                password=fields.get("password"),
                options=options,
                timeline_option=settings.get("ztimelineid"),
                tenant_option=settings.get("ztenantid"),
            )
        except ValueError as error:
            raise SourceError(f"connection string '{redact(conninfo)}': {error}") from error

    def connect(self, timeout: float, *, replication: bool = True) -> PqConnection:
        """A connection for replication, or for SQL. Raises PqError."""
        return connect(
            self.host,
            self.port,
            user=self.user,
            database=self.database,
            options=self.options,
            replication=replication,
            application_name="pageserver",
            password=self.password,
            timeout=timeout,
        )


def identify(
    connection: PqConnection, source: WalSource, handle: TimelineHandle, timeout: float
) -> Lsn:
    """WAL position of a source, after checking that it has this timeline's WAL.

    Raises SourceError if it is another cluster's or another branch's.
    """
    rows = connection.simple_query("IDENTIFY_SYSTEM", timeout=timeout)
    if len(rows) != 1 or len(rows[0]) < 3 or rows[0][0] is None or rows[0][2] is None:
        raise SourceError("unexpected answer to IDENTIFY_SYSTEM")
    try:
        system_identifier = int(rows[0][0])
        position = Lsn.parse(rows[0][2].decode())
    except (ValueError, LsnParseError) as error:
        raise SourceError(f"unexpected answer to IDENTIFY_SYSTEM: {error}") from error
    # A safekeeper that has not met a compute yet does not know the identifier: 0.
    if system_identifier not in (0, handle.system_identifier):
        raise SourceError(
            f"system identifier {system_identifier} differs from the timeline's"
            f" {handle.system_identifier}: this is the WAL of another cluster"
        )
    if not source.is_safekeeper:
        _check_compute(connection, handle, timeout)
    return position


def _check_compute(connection: PqConnection, handle: TimelineHandle, timeout: float) -> None:
    for name, expected in (
        ("zenith.zenith_tenant", str(handle.tenant_id)),
        ("zenith.zenith_timeline", str(handle.timeline_id)),
    ):
        rows = connection.simple_query(f"SHOW {name}", timeout=timeout)
        value = (rows[0][0] or b"").decode(errors="replace") if rows and rows[0] else ""
        if value != expected:
            raise SourceError(f"its {name} is '{value}', not '{expected}'")
