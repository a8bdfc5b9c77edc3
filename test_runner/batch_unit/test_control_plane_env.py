"""The configuration of a local environment and its nodes, also under commands at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from compute_tools import state
from control_plane import compute, daemons, http_client
from control_plane.addresses import parse_address
from control_plane.compute import (
    FIRST_PORT,
    Compute,
    ComputeControlPlane,
    postgresql_conf,
    stop_supervisor,
)
from control_plane.daemons import Daemon
from control_plane.environment import compute_environment, daemon_environment
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv, PageserverConf, SafekeeperConf
from control_plane.processes import signal_holder
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.pid_file import PidFile

TENANT = TenantId.parse("11" * 16)
TIMELINE = TimelineId.parse("22" * 16)
NOWHERE = ("127.0.0.1", 1)


def make_env(repo_dir: Path, safekeepers: int = 0) -> LocalEnv:
    repo_dir.mkdir(exist_ok=True)
    env = LocalEnv(
        repo_dir=repo_dir,
        pg_distrib_dir=Path("/usr/lib/it's here"),
        zenith_distrib_dir=Path("/opt/zenith"),
        default_tenant_id=TENANT,
        pageserver=PageserverConf(listen_pg_addr="[::1]:64000"),
        safekeepers=[SafekeeperConf(i, 5450 + i, 7670 + i) for i in range(1, safekeepers + 1)],
        branches={"main": {TENANT: TIMELINE}, 'odd."name\\': {TENANT: TimelineId.generate()}},
    )
    env.save()
    return env


def test_round_trip(tmp_path: Path) -> None:
    env = make_env(tmp_path, safekeepers=2)
    assert LocalEnv.load(tmp_path) == env
    last = env.to_toml().splitlines()[-2:]
    assert last == ["listen_http_addr = '127.0.0.1:9898'", "listen_pg_addr = '[::1]:64000'"]


def test_relative_paths_and_unknown_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = LocalEnv.parse("pg_distrib_dir = 'pg'\nzenith_distrib_dir = 'z'\nx = 1\n", tmp_path)
    assert (env.pg_distrib_dir, env.zenith_distrib_dir) == (tmp_path / "pg", tmp_path / "z")


@pytest.mark.parametrize(
    "text",
    [
        "pageserver = 5",
        "safekeepers = [1]",
        "default_tenant_id = 'x'",
        "[branch_name_mappings]\nmain = 1",
        "[branch_name_mappings]\nmain = [['a']]",
        "[[safekeepers]]\nid = '1'",
        "[[safekeepers]]\nid = 1\n[[safekeepers]]\nid = 1",
        "= = =",
        "[",
    ],
)
def test_bad_config(tmp_path: Path, text: str) -> None:
    with pytest.raises(ControlPlaneError, match="cannot parse the config"):
        LocalEnv.parse(f"pg_distrib_dir = '/p'\nzenith_distrib_dir = '/z'\n{text}\n", tmp_path)


def test_config_in_another_encoding(tmp_path: Path) -> None:
    make_env(tmp_path).config_path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(ControlPlaneError, match="Error loading config"):
        LocalEnv.load(tmp_path)


ADD = """
import sys
from pathlib import Path
from control_plane.compute import ComputeControlPlane
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TenantId, TimelineId
env, tenant = LocalEnv.load(Path(sys.argv[1])), TenantId.parse(sys.argv[2])
for i in range(5):
    name = f"{sys.argv[3]}_{i}"
    env.add_branch(name, tenant, TimelineId.generate())
    ComputeControlPlane(env).create(tenant, name, env.branch_timeline(name, tenant), None, None)
"""


def test_parallel_changes(tmp_path: Path) -> None:
    """No branch is lost, no port given twice."""
    env = make_env(tmp_path / "repo")
    command = [sys.executable, "-c", ADD, str(env.repo_dir), str(TENANT)]
    processes = [subprocess.Popen([*command, f"b{i}"]) for i in range(8)]
    assert [process.wait(60) for process in processes] == [0] * 8
    names = {f"b{i}_{j}" for i in range(8) for j in range(5)}
    loaded = LocalEnv.load(env.repo_dir)
    assert loaded.branches.keys() == names | env.branches.keys()
    nodes = ComputeControlPlane(loaded).nodes(TENANT)
    assert {node.name for node in nodes} == names
    assert len({node.port for node in nodes}) == 40


def test_branch_names(tmp_path: Path) -> None:
    env = make_env(tmp_path)
    other = TimelineId.generate()
    for name in ("", "a b", "a[b", "a\tb", "a\0b"):
        with pytest.raises(ControlPlaneError, match="invalid branch name"):
            env.add_branch(name, TENANT, other)
    with pytest.raises(ControlPlaneError, match=f"mapped to timeline {TIMELINE}, .* {other}$"):
        env.add_branch("main", TENANT, other)
    with pytest.raises(ControlPlaneError, match="Found no timeline id for branch name 'x'"):
        env.branch_timeline("x", TENANT)


@pytest.mark.parametrize("name", ["..", ".", ".x", "a/b", "-x", "", "a b", "a\n", "é"])
def test_node_names(tmp_path: Path, name: str) -> None:
    plane = ComputeControlPlane(make_env(tmp_path))
    with pytest.raises(ControlPlaneError, match="invalid node name"):
        plane.create(TENANT, name, TIMELINE, None, None)


def test_nodes(tmp_path: Path) -> None:
    env = make_env(tmp_path, safekeepers=3)
    plane = ComputeControlPlane(env)
    past = plane.create(TENANT, "past", TIMELINE, Lsn.parse("0/16B9188"), 6000)
    node = plane.create(TENANT, "node", TIMELINE, None, None)
    assert node.port == 6001
    assert past == plane.get(TENANT, "past")
    assert (past.status(), node.safekeepers[2]) == ("stopped", ("localhost", 5453))
    assert "wal_acceptors='localhost:5451,localhost:5452,localhost:5453'" in postgresql_conf(node)
    with pytest.raises(ControlPlaneError, match="already exists"):
        plane.create(TENANT, "node", TIMELINE, None, None)
    conf = node.pgdata / "postgresql.conf"
    conf.write_text(conf.read_text() + "Wal_Acceptors = 'sk1 , [::1]:7 ' # mine\n")
    assert plane.nodes(TENANT)[0].safekeepers == (("sk1", 5454), ("::1", 7))
    # A broken node is told of, and hides none of the others; a directory without settings is none.
    (env.pgdata_dirs(TENANT) / "empty").mkdir()
    conf.write_text("port = many\n")
    broken: list[ControlPlaneError] = []
    assert [n.name for n in plane.nodes(TENANT, broken.append)] == ["past"]
    assert [str(e) for e in broken] == [f"cannot read the settings of node node in {conf}"]
    with pytest.raises(ControlPlaneError, match="cannot read the settings of node node"):
        plane.nodes(TENANT)


def test_occupied_ports_are_passed_over(tmp_path: Path) -> None:
    plane = ComputeControlPlane(make_env(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        plane.create(TENANT, "a", TIMELINE, None, port - 1)
        assert plane.create(TENANT, "b", TIMELINE, None, None).port > port >= FIRST_PORT - 50000


def test_destroy_without_supervisor(tmp_path: Path) -> None:
    plane = ComputeControlPlane(make_env(tmp_path))
    node = plane.create(TENANT, "node", TIMELINE, None, 6000)
    said: list[str] = []
    with pytest.raises(ControlPlaneError, match=r"postgres node is not running \(stopped\)"):
        node.stop(said.append, destroy=False)
    node.stop(said.append, destroy=True)
    assert said == [f"Destroying postgres data directory '{node.pgdata}'"]
    assert not node.pgdata.exists()
    assert not node.state_dir.exists()
    assert plane.get(TENANT, "node") is None


HOLD_LOCK = """
import sys
from pathlib import Path
from compute_tools import state
state.lock(Path(sys.argv[1]), to_destroy=sys.argv[2] == "destroy")
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def holding_lock(node: Compute, role: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a node's lock until its standard input is closed."""
    command = [sys.executable, "-c", HOLD_LOCK, str(node.state_dir), role]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process


@pytest.mark.parametrize("immediate", [False, True])
def test_who_destroys_a_node_is_waited_for(tmp_path: Path, immediate: bool) -> None:
    """And not taken for its supervisor: nobody would finish what it leaves half done."""
    plane = ComputeControlPlane(make_env(tmp_path))
    node = plane.create(TENANT, "node", TIMELINE, None, 6000)
    node.state_dir.mkdir(parents=True)
    state.write(node.state_dir, state.Phase.STOPPED)
    with holding_lock(node, "destroy") as process:
        stdin = process.stdin
        assert stdin is not None
        assert (node.status(), plane.living()) == ("stopping", [("node", node.state_dir)])
        with pytest.raises(state.AlreadyRunning):
            state.lock(node.state_dir)
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            stdin.close()

        stop_supervisor("node", node.state_dir, say, immediate=immediate)
        assert process.wait(10) == 0
    assert said == ["waiting for server to shut down....", "server stopped"]


def test_a_node_whose_crash_nobody_has_noticed_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown as crashed, so it is not refused as running: its supervisor is about to end."""
    node = ComputeControlPlane(make_env(tmp_path)).create(TENANT, "node", TIMELINE, None, 6000)
    node.state_dir.mkdir(parents=True)
    state.write(node.state_dir, state.Phase.RUNNING)
    with holding_lock(node, "supervise") as process:
        stdin = process.stdin
        assert stdin is not None
        assert node.status() == "crashed"

        def supervisor_ends(_: float) -> None:
            stdin.close()
            process.wait(10)

        def launch(*_: object) -> None:
            raise ControlPlaneError("it is launched")

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=supervisor_ends)
        monkeypatch.setattr(compute, "time", clock)
        monkeypatch.setattr(Compute, "_launch", launch)
        with pytest.raises(ControlPlaneError, match="it is launched"):
            node.start(lambda _: None)


def test_interrupted_swap_is_recovered(tmp_path: Path) -> None:
    plane = ComputeControlPlane(make_env(tmp_path))
    node = plane.create(TENANT, "node", TIMELINE, None, 6000)
    node.state_dir.mkdir(parents=True)
    node.pgdata.rename(node.state_dir / "pgdata.old")
    assert plane.get(TENANT, "node") == node
    assert plane.nodes(TENANT) == [node]
    assert state.read(node.state_dir).supervisor_pid is None


def test_umask_does_not_close_directories(tmp_path: Path) -> None:
    env = make_env(tmp_path)
    before = os.umask(0o077)
    try:
        node = ComputeControlPlane(env).create(TENANT, "node", TIMELINE, None, 6000)
    finally:
        os.umask(before)
    assert node.pgdata.parent.stat().st_mode & 0o777 == 0o755
    assert node.pgdata.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("text", "address"),
    [("h:1", ("h", 1)), ("[::1]:64000", ("::1", 64000)), ("0.0.0.0:1", ("0.0.0.0", 1))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    for bad in ("", "h", ":1", "h:", "h:x", "::1:5", "h:99999"):
        with pytest.raises(ControlPlaneError, match="correct the config"):
            parse_address(bad)


def test_http_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        server.settimeout(0)
    with pytest.raises(http_client.UnreachableError, match=r"Connection refused"):
        http_client.request(address, "GET", "/", timeout=5)
    answer = http_client.Answer("http://x/", 404, {"msg": "no timeline"})
    assert (answer.ok, answer.error) == (False, "Error: no timeline")
    answer = http_client.Answer("http://x/", 500, None)
    assert answer.error == "Error: Http error (500) at http://x/."


def test_only_the_holder_is_signalled() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    holders = iter([process.pid, os.getpid()])
    assert signal_holder(lambda: next(holders), signal.SIGKILL) is None
    assert process.poll() is None
    assert signal_holder(lambda: process.pid, signal.SIGKILL) == process.pid
    assert process.wait() == -signal.SIGKILL
    assert signal_holder(lambda: process.pid, signal.SIGKILL) is None
    assert signal_holder(lambda: None, signal.SIGKILL) is None


def test_daemon_is_known_by_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon("Safekeeper 1", "safekeeper", tmp_path, ("false",), NOWHERE, NOWHERE, "x")
    said: list[str] = []
    daemon.stop(said.append, immediate=False)
    daemon.pid_file.write_text(str(os.getpid()))
    daemon.stop(said.append, immediate=False)
    assert said == [
        "Safekeeper 1 is already stopped",
        f"Safekeeper with pid {os.getpid()} does not exist, but a PID file was found",
    ]
    lock = PidFile(daemon.pid_file)
    lock.write()
    said.clear()
    # It runs, and does not answer.
    monkeypatch.setattr(daemons, "START_TIMEOUT", 0.0)
    with pytest.raises(ControlPlaneError, match=r"safekeeper failed to start in 0 seconds"):
        daemon.start(said.append)
    assert said == [f"Safekeeper 1 is already running with pid {os.getpid()}"]
    lock.close()
    with pytest.raises(ControlPlaneError, match=r"Safekeeper failed to start\. See"):
        daemon.start(said.append)


def test_credentials_stay_with_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A superuser of one tenant's database could read those of all tenants' object storage."""
    secrets = {"AWS_SECRET_ACCESS_KEY": "a", "S3_SECRET": "b", "AZURE_X": "c", "GOOGLE_X": "d"}
    builder = {"CC": "/opt/cc", "PATH": "/opt/bin:/bin", "HOME": "/h"}
    for name, value in (secrets | builder | {"PGOPTIONS": "x"}).items():
        monkeypatch.setenv(name, value)
    for name in ("RUST_LOG", "XDG_CACHE_HOME", "ZENITH_CACHE_DIR", "ZENITH_OS_USER"):
        monkeypatch.delenv(name, raising=False)
    compute = builder | {"RUST_BACKTRACE": "1"}
    assert compute_environment() == compute
    assert {name: daemon_environment()[name] for name in compute | secrets} == compute | secrets


def test_a_compute_is_started_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    node = ComputeControlPlane(make_env(tmp_path)).create(TENANT, "node", TIMELINE, None, 6000)
    given: dict[str, str] = {}

    def popen(*_: object, env: dict[str, str], **__: object) -> None:
        given.update(env)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(FileNotFoundError):
        node.start(lambda _: None)
    assert given["PATH"] == os.environ["PATH"]
    assert "AWS_SECRET_ACCESS_KEY" not in given


DAEMON = """
import os, signal, sys
from pathlib import Path
from zenith_utils.pid_file import PidFile
read_fd, write_fd = os.pipe()
if os.fork():
    os.close(write_fd)
    os.read(read_fd, 1)
    os.kill(os.getppid(), int(sys.argv[2]))
    os._exit(0)
pid_file = PidFile(Path(sys.argv[1]))
pid_file.write()
os.close(write_fd)
signal.pause()
"""


@pytest.mark.parametrize("launching", [True, False])
def test_an_interrupted_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launching: bool
) -> None:
    """Whether it goes to the background or does not answer yet."""
    pid_file = tmp_path / "safekeeper.pid"
    number = signal.SIGINT if launching else 0
    command = (sys.executable, "-c", DAEMON, str(pid_file), str(int(number)))
    daemon = Daemon("Safekeeper 1", "safekeeper", tmp_path, command, NOWHERE, NOWHERE, "x")

    def interrupt(_: Daemon) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Daemon, "_answers", interrupt)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        daemon.start(said.append)
    assert "Safekeeper stopped receiving connections" in said
    assert (pid_file.exists(), daemon.running_pid()) == (True, None)
