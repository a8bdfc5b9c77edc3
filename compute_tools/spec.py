"""What a compute is told to be: the specification its supervisor is started with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from compute_tools.auth import auth_token, password_placeholder
from compute_tools.safekeeper_membership import NOT_KNOWN, SafekeeperMembership
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn


class SpecError(Exception):
    """The specification cannot be read, or says something impossible."""


@dataclass(frozen=True, slots=True)
class ComputeSpec:
    """One compute node.

    `pgdata` is Postgres' data directory and holds the user's postgresql.conf; `state_dir` is the
    supervisor's own (block map, generated settings, what state.py keeps). `lsn` makes the node
    read-only at exactly that LSN; `hot_standby` makes it a read-only one that follows the timeline.
    With `safekeepers` empty the pageserver itself acknowledges commits; `membership`, if it has
    members, says more about each of them.
    """

    tenant_id: TenantId
    timeline_id: TimelineId
    pgdata: Path
    state_dir: Path
    distrib_dir: Path
    pageserver_pg: tuple[str, int]
    pageserver_http: tuple[str, int]
    port: int
    safekeepers: tuple[tuple[str, int], ...] = ()
    membership: SafekeeperMembership = NOT_KNOWN
    lsn: Lsn | None = None
    hot_standby: bool = False
    superuser: str = "zenith_admin"
    stop_timeout: float = 20.0

    @property
    def read_only(self) -> bool:
        """Whether the node writes no WAL: it stands at an LSN, or follows others' WAL."""
        return self.lsn is not None or self.hot_standby

    @property
    def feedback_file(self) -> Path:
        """Where the server's processes find what the pageserver reports."""
        return self.state_dir / "pageserver.feedback"

    @property
    def pageserver_connstr(self) -> str:
        """The URL of the page service, as the safekeepers hand it on.

        With a variable in the place of the token, if there is one: auth.py.
        """
        password = password_placeholder(needed=auth_token() is not None)
        return f"postgresql://no_user:{password}@{address_text(*self.pageserver_pg)}"

    def to_json(self) -> str:
        """The specification as a JSON document."""
        fields = {
            "tenant_id": str(self.tenant_id),
            "timeline_id": str(self.timeline_id),
            "pgdata": str(self.pgdata),
            "state_dir": str(self.state_dir),
            "distrib_dir": str(self.distrib_dir),
            "pageserver_pg": self.pageserver_pg,
            "pageserver_http": self.pageserver_http,
            "port": self.port,
            "safekeepers": self.safekeepers,
            "membership": self.membership.to_json(),
            "lsn": None if self.lsn is None else str(self.lsn),
            "hot_standby": self.hot_standby,
            "superuser": self.superuser,
            "stop_timeout": self.stop_timeout,
        }
        return json.dumps(fields, indent=2)

    @classmethod
    def load(cls, path: Path) -> ComputeSpec:
        """Read a specification; raises SpecError with the file's name."""
        try:
            fields = json.loads(path.read_text())
            return cls(
                tenant_id=TenantId.parse(fields["tenant_id"]),
                timeline_id=TimelineId.parse(fields["timeline_id"]),
                pgdata=Path(fields["pgdata"]),
                state_dir=Path(fields["state_dir"]),
                distrib_dir=Path(fields["distrib_dir"]),
                pageserver_pg=_address(fields["pageserver_pg"]),
                pageserver_http=_address(fields["pageserver_http"]),
                port=int(fields["port"]),
                safekeepers=tuple(_address(a) for a in fields["safekeepers"]),
                membership=SafekeeperMembership.from_json(fields["membership"]),
                lsn=None if fields["lsn"] is None else Lsn.parse(fields["lsn"]),
                hot_standby=bool(fields.get("hot_standby", False)),
                superuser=fields["superuser"],
                stop_timeout=float(fields["stop_timeout"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise SpecError(f"cannot read the compute specification {path}: {e!r}") from e


def address_text(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(value: list[object]) -> tuple[str, int]:
    host, port = value
    if not isinstance(host, str) or not isinstance(port, int):
        raise ValueError(f"not an address: {value!r}")
    return host, port
