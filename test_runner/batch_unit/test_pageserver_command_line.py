"""The pageserver as a program: arguments, what it prints where, its files, signals and status."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.pageserver_support import (
    REPOSITORY,
    Pageserver,
    Root,
    running,
    scratch_directory,
    wait_until,
)

from zenith_utils.ids import TenantId
from zenith_utils.pid_file import is_alive

pytestmark = pytest.mark.timeout(120)
ID = "0123456789abcdef" * 2
PARSE = ("Failed to parse pageserver configuration", "invalid config")


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


@pytest.fixture(scope="module")
def server() -> Iterator[Pageserver]:
    """One that is initialised and does not run."""
    with scratch_directory() as path:
        yield Pageserver(path / "ps")


def caused_by(*messages: str) -> str:
    """What stderr is when these messages, each caused by the next, end the program."""
    lines = [f"    {number}: {text}" for number, text in enumerate(messages[1:])]
    head = f"Error: {messages[0]}\n"
    return head + ("\nCaused by:\n" + "\n".join(lines) + "\n" if lines else "")


@pytest.mark.parametrize(
    ("arguments", "chain"),
    [
        (
            ["-c", "id=2"],
            ["node id can only be set during pageserver init and cannot be overridden"],
        ),
        (["-c", "what=1"], [*PARSE, "unrecognized pageserver option 'what'"]),
        (["-c", "gc_horizon='1'"], [*PARSE, "configure option gc_horizon is not an integer"]),
        (["-c", "gc_horizon=-1"], [*PARSE, "configure option gc_horizon cannot be negative"]),
        (["-c", "gc_period=1"], [*PARSE, "configure option gc_period is not a string"]),
        (["-c", "auth_type=1"], [*PARSE, "configure option auth_type is not a string"]),
        (["-c", "pg_distrib_dir=1"], [*PARSE, "configure option pg_distrib_dir is not a string"]),
        (
            ["-c", "remote_storage={}"],
            [*PARSE, "no 'local_path' nor 'bucket_name' option"],
        ),
        # Option and value in one argument, with a blank, as some callers pass them.
        (["-c what=1"], [*PARSE, "unrecognized pageserver option 'what'"]),
        (["-cwhat=1"], [*PARSE, "unrecognized pageserver option 'what'"]),
        # Later ones win, and each replaces whole values.
        (
            ["-c", "gc_period='1 s'", "-c", "gc_horizon=1\ngc_period=2", "-c gc_horizon=2"],
            [*PARSE, "configure option gc_period is not a string"],
        ),
        (["--init", "--daemonize"], ["--daemonize cannot be used with --init"]),
    ],
)
def test_errors_show_their_causes(
    server: Pageserver, arguments: list[str], chain: list[str]
) -> None:
    result = server.run(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == caused_by(*chain)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-c", "gc_horizon"], "Error: Option 'gc_horizon' could not be parsed as a toml document"),
        (["-c", "pg_distrib_dir='/nowhere'"], "Can't find postgres binary at /nowhere"),
        (["-c", "listen_pg_addr='localhost:x'"], "invalid address 'localhost:x'"),
        (["--init"], "exists already"),
        (["-D", "/nowhere"], "Error: Error opening workdir '/nowhere'"),
    ],
)
def test_error_texts(server: Pageserver, arguments: list[str], text: str) -> None:
    result = server.run(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ") and text in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--what"],
        ["-c"],
        ["--create-tenant", ID],
        ["--init", "--create-tenant", "xyz"],
        ["--init", "--initial-timeline-id", ID],
        ["--config-override", "id=1"],
        ["start"],
    ],
)
def test_wrong_usage(server: Pageserver, arguments: list[str]) -> None:
    result = server.run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: pageserver ")


def test_missing_configuration(scratch: Path, server: Pageserver) -> None:
    result = server.run("-D", str(scratch))
    assert result.stderr == f"Error: No pageserver config at '{scratch}/pageserver.toml'\n\n" + (
        f"Caused by:\n    0: [Errno 2] No such file or directory: '{scratch}/pageserver.toml'\n"
    )


def test_version_and_help(server: Pageserver) -> None:
    version = server.run("--version")
    assert version.returncode == 0
    assert re.fullmatch(r"pageserver (git:[0-9a-f]{40}|git-env:\S+|\S+)\n", version.stdout)
    shown = server.run("--help")
    assert shown.returncode == 0
    for option in ("-D", "--workdir", "--daemonize", "--init", "--create-tenant", "-c TOML"):
        assert option in shown.stdout


def init(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path.mkdir()
    command = [sys.executable, "-m", "pageserver.main", "-D", str(path), "--init", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_init_without_a_tenant(scratch: Path) -> None:
    result = init(scratch / "ps", "-c", "id=1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "pageserver init succeeded\n"
    assert sorted(path.name for path in (scratch / "ps").iterdir()) == [
        "pageserver.log",
        "pageserver.toml",
        "tenants",
    ]
    assert not list((scratch / "ps/tenants").iterdir())
    result = init(scratch / "none")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == caused_by(*PARSE, "missing id")
    assert not list((scratch / "none").iterdir())


def test_remote_storage_is_accepted_and_does_nothing(scratch: Path) -> None:
    """Said on the terminal, at init and at start, and in the log."""
    server = Pageserver(scratch / "ps")
    (scratch / "ps/pageserver.toml").unlink()
    override = f"remote_storage={{local_path='{scratch}/remote', max_sync_errors=1}}"
    listen = [f"listen_pg_addr='127.0.0.1:{server.pg_port}'"]
    listen.append(f"listen_http_addr='127.0.0.1:{server.http_port}'")
    warning = (
        f"remote_storage is set to the directory {scratch}/remote, but this version does not"
        " upload anything: the layers are on the local disk only"
    )
    result = server.run("--init", "-c id=42", *(f"-c {text}" for text in listen), f"-c {override}")
    assert result.returncode == 0
    assert result.stderr == f"Warning: {warning}\n"
    assert (scratch / "ps/pageserver.toml").stat().st_mode & 0o777 == 0o600
    result = server.run("--daemonize")
    pid = int((scratch / "ps/pageserver.pid").read_text())
    try:
        assert (result.returncode, result.stdout) == (0, "")
        assert result.stderr == f"Warning: {warning}\n"
        wait_until(lambda: f": {warning}\n" in server.log(), warning)
        assert not (scratch / "remote").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the end")


def test_daemon(scratch: Path) -> None:
    """Whoever started it may connect at once; a second one leaves it alone."""
    server = Pageserver(scratch / "ps")
    tenant = TenantId.generate()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        result = server.run("--daemonize", "-c", "gc_period='7 s'")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    pid_text = (scratch / "ps/pageserver.pid").read_text()
    pid = int(pid_text)
    try:
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert pid_text == str(pid)
        assert server.http("POST", "tenant", {"new_tenant_id": str(tenant)}) == str(tenant)
        assert server.query("set FOO") == []
        config = server.http("GET", f"tenant/{tenant}/config")["effective"]
        assert config["gc_period"] == "7s"
        assert "gc_period = '7" not in (scratch / "ps/pageserver.toml").read_text()
        assert Path(f"/proc/{pid}/cwd").resolve() == scratch / "ps"
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)
        taken = server.run("--daemonize")
        assert taken.returncode == 1 and "Address already in use" in taken.stderr
        running = server.run("-c listen_pg_addr='127.0.0.1:0'", "-c listen_http_addr='127.0.0.1:0'")
        assert running.returncode == 1 and f"already running with pid {pid}" in running.stderr
        assert (scratch / "ps/pageserver.pid").read_text() == pid_text
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid), "the end")
    assert "graceful shutdown requested: got SIGTERM" in server.log()


@pytest.mark.parametrize(
    ("filter_text", "lines"),
    [
        ("", r".* INFO .*version: pageserver"),
        ("warn", ""),
        ("nonsense=x", r".*ignored 'nonsense=x'"),
    ],
)
def test_foreground_logs_to_stdout(scratch: Path, filter_text: str, lines: str) -> None:
    server = Pageserver(scratch / "ps")
    before = server.log()
    environment = {**os.environ, "RUST_LOG": filter_text}
    environment.pop("GIT_VERSION", None)
    with subprocess.Popen(
        server.command(), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_until(lambda: answers(server), "the pageserver to answer")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert re.match(lines, out) if lines else out == ""
    assert "\x1b" not in out
    assert server.log() == before


def answers(server: Pageserver) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", server.pg_port), 1).close()
        return bool(server.http("GET", "status"))
    return False


@pytest.fixture
def root() -> Iterator[Root]:
    with running("wait_lsn_timeout='60 s'") as root:
        yield root


def is_read(sock: socket.socket) -> bool:
    """Whether the other end of a connection has read all that was sent, as the kernel sees it."""
    theirs, ours = (f"0100007F:{port:04X}" for _, port in (sock.getpeername(), sock.getsockname()))
    table = Path("/proc/net/tcp")
    # First: nothing is on its way any more.
    return (
        f"{ours} {theirs} 01 00000000:" in table.read_text()
        and f"{theirs} {ours} 01 00000000:00000000 " in table.read_text()
    )


def test_second_signal_ends_it_at_once(root: Root) -> None:
    """While the first one waits for a client that is still being served."""
    query = f"basebackup {root.tenant} {root.timeline} F/0\0".encode()
    with root.server.connect() as client:
        client.sock.sendall(b"Q" + (len(query) + 4).to_bytes(4, "big") + query)
        wait_until(lambda: is_read(client.sock), "the query to be read")
        os.kill(root.server.pid, signal.SIGTERM)
        wait_until(lambda: "graceful shutdown requested" in root.server.log(), "the first signal")
        assert root.server.stop(signal.SIGTERM) == 1
