"""--json of every listing: the documents that programs read, and nothing else on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_unit.cli_support import IDS, TENANT, Run, make_env, run, serve, timeline

from control_plane.compute import ComputeControlPlane
from control_plane.local_env import GenerationMember, LocalEnv, SafekeeperGeneration
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

OTHER = "22" * 16
TIMELINES = f"/v1/tenant/{TENANT}/timeline"


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    env = make_env(tmp_path, monkeypatch, safekeepers=2)
    env.branches["fix"] = {TENANT: TimelineId.parse(IDS[1])}
    env.save()
    return env


@pytest.fixture
def zenith(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def document(answer: tuple[int, str, str]) -> Any:
    status, out, err = answer
    assert (status, err) == (0, "")
    return json.loads(out)


def test_tenants(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = [{"id": OTHER, "state": "Idle"}, {"id": str(TENANT), "state": "Active"}]
    serve(monkeypatch, {(1, "/v1/tenant"): tenants})
    assert document(zenith("tenant", "list", "--json")) == [
        {"tenant_id": OTHER, "state": "Idle", "default": False},
        {"tenant_id": str(TENANT), "state": "Active", "default": True},
    ]
    assert zenith("tenant", "list") == (0, f"{OTHER} Idle\n{TENANT} Active\n", "")


def test_tenant_config(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"effective": {"gc_horizon": 5, "gc_period": "1s"}, "overrides": {"gc_horizon": 5}}
    serve(monkeypatch, {(1, f"/v1/tenant/{TENANT}/config"): settings})
    assert document(zenith("tenant", "config", "--json")) == {"tenant_id": str(TENANT), **settings}


def test_timelines(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {(1, TIMELINES): [timeline(0), timeline(1, 0), timeline(2, 1)]})
    first, second, third = document(zenith("timeline", "list", "--json"))
    assert first == {
        "branch": "main",
        "tenant_id": str(TENANT),
        "timeline_id": IDS[0],
        "ancestor_branch": None,
        "ancestor_timeline_id": None,
        "ancestor_lsn": None,
        "last_record_lsn": "0/40",
        "disk_consistent_lsn": "0/38",
        "logical_size": 8192,
        "local": True,
        "remote": False,
    }
    assert (second["branch"], second["ancestor_branch"]) == ("fix", "main")
    assert (second["ancestor_timeline_id"], second["ancestor_lsn"]) == (IDS[0], "0/20")
    assert (third["branch"], third["ancestor_branch"]) == (None, "fix")


def test_a_size_that_is_not_known(
    env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {(1, TIMELINES): [timeline(0), timeline(1, 0, current_logical_size=None)]})
    listed = document(zenith("timeline", "list", "--json"))
    assert [info["logical_size"] for info in listed] == [8192, None]
    code, out, err = zenith("timeline", "list")
    assert (code, err, len(out.splitlines())) == (0, "", 2)


def test_no_timelines(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {(1, TIMELINES): []})
    assert document(zenith("timeline", "list", "--json")) == []
    assert zenith("timeline", "list") == (0, "", "")


def test_nodes(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {(1, TIMELINES): [timeline(0)]})
    plane = ComputeControlPlane(env)
    main = TimelineId.parse(IDS[0])
    plane.create(TENANT, "a", main, None, 6001)
    plane.create(TENANT, "b", main, Lsn.parse("0/28"), 6002)
    plane.create(TENANT, "c", TimelineId.parse(IDS[4]), None, 6003, hot_standby=True)
    plane.create(TenantId.parse(OTHER), "of_another_tenant", main, None, 6004)
    nodes = document(zenith("pg", "list", "--json"))
    assert nodes[0] == {
        "node": "a",
        "tenant_id": str(TENANT),
        "timeline_id": IDS[0],
        "branch": "main",
        "host": "127.0.0.1",
        "port": 6001,
        "kind": "read-write",
        "at_lsn": None,
        "last_record_lsn": "0/40",
        "status": "stopped",
        "reason": None,
    }
    assert [(n["node"], n["kind"], n["at_lsn"]) for n in nodes[1:]] == [
        ("b", "read-only", "0/28"),
        ("c", "hot standby", None),
    ]
    assert (nodes[2]["branch"], nodes[2]["last_record_lsn"]) == (None, None)
    assert zenith("pg", "list")[1].splitlines()[1:] == [
        f"a\t127.0.0.1:6001\t{IDS[0]}\tmain\t0/40\t\tstopped",
        f"b\t127.0.0.1:6002\t{IDS[0]}\tmain\t0/40\t\tstopped",
        f"c\t127.0.0.1:6003\t{IDS[4]}\t?\t?\t\tstopped (hot standby)",
    ]


def test_warnings_stay_out_of_the_document(
    env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pageserver does not answer, a node is broken, another one has crashed."""
    serve(monkeypatch, {})
    plane = ComputeControlPlane(env)
    broken = plane.create(TENANT, "broken", TimelineId.parse(IDS[0]), None, 6001)
    (broken.pgdata / "postgresql.conf").write_text("port = 1\n")
    crashed = plane.create(TENANT, "crashed", TimelineId.parse(IDS[0]), None, 6002)
    crashed.state_dir.mkdir(parents=True)
    (crashed.state_dir / "state.json").write_text('{"phase": "crashed", "reason": "why\\nnot"}')
    status, out, err = zenith("pg", "list", "--json")
    assert status == 0
    (node,) = json.loads(out)
    assert (node["node"], node["status"], node["reason"]) == ("crashed", "crashed", "why\nnot")
    assert node["last_record_lsn"] is None
    assert "Failed to load timeline info: " in err
    assert "cannot read the settings of node broken" in err


def test_safekeepers(env: LocalEnv, zenith: Run) -> None:
    env.safekeeper_generation = 2
    env.earlier_generations = [SafekeeperGeneration(1, [GenerationMember(7), GenerationMember(8)])]
    env.safekeepers[0].instance = "aa" * 16
    env.save()
    common = {"running": False}
    assert document(zenith("safekeeper", "list", "--json")) == {
        "generation": 2,
        "safekeepers": [
            {"id": 1, "pg_port": 2, "http_port": 3, "instance": "aa" * 16, **common},
            {"id": 2, "pg_port": 4, "http_port": 5, "instance": None, **common},
        ],
        "earlier_generations": [{"number": 1, "safekeepers": [7, 8]}],
    }


@pytest.mark.parametrize("command", [("pageserver", "status"), ("safekeeper", "status", "2")])
def test_status_of_a_server(env: LocalEnv, zenith: Run, command: tuple[str, ...]) -> None:
    status, out, err = zenith(*command, "--json")
    assert (status, err) == (1, "")
    said = json.loads(out)
    assert (said["running"], said["pid"]) == (False, None)
    assert said["pg_address"] == ("127.0.0.1:1" if len(command) == 2 else "127.0.0.1:4")
    assert said["log"].endswith(f"{command[0]}.log")


def test_failure_leaves_stdout_empty(env: LocalEnv, zenith: Run) -> None:
    for command in (("tenant", "list"), ("tenant", "config"), ("timeline", "list")):
        status, out, err = zenith(*command, "--json")
        assert (status, out) == (1, "")
        assert "the pageserver does not answer" in err
