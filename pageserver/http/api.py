"""What the endpoints do, free of HTTP machinery: plain values in, JSON-ready values out.

Everything here may block (disk, waiting for WAL) and is called from worker threads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

from pageserver.config import ConfigError
from pageserver.leases import MAX_TTL, Lease, LeaseGoneError
from pageserver.tenant import (
    TenantExistsError,
    TenantNotFoundError,
    TimelineExistsError,
    TimelineNotFoundError,
)
from pageserver.tenants import TenantManager
from pageserver.time_travel import lsn_by_timestamp
from pageserver.timelines import LsnNotArrivedError, LsnNotReadableError, TimelineHandle
from postgres_ffi.wal_format import normalize_lsn
from zenith_utils.errors import error_chain
from zenith_utils.http_server import BadRequest, HttpError, NotFound, Response
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn, LsnParseError
from zenith_utils.timestamp import TimestampParseError, parse_timestamp, timestamp_text

log = logging.getLogger(__name__)

Json = Any

_LEASE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Gone(HttpError):
    """410: it was there once."""

    status = HTTPStatus.GONE
    prefix = "Gone: "


class Conflict(HttpError):
    """409: the state of things does not allow this."""

    status = HTTPStatus.CONFLICT
    prefix = "Conflict: "


# What exists already is told by the status alone.
_EXISTS = Response(HTTPStatus.CONFLICT, b"null")


class PageserverApi:
    """The endpoints' work on the tenants of one pageserver."""

    def __init__(self, tenants: TenantManager) -> None:
        self._tenants = tenants

    def status(self) -> Json:
        """Identity of the node."""
        return {"id": self._tenants.conf.id}

    def tenant_list(self) -> Json:
        """All tenants with their states."""
        return [
            {"id": str(tenant.tenant_id), "state": tenant.state.value}
            for tenant in self._tenants.tenants()
        ]

    def tenant_create(self, body: Mapping[str, Json]) -> Json:
        """Creates a tenant; its id. All other keys are settings of its own."""
        settings = dict(body)
        tenant_id = _tenant_id(settings, "new_tenant_id")
        try:
            return str(self._tenants.create_tenant(tenant_id, settings).tenant_id)
        except TenantExistsError:
            return _EXISTS
        except ConfigError as error:
            raise _bad_config(error) from error

    def tenant_configure(self, body: Mapping[str, Json]) -> Json:
        """Changes settings that a tenant has of its own, null takes one away; its settings."""
        changes = dict(body)
        tenant_id = _tenant_id(changes, "tenant_id")
        if tenant_id is None:
            raise _bad_json("missing field `tenant_id`")
        try:
            self._tenants.configure_tenant(tenant_id, changes)
        except TenantNotFoundError as error:
            raise NotFound(str(error)) from error
        except ConfigError as error:
            raise _bad_config(error) from error
        return self.tenant_config(tenant_id)

    def tenant_config(self, tenant_id: TenantId) -> Json:
        """The settings of a tenant: all of them, and those it has of its own."""
        try:
            tenant = self._tenants.tenant(tenant_id)
        except TenantNotFoundError as error:
            raise NotFound(str(error)) from error
        return {
            "tenant_id": str(tenant_id),
            "effective": tenant.settings.document(),
            "overrides": dict(tenant.overrides),
        }

    def timeline_list(self, tenant_id: TenantId, *, recount: bool) -> Json:
        """Descriptions of all timelines of a tenant.

        One that cannot be loaded is listed without its local part, and does not hide the others.
        """
        try:
            tenant = self._tenants.tenant(tenant_id)
        except TenantNotFoundError as error:
            raise HttpError(f"Failed to get repo for tenant {tenant_id}") from error
        answer = []
        for timeline_id in tenant.timeline_ids():
            try:
                answer.append(describe(tenant.timeline(timeline_id), recount=recount))
            except TimelineNotFoundError:
                continue
            except Exception:
                log.exception("timeline %s-%s cannot be loaded", tenant_id, timeline_id)
                answer.append(_info(tenant_id, timeline_id, None))
        return answer

    def timeline_create(self, tenant_id: TenantId, body: Mapping[str, Json]) -> Json:
        """Creates a timeline; its description."""
        try:
            new_id = _parsed(body, "new_timeline_id", TimelineId.parse)
            ancestor_id = _parsed(body, "ancestor_timeline_id", TimelineId.parse)
            start_lsn = _parsed(body, "ancestor_start_lsn", Lsn.parse)
        except (IdParseError, LsnParseError) as error:
            raise _bad_json(str(error)) from None
        if start_lsn is not None and ancestor_id is None:
            raise BadRequest("ancestor_start_lsn needs an ancestor_timeline_id")
        try:
            handle = self._tenants.create_timeline(
                tenant_id, new_id, ancestor_id=ancestor_id, start_lsn=start_lsn
            )
        except TimelineExistsError:
            return _EXISTS
        # A branch shares all its data: counting it would take longer than making it.
        return describe(handle, sized=ancestor_id is None)

    def timeline_detail(
        self, tenant_id: TenantId, timeline_id: TimelineId, *, recount: bool
    ) -> Json:
        """The description of one timeline."""
        try:
            return describe(self._tenants.timeline(tenant_id, timeline_id), recount=recount)
        except TimelineNotFoundError as error:
            raise _no_timeline() from error

    def lsn_by_timestamp(
        self, tenant_id: TenantId, timeline_id: TimelineId, timestamp: str | None
    ) -> Json:
        """Where a timeline stood at a time given in RFC 3339; see `time_travel.TimestampLsn`.

        Every transaction that ended before `received_lsn` was known when the answer was found.
        """
        if timestamp is None:
            raise BadRequest("missing query parameter `timestamp`")
        try:
            time = parse_timestamp(timestamp)
        except TimestampParseError as error:
            raise BadRequest(str(error)) from None
        handle = self._timeline(tenant_id, timeline_id)
        received = max(handle.timeline.last_record_lsn, handle.walreceiver.received_lsn)
        found = lsn_by_timestamp(handle.datadir, time)
        return {
            "lsn": str(found.lsn),
            "kind": found.kind.value,
            "commit_time": None if found.commit_time is None else timestamp_text(found.commit_time),
            "ancestor_timeline_id": None if found.ancestor_id is None else str(found.ancestor_id),
            # Behind the last record on a page the sender's end of the WAL is behind a page header.
            "received_lsn": str(Lsn(normalize_lsn(received))),
        }

    def lease_create(
        self, tenant_id: TenantId, timeline_id: TimelineId, body: Mapping[str, Json]
    ) -> Json:
        """Takes a lease on an LSN."""
        handle = self._timeline(tenant_id, timeline_id)
        lsn, ttl = _lease_lsn(body), _lease_ttl(body)
        if lsn is None:
            raise _bad_json("missing field `lsn`")
        try:
            return _lease_json(handle.acquire_lease(lsn, ttl))
        except LsnNotReadableError as error:
            raise Conflict(str(error)) from error

    def lease_renew(
        self,
        tenant_id: TenantId,
        timeline_id: TimelineId,
        lease_id: str,
        body: Mapping[str, Json],
    ) -> Json:
        """Extends a lease; one that is unknown is made anew if the LSN is given and readable."""
        _check_lease_id(lease_id)
        handle = self._timeline(tenant_id, timeline_id)
        lsn, ttl = _lease_lsn(body), _lease_ttl(body)
        try:
            return _lease_json(handle.renew_lease(lease_id, ttl, lsn))
        except LsnNotArrivedError as error:
            raise Conflict(str(error)) from error
        except (LeaseGoneError, LsnNotReadableError) as error:
            raise Gone(str(error)) from error

    def lease_release(self, tenant_id: TenantId, timeline_id: TimelineId, lease_id: str) -> Json:
        """Ends a lease; ending one that is gone is no error."""
        _check_lease_id(lease_id)
        self._timeline(tenant_id, timeline_id).release_lease(lease_id)

    def attach(self, tenant_id: TenantId, timeline_id: TimelineId) -> NoReturn:
        """Takes a timeline over from remote storage; as there is none it never has it."""
        if self._is_local(tenant_id, timeline_id):
            raise HttpError("Timeline is already present locally")
        raise BadRequest("Unknown remote timeline")

    def detach(self, tenant_id: TenantId, timeline_id: TimelineId) -> NoReturn:
        """Leaves a timeline to remote storage; refused as long as there is none."""
        if not self._is_local(tenant_id, timeline_id):
            raise HttpError("cannot detach timeline that is not available locally")
        raise Conflict(
            f"timeline {timeline_id} has no copy in remote storage: detaching would destroy it"
        )

    def _is_local(self, tenant_id: TenantId, timeline_id: TimelineId) -> bool:
        try:
            return timeline_id in self._tenants.tenant(tenant_id).timeline_ids()
        except TenantNotFoundError:
            return False

    def _timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineHandle:
        try:
            return self._tenants.timeline(tenant_id, timeline_id)
        except TenantNotFoundError as error:
            raise NotFound(str(error)) from error
        except TimelineNotFoundError as error:
            raise _no_timeline() from error


def describe(handle: TimelineHandle, *, sized: bool = True, recount: bool = False) -> Json:
    """TimelineInfo of a loaded timeline; what takes WAL that has not arrived is left out.

    ``sized``: with its logical size, which is counted once; ``recount``: with that counted afresh.
    """
    timeline = handle.timeline
    # First: without a source, nothing is ingested any more that is not part of the answer.
    source = handle.walreceiver.source
    # And nothing is durable that is not ingested.
    disk_consistent_lsn = Lsn(timeline.disk_consistent_lsn)
    end = handle.datadir.end_of_wal(sized=sized, recount=recount)
    ancestor_id = timeline.ancestor_id
    local = {
        "ancestor_timeline_id": None if ancestor_id is None else str(ancestor_id),
        "ancestor_lsn": None if ancestor_id is None else str(Lsn(timeline.ancestor_lsn)),
        "initdb_lsn": str(timeline.initdb_lsn),
        "last_record_lsn": str(end.last_record_lsn),
        "prev_record_lsn": str(end.prev_record_lsn),
        "disk_consistent_lsn": str(disk_consistent_lsn),
        "current_logical_size": end.logical_size,
        "current_logical_size_non_incremental": end.recounted,
        "wal_source": None if source is None else str(source),
        "timeline_state": "Loaded",
    }
    return _info(handle.tenant_id, handle.timeline_id, local)


def _info(tenant_id: TenantId, timeline_id: TimelineId, local: Json) -> Json:
    return {
        "tenant_id": str(tenant_id),
        "timeline_id": str(timeline_id),
        "local": local,
        "remote": None,
    }


def _lease_json(lease: Lease) -> Json:
    return {
        "lease_id": lease.lease_id,
        "lsn": str(lease.lsn),
        "expires_in": round(lease.ttl, 3),
    }


def _lease_lsn(body: Mapping[str, Json]) -> Lsn | None:
    try:
        lsn: Lsn | None = _parsed(body, "lsn", Lsn.parse)
    except LsnParseError as error:
        raise _bad_json(str(error)) from None
    if lsn == 0:
        raise _bad_json("lsn must not be 0/0")
    return lsn


def _lease_ttl(body: Mapping[str, Json]) -> float:
    ttl = body.get("ttl")
    if isinstance(ttl, bool) or not isinstance(ttl, int | float):
        raise _bad_json("field `ttl` must be a number of seconds")
    if not 0 < ttl <= MAX_TTL:
        raise _bad_json(f"field `ttl` must be above 0 and at most {MAX_TTL:.0f} seconds")
    return float(ttl)


def _check_lease_id(lease_id: str) -> None:
    """Only what leases are called is kept in their file."""
    if _LEASE_ID.fullmatch(lease_id) is None:
        raise BadRequest("failed to parse lease_id")


def _optional_string(body: Mapping[str, Json], key: str) -> str | None:
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise _bad_json(f"field `{key}` must be a string")
    return value


def _parsed(body: Mapping[str, Json], key: str, parse: Any) -> Any:
    text = _optional_string(body, key)
    return None if text is None else parse(text)


def _tenant_id(body: dict[str, Json], key: str) -> TenantId | None:
    """The tenant that a request names, taken out of it."""
    try:
        tenant_id: TenantId | None = _parsed(body, key, TenantId.parse)
    except IdParseError as error:
        raise _bad_json(str(error)) from None
    body.pop(key, None)
    return tenant_id


def _bad_config(error: ConfigError) -> BadRequest:
    return BadRequest(": ".join(error_chain(error)))


def _no_timeline() -> NotFound:
    return NotFound("Timeline is not found neither locally nor remotely")


def _bad_json(detail: str) -> BadRequest:
    return BadRequest(f"Failed to parse json request {detail}")
