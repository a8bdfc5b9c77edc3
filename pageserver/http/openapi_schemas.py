"""The objects of the pageserver's HTTP API: what is in them, as schemas of its OpenAPI document."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from pageserver.leases import MAX_TTL
from pageserver.tenant import TenantState
from pageserver.tenant_config import COMPRESSIONS, TenantConf
from pageserver.time_travel import TimestampKind
from zenith_utils.openapi import ID_PATTERN, LSN_PATTERN, Json, nullable, ref

LEASE_ID_PATTERN: Final = "^[0-9a-f]{32}$"

_SETTINGS: Final = {
    "checkpoint_distance": "WAL, in bytes, after which an open layer is frozen.",
    "compaction_period": "Time between two looks for compaction; `0s`: only on demand.",
    "compaction_threshold": "Number of L0 deltas that are merged.",
    "compaction_target_size": "Size, in bytes, of the files that a merge writes.",
    "image_creation_threshold": "Number of deltas over a key range that make an image due.",
    "gc_horizon": "WAL, in bytes, behind the last record whose history is kept; 0: no collection.",
    "gc_period": "Time between two garbage collections; `0s`: only on demand.",
    "pitr_interval": "Time for which history is kept in any case; `0s`: by `gc_horizon` only.",
    "compression": "Of layer files.",
}


def schemas() -> dict[str, Json]:
    """All of them, by name."""
    return {
        "TenantId": _text("32 hexadecimal digits.", ID_PATTERN),
        "TimelineId": _text("32 hexadecimal digits.", ID_PATTERN),
        "Lsn": _text("Position in the WAL: two hexadecimal numbers of 32 bits.", LSN_PATTERN),
        "Status": _object("id", id={"type": "integer", "minimum": 0, "description": "Node id."}),
        "Tenant": _object(
            "id",
            "state",
            id=ref("TenantId"),
            state={
                "type": "string",
                "enum": [state.value for state in TenantState],
                "description": "Idle until the first WAL comes, Stopping when the pageserver does.",
            },
        ),
        "TenantSettings": _object(**_settings(own=False)),
        "TenantCreate": {
            **_object(new_tenant_id=nullable(ref("TenantId")), **_settings(own=True)),
            "additionalProperties": False,
        },
        "TenantConfigure": {
            **_object("tenant_id", tenant_id=ref("TenantId"), **_settings(own=True)),
            "additionalProperties": False,
        },
        "TenantConfig": _object(
            "tenant_id",
            "effective",
            "overrides",
            tenant_id=ref("TenantId"),
            effective=ref("TenantSettings"),
            overrides=ref("TenantSettings"),
        ),
        "TimelineCreate": _object(
            new_timeline_id=nullable(ref("TimelineId")),
            ancestor_timeline_id=nullable(ref("TimelineId")),
            ancestor_start_lsn=nullable(ref("Lsn")),
        ),
        **_timeline_schemas(),
        **_lease_schemas(),
    }


def _timeline_schemas() -> dict[str, Json]:
    size = {"type": "integer", "minimum": 0}
    lsn = {"$ref": "#/components/schemas/Lsn"}
    return {
        "TimelineInfo": _object(
            "tenant_id",
            "timeline_id",
            "local",
            "remote",
            tenant_id=ref("TenantId"),
            timeline_id=ref("TimelineId"),
            local=nullable(ref("LocalTimelineInfo")),
            remote={"type": "null", "description": "There is no remote storage in this version."},
        ),
        "LocalTimelineInfo": _all_required(
            ancestor_timeline_id=nullable(ref("TimelineId")),
            ancestor_lsn={**nullable(lsn), "description": "The branch point."},
            initdb_lsn={**lsn, "description": "Where the cluster's own history begins."},
            last_record_lsn={**lsn, "description": "End of the last record ingested."},
            prev_record_lsn={**nullable(lsn), "description": "Its begin; `0/0` if not known."},
            disk_consistent_lsn={**lsn, "description": "All WAL up to here is on disk."},
            current_logical_size={
                **nullable(size),
                "description": "Bytes of all relations at `last_record_lsn`; null in the answer to "
                "creating a branch, and while it is not known and counting would have to wait for "
                "WAL of the ancestor, which a restart has lost from memory.",
            },
            current_logical_size_non_incremental={
                **nullable(size),
                "description": "The same, at the same LSN, counted from scratch if that was asked "
                "for; null wherever the other one is.",
            },
            wal_source={
                "type": ["string", "null"],
                "description": "Whom its WAL is being received from: `compute HOST:PORT` or "
                "`safekeeper HOST:PORT`; null while there is no connection.",
            },
            timeline_state={"type": "string", "enum": ["Loaded", "Unloaded"]},
        ),
        "LsnByTimestamp": _all_required(
            lsn=lsn,
            kind={
                "type": "string",
                "enum": [kind.value for kind in TimestampKind],
                "description": "present: the state at that time. future: the newest one, nothing "
                "ended later. past: the oldest that can be read. nodata: there are no times.",
            },
            commit_time={
                "type": ["string", "null"],
                "description": "The newest that is included, with past the oldest there is; UTC.",
            },
            ancestor_timeline_id={
                **nullable(ref("TimelineId")),
                "description": "With past: the timeline that has the history before.",
            },
            received_lsn={
                **lsn,
                "description": "Every transaction that ended before it was known.",
            },
        ),
    }


def _lease_schemas() -> dict[str, Json]:
    ttl = {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": MAX_TTL,
        "description": "Seconds for which it lasts.",
    }
    return {
        "LeaseAcquire": _object("lsn", "ttl", lsn=ref("Lsn"), ttl=ttl),
        "LeaseRenew": _object("ttl", ttl=ttl, lsn=nullable(ref("Lsn"))),
        "Lease": _all_required(
            lease_id=_text("32 hexadecimal digits.", LEASE_ID_PATTERN),
            lsn=ref("Lsn"),
            expires_in={"type": "number", "description": "Seconds."},
        ),
    }


def _settings(*, own: bool) -> dict[str, Json]:
    """The settings of tenants; as they are set (null takes one away), or as they are shown."""
    kinds: dict[str, Json] = {
        "int": {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1},
        "float": {"type": "string", "description": "A duration such as `1h 30min`."},
        "str": {"type": "string", "enum": list(COMPRESSIONS)},
    }
    found = {}
    for field in fields(TenantConf):
        schema = {**kinds[str(field.type)], "description": _SETTINGS[field.name]}
        if own and "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
        found[field.name] = nullable(schema) if own else schema
    return found


def _text(description: str, pattern: str) -> Json:
    return {"type": "string", "pattern": pattern, "description": description}


def _object(*required: str, **properties: Json) -> Json:
    schema = {"type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def _all_required(**properties: Json) -> Json:
    return _object(*properties, **properties)
