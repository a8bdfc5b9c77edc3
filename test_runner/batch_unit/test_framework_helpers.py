"""Helpers of the test framework: arguments, names of directories, waiting, comparing files."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import run_pytest
from fixtures import paths
from fixtures.benchmark_fixture import ZenithBenchmarker
from fixtures.http_clients import ZenithPageserverHttpClient
from fixtures.nemesis import Fault, Nemesis
from fixtures.output import directory_name, remove
from fixtures.pg_protocol import PgBin, VanillaPostgres
from fixtures.ports import PortDistributor, can_bind
from fixtures.postgres import Postgres, PostgresFactory
from fixtures.restored_datadir import list_files_to_compare
from fixtures.utils import freeze, get_dir_size, lsn_from_hex, print_gc_result
from fixtures.waits import remote_consistent_lsn, wait_for, wait_for_last_record_lsn
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with two batches."""
    for name in ("batch_a/test_one.py", "batch_b/test_two.py", "test_top.py"):
        path = tmp_path / "root" / "test_runner" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "elsewhere" / "own").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["test_one.py"], ["{root}/test_runner/batch_a/test_one.py"]),
        (["test_top.py"], ["{root}/test_runner/test_top.py"]),
        (["test_two.py::test_x[a/b]"], ["{root}/test_runner/batch_b/test_two.py::test_x[a/b]"]),
        (["test_runner/batch_a"], ["test_runner/batch_a"]),
        (["own"], ["{cwd}/own"]),
        (["nowhere.py"], ["nowhere.py"]),
        (["-k", "own", "-n", "2", "-x"], ["-k", "own", "-n", "2", "-x"]),
        (["--out-dir", "perf", "own"], ["--out-dir", "{cwd}/perf", "{cwd}/own"]),
        (["--out-dir=perf", "-s"], ["--out-dir={cwd}/perf", "-s"]),
        (["--log-cli-level=INFO"], ["--log-cli-level=INFO"]),
        (["-k", "-m", "own"], ["-k", "-m", "{cwd}/own"]),
    ],
)
def test_arguments(tree: Path, given: list[str], meant: list[str]) -> None:
    """Paths are the caller's or the checkout's, names of test files are looked up."""
    root, cwd = tree / "root", tree / "elsewhere"
    expected = [text.format(root=root, cwd=cwd) for text in meant]
    assert run_pytest.resolve(given, cwd, root) == expected


@pytest.mark.parametrize("name", ["test_x[a/b]", "test_x[" + "ä" * 300 + "]", "test_x[\0]", ".."])
def test_directory_names(tmp_path: Path, name: str) -> None:
    """Whatever a parameter id holds, it makes a directory right there."""
    (tmp_path / directory_name(name)).mkdir()
    assert directory_name(name) == directory_name(name) != directory_name(name + "1")
    assert len(list(tmp_path.iterdir())) == 1


def test_directory_name_is_the_test_name() -> None:
    """As a rule."""
    assert directory_name("test_restart[True]") == "test_restart[True]"


def test_remove(tmp_path: Path) -> None:
    """Also what nobody may write to."""
    top = tmp_path / "top"
    (top / "below").mkdir(parents=True)
    (top / "below" / "file").touch()
    (top / "dangling").symlink_to("nowhere")
    (top / "below").chmod(0o500)
    remove(top)
    assert not top.exists()


def test_wait_for() -> None:
    """Until there is neither an exception nor False; other empty results are results."""
    outcomes: list[object] = [ValueError("no"), False, 0]

    def step() -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert wait_for(3, 0, step) == 0
    assert wait_for(1, 0, lambda: None) is None

    def failing() -> None:
        raise ValueError("the reason")

    with pytest.raises(Exception, match=r"timed out while waiting for .*failing") as caught:
        wait_for(2, 0, failing)
    assert str(caught.value.__cause__) == "the reason"


class Details:
    """Answers of a pageserver, one after another."""

    def __init__(self, *details: dict[str, Any]) -> None:
        self.left = list(details)

    def timeline_detail(self, tenant: object, timeline: object) -> dict[str, Any]:
        """The next answer; the last one again and again."""
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def test_wait_for_last_record_lsn() -> None:
    """It is the LSN that is waited for, not that there is one."""
    answers = [{"local": {"last_record_lsn": f"0/{n}"}} for n in (1, 2, 3)]
    client = Details(*answers)
    pageserver = cast(ZenithPageserverHttpClient, client)
    wait_for_last_record_lsn(pageserver, cast(Any, None), cast(Any, None), lsn_from_hex("0/3"))
    assert client.left == answers[-1:]


def test_remote_consistent_lsn() -> None:
    """Nothing uploaded is 0."""
    for remote in (None, {"remote_consistent_lsn": None, "awaits_download": False}):
        client = cast(ZenithPageserverHttpClient, Details({"remote": remote}))
        assert remote_consistent_lsn(client, cast(Any, None), cast(Any, None)) == 0


def test_files_to_compare(tmp_path: Path) -> None:
    """Not those of one server only, not relation files, all others."""
    compared = ["PG_VERSION", "base/5/PG_VERSION", "base/5/pg_filenode.map", "pg_xact/0000"]
    skipped = ["pg_wal/000000010000000000000001", "pg_logical/x", "global/pg_control"]
    skipped += ["postgresql.conf", "base/5/1259", "base/5/1259_vm", "base/5/1259.1", "base/5/t3_9"]
    for name in (*compared, *skipped, "pg_logical/snapshots/deeper"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_files_to_compare(tmp_path) == sorted([*compared, "pg_logical/snapshots/deeper"])


def test_get_dir_size(tmp_path: Path) -> None:
    """Files at any depth."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"de")
    assert get_dir_size(tmp_path) == 5


def test_ports_are_handed_out_again(port_distributor: PortDistributor) -> None:
    """Tests that share an environment have more nodes than there are ports, one after the other."""

    def three_free(port: int) -> bool:
        return all(can_bind("localhost", port + n) for n in range(3))

    # Connections of earlier tests may be waiting out their time there.
    base = next(filter(three_free, iter(port_distributor.get_port, None)))
    with contextlib.ExitStack() as stack:
        distributor = PortDistributor(base, 3)
        ports = [distributor.get_port() for _ in range(6)]
        assert ports == sorted(set(ports[:3])) * 2
        for port in (base, base + 1):
            stack.enter_context(socket.socket()).bind(("localhost", port))
        assert [distributor.get_port() for _ in range(2)] == [base + 2] * 2
        stack.enter_context(socket.socket()).bind(("localhost", base + 2))
        with pytest.raises(RuntimeError, match="are in use"):
            distributor.get_port()


def nodes(**commands: Callable[..., object]) -> PostgresFactory:
    """An environment's computes, three of them, with other commands."""
    env = SimpleNamespace(
        initial_tenant=uuid.uuid4(),
        zenith_cli=SimpleNamespace(**commands),
    )
    factory = PostgresFactory(cast(ZenithEnv, env))
    for name in "abc":
        node = Postgres(cast(ZenithEnv, env), env.initial_tenant, 1)
        node.node_name = name
        node.running = True
        factory.instances.append(node)
    return factory


def test_stop_all() -> None:
    """A node that cannot be stopped is told of, once, and those behind it are stopped."""
    told: list[str] = []

    def pg_stop(name: str, tenant: uuid.UUID) -> None:
        told.append(name)
        if name != "c":
            raise ValueError(f"{name} has crashed")

    factory = nodes(pg_stop=pg_stop)
    with pytest.raises(ValueError, match="a has crashed"):
        factory.stop_all()
    factory.stop_all()
    assert told == ["a", "b", "c"]
    assert not any(node.running for node in factory.instances)


ENDS_ON_SIGQUIT = """
import os, signal
signal.signal(signal.SIGQUIT, lambda *_: os._exit(3))
print(flush=True)
signal.pause()
"""


def test_nodes_that_were_suspended_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that a test has stopped (SIGSTOP) does not stay behind."""
    factory = nodes()
    command = [sys.executable, "-c", ENDS_ON_SIGQUIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            freeze(process.pid)
            for node in factory.instances:
                pids = [process.pid] if node.node_name == "b" else []
                monkeypatch.setattr(node, "supervisor_pids", lambda pids=pids: pids)
            factory.stop_all_immediately()
            assert process.wait() == 3
        finally:
            process.kill()


def test_print_gc_result(caplog: pytest.LogCaptureFixture) -> None:
    """The columns by name."""
    names = ("total", "needed_by_cutoff", "needed_by_branches", "not_updated", "removed")
    row = {f"layers_{name}": number for number, name in enumerate(names, 10)}
    print_gc_result({**row, "elapsed": 7})
    assert "GC in 7 ms: 10 layers" in caplog.text
    assert "14 removed" in caplog.text


def test_environment_variables_are_of_the_caller() -> None:
    """Where programs are is absolute from the start: tests change directories."""
    for path in (paths.zenith_binpath, paths.pg_distrib_dir, paths.top_output_dir):
        assert Path(path).is_absolute()


def test_programs_that_root_may_not_run(test_output_dir: str, port_distributor: Any) -> None:
    """initdb and pg_ctl work whoever runs the tests, also on files that root has added."""
    pg_bin = PgBin(test_output_dir)
    data_dir = Path(test_output_dir) / "pgdata"
    pg_bin.run(["initdb", "-U", "zenith_admin", "-D", str(data_dir), "--no-sync"])
    (data_dir / "more.conf").write_text(f"port = {port_distributor.get_port()}\n")
    (data_dir / "more.conf").chmod(0o600)
    with (data_dir / "postgresql.conf").open("a") as conf:
        conf.write("include 'more.conf'\nunix_socket_directories = ''\n")
    env = {"PGDATA": str(data_dir)}
    pg_bin.run(["pg_ctl", "-w", "-s", "-l", str(data_dir / "pg.log"), "start"], env=env)
    base = pg_bin.run_capture(["pg_ctl", "-D", "pgdata", "-m", "fast", "stop"], cwd=test_output_dir)
    assert "server stopped" in Path(f"{base}.stdout").read_text()


def test_libraries_of_the_programs(test_output_dir: str) -> None:
    """A server of another distribution is made with the libraries of that distribution."""
    distrib = Path(test_output_dir) / "distrib"
    (distrib / "bin").mkdir(parents=True)
    initdb = distrib / "bin" / "initdb"
    initdb.write_text(f'#!/bin/sh\n[ "$LD_LIBRARY_PATH" = "{distrib}/lib" ]\n')
    initdb.chmod(0o755)
    VanillaPostgres(f"{test_output_dir}/data", PgBin(test_output_dir, distrib), 1)


def test_an_environment_that_fails_leaves_no_proxies(
    test_output_dir: str, port_distributor: PortDistributor
) -> None:
    """Their ports are free for the next one."""
    ports: list[int] = []

    def get_port() -> int:
        ports.append(port_distributor.get_port())
        return ports[-1]

    distributor = cast(PortDistributor, SimpleNamespace(get_port=get_port))
    builder = ZenithEnvBuilder(f"{test_output_dir}/repo", distributor, proxied=True)
    builder.distrib_dir = Path(test_output_dir) / "nowhere"
    with pytest.raises(Exception, match="failed with status 1"):
        builder.init()
    assert ports and all(can_bind("localhost", port) for port in ports)


class Daemon:
    """Looks to the nemesis like a safekeeper; each call of `start` has the next outcome."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.running = True
        self.outcomes = list(outcomes)
        self.process = subprocess.Popen(["sleep", "60"])

    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def start(self) -> None:
        """Raises what is next."""
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome


def test_faults_are_healed_whatever_fails() -> None:
    """A daemon that does not start again does not keep the others down, nor connections away."""
    slow = Exception("safekeeper failed to start in 15 seconds")
    daemons = [Daemon(slow, None), Daemon(ValueError("broken")), Daemon(TimeoutError())]
    resumed: list[bool] = []
    network = SimpleNamespace(resume=lambda: resumed.append(True))
    env = cast(ZenithEnv, SimpleNamespace(safekeepers=daemons, network=network))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        pg = cast(Postgres, SimpleNamespace(port=listening.getsockname()[1]))
        nemesis = Nemesis(env, pg)
        with pytest.raises(ValueError, match="broken"):
            nemesis.run([Fault(0.0, "kill", f"safekeeper {n}", 60.0) for n in range(3)], 0.0)
        nemesis.finish()
    assert [daemon.outcomes for daemon in daemons] == [[], [], []]
    assert resumed == [True]
    assert [daemon.process.wait() for daemon in daemons] == [-signal.SIGKILL] * 3


def test_directories_as_text(test_output_dir: str, port_distributor: Any) -> None:
    """What os.path.join() gives is as good as a Path."""
    pg_bin = PgBin(log_dir=Path(test_output_dir))
    assert pg_bin.log_dir == test_output_dir
    vanilla = VanillaPostgres(f"{test_output_dir}/data", pg_bin, port_distributor.get_port())
    assert vanilla.get_subdir_size("base") > 0
    builder = ZenithEnvBuilder(f"{test_output_dir}/repo", port_distributor)
    builder.enable_local_fs_remote_storage()
    assert str(builder.pageserver_remote_storage).count(f"{test_output_dir}/repo/local_fs") == 1
    tenant, timeline = uuid.uuid4(), uuid.uuid4().hex
    assert ZenithBenchmarker(print).get_timeline_size(test_output_dir, tenant, timeline) == 0
