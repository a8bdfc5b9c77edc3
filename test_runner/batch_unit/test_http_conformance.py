"""The daemons answer what their OpenAPI documents say, whatever they are asked."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import Mock
from zlib import crc32

import pytest
import requests
import yaml
from batch_unit.pageserver_support import Root, running
from batch_unit.walproposer_support import Safekeeper
from batch_unit.workspace import temporary_workspace

from pageserver.http import openapi as pageserver_openapi
from pageserver.http.routes import routes as pageserver_routes
from pageserver.tenants import TenantManager
from safekeeper import openapi as safekeeper_openapi
from safekeeper.http_api import HttpApi
from safekeeper.identity import Identity
from safekeeper.timelines import Timelines
from zenith_utils.metrics import Metrics
from zenith_utils.openapi import build

pytestmark = pytest.mark.timeout(300)

# Answers of 500 that are part of the interface; any other is a defect.
PAGESERVER_500 = re.compile(
    r"Failed to get repo for tenant [0-9a-f]{32}"
    r"|Tenant [0-9a-f]{32} not found"
    r"|tenant [0-9a-f]{32} directory already exists"
    r"|Cannot branch off the timeline that's not present locally"
    r"|invalid branch start lsn"
    r"|invalid start lsn \S+ for ancestor timeline [0-9a-f]{32}: less than .*"
    r"|Timed out while waiting for WAL record at LSN .*"
    r"|Timeline is already present locally"
    r"|cannot detach timeline that is not available locally"
)
SAFEKEEPER_500 = re.compile(
    r"timeline [0-9a-f]{32}-[0-9a-f]{32} (already exists|is not on this safekeeper)"
)
EXAMPLES = 20
MANY_EXAMPLES = 300

Case = Any
Check = Callable[[object, Any, Case], None]


def no_defect(known: re.Pattern[str]) -> Check:
    """A server error is one of those that are told to clients."""

    def check(ctx: object, response: Any, case: Case) -> None:
        del ctx, case
        if response.status_code >= 500:
            assert response.status_code == 500
            assert known.fullmatch(response.json()["msg"]), response.json()

    return check


def errors_have_messages(ctx: object, response: Any, case: Case) -> None:
    """Save for conflicts that say all by their status."""
    del ctx, case
    if response.status_code >= 400:
        answer = response.json()
        assert isinstance(answer["msg"] if answer or response.status_code != 409 else "", str)


def strict(document: dict[str, Any]) -> dict[str, Any]:
    """The document where answers may have no fields but those described."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    asked = {
        media["schema"]["$ref"].rpartition("/")[2]
        for methods in document["paths"].values()
        for operation in methods.values()
        for media in operation.get("requestBody", {"content": {}})["content"].values()
    }
    for name, schema in schemas.items():
        if name not in asked and "properties" in schema:
            schema["additionalProperties"] = False
    return document


def pageserver_document() -> dict[str, Any]:
    """What a pageserver serves as its description."""
    return build(pageserver_openapi.description(), pageserver_routes(cast(TenantManager, Mock())))


def safekeeper_document() -> dict[str, Any]:
    """What a safekeeper serves as its description."""
    api = HttpApi(cast(Identity, Mock()), cast(Timelines, Mock()))
    return build(safekeeper_openapi.description(), api.routes(Metrics("safekeeper")))


def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Path and method of everything that can be asked."""
    return [(path, method) for path, methods in document["paths"].items() for method in methods]


@dataclass(frozen=True)
class Exerciser:
    """Sends many requests of every kind to one server, the same ones each time."""

    port: int
    schema: Any
    known_500: re.Pattern[str]
    session: requests.Session
    aim: Callable[[Case], None]
    """Changes a request so that it is worth sending."""

    def exercise(self, path: str, method: str, count: int) -> None:
        """`count` requests as the description has them, and as many that are wrong somewhere."""
        # Imported late: collecting the tests must not wait for it.
        from hypothesis import HealthCheck, given, settings
        from hypothesis.errors import Unsatisfiable
        from schemathesis import GenerationMode

        limits = settings(
            max_examples=count,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        operation = self.schema[path][method]
        for mode in GenerationMode:
            run = limits(given(case=operation.as_strategy(mode))(self.send))
            try:
                run()
            except Unsatisfiable:
                assert not operation.definition.raw.get("parameters"), "nothing was sent"

    def send(self, case: Case) -> None:
        """Send a request and look at the answer."""
        from schemathesis.specs.openapi import checks

        self.aim(case)
        url = f"http://127.0.0.1:{self.port}"
        response = case.call(base_url=url, session=self.session, timeout=60)
        case.validate_response(
            response,
            checks=[
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
                checks.response_headers_conformance,
                errors_have_messages,
                no_defect(self.known_500),
            ],
        )


def parse_schema(document: dict[str, Any]) -> Any:
    import schemathesis

    return schemathesis.openapi.from_dict(strict(document))


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


# ---- the pageserver


@dataclass(frozen=True)
class Pageserver:
    """A running pageserver with a timeline to look at, and a tenant to do things to."""

    root: Root
    victim: str

    def aim(self, case: Case) -> None:
        """Have most well-formed requests hit something, and few of them leave something behind."""
        from schemathesis.core import NOT_SET

        parameters = case.path_parameters
        if is_id(parameters.get("tenant_id")):
            parameters["tenant_id"] = pick(case, str(self.root.tenant), parameters["tenant_id"])
        if is_id(parameters.get("lease_id")):
            parameters["lease_id"] = str(parameters["lease_id"]).lower()
        if is_id(parameters.get("timeline_id")):
            parameters["timeline_id"] = str(self.root.timeline)
        body = case.body
        operation = case.operation.definition.raw["operationId"]
        if operation == "createTimeline":
            if body is NOT_SET:
                case.body = {"new_timeline_id": str(self.root.timeline)}
            elif isinstance(body, dict):
                self._aim_timeline(case, body)
        elif operation == "createTenant":
            if body is NOT_SET:
                case.body = {"new_tenant_id": self.victim}
            elif isinstance(body, dict) and is_id(body.get("new_tenant_id"), or_none=True):
                body["new_tenant_id"] = pick(case, self.victim, "5" * 32)
        elif isinstance(body, dict) and is_id(body.get("tenant_id")):
            body["tenant_id"] = pick(case, self.victim, body["tenant_id"])
        elif isinstance(body, dict) and isinstance(body.get("lsn"), str):
            body["lsn"] = pick(case, str(self.root.lsn), body["lsn"])

    def _aim_timeline(self, case: Case, body: dict[str, Any]) -> None:
        """A root costs an initdb: its id is taken. A branch is made once."""
        if body.get("ancestor_timeline_id") is None:
            if is_id(body.get("new_timeline_id"), or_none=True):
                body["new_timeline_id"] = str(self.root.timeline)
            return
        if is_id(body["ancestor_timeline_id"]):
            known = str(self.root.timeline)
            body["ancestor_timeline_id"] = pick(case, known, body["ancestor_timeline_id"])
        if is_id(body.get("new_timeline_id"), or_none=True):
            body["new_timeline_id"] = "b" * 32


def is_id(value: object, *, or_none: bool = False) -> bool:
    if value is None:
        return or_none
    return isinstance(value, str) and re.fullmatch(r"[0-9A-Fa-f]{32}", value) is not None


def pick(case: Case, usual: str, other: Any) -> Any:
    """One of two, the first three times out of four; always the same for the same request."""
    text = repr((case.path_parameters, case.query, case.body))
    return usual if crc32(text.encode("utf-8", "backslashreplace")) % 4 else other


@pytest.fixture(scope="module")
def pageserver(session: requests.Session) -> Iterator[Exerciser]:
    with running("wait_lsn_timeout='1 ms'") as root:
        target = Pageserver(root, str(root.server.create_tenant()))
        schema = parse_schema(pageserver_document())
        yield Exerciser(root.server.http_port, schema, PAGESERVER_500, session, target.aim)
        assert "Traceback" not in root.server.log()


@pytest.mark.parametrize(("path", "method"), operations(pageserver_document()))
def test_pageserver(pageserver: Exerciser, path: str, method: str) -> None:
    pageserver.exercise(path, method, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), operations(pageserver_document()))
def test_pageserver_at_length(pageserver: Exerciser, path: str, method: str) -> None:
    pageserver.exercise(path, method, MANY_EXAMPLES)


def assert_served(port: int, document: dict[str, Any]) -> None:
    url = f"http://127.0.0.1:{port}"
    text = requests.get(f"{url}/swagger.yml", timeout=10)
    assert text.headers["Content-Type"] == "text/yaml; charset=utf-8"
    assert yaml.safe_load(text.text) == json.loads(json.dumps(document))
    page = requests.get(f"{url}/v1/doc", timeout=10)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.text.startswith("<!DOCTYPE html>")


def test_pageserver_serves_its_description(pageserver: Exerciser) -> None:
    assert_served(pageserver.port, pageserver_document())


# ---- the safekeeper


def aim_at_safekeeper(case: Case) -> None:
    """Have most well-formed requests hit something, and few of them leave something behind."""
    for name in ("tenant_id", "timeline_id"):
        if is_id(case.path_parameters.get(name)):
            case.path_parameters[name] = pick(case, TIMELINE, case.path_parameters[name])
        if isinstance(case.body, dict) and is_byte_array(case.body.get(name)):
            case.body[name] = list(bytes.fromhex(TIMELINE))


TIMELINE = "0c" * 16


def is_byte_array(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 16
        and all(type(item) is int and 0 <= item < 256 for item in value)
    )


@pytest.fixture(scope="module")
def safekeeper(session: requests.Session) -> Iterator[Exerciser]:
    schema = parse_schema(safekeeper_document())
    with temporary_workspace() as directory:
        server = Safekeeper(directory / "sk", 1)
        server.start()
        try:
            url = f"http://127.0.0.1:{server.http_port}/v1/timeline"
            ids = {name: list(bytes.fromhex(TIMELINE)) for name in ("tenant_id", "timeline_id")}
            assert requests.post(url, json=ids, timeout=10).status_code == 201
            yield Exerciser(server.http_port, schema, SAFEKEEPER_500, session, aim_at_safekeeper)
            assert "Traceback" not in (server.directory / "out.log").read_text()
        finally:
            server.kill()


def test_safekeeper_serves_its_description(safekeeper: Exerciser) -> None:
    assert_served(safekeeper.port, safekeeper_document())


@pytest.mark.parametrize(("path", "method"), operations(safekeeper_document()))
def test_safekeeper(safekeeper: Exerciser, path: str, method: str) -> None:
    safekeeper.exercise(path, method, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), operations(safekeeper_document()))
def test_safekeeper_at_length(safekeeper: Exerciser, path: str, method: str) -> None:
    safekeeper.exercise(path, method, MANY_EXAMPLES)
