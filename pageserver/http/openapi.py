"""What is said about the pageserver's HTTP API; zenith_utils.openapi makes the document of it."""

from __future__ import annotations

from typing import Any, Final

from pageserver.http.openapi_schemas import LEASE_ID_PATTERN, schemas
from zenith_utils.openapi import (
    ApiDescription,
    Json,
    Operations,
    answer,
    common_operations,
    failure,
    id_parameter,
    json_body,
    ref,
)
from zenith_utils.version import version_text

_TENANT: Final = "63b7c2b6d8a04bff5d0fa2ab7ba08a2f"
_TIMELINE: Final = "e07c53cbb2b2b0c56c7e3fe2d81f3b5b"
_BRANCH: Final = "2e6dd1dc7f5a4d9ba0b0a1f6d8a4c1aa"
_LEASE: Final = "5e6d2c0e8f0b4a7b9d3f1c2a4b6d8e90"
_LSN: Final = "0/16B9188"

_DESCRIPTION: Final = """
Tenants and their timelines (branches), leases on LSNs, and metrics.

Bodies are JSON, whatever the request's `Content-Type` says; keys that a request does not know are
ignored, except where they are settings. An error is answered with `{"msg": "..."}`; any other path
or method with 404 and `page not found`. Ids are 32 hexadecimal digits, without dashes; an LSN is
text such as `0/16B9188`.

Where authentication is on, send `Authorization: Bearer <token>`. A token of scope `pageserverapi`
allows everything, one of scope `tenant` all that is about its tenant.
""".strip()


def description() -> ApiDescription:
    """Everything that is said."""
    return ApiDescription(
        title="Zenith pageserver",
        version=version_text("pageserver").partition(" ")[2],
        description=_DESCRIPTION,
        tags=[
            ("Server", "The pageserver itself."),
            ("Tenants", "A tenant owns timelines, and may have settings of its own."),
            ("Timelines", "A timeline is the history of one cluster, or a branch of another one."),
            ("Leases", "Promises that the state at an LSN stays readable."),
        ],
        path_parameters={
            "tenant_id": id_parameter("Id of the tenant.", _TENANT),
            "timeline_id": id_parameter("Id of the timeline.", _TIMELINE),
            "lease_id": id_parameter("Id of the lease, in lower case.", _LEASE, LEASE_ID_PATTERN),
        },
        operations={**_server(), **_tenants(), **_timelines(), **_leases()},
        schemas=schemas(),
        bearer=True,
    )


# ---- operations


def _server() -> Operations:
    return {
        "GET /v1/status": {
            "tags": ["Server"],
            "operationId": "status",
            "summary": "Who this pageserver is, and that it answers",
            "security": [],
            "responses": {"200": answer("The pageserver is up.", ref("Status"), {"id": 1})},
        },
        **common_operations("Server", "pageserver_maxrss_kb 51234\n"),
    }


def _tenants() -> Operations:
    tags = ["Tenants"]
    config = {
        "tenant_id": _TENANT,
        "effective": {
            "checkpoint_distance": 268435456,
            "compaction_period": "1s",
            "compaction_threshold": 10,
            "compaction_target_size": 268435456,
            "image_creation_threshold": 3,
            "gc_horizon": 0,
            "gc_period": "1min 40s",
            "pitr_interval": "7day",
            "compression": "zstd",
        },
        "overrides": {"gc_horizon": 0, "pitr_interval": "7 days"},
    }
    bad_setting = (
        "Bad request: configure option gc_horizon is not an integer",
        "Bad request: configure option gc_period: invalid duration '1 fortnight': unknown unit "
        "'fortnight'",
    )
    unknown = failure("There is no such tenant.", f"NotFound: Tenant {_TENANT} not found")
    unusable = failure(
        "The tenant cannot be used, or the server failed. Its log says more.",
        f"tenant {_TENANT} cannot be used: Failed to read 'config' as tenant config",
    )
    return {
        "GET /v1/tenant": {
            "tags": tags,
            "operationId": "listTenants",
            "summary": "All tenants",
            "responses": {
                "200": answer(
                    "The tenants, by id.",
                    {"type": "array", "items": ref("Tenant")},
                    [{"id": _TENANT, "state": "Active"}],
                )
            },
        },
        "POST /v1/tenant": {
            "tags": tags,
            "operationId": "createTenant",
            "summary": "Create a tenant",
            "description": "Without a body, or without an id, the id is random. All other keys are "
            "settings that the tenant shall have of its own.",
            "requestBody": json_body(
                ref("TenantCreate"),
                {"new_tenant_id": _TENANT, "pitr_interval": "7 days"},
                required=False,
            ),
            "responses": {
                "201": answer("It exists, durably; its id.", ref("TenantId"), _TENANT),
                "400": failure(
                    "The request is malformed, or a setting is unknown or wrong.", *bad_setting
                ),
                "409": answer("A tenant of that id exists.", {"type": "null"}, None),
                "500": failure(
                    "Its place is taken, or the server failed. Its log says more.",
                    f"tenant {_TENANT} directory already exists",
                ),
            },
        },
        "PUT /v1/tenant/config": {
            "tags": tags,
            "operationId": "configureTenant",
            "summary": "Change settings that a tenant has of its own",
            "description": "Settings that are not named stay as they are; null takes one away, so "
            "that the pageserver's default holds again. The change is durable and takes effect at "
            "once.",
            "requestBody": json_body(
                ref("TenantConfigure"), {"tenant_id": _TENANT, "gc_horizon": 0}
            ),
            "responses": {
                "200": answer("The settings now.", ref("TenantConfig"), config),
                "400": failure(
                    "The request is malformed, or a setting is unknown or wrong.", *bad_setting
                ),
                "404": unknown,
                "500": unusable,
            },
        },
        "GET /v1/tenant/{tenant_id}/config": {
            "tags": tags,
            "operationId": "getTenantConfig",
            "summary": "The settings of a tenant",
            "responses": {
                "200": answer("All of them, and its own.", ref("TenantConfig"), config),
                "404": unknown,
                "500": unusable,
            },
        },
    }


_RECOUNT: Final = {
    "name": "include-non-incremental-logical-size",
    "in": "query",
    "allowEmptyValue": True,
    "schema": {"type": "string"},
    "example": "",
    "description": "If it is there, with any value or none, logical sizes are counted from scratch "
    "as well. That takes long.",
}
_NO_TIMELINE: Final = "NotFound: Timeline is not found neither locally nor remotely"


def _timelines() -> Operations:
    tags = ["Timelines"]
    root = _timeline_info(_TIMELINE)
    branch = _timeline_info(_BRANCH, ancestor_timeline_id=_TIMELINE, ancestor_lsn=_LSN)
    return {
        "GET /v1/tenant/{tenant_id}/timeline": {
            "tags": tags,
            "operationId": "listTimelines",
            "summary": "All timelines of a tenant",
            "parameters": [_RECOUNT],
            "responses": {
                "200": answer(
                    "The timelines, by id. One whose files cannot be read has null as `local`.",
                    {"type": "array", "items": ref("TimelineInfo")},
                    [root],
                ),
                "500": failure(
                    "There is no such tenant, or the server failed.",
                    f"Failed to get repo for tenant {_TENANT}",
                ),
            },
        },
        "POST /v1/tenant/{tenant_id}/timeline": {
            "tags": tags,
            "operationId": "createTimeline",
            "summary": "Create a timeline or a branch",
            "description": "Without an ancestor it holds a fresh cluster. With one it is a branch: "
            "it shares the ancestor's history up to `ancestor_start_lsn`, which is waited for, or "
            "up to the last record. A branch copies nothing.",
            "requestBody": json_body(
                ref("TimelineCreate"),
                {
                    "new_timeline_id": _BRANCH,
                    "ancestor_timeline_id": _TIMELINE,
                    "ancestor_start_lsn": _LSN,
                },
                required=False,
            ),
            "responses": {
                "201": answer("It exists, durably.", ref("TimelineInfo"), branch),
                "400": failure(
                    "The request is malformed.",
                    "Bad request: ancestor_start_lsn needs an ancestor_timeline_id",
                ),
                "409": answer("A timeline of that id exists.", {"type": "null"}, None),
                "500": failure(
                    "There is no such tenant or ancestor, it has no such LSN, or the server "
                    "failed.",
                    f"Tenant {_TENANT} not found",
                    "Cannot branch off the timeline that's not present locally",
                    f"invalid start lsn 0/8 for ancestor timeline {_TIMELINE}: less than timeline "
                    f"ancestor lsn {_LSN}",
                    "invalid branch start lsn",
                    "Timed out while waiting for WAL record at LSN 7/0 to arrive, last_record_lsn "
                    f"{_LSN} disk consistent LSN={_LSN}",
                ),
            },
        },
        "GET /v1/tenant/{tenant_id}/timeline/{timeline_id}": {
            "tags": tags,
            "operationId": "getTimeline",
            "summary": "A timeline",
            "parameters": [_RECOUNT],
            "responses": {
                "200": answer("Its description.", ref("TimelineInfo"), root),
                "404": failure("There is no such timeline.", _NO_TIMELINE),
                "500": failure(
                    "There is no such tenant, or the server failed.",
                    f"Tenant {_TENANT} not found",
                ),
            },
        },
        "GET /v1/tenant/{tenant_id}/timeline/{timeline_id}/get_lsn_by_timestamp": {
            "tags": tags,
            "operationId": "getLsnByTimestamp",
            "summary": "Where a timeline stood at a time",
            "description": "The state just before the first transaction that ended later: "
            "everything acknowledged by then is included.",
            "parameters": [
                {
                    "name": "timestamp",
                    "in": "query",
                    "required": True,
                    "schema": {"type": "string", "format": "date-time"},
                    "example": "2026-11-22T10:00:00Z",
                    "description": "RFC 3339; in a query string a `+` is written as `%2B`.",
                }
            ],
            "responses": {
                "200": answer(
                    "Where it stood.",
                    ref("LsnByTimestamp"),
                    {
                        "lsn": _LSN,
                        "kind": "present",
                        "commit_time": "2026-11-22T09:59:59.123456Z",
                        "ancestor_timeline_id": None,
                        "received_lsn": _LSN,
                    },
                ),
                "400": failure(
                    "The request is malformed.",
                    "Bad request: missing query parameter `timestamp`",
                    "Bad request: invalid timestamp 'noon': expected the form 2026-11-22T10:00:00Z",
                ),
                "404": _not_found(),
            },
        },
        "POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/attach": {
            "tags": tags,
            "operationId": "attachTimeline",
            "summary": "Take over a timeline from remote storage",
            "responses": {
                "400": failure(
                    "Remote storage does not have the timeline: there is none in this version.",
                    "Bad request: Unknown remote timeline",
                ),
                "500": failure(
                    "It is here, or the server failed.", "Timeline is already present locally"
                ),
            },
        },
        "POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/detach": {
            "tags": tags,
            "operationId": "detachTimeline",
            "summary": "Leave a timeline to remote storage",
            "responses": {
                "409": failure(
                    "Nothing else has the timeline: there is no remote storage in this version.",
                    f"Conflict: timeline {_TIMELINE} has no copy in remote storage: detaching "
                    "would destroy it",
                ),
                "500": failure(
                    "It is not here, or the server failed.",
                    "cannot detach timeline that is not available locally",
                ),
            },
        },
    }


def _leases() -> Operations:
    tags = ["Leases"]
    base = "/v1/tenant/{tenant_id}/timeline/{timeline_id}/lsn_lease"
    lease = {"lease_id": _LEASE, "lsn": _LSN, "expires_in": 60.0}
    bad_ttl = "Bad request: Failed to parse json request field `ttl` must be a number of seconds"
    unreadable = f"LSN 0/8 is earlier than latest GC horizon {_LSN}"
    return {
        f"POST {base}": {
            "tags": tags,
            "operationId": "acquireLease",
            "summary": "Take a lease on an LSN",
            "description": "Waits for the LSN. The lease expires by itself unless it is renewed; "
            "it outlives a restart of the pageserver.",
            "requestBody": json_body(ref("LeaseAcquire"), {"lsn": _LSN, "ttl": 60}),
            "responses": {
                "201": answer("The promise is durable.", ref("Lease"), lease),
                "400": failure("The request is malformed.", bad_ttl),
                "404": _not_found(),
                "409": failure("The state at that LSN is gone.", f"Conflict: {unreadable}"),
            },
        },
        f"PUT {base}/{{lease_id}}": {
            "tags": tags,
            "operationId": "renewLease",
            "summary": "Extend a lease",
            "description": "With an `lsn` other than its own the lease moves there. A lease that "
            "is not known is made anew if the `lsn` is given and can be read.",
            "requestBody": json_body(ref("LeaseRenew"), {"ttl": 60}),
            "responses": {
                "200": answer("The promise is durable.", ref("Lease"), lease),
                "400": failure("The request is malformed.", bad_ttl),
                "404": _not_found(),
                "409": failure(
                    "WAL up to that LSN did not arrive in time.",
                    f"Conflict: Timed out while waiting for WAL record at LSN {_LSN} to arrive",
                ),
                "410": failure(
                    "The lease, or the state at that LSN, is gone.",
                    f"Gone: lease {_LEASE} is unknown or has expired",
                    f"Gone: {unreadable}",
                ),
            },
        },
        f"DELETE {base}/{{lease_id}}": {
            "tags": tags,
            "operationId": "releaseLease",
            "summary": "End a lease",
            "description": "Ending one that does not exist is no error.",
            "responses": {
                "200": answer("It is gone.", {"type": "null"}, None),
                "404": _not_found(),
            },
        },
    }


def _not_found() -> Json:
    return failure(
        "There is no such timeline.", _NO_TIMELINE, f"NotFound: Tenant {_TENANT} not found"
    )


def _timeline_info(timeline_id: str, **local: Any) -> Json:
    return {
        "tenant_id": _TENANT,
        "timeline_id": timeline_id,
        "local": {
            "ancestor_timeline_id": None,
            "ancestor_lsn": None,
            "initdb_lsn": "0/1000000",
            "last_record_lsn": _LSN,
            "prev_record_lsn": "0/16B9150",
            "disk_consistent_lsn": _LSN,
            "current_logical_size": 25_190_400,
            "current_logical_size_non_incremental": None,
            "wal_source": None,
            "timeline_state": "Loaded",
            **local,
        },
        "remote": None,
    }
