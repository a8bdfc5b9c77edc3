"""What is said about the safekeeper's HTTP API; zenith_utils.openapi makes the document of it."""

from __future__ import annotations

from typing import Final

from zenith_utils.openapi import (
    ID_PATTERN,
    LSN_PATTERN,
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
_LSN: Final = "0/16B9188"
_NAME: Final = f"timeline {_TENANT}-{_TIMELINE}"
_U64: Final[Json] = {"type": "integer", "minimum": 0, "maximum": (1 << 64) - 1}

_DESCRIPTION: Final = """
The timelines of one safekeeper, and metrics. There is no authentication.

Bodies are JSON, whatever the request's `Content-Type` says; keys that a request does not know are
ignored. An error is answered with `{"msg": "..."}`; any other path or method with 404 and `page not
found`. Ids in paths and answers are 32 hexadecimal digits, without dashes; an LSN is text such as
`0/16B9188`, except in a term history, where it is a number.
""".strip()


def description() -> ApiDescription:
    """Everything that is said."""
    return ApiDescription(
        title="Zenith safekeeper",
        version=version_text("safekeeper").partition(" ")[2],
        description=_DESCRIPTION,
        tags=[
            ("Server", "The safekeeper itself."),
            ("Timelines", "What this safekeeper has of each timeline."),
        ],
        path_parameters={
            "tenant_id": id_parameter("Id of the tenant.", _TENANT),
            "timeline_id": id_parameter("Id of the timeline.", _TIMELINE),
        },
        operations={**_server(), **_timelines()},
        schemas=_schemas(),
    )


def _server() -> Operations:
    metric = f'safekeeper_flush_lsn{{tenant_id="{_TENANT}",timeline_id="{_TIMELINE}"}} 23826824\n'
    return {
        "GET /v1/status": {
            "tags": ["Server"],
            "operationId": "status",
            "summary": "Who this safekeeper is, and that it answers",
            "responses": {
                "200": answer(
                    "The safekeeper is up.",
                    ref("Status"),
                    {"id": 1, "instance": "9f86d081884c7d659a2feaa0c55ad015"},
                )
            },
        },
        **common_operations("Server", metric),
    }


def _timelines() -> Operations:
    tags = ["Timelines"]
    membership = {"generation": 1, "established": 1, "recovering": False}
    return {
        "GET /v1/timeline": {
            "tags": tags,
            "operationId": "listTimelines",
            "summary": "All timelines",
            "description": "Of each what its control file says; nothing is loaded for it.",
            "responses": {
                "200": answer(
                    "The timelines.",
                    {"type": "array", "items": ref("TimelineItem")},
                    [
                        {
                            "tenant_id": _TENANT,
                            "timeline_id": _TIMELINE,
                            "commit_lsn": _LSN,
                            **membership,
                        }
                    ],
                )
            },
        },
        "POST /v1/timeline": {
            "tags": tags,
            "operationId": "createTimeline",
            "summary": "Create an empty timeline",
            "description": "Computes create the timelines they need by themselves.",
            "requestBody": json_body(
                ref("TimelineCreate"),
                {
                    "tenant_id": list(bytes.fromhex(_TENANT)),
                    "timeline_id": list(bytes.fromhex(_TIMELINE)),
                    "peer_ids": [2, 3],
                },
            ),
            "responses": {
                "201": answer("It exists, durably.", {"type": "null"}, None),
                "400": failure(
                    "The request is malformed.",
                    "Bad request: Failed to parse json request tenant_id: expected an array of 16 "
                    "bytes",
                ),
                "500": failure(
                    "The timeline exists, or the server failed.", f"{_NAME} already exists"
                ),
            },
        },
        "GET /v1/timeline/{tenant_id}/{timeline_id}": {
            "tags": tags,
            "operationId": "getTimeline",
            "summary": "What this safekeeper has of a timeline",
            "description": "The timeline is loaded from its files if need be.",
            "responses": {
                "200": answer(
                    "Its state.",
                    ref("TimelineStatus"),
                    {
                        "tenant_id": _TENANT,
                        "timeline_id": _TIMELINE,
                        "acceptor_state": {
                            "term": 2,
                            "epoch": 2,
                            "term_history": [{"term": 2, "lsn": 23826824}],
                        },
                        "commit_lsn": _LSN,
                        "s3_wal_lsn": "0/0",
                        "peer_horizon_lsn": _LSN,
                        "remote_consistent_lsn": "0/0",
                        "flush_lsn": _LSN,
                        "oldest_lsn": "0/1000000",
                        "wal_held_by": "keep_size",
                        **membership,
                    },
                ),
                "500": failure(
                    "There is no such timeline, its files cannot be used, or the server failed.",
                    f"{_NAME} is not on this safekeeper",
                ),
            },
        },
    }


def _schemas() -> dict[str, Json]:
    lsn = ref("Lsn")
    identity = {"tenant_id": ref("Id"), "timeline_id": ref("Id")}
    membership = {
        "generation": {**_U64, "description": "Of the membership this safekeeper knows."},
        "established": {**_U64, "description": "The generation in which a leader was elected."},
        "recovering": {
            "type": "boolean",
            "description": "It has lost what it had, and does not vote until it has it again.",
        },
    }
    byte_array = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 255},
        "minItems": 16,
        "maxItems": 16,
        "description": "The id as 16 byte values.",
    }
    return {
        "Id": {
            "type": "string",
            "pattern": ID_PATTERN,
            "description": "32 hexadecimal digits.",
        },
        "Lsn": {
            "type": "string",
            "pattern": LSN_PATTERN,
            "description": "Position in the WAL: two hexadecimal numbers of 32 bits.",
        },
        "Status": _object(
            id={**_U64, "description": "Node id."},
            instance={
                "type": "string",
                "pattern": ID_PATTERN,
                "description": "Random, of the data directory: another one has another instance.",
            },
        ),
        "TimelineItem": _object(
            **identity,
            commit_lsn={**lsn, "description": "Committed, as far as that is persisted."},
            **membership,
        ),
        "TimelineCreate": {
            "type": "object",
            "required": ["tenant_id", "timeline_id"],
            "properties": {
                "tenant_id": byte_array,
                "timeline_id": byte_array,
                "peer_ids": {
                    "type": "array",
                    "items": _U64,
                    "description": "Node ids of the other safekeepers.",
                },
            },
        },
        "TimelineStatus": _object(
            **identity,
            acceptor_state=ref("AcceptorState"),
            commit_lsn={**lsn, "description": "Committed, as far as that is persisted."},
            s3_wal_lsn={**lsn, "description": "WAL below it is offloaded; `0/0`: none is."},
            peer_horizon_lsn={
                **lsn,
                "description": "No safekeeper needs WAL below it from another one.",
            },
            remote_consistent_lsn={
                **lsn,
                "description": "Always `0/0` in this version.",
            },
            flush_lsn={**lsn, "description": "Durable here, at this moment."},
            oldest_lsn={**lsn, "description": "Where the WAL begins that is here."},
            wal_held_by={
                "type": "string",
                "description": "What keeps the oldest WAL from being removed.",
            },
            **membership,
        ),
        "AcceptorState": _object(
            term={**_U64, "description": "The highest term promised."},
            epoch={**_U64, "description": "The term of the last WAL record that is here."},
            term_history={"type": "array", "items": ref("TermSwitch")},
        ),
        "TermSwitch": _object(
            term=_U64, lsn={**_U64, "description": "Where the term begins, as a number."}
        ),
    }


def _object(**properties: Json) -> Json:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}
