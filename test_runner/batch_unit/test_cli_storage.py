"""`zenith storage …` on an environment whose daemons do not run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from batch_unit import store_support as support
from batch_unit.store_support import BRANCH, MAIN, TENANT
from click.testing import CliRunner
from zenith_cli import main as cli_main  # type: ignore[import-untyped]

from control_plane.local_env import LocalEnv
from zenith_utils.pid_file import PidFile


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    """An environment with branch main, which has three layers, and a branch of it."""
    monkeypatch.setenv("ZENITH_REPO_DIR", str(tmp_path))
    text = "pg_distrib_dir = '/p'\nzenith_distrib_dir = '/z'\n"
    text += f"default_tenant_id = '{TENANT}'\n"
    env = LocalEnv.parse(text, tmp_path)
    env.branches = {"main": {TENANT: MAIN}, "fix": {TENANT: BRANCH}}
    env.save()
    path = tmp_path / "tenants" / str(TENANT)
    path.mkdir(parents=True)
    with support.opened(path) as repository:
        timeline = support.new_timeline(repository)
        support.put_layers(timeline, (24, 32), 1)
        repository.branch_timeline(BRANCH, ancestor_id=MAIN)
    return env


def timeline(env: LocalEnv) -> Path:
    return env.repo_dir / "tenants" / str(TENANT) / "timelines" / str(MAIN)


def layer(env: LocalEnv) -> Path:
    return min(path for path in timeline(env).iterdir() if "__" in path.name)


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """Run the command in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["zenith", "storage", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    status = cli_main.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_dump(
    env: LocalEnv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = run(capsys, monkeypatch, "dump", "--values", str(layer(env)))
    assert (status, err) == (0, "")
    assert f"tenant {TENANT} timeline {MAIN}" in out.splitlines()[0]
    damaged = bytearray(layer(env).read_bytes())
    damaged[300] ^= 1
    layer(env).write_bytes(damaged)
    status, out, err = run(capsys, monkeypatch, "dump", str(layer(env)))
    assert (status, out) == (1, "")
    assert err.startswith(f"command failed: {layer(env)}: corrupt at offset ")


def test_verify(
    env: LocalEnv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = run(capsys, monkeypatch, "verify")
    assert (status, err) == (0, "")
    assert out.startswith("2 timelines, 3 layers, ")
    path = layer(env)
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 1
    path.write_bytes(damaged)
    for arguments in ((), (str(timeline(env)),), ("--online",)):
        status, out, err = run(capsys, monkeypatch, "verify", *arguments)
        assert (status, err) == (1, "")
        assert out.splitlines()[0].startswith(f"problem: {path}")
    assert run(capsys, monkeypatch, "verify", "--names-only")[0] == 0
    path.write_bytes(damaged[:-1])
    status, out, err = run(capsys, monkeypatch, "verify", "--names-only")
    assert (status, err) == (1, "")
    assert out.splitlines()[0].startswith(f"problem: {path}: the file has ")


def test_verify_while_it_runs(
    env: LocalEnv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = PidFile(env.repo_dir / "pageserver.pid")
    pid_file.write()
    try:
        status, out, err = run(capsys, monkeypatch, "verify")
        assert (status, out) == (2, "")
        assert err.startswith("cannot verify: a pageserver runs on ")
        assert run(capsys, monkeypatch, "verify", "--online")[0] == 0
    finally:
        pid_file.close()


def test_draw(
    env: LocalEnv,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.svg"
    for arguments, count, title in (
        ((), 3, f"main, timeline {MAIN}: "),
        (("--branch", "fix"), 0, f"fix, timeline {BRANCH}: "),
        (("--timeline-id", str(MAIN)), 3, f"main, timeline {MAIN}: "),
    ):
        answer = run(capsys, monkeypatch, "draw", *arguments, "-o", str(output))
        assert answer == (0, f"{output}: {count} layers\n", "")
        text = output.read_text()
        assert title in text
        assert text.count('class="layer ') == count
    names = tmp_path / "names"
    names.write_text(layer(env).name)
    # No environment is needed for that.
    monkeypatch.setenv("ZENITH_REPO_DIR", str(tmp_path / "nowhere"))
    answer = run(capsys, monkeypatch, "draw", "--names", str(names), "-o", str(output))
    assert answer == (0, f"{output}: 1 layers\n", "")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "Usage: zenith storage"),
        (["dump"], 2, "Missing argument 'LAYER_FILE'"),
        (["dump", "/nowhere"], 1, "command failed: /nowhere: not the name of a layer file"),
        (["verify", "/nowhere"], 2, "cannot verify: /nowhere: neither the working directory"),
        (["draw"], 2, "Missing option '-o'"),
        (["draw", "-o", "x", "--branch", "b"], 1, "Found no timeline id for branch name 'b'"),
        (["draw", "-o", "x", "--timeline-id", "b"], 2, "expected 32 hexadecimal characters"),
        (["draw", "-o", "x", "--timeline-id", "1" * 32], 1, f"timeline {'1' * 32} of tenant"),
        (["draw", "-o", "x", "--names", "/nowhere"], 1, "No such file or directory: '/nowhere'"),
        (["draw", "-o", "x", "--names", "a", "--branch", "b"], 2, "exclude each other"),
        (["draw", "-o", "/nowhere/x"], 1, "cannot write /nowhere/x: No such file or directory"),
    ],
)
def test_errors(
    env: LocalEnv,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    text: str,
) -> None:
    got, out, err = run(capsys, monkeypatch, *arguments)
    assert (got, out) == (status, "")
    assert text in err


def test_a_layer_that_is_gone(
    env: LocalEnv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layer(env)
    shutil.rmtree(timeline(env))
    status, _, err = run(capsys, monkeypatch, "dump", str(path))
    assert status == 1
    assert "No such file or directory" in err


@pytest.mark.parametrize("command", ["", "dump", "verify", "draw"])
def test_help(command: str) -> None:
    result = CliRunner().invoke(cli_main.cli, ["storage", *command.split(), "--help"])
    assert result.exit_code == 0
    assert "\n  zenith storage " in result.output
    assert all(len(line) <= 100 for line in result.output.splitlines())
