"""`zenith doctor`: what it finds on set-ups that are broken in one way, and its exit status."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_unit.cli_support import IDS, TENANT, Run, make_env, run
from batch_unit.cli_support import zenith as process
from fixtures.ports import free_port

from control_plane import environment_checks
from control_plane.addresses import listen_error
from control_plane.compute import ComputeControlPlane
from control_plane.local_env import LocalEnv, default_zenith_distrib_dir, unknown_keys
from postgres_ffi.distrib import find_distrib
from zenith_utils.ids import TimelineId
from zenith_utils.os_user import popen_kwargs
from zenith_utils.pid_file import PidFile


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A place that Postgres' user can reach."""
    for part in [tmp_path, *tmp_path.parents]:
        mode = part.stat().st_mode
        if part.stat().st_uid == os.geteuid() and not mode & stat.S_IXOTH:
            part.chmod(mode | stat.S_IXGRP | stat.S_IXOTH)
    return tmp_path / "repo"


@pytest.fixture
def env(repo: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEnv:
    """An environment that is in order and does not run."""
    repo.mkdir()
    distrib = find_distrib().bin_dir.parent
    env = make_env(repo, monkeypatch, safekeepers=1, distrib=str(distrib))
    env.zenith_distrib_dir = default_zenith_distrib_dir()
    pg, http = free_port(), free_port()
    env.safekeepers[0].pg_port, env.safekeepers[0].http_port = free_port(), free_port()
    env.pageserver.listen_pg_addr = f"127.0.0.1:{pg}"
    env.pageserver.listen_http_addr = f"127.0.0.1:{http}"
    env.save()
    return env


@pytest.fixture
def zenith(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def doctor(zenith: Run) -> tuple[int, dict[str, Any]]:
    """Exit status, and the findings that are not ok, by check."""
    status, out, err = zenith("doctor", "--json")
    assert err == ""
    findings = json.loads(out)
    assert all(set(f) == {"check", "result", "found", "remedy"} for f in findings)
    assert all((f["remedy"] is None) == (f["result"] == "ok") for f in findings)
    return status, {f["check"]: f for f in findings if f["result"] != "ok"}


def test_all_is_well(env: LocalEnv, zenith: Run) -> None:
    assert doctor(zenith) == (0, {})
    status, out, err = zenith("doctor")
    assert (status, err) == (0, "")
    assert all(line.startswith("ok    ") for line in out.splitlines())
    for check in ("python", "postgres", "server headers", "C compiler", "disk space", "config"):
        assert f"ok    {check}: " in out


def test_without_an_environment(repo: Path, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENITH_REPO_DIR", str(repo))
    status, out, _ = zenith("doctor")
    assert status == 0
    assert f"ok    environment: {repo} can be made in {repo.parent}" in out
    assert f"ok    config: no environment in {repo}: zenith init makes one" in out
    assert "ports: " in out
    assert not repo.exists(), "nothing is changed"


def test_a_fail_shows_its_remedy(env: LocalEnv, zenith: Run) -> None:
    env.config_path.write_text("nonsense")
    status, out, _ = zenith("doctor")
    assert status == 1
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("fail  config: cannot parse"))
    assert lines[at + 1] == f"      -> correct {env.config_path}"


def test_no_postgres(env: LocalEnv, zenith: Run) -> None:
    env.pg_distrib_dir = Path("/nowhere")
    env.save()
    status, found = doctor(zenith)
    assert status == 1
    assert found["postgres"]["result"] == "fail"
    assert "postgresql-15" in found["postgres"]["remedy"]


def test_old_postgres_without_headers_and_no_compiler(
    env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    distrib = tmp_path / "distrib" / "bin"
    distrib.mkdir(parents=True)
    for name, says in (("postgres", "postgres (PostgreSQL) 15.4"), ("pg_config", "/l\n/include")):
        (distrib / name).write_text(f"#!/bin/sh\nprintf '{says}\\n'\n")
        (distrib / name).chmod(0o755)
    env.pg_distrib_dir = distrib.parent
    env.save()
    monkeypatch.setenv("CC", "/no/such/compiler")
    status, found = doctor(zenith)
    assert status == 1
    assert found["postgres"]["result"] == "fail"
    assert "install PostgreSQL 15.13" in found["postgres"]["found"]
    assert found["server headers"]["result"] == "fail"
    assert "postgresql-server-dev-15" in found["server headers"]["remedy"]
    assert found["C compiler"]["result"] == "fail"
    assert found["psql"]["result"] == "warn"


@pytest.mark.parametrize("name", ["a b", "a:b"])
def test_a_cache_that_cannot_be_preloaded_from(
    env: LocalEnv, repo: Path, zenith: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ZENITH_CACHE_DIR", str(repo.parent / name))
    status, found = doctor(zenith)
    assert (status, set(found)) == (1, {"cache"})
    assert found["cache"]["remedy"] == "set ZENITH_CACHE_DIR to a directory that has none"


def test_no_programs(env: LocalEnv, zenith: Run) -> None:
    env.zenith_distrib_dir = Path("/nowhere")
    env.save()
    status, found = doctor(zenith)
    assert status == 1
    assert found["programs"]["found"] == "no pageserver and no safekeeper in /nowhere"


def test_port_of_a_stopped_daemon_is_taken(env: LocalEnv, zenith: Run) -> None:
    with socket.create_server(("127.0.0.1", env.safekeepers[0].http_port)):
        status, found = doctor(zenith)
    assert (status, set(found)) == (1, {"ports of safekeeper 1"})
    assert str(env.safekeepers[0].http_port) in found["ports of safekeeper 1"]["found"]


def test_a_port_that_is_not_ours_to_use(
    env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens there: looking for somebody would be in vain."""
    ComputeControlPlane(env).create(TENANT, "node", TimelineId.parse(IDS[0]), None, 700)
    env.pageserver.listen_pg_addr = "192.0.2.1:64000"  # TEST-NET-1: of no machine
    env.save()

    def unprivileged(host: str, port: int) -> OSError | None:
        if port < 1024:
            return PermissionError(errno.EACCES, "Permission denied")
        return listen_error(host, port)

    monkeypatch.setattr(environment_checks, "listen_error", unprivileged)
    _, found = doctor(zenith)
    assert {check: finding["found"] for check, finding in found.items()} == {
        "ports of pageserver": "it could not listen on 192.0.2.1:64000 "
        "(Cannot assign requested address)",
        "postgres node": "is stopped, and it could not listen on its port 700 (Permission denied)",
    }


def test_a_malformed_address_hides_no_other_finding(env: LocalEnv, zenith: Run) -> None:
    env.pageserver.listen_pg_addr = "nonsense"
    env.save()
    with socket.create_server(("127.0.0.1", env.safekeepers[0].http_port)):
        status, found = doctor(zenith)
    assert (status, set(found)) == (1, {"ports of pageserver", "ports of safekeeper 1"})
    assert "nonsense" in found["ports of pageserver"]["found"]
    assert found["ports of pageserver"]["remedy"] == f"correct it in {env.config_path}"


def test_ports_that_are_none(env: LocalEnv, zenith: Run) -> None:
    node = ComputeControlPlane(env).create(TENANT, "node", TimelineId.parse(IDS[0]), None, None)
    (node.pgdata / "postgresql.conf").write_text(
        f"port=70000\nzenith.zenith_tenant='{TENANT}'\nzenith.zenith_timeline='{IDS[0]}'\n"
    )
    _, found = doctor(zenith)
    assert "port 70000 must be from 1 to 65535" in found["nodes"]["found"]
    text = env.config_path.read_text()
    env.config_path.write_text(text.replace("pg_port = ", "pg_port = 9"))
    _, found = doctor(zenith)
    assert "is no port: it must be from 1 to 65535" in found["config"]["found"]


def test_a_daemon_that_takes_no_connections(env: LocalEnv, zenith: Run) -> None:
    held = PidFile(env.repo_dir / "pageserver.pid")
    held.write()
    status, found = doctor(zenith)
    assert (status, set(found)) == (1, {"ports of pageserver"})
    assert f"process {os.getpid()} runs" in found["ports of pageserver"]["found"]


@pytest.fixture
def stranger() -> Iterator[int]:
    """A living process that is no daemon of ours."""
    sleeper = subprocess.Popen(["sleep", "600"])
    yield sleeper.pid
    sleeper.kill()
    sleeper.wait()


def test_stale_pid_files(env: LocalEnv, zenith: Run, stranger: int) -> None:
    pid_file = env.repo_dir / "pageserver.pid"
    pid_file.write_text("4194305")  # above the highest number a process can have
    assert doctor(zenith) == (0, {})
    assert "ok    pid files: 1 left by daemons that have ended" in zenith("doctor")[1]
    pid_file.write_text(str(stranger))
    status, found = doctor(zenith)
    assert status == 0
    assert found["pid files"]["result"] == "warn"
    assert found["pid files"]["remedy"] == f"rm {pid_file}"


def test_config_keys_that_mean_nothing(env: LocalEnv, zenith: Run) -> None:
    text = env.config_path.read_text()
    text = "pg_distib_dir = '/p'\n" + text.replace("[pageserver]", "[pageserver]\nport = 5")
    env.config_path.write_text(text)
    status, found = doctor(zenith)
    assert (status, found["config"]["result"]) == (0, "warn")
    assert found["config"]["found"].endswith("mean nothing: pg_distib_dir, pageserver.port")


def test_our_own_keys_mean_something(env: LocalEnv) -> None:
    env.safekeeper_generation = 3
    env.safekeepers[0].wal_removal = "off"
    assert unknown_keys(tomllib.loads(env.to_toml())) == []


def test_authentication_keys(env: LocalEnv, zenith: Run) -> None:
    env.pageserver.auth_type = "ZenithJWT"
    env.save()
    assert doctor(zenith)[1]["keys"]["result"] == "fail"
    key = env.repo_dir / env.private_key_path
    key.write_text("a key")
    key.chmod(0o644)
    assert doctor(zenith)[1]["keys"]["remedy"] == f"chmod 600 {key}"
    key.chmod(0o600)
    assert doctor(zenith) == (0, {})


def test_a_lost_disk(env: LocalEnv, zenith: Run) -> None:
    env.safekeepers[0].instance = "ab" * 16
    env.save()
    status, found = doctor(zenith)
    assert status == 1
    assert "safekeeper 1 has lost its disk" in found["safekeeper 1"]["found"]
    assert "zenith safekeeper replace 1" in found["safekeeper 1"]["remedy"]


@pytest.mark.parametrize(("free", "result"), [(1 << 20, "fail"), (1 << 30, "warn")])
def test_little_room(
    env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch, free: int, result: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=1 << 40))
    status, found = doctor(zenith)
    assert found["disk space"]["result"] == result
    assert status == (result == "fail")


def test_few_descriptors(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # The daemons take what they may have.
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    status, found = doctor(zenith)
    assert (status, found) == (0, {})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    status, found = doctor(zenith)
    assert (status, found["open files"]["result"]) == (0, "warn")
    assert "raise the hard limit, 512" in found["open files"]["remedy"]


@pytest.mark.skipif(os.geteuid() != 0, reason="Postgres runs as another user only under root")
def test_closed_directory_under_root(env: LocalEnv, zenith: Run) -> None:
    env.repo_dir.chmod(0o700)
    status, found = doctor(zenith)
    assert status == 1
    assert found["environment"]["remedy"].startswith(f"chmod o+x {env.repo_dir}")


def test_no_user_for_postgres(env: LocalEnv, zenith: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("ZENITH_OS_USER", "nobody_of_this_name")
    status, found = doctor(zenith)
    assert status == 1
    assert "there is no user 'nobody_of_this_name'" in found["user"]["found"]


def test_nodes(env: LocalEnv, zenith: Run) -> None:
    plane = ComputeControlPlane(env)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        plane.create(TENANT, "blocked", TimelineId.parse(IDS[0]), None, taken.getsockname()[1])
        broken = plane.create(TENANT, "broken", TimelineId.parse(IDS[0]), None, None)
        (broken.pgdata / "postgresql.conf").write_text("")
        crashed = plane.create(TENANT, "crashed", TimelineId.parse(IDS[0]), None, None)
        crashed.state_dir.mkdir(parents=True)
        (crashed.state_dir / "state.json").write_text('{"phase": "running", "reason": ""}')
        status, found = doctor(zenith)
    assert status == 1
    assert found["postgres blocked"]["result"] == "fail"
    assert found["nodes"]["result"] == "fail"
    assert "settings of node broken" in found["nodes"]["found"]
    assert found["postgres crashed"]["remedy"] == "zenith pg start crashed"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_an_environment_of_somebody_else(env: LocalEnv) -> None:
    """Started as another user than its owner; no remedy changes owners of what is above it."""
    code = [*process("doctor"), "--json"]
    for repo, found, remedy in (
        (env.repo_dir, f"{env.repo_dir} is not ours", "run zenith as its owner"),
        (env.repo_dir / "new", f"{env.repo_dir} is not ours", "choose another place: "),
    ):
        done = subprocess.run(
            code,
            env={**os.environ, "ZENITH_REPO_DIR": str(repo)},
            **popen_kwargs(),
            cwd="/",
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == 1
        finding = next(f for f in json.loads(done.stdout) if f["check"] == "environment")
        assert finding["found"].startswith(found)
        assert finding["remedy"].startswith(remedy)
