"""Runs of the test framework: what is kept, who is cleaned up after, when it refuses to start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures import output, paths
from fixtures.ports import PortDistributor
from fixtures.processes import processes_below
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


def test_output_behind_a_symbolic_link(inner: Inner) -> None:
    """Servers are found there all the same."""
    real = inner.directory / "real"
    inner.output.rename(real)
    inner.output.symlink_to(real)
    code, printed = inner.run("def test_it(test_output_dir):\n    server(test_output_dir)\n")
    assert code == 1, printed
    assert "the test left processes behind" in printed


def test_processes_below_a_symbolic_link(tmp_path: Path) -> None:
    """They work below the directory that it leads to."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path / "real" / "below") as process:
        try:
            assert [found.pid for found in processes_below([tmp_path / "link"])] == [process.pid]
        finally:
            process.kill()


# The second of two tests, which starts something in the directory that the first one had.
IN_ANOTHERS = """
def test_first():
    pass

def test_second(test_output_dir):
    directory = Path(test_output_dir).parent / "test_first"
    {statement}
"""
ANOTHER_RUN = """
import sys
from pathlib import Path
from fixtures.output import claimed
from test_inner import server

with claimed(Path(sys.argv[1])):
    started = server(sys.argv[1])
    print(flush=True)
    started.wait()
"""


def test_a_server_left_in_another_directory_fails_the_run(inner: Inner) -> None:
    """No test is to blame for it, but the run is."""
    code, printed = inner.run(IN_ANOTHERS.format(statement="directory.mkdir(); server(directory)"))
    assert code == 1, printed
    assert f"the tests left a process behind: {inner.server_pid()}" in printed


def test_servers_of_another_run_are_its_own(inner: Inner) -> None:
    """A test of another run may have the directory by the end of this one."""
    (inner.directory / "another_run.py").write_text(ANOTHER_RUN)
    start = (
        "subprocess.Popen([sys.executable, 'another_run.py', str(directory)], "
        "stdout=subprocess.PIPE).stdout.readline()"
    )
    code, printed = inner.run(IN_ANOTHERS.format(statement=start))
    assert code == 0, printed
    assert process_exists(inner.server_pid())


def test_a_shell_is_no_server(inner: Inner) -> None:
    """Whoever looks at a test's files while others run does not make the run fail."""
    start = "directory.mkdir(); subprocess.Popen(['sleep', '10'], cwd=directory)"
    code, printed = inner.run(IN_ANOTHERS.format(statement=start))
    assert code == 0, printed


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


CONFTEST_CLAIMED = """
import fcntl
from fixtures import output

keep_logs_only = output.keep_logs_only

def keep(directory):
    with (directory.parent / output.RUNNING / directory.name).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (directory.parent / "claimed").touch()
    keep_logs_only(directory)

output.keep_logs_only = keep
"""


def test_a_directory_is_given_back_when_it_is_tidied_up(inner: Inner) -> None:
    """Not before: the files that go would be those of another run's test, which has begun."""
    (inner.directory / "conftest.py").write_text(CONFTEST_CLAIMED)
    code, printed = inner.run(FILES.format(passes=True))
    assert code == 0, printed
    assert not (inner.output / "test_it" / "data" / "segment").exists()
    assert (inner.output / "claimed").exists()
    assert not list((inner.output / output.RUNNING).iterdir())


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


ASKS_ITSELF = """
import http.server, threading
import requests

def test_it():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            for host in ("localhost", "127.0.0.1"):
                assert requests.get(f"http://{host}:{httpd.server_port}/", timeout=10).ok
        finally:
            httpd.shutdown()
"""


@pytest.mark.parametrize("others", ["", "elsewhere.example", "*"])
def test_an_http_proxy_is_not_asked(inner: Inner, others: str) -> None:
    """For servers of this machine: where one is configured, it is for the rest of the world."""
    code, printed = inner.run(ASKS_ITSELF, http_proxy="http://127.0.0.1:1", no_proxy=others)
    assert code == 0, printed


def test_programs_without_an_interpreter(inner: Inner, tmp_path: Path) -> None:
    """ZENITH_BIN may hold the programs alone: modules are run by this interpreter then."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "pageserver").symlink_to(Path(paths.zenith_binpath) / "pageserver")
    inner.plugins = (*PLUGINS, "fixtures.proposer_postgres")
    test = (
        "def test_it(pg_install_dir):\n    assert (pg_install_dir / 'bin' / 'postgres').exists()\n"
    )
    code, printed = inner.run(test, ZENITH_BIN=str(programs))
    assert code == 0, printed


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


def test_directory_with_the_name_of_a_marker(tmp_path: Path) -> None:
    """In a checkout that is called slow no test is slow for that."""
    directory = tmp_path / "slow"
    directory.mkdir()
    (directory / "conftest.py").write_text(CONFTEST)
    inner = Inner(directory)
    inner.plugins = ("xdist", "pytest_timeout")
    code, printed = inner.run("def test_it():\n    pass\n")
    assert code == 0, printed
    assert "1 passed" in printed


@pytest.mark.parametrize("variable", ["ZENITH_BIN", "POSTGRES_DISTRIB_DIR"])
def test_missing_programs(inner: Inner, tmp_path: Path, variable: str) -> None:
    """They are named with the variable that says where they are; REMOTE_ENV does without."""
    environment = {variable: str(tmp_path)}
    code, printed = inner.run("def test_it():\n    pass\n", **environment)
    assert code == 4
    assert variable in printed
    environment["REMOTE_ENV"] = "1"
    assert inner.run("def test_it():\n    pass\n", **environment)[0] == 0
