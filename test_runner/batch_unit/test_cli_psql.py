"""`zenith psql`: which node it opens, with what arguments, and what it says where none runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_unit.cli_support import IDS, TENANT, make_env, run, zenith
from zenith_cli.psql import find_node  # type: ignore[import-untyped]

from control_plane.compute import Compute, ComputeControlPlane
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import Lsn

Make = Callable[..., Compute]


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    """An environment with branches main and fix, and a psql that prints what it is given."""
    distrib = tmp_path / "postgres"
    (distrib / "bin").mkdir(parents=True)
    stand_in = distrib / "bin" / "psql"
    stand_in.write_text('#!/bin/sh\nprintf "<%s>" "$@"\nexit 7\n')
    stand_in.chmod(0o755)
    env = make_env(tmp_path / "repo", monkeypatch, safekeepers=1, distrib=str(distrib))
    env.branches["fix"] = {TENANT: TimelineId.parse(IDS[1])}
    env.save()
    return env


@pytest.fixture
def running(env: LocalEnv, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the nodes that are taken for running."""
    names: set[str] = set()
    monkeypatch.setattr(
        Compute, "status", lambda node: "running" if node.name in names else "stopped"
    )
    return names


@pytest.fixture
def node(env: LocalEnv) -> Make:
    def make(
        name: str, branch: str = "main", lsn: str | None = None, standby: bool = False
    ) -> Compute:
        return ComputeControlPlane(env).create(
            TENANT,
            name,
            env.branch_timeline(branch, TENANT),
            None if lsn is None else Lsn.parse(lsn),
            None,
            hot_standby=standby,
        )

    return make


def found(env: LocalEnv, name: str) -> str:
    node = find_node(env, TENANT, name)
    assert isinstance(node, Compute)
    return node.name


def refusal(env: LocalEnv, name: str) -> str:
    with pytest.raises(ControlPlaneError) as failure:
        find_node(env, TENANT, name)
    return str(failure.value)


def test_the_read_write_node_of_a_branch(env: LocalEnv, running: set[str], node: Make) -> None:
    for made in (node("old", lsn="0/28"), node("rw"), node("replica", standby=True)):
        running.add(made.name)
    node("other", "fix")
    assert found(env, "main") == "rw"
    assert found(env, "replica") == "replica"
    assert found(env, "old") == "old"


def test_a_node_goes_before_a_branch_if_it_runs(
    env: LocalEnv, running: set[str], node: Make
) -> None:
    node("fix", "main")
    node("writer", "fix")
    running.add("writer")
    assert found(env, "fix") == "writer"
    running.add("fix")
    assert found(env, "fix") == "fix"


def test_none_runs(env: LocalEnv, running: set[str], node: Make) -> None:
    assert refusal(env, "main").endswith("Start one: zenith pg start main --branch-name main")
    node("rw")
    node("replica", standby=True)
    running.add("replica")
    assert refusal(env, "main") == (
        "no read-write node runs on branch 'main'. Start one: zenith pg start rw. "
        "Read-only ones run: zenith psql replica"
    )
    assert refusal(env, "rw") == "postgres rw is not running (stopped): zenith pg start rw"


def test_several_run(env: LocalEnv, running: set[str], node: Make) -> None:
    node("a")
    node("b")
    running |= {"a", "b"}
    assert refusal(env, "main") == (
        "several nodes run on branch 'main': a, b. Say which: zenith psql a"
    )
    assert found(env, "b") == "b"


def test_a_name_that_another_branch_uses(env: LocalEnv, running: set[str], node: Make) -> None:
    node("fix", "main")
    assert refusal(env, "fix").endswith("zenith pg start fix_node --branch-name fix")


@pytest.mark.parametrize(
    ("branch", "name", "quoted"),
    [
        ("feature/x", "feature_x", "feature/x"),
        ("it's;rm", "it_s_rm", "'it'\"'\"'s;rm'"),
        (".x", "_.x", ".x"),
        ("über", "_ber", "'über'"),
    ],
)
def test_a_branch_whose_name_no_node_can_have(
    env: LocalEnv,
    running: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    branch: str,
    name: str,
    quoted: str,
) -> None:
    """The advice can be entered as it stands, and a node is made without naming it."""
    env.branches[branch] = {TENANT: TimelineId.parse(IDS[2])}
    env.save()
    plane = ComputeControlPlane(env)
    for free in (name, f"{name}_node", f"{name}_2"):
        assert refusal(env, branch).endswith(f"zenith pg start {free} --branch-name {quoted}")
        plane.create(TENANT, free, env.branch_timeline("main", TENANT), None, None)
    assert run(capsys, monkeypatch, "pg", "stop", f"{name}_node", "--destroy")[0] == 0
    assert run(capsys, monkeypatch, "pg", "create", "--branch-name", branch) == (0, "", "")
    made = plane.get(TENANT, f"{name}_node")
    assert made is not None
    assert made.timeline_id == env.branch_timeline(branch, TENANT)


def test_a_broken_node(env: LocalEnv, running: set[str], node: Make) -> None:
    (node("broken").pgdata / "postgresql.conf").write_text("port = x\n")
    assert "cannot read the settings of node broken in " in refusal(env, "broken")


def test_unknown_name(env: LocalEnv, running: set[str]) -> None:
    assert refusal(env, "mian") == (
        "Found no timeline id for branch name 'mian'. Did you mean main?"
    )
    assert refusal(env, "x") == (
        "Found no timeline id for branch name 'x': see 'zenith timeline list'"
    )


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], "-U zenith_admin -d postgres"),
        (["main"], "-U zenith_admin -d postgres"),
        (["main", "-d", "app", "-U", "joe"], "-U joe -d app"),
        (["-c", "SELECT 1"], "-U zenith_admin -d postgres -c SELECT_1"),
        (["--", "-c", "SELECT 1", "--csv"], "-U zenith_admin -d postgres -c SELECT_1 --csv"),
        (["main", "-d", "app", "--", "-d", "x"], "-U zenith_admin -d app -d x"),
    ],
)
def test_what_psql_gets(
    env: LocalEnv,
    running: set[str],
    node: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    given: str,
) -> None:
    port = node("rw").port
    running.add("rw")
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, argv: seen.append(argv))
    assert run(capsys, monkeypatch, "psql", *arguments) == (0, "", "")
    psql, *rest = seen[0]
    assert psql == str(env.pg_distrib_dir / "bin" / "psql")
    assert [a.replace(" ", "_") for a in rest] == f"-h 127.0.0.1 -p {port} {given}".split()


def test_psql_takes_the_place_of_the_command(env: LocalEnv, node: Make) -> None:
    """Its output, and its exit status."""
    port = node("rw").port
    code = zenith("psql", "--", "a b")
    code[2] = (
        "from control_plane.compute import Compute; "
        "Compute.status = lambda node: 'running'; " + code[2]
    )
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"<-h><127.0.0.1><-p><{port}><-U><zenith_admin><-d><postgres><a b>"


def test_without_psql(
    env: LocalEnv,
    running: set[str],
    node: Make,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node("rw")
    running.add("rw")
    (env.pg_distrib_dir / "bin" / "psql").unlink()
    status, out, err = run(capsys, monkeypatch, "psql")
    assert (status, out) == (1, "")
    assert "there is no psql at" in err
    assert "postgresql-client-15" in err
