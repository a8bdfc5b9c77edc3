"""A compute's supervisor as a process: what it starts, and what it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from batch_unit.workspace import temporary_workspace

from compute_tools import state
from compute_tools.pageserver_client import (
    LEASE_TTL,
    GoneError,
    Lease,
    PageserverClient,
    PageserverError,
)
from compute_tools.spec import ComputeSpec
from pageserver.leases import MAX_TTL
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

# In a process of its own: all children but the spared one are ended. There is no deadline that
# would hide a child that is waited for in vain.
_CLEAN_UP = """
import os, subprocess, sys
from pathlib import Path
from compute_tools import postgres_process
postgres_process.KILL_TIMEOUT = 1e9
dead = subprocess.Popen(["true"])
os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
left = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
gone = subprocess.Popen(["true"])
gone.wait()
postgres_process.PostgresProcess(Path("/nonexistent"), gone, 0).clean_up(spare=[dead.pid])
for child in left:
    assert not Path(f"/proc/{child.pid}").exists()
assert dead.wait() == 0
"""


def test_clean_up_beside_a_dead_child() -> None:
    """A child to be spared that has ended and is not waited for yet keeps nobody else alive."""
    done = subprocess.run(
        [sys.executable, "-c", _CLEAN_UP], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# The limits go to the walproposer; the server keeps all its settings where it refuses new ones.
_FOLLOW = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from compute_tools.spec import ComputeSpec
from compute_tools.supervisor import Supervisor
logging.basicConfig(level=logging.ERROR, format="%(message)s")
supervisor = Supervisor(ComputeSpec.load(Path(sys.argv[1])))
limits = []
supervisor._parts.proposer = SimpleNamespace(set_limits=lambda *now: limits.append(now[0] >> 20))
conf = supervisor._spec.pgdata / "postgresql.conf"
def follow(text):
    conf.write_text(text)
    supervisor._follow_config()
follow("max_replication_write_lag = 7MB\\n")
conf.unlink()
supervisor._follow_config()
supervisor._follow_config()
follow("include 'none.conf'\\n")
follow("max_replication_write_lag = 8MB\\n")
assert limits == [7, 8], limits
"""


# A pageserver that is away, then here again, then without the pages.
_LEASE = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from compute_tools import state
from compute_tools.pageserver_client import GoneError, Lease, PageserverError
from compute_tools.spec import ComputeSpec
from compute_tools.supervisor import StopMode, Supervisor, _Parts
from zenith_utils.lsn import Lsn
spec = ComputeSpec.load(Path(sys.argv[1]))
answers = [PageserverError("away"), None, GoneError("collected")]
def renew(lease):
    answer = answers.pop(0)
    if answer is not None:
        raise answer
supervisor = Supervisor(spec)
supervisor._pageserver = SimpleNamespace(renew_lease=renew)
supervisor._parts.postgres = SimpleNamespace(poll=lambda: None)
lease = Lease(state.lease_id(spec.state_dir), Lsn(0x1000))
try:
    supervisor._renew_lease(lease)
except PageserverError:
    pass
supervisor._renew_lease(lease)
assert supervisor._what_ended() is None
supervisor._renew_lease(lease)
print(supervisor._wait_for_end())
released = []
supervisor._pageserver.release_lease = released.append
supervisor._parts = _Parts(lease=lease)
supervisor._stop_all(StopMode.IMMEDIATE)
assert released == [lease], "a start that is broken off gives back what it asked for"
"""


@pytest.fixture
def workspace() -> Iterator[Path]:
    with temporary_workspace() as path:
        yield path


@pytest.fixture
def spec(workspace: Path) -> ComputeSpec:
    """A compute whose server is too old, and whose pageserver is not there."""
    server = workspace / "distrib" / "bin" / "postgres"
    server.parent.mkdir(parents=True)
    server.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 15.12'\n")
    server.chmod(0o755)
    (workspace / "pgdata").mkdir()
    (workspace / "state").mkdir()
    return ComputeSpec(
        tenant_id=TenantId.generate(),
        timeline_id=TimelineId.generate(),
        pgdata=workspace / "pgdata",
        state_dir=workspace / "state",
        distrib_dir=workspace / "distrib",
        pageserver_pg=("127.0.0.1", 1),
        pageserver_http=("127.0.0.1", 1),
        port=1,
    )


def start(spec: ComputeSpec) -> str:
    """Why a compute does not start."""
    path = spec.state_dir / "spec.json"
    path.write_text(spec.to_json())
    done = subprocess.run(
        [sys.executable, "-m", "compute_tools", f"--spec={path}", "--status-fd=1"],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])["failed"]
    assert isinstance(failed, str)
    return failed


def test_a_release_whose_commits_do_not_wait_is_refused(spec: ComputeSpec) -> None:
    """Where there are commits: a node at an LSN goes on, here to a pageserver that is not there."""
    assert "install PostgreSQL 15.13 or a later 15" in start(spec)
    assert "install PostgreSQL" not in start(replace(spec, lsn=Lsn(8)))


def run(program: str, spec: ComputeSpec) -> subprocess.CompletedProcess[str]:
    """A program that is told of the compute, and ends well."""
    path = spec.state_dir / "spec.json"
    path.write_text(spec.to_json())
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_configuration_that_cannot_be_read_changes_nothing(spec: ComputeSpec) -> None:
    (line,) = run(_FOLLOW, spec).stderr.splitlines()
    assert line.startswith("cannot follow the change of the configuration: [Errno 2]")


def test_a_node_ends_when_its_pages_are_gone(spec: ComputeSpec) -> None:
    """And not while its pageserver is away."""
    assert run(_LEASE, spec).stdout == (
        "the pageserver has no pages at 0/1000 for it any more (collected): start it again\n"
    )


def test_all_lives_of_a_node_share_a_lease(spec: ComputeSpec) -> None:
    first = state.lease_id(spec.state_dir)
    assert state.lease_id(spec.state_dir) == first
    (spec.state_dir / "lease").write_text(first[:7])
    second = state.lease_id(spec.state_dir)
    assert len(second) == 32 and second != first


class Answering(BaseHTTPRequestHandler):
    """Answers every request with one status, and takes note of it."""

    status: ClassVar[HTTPStatus]
    asked: ClassVar[list[tuple[str, dict[str, object]]]]

    def do_PUT(self) -> None:
        """The only method."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        answer = json.dumps({"msg": "its words"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_what_is_gone_is_told_from_what_fails(spec: ComputeSpec) -> None:
    lease = Lease("0" * 32, Lsn(0x1000))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Answering.asked = []
        client = PageserverClient(replace(spec, pageserver_http=("127.0.0.1", server.server_port)))
        Answering.status = HTTPStatus.OK
        client.renew_lease(lease)
        for status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND, HTTPStatus.BAD_GATEWAY):
            Answering.status = status
            with pytest.raises(PageserverError, match="its words") as caught:
                client.renew_lease(lease)
            assert not isinstance(caught.value, GoneError)
        Answering.status = HTTPStatus.GONE
        with pytest.raises(GoneError, match="its words"):
            client.renew_lease(lease)
        server.shutdown()
    path, body = Answering.asked[0]
    assert path.endswith(f"/lsn_lease/{lease.lease_id}")
    assert body == {"lsn": "0/1000", "ttl": LEASE_TTL}
    assert LEASE_TTL <= MAX_TTL
