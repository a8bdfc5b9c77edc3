"""What a walproposer is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from compute_tools.safekeeper_membership import NOT_KNOWN, SafekeeperMembership
from compute_tools.walproposer.core import Predecessors
from zenith_utils.ids import TenantId, TimelineId


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of a walproposer.

    `pageserver_connstr` may hold the token for the pageserver, so it is not for showing.

    `pgdata` is the compute's data directory (its WAL is read), `feedback_file` tells Postgres what
    the pageserver reports (feedback_file.pyx). With `predecessors` it takes up the stream of a
    Postgres that runs.
    """

    tenant_id: TenantId
    timeline_id: TimelineId
    safekeepers: tuple[tuple[str, int], ...]
    pageserver_connstr: str | None = field(repr=False)
    pgdata: Path | None
    pg_version: int = 0
    drain_timeout: float = 10.0
    feedback_file: Path | None = None
    predecessors: Predecessors | None = None
    membership: SafekeeperMembership = NOT_KNOWN
    """With a member for each of `safekeepers`, or none."""
    settle: bool = False
    """Leave when the generation is established, without a Postgres."""

    @property
    def session_options(self) -> str:
        """Start-up options of a session with a safekeeper."""
        return f"-c ztimelineid={self.timeline_id} ztenantid={self.tenant_id}"
