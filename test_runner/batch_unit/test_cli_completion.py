"""Shell completion as shells ask for it: names from the environment's files, silence on failure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from batch_unit.cli_support import IDS, TENANT, make_env, zenith

from control_plane.compute import ComputeControlPlane
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TenantId, TimelineId

OTHER = TenantId.parse("22" * 16)


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    env = make_env(tmp_path, monkeypatch, safekeepers=3)
    env.branches["fix"] = {TENANT: TimelineId.parse(IDS[1])}
    env.branches["theirs"] = {OTHER: TimelineId.parse(IDS[2])}
    env.save()
    ComputeControlPlane(env).create(TENANT, "node1", TimelineId.parse(IDS[0]), None, 6001)
    return env


def complete(line: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    question = {
        "_ZENITH_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        zenith(), env={**os.environ, **question}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return [answer.partition(",")[2] for answer in done.stdout.split()]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zenith sta", ["start", "status"]),
        ("zenith pg ", ["create", "list", "start", "stop"]),
        ("zenith pg start --br", ["--branch-name"]),
        ("zenith pg start --branch-name ", ["fix", "main"]),
        ("zenith pg create --branch-name f", ["fix"]),
        (f"zenith pg create --tenant-id {OTHER} --branch-name ", ["theirs"]),
        ("zenith pg stop ", ["node1"]),
        ("zenith pg stop --tenant-id 2", [str(OTHER)]),
        ("zenith psql ", ["fix", "main", "node1"]),
        ("zenith timeline branch --ancestor-branch-name m", ["main"]),
        ("zenith storage draw --branch ", ["fix", "main"]),
        ("zenith storage draw --timeline-id 01", [IDS[0]]),
        ("zenith safekeeper stop ", ["1", "2", "3"]),
        ("zenith safekeeper replace 2", ["2"]),
        ("zenith tenant config ", [str(TENANT), str(OTHER)]),
        ("zenith stop -m ", ["fast", "immediate"]),
        ("zenith completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_offers(env: LocalEnv, line: str, offered: list[str]) -> None:
    assert sorted(complete(line)) == sorted(offered)


def test_silence_where_nothing_is_known(env: LocalEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.config_path.write_text("this is [not a config")
    assert complete("zenith pg start --branch-name ") == []
    monkeypatch.setenv("ZENITH_REPO_DIR", "/nowhere/at/all")
    assert complete("zenith psql ") == []
    assert complete("zenith safekeeper stop ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    done = subprocess.run(
        zenith("completion", shell), capture_output=True, text=True, check=True, timeout=60
    )
    assert f"_ZENITH_COMPLETE={shell}_complete" in done.stdout
    assert "zenith" in done.stdout


def test_bash_takes_the_script(env: LocalEnv, tmp_path: Path) -> None:
    """The script in a real bash: what its completion function puts into COMPREPLY."""
    program = tmp_path / "zenith"
    command = zenith()
    program.write_text(f'#!/bin/sh\nexec {command[0]} -c "{command[2]}" "$@"\n')
    program.chmod(0o755)
    script = subprocess.run(
        [program, "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    test = (
        f"{script}\nCOMP_WORDS=(zenith psql fi); COMP_CWORD=2\n"
        '_zenith_completion zenith fi psql\necho "${COMPREPLY[@]}"\n'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", test],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "fix\n"
