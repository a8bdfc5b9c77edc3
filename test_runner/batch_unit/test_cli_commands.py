"""The command line where it needs no daemon: parsing, errors, exit statuses, the tree."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from batch_unit.cli_support import IDS, TENANT, make_env, run, zenith
from zenith_cli.context import render_error  # type: ignore[import-untyped]
from zenith_cli.timelines import draw_tree  # type: ignore[import-untyped]

from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TimelineId


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    return make_env(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "Usage: zenith"),
        (["pg"], 2, "Usage: zenith pg"),
        (["tenant"], 2, "Usage: zenith tenant"),
        (["pageserver"], 2, "Usage: zenith pageserver"),
        (["safekeeper"], 2, "Usage: zenith safekeeper"),
        (["timeline"], 1, "command failed: no tenant subcommand provided"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["start", "--nonsense"], 2, "No such option"),
        (["stop", "-m", "slowly"], 2, "'slowly' is not one of 'fast', 'immediate'"),
        (["pg", "create", "--port", "70000"], 2, "70000 is not in the range"),
        (["pg", "create", "--tenant-id", "x"], 2, "expected 32 hexadecimal characters"),
        (["pg", "start"], 1, "No node name was provided to start"),
        (["pg", "stop"], 1, "No node name was provided to stop"),
        (["pg", "stop", "nobody"], 1, "postgres nobody is not found"),
        (["pg", "stop", ".."], 1, "invalid node name '..'"),
        (["pg", "create", "--lsn", "5", "n"], 1, "Failed to parse Lsn from the request"),
        (["pg", "create", "--at", "noon", "n"], 2, "'noon' is no time: expected one like"),
        (["pg", "create", "--at", "2026-02-30", "n"], 2, "(day is out of range for month)"),
        (["pg", "start", "--at", "2999-12-31", "n"], 1, "2999-12-31 00:00:00"),
        (["pg", "start", "--at", "2999-12-31", "n"], 1, " is in the future: it is "),
        (["pg", "start", "--at", "2000-01-01", "--lsn", "0/28", "n"], 2, "exclude each other"),
        (["pg", "create", "--at", "2000-01-01", "n"], 1, "the pageserver does not answer"),
        (["pg", "start", "n", "--branch-name", "b"], 1, "no timeline id for branch name 'b'"),
        (["timeline", "create"], 1, "No branch name provided"),
        (["timeline", "branch", "--branch-name", "main"], 1, "branch 'main' is already mapped"),
        (["timeline", "list"], 1, "the pageserver does not answer: is it running?"),
        (["safekeeper", "start", "9"], 1, "could not find safekeeper '9'"),
        (["init"], 1, "already exists. Perhaps already initialized?"),
        (["init", "--config", "/nowhere"], 1, "already exists"),
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


def test_time_without_zone_is_local(
    env: LocalEnv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        _, _, err = run(capsys, monkeypatch, "pg", "start", "n", "--at", "2999-12-31T10:00")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "2999-12-31 10:00:00+09:00 is in the future: it is " in err


def test_answers_without_daemons(
    env: LocalEnv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, monkeypatch, "pg", "create", "--port", "6000") == (0, "", "")
    status, out, err = run(capsys, monkeypatch, "pg", "list")
    assert status == 0
    assert out.splitlines() == [
        "NODE\tADDRESS\tTIMELINE\tBRANCH NAME\tLSN\t\tSTATUS",
        f"main_node\t127.0.0.1:6000\t{IDS[0]}\tmain\t?\t\tstopped",
    ]
    assert err.startswith("Failed to load timeline info: ")
    assert run(capsys, monkeypatch, "stop") == (0, "Pageserver is already stopped\n", "")
    status, out, _ = run(capsys, monkeypatch, "pageserver", "status")
    assert (status, out) == (1, "Pageserver is not running at '127.0.0.1:1'\n")


def test_without_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZENITH_REPO_DIR", raising=False)
    status, _, err = run(capsys, monkeypatch, "start")
    assert status == 1
    assert err.splitlines() == [
        "Error: Error loading config",
        "",
        "Caused by:",
        f"    0: Zenith config is not found in {tmp_path}/.zenith. "
        "You need to run 'zenith init' first",
    ]


def test_failed_init_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pageserver's own words are shown, and the directory is gone."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("postgres", "safekeeper"):
        (programs / name).touch()
    (programs / "pageserver").write_text("#!/bin/sh\necho words; echo no room >&2; exit 7\n")
    (programs / "pageserver").chmod(0o755)
    config = tmp_path / "config"
    config.write_text(f"pg_distrib_dir = '{tmp_path}'\nzenith_distrib_dir = '{programs}'\n")
    for part in tmp_path.parents:
        if part.stat().st_uid == os.geteuid() and not part.stat().st_mode & 1:
            part.chmod(part.stat().st_mode | 0o11)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("ZENITH_REPO_DIR", str(tmp_path / "repo"))
    status, out, err = run(capsys, monkeypatch, "init", "--config", str(config))
    assert (status, out) == (1, "")
    assert "pageserver init failed: init invocation failed, exit status: 7" in err
    assert "Stdout: words" in err
    assert "Stderr: no room" in err
    assert not (tmp_path / "repo").exists()
    (tmp_path / "repo").mkdir()
    assert "if an init was killed, remove it" in run(capsys, monkeypatch, "init")[2]


def test_init_tells_of_keys_that_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("pg_distrib_dir = '/p'\ncolour = 1\n[[safekeepers]]\nid = 1\nport = 5\n")
    monkeypatch.setenv("ZENITH_REPO_DIR", str(tmp_path / "repo"))
    status, out, err = run(capsys, monkeypatch, "init", "--config", str(config))
    assert (status, out) == (1, "")
    assert err.splitlines()[:2] == [
        f"ignored, because they mean nothing: colour, safekeepers.port in {config}",
        "command failed: Failed to create zenith configuration",
    ]


def test_causes_are_rendered() -> None:
    inner, middle, outer = OSError(2, "gone"), KeyError(), ControlPlaneError("top")
    middle.__cause__ = inner
    outer.__cause__ = middle
    assert render_error(outer).splitlines() == [
        "command failed: top",
        "",
        "Caused by:",
        "    0: KeyError",
        "    1: [Errno 2] gone",
    ]


def info(number: int, ancestor: int | None = None, lsn: str | None = None) -> dict[str, Any]:
    parent = None if ancestor is None else IDS[ancestor]
    local = {"ancestor_timeline_id": parent, "ancestor_lsn": lsn}
    return {"timeline_id": IDS[number], "local": local, "remote": None}


def test_tree(env: LocalEnv) -> None:
    env.branches = {
        name: {TENANT: TimelineId.parse(IDS[i])}
        for i, name in enumerate(["main", "a", "b", "c", "d"])
    }
    infos = [info(5), info(0), info(1, 0, "0/10"), info(2, 0, "0/20")]
    infos += [info(3, 1, "0/30"), info(4, 2)]
    infos[2]["remote"] = {}
    infos[3]["remote"] = {"awaits_download": False}
    assert draw_tree(env, TENANT, infos) == [
        f"(L) _no_name_ [{IDS[5]}]",
        f"(L) main [{IDS[0]}]",
        f"(L) ┣━ @0/10: a [{IDS[1]}]",
        f"(L) ┃  ┗━ @0/30: c [{IDS[3]}]",
        f"(L+R) ┗━ @0/20: b [{IDS[2]}]",
        f"(L)    ┗━ @Unknown Lsn: d [{IDS[4]}]",
    ]
    with pytest.raises(ControlPlaneError, match="missing timeline info in the HashMap"):
        draw_tree(env, TENANT, infos[2:])


def test_a_reader_that_leaves(env: LocalEnv) -> None:
    """Nothing is said of a closed pipe, and the work is done all the same."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = subprocess.run(zenith("stop"), stdout=write_fd, stderr=subprocess.PIPE, check=False)
    os.close(write_fd)
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_proxy_comes_between(env: LocalEnv) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "ZENITH_REPO_DIR": str(env.repo_dir)}
    done = subprocess.run(
        zenith("tenant", "list"), env={**os.environ, **proxy}, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"cannot reach http://127.0.0.1:1/v1/tenant" in done.stderr


def test_progress_is_for_terminals() -> None:
    """It never shows on stdout, and is gone when the step is."""
    code = (
        "from zenith_cli import progress, context\n"
        "progress._DELAY = 0\n"
        "with progress.progress('working'):\n"
        "    while progress._status is None: pass\n"
        "    context.say('line')\n"
        "assert progress._status is None\n"
    )
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave, check=False
    )
    os.close(slave)
    assert (done.returncode, done.stdout) == (0, b"line\n")
    assert b"working" in os.read(master, 65536)
    os.close(master)
