"""Client of the pageserver's HTTP API, as far as the command line needs it."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from control_plane import http_client
from control_plane.addresses import parse_address
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.timestamp import timestamp_text

# Value of a setting; None stands for the default.
Setting = str | int | None

# Timeline creation waits for WAL up to the pageserver's wait_lsn_timeout.
CREATE_TIMEOUT = 180.0
TIMEOUT = 30.0


class PageserverHttp:
    """The pageserver of a local environment. Every method raises ControlPlaneError."""

    def __init__(self, env: LocalEnv) -> None:
        self._address = parse_address(env.pageserver.listen_http_addr)
        self._token = env.pageserver.auth_token

    def tenant_list(self) -> list[dict[str, Any]]:
        """Tenants with their states."""
        answer: list[dict[str, Any]] = self._request("GET", "/tenant", list)
        return answer

    def tenant_create(
        self, tenant_id: TenantId, settings: Mapping[str, Setting] | None = None
    ) -> TenantId:
        """Create a tenant without timelines, with settings of its own."""
        body = {"new_tenant_id": str(tenant_id), **(settings or {})}
        exists = f"tenant {tenant_id} exists already"
        return TenantId.parse(self._request("POST", "/tenant", str, body, exists=exists))

    def tenant_config(self, tenant_id: TenantId) -> dict[str, Any]:
        """A tenant's settings: ``effective`` are all of them, ``overrides`` those of its own."""
        answer: dict[str, Any] = self._request("GET", f"/tenant/{tenant_id}/config", dict)
        return answer

    def tenant_configure(
        self, tenant_id: TenantId, changes: Mapping[str, Setting]
    ) -> dict[str, Any]:
        """Change settings that a tenant has of its own; None takes one away. All its settings."""
        body = {"tenant_id": str(tenant_id), **changes}
        answer: dict[str, Any] = self._request("PUT", "/tenant/config", dict, body)
        return answer

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

    def lsn_by_timestamp(
        self, tenant_id: TenantId, timeline_id: TimelineId, time: int
    ) -> dict[str, Any]:
        """Where a timeline stood at a time (microseconds since 2000-01-01 UTC)."""
        path = f"/tenant/{tenant_id}/timeline/{timeline_id}/get_lsn_by_timestamp"
        query = f"?timestamp={timestamp_text(time)}"
        answer: dict[str, Any] = self._request("GET", path + query, dict)
        return answer

    def _request(
        self, method: str, path: str, kind: type, body: object = None, *, exists: str = ""
    ) -> Any:
        """The answer's document; `exists` is what a conflict without a message means."""
        timeout = TIMEOUT if method == "GET" else CREATE_TIMEOUT
        try:
            answer = http_client.request(
                self._address, method, f"/v1{path}", body, timeout=timeout, token=self._token
            )
        except http_client.UnreachableError as e:
            raise ControlPlaneError(
                "the pageserver does not answer: is it running? ('zenith start')"
            ) from e
        if not answer.ok:
            failed = ControlPlaneError(answer.error)
            if exists and answer.status == HTTPStatus.CONFLICT and answer.document is None:
                raise ControlPlaneError(exists) from failed
            raise failed
        if not isinstance(answer.document, kind):
            raise ControlPlaneError(f"{answer.url} does not answer like a pageserver")
        return answer.document


def _text(value: object) -> str | None:
    return None if value is None else str(value)
