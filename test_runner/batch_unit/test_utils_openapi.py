"""The OpenAPI document: that it fits the routes, and the texts that are made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from batch_unit.pageserver_support import REPOSITORY
from batch_unit.test_http_conformance import pageserver_document, safekeeper_document

from pageserver.http.auth import PUBLIC_URIS
from zenith_utils.http_server import Request, Route
from zenith_utils.openapi import (
    ApiDescription,
    ApiDescriptionError,
    answer,
    build,
    failure,
    json_body,
)
from zenith_utils.openapi_page import to_html
from zenith_utils.yaml_text import to_yaml


def handler(request: Request) -> None:
    del request


def description(operations: Mapping[str, Any], *, bearer: bool = False) -> ApiDescription:
    return ApiDescription(
        title="Things <&>",
        version="1",
        description="What `a < b` means.",
        tags=[("All", "Everything.")],
        path_parameters={"thing_id": {"schema": {"type": "string"}, "description": "Id."}},
        operations=operations,
        schemas={},
        bearer=bearer,
    )


GET = {
    "tags": ["All"],
    "summary": "A thing",
    "responses": {
        "200": answer("It.", {"type": "string"}, "<b>"),
        "400": failure("Wrong.", "Bad request: no such thing"),
    },
}


def test_document_fits_the_routes() -> None:
    routes = [Route("GET", "/thing/{thing_id}", handler)]
    with pytest.raises(ApiDescriptionError, match=r"not described: .*GET /thing/{thing_id}"):
        build(description({}), routes)
    with pytest.raises(ApiDescriptionError, match=r"not served: \['GET /thing/{thing_id}'\]"):
        build(description({"GET /thing/{thing_id}": GET}), [])
    other = [Route("GET", "/thing/{other_id}", handler)]
    with pytest.raises(ApiDescriptionError, match="other_id is not described"):
        build(description({"GET /thing/{other_id}": GET}), other)


def test_what_operations_share() -> None:
    post = {**GET, "requestBody": json_body({}, {}), "security": []}
    routes = [Route("GET", "/thing/{thing_id}", handler), Route("POST", "/thing", handler)]
    words = {"GET /thing/{thing_id}": GET, "POST /thing": post}
    paths = build(description(words, bearer=True), routes)["paths"]
    get = paths["/thing/{thing_id}"]["get"]
    assert [parameter["name"] for parameter in get["parameters"]] == ["thing_id"]
    assert list(get["responses"]) == ["200", "400", "401", "403", "500"]
    examples = get["responses"]["400"]["content"]["application/json"]["examples"].values()
    assert [example["value"]["msg"] for example in examples] == [
        "Bad request: no such thing",
        "Bad request: failed to parse thing_id",
    ]
    assert list(paths["/thing"]["post"]["responses"]) == ["200", "400", "408", "413", "500"]
    assert "401" not in build(description(words), routes)["paths"]["/thing"]["post"]["responses"]


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Elements are closed in order, and load nothing."""
        assert tag not in ("script", "link", "img", "iframe")
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "style")
            if name == "id":
                assert value not in self.ids
                self.ids.add(str(value))
            if name == "href":
                self.links.add(str(value))

    def handle_endtag(self, tag: str) -> None:
        """See above."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """All text together."""
        self.text += data


DOCUMENTS = pytest.mark.parametrize(
    "document", [pageserver_document(), safekeeper_document()], ids=["pageserver", "safekeeper"]
)


def contents(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas of all bodies and answers, with their examples."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts = [*operation["responses"].values(), operation.get("requestBody", {})]
            for part in parts:
                for media in part.get("content", {}).values():
                    yield f"{method} {path}", media
            for parameter in operation.get("parameters", []):
                yield f"{method} {path} {parameter['name']}", parameter
    for name, response in document["components"]["responses"].items():
        yield name, response["content"]["application/json"]


@DOCUMENTS
def test_documents_are_openapi(document: dict[str, Any]) -> None:
    """By the schema of OpenAPI 3.1; and the examples are what the schemas say."""
    from jsonschema_rs import validator_for
    from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

    OPENAPI_31_VALIDATOR.validate(document)
    for where, media in contents(document):
        examples = [example["value"] for example in media.get("examples", {}).values()]
        examples += [media["example"]] if "example" in media else []
        validator = validator_for(
            {"allOf": [media["schema"]], "components": document["components"]}
        )
        for example in examples:
            errors = [error.message for error in validator.iter_errors(example)]
            assert not errors, (where, errors)


def test_what_needs_no_token() -> None:
    """The document says it of what the server lets everybody see."""
    public = {
        path
        for path, methods in pageserver_document()["paths"].items()
        for operation in methods.values()
        if operation.get("security") == []
    }
    assert public == PUBLIC_URIS


@DOCUMENTS
def test_pages(document: dict[str, Any]) -> None:
    """Well-formed, complete, and with nothing to be fetched from elsewhere."""
    html = to_html(document)
    assert "http:" not in html and "https:" not in html and "url(" not in html
    page = Page(html)
    assert page.links - {"/swagger.yml"} <= {f"#{anchor}" for anchor in page.ids}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in page.text
            assert operation["summary"] in page.text
            for parameter in operation.get("parameters", []):
                assert parameter["name"] in page.text
    for name in document["components"]["schemas"]:
        assert name in page.ids
    assert yaml.safe_load(to_yaml(document)) == json.loads(json.dumps(document))


def test_description_costs_no_start() -> None:
    """What nobody has asked for is not loaded."""
    script = (
        "import sys, safekeeper.main, safekeeper.http_api, pageserver.http.routes\n"
        "print([m for m in sys.modules if 'openapi' in m or 'yaml' in m])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert result.stdout == "[]\n"


def test_texts_are_escaped() -> None:
    routes = [Route("GET", "/thing/{thing_id}", handler)]
    page = Page(to_html(build(description({"GET /thing/{thing_id}": GET}), routes)))
    assert "Things <&>" in page.text and "What a < b means." in page.text and '"<b>"' in page.text
