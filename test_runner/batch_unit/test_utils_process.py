"""Daemons: background start, pid files, listening sockets and termination signals."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from fixtures.ports import free_port

from zenith_utils import os_user, pid_file
from zenith_utils.daemonize import AddressError, BindError, bind_listener, parse_address
from zenith_utils.pid_file import PidFile, PidFileError, is_alive, read_pid_file, running_pid
from zenith_utils.quick_start import quick_imports

ROOT = Path(__file__).resolve().parents[2]

DAEMON = """
import socket, sys
from pathlib import Path
from typing import Any
from zenith_utils.daemonize import bind_listener, daemonize
from zenith_utils.log import init_logging
from zenith_utils.shutdown import Shutdown
work = Path(sys.argv[1])
sock = bind_listener(sys.argv[2])
lock = daemonize(work / "d.pid", work / "d.log")
init_logging(work / "d.log")
print("printed", flush=True)
if len(sys.argv) > 3:
    raise RuntimeError("cannot go on")
shutdown = Shutdown()
shutdown.install()
client, _ = sock.accept()
client.sendall(b"hello")
print(shutdown.wait(), flush=True)
"""

STREAMS = """
import contextlib, importlib, os, sys
main = importlib.import_module(sys.argv[1]).main
with contextlib.suppress(SystemExit):
    main(["--version"])
print("a line", flush=True)
os.write(int(sys.argv[2]), " ".join(os.readlink(f"/proc/self/fd/{n}") for n in range(3)).encode())
"""

WAITING = r"""
import sys, threading, time
from zenith_utils.log import init_logging
from zenith_utils.shutdown import IMMEDIATE_EXIT_CODE, Shutdown, ShutdownMode
init_logging()
shutdown = Shutdown()
shutdown.install()
shutdown.guard_threads()
print("ready", flush=True)
if sys.argv[1] == "thread":
    def fails():
        raise ValueError("broken")
    threading.Thread(target=fails, name="worker").start()
mode = shutdown.wait()
print(f"\n{mode.name} {shutdown.failed}\n", end="", flush=True)
if sys.argv[1] == "stuck":
    while True:
        time.sleep(60)
sys.exit(IMMEDIATE_EXIT_CODE if mode is ShutdownMode.IMMEDIATE else 0)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.005)


def start_daemon(work: Path, port: int, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DAEMON, str(work), f"127.0.0.1:{port}", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_daemon_lives_and_stops(tmp_path: Path) -> None:
    port = free_port()
    started = start_daemon(tmp_path, port)
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    pid_file = tmp_path / "d.pid"
    pid = int(pid_file.read_text())
    try:
        assert pid_file.read_text() == str(pid)
        assert running_pid(pid_file) == pid
        assert os.getsid(pid) == pid
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            assert client.recv(5) == b"hello"
        again = start_daemon(tmp_path, free_port())
        assert again.returncode == 1
        assert f"already running with pid {pid}" in again.stderr
        occupied = start_daemon(tmp_path, port)
        assert occupied.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in occupied.stderr
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid))
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    log = (tmp_path / "d.log").read_text()
    assert "printed\n" in log
    assert "ShutdownMode.GRACEFUL" in log
    assert running_pid(pid_file) is None
    assert read_pid_file(pid_file) == pid


def test_early_failure_of_the_child_is_in_the_log(tmp_path: Path) -> None:
    assert start_daemon(tmp_path, free_port(), "fail").returncode == 0
    pid = read_pid_file(tmp_path / "d.pid")
    assert pid is not None
    wait_until(lambda: not is_alive(pid))
    assert "RuntimeError: cannot go on" in (tmp_path / "d.log").read_text()


@pytest.mark.parametrize("program", ["pageserver.main", "safekeeper.main", "zenith_proxy.main"])
def test_standard_streams_are_always_there(program: str) -> None:
    """Nothing that is opened later takes their numbers."""
    told, tell = os.pipe()
    with os.fdopen(told) as answer:
        shell = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh"]
        command = [*shell, sys.executable, "-c", STREAMS, program, str(tell)]
        subprocess.run(command, cwd=ROOT, pass_fds=[tell], check=True, timeout=20)
        os.close(tell)
        assert answer.read() == "/dev/null /dev/null /dev/null"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_daemon_started_without_standard_streams_keeps_its_lock(
    tmp_path: Path, closed: str
) -> None:
    command = f'exec "$@" {closed}'
    safekeeper = [sys.executable, "-m", "safekeeper.main", "-D", str(tmp_path), "--id", "1"]
    safekeeper += ["-l", "127.0.0.1:0", "--listen-http", "127.0.0.1:0", "-d"]
    subprocess.run(["sh", "-c", command, "sh", *safekeeper], cwd=ROOT, check=True, timeout=20)
    pid = running_pid(tmp_path / "safekeeper.pid")
    assert pid is not None
    try:
        again = subprocess.run(safekeeper, cwd=ROOT, capture_output=True, text=True, timeout=20)
        assert again.returncode == 1
        assert "is locked by some other process" in again.stderr
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))


def test_idle_clients_leave_descriptors_for_files(tmp_path: Path) -> None:
    """As many as the process may have in all are neither all let in, nor do they stop the work."""
    most = 150
    port, http_port = free_port(), free_port()
    command = [sys.executable, "-m", "safekeeper.main", "-D", str(tmp_path), "--id", "1"]
    command += ["-l", f"127.0.0.1:{port}", "--listen-http", f"127.0.0.1:{http_port}", "-d"]
    limits = f'ulimit -Sn 50 && ulimit -Hn {most} && exec "$@"'
    subprocess.run(["sh", "-c", limits, "sh", *command], cwd=ROOT, check=True, timeout=20)
    pid = running_pid(tmp_path / "safekeeper.pid")
    assert pid is not None
    try:
        url = f"http://127.0.0.1:{http_port}/v1"
        wait_until(lambda: answers(f"{url}/status"))
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (most, most)
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                for _ in range(most)
            ]
            # The last is told, which is after all others were looked at.
            assert b"53300" in clients[-1].recv(1000)
            ids = {"tenant_id": [1] * 16, "timeline_id": [2] * 16, "peer_ids": []}
            assert requests.post(f"{url}/timeline", json=ids, timeout=20).status_code in (200, 201)
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))


def answers(url: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url, timeout=20).status_code == 200
    return False


@pytest.mark.parametrize(
    ("how", "signals", "output", "code"),
    [
        ("plain", [signal.SIGTERM], "GRACEFUL False", 0),
        ("plain", [signal.SIGINT], "GRACEFUL False", 0),
        ("plain", [signal.SIGQUIT], "IMMEDIATE False", 111),
        ("stuck", [signal.SIGTERM, signal.SIGINT], "GRACEFUL False", 1),
        ("thread", [], "GRACEFUL True", 0),
    ],
)
def test_termination(how: str, signals: list[int], output: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            seen = ""
            for number in signals:
                process.send_signal(number)
                while output not in seen:
                    line = process.stdout.readline()
                    assert line
                    seen += line
            seen += process.stdout.read()
            assert output in seen
            assert process.wait(10) == code
        finally:
            process.kill()


def test_pid_file_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    assert running_pid(path) is None
    assert read_pid_file(path) is None
    path.write_text("99999999")
    held = PidFile(path)
    assert read_pid_file(path) is None
    held.write()
    assert path.read_text() == str(os.getpid())
    with pytest.raises(PidFileError, match=f"already running with pid {os.getpid()}"):
        PidFile(path)
    assert running_pid(path) == os.getpid()
    held.close()
    assert running_pid(path) is None
    PidFile(path).close()
    with pytest.raises(PidFileError, match="cannot open"):
        PidFile(tmp_path / "missing" / "x.pid")


def test_holder_of_a_pid_file_is_waited_for_until_it_has_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever left one behind may have become somebody else, who must not be signalled."""
    path = tmp_path / "x.pid"
    path.write_text("99999999")
    held = PidFile(path)
    pauses = itertools.count()

    def pause(_: float) -> None:
        if next(pauses) == 3:
            held.write()

    monkeypatch.setattr(time, "sleep", pause)
    assert running_pid(path) == os.getpid()
    assert next(pauses) == 4
    held.close()
    silent = PidFile(path)
    monkeypatch.setattr(pid_file, "_NUMBER_DEADLINE", 0)
    with pytest.raises(OSError, match="locked by a process that has not written its number"):
        running_pid(path)
    silent.close()
    assert running_pid(path) is None


def test_zombies_are_not_alive() -> None:
    assert is_alive(os.getpid())
    process = subprocess.Popen(["true"])
    wait_until(lambda: not is_alive(process.pid))
    process.wait()
    assert not is_alive(process.pid)


def test_addresses() -> None:
    assert parse_address("127.0.0.1:5432") == ("127.0.0.1", 5432)
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address("localhost", 7) == ("localhost", 7)
    assert parse_address("[::1]", 7) == ("::1", 7)
    for text in ("", "host", ":1", "host:", "host:x", "host:70000", "::1:80", "::1", "[::1:80"):
        with pytest.raises(AddressError, match="invalid address"):
            parse_address(text)


def test_listeners_exclude_each_other_but_not_the_past() -> None:
    first = bind_listener("127.0.0.1:0")
    port = first.getsockname()[1]
    with pytest.raises(BindError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind_listener(("127.0.0.1", port))
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = first.accept()
    # The side that closes first keeps the port in TIME_WAIT.
    accepted.close()
    assert client.recv(1) == b""
    client.close()
    first.close()
    bind_listener(("127.0.0.1", port)).close()


def test_os_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert os_user.postgres_user() is None
    assert os_user.popen_kwargs() == {}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("ZENITH_OS_USER", "no-such-user")
    with pytest.raises(os_user.OsUserError, match="ZENITH_OS_USER"):
        os_user.give(tmp_path)
    monkeypatch.setenv("ZENITH_OS_USER", "root")
    with pytest.raises(os_user.OsUserError, match="uid 0"):
        os_user.postgres_user()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_are_given_without_following_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZENITH_OS_USER", "nobody")
    user = os_user.postgres_user()
    assert user is not None
    outside = tmp_path / "outside"
    outside.write_text("root's")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("x")
    (tree / "link").symlink_to(outside)
    (tree / "dirlink").symlink_to(tmp_path)
    os_user.give(tree, recursive=True)
    assert outside.stat().st_uid == tmp_path.stat().st_uid == 0
    for path in (tree, tree / "deep", tree / "deep" / "file", tree / "link", tree / "dirlink"):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (user.pw_uid, user.pw_gid), path
    shown = subprocess.run(["id", "-u"], capture_output=True, check=True, **os_user.popen_kwargs())
    assert int(shown.stdout) == user.pw_uid


def test_names_with_addresses_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as localhost on most machines: clients that were told 127.0.0.1 find it there."""
    plain = socket.getaddrinfo

    def both(host: str, port: int, **options: Any) -> list[Any]:
        assert host == "localhost"
        ipv6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [ipv6, *plain("127.0.0.1", port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with bind_listener("localhost:0") as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


# ---- quick starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("certificates", [None, "/etc/some.pem"])
def test_quick_imports_leave_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, certificates: str | None
) -> None:
    """Whatever ends the block: garbage is collected, and the environment is the user's."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if certificates is not None:
        monkeypatch.setenv("SSL_CERT_FILE", certificates)
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    try:
        assert gc.isenabled()
        assert os.environ.get("SSL_CERT_FILE") == certificates
    finally:
        gc.unfreeze()
