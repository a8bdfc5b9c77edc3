"""The OpenAPI document of a daemon, made of its routes and what is said about each of them.

Which paths, methods and path parameters there are comes from the routes themselves, and so do the
answers that all of them share. A route that nothing is said about, or words about a route that is
not there, are an error: a document that is served describes exactly what is served.

An operation is an OpenAPI operation object, whose responses are made by `answer()` or `failure()`;
the failures that all operations share are added here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from zenith_utils.http_server import (
    BODY_TIMEOUT,
    HTML_CONTENT_TYPE,
    MAX_BODY,
    YAML_CONTENT_TYPE,
    Route,
)
from zenith_utils.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE

Json = Any
Operations = Mapping[str, Mapping[str, Json]]
"""By method and path, as in ``GET /v1/status``."""

OPENAPI_VERSION: Final = "3.1.0"

_SHARED_NAMES: Final = {
    "401": "Unauthorized",
    "403": "Forbidden",
    "408": "RequestTimeout",
    "413": "PayloadTooLarge",
    "500": "ServerFailed",
}
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")
_JSON: Final = "application/json"

ERROR_SCHEMA: Final[Json] = {
    "type": "object",
    "description": "Every answer with a status of 400 and above, except an empty conflict.",
    "required": ["msg"],
    "properties": {"msg": {"type": "string", "description": "What went wrong."}},
}
ID_PATTERN: Final = "^[0-9A-Fa-f]{32}$"
LSN_PATTERN: Final = "^[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}$"


class ApiDescriptionError(Exception):
    """The words about an API do not fit its routes."""


@dataclass(frozen=True, slots=True)
class ApiDescription:
    """What is said about an API as a whole.

    `path_parameters` by name: schema, description, example; a malformed one is answered with 400.
    With `bearer` its operations may need a token, except those with ``"security": []``.
    """

    title: str
    version: str
    description: str
    tags: Sequence[tuple[str, str]]
    path_parameters: Mapping[str, Mapping[str, Json]]
    operations: Operations
    schemas: Mapping[str, Json]
    bearer: bool = False


def ref(name: str) -> Json:
    """A schema of the document by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Json) -> Json:
    """The schema, or null."""
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def json_body(schema: Json, example: Json, *, required: bool = True) -> Json:
    """A request body."""
    return {"required": required, "content": {_JSON: {"schema": schema, "example": example}}}


def answer(description: str, schema: Json, example: Json, media_type: str = _JSON) -> Json:
    """A response with a body."""
    return {
        "description": description,
        "content": {media_type: {"schema": schema, "example": example}},
    }


def failure(description: str, *messages: str) -> Json:
    """A response ``{"msg": ...}``, with examples of the text."""
    examples = {f"text{n}": {"value": {"msg": text}} for n, text in enumerate(messages, 1)}
    content = {"schema": ref("Error"), **({"examples": examples} if examples else {})}
    return {"description": description, "content": {_JSON: content}}


def id_parameter(description: str, example: str, pattern: str = ID_PATTERN) -> Json:
    """What is said about an id in a path."""
    schema = {"type": "string", "pattern": pattern}
    return {"schema": schema, "description": description, "example": example}


def common_operations(tag: str, metrics_example: str) -> Operations:
    """What is said about the metrics, and about the description itself."""
    text = {"type": "string"}
    page = answer("The page.", text, "<!DOCTYPE html>", HTML_CONTENT_TYPE)
    document = answer("The document.", {}, f"openapi: {OPENAPI_VERSION}\n", YAML_CONTENT_TYPE)
    metrics = answer("All metrics.", text, metrics_example, METRICS_CONTENT_TYPE)
    return {
        "GET /metrics": {
            "tags": [tag],
            "operationId": "metrics",
            "summary": "Metrics in the text format of Prometheus",
            "responses": {"200": metrics},
        },
        "GET /swagger.yml": {
            "tags": [tag],
            "operationId": "openapi",
            "summary": "This description in OpenAPI 3.1",
            "security": [],
            "responses": {"200": document},
        },
        "GET /v1/doc": {
            "tags": [tag],
            "operationId": "documentation",
            "summary": "This description as a page for people",
            "security": [],
            "responses": {"200": page},
        },
    }


def build(api: ApiDescription, routes: Sequence[Route]) -> dict[str, Json]:
    """The document. Raises ApiDescriptionError."""
    served = {f"{route.method} {route.path}": route for route in routes}
    if served.keys() != api.operations.keys():
        raise ApiDescriptionError(
            f"not described: {sorted(served.keys() - api.operations.keys())}, "
            f"not served: {sorted(api.operations.keys() - served.keys())}"
        )
    paths: dict[str, Json] = {}
    for key, route in served.items():
        operation = _operation(api, route, api.operations[key])
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    document: dict[str, Json] = {
        "openapi": OPENAPI_VERSION,
        "info": {"title": api.title, "version": api.version, "description": api.description},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in api.tags],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR_SCHEMA, **api.schemas},
            "responses": _shared_responses(api),
        },
    }
    if api.bearer:
        document["security"] = [{}, {"bearer": []}]
        document["components"]["securitySchemes"] = {
            "bearer": {
                "type": "http",
                "scheme": "bearer",
                "bearerFormat": "JWT",
                "description": "Needed where `auth_type` is `ZenithJWT`; a JWT signed with RS256.",
            }
        }
    return document


def _operation(api: ApiDescription, route: Route, words: Mapping[str, Json]) -> Json:
    names = _PATH_PARAMETER.findall(route.path)
    parameters = [_path_parameter(api, name) for name in names]
    parameters += words.get("parameters", [])
    responses = {**_shared(api, words), **words["responses"]}
    malformed = [f"failed to parse {name}" for name in names]
    if "requestBody" in words:
        malformed.append("Failed to parse json request Expecting value: line 1 column 1 (char 0)")
    if malformed:
        own = words["responses"].get("400", failure("The request is malformed."))
        responses["400"] = _with_more(own, [f"Bad request: {text}" for text in malformed])
    operation = {**words, "responses": {key: responses[key] for key in sorted(responses)}}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _path_parameter(api: ApiDescription, name: str) -> Json:
    try:
        words = api.path_parameters[name]
    except KeyError:
        raise ApiDescriptionError(f"path parameter {name} is not described") from None
    return {"name": name, "in": "path", "required": True, **words}


def _shared(api: ApiDescription, words: Mapping[str, Json]) -> dict[str, Json]:
    """What any operation of this kind may answer."""
    statuses = ["500"]
    if "requestBody" in words:
        statuses += ["408", "413"]
    if api.bearer and words.get("security") != []:
        statuses += ["401", "403"]
    return {s: {"$ref": f"#/components/responses/{_SHARED_NAMES[s]}"} for s in statuses}


def _shared_responses(api: ApiDescription) -> dict[str, Json]:
    found = {
        "408": failure(
            "The body did not arrive.",
            f"Request timeout: the body did not arrive within {BODY_TIMEOUT:g} seconds",
        ),
        "413": failure(
            "The body is too big.",
            f"Payload too large: a request may have {MAX_BODY} bytes at most",
        ),
        "500": failure("The server failed. Its log says more."),
    }
    if api.bearer:
        found["401"] = failure(
            "Authentication is on, and there is no valid token.",
            "Unauthorized: missing authorization header",
            "Unauthorized: malformed authorization header",
            "Unauthorized: malformed jwt token",
            "Unauthorized: jwt token has expired",
        )
        found["401"]["headers"] = {
            "WWW-Authenticate": {
                "description": "The scheme that is wanted.",
                "schema": {"type": "string"},
                "example": "Bearer",
            }
        }
        found["403"] = failure(
            "The token does not allow this.",
            "Forbidden: Tenant id mismatch. Permission denied",
            "Forbidden: Attempt to access management api with tenant scope. Permission denied",
        )
    return {_SHARED_NAMES[status]: found[status] for status in sorted(found)}


def _with_more(response: Json, texts: Sequence[str]) -> Json:
    """A failure with more examples."""
    examples = response["content"][_JSON].get("examples", {}).values()
    own = [example["value"]["msg"] for example in examples]
    return failure(response["description"], *own, *texts)
