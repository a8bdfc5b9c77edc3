"""The safekeeper's HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safekeeper.control_file import ControlFileError
from safekeeper.identity import Identity
from safekeeper.timeline import TimelineFailedError
from safekeeper.timelines import TimelineExistsError, TimelineNotFoundError, Timelines
from safekeeper.wal_files import WalStorageError
from zenith_utils.http_server import (
    BadRequest,
    HttpError,
    Request,
    Response,
    Route,
    documentation_routes,
    json_response,
    metrics_route,
)
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.metrics import Metrics


class HttpApi:
    """Handlers of the routes."""

    def __init__(self, identity: Identity, timelines: Timelines) -> None:
        self._identity = identity
        self._timelines = timelines

    def routes(self, metrics: Metrics) -> list[Route]:
        """All routes."""
        described: list[Route] = [
            Route("GET", "/v1/status", self._status, quick=True),
            Route("GET", "/v1/timeline/{tenant_id}/{timeline_id}", self._timeline_status),
            Route("GET", "/v1/timeline", self._list_timelines),
            Route("POST", "/v1/timeline", self._create_timeline),
            metrics_route(metrics),
        ]

        def load() -> Mapping[str, Any]:
            from safekeeper.openapi import description
            from zenith_utils.openapi import build

            return build(description(), described)

        described += documentation_routes(load)
        return described

    def _status(self, request: Request) -> dict[str, Any]:
        del request
        return {"id": self._identity.id, "instance": self._identity.instance.hex()}

    def _list_timelines(self, request: Request) -> list[dict[str, Any]]:
        """What changes of the membership have to know of each timeline."""
        del request
        return [
            {
                "tenant_id": str(state.tenant_id),
                "timeline_id": str(state.timeline_id),
                "commit_lsn": lsn_text(state.commit_lsn),
                "generation": state.generation,
                "established": state.established,
                "recovering": state.recovering,
            }
            for state in self._timelines.states()
        ]

    def _timeline_status(self, request: Request) -> dict[str, Any]:
        timeline_id = TenantTimelineId(request.tenant_id(), request.timeline_id())
        try:
            timeline = self._timelines.get(timeline_id)
        except (
            TimelineNotFoundError,
            TimelineFailedError,
            ControlFileError,
            WalStorageError,
        ) as e:
            raise HttpError(str(e)) from e
        acceptor = timeline.acceptor
        state = acceptor.state
        return {
            "tenant_id": str(state.tenant_id),
            "timeline_id": str(state.timeline_id),
            "acceptor_state": {
                "term": state.term,
                "epoch": acceptor.epoch,
                "term_history": [{"term": e.term, "lsn": e.lsn} for e in state.term_history],
            },
            "commit_lsn": lsn_text(state.commit_lsn),
            "s3_wal_lsn": lsn_text(state.s3_wal_lsn),
            "peer_horizon_lsn": lsn_text(state.peer_horizon_lsn),
            "remote_consistent_lsn": lsn_text(state.remote_consistent_lsn),
            "flush_lsn": lsn_text(acceptor.flush_lsn),
            "oldest_lsn": lsn_text(timeline.oldest_lsn()),
            "wal_held_by": timeline.kept.holder,
            "generation": state.generation,
            "established": state.established,
            "recovering": state.recovering,
        }

    def _create_timeline(self, request: Request) -> Response:
        fields = request.json_object()
        timeline_id = TenantTimelineId(
            TenantId(_id_bytes(fields, "tenant_id")), TimelineId(_id_bytes(fields, "timeline_id"))
        )
        try:
            self._timelines.create(timeline_id, _peer_ids(fields))
        except TimelineExistsError as e:
            raise HttpError(str(e)) from e
        return json_response(None, 201)


def _id_bytes(fields: dict[str, Any], name: str) -> bytes:
    """An id written as an array of 16 byte values."""
    value = _integers(fields.get(name), 256)
    if value is None or len(value) != 16:
        raise BadRequest(f"Failed to parse json request {name}: expected an array of 16 bytes")
    return bytes(value)


def _peer_ids(fields: dict[str, Any]) -> list[int]:
    """Node ids of the other safekeepers; may be missing."""
    value = _integers(fields.get("peer_ids", []), 1 << 64)
    if value is None:
        raise BadRequest("Failed to parse json request peer_ids: expected an array of node ids")
    return value


def _integers(value: object, end: int) -> list[int] | None:
    """An array of integers in [0, end), None if it is anything else. true and false are none."""
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        return None
    return value if all(0 <= item < end for item in value) else None
