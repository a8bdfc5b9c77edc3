"""Client of the pageserver's HTTP API, as far as the command line needs it."""

from __future__ import annotations

from typing import Any

from control_plane import http_client
from control_plane.addresses import parse_address
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

# Timeline creation waits for WAL up to the pageserver's wait_lsn_timeout.
CREATE_TIMEOUT = 180.0
TIMEOUT = 30.0


class PageserverHttp:
    """The pageserver of a local environment. Every method raises ControlPlaneError."""

    def __init__(self, env: LocalEnv) -> None:
        self._address = parse_address(env.pageserver.listen_http_addr)

    def tenant_list(self) -> list[dict[str, Any]]:
        """Tenants with their states."""
        answer: list[dict[str, Any]] = self._request("GET", "/tenant", list)
        return answer

    def tenant_create(self, tenant_id: TenantId) -> TenantId:
        """Create a tenant without timelines."""
        body = {"new_tenant_id": str(tenant_id)}
        return TenantId.parse(self._request("POST", "/tenant", str, body))

    def timeline_list(self, tenant_id: TenantId) -> list[dict[str, Any]]:
        """TimelineInfo objects of a tenant."""
        path = f"/tenant/{tenant_id}/timeline"
        answer: list[dict[str, Any]] = self._request("GET", path, list)
        return answer

    def timeline_create(
        self,
        tenant_id: TenantId,
        new_timeline_id: TimelineId | None = None,
        ancestor_timeline_id: TimelineId | None = None,
        ancestor_start_lsn: Lsn | None = None,
    ) -> dict[str, Any]:
        """Create a root timeline, or a branch where an ancestor is given."""
        body = {
            "new_timeline_id": _text(new_timeline_id),
            "ancestor_timeline_id": _text(ancestor_timeline_id),
            "ancestor_start_lsn": _text(ancestor_start_lsn),
        }
        path = f"/tenant/{tenant_id}/timeline"
        answer: dict[str, Any] = self._request("POST", path, dict, body)
        return answer

    def _request(self, method: str, path: str, kind: type, body: object = None) -> Any:
        timeout = TIMEOUT if method == "GET" else CREATE_TIMEOUT
        try:
            answer = http_client.request(self._address, method, f"/v1{path}", body, timeout=timeout)
        except http_client.UnreachableError as e:
            raise ControlPlaneError(
                "the pageserver does not answer: is it running? ('zenith start')"
            ) from e
        if not answer.ok:
            raise ControlPlaneError(answer.error)
        if not isinstance(answer.document, kind):
            raise ControlPlaneError(f"{answer.url} does not answer like a pageserver")
        return answer.document


def _text(value: object) -> str | None:
    return None if value is None else str(value)
