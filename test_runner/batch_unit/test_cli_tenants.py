"""`zenith tenant`: how settings are given, sent and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from zenith_cli import tenants  # type: ignore[import-untyped]
from zenith_cli.context import CliContext  # type: ignore[import-untyped]

from control_plane import http_client
from control_plane.http_client import Answer
from control_plane.local_env import LocalEnv
from pageserver.tenant_config import TENANT_KEYS

TENANT = "11" * 16
OTHER = "22" * 16


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """An environment whose pageserver writes down what it is asked."""
    monkeypatch.setenv("ZENITH_REPO_DIR", str(tmp_path))
    text = f"pg_distrib_dir = '/p'\nzenith_distrib_dir = '/z'\ndefault_tenant_id = '{TENANT}'\n"
    LocalEnv.parse(text, tmp_path).save()
    seen: list[tuple[str, str, Any]] = []

    def request(
        address: object,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float,
        token: str = "",
    ) -> Answer:
        seen.append((method, path, body))
        if method == "POST":
            return Answer(path, 201, body["new_tenant_id"])
        effective = {"gc_horizon": 5, "gc_period": "20s"}
        return Answer(path, 200, {"effective": effective, "overrides": {"gc_horizon": 5}})

    monkeypatch.setattr(http_client, "request", request)
    return seen


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(tenants.tenant, list(arguments), obj=CliContext())
    return result.exit_code, result.output


def test_create_with_settings(requests: list[tuple[str, str, Any]]) -> None:
    options = ("-c", "gc_period:20 s", "-c", "gc_horizon: 1000", "-c", "compression:none")
    assert run("create", "--tenant-id", OTHER, *options)[0] == 0
    body = {
        "new_tenant_id": OTHER,
        "gc_period": "20 s",
        "gc_horizon": 1000,
        "compression": "none",
    }
    assert requests == [("POST", "/v1/tenant", body)]


def test_show_and_change(requests: list[tuple[str, str, Any]]) -> None:
    lines = "gc_horizon: 5 (of this tenant)\ngc_period: 20s\n"
    assert run("config") == (0, lines)
    assert run("config", OTHER, "-c", "gc_horizon:5", "-c", "pitr_interval:") == (0, lines)
    body = {"tenant_id": OTHER, "gc_horizon": 5, "pitr_interval": None}
    assert requests == [
        ("GET", f"/v1/tenant/{TENANT}/config", None),
        ("PUT", "/v1/tenant/config", body),
    ]


@pytest.mark.parametrize("text", ["gc_horizon", ":5", "gc_horizon=5"])
def test_malformed_settings(requests: list[tuple[str, str, Any]], text: str) -> None:
    status, output = run("config", "-c", text)
    assert status == 2
    assert f"'{text}' is not of the form key:value" in output
    assert requests == []


def test_help_names_every_setting() -> None:
    words = set(run("config", "--help")[1].replace(",", " ").replace(".", " ").split())
    assert words >= TENANT_KEYS
