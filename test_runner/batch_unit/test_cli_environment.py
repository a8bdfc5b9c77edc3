"""`zenith init`, `start`, `stop` and `demo`: what they must not touch, and what they leave."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest
from batch_unit.cli_support import IDS, TENANT, make_env, run, zenith
from zenith_cli import demo, environment  # type: ignore[import-untyped]

from control_plane.compute import ComputeControlPlane
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TimelineId
from zenith_utils.reachable import closed_part


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config for `init`, with programs of no effect, below a directory open to Postgres' user."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("postgres", "safekeeper", "pageserver"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    path = tmp_path / "config"
    path.write_text(f"pg_distrib_dir = '{tmp_path}'\nzenith_distrib_dir = '{programs}'\n")
    for part in [tmp_path, *tmp_path.parents]:
        if part.stat().st_uid == os.geteuid() and not part.stat().st_mode & 1:
            part.chmod(part.stat().st_mode | 0o11)
    return path


def test_demo_keeps_the_file_beside_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZENITH_REPO_DIR", "restored at the end")
    mine = tmp_path / "demo.toml"
    mine.write_text("mine")
    (tmp_path / "demo").mkdir()
    status, _, err = run(capsys, monkeypatch, "demo", "--dir", str(tmp_path / "demo"))
    assert (status, "already exists" in err) == (1, True)
    assert mine.read_text() == "mine"


def test_init_leaves_alone_what_another_has_made(
    tmp_path: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The directory appears after init has found that there is none."""
    repo_dir = tmp_path / "repo"
    monkeypatch.setenv("ZENITH_REPO_DIR", str(repo_dir))
    check = environment._check_programs

    def another_init(env: LocalEnv) -> None:
        check(env)
        repo_dir.mkdir()
        (repo_dir / "config").write_text("another's")

    monkeypatch.setattr(environment, "_check_programs", another_init)
    status, _, err = run(capsys, monkeypatch, "init", "--config", str(config))
    assert (status, "already exists. Perhaps already initialized?\n" in err) == (1, True)
    assert (repo_dir / "config").read_text() == "another's"


def test_init_quotes_paths_for_the_pageserver(
    tmp_path: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distrib = tmp_path / "o'brien"
    (distrib / "bin").mkdir(parents=True)
    (distrib / "bin" / "postgres").touch()
    given = tmp_path / "given"
    (tmp_path / "bin" / "pageserver").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >{given}\n')
    text = config.read_text().splitlines()[1]
    config.write_text(f'pg_distrib_dir = "{distrib}"\n{text}\n')
    monkeypatch.setenv("ZENITH_REPO_DIR", str(tmp_path / "repo"))
    assert run(capsys, monkeypatch, "init", "--config", str(config)) == (0, "", "")
    arguments = given.read_text().split("\0")
    settings = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "-c"]
    assert tomllib.loads("\n".join(settings))["pg_distrib_dir"] == str(distrib)


def test_demo_tells_what_postgres_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env(tmp_path, monkeypatch)
    node = ComputeControlPlane(env).create(TENANT, "n", TimelineId.parse(IDS[0]), None, 1)
    with pytest.raises(ControlPlaneError, match="postgres n did not do what it was asked") as e:
        demo._query(node, "SELECT 1")
    assert isinstance(e.value.__cause__, psycopg2.Error)


SERVER = """
import signal, sys
from pathlib import Path
from zenith_utils.pid_file import PidFile
pid_file = PidFile(Path(sys.argv[1]))
pid_file.write()
print(flush=True)
signal.pause()
"""


@contextmanager
def server(pid_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is known by its pid file, and ends when it is signalled."""
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", SERVER, str(pid_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("command", [("stop",), ("safekeeper", "stop", "9")])
def test_a_removed_safekeeper_is_stopped(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    """One that a change of the safekeepers, which was broken off, has left running."""
    env = make_env(tmp_path, monkeypatch, safekeepers=1)
    with server(env.safekeeper_dir(9) / "safekeeper.pid") as process:
        status, out, err = run(capsys, monkeypatch, *command)
        assert (status, err) == (0, "")
        assert process.wait(10) == -signal.SIGTERM
    assert out.splitlines()[-2:] == [
        "Stop safekeeper gracefully",
        "Safekeeper stopped receiving connections",
    ]
    status, _, err = run(capsys, monkeypatch, "safekeeper", "stop", "9")
    assert (status, "could not find safekeeper '9'" in err) == (1, True)


def test_the_directory_of_a_removed_safekeeper_that_runs_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(tmp_path, monkeypatch, safekeepers=1)
    with server(env.safekeeper_dir(9) / "safekeeper.pid") as process:
        status, _, err = run(capsys, monkeypatch, "safekeeper", "add", "--id", "9")
        assert (status, process.poll()) == (1, None)
    assert "safekeeper 9, which was removed, still runs: zenith safekeeper stop 9" in err
    assert (env.safekeeper_dir(9) / "safekeeper.pid").exists()


@pytest.mark.parametrize(
    ("redirect", "status", "text"),
    [
        (">/dev/full", 1, "the answer could not be written: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full 2>/dev/full", None, ""),
    ],
)
def test_what_cannot_be_told_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redirect: str, status: int | None, text: str
) -> None:
    env = make_env(tmp_path, monkeypatch, safekeepers=1)
    first = server(env.repo_dir / "pageserver.pid")
    with first as pageserver, server(env.safekeeper_dir(1) / "safekeeper.pid") as safekeeper:
        command = f"exec {shlex.join(zenith('stop'))} {redirect}"
        done = subprocess.run(
            command, shell=True, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
        assert pageserver.wait(10) == safekeeper.wait(10) == -signal.SIGTERM
    assert done.stderr == text
    assert status in (None, done.returncode)


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022])
@pytest.mark.skipif(os.geteuid() != 0, reason="Postgres runs as ourselves")
def test_a_umask_does_not_keep_postgres_out(
    tmp_path: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    umask: int,
) -> None:
    """The directories that init makes are open, and to nobody's eyes beyond the umask."""
    repo_dir = tmp_path / "above" / "repo"
    monkeypatch.setenv("ZENITH_REPO_DIR", str(repo_dir))
    before = os.umask(umask)
    try:
        assert run(capsys, monkeypatch, "init", "--config", str(config)) == (0, "", "")
    finally:
        os.umask(before)
    tenants = repo_dir / "pgdatadirs" / "tenants"
    for path in (repo_dir.parent, repo_dir, tenants.parent, tenants):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask | 0o011
    assert closed_part(tenants) is None
