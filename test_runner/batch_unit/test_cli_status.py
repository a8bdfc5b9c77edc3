"""`zenith status`: what it collects, what it warns of, and its exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_unit.cli_support import IDS, TENANT, Run, make_env, run, serve, timeline
from batch_unit.cli_support import zenith as zenith_process

from control_plane.compute import Compute, ComputeControlPlane
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TimelineId
from zenith_utils.pid_file import PidFile

TIMELINES = f"/v1/tenant/{TENANT}/timeline"
MAIN = f"/v1/timeline/{TENANT}/{IDS[0]}"


def position(flush: str, commit: str) -> dict[str, str]:
    return {
        "tenant_id": str(TENANT),
        "timeline_id": IDS[0],
        "flush_lsn": flush,
        "commit_lsn": commit,
    }


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    env = make_env(tmp_path, monkeypatch, safekeepers=3)
    env.branches["fix"] = {TENANT: TimelineId.parse(IDS[1])}
    env.save()
    return env


@pytest.fixture
def answers() -> dict[tuple[int, str], Any]:
    """What daemons answer that are all well: the pageserver at port 1, safekeepers at 3, 5, 7."""
    documents: dict[tuple[int, str], Any] = {
        (1, "/v1/status"): {"id": 1},
        (1, "/v1/tenant"): [{"id": str(TENANT), "state": "Active"}],
        (1, TIMELINES): [timeline(0), timeline(1, 0)],
    }
    for port in (3, 5, 7):
        documents |= {
            (port, "/v1/status"): {"id": port // 2},
            (port, "/v1/timeline"): [{"tenant_id": str(TENANT), "timeline_id": IDS[0]}],
            (port, MAIN): position("0/40", "0/40"),
        }
    return documents


@pytest.fixture
def alive(env: LocalEnv) -> Iterator[dict[str, PidFile]]:
    """The pid files of all daemons, held as if they ran."""
    held = {"pageserver": PidFile(env.repo_dir / "pageserver.pid")}
    for conf in env.safekeepers:
        held[str(conf.id)] = PidFile(env.safekeeper_dir(conf.id) / "safekeeper.pid")
    for pid_file in held.values():
        pid_file.write()
    yield held
    for pid_file in held.values():
        pid_file.close()


@pytest.fixture
def zenith(
    env: LocalEnv,
    answers: dict[tuple[int, str], Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    def command(*arguments: str) -> tuple[int, str, str]:
        serve(monkeypatch, answers)
        return run(capsys, monkeypatch, *arguments)

    return command


def status(zenith: Run) -> tuple[int, dict[str, Any], list[str]]:
    """Exit status, the document and the texts of its warnings."""
    code, out, err = zenith("status", "--json")
    assert err == ""
    document = json.loads(out)
    assert document["healthy"] == (code == 0)
    return code, document, [warning["text"] for warning in document["warnings"]]


def test_all_is_well(alive: object, env: LocalEnv, zenith: Run) -> None:
    code, document, warnings = status(zenith)
    assert (code, warnings) == (0, [])
    assert document["repo_dir"] == str(env.repo_dir)
    assert [(d["name"], d["state"]) for d in document["daemons"]] == [
        ("pageserver", "running"),
        *((f"safekeeper {i}", "running") for i in (1, 2, 3)),
    ]
    fix, main = document["branches"]
    assert main == {
        "branch": "main",
        "tenant_id": str(TENANT),
        "timeline_id": IDS[0],
        "ancestor": None,
        "ancestor_lsn": None,
        "logical_size": 8192,
        "last_record_lsn": "0/40",
        "commit_lsn": "0/40",
        "pageserver_lag": 0,
        "safekeepers": [
            {"id": i, "flush_lsn": "0/40", "commit_lsn": "0/40", "lag": 0} for i in (1, 2, 3)
        ],
    }
    assert (fix["ancestor"], fix["ancestor_lsn"], fix["safekeepers"]) == ("main", "0/20", [])
    assert document["computes"] == []
    assert document["tenants"] == [{"tenant_id": str(TENANT), "state": "Active", "default": True}]


def test_text_in_a_pipe_is_plain(alive: object, zenith: Run) -> None:
    code, out, err = zenith("status")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1] == "All is well."
    assert any(line.startswith("pageserver running ") for line in lines)
    assert "fix main 0/20 8 KiB 0/40 -" in lines
    assert "main - - 8 KiB 0/40 0 B" in lines
    assert "main 0/40 0/40 0/40 0/40" in lines


def test_a_size_that_is_not_known(
    alive: object, zenith: Run, answers: dict[tuple[int, str], Any]
) -> None:
    """The pageserver cannot tell it as long as WAL of the ancestor is missing."""
    answers[1, TIMELINES] = [timeline(0), timeline(1, 0, current_logical_size=None)]
    code, document, warnings = status(zenith)
    assert (code, warnings) == (0, [])
    assert [branch["logical_size"] for branch in document["branches"]] == [None, 8192]
    lines = [" ".join(line.split()) for line in zenith("status")[1].splitlines()]
    assert "fix main 0/20 - 0/40 -" in lines


def test_nothing_runs(zenith: Run) -> None:
    code, document, warnings = status(zenith)
    assert (code, warnings) == (3, ["nothing runs: zenith start"])
    assert {d["state"] for d in document["daemons"]} == {"stopped"}
    assert document["branches"] == []


def test_a_safekeeper_is_down(alive: dict[str, PidFile], zenith: Run) -> None:
    alive.pop("2").close()
    code, document, warnings = status(zenith)
    assert code == 3
    assert warnings == [
        "safekeeper 2 is down: zenith safekeeper start 2",
        "commits go on with 2 of 3 safekeepers: no more may fail",
    ]
    main = document["branches"][1]
    assert main["safekeepers"][1] == {"id": 2, "flush_lsn": None, "commit_lsn": None, "lag": 0}
    text = zenith("status")[1]
    assert "main 0/40 0/40 stopped 0/40" in " ".join(text.split())


def test_a_removed_safekeeper_that_runs(alive: object, env: LocalEnv, zenith: Run) -> None:
    """A change of the safekeepers that was broken off has left it."""
    env.safekeeper_dir(9).mkdir()
    assert "All is well." in zenith("status")[1]
    pid_file = PidFile(env.safekeeper_dir(9) / "safekeeper.pid")
    pid_file.write()
    try:
        status, out, _ = zenith("status")
    finally:
        pid_file.close()
    assert status == 0
    assert "safekeeper 9 was removed and still runs: zenith safekeeper stop 9\n" in out


def test_no_quorum_and_no_pageserver(alive: dict[str, PidFile], zenith: Run) -> None:
    for name in ("pageserver", "1", "3"):
        alive.pop(name).close()
    assert status(zenith)[2] == [
        "pageserver is down: zenith pageserver start",
        "safekeeper 1 is down: zenith safekeeper start 1",
        "safekeeper 3 is down: zenith safekeeper start 3",
        "commits wait: 2 of 3 safekeepers are needed, 1 run",
    ]


def test_a_lost_disk(alive: dict[str, PidFile], env: LocalEnv, zenith: Run) -> None:
    alive.pop("1").close()
    env.safekeepers[0].instance = "ab" * 16
    env.save()
    assert status(zenith)[2][0] == ("safekeeper 1 has lost its disk: zenith safekeeper replace 1")


def test_a_daemon_that_hangs(alive: object, answers: dict[Any, Any], zenith: Run) -> None:
    del answers[1, "/v1/status"]
    code, document, warnings = status(zenith)
    assert code == 3
    assert document["daemons"][0]["state"] == "silent"
    assert "pageserver does not answer, process " in warnings[0]
    assert "cannot reach port 1/v1/status" in warnings[0]


def test_lag_is_a_warning_and_no_failure(
    alive: object, answers: dict[Any, Any], zenith: Run
) -> None:
    for port in (3, 5):
        answers[port, MAIN] = position("0/50000040", "0/50000040")
    code, document, warnings = status(zenith)
    assert code == 0
    assert warnings == [
        "the pageserver is 1.2 GiB behind on branch main",
        "safekeeper 3 is 1.2 GiB behind on branch main",
    ]
    main = document["branches"][1]
    assert main["pageserver_lag"] == main["safekeepers"][2]["lag"] == 0x50000000
    lines = zenith("status")[1].splitlines()
    assert lines[1] == "Warnings:"
    assert lines[2] == f"  {warnings[0]}"


def test_what_cannot_be_found_out(alive: object, answers: dict[Any, Any], zenith: Run) -> None:
    answers[1, TIMELINES] = 500
    answers[5, MAIN] = 503
    code, _, warnings = status(zenith)
    assert code == 0
    assert warnings == [
        f"the timelines of tenant {TENANT} cannot be listed: Error: no {TIMELINES}",
        f"safekeeper 2 does not tell how far it is: Error: no {MAIN}",
    ]


def test_computes(
    alive: object, env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was stopped is at rest; one that has crashed should run."""
    plane = ComputeControlPlane(env)
    main = TimelineId.parse(IDS[0])
    plane.create(TENANT, "rested", main, None, 6001)
    assert status(zenith)[0] == 0
    crashed = plane.create(TENANT, "broken", main, None, 6002)
    crashed.state_dir.mkdir(parents=True)
    (crashed.state_dir / "state.json").write_text('{"phase": "crashed", "reason": "a\\nb"}')
    code, document, warnings = status(zenith)
    assert (code, warnings) == (3, ["postgres broken has crashed (a): zenith pg start broken"])
    assert document["computes"] == [
        {
            "node": "broken",
            "tenant_id": str(TENANT),
            "branch": "main",
            "kind": "read-write",
            "address": "127.0.0.1:6002",
            "status": "crashed",
            "reason": "a\nb",
            "lag": None,
        },
        {
            "node": "rested",
            "tenant_id": str(TENANT),
            "branch": "main",
            "kind": "read-write",
            "address": "127.0.0.1:6001",
            "status": "stopped",
            "reason": None,
            "lag": None,
        },
    ]


def test_a_standby_that_is_far_behind(
    alive: object, env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = ComputeControlPlane(env)
    plane.create(TENANT, "replica", TimelineId.parse(IDS[0]), None, 6001, hot_standby=True)
    monkeypatch.setattr(Compute, "status", lambda _: "running")
    monkeypatch.setattr("control_plane.overview._standby_lag", lambda *_: 200 << 20)
    assert status(zenith)[::2] == (0, ["hot standby replica is 200 MiB behind branch main"])


def test_several_tenants(alive: object, answers: dict[Any, Any], zenith: Run) -> None:
    other = "22" * 16
    answers[1, "/v1/tenant"].append({"id": other, "state": "Idle"})
    answers[1, f"/v1/tenant/{other}/timeline"] = [{**timeline(4), "tenant_id": other}]
    assert status(zenith)[1]["branches"][2]["branch"] is None
    lines = [" ".join(line.split()) for line in zenith("status")[1].splitlines()]
    assert f"{other} [{IDS[4]}] - - 8 KiB 0/40 -" in lines


@pytest.mark.parametrize(("settings", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_terminals(env: LocalEnv, settings: dict[str, str], coloured: bool) -> None:
    """Tables are drawn there as well; without colours if they are not wanted."""
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm", "COLUMNS": "120", **settings}
    done = subprocess.run(
        zenith_process("status"), stdout=slave, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert (done.returncode, done.stderr) == (3, b"")
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)) == coloured
    assert "─" in shown
