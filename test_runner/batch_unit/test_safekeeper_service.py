"""The safekeeper as a program, and its calls to pageservers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from batch_unit.walproposer_support import ROOT, Safekeeper, wait_until

from safekeeper.callmemaybe import Answers, CallMeMaybe
from zenith_utils.daemonize import bind_listener
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.pq_client import PqConnectionLost, PqError, connect

TIMELINE = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
TERMINATED = 111


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safekeeper.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=30, check=False
    )


def test_identity_lock_and_termination(tmp_path: Path) -> None:
    result = run("-D", str(tmp_path))
    assert (result.returncode, "safekeeper id is not specified" in result.stderr) == (1, True)
    assert run("-D", str(tmp_path), "--id", "7", "--init").returncode == 0
    assert (tmp_path / "safekeeper.id").read_text() == "7"
    result = run("-D", str(tmp_path), "--id", "8")
    assert "safekeeper already initialized with id 7, can't set 8" in result.stderr
    safekeeper = Safekeeper(tmp_path / "sk", 7)
    safekeeper.start()
    try:
        result = run("-D", str(safekeeper.directory))
        assert "is locked by some other process" in result.stderr
    finally:
        assert safekeeper.kill(signal.SIGTERM) == TERMINATED


def test_daemon_and_http(tmp_path: Path) -> None:
    safekeeper = Safekeeper(tmp_path / "sk", 3)
    result = run(
        *("-D", str(safekeeper.directory), "--id", "3", "-l", safekeeper.address),
        *("--listen-http", f"127.0.0.1:{safekeeper.http_port}", "--daemonize"),
    )
    assert result.returncode == 0, result.stderr
    pid = int((safekeeper.directory / "safekeeper.pid").read_text())
    try:
        # Sockets are bound before the parent leaves: no waiting.
        instance = (safekeeper.directory / "safekeeper.instance").read_text()
        assert safekeeper.http("v1/status") == {"id": 3, "instance": instance}
        url = f"http://127.0.0.1:{safekeeper.http_port}/v1/timeline"
        unknown = requests.get(f"{url}/{TIMELINE.tenant_id}/{TIMELINE.timeline_id}", timeout=10)
        assert unknown.status_code == 500
        assert "is not on this safekeeper" in unknown.json()["msg"]
        metrics = requests.get(f"http://127.0.0.1:{safekeeper.http_port}/metrics", timeout=10)
        assert metrics.ok and str(TIMELINE.timeline_id) not in metrics.text
        body = {
            "tenant_id": list(TIMELINE.tenant_id.raw),
            "timeline_id": list(TIMELINE.timeline_id.raw),
            "peer_ids": [],
        }
        created = requests.post(url, json=body, timeout=10)
        assert (created.status_code, created.json()) == (201, None)
        again = requests.post(url, json=body, timeout=10)
        assert again.status_code == 500
        assert again.json() == {"msg": f"timeline {TIMELINE} already exists"}
        status = safekeeper.http(f"v1/timeline/{TIMELINE.tenant_id}/{TIMELINE.timeline_id}")
        assert status["acceptor_state"] == {"term": 0, "epoch": 0, "term_history": []}
        assert status["flush_lsn"] == "0/0"
        wrong = requests.post(url, json={"tenant_id": [1]}, timeout=10)
        assert wrong.status_code == 400
    finally:
        os.kill(pid, signal.SIGKILL)
    path = safekeeper.directory / str(TIMELINE.tenant_id) / str(TIMELINE.timeline_id)
    dump = run("--dump-control-file", str(path / "safekeeper.control"))
    assert dump.returncode == 0
    assert json.loads(dump.stdout)["timeline_id"] == str(TIMELINE.timeline_id)
    assert not dump.stdout.endswith("\n")


def test_localhost_is_ipv4(tmp_path: Path) -> None:
    """A name is as good as an address, and clients that know the IPv4 loopback find it there."""
    safekeeper = Safekeeper(tmp_path / "sk", 5)
    result = run(
        *("-D", str(safekeeper.directory), "--id", "5", "--daemonize"),
        *("--listen", f"localhost:{safekeeper.pg_port}"),
        *("--listen-http", f"localhost:{safekeeper.http_port}"),
        *("--pageserver", "ignored", "--recall", "1 second"),
    )
    assert result.returncode == 0, result.stderr
    pid = int((safekeeper.directory / "safekeeper.pid").read_text())
    try:
        assert safekeeper.http("v1/status")["id"] == 5
        with pytest.raises(PqError, match="tenantid is required"):
            connect("127.0.0.1", safekeeper.pg_port, user="u").simple_query("IDENTIFY_SYSTEM")
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_log_filter_and_signals(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUST_LOG decides what is logged; every signal ends the process at once."""
    monkeypatch.setenv("RUST_LOG", "error,zenith_utils.http_server=info")
    safekeeper = Safekeeper(tmp_path / "sk", 7)
    safekeeper.start()
    assert safekeeper.kill(number) == TERMINATED
    log = (safekeeper.directory / "out.log").read_text()
    assert "GET /v1/status 200" in log
    assert "listens on" not in log


def test_ports_that_are_taken(tmp_path: Path) -> None:
    """Told on the terminal, also by a daemon."""
    with bind_listener("127.0.0.1:0") as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for option in ("--listen-pg", "--listen-http"):
            other = "--listen-http" if option == "--listen-pg" else "--listen-pg"
            result = run(
                *("-D", str(tmp_path), "--id", "1", "-d", option, address, other, "127.0.0.1:0")
            )
            assert result.returncode == 1
            assert f"Error: cannot listen on {address}: Address already in use" in result.stderr


def test_nothing_is_stored_for_a_wrong_address(tmp_path: Path) -> None:
    result = run("-D", str(tmp_path), "--id", "1", "--listen-http", "localhost")
    assert (result.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "invalid address 'localhost': expected host:port" in result.stderr


def test_help() -> None:
    result = run("--help")
    assert result.returncode == 0
    for text in ("data directory:", "service:", "retention:", "example:", "--recall DURATION"):
        assert text in result.stdout


class Calls:
    """Records calls to pageservers, and answers them as told."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.attempts: list[tuple[str, int]] = []
        """Pageserver and number of timelines of every connection."""
        self.down: set[str] = set()
        self.refused: set[TenantTimelineId] = set()
        self.changed = threading.Condition()

    def __call__(
        self, connstr: str, timeline_ids: Sequence[TenantTimelineId], listen: Any
    ) -> Answers:
        """Record a call."""
        with self.changed:
            self.attempts.append((connstr, len(timeline_ids)))
            if connstr in self.down:
                raise PqConnectionLost("connection refused")
            self.made += [connstr] * len(timeline_ids)
            refusals = {t: "no such timeline" for t in timeline_ids if t in self.refused}
            return Answers(len(timeline_ids), refusals)

    def count(self, connstr: str) -> int:
        """How often a pageserver was called."""
        with self.changed:
            return self.made.count(connstr)

    def wait(self, connstr: str, count: int) -> None:
        """Wait for so many calls."""
        wait_until(lambda: self.count(connstr) >= count, f"{count} calls of {connstr}")


def test_callmemaybe() -> None:
    calls = Calls()
    caller = CallMeMaybe(("127.0.0.1", 1), 0.02, calls)
    caller.start()
    try:
        caller.subscribe(TIMELINE, "first")
        calls.wait("first", 3)
        # The compute has moved to another pageserver: only that one is called.
        caller.subscribe(TIMELINE, "second")
        calls.wait("second", 1)
        before = calls.count("first")
        calls.wait("second", 4)
        assert calls.count("first") <= before + 1
        # No calls while a stream runs, again when it has ended.
        caller.stream_started(TIMELINE, "second")
        caller.subscribe(TenantTimelineId(TIMELINE.tenant_id, TimelineId(bytes(16))), "other")
        before = calls.count("second")
        calls.wait("other", calls.count("other") + 4)
        assert calls.count("second") <= before + 1
        caller.stream_ended(TIMELINE, "second")
        calls.wait("second", before + 2)
        # A compute that has just connected keeps its subscription.
        caller.unsubscribe(TIMELINE, "second", unless=lambda: True)
        calls.wait("second", calls.count("second") + 2)
        caller.unsubscribe(TIMELINE, "second", unless=lambda: False)
        before = calls.count("second")
        calls.wait("other", calls.count("other") + 4)
        assert calls.count("second") <= before + 1
    finally:
        caller.stop()


def other_timeline(number: int) -> TenantTimelineId:
    return TenantTimelineId(TIMELINE.tenant_id, TimelineId(number.to_bytes(16, "big")))


def test_callmemaybe_to_a_pageserver_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """However many timelines wait, it costs one attempt per period, and one line in the log."""
    calls = Calls()
    calls.down.add("down")
    caller = CallMeMaybe(("127.0.0.1", 1), 0.02, calls)
    for number in range(200):
        caller.subscribe(other_timeline(number), "down")
    caller.subscribe(TIMELINE, "up")
    begun = time.monotonic()
    caller.start()
    try:
        calls.wait("up", 20)
        with calls.changed:
            attempts = calls.attempts.count(("down", 64))
            assert attempts == sum(connstr == "down" for connstr, _ in calls.attempts)
        assert 1 <= attempts <= 1 + (time.monotonic() - begun) / 0.02
        calls.down.clear()
        calls.wait("down", 200)
        assert caller.subscriptions == 201
    finally:
        caller.stop()
    assert sum("callmemaybe to down failed" in text for text in caplog.messages) == 1


def test_callmemaybe_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A pageserver that does not have the timeline is asked less and less often."""
    calls = Calls()
    refused = other_timeline(1)
    calls.refused.add(refused)
    caller = CallMeMaybe(("127.0.0.1", 1), 0.01, calls)
    caller.subscribe(refused, "refuses")
    caller.subscribe(TIMELINE, "up")
    caller.start()
    try:
        calls.wait("up", 64)
        assert 1 <= calls.count("refuses") <= 16
    finally:
        caller.stop()
    assert sum("refuses callmemaybe: no such" in text for text in caplog.messages) == 1
