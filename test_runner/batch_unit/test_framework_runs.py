"""Runs of the test framework: what is kept, who is cleaned up after, when it refuses to start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures import output
from fixtures.ports import PortDistributor
from fixtures.utils import process_exists, read_pid, wait_until

FRAMEWORK = Path(output.__file__).resolve().parents[1]
PLUGINS = ("xdist", "pytest_timeout", "fixtures.zenith_fixtures")
SKIP_CHECK = "--skip-interfering-proc-check"
# Where no other test's servers are.
QUIET_PORT = 32600

# A server as far as the framework can tell: its name is one's, it works in the test's directory.
SERVER = """
import os, subprocess, sys
from pathlib import Path

def server(directory, arguments=("-c", "import time; time.sleep(600)")):
    program = Path(directory) / "safekeeper"
    program.symlink_to(sys.executable)
    started = subprocess.Popen([str(program), *arguments], cwd=directory, start_new_session=True)
    (Path(os.environ["TEST_OUTPUT"]) / "server.pid").write_text(str(started.pid))
    return started
"""


class Inner:
    """Runs of pytest over one test file, with the framework's plugins."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory / "output"
        self.output.mkdir()
        self.base_port = QUIET_PORT
        self.plugins: tuple[str, ...] = PLUGINS

    def run(self, test: str, *options: str, **environment: str) -> tuple[int, str]:
        """The exit code, and what was printed."""
        (self.directory / "test_inner.py").write_text(SERVER + test)
        (self.directory / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        for plugin in self.plugins:
            command += ["-p", plugin]
        done = subprocess.run(
            [*command, "--rootdir", str(self.directory), "test_inner.py", *options],
            cwd=self.directory,
            env={
                **os.environ,
                "PYTHONPATH": str(FRAMEWORK),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "TEST_OUTPUT": str(self.output),
                "ZENITH_TEST_BASE_PORT": str(self.base_port),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def server_pid(self) -> int:
        """The process that server() of the test started."""
        return read_pid(self.output / "server.pid")


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[Inner]:
    """An inner run, whose server is ended if it still lives."""
    run = Inner(tmp_path)
    yield run
    if (run.output / "server.pid").exists() and process_exists(run.server_pid()):
        os.kill(run.server_pid(), 9)


FILES = """
def test_it(test_output_dir):
    for name in ("pageserver.log", "data/segment", "data/pg.log", "data/deep/postgresql.conf"):
        path = Path(test_output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    assert {passes}
"""


def test_logs_are_kept_of_tests_that_passed(inner: Inner) -> None:
    """Everything else is removed: a run would fill the disk otherwise."""
    code, printed = inner.run(FILES.format(passes=True))
    assert code == 0, printed
    kept = {str(p.relative_to(inner.output)) for p in inner.output.glob("test_it/**/*")}
    assert kept == {
        "test_it/data",
        "test_it/data/deep",
        "test_it/data/deep/postgresql.conf",
        "test_it/data/pg.log",
        "test_it/pageserver.log",
    }


@pytest.mark.parametrize(("passes", "options"), [(False, ()), (True, ("--keep-output=all",))])
def test_everything_is_kept(inner: Inner, passes: bool, options: tuple[str, ...]) -> None:
    """Of a test that failed, and of all if asked for; until the test runs again."""
    code, printed = inner.run(FILES.format(passes=passes), *options)
    assert code == (0 if passes else 1), printed
    assert (inner.output / "test_it" / "data" / "segment").exists()
    assert inner.run("def test_it():\n    pass\n")[0] == 0
    assert not (inner.output / "test_it").exists()


def test_a_killed_run_is_cleaned_up_after(inner: Inner) -> None:
    """The next run ends the servers that a killed one has left, whatever it runs itself."""
    killed = (
        "def test_it(test_output_dir):\n    server(test_output_dir)\n    os.kill(os.getpid(), 9)\n"
    )
    assert inner.run(killed)[0] == -9
    assert process_exists(inner.server_pid())
    code, printed = inner.run("def test_other():\n    pass\n")
    assert code == 0, printed
    wait_until(lambda: not process_exists(inner.server_pid()), what="the server to end")


def test_the_same_test_ends_what_was_started_by_hand(inner: Inner) -> None:
    """A directory that is about to be removed is nobody's to work in."""
    by_hand = inner.output / "test_it"
    by_hand.mkdir()
    (by_hand / "safekeeper").symlink_to(sys.executable)
    sleep = [str(by_hand / "safekeeper"), "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(sleep, cwd=by_hand) as process:
        assert inner.run("def test_other():\n    pass\n")[0] == 0
        assert process.poll() is None
        assert inner.run("def test_it():\n    pass\n")[0] == 0
        assert process.wait() == -9


def test_a_process_left_behind_fails_its_test(inner: Inner) -> None:
    """It is named and ended."""
    code, printed = inner.run("def test_it(test_output_dir):\n    server(test_output_dir)\n")
    assert code == 1
    assert "the test left processes behind" in printed
    assert str(inner.server_pid()) in printed
    wait_until(lambda: not process_exists(inner.server_pid()), what="the server to end")


def test_two_runs_take_turns_in_a_directory(inner: Inner) -> None:
    """While one test has a directory, another of the same name waits."""
    with output.claimed(inner.output / "test_it"):
        (inner.output / "test_it" / "mine").touch()
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, "-c", _CLAIM, str(inner.output / "test_it")],
                env={**os.environ, "PYTHONPATH": str(FRAMEWORK)},
                timeout=1,
                check=True,
            )
        assert (inner.output / "test_it" / "mine").exists()
    assert inner.run("def test_it():\n    pass\n")[0] == 0


_CLAIM = "import sys; from pathlib import Path; from fixtures.output import claimed\n" + (
    "with claimed(Path(sys.argv[1])): pass"
)

LISTEN = """
import socket, time, sys
listening = socket.socket()
listening.bind(("127.0.0.1", int(sys.argv[1])))
listening.listen()
print(flush=True)
time.sleep(600)
"""


def test_interfering_processes(
    inner: Inner, tmp_path: Path, port_distributor: PortDistributor
) -> None:
    """A server on this run's ports is named and the run refused; other servers are no matter."""
    (tmp_path / "pageserver").symlink_to(sys.executable)
    inner.base_port = port_distributor.get_port()
    command = [str(tmp_path / "pageserver"), "-c", LISTEN, str(inner.base_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        passing = "def test_it():\n    pass\n"
        code, printed = inner.run(passing)
        assert code == 4, printed
        assert "Found interfering processes running" in printed
        assert f"{process.pid} " in printed
        assert "ZENITH_TEST_BASE_PORT" in printed
        assert inner.run(passing, SKIP_CHECK)[0] == 0
        inner.base_port = QUIET_PORT
        assert inner.run(passing)[0] == 0
        process.kill()


def test_ports_of_clients_are_not_used(inner: Inner) -> None:
    """So many workers that their ports reach those that the system gives away are refused."""
    inner.base_port = 32700
    code, printed = inner.run("def test_it():\n    pass\n")
    assert code == 4
    assert "ZENITH_TEST_BASE_PORT" in printed


CONFTEST = """
pytest_plugins = (
    "fixtures.zenith_fixtures",
    "fixtures.benchmark_fixture",
    "fixtures.compare_fixtures",
    "fixtures.slow",
)
"""
MARKED = """
import pytest

@pytest.mark.slow
def test_slow():
    assert False

@pytest.mark.remote_cluster
def test_remote(test_output_dir, zenbenchmark):
    pass
"""


def test_a_suite_of_its_own(inner: Inner) -> None:
    """A conftest.py elsewhere names four plugins, and has all options, markers and checks."""
    (inner.directory / "conftest.py").write_text(CONFTEST)
    inner.plugins = ("xdist", "pytest_timeout")
    options = ("--strict-markers", "-W", "error", SKIP_CHECK, "-rs", "--keep-output=all")
    code, printed = inner.run(MARKED, *options)
    assert code == 0, printed
    assert "1 passed, 1 skipped" in printed
    assert "need --runslow option to run" in printed
    code, printed = inner.run("def test_it():\n    pass\n", ZENITH_BIN="/nowhere")
    assert code == 4, printed


@pytest.mark.parametrize("variable", ["ZENITH_BIN", "POSTGRES_DISTRIB_DIR"])
def test_missing_programs(inner: Inner, tmp_path: Path, variable: str) -> None:
    """They are named with the variable that says where they are; REMOTE_ENV does without."""
    environment = {variable: str(tmp_path)}
    code, printed = inner.run("def test_it():\n    pass\n", **environment)
    assert code == 4
    assert variable in printed
    environment["REMOTE_ENV"] = "1"
    assert inner.run("def test_it():\n    pass\n", **environment)[0] == 0
