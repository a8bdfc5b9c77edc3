"""The command line run in this process, on environments made by hand, with servers that pretend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zenith_cli import main as cli_main  # type: ignore[import-untyped]

from control_plane import http_client
from control_plane.http_client import Answer, UnreachableError
from control_plane.local_env import LocalEnv, SafekeeperConf
from zenith_utils.ids import TenantId, TimelineId

TENANT = TenantId.parse("11" * 16)
IDS = [f"{i:02x}" * 16 for i in range(1, 7)]
"""Ids of timelines, in order."""


def make_env(
    repo_dir: Path, monkeypatch: pytest.MonkeyPatch, safekeepers: int = 0, distrib: str = "/p"
) -> LocalEnv:
    """An environment with a branch main, whose daemons do not run, as ZENITH_REPO_DIR."""
    monkeypatch.setenv("ZENITH_REPO_DIR", str(repo_dir))
    text = f"pg_distrib_dir = '{distrib}'\nzenith_distrib_dir = '/z'\n"
    text += f"default_tenant_id = '{TENANT}'\n"
    text += "[pageserver]\nlisten_pg_addr = '127.0.0.1:1'\nlisten_http_addr = '127.0.0.1:1'\n"
    env = LocalEnv.parse(text, repo_dir)
    env.branches = {"main": {TENANT: TimelineId.parse(IDS[0])}}
    # Nobody listens on these: they are below what needs no privilege, and not assigned.
    env.safekeepers = [SafekeeperConf(i, 2 * i, 2 * i + 1) for i in range(1, safekeepers + 1)]
    for conf in env.safekeepers:
        env.safekeeper_dir(conf.id).mkdir(parents=True)
    env.save()
    return env


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """Run the command in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["zenith", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    status = cli_main.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def zenith(*arguments: str) -> list[str]:
    """The command as a process of its own."""
    code = "import sys; from zenith_cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


def serve(monkeypatch: pytest.MonkeyPatch, documents: dict[tuple[int, str], Any]) -> None:
    """Have servers answer by port and path; an int is an HTTP error, others are unreachable."""

    def request(
        address: tuple[str, int],
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float,
        token: str = "",
    ) -> Answer:
        document = documents.get((address[1], path))
        if document is None:
            raise UnreachableError(f"cannot reach port {address[1]}{path}")
        if isinstance(document, int):
            return Answer(path, document, {"msg": f"no {path}"})
        return Answer(path, 200, document)

    monkeypatch.setattr(http_client, "request", request)


def timeline(number: int, ancestor: int | None = None, lsn: str = "0/20", **local: Any) -> Any:
    """A timeline as the pageserver lists it."""
    return {
        "tenant_id": str(TENANT),
        "timeline_id": IDS[number],
        "local": {
            "ancestor_timeline_id": None if ancestor is None else IDS[ancestor],
            "ancestor_lsn": None if ancestor is None else lsn,
            "last_record_lsn": "0/40",
            "disk_consistent_lsn": "0/38",
            "current_logical_size": 8192,
            **local,
        },
        "remote": None,
    }


Run = Callable[..., tuple[int, str, str]]
"""run() with its fixtures filled in."""
