"""The safekeeper's HTTP API."""

from __future__ import annotations

from typing import Any

from safekeeper.timelines import TimelineExistsError, TimelineNotFoundError, Timelines
from zenith_utils.http_server import BadRequest, HttpError, Request, Response, Route, json_response
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.lsn import lsn_text


class HttpApi:
    """Handlers of the routes."""

    def __init__(self, node_id: int, timelines: Timelines) -> None:
        self._node_id = node_id
        self._timelines = timelines

    def routes(self) -> list[Route]:
        """All routes but /metrics."""
        return [
            Route("GET", "/v1/status", self._status),
            Route("GET", "/v1/timeline/{tenant_id}/{timeline_id}", self._timeline_status),
            Route("POST", "/v1/timeline", self._create_timeline),
        ]

    def _status(self, request: Request) -> dict[str, Any]:
        del request
        return {"id": self._node_id}

    def _timeline_status(self, request: Request) -> dict[str, Any]:
        timeline_id = TenantTimelineId(request.tenant_id(), request.timeline_id())
        try:
            timeline = self._timelines.get(timeline_id)
        except TimelineNotFoundError as e:
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
        }

    def _create_timeline(self, request: Request) -> Response:
        fields = request.json_object()
        timeline_id = TenantTimelineId(
            TenantId(_id_bytes(fields, "tenant_id")), TimelineId(_id_bytes(fields, "timeline_id"))
        )
        try:
            self._timelines.create(timeline_id)
        except TimelineExistsError as e:
            raise HttpError(str(e)) from e
        return json_response(None, 201)


def _id_bytes(fields: dict[str, Any], name: str) -> bytes:
    """An id written as an array of 16 byte values."""
    value = fields.get(name)
    try:
        if not isinstance(value, list) or len(value) != 16:
            raise ValueError("expected an array of 16 integers")
        return bytes(value)
    except (TypeError, ValueError) as e:
        raise BadRequest(f"Failed to parse json request {name}: {e}") from e
